//! Feed-forward layers: SwiGLU and mixture of experts (semantics 4).

use chimera_ir::{
    Value,
    ops::{Combine, Dispatch, GatherRows, Route, Stack, UnaryFn},
};

use super::{Activated, Built, Net, linear::Grouped};

impl Net<'_> {
    /// `down(silu(gate x) * up x)` of the given width; the product is normalised before `down`.
    pub fn swiglu(&mut self, name: &str, x: Activated, width: usize) -> Built {
        let d = self.cfg.hidden_size;
        let gate = self.bit(&format!("{name}.gate_proj"), x, width)?;
        let up = self.bit(&format!("{name}.up_proj"), x, width)?;
        let gate = self.unary(UnaryFn::Silu, gate)?;
        let h = self.mul(gate, up)?;
        let h = self.activate_normed(h)?;
        self.bit(&format!("{name}.down_proj"), h, d)
    }

    /// Routed experts, added in ascending order, then the shared expert. Rows are sorted by expert, so that each expert is one block of
    /// rows of one grouped product. `x` is `[R, T, d]`.
    pub fn moe(&mut self, name: &str, x: Activated) -> Built {
        let moe = self.cfg.moe.clone().expect("a layer with experts has a moe section");
        let (d, k) = (self.cfg.hidden_size, moe.top_k);
        let logits = self.linear(&format!("{name}.gate"), x.float, moe.n_routed, false)?;
        let bias = self.param(&format!("{name}.gate.e_score_correction_bias"), &[moe.n_routed]);
        let routed = self.g.ops(Route { k, scale: moe.route_scale as f32 }, &[logits, bias])?;
        let (index, weight) = (routed[0], routed[1]);
        let sorted = self.g.ops(Dispatch { experts: moe.n_routed, groups: 1 }, &[index])?;
        let (order, slot, grouped) = (sorted[0], sorted[1], Grouped { offsets: sorted[2] });
        self.keep(format!("load.{name}"), sorted[3]);

        let gather = |net: &mut Self, v: Value| net.op(GatherRows { k }, &[v, order]);
        let float = gather(self, x.float)?;
        let int8 = match x.int8 {
            Some((codes, scales)) => Some((gather(self, codes)?, gather(self, scales)?)),
            None => None,
        };
        let rows = Activated { float, int8 };
        let gate = self.experts(name, "gate_proj", rows, moe.width, grouped)?;
        let up = self.experts(name, "up_proj", rows, moe.width, grouped)?;
        let gate = self.unary(UnaryFn::Silu, gate)?;
        let h = self.mul(gate, up)?;
        let h = self.activate_normed(h)?;
        let y = self.experts(name, "down_proj", h, d, grouped)?;
        let y = self.op(Combine { k }, &[y, slot, index, weight])?;
        if moe.n_shared == 0 {
            return Ok(y);
        }
        let shared = self.swiglu(&format!("{name}.shared_experts"), x, moe.width * moe.n_shared)?;
        self.add(y, shared)
    }

    fn experts(&mut self, name: &str, part: &str, x: Activated, m: usize, grouped: Grouped) -> Built {
        let n_routed = self.cfg.moe.as_ref().map_or(0, |moe| moe.n_routed);
        let n = self.g.ty(x.float).cols();
        let stack = format!("{name}.experts.*.{part}.weight");
        if self.is_packed(&stack) {
            let stacked = self.packed_weight(&stack, &[n_routed, m, n])?;
            return self.ternary_product(x, &stacked, m, Some(grouped));
        }
        let each = (0..n_routed)
            .map(|e| self.ternary_weight(&format!("{name}.experts.{e}.{part}"), m, n))
            .collect::<Built<Vec<Vec<Value>>>>()?;
        let stacked = (0..each[0].len())
            .map(|i| {
                let parts: Vec<Value> = each.iter().map(|w| w[i]).collect();
                self.op(Stack { n: n_routed }, &parts)
            })
            .collect::<Built<Vec<Value>>>()?;
        self.ternary_product(x, &stacked, m, Some(grouped))
    }
}
