//! The Chimera 5.x backbone as graphs, one for each entry point (semantics 1).

use std::collections::HashSet;

use chimera_ir::{
    Graph, Type, Value,
    ops::{CrossEntropy, Embed, Linear, LossMean, PackPanels, Positions, Preference, RopeScaling, RopeTable},
};

use crate::{
    config::ModelConfig,
    layers::{Built, Depth, Net, Shape, Stream},
};

/// What an entry point returns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Head {
    /// `hidden [R, T, d]` after the final norm and `logits [R, T, V]`.
    Logits,
    /// `hidden` only; what prefill needs is the state.
    Hidden,
    /// `losses [R]` and `loss [1]`, in nats; takes `labels` (-100 is ignored).
    Loss,
    /// The same of pairs of rows, whose first is preferred: `losses`, `loss`, `margins [R]` and `logp [R]` (see [`Preference`]); takes
    /// `labels` and `reference` (`f32 [R]`).
    Preference {
        /// How strongly a difference counts.
        beta: f32,
    },
}

/// What of a model a graph runs. A cut lies in front of a layer outside of the loop, or of its first one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// All of it.
    Whole,
    /// The layers in front of this one: the output is `prefix [R, T, d]`, what goes into it.
    To(usize),
    /// From this layer on; `prefix` is an input.
    From(usize),
}

/// Where a model can be cut so that layer `first` and all behind it lie behind the cut.
pub fn cut(cfg: &ModelConfig, first: usize) -> usize {
    match &cfg.looping {
        Some(l) if first > l.body[0] && first <= l.body[1] => l.body[0],
        _ => first.min(cfg.layers.len()),
    }
}

/// The graph of one entry point.
///
/// Inputs: `tokens` and `seg` (`i32 [R, T]`; a new document starts where `seg` changes), `labels` for a loss, `depth` (`i32 [R]`) for
/// rows of their own loop depth. Other outputs: `load.*` tokens per expert, `surprise.*`, `knot.*`, `loops`.
pub fn graph(cfg: &ModelConfig, shape: Shape, head: Head) -> Built<Graph> {
    build(Net::new(cfg, shape), head, Part::Whole)
}

/// [`graph`] with codes and scales in place of the latents of the ternary weights `packed`, see [`Net::packed`].
pub fn packed_graph(cfg: &ModelConfig, shape: Shape, head: Head, packed: &HashSet<String>) -> Built<Graph> {
    let mut net = Net::new(cfg, shape);
    net.packed = Some(packed);
    build(net, head, Part::Whole)
}

/// [`graph`] of a part of the model, see [`cut`].
pub fn part_graph(cfg: &ModelConfig, shape: Shape, head: Head, part: Part) -> Built<Graph> {
    build(Net::new(cfg, shape), head, part)
}

fn build(mut net: Net<'_>, head: Head, part: Part) -> Built<Graph> {
    let (cfg, shape) = (net.cfg, net.shape);
    let tokens = Type::i32(&[shape.rows, shape.tokens]);
    net.g.at("embed");
    let ids = net.g.input("tokens", tokens.clone());
    let seg = net.g.input("seg", tokens.clone());
    let table = net.param("embed.weight", &[cfg.vocab_size, cfg.hidden_size]);
    let pos = net.positions(seg)?;
    let emb = net.op(Embed {}, &[ids, table])?;
    let rope = match net.titans_in(0..=cfg.layers.len() - 1) {
        true => Some(net.rope_table(pos)?),
        false => None,
    };
    let stream = Stream { pos, emb, rope };
    let depth = match (shape.depth, &cfg.looping) {
        (Depth::PerRow { .. }, Some(_)) => Some(net.g.input("depth", Type::i32(&[shape.rows]))),
        _ => None,
    };
    let (mut x, layers) = match part {
        Part::Whole => (emb, 0..cfg.layers.len()),
        Part::To(layer) => (emb, 0..layer),
        Part::From(layer) => {
            let hidden = Type::f32(&[shape.rows, shape.tokens, cfg.hidden_size]);
            (net.g.input("prefix", hidden), layer..cfg.layers.len())
        }
    };
    let last = cfg.layers.len().saturating_sub(1);
    let (before, behind) = match &cfg.looping {
        None => ([0, last], None),
        Some(l) => (l.prelude, Some(l)),
    };
    for layer in (before[0]..=before[1]).filter(|l| layers.contains(l)) {
        x = net.block(layer, x, stream)?;
    }
    if let Some(l) = behind {
        if layers.contains(&l.body[0]) {
            x = net.looped(l, x, stream, depth)?;
        }
        for layer in (l.coda[0]..=l.coda[1]).filter(|l| layers.contains(l)) {
            x = net.block(layer, x, stream)?;
        }
    }
    if let Part::To(_) = part {
        net.g.outputs.push(("prefix".into(), x));
        net.g.verify()?;
        return Ok(net.g);
    }
    net.g.at("head");
    let h = net.rms_norm(x, Some("norm.weight"))?;
    match head {
        Head::Hidden => net.g.outputs.push(("hidden".into(), h)),
        Head::Logits => {
            let panels = net.op(PackPanels {}, &[table])?;
            let z = net.op(Linear { m: cfg.vocab_size, grouped_rows: false }, &[h, panels])?;
            net.g.outputs.extend([("hidden".into(), h), ("logits".into(), z)]);
        }
        Head::Loss | Head::Preference { .. } => {
            let labels = net.g.input("labels", tokens);
            let panels = net.op(PackPanels {}, &[table])?;
            let nll = net.op(CrossEntropy { vocab: cfg.vocab_size }, &[h, panels, labels])?;
            let outs = match head {
                Head::Preference { beta } => {
                    let reference = net.g.input("reference", Type::f32(&[shape.rows]));
                    net.g.ops(Preference { beta }, &[nll, reference])?
                }
                _ => net.g.ops(LossMean {}, &[nll, labels])?,
            };
            let names = ["losses", "loss", "margins", "logp"];
            net.g.outputs.extend(names.iter().zip(outs).map(|(name, v)| ((*name).to_owned(), v)));
        }
    }
    let side = std::mem::take(&mut net.side);
    net.g.outputs.extend(side);
    net.g.verify()?;
    Ok(net.g)
}

impl Net<'_> {
    fn positions(&mut self, seg: Value) -> Built {
        let carry = self.shape.carry;
        let rows = Type::i32(&[self.shape.rows]);
        let mut ins = vec![seg];
        let names = ["pos", "seg"];
        if carry {
            ins.extend(names.map(|n| self.g.state(n, rows.clone())));
        }
        let outs = self.g.ops(Positions { carry }, &ins)?;
        self.g.writes.extend(names.iter().zip(&outs[1..]).map(|(n, &v)| ((*n).to_owned(), v)));
        Ok(outs[0])
    }

    fn rope_table(&mut self, pos: Value) -> Built<(Value, Value)> {
        let theta = self.cfg.titans.rope_theta as f32;
        let op = RopeTable { dim: self.cfg.head_dim, theta, scaling: RopeScaling::None };
        let outs = self.g.ops(op, &[pos])?;
        Ok((outs[0], outs[1]))
    }
}
