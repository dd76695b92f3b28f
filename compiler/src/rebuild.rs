//! The way passes rewrite graphs: a new graph is built node by node.
//!
//! Bodies of loops are rebuilt by the same rule, so a pass is written once for both.

use chimera_ir::{
    Graph, Value,
    graph::{Kind, Node, Repeat},
    ops::InferError,
};

/// A graph being rebuilt.
#[derive(Debug)]
pub(crate) struct Rebuild<'a> {
    /// The graph as it was.
    pub(crate) old: &'a Graph,
    /// The graph so far.
    pub(crate) new: Graph,
    map: Vec<Option<Value>>,
}

/// What a rule makes of a node: `None` keeps it, otherwise the values that replace its results.
pub(crate) type Ruling = Result<Option<Vec<Value>>, InferError>;

impl Rebuild<'_> {
    /// The new value of an old one.
    ///
    /// # Panics
    /// When the old value is defined later; rules only look at operands.
    pub(crate) fn get(&self, v: Value) -> Value {
        self.map[v.0 as usize].expect("operands are rebuilt before their users")
    }

    /// The new value of an old one, if it is there already.
    pub(crate) fn find(&self, v: Value) -> Option<Value> {
        self.map[v.0 as usize]
    }

    /// The new values of old ones.
    pub(crate) fn all(&self, vs: &[Value]) -> Vec<Value> {
        vs.iter().map(|&v| self.get(v)).collect()
    }
}

/// Rebuild `old` by `rule`, which sees every node after its operands.
pub(crate) fn rebuild(
    old: &Graph,
    rule: &mut dyn FnMut(&mut Rebuild<'_>, &Node) -> Ruling,
) -> Result<Graph, InferError> {
    Ok(rebuild_mapped(old, rule)?.0)
}

fn rebuild_mapped(
    old: &Graph,
    rule: &mut dyn FnMut(&mut Rebuild<'_>, &Node) -> Ruling,
) -> Result<(Graph, Vec<Option<Value>>), InferError> {
    let mut cx = Rebuild { old, new: Graph::default(), map: vec![None; old.n_values()] };
    for node in old.nodes() {
        cx.new.at(node.site.clone());
        let outs = match rule(&mut cx, node)? {
            Some(outs) => outs,
            None => copy(&mut cx, node, rule)?,
        };
        for (&v, new) in node.outs.iter().zip(outs) {
            cx.map[v.0 as usize] = Some(new);
        }
    }
    let rename = |list: &[(String, Value)]| -> Vec<(String, Value)> {
        list.iter().map(|(n, v)| (n.clone(), cx.get(*v))).collect()
    };
    let (outputs, writes) = (rename(&old.outputs), rename(&old.writes));
    let mut new = cx.new;
    (new.outputs, new.writes) = (outputs, writes);
    Ok((new, cx.map))
}

fn copy(
    cx: &mut Rebuild<'_>,
    node: &Node,
    rule: &mut dyn FnMut(&mut Rebuild<'_>, &Node) -> Ruling,
) -> Result<Vec<Value>, InferError> {
    let ins = cx.all(&node.ins);
    match &node.kind {
        Kind::Op(op) => cx.new.ops(op.clone(), &ins),
        Kind::Param(name) => Ok(vec![cx.new.param(name, cx.old.ty(node.outs[0]).clone())]),
        Kind::Repeat(r) => {
            let (body, map) = rebuild_mapped(&r.body, rule)?;
            let args = r.args.iter().map(|a| map[a.0 as usize].expect("arguments are kept")).collect();
            cx.new.repeat(Repeat { body, args, n_carried: r.n_carried, max: r.max }, &ins)
        }
        kind => Ok(cx.new.push(kind.clone(), ins, vec![cx.old.ty(node.outs[0]).clone()])),
    }
}

/// The graph without nodes that nothing needs. Arguments of loops stay, and states that are written.
pub(crate) fn sweep(old: &Graph) -> Graph {
    let mut live = vec![false; old.n_values()];
    for (_, v) in old.outputs.iter().chain(&old.writes) {
        live[v.0 as usize] = true;
    }
    let mut keep = vec![false; old.nodes().len()];
    for (i, node) in old.nodes().iter().enumerate().rev() {
        let effect = matches!(&node.kind, Kind::Repeat(r) if !r.body.writes.is_empty());
        let written = matches!(&node.kind, Kind::State(name) if old.writes.iter().any(|(n, _)| n == name));
        keep[i] =
            effect || written || matches!(node.kind, Kind::Input(_)) || node.outs.iter().any(|v| live[v.0 as usize]);
        if keep[i] {
            node.ins.iter().for_each(|v| live[v.0 as usize] = true);
        }
    }
    let mut map: Vec<Option<Value>> = vec![None; old.n_values()];
    let mut new = Graph::default();
    for (node, _) in old.nodes().iter().zip(keep).filter(|(_, k)| *k) {
        new.at(node.site.clone());
        let ins = node.ins.iter().map(|v| map[v.0 as usize].expect("a live node has live operands")).collect();
        let kind = match &node.kind {
            Kind::Repeat(r) => {
                let body = sweep_body(r);
                Kind::Repeat(Box::new(body))
            }
            kind => kind.clone(),
        };
        let tys = node.outs.iter().map(|&v| old.ty(v).clone()).collect();
        for (&v, n) in node.outs.iter().zip(new.push(kind, ins, tys)) {
            map[v.0 as usize] = Some(n);
        }
    }
    let rename = |list: &[(String, Value)]| {
        list.iter().map(|(n, v)| (n.clone(), map[v.0 as usize].expect("results are live"))).collect()
    };
    (new.outputs, new.writes) = (rename(&old.outputs), rename(&old.writes));
    new
}

fn sweep_body(r: &Repeat) -> Repeat {
    let mut marked = r.body.clone();
    let n = marked.outputs.len();
    marked.outputs.extend(r.args.iter().map(|&a| (String::new(), a)));
    let mut body = sweep(&marked);
    let args = body.outputs.split_off(n).into_iter().map(|(_, v)| v).collect();
    Repeat { body, args, n_carried: r.n_carried, max: r.max }
}
