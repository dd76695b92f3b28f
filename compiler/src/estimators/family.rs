//! What the directions of matrices are: entries of their own, or products of thin factors (semantics 13.2).
//!
//! Factors are scaled so that the entries of a direction have mean 0 and variance 1, whatever the family; the estimate then needs no
//! factor of its own and has the gradient as its mean.

use chimera_ir::{
    DType, Tensor, Value,
    ops::{
        self, BinaryFn, Distribution, Linear, LowRankGrad, Orthonormal, PackPanels, PeriodStart, Random, Reshape, Stack,
    },
};

use super::{Built, Cx, Weight};

/// The families.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Family {
    /// Every entry is drawn.
    Dense(Distribution),
    /// `U V^T / sqrt(r)`, Gaussian: `U` of every step, `V` of every `period` steps (LOZO).
    Lozo {
        /// Rank.
        rank: usize,
        /// Steps that share `V`.
        period: usize,
    },
    /// `U Z V^T` with orthonormal `U` and `V` of every `period` steps and Gaussian `Z [r, r]` of every step (SubZero).
    SubZero {
        /// Rank.
        rank: usize,
        /// Steps that share `U` and `V`.
        period: usize,
    },
    /// `U diag(tau) V^T / sqrt(r)` with Gaussian `U` and `V` of the whole run and `tau` of every step (TeZO).
    TeZo {
        /// Rank.
        rank: usize,
    },
}

impl Family {
    /// The distribution of the entries of a direction that has no factors.
    pub(super) fn entries(self) -> Distribution {
        match self {
            Family::Dense(dist) => dist,
            _ => Distribution::Gaussian,
        }
    }

    /// The rank of the directions of an `m` by `n` matrix; nothing where every entry is drawn.
    pub(super) fn rank(self, m: usize, n: usize) -> Option<usize> {
        match self {
            Family::Dense(_) => None,
            Family::Lozo { rank, .. } | Family::SubZero { rank, .. } | Family::TeZo { rank } => {
                Some(rank.min(m).min(n))
            }
        }
    }

    /// `A [M, m, r]` and `B [M, n, r]` with `A B^T` the directions.
    pub(super) fn factors(self, cx: &mut Cx<'_>, w: &Weight) -> Built<[Value; 2]> {
        let (mut a, mut b) = (vec![], vec![]);
        for member in 0..cx.members {
            let [left, right] = self.pair(cx, w, member)?;
            a.push(left);
            b.push(right);
        }
        Ok([stack(cx, a)?, stack(cx, b)?])
    }

    /// `A B^T`, `[M, m, n]`.
    pub(super) fn products(self, cx: &mut Cx<'_>, w: &Weight, rank: usize) -> Built {
        let mut z = vec![];
        for member in 0..cx.members {
            let [a, b] = self.pair(cx, w, member)?;
            let (one, a, b) = (cx.number(1.0), stack(cx, vec![a])?, stack(cx, vec![b])?);
            z.push(cx.op(LowRankGrad { rank }, &[one, a, b])?);
        }
        stack(cx, z)
    }

    /// `A [m, r]` and `B [n, r]` of one direction.
    fn pair(self, cx: &mut Cx<'_>, w: &Weight, member: usize) -> Built<[Value; 2]> {
        let [m, n] = cx.matrix(w)?;
        let r = self.rank(m, n).expect("the family has factors");
        let narrow = 1.0 / (r as f32).sqrt();
        match self {
            Family::Dense(_) => unreachable!("the family has factors"),
            Family::Lozo { period, .. } => {
                let u = member_of(cx, w, "#U", &[m, r], member, Age::Step)?;
                let v = member_of(cx, w, "#V", &[n, r], member, Age::Period(period))?;
                Ok([cx.affine(u, narrow, 0.0)?, v])
            }
            Family::SubZero { period, .. } => {
                let u = member_of(cx, w, "#U", &[m, r], member, Age::Period(period))?;
                let v = member_of(cx, w, "#V", &[n, r], member, Age::Period(period))?;
                let z = member_of(cx, w, "#Z", &[r, r], member, Age::Step)?;
                let (u, v) = (cx.op(Orthonormal {}, &[u])?, cx.op(Orthonormal {}, &[v])?);
                let z = cx.affine(z, ((m * n) as f32).sqrt() / r as f32, 0.0)?;
                let z = cx.op(PackPanels {}, &[z])?;
                Ok([cx.op(Linear { m: r, grouped_rows: false }, &[u, z])?, v])
            }
            Family::TeZo { .. } => {
                let u = member_of(cx, w, "#U", &[m, r], member, Age::Run)?;
                let v = member_of(cx, w, "#V", &[n, r], member, Age::Run)?;
                let tau = member_of(cx, w, "#tau", &[r], member, Age::Step)?;
                let u = cx.binary(BinaryFn::Mul, u, tau)?;
                Ok([cx.affine(u, narrow, 0.0)?, v])
            }
        }
    }
}

/// How long numbers last.
#[derive(Clone, Copy, Debug)]
enum Age {
    Step,
    Period(usize),
    Run,
}

/// Gaussian numbers of one direction.
fn member_of(cx: &mut Cx<'_>, w: &Weight, part: &str, shape: &[usize], member: usize, age: Age) -> Built {
    let [seed, step, _] = cx.random;
    let step = match age {
        Age::Step => step,
        Age::Period(period) => cx.op(PeriodStart { period }, &[step])?,
        Age::Run => cx.g.constant(Tensor::i32(&[1], vec![0])),
    };
    let first = cx.g.constant(Tensor::i32(&[1], vec![member as i32]));
    let stream = cx.g.constant(ops::stream(&format!("{}{part}", w.name)));
    let op = Random { dist: Distribution::Gaussian, shape: shape.to_vec(), members: 0, dtype: DType::F32 };
    cx.op(op, &[seed, step, first, stream])
}

/// Several tensors as one with a leading dimension.
pub(super) fn stack(cx: &mut Cx<'_>, parts: Vec<Value>) -> Built {
    if let &[one] = &parts[..] {
        let dims = [&[1], &cx.dims(one)[..]].concat();
        return cx.op(Reshape { dims }, &[one]);
    }
    cx.op(Stack { n: parts.len() }, &parts)
}
