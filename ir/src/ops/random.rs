//! Counter-based random tensors: Philox4x32-10 with the stream name hashed into the counter.
//!
//! An element depends on (seed, stream, step, direction, flat index) only, so any tile on any thread gives the same bits. The stream
//! is an operand, so that one kernel serves all tensors of a shape.

use super::{Flops, InferError, OpDef, VjpCx};
use crate::{DType, Data, Tensor, Type, Value, loops::Expr, lower::Lower};

mod lower;

/// Multipliers of the two products of a round.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What is added to the two key words after a round.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: u32 = 10;

/// Which distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Distribution {
    /// +1 or -1: element `i` is -1 when bit `i mod 32` of word `i / 32 mod 4` of block `i / 128` is set.
    Rademacher,
    /// Standard normal by Box and Muller, four elements a block.
    Gaussian,
    /// `((word >> 9) + 1/2) / 2^23`, inside (0, 1), four elements a block.
    Uniform,
    /// -1, 0 or 1 with equal probability, four elements a block.
    TernaryUniform,
}

impl Distribution {
    /// Elements of one block of four words.
    pub fn per_block(self) -> usize {
        if self == Distribution::Rademacher { 128 } else { 4 }
    }
}

/// `(seed i32 [2], step i32 [1], first i32 [1], stream i32 [1]) -> [members?, shape...]`.
///
/// `seed` holds the low and the high word; member `j` has direction `first + j`; `stream` is [`stream()`] of a name. Section 13.1 of the semantics; the reference is
/// the random number page of the oracle, bit for bit: every written float operation rounds once, nothing is contracted.
#[derive(Clone, Debug, PartialEq)]
pub struct Random {
    /// The distribution.
    pub dist: Distribution,
    /// The shape of one member.
    pub shape: Vec<usize>,
    /// The number of directions, stacked in front; 0 = one direction without a leading dimension.
    pub members: usize,
    /// `F32`, or `I8` for [`Distribution::Rademacher`].
    pub dtype: DType,
}

