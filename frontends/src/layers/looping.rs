//! Looping of the middle layers (semantics 9): the body is built once and re-entered.

use chimera_ir::{
    Tensor, Type, Value,
    graph::Repeat,
    ops::{BinaryFn, LoopExit, LoopMask, Select, UnaryFn},
};

use super::{Built, Depth, Net, Stream};
use crate::config::LoopConfig;

impl Net<'_> {
    /// The recurrence over depth between prelude and coda. `x` and the result are `[R, T, d]`; `depth` is `i32 [R]` for rows of
    /// their own depth: a row that is done keeps its hidden state, and the carried states of the iterations it does not run. Also
    /// keeps `loops` (`i32 [R]`, iterations that each row ran) in that case.
    pub fn looped(&mut self, cfg: &LoopConfig, x: Value, s: Stream, depth: Option<Value>) -> Built {
        self.g.at("loop");
        let e = self.rms_norm(x, Some("loop.norm.weight"))?;
        let (_, input) = self.injection(cfg)?;
        let be = self.mul(e, input)?;
        let h = self.affine(e, 0.0, 0.0)?;

        let mut invariants = vec![be, s.emb, s.pos];
        if let Some((cos, sin)) = s.rope.filter(|_| self.titans_in(cfg.body[0]..=cfg.body[1])) {
            invariants.extend([cos, sin]);
        }
        invariants.extend(depth);
        let loads = self.loads_in_body(cfg);
        let rows = Type::i32(&[self.shape.rows]);
        let mut carried = vec![h];
        if depth.is_some() {
            let zero = self.g.constant(Tensor::zeros(&rows));
            carried.extend([zero, zero]);
        }
        for (_, n) in &loads {
            carried.push(self.g.constant(Tensor::zeros(&Type::i32(&[*n]))));
        }

        let outer = std::mem::take(&mut self.g);
        let kept = self.looped.replace(vec![]);
        let mut args = vec![self.g.input("iteration", Type::i32(&[1]))];
        for (i, &v) in carried.iter().chain(&invariants).enumerate() {
            args.push(self.g.input(format!("arg{i}"), outer.ty(v).clone()));
        }
        let (decay, _) = self.injection(cfg)?;
        let inside = &args[1 + carried.len()..];
        let stream =
            Stream { emb: inside[1], pos: inside[2], rope: (inside.len() > 4).then(|| (inside[3], inside[4])) };
        let (h, be) = (args[1], inside[0]);
        let own_depth = depth.map(|_| *inside.last().expect("the depth is the last invariant"));

        self.g.at("loop");
        let z = self.mul(h, decay)?;
        let mut z = self.add(z, be)?;
        for layer in cfg.body[0]..=cfg.body[1] {
            z = self.block(layer, z, stream)?;
        }
        self.g.at("loop");
        let mut next = vec![];
        let again = match own_depth {
            None => {
                next.push(z);
                self.word(1)
            }
            Some(depth) => {
                let (used, done, k) = (args[2], args[3], args[0]);
                let active = self.op(LoopMask {}, &[depth, done, k])?;
                let z = self.op(Select {}, &[active, z, h])?;
                let adaptive = matches!(self.shape.depth, Depth::PerRow { adaptive: true, .. });
                let op = LoopExit { min: cfg.range[0], threshold: cfg.exit_threshold as f32, adaptive };
                let outs = self.g.ops(op, &[z, h, active, used, done, depth, k])?;
                next.extend([z, outs[0], outs[1]]);
                self.freeze_states(active)?;
                outs[2]
            }
        };
        let kept_inside = std::mem::replace(&mut self.looped, kept).unwrap_or_default();
        for (name, _) in &loads {
            let found = kept_inside.iter().rev().find(|(n, _)| n == name);
            next.push(found.expect("every expert layer of the body keeps its load").1);
        }
        for (i, &v) in next.iter().enumerate() {
            self.g.outputs.push((format!("carried{i}"), v));
        }
        self.g.outputs.push(("again".to_owned(), again));
        let body = std::mem::replace(&mut self.g, outer);
        let repeat = Repeat { body, args, n_carried: carried.len(), max: self.shape.depth.max() };
        let ins: Vec<Value> = carried.iter().chain(&invariants).copied().collect();
        let outs = self.g.repeat(repeat, &ins)?;
        let first_load = outs.len() - loads.len();
        for ((name, _), &v) in loads.iter().zip(&outs[first_load..]) {
            self.side.push((name.clone(), v));
        }
        if depth.is_some() {
            self.side.push(("loops".to_owned(), outs[1]));
        }
        if cfg.c { self.linear("loop.C", outs[0], self.cfg.hidden_size, false) } else { Ok(outs[0]) }
    }

    /// Let rows that are not `active` keep the states of this iteration as they were.
    fn freeze_states(&mut self, active: Value) -> Built<()> {
        for i in 0..self.g.writes.len() {
            let (name, new) = self.g.writes[i].clone();
            let old = self.g.state(name, self.g.ty(new).clone());
            self.g.writes[i].1 = self.op(Select {}, &[active, new, old])?;
        }
        Ok(())
    }

    /// `(exp(-softplus(dt) e^A), input factor)`, both `[d]`.
    fn injection(&mut self, cfg: &LoopConfig) -> Built<(Value, Value)> {
        let d = self.cfg.hidden_size;
        let [a_log, dt, b] = ["loop.A_log", "loop.dt", "loop.B"].map(|n| self.param(n, &[d]));
        let delta = self.unary(UnaryFn::Softplus, dt)?;
        let a = self.unary(UnaryFn::Exp, a_log)?;
        let decay = self.mul(delta, a)?;
        let decay = self.unary(UnaryFn::Neg, decay)?;
        let decay = self.unary(UnaryFn::Exp, decay)?;
        let factor = if cfg.zoh_exact {
            let rest = self.affine(decay, -1.0, 1.0)?;
            self.binary(BinaryFn::Div, rest, a)?
        } else {
            delta
        };
        Ok((decay, self.mul(factor, b)?))
    }

    fn loads_in_body(&self, cfg: &LoopConfig) -> Vec<(String, usize)> {
        let experts = self.cfg.moe.as_ref().map_or(0, |m| m.n_routed);
        let layers = (cfg.body[0]..=cfg.body[1]).filter(|&i| self.cfg.is_moe(i));
        layers.map(|i| (format!("load.layers.{i}.mlp"), experts)).collect()
    }
}
