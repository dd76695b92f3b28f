//! Activation checkpointing: what gradients read of the forward pass is made again where they are computed, instead of being kept.
//!
//! A *part* is a run of operations of one layer, or of a half of it, in one iteration of a loop. What other parts read of a part that
//! is made again is kept, so a part is made again from the inputs of its layer. Operations are functions of their operands, so
//! gradients keep their bits.

use chimera_ir::{
    Graph, Value,
    graph::{GRAD_SITE, Kind, Node},
};

/// How large parts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    /// Mixer and feed-forward network of a layer apart: more inputs are kept, less is there at once.
    Half,
    /// Whole layers.
    Layer,
}

impl Grain {
    /// All of them.
    pub const ALL: [Grain; 2] = [Grain::Half, Grain::Layer];

    fn key(self, site: &str) -> &str {
        match (self, site.match_indices('.').nth(1)) {
            (Grain::Layer, Some((at, _))) => &site[..at],
            _ => site,
        }
    }
}

/// Operations that are made again together.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The part of the model, and behind the first iteration of a loop its number: `layers.3.attn`, `layers.3.attn#2`.
    pub name: String,
    /// Bytes that gradients read of it and nothing else: they need not be kept when it is made again.
    pub bytes: u64,
    /// Operations of what those bytes are made of; a ternary multiply-accumulate counts two.
    pub flops: u64,
}

/// Whether a node belongs to the gradient.
fn is_backward(node: &Node) -> bool {
    node.site.ends_with(GRAD_SITE)
}

/// A graph whose operations are dealt out to parts.
#[derive(Debug)]
pub struct Parts<'a> {
    g: &'a Graph,
    /// The parts that gradients read something of, in the order of the forward pass.
    pub list: Vec<Part>,
    /// The part of every node.
    home: Vec<Option<usize>>,
    /// Whether a value is read by other parts than its own.
    crosses: Vec<bool>,
}

impl<'a> Parts<'a> {
    /// The parts of a graph with gradients.
    pub fn of(g: &'a Graph, grain: Grain) -> Parts<'a> {
        let mut names: Vec<&str> = vec![];
        let mut home = vec![None; g.nodes().len()];
        for (i, node) in g.nodes().iter().enumerate() {
            if !matches!(node.kind, Kind::Op(_)) || is_backward(node) {
                continue;
            }
            let key = grain.key(&node.site);
            if names.last() != Some(&key) {
                names.push(key);
            }
            home[i] = Some(names.len() - 1);
        }
        let mut crosses = vec![false; g.n_values()];
        for (node, &own) in g.nodes().iter().zip(&home).filter(|(n, _)| !is_backward(n)) {
            let elsewhere = node.ins.iter().filter(|v| own.is_none() || home[g.node_of(**v).0 as usize] != own);
            elsewhere.for_each(|v| crosses[v.0 as usize] = true);
        }
        g.outputs.iter().chain(&g.writes).for_each(|(_, v)| crosses[v.0 as usize] = true);
        let mut parts = Parts { g, list: vec![], home, crosses };
        parts.weigh(&names);
        parts
    }

    /// Counts the bytes and operations of every part, and forgets those of which gradients read nothing.
    fn weigh(&mut self, names: &[&str]) {
        let g = self.g;
        let mut read = vec![false; g.n_values()];
        g.nodes().iter().filter(|n| is_backward(n)).flat_map(|n| &n.ins).for_each(|v| read[v.0 as usize] = true);
        let mut wanted = read.clone();
        let mut all = vec![(0u64, 0u64); names.len()];
        // What is made again needs its operands.
        for (node, &own) in g.nodes().iter().zip(&self.home).rev() {
            let (Some(p), Kind::Op(op)) = (own, &node.kind) else { continue };
            let made = |v: &Value| wanted[v.0 as usize] && !self.crosses[v.0 as usize];
            if !node.outs.iter().any(made) {
                continue;
            }
            let freed = node.outs.iter().filter(|v| made(v) && read[v.0 as usize]);
            let bytes = freed.map(|&v| g.ty(v).bytes() as u64).sum::<u64>();
            let types = |vs: &[Value]| vs.iter().map(|&v| g.ty(v).clone()).collect::<Vec<_>>();
            let flops = op.flops(&types(&node.ins), &types(&node.outs));
            all[p].0 += bytes;
            all[p].1 += flops.float + 2 * flops.ternary;
            node.ins.iter().for_each(|v| wanted[v.0 as usize] = true);
        }
        let mut new = vec![None; names.len()];
        for (p, (&name, (bytes, flops))) in names.iter().zip(all).enumerate().filter(|(_, (_, cost))| cost.0 > 0) {
            let before = self.list.iter().filter(|x| x.name.split('#').next() == Some(name)).count();
            let name = if before > 0 { format!("{name}#{}", before + 1) } else { name.to_owned() };
            new[p] = Some(self.list.len());
            self.list.push(Part { name, bytes, flops });
        }
        self.home.iter_mut().for_each(|h| *h = h.and_then(|p| new[p]));
    }

    /// The graph in which every part that `chosen` names by its index is made again.
    pub fn again(&self, chosen: &[bool]) -> Graph {
        let (old, mut new) = (self.g, Graph::default());
        let mut map: Vec<Option<Value>> = vec![None; old.n_values()];
        let mut made: Vec<Option<Value>> = vec![None; old.n_values()];
        for node in old.nodes() {
            let mut ins = vec![];
            for &v in &node.ins {
                ins.push(match is_backward(node) {
                    true => self.fetch(v, chosen, &mut new, &map, &mut made),
                    false => map[v.0 as usize].expect("values are defined before they are used"),
                });
            }
            let tys = node.outs.iter().map(|&v| old.ty(v).clone()).collect();
            new.at(node.site.clone());
            let outs = new.push(node.kind.clone(), ins, tys);
            node.outs.iter().zip(outs).for_each(|(v, n)| map[v.0 as usize] = Some(n));
        }
        let rename = |list: &[(String, Value)]| {
            list.iter().map(|(n, v)| (n.clone(), map[v.0 as usize].expect("results are defined"))).collect()
        };
        (new.outputs, new.writes) = (rename(&old.outputs), rename(&old.writes));
        new
    }

    /// A value of the forward pass for the gradient: the one that was kept, or another one made here.
    fn fetch(
        &self,
        v: Value,
        chosen: &[bool],
        new: &mut Graph,
        map: &[Option<Value>],
        made: &mut [Option<Value>],
    ) -> Value {
        let at = self.g.node_of(v).0 as usize;
        let again = self.home[at].is_some_and(|p| chosen[p]) && !self.crosses[v.0 as usize];
        if !again {
            return map[v.0 as usize].expect("values are defined before they are used");
        }
        if let Some(there) = made[v.0 as usize] {
            return there;
        }
        let node = &self.g.nodes()[at];
        let ins = node.ins.iter().map(|&i| self.fetch(i, chosen, new, map, made)).collect();
        let tys = node.outs.iter().map(|&o| self.g.ty(o).clone()).collect();
        new.at(format!("{}.again", node.site));
        let outs = new.push(node.kind.clone(), ins, tys);
        node.outs.iter().zip(&outs).for_each(|(o, &n)| made[o.0 as usize] = Some(n));
        made[v.0 as usize].expect("a value is among the results of its node")
    }
}
