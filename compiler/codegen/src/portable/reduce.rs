//! Striped reductions: eight partial results at once, then the fixed tree.
//!
//! Stripe `j` is lane `j`; the elements that do not fill all stripes are added to theirs one by one, in memory.

use chimera_ir::loops::{Acc, Bin, Expr, STRIPES, Stmt, Ty, Var};
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{InstBuilder, StackSlot, StackSlotData, StackSlotKind, Value, types};
use cranelift_frontend::Variable;

use super::lanes::{least, zero};
use super::memory::{LITTLE, MEM};
use super::scalar::machine;
use super::stmt::{Bound, Lower, Slot};
use super::vector::vector_type;
use crate::shape::Fact;
use crate::walk;

/// The stripes of one accumulator: two vectors, or eight scalars.
struct Striped {
    ty: Ty,
    parts: Vec<Variable>,
}

impl Striped {
    /// Bytes of one part.
    fn bytes(&self) -> i32 {
        (STRIPES / self.parts.len()) as i32 * machine(self.ty).bytes() as i32
    }
}

fn combine(acc: &Acc) -> Bin {
    match acc {
        Acc::Sum(_) | Acc::Dot(..) => Bin::Add,
        Acc::Max(_) => Bin::Max,
    }
}

impl Lower<'_, '_> {
    /// See [`Stmt::Reduce`].
    pub(super) fn reduce(&mut self, var: Var, lo: &Expr, hi: &Expr, body: &[Stmt], accs: &[(Var, Acc)]) {
        let step = STRIPES as i64;
        let extent = self.extent(lo, hi);
        let fact = Fact::of(lo, self.facts());
        let (at, end) = (self.bound(lo), self.bound(hi));
        self.start(var, at);
        let striped: Vec<Striped> = accs.iter().map(|(v, acc)| self.stripes_of(*v, acc)).collect();

        let inner: Vec<&Expr> = accs.iter().flat_map(|(_, acc)| walk::terms(acc)).flatten().collect();
        let first = Fact::counting(fact, step);
        // A local that lives on outside of the reduction keeps everything in order.
        let lanes = self.vectorisable(var, STRIPES, first, body, &inner);
        let full = extent.map(|n| if lanes.is_some() { n / step * step } else { 0 });
        let mut from = at;
        if let Some(lanes) = lanes {
            self.set_fact(var, first);
            let bound = match full {
                Some(full) => self.further(at, full),
                None => self.further(end, 1 - step),
            };
            self.counted(var, at, bound, full.map(|n| n / step), step, &mut |lower| {
                lower.vectorised(lanes.clone(), body, |lower| {
                    for (s, (_, acc)) in striped.iter().zip(accs) {
                        lower.accumulate(s, acc);
                    }
                });
            });
            from = self.behind(var, at, full);
        }
        self.set_fact(var, Fact::counting(fact, 1));
        self.rest(var, from, end, extent.zip(full).map(|(n, full)| n - full), body, accs, &striped);
        for ((v, acc), s) in accs.iter().zip(&striped) {
            let total = self.tree(s, acc);
            let x = match self.slots[v.0 as usize] {
                Slot::Scalar(x) => x,
                _ => self.declare(*v),
            };
            self.depths[v.0 as usize] = self.depth;
            self.b.def_var(x, total);
        }
    }

    fn stripes_of(&mut self, v: Var, acc: &Acc) -> Striped {
        let ty = self.kernel.vars[v.0 as usize];
        let start = match combine(acc) {
            Bin::Max => least(ty),
            _ => zero(ty),
        };
        let x = self.scalar(&start);
        let (n, machine, x) = match vector_type(ty) {
            Some(vector) => (STRIPES / 4, vector, self.splat_value(ty, x)),
            None => (STRIPES, machine(ty), x),
        };
        let parts: Vec<Variable> = (0..n).map(|_| self.b.declare_var(machine)).collect();
        parts.iter().for_each(|p| self.b.def_var(*p, x));
        Striped { ty, parts }
    }

    /// One step of all stripes.
    fn accumulate(&mut self, s: &Striped, acc: &Acc) {
        let old: Vec<Value> = s.parts.iter().map(|p| self.b.use_var(*p)).collect();
        let mut all = |e: &Expr| -> Vec<Value> {
            if vector_type(s.ty).is_some() {
                return self.vector(e);
            }
            let mut xs = vec![];
            self.each_lane(|lower, _| {
                let x = lower.scalar(e);
                xs.push(x);
            });
            xs
        };
        let [x, y] = walk::terms(acc).map(|e| e.map(&mut all).unwrap_or_default());
        for n in 0..old.len() {
            let new = match acc {
                Acc::Dot(..) => self.b.ins().fma(x[n], y[n], old[n]),
                Acc::Sum(_) => self.join(s.ty, Bin::Add, old[n], x[n]),
                Acc::Max(_) => self.join(s.ty, Bin::Max, x[n], old[n]),
            };
            self.b.def_var(s.parts[n], new);
        }
    }

