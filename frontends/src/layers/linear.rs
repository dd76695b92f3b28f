//! Linear layers: ternary with quantised activations, and plain float.

use chimera_ir::{
    Tensor, Type, Value,
    ops::{
        BlockScales, GroupScale, InferError, Linear, Norm, NormKind, OpDef, PackPanels, PackTernary, Quantise,
        ScaleMode, TernaryDense, TernaryProduct, Unary, UnaryFn, blocked_type, packed_type,
    },
    plan::{CODES, QUANTISER, QUANTISER_THRESHOLD, SCALES},
};

use super::{Built, Net};
use crate::config::{Activation, WeightScale};

/// The threshold of codes that are rounded to the nearest.
const HALF: f32 = 0.5;

/// A layer input, quantised once for all ternary layers that read it.
#[derive(Clone, Copy, Debug)]
pub struct Activated {
    /// The float input `[.., n]`.
    pub float: Value,
    /// Codes and scales, when activations are quantised.
    pub int8: Option<(Value, Value)>,
}

/// Rows sorted by expert.
#[derive(Clone, Copy, Debug)]
pub struct Grouped {
    /// `i32 [experts + 1]`: first row of each expert.
    pub offsets: Value,
}

impl Net<'_> {
    /// RMSNorm over the whole row with a gain parameter, or gain-free.
    pub fn rms_norm(&mut self, x: Value, gain: Option<&str>) -> Built {
        let width = self.g.ty(x).cols();
        self.norm(NormKind::Rms, x, width, self.eps(), gain.map(|g| (g, width)))
    }

    /// A norm over each `width` columns; the gain is a parameter of that many entries.
    pub fn norm(&mut self, kind: NormKind, x: Value, width: usize, eps: f32, gain: Option<(&str, usize)>) -> Built {
        let mut ins = vec![x];
        if let Some((name, len)) = gain {
            ins.push(self.param(name, &[len]));
        }
        self.op(Norm { kind, width, eps }, &ins)
    }

    /// Prepare `x` for ternary layers.
    pub fn activate(&mut self, x: Value) -> Built<Activated> {
        let block = match self.cfg.quantization.activation {
            Activation::Float => return Ok(Activated { float: x, int8: None }),
            Activation::Block => self.cfg.quantization.activation_block_size,
            Activation::Token => 0,
        };
        let outs = self.g.ops(Quantise { block }, &[x])?;
        Ok(Activated { float: x, int8: Some((outs[0], outs[1])) })
    }

    /// The gain-free norm that every not yet normalised input of a ternary layer receives, then [`Net::activate`].
    pub fn activate_normed(&mut self, x: Value) -> Built<Activated> {
        let x = if self.cfg.rms_norm_before_every_linear { self.rms_norm(x, None)? } else { x };
        self.activate(x)
    }

    fn group(&self, n: usize) -> usize {
        match self.cfg.quantization.weight_scale {
            WeightScale::Group => self.cfg.quantization.group_size,
            WeightScale::Row | WeightScale::Tensor => n,
        }
    }

    fn scale_mode(&self) -> ScaleMode {
        match self.cfg.quantization.weight_scale {
            WeightScale::Group => ScaleMode::PerGroup(self.cfg.quantization.group_size),
            WeightScale::Row => ScaleMode::PerRow,
            WeightScale::Tensor => ScaleMode::PerTensor,
        }
    }

    /// Whether the codes of this weight are given.
    pub(super) fn is_packed(&self, weight: &str) -> bool {
        self.packed.is_some_and(|p| p.contains(weight))
    }

    /// Codes and scales of a weight of shape `dims`, `[m, n]` or stacked `[G, m, n]`, as parameters.
    pub(super) fn packed_weight(&mut self, weight: &str, dims: &[usize]) -> Built<Vec<Value>> {
        let latent = Type::f32(dims);
        if self.cfg.quantization.activation == Activation::Float {
            let why = format!("`{weight}` is packed, float activations want its latent; give float weights");
            return Err(InferError::new(PackTernary::NAME, why));
        }
        let scales = GroupScale { mode: self.scale_mode() }.infer(std::slice::from_ref(&latent))?.remove(0);
        let scales = blocked_type(&scales);
        let codes = self.g.param(&format!("{weight}{CODES}"), packed_type(&latent));
        Ok(vec![codes, self.g.param(&format!("{weight}{SCALES}"), scales)])
    }

    /// The operands of a ternary product with weight `name` `[m, n]`: packed codes and scales, or one float panel.
    pub fn ternary_weight(&mut self, name: &str, m: usize, n: usize) -> Built<Vec<Value>> {
        let q = &self.cfg.quantization;
        let (group, ratio, mode) = (self.group(n), q.threshold_ratio as f32, self.scale_mode());
        let float = q.activation == Activation::Float;
        let weight = format!("{name}.weight");
        if self.is_packed(&weight) {
            return self.packed_weight(&weight, &[m, n]);
        }
        let w = self.param(&weight, &[m, n]);
        if q.dynamic.is_some() {
            return self.dynamic_weight(&weight, w, m, group, float);
        }
        let alpha = self.op(GroupScale { mode }, &[w])?;
        if float {
            let dense = self.op(TernaryDense { group, ratio }, &[w, alpha])?;
            return Ok(vec![self.op(PackPanels {}, &[dense])?]);
        }
        Ok(vec![self.op(PackTernary { group, ratio }, &[w, alpha])?, self.op(BlockScales {}, &[alpha])?])
    }

    /// The same with scale and threshold of a dynamic quantiser (semantics 3.5).
    fn dynamic_weight(&mut self, weight: &str, w: Value, m: usize, group: usize, float: bool) -> Built<Vec<Value>> {
        let ones = self.g.constant(Tensor::f32(&[m, 1], vec![1.0; m]));
        let (gamma, share) = (self.param(&format!("{QUANTISER}{weight}"), &[1]), self.param(QUANTISER_THRESHOLD, &[1]));
        let alpha = self.mul(ones, gamma)?;
        let limit = self.mul(alpha, share)?;
        if float {
            let dense = self.op(TernaryDense { group, ratio: HALF }, &[w, alpha, limit])?;
            return Ok(vec![self.op(PackPanels {}, &[dense])?]);
        }
        // Half of twice the limit is the limit, exactly.
        let twice = self.add(limit, limit)?;
        let packed = self.op(PackTernary { group, ratio: HALF }, &[w, twice])?;
        Ok(vec![packed, self.op(BlockScales {}, &[alpha])?])
    }

    /// The product of prepared weights with an activation; `grouped` where rows are sorted by expert and the weights stacked.
    pub fn ternary_product(&mut self, x: Activated, weight: &[Value], m: usize, grouped: Option<Grouped>) -> Built {
        let n = self.g.ty(x.float).cols();
        let Some((codes, scales)) = x.int8 else {
            let mut ins = vec![x.float, weight[0]];
            ins.extend(grouped.map(|g| g.offsets));
            return self.op(Linear { m, grouped_rows: grouped.is_some() }, &ins);
        };
        let block = match self.cfg.quantization.activation {
            Activation::Token => 0,
            _ => self.cfg.quantization.activation_block_size,
        };
        let op = TernaryProduct { m, group: self.group(n), block, n_weights: 1, grouped_rows: grouped.is_some() };
        let mut ins = vec![codes, scales, weight[0], weight[1]];
        ins.extend(grouped.map(|g| g.offsets));
        self.op(op, &ins)
    }

    /// A ternary linear layer `name`.weight `[m, n]` on an activation `[.., n]`.
    pub fn bit(&mut self, name: &str, x: Activated, m: usize) -> Built {
        let n = self.g.ty(x.float).cols();
        let w = self.ternary_weight(name, m, n)?;
        self.ternary_product(x, &w, m, None)
    }

    /// A float linear layer `name`.weight `[m, n]`, with `name`.bias when asked for.
    pub fn linear(&mut self, name: &str, x: Value, m: usize, bias: bool) -> Built {
        let n = self.g.ty(x).cols();
        let w = self.param(&format!("{name}.weight"), &[m, n]);
        let panels = self.op(PackPanels {}, &[w])?;
        let y = self.op(Linear { m, grouped_rows: false }, &[x, panels])?;
        if !bias {
            return Ok(y);
        }
        let b = self.param(&format!("{name}.bias"), &[m]);
        self.add(y, b)
    }

    /// `sigmoid(linear(x))`.
    pub fn gate(&mut self, name: &str, x: Value, m: usize, bias: bool) -> Built {
        let y = self.linear(name, x, m, bias)?;
        self.op(Unary { f: UnaryFn::Sigmoid }, &[y])
    }
}
