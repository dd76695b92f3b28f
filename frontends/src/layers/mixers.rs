//! Token mixers: Gated DeltaNet, mLSTM, Titans memory as context, Span Knot (semantics 5 to 8).

use chimera_ir::{
    DType, Type, Value,
    ops::{
        self, BinaryFn, Distribution, EflaBeta, GatedDelta, Linear, Mlstm, NormKind, PackPanels, Random, Rope, RowRms,
        ShortConv, SpanKnot, TitansMemory, UnaryFn, WindowAttention,
    },
};

use super::{Activated, Built, Form, Net, Stream};
use crate::config::{MixerKind, StepRule, TitansCore};

/// The step word of random tables that belong to the model and not to a training step.
const TABLE_STEP: i32 = 0;

impl Net<'_> {
    /// The mixer of a layer: `x` is its normalised input `[R, T, d]`, the result `[R, T, d]`.
    pub fn mixer(&mut self, kind: MixerKind, name: &str, x: Activated, s: Stream) -> Built {
        match kind {
            MixerKind::GatedDelta => self.gated_deltanet(name, x, s, false),
            MixerKind::Mlstm => self.mlstm(name, x, s),
            MixerKind::Titans => self.titans(name, x, s),
            MixerKind::SpanKnot => self.span_knot(name, x, s),
        }
    }

    fn chunk(&self, size: usize) -> usize {
        match self.shape.form {
            Form::Recurrent => 0,
            Form::Chunked => size.min(self.shape.tokens).min(64),
        }
    }

    /// Carried states of a layer: all mixers name theirs after the layer.
    fn state_site(name: &str) -> String {
        name.split('.').take(2).collect::<Vec<_>>().join(".")
    }

    fn per_head(&self, last: &[usize]) -> Type {
        let dims: Vec<usize> = [self.shape.rows, self.cfg.n_heads].iter().chain(last).copied().collect();
        Type::f32(&dims)
    }

    fn gated_deltanet(&mut self, name: &str, x: Activated, s: Stream, efla: bool) -> Built {
        let cfg = self.cfg;
        let (heads, k, width) = (cfg.n_heads, cfg.head_dim, cfg.inner_width());
        let taps = cfg.gated_delta.conv_size;
        let site = Self::state_site(name);
        let tap_state = Type::f32(&[self.shape.rows, taps - 1, width]);
        let gate = self.bit(&format!("{name}.g_proj"), x, width)?;
        let gate = self.unary(UnaryFn::Silu, gate)?;
        let beta = self.gate(&format!("{name}.b_proj"), x.float, heads, false)?;
        let mut beta = if cfg.gated_delta.allow_neg_eigval { self.affine(beta, 2.0, 0.0)? } else { beta };
        let a_log = self.param(&format!("{name}.A_log"), &[heads]);
        let rate = self.unary(UnaryFn::Exp, a_log)?;
        let rate = self.unary(UnaryFn::Neg, rate)?;
        let dt = self.param(&format!("{name}.dt_bias"), &[heads]);
        let a = self.linear(&format!("{name}.a_proj"), x.float, heads, false)?;
        let a = self.add(a, dt)?;
        let a = self.unary(UnaryFn::Softplus, a)?;
        let g = self.mul(a, rate)?;

        let mut qkv = Vec::with_capacity(3);
        for p in ["q", "k", "v"] {
            let u = self.bit(&format!("{name}.{p}_proj"), x, width)?;
            let kernel = self.param(&format!("{name}.{p}_conv.weight"), &[width, taps]);
            let conv = ShortConv { taps, carry: self.shape.carry };
            let state = format!("{p}_taps");
            let y = self.recurrent(conv, &[u, kernel, s.pos], &site, &[(&state, tap_state.clone())], 1)?[0];
            let y = self.unary(UnaryFn::Silu, y)?;
            let unit = p == "q" || (p == "k" && !efla);
            qkv.push(if unit { self.norm(NormKind::L2, y, k, 1e-6, None)? } else { y });
        }
        if efla {
            beta = self.op(EflaBeta { heads }, &[qkv[1], beta])?;
        }
        let op = GatedDelta { heads, chunk: self.chunk(cfg.gated_delta.chunk_size), carry: self.shape.carry };
        let state = [("S", self.per_head(&[k, k]))];
        let o = self.recurrent(op, &[qkv[0], qkv[1], qkv[2], g, beta, s.pos], &site, &state, 1)?[0];
        let o = self.norm(NormKind::Rms, o, k, self.eps(), Some((&format!("{name}.o_norm.weight"), k)))?;
        let y = self.mul(o, gate)?;
        let y = self.activate_normed(y)?;
        self.bit(&format!("{name}.o_proj"), y, cfg.hidden_size)
    }

    fn mlstm(&mut self, name: &str, x: Activated, s: Stream) -> Built {
        let cfg = self.cfg;
        let (heads, k, width) = (cfg.n_heads, cfg.head_dim, cfg.inner_width());
        let cap = cfg.mlstm.gate_soft_cap as f32;
        let site = Self::state_site(name);
        let gate = self.bit(&format!("{name}.ogate"), x, width)?;
        let gate = self.unary(UnaryFn::Sigmoid, gate)?;
        let mut ins = Vec::with_capacity(6);
        for p in ["q", "k", "v"] {
            ins.push(self.bit(&format!("{name}.{p}_proj"), x, width)?);
        }
        for p in ["igate", "fgate"] {
            let y = self.linear(&format!("{name}.{p}"), x.float, heads, true)?;
            let y = self.affine(y, 1.0 / cap, 0.0)?;
            let y = self.unary(UnaryFn::Tanh, y)?;
            ins.push(self.affine(y, cap, 0.0)?);
        }
        ins.push(s.pos);
        let op = Mlstm { heads, chunk: self.chunk(cfg.mlstm.chunk_size), carry: self.shape.carry };
        let state = [("C", self.per_head(&[k, k])), ("n", self.per_head(&[k])), ("m", self.per_head(&[]))];
        let h = self.recurrent(op, &ins, &site, &state, 1)?[0];
        let h = self.norm(NormKind::Layer, h, k, self.eps(), Some((&format!("{name}.o_norm.weight"), width)))?;
        let y = self.mul(h, gate)?;
        let y = self.activate_normed(y)?;
        self.bit(&format!("{name}.o_proj"), y, cfg.hidden_size)
    }

    fn titans(&mut self, name: &str, x: Activated, s: Stream) -> Built {
        let cfg = self.cfg;
        let (t, heads, k, width) = (&cfg.titans, cfg.n_heads, cfg.head_dim, cfg.inner_width());
        let (site, carry) = (Self::state_site(name), self.shape.carry);
        let mut qkv = Vec::with_capacity(3);
        for p in ["q", "k", "v"] {
            qkv.push(self.bit(&format!("{name}.{p}_proj"), x, width)?);
        }
        let [q, key, v] = [qkv[0], qkv[1], qkv[2]];
        let alpha = self.gate(&format!("{name}.alpha_proj"), x.float, heads, true)?;
        let eta = self.gate(&format!("{name}.eta_proj"), x.float, heads, true)?;
        let theta = self.gate(&format!("{name}.theta_proj"), x.float, heads, true)?;
        let normalise = t.step_rule == StepRule::Normalised;
        let theta = if normalise {
            let step = self.affine(theta, t.step_max as f32, 0.0)?;
            let rest = self.affine(eta, -1.0, 1.0)?;
            let step = self.mul(step, rest)?;
            self.affine(step, 1.0 / t.inner_chunk as f32, 0.0)?
        } else {
            self.affine(theta, 0.1, 0.0)?
        };
        let hidden = k * t.memory_expansion;
        let w1 = self.param(&format!("{name}.memory_w1"), &[heads, hidden, k]);
        let w2 = self.param(&format!("{name}.memory_w2"), &[heads, k, hidden]);
        let uq = self.norm(NormKind::L2, q, k, 1e-6, None)?;
        let uk = self.norm(NormKind::L2, key, k, 1e-6, None)?;
        let (s1, s2) = (self.per_head(&[hidden, k]), self.per_head(&[k, hidden]));
        let state = [("W1", &s1), ("S1", &s1), ("A1", &s1), ("W2", &s2), ("S2", &s2), ("A2", &s2)]
            .map(|(n, ty)| (n, ty.clone()));
        let chunked = self.shape.form == Form::Chunked;
        let op = TitansMemory { heads, inner: t.inner_chunk, normalise, chunked, carry };
        let outs = self.recurrent(op, &[uq, uk, v, alpha, eta, theta, s.pos, w1, w2], &site, &state, 2)?;
        let h = outs[0];
        self.keep(format!("surprise.{name}"), outs[1]);

        let slots = self.param(&format!("{name}.persistent_memory"), &[t.persistent_slots, cfg.hidden_size]);
        let mut persistent = Vec::with_capacity(2);
        for p in ["mem_k", "mem_v"] {
            let w = self.param(&format!("{name}.{p}.weight"), &[width, cfg.hidden_size]);
            let panels = self.op(PackPanels {}, &[w])?;
            persistent.push(self.op(Linear { m: width, grouped_rows: false }, &[slots, panels])?);
        }
        let hn = self.norm(NormKind::Rms, h, k, self.eps(), None)?;
        let window = if t.core == TitansCore::SlidingWindow { t.window } else { 0 };
        let attention = WindowAttention { heads, window, carry: carry && window > 0 };
        let y = match s.rope.filter(|_| window > 0) {
            Some((cos, sin)) => {
                let qr = self.op(Rope { heads }, &[q, cos, sin])?;
                let kr = self.op(Rope { heads }, &[key, cos, sin])?;
                let ring = Type::f32(&[self.shape.rows, window, width]);
                let count = Type::i32(&[self.shape.rows, heads]);
                let state = [("k", ring.clone()), ("v", ring), ("count", count)];
                let ins = [q, qr, kr, v, persistent[0], persistent[1], hn, h, s.pos];
                self.recurrent(attention, &ins, &site, &state, 1)?[0]
            }
            None => self.op(attention, &[q, v, persistent[0], persistent[1], hn, h, s.pos])?,
        };
        let y = self.rms_norm(y, Some(&format!("{name}.o_norm.weight")))?;
        let y = self.activate(y)?;
        self.bit(&format!("{name}.o_proj"), y, cfg.hidden_size)
    }

    fn span_knot(&mut self, name: &str, x: Activated, s: Stream) -> Built {
        let cfg = self.cfg;
        let h = self.gated_deltanet(&format!("{name}.gdn"), x, s, cfg.efla)?;
        if !cfg.knot.enabled {
            return Ok(h);
        }
        let (bits, width) = (cfg.knot.vector_bits, cfg.sketch_width());
        let (seed, step, first) = (self.seed(cfg.model_seed), self.word(TABLE_STEP), self.word(0));
        let table = |net: &mut Self, name: String, shape: &[usize]| {
            let dist = Distribution::Rademacher;
            let op = Random { dist, shape: shape.to_vec(), members: 0, dtype: DType::I8 };
            let stream = net.g.constant(ops::stream(&name));
            net.op(op, &[seed, step, first, stream])
        };
        let signs = table(self, "@sketch".to_owned(), &[bits / width, width])?;
        let role = table(self, format!("{name}.role"), &[bits])?;
        let op = SpanKnot {
            bits,
            weights: [cfg.knot.autoregressive, cfg.knot.memory_coherence, cfg.knot.binding_fidelity],
            iters: cfg.knot.max_iters,
            fraction: cfg.knot.flip_fraction,
            exit_delta: cfg.knot.exit_delta,
            eps: self.eps(),
            carry: self.shape.carry,
        };
        let counters = Type::new(DType::I16, &[self.shape.rows, bits]);
        let ins = [h, s.emb, s.pos, signs, role];
        let outs = self.recurrent(op, &ins, &Self::state_site(name), &[("c", counters)], 2)?;
        self.keep(format!("knot.{name}"), outs[1]);
        let scale = self.op(RowRms { eps: self.eps() }, &[h])?;
        let delta = self.activate(outs[0])?;
        let y = self.bit(&format!("{name}.knot_proj"), delta, cfg.hidden_size)?;
        let gate = self.param(&format!("{name}.knot_gate"), &[1]);
        let y = self.mul(y, gate)?;
        let y = self.mul(y, scale)?;
        self.binary(BinaryFn::Add, y, h)
    }

    /// The gains, seeds and tables aside, what a layer reads beside its input.
    pub fn titans_in(&self, layers: std::ops::RangeInclusive<usize>) -> bool {
        let window = self.cfg.titans.core == TitansCore::SlidingWindow;
        window && self.cfg.layers[layers].contains(&MixerKind::Titans)
    }

    /// One block: `x + mixer(norm x)`, then `x + ffn(norm x)`.
    pub fn block(&mut self, layer: usize, x: Value, s: Stream) -> Built {
        let name = format!("layers.{layer}");
        self.g.at(format!("{name}.attn"));
        let h = self.rms_norm(x, Some(&format!("{name}.attn_norm.weight")))?;
        let h = self.activate(h)?;
        let y = self.mixer(self.cfg.layers[layer], &format!("{name}.attn"), h, s)?;
        let x = self.add(y, x)?;
        self.g.at(format!("{name}.mlp"));
        let h = self.rms_norm(x, Some(&format!("{name}.mlp_norm.weight")))?;
        let h = self.activate(h)?;
        let y = if self.cfg.is_moe(layer) {
            self.moe(&format!("{name}.mlp"), h)?
        } else {
            self.swiglu(&format!("{name}.mlp"), h, self.cfg.intermediate_size)?
        };
        self.add(y, x)
    }
}