    fn join(&mut self, ty: Ty, op: Bin, a: Value, b: Value) -> Value {
        match vector_type(ty) {
            Some(_) => self.binary4(op, ty, a, b),
            None => self.binary(op, ty, a, b),
        }
    }

    /// The elements from `at` on, in order: the first goes to stripe 0.
    #[expect(clippy::too_many_arguments, reason = "the state of one reduction")]
    fn rest(
        &mut self,
        var: Var,
        at: Bound,
        end: Bound,
        left: Option<i64>,
        body: &[Stmt],
        accs: &[(Var, Acc)],
        striped: &[Striped],
    ) {
        if left == Some(0) {
            return;
        }
        let slots: Vec<StackSlot> = (0..striped.len()).map(|n| self.stripe_slot(n)).collect();
        let from = self.value(at);
        let some = match left {
            Some(_) => None,
            None => {
                let end = self.value(end);
                Some(self.b.ins().icmp(IntCC::SignedLessThan, from, end))
            }
        };
        let run = |lower: &mut Self| {
            for (s, &slot) in striped.iter().zip(&slots) {
                for (n, p) in s.parts.iter().enumerate() {
                    let x = lower.b.use_var(*p);
                    lower.b.ins().stack_store(types::I64, x, slot, n as i32 * s.bytes());
                }
            }
            lower.counted(var, at, end, left, 1, &mut |lower| {
                lower.block(body);
                let Slot::Scalar(x) = lower.slots[var.0 as usize] else { unreachable!("a loop variable is a scalar") };
                let here = lower.b.use_var(x);
                let stripe = lower.b.ins().isub(here, from);
                let stripe = lower.b.ins().band_imm_u(stripe, STRIPES as i64 - 1);
                for ((s, &slot), (_, acc)) in striped.iter().zip(&slots).zip(accs) {
                    lower.one(s, slot, stripe, acc);
                }
            });
            for (s, &slot) in striped.iter().zip(&slots) {
                let ty = vector_type(s.ty).unwrap_or_else(|| machine(s.ty));
                for (n, p) in s.parts.iter().enumerate() {
                    let x = lower.b.ins().stack_load(types::I64, ty, slot, n as i32 * s.bytes());
                    lower.b.def_var(*p, x);
                }
            }
        };
        match some {
            Some(some) => self.when(some, run),
            None => run(self),
        }
    }

    /// Add the current element to a stripe in memory.
    fn one(&mut self, s: &Striped, slot: StackSlot, stripe: Value, acc: &Acc) {
        let ty = machine(s.ty);
        let base = self.b.ins().stack_addr(types::I64, slot, 0);
        let offset = self.b.ins().imul_imm_s(stripe, i64::from(ty.bytes()));
        let at = self.b.ins().iadd(base, offset);
        let [x, y] = walk::terms(acc).map(|e| e.map(|e| self.scalar(e)));
        let old = self.b.ins().load(ty, MEM, at, 0);
        let new = match (acc, x, y) {
            (Acc::Dot(..), Some(x), Some(y)) => self.b.ins().fma(x, y, old),
            (Acc::Sum(_), Some(x), _) => self.binary(Bin::Add, s.ty, old, x),
            (_, Some(x), _) => self.binary(Bin::Max, s.ty, x, old),
            (_, None, _) => unreachable!("an accumulation has an operand"),
        };
        self.b.ins().store(MEM, new, at, 0);
    }

    /// Memory for the stripes of the `n`th accumulator of a reduction.
    fn stripe_slot(&mut self, n: usize) -> StackSlot {
        while self.stripes.len() <= n {
            let data = StackSlotData::new(StackSlotKind::ExplicitSlot, 8 * STRIPES as u32, 4);
            let slot = self.b.create_sized_stack_slot(data);
            self.stripes.push(slot);
        }
        self.stripes[n]
    }

    /// Stripe `j` absorbs `j + 4`, then `j + 2`, then `j + 1`.
    fn tree(&mut self, s: &Striped, acc: &Acc) -> Value {
        let op = combine(acc);
        // For a sum the left operand is the stripe that absorbs; for a maximum it comes second and stays when equal.
        let absorb = |lower: &mut Self, x: Value, y: Value| match op {
            Bin::Max => lower.join(s.ty, op, y, x),
            _ => lower.join(s.ty, op, x, y),
        };
        let parts: Vec<Value> = s.parts.iter().map(|p| self.b.use_var(*p)).collect();
        let Some(vector) = vector_type(s.ty) else {
            let mut parts = parts;
            while parts.len() > 1 {
                let high = parts.split_off(parts.len() / 2);
                parts = parts.into_iter().zip(high).map(|(x, y)| absorb(self, x, y)).collect();
            }
            return parts[0];
        };
        let mut x = absorb(self, parts[0], parts[1]);
        for lanes in [2, 1] {
            let bytes = std::array::from_fn(|n| ((n + 4 * lanes) % 16) as u8);
            let y = self.shuffle(x, x, bytes);
            let y = self.b.ins().bitcast(vector, LITTLE, y);
            x = absorb(self, x, y);
        }
        self.extract(s.ty, x, 0)
    }
}