/// The counter word of a stream: FNV-1a of the UTF-8 name.
pub fn stream_id(name: &str) -> u32 {
    name.bytes().fold(0x811C_9DC5, |h: u32, byte| (h ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// The operand of [`Random`] that stands for the stream of that name.
pub fn stream(name: &str) -> Tensor {
    Tensor::i32(&[1], vec![stream_id(name) as i32])
}

/// The four words of one counter.
pub fn philox(mut counter: [u32; 4], seed: u64) -> [u32; 4] {
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..ROUNDS {
        let p = u64::from(counter[0]) * u64::from(MULTIPLIERS[0]);
        let q = u64::from(counter[2]) * u64::from(MULTIPLIERS[1]);
        counter = [(q >> 32) as u32 ^ counter[1] ^ key[0], q as u32, (p >> 32) as u32 ^ counter[3] ^ key[1], p as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Natural logarithm of `u / 2^24` for `1 <= u <= 2^24`.
fn ln_unit(u: u32) -> f32 {
    let bits = (u as f32).to_bits();
    let m = f32::from_bits(bits & 0x007f_ffff | 0x3f80_0000);
    let big = m > LN_SPLIT;
    let e = (bits >> 23) as i32 - 127 + i32::from(big) - 24;
    let f = if big { m * 0.5 } else { m } - 1.0;
    let s = f / (f + 2.0);
    let z = s * s;
    let p = LN[1..].iter().fold(LN[0], |p, c| p * z + c);
    e as f32 * LN_2 + (s * 2.0 + (s * z) * p)
}

const LN_SPLIT: f32 = std::f32::consts::SQRT_2;
const LN_2: f32 = std::f32::consts::LN_2;
const LN: [f32; 4] = [0.222_222_22, 0.285_714_3, 0.4, 0.666_666_7];
const QUARTER_TURN: f32 = std::f32::consts::FRAC_PI_2;
const SIN: [f32; 4] = [2.755_731_9e-6, -1.984_127e-4, 8.333_333e-3, -1.666_666_7e-1];
const COS: [f32; 5] = [2.480_158_8e-5, -1.388_888_9e-3, 4.166_666_7e-2, -0.5, 1.0];

/// Two standard normal values of two words.
pub fn box_muller(x0: u32, x1: u32) -> [f32; 2] {
    let r = (ln_unit((x0 >> 8) + 1) * -2.0).sqrt();
    let y = ((x1 >> 6) & 0x00ff_ffff) as f32 * TWO_POW_MINUS_24 - 0.5;
    let t = y * QUARTER_TURN;
    let z = t * t;
    let s = SIN[1..].iter().fold(SIN[0], |s, c| s * z + c);
    let s = t + (t * z) * s;
    let c = COS[1..].iter().fold(COS[0], |p, c| p * z + c);
    let (cos, sin) = match x1 >> 30 {
        0 => (c, s),
        1 => (-s, c),
        2 => (-c, -s),
        _ => (s, -c),
    };
    [r * cos, r * sin]
}

const TWO_POW_MINUS_24: f32 = 1.0 / 16_777_216.0;
const TWO_POW_MINUS_23: f32 = 1.0 / 8_388_608.0;

/// One element from the words of its block; `i` counts inside the block.
fn element(dist: Distribution, words: [u32; 4], i: usize) -> f32 {
    match dist {
        Distribution::Rademacher => 1.0 - 2.0 * (words[i / 32] >> (i % 32) & 1) as f32,
        Distribution::Gaussian => box_muller(words[i & 2], words[i & 2 | 1])[i & 1],
        Distribution::Uniform => ((words[i] >> 9) as f32 + 0.5) * TWO_POW_MINUS_23,
        Distribution::TernaryUniform => ((u64::from(words[i]) * 3) >> 32) as f32 - 1.0,
    }
}

impl Random {
    /// Elements of one member.
    fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    fn result(&self) -> Type {
        let lead = if self.members == 0 { vec![] } else { vec![self.members] };
        Type::new(self.dtype, &[lead, self.shape.clone()].concat())
    }
}

impl OpDef for Random {
    const NAME: &'static str = "random";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        if ins != operands() {
            let why = "takes seed i32[2], step i32[1], first direction i32[1] and stream i32[1]";
            return Err(InferError::new(Self::NAME, why));
        }
        if self.shape.is_empty() || self.shape.contains(&0) {
            return Err(InferError::new(Self::NAME, format!("shape {:?} has no elements", self.shape)));
        }
        let narrow = self.dtype == DType::I8 && self.dist == Distribution::Rademacher;
        if self.dtype != DType::F32 && !narrow {
            let why = format!("{:?} cannot be stored as {}, use f32", self.dist, self.dtype.name());
            return Err(InferError::new(Self::NAME, why));
        }
        Ok(vec![self.result()])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let word = |k: usize, i: usize| ins[k].to_i64()[i] as u32;
        let seed = u64::from(word(0, 0)) | u64::from(word(0, 1)) << 32;
        let (step, first, id, per) = (word(1, 0), word(2, 0), word(3, 0), self.dist.per_block());
        let mut out = Vec::new();
        for member in 0..self.members.max(1) as u32 {
            for block in 0..self.numel().div_ceil(per) {
                let words = philox([block as u32, id, step, first.wrapping_add(member)], seed);
                let left = (self.numel() - block * per).min(per);
                out.extend((0..left).map(|i| element(self.dist, words, i)));
            }
        }
        let data =
            if self.dtype == DType::I8 { Data::I8(out.into_iter().map(|x| x as i8).collect()) } else { Data::F32(out) };
        vec![Tensor { ty: self.result(), data }]
    }

    fn vjp(&self, _: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        Ok(vec![None; 4])
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        let each = match self.dist {
            Distribution::Rademacher => 2,
            Distribution::Gaussian => 60,
            Distribution::Uniform | Distribution::TernaryUniform => 30,
        };
        Flops::float(each * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        lower::lower(self, cx);
    }

    fn axes(&self, ins: &[Type]) -> Vec<super::Axis> {
        vec![super::Axis::Shared; ins.len()]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        use Distribution::*;
        let op = |dist, shape: &[usize], members, dtype| {
            (Random { dist, shape: shape.to_vec(), members, dtype }, operands().to_vec())
        };
        vec![
            op(Rademacher, &[301], 0, DType::F32),
            op(Rademacher, &[3, 43], 2, DType::I8),
            op(Rademacher, &[8200], 0, DType::I8),
            op(Gaussian, &[7], 3, DType::F32),
            op(Gaussian, &[23, 29], 0, DType::F32),
            op(Uniform, &[5, 2], 0, DType::F32),
            op(TernaryUniform, &[17], 1, DType::F32),
        ]
    }

    fn sample_input(&self, _: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        let words = (0..ty.numel()).map(|_| (random() * 2.147_483_6e9) as i32).collect();
        Tensor::i32(&ty.dims, words)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let op = |dist, shape: &[usize], dtype| Random { dist, shape: shape.to_vec(), members: 0, dtype };
        let ins = || operands().to_vec();
        vec![
            (op(Distribution::Gaussian, &[4], DType::I8), ins()),
            (op(Distribution::Gaussian, &[], DType::F32), ins()),
            (op(Distribution::Uniform, &[4], DType::F32), vec![Type::i32(&[2])]),
            (op(Distribution::Rademacher, &[4], DType::BF16), ins()),
        ]
    }
}

/// The types of the operands.
fn operands() -> [Type; 4] {
    [2, 1, 1, 1].map(|n| Type::i32(&[n]))
}

/// The value as an `I32` literal with the same bits.
fn bits(x: u32) -> Expr {
    Expr::I32(x as i32)
}
