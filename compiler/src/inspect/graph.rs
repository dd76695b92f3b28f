//! The tensor graph of every entry point, stage by stage.
//!
//! Nodes inside a loop body count once, as they exist once.

use std::collections::BTreeMap;
use std::fmt;

use chimera_ir::{
    Graph,
    graph::{Kind, Repeat},
};
use serde::Serialize;

use super::table::Table;

/// One graph after one stage.
#[derive(Clone, Debug, Serialize)]
pub struct GraphStage {
    /// Entry point.
    pub entry: String,
    /// Stage of compilation.
    pub stage: &'static str,
    /// Number of nodes, bodies of loops included.
    pub nodes: usize,
    /// How many nodes of each kind there are.
    pub kinds: BTreeMap<String, usize>,
}

/// Graphs as they come out of the stages; pass [`Stages::see`] to the compiler.
#[derive(Clone, Debug, Default)]
pub struct Stages {
    seen: Vec<GraphStage>,
}

impl Stages {
    /// Count the nodes of a graph.
    pub fn see(&mut self, stage: &'static str, entry: &str, g: &Graph) {
        let mut kinds = BTreeMap::new();
        tally(g, &mut kinds);
        let nodes = kinds.values().sum();
        self.seen.push(GraphStage { entry: entry.to_owned(), stage, nodes, kinds });
    }

    /// What was seen.
    pub fn report(self) -> GraphReport {
        GraphReport { stages: self.seen }
    }
}

fn tally(g: &Graph, kinds: &mut BTreeMap<String, usize>) {
    for node in g.nodes() {
        *kinds.entry(node.kind.name().to_owned()).or_default() += 1;
        if let Kind::Repeat(r) = &node.kind {
            let Repeat { body, .. } = &**r;
            tally(body, kinds);
        }
    }
}

/// Graphs by entry point and stage.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct GraphReport {
    /// In the order of compilation.
    pub stages: Vec<GraphStage>,
}

impl fmt::Display for GraphReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut entries: Vec<&str> = self.stages.iter().map(|s| s.entry.as_str()).collect();
        entries.dedup();
        for (i, entry) in entries.iter().enumerate() {
            let of: Vec<&GraphStage> = self.stages.iter().filter(|s| s.entry == *entry).collect();
            if i > 0 {
                writeln!(f)?;
            }
            let mut table = Table::new(&["stage", "nodes"]);
            of.iter().for_each(|s| table.row([s.stage.to_owned(), s.nodes.to_string()]));
            write!(f, "graph of {entry}\n{table}")?;
            if let Some(last) = of.last() {
                let kinds: Vec<String> = last.kinds.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
                writeln!(f, "  after {}: {}", last.stage, kinds.join(", "))?;
            }
        }
        Ok(())
    }
}
