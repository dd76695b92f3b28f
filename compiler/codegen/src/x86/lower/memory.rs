//! Loads and stores of all element types, of one lane and of all.
//!
//! Never touches a byte outside of the addressed elements. No access is assumed to be aligned.

use chimera_ir::DType;
use chimera_ir::loops::{Buf, Expr, Ty};

use super::super::build::NEW;
use super::super::flat::{Class, IntArg, IntOp, Mem, Narrow, Op, Reg, ShiftOp, Size, Width};
use super::lanes::MOST_LANES;
use super::{Lower, scalar_width};
use crate::shape::Shape;

/// How a narrow element is widened.
fn narrow(dtype: DType) -> Option<Narrow> {
    match dtype {
        DType::I8 => Some(Narrow::I8),
        DType::U8 => Some(Narrow::U8),
        DType::I16 => Some(Narrow::I16),
        DType::BF16 => Some(Narrow::U16),
        DType::F32 | DType::F64 | DType::I32 => None,
    }
}

impl Lower<'_> {
    pub(super) fn dtype(&self, buf: Buf) -> DType {
        self.kernel.bufs[buf.0 as usize].dtype
    }

    /// Is it an `I32` in memory, which a vector holds better than a scalar?
    pub(super) fn is_vector_word(&self, e: &Expr) -> bool {
        match e {
            Expr::Word(..) => true,
            Expr::Load(b, _) => self.dtype(*b) == DType::I32,
            _ => false,
        }
    }

    /// Memory for lanes between vectors and scalars: one for values, one for what is on its way to a store.
    pub(super) fn transit(&mut self, store: bool) -> i32 {
        let kept = &mut self.transit[usize::from(store)];
        *kept.get_or_insert_with(|| self.b.f.room(MOST_LANES * 8))
    }

    /// One element in the current lane.
    pub(super) fn load(&mut self, buf: Buf, index: &Expr) -> Reg {
        let dtype = self.dtype(buf);
        let m = self.address(buf, index, dtype.size() as i64, 0);
        match dtype {
            DType::F32 => self.b.here(Class::Vec, Op::VecLoad { w: Width::S, d: NEW, m }),
            DType::F64 => self.b.here(Class::Vec, Op::VecLoad { w: Width::D, d: NEW, m }),
            DType::BF16 => {
                let s = self.load_int(dtype, m);
                self.b.here(Class::Vec, Op::VecFromInt { size: Size::W32, d: NEW, s })
            }
            _ => self.load_int(dtype, m),
        }
    }

    /// The 32 bits of an element that is not wider.
    fn load_int(&mut self, dtype: DType, m: Mem) -> Reg {
        let load = Op::IntLoad { d: NEW, m, size: Size::W32, narrow: narrow(dtype) };
        let x = self.b.here(Class::Int, load);
        if dtype == DType::BF16 { self.b.int_op(IntOp::Shl, Size::W32, x, IntArg::Imm(16)) } else { x }
    }

    /// Elements for all lanes; the index differs between them.
    pub(super) fn gather(&mut self, buf: Buf, index: &Expr, e: &Expr) -> Vec<Reg> {
        let dtype = self.dtype(buf);
        let (unit, ty) = (dtype.size() as i64, chimera_ir::loops::load_ty(dtype));
        let (per, w) = (self.per(ty), self.w(ty));
        let shape = self.shape(index);
        let Some(step) = self.step(shape, unit) else {
            if dtype == DType::F64 {
                return self.lanewise(ty, |lower| lower.scalar(e));
            }
            let mut places = vec![];
            self.each_lane(|lower| {
                let m = lower.address(buf, index, unit, 0);
                places.push(m);
            });
            return places.chunks_exact(per).map(|ms| self.collect(dtype, w, ms)).collect();
        };
        let first = self.address(buf, index, unit, self.reach(step));
        let groups = self.width() / per;
        if shape == Shape::Affine(1) {
            let group = |g: usize| first.plus((g * per) as i32 * step);
            return (0..groups).map(|g| self.load_wide(dtype, w, group(g))).collect();
        }
        if dtype == DType::F64 {
            return self.lanewise(ty, |lower| lower.scalar(e));
        }
        let lane = |g: usize, l: usize| first.plus((g * per + l) as i32 * step);
        (0..groups)
            .map(|g| {
                let places: Vec<Mem> = (0..per).map(|l| lane(g, l)).collect();
                self.collect(dtype, w, &places)
            })
            .collect()
    }

    /// Neighbours, widened.
    fn load_wide(&mut self, dtype: DType, w: Width, m: Mem) -> Reg {
        let Some(narrow) = narrow(dtype) else { return self.b.here(Class::Vec, Op::VecLoad { w, d: NEW, m }) };
        let x = self.b.here(Class::Vec, Op::Widen { w, d: NEW, m, narrow });
        if dtype == DType::BF16 { self.shift_imm(ShiftOp::ShlI32, w, x, 16) } else { x }
    }

    /// Elements from anywhere in one register of 32-bit lanes.
    fn collect(&mut self, dtype: DType, w: Width, places: &[Mem]) -> Reg {
        let four = |lower: &mut Self, ms: &[Mem]| {
            if narrow(dtype).is_some() {
                let xs: Vec<Reg> = ms.iter().map(|m| lower.load_int(dtype, *m)).collect();
                let mut a = lower.b.here(Class::Vec, Op::VecFromInt { size: Size::W32, d: NEW, s: xs[0] });
                for (lane, &s) in xs.iter().enumerate().skip(1) {
                    a = lower.b.here(Class::Vec, Op::InsertInt { d: NEW, a, s, lane: lane as u8 });
                }
                return a;
            }
            let mut a = lower.b.here(Class::Vec, Op::VecLoad { w: Width::S, d: NEW, m: ms[0] });
            for (lane, &m) in ms.iter().enumerate().skip(1) {
                a = lower.b.here(Class::Vec, Op::Insert { d: NEW, a, m, lane: lane as u8 });
            }
            a
        };
        let mut parts: Vec<Reg> = places.chunks_exact(4).map(|ms| four(self, ms)).collect();
        for joined in [Width::Y, Width::Z] {
            if joined <= w {
                let join = |p: &[Reg]| Op::Join { w: joined, d: NEW, low: p[0], high: p[1] };
                parts = parts.chunks_exact(2).map(|p| self.b.here(Class::Vec, join(p))).collect();
            }
        }
        parts[0]
    }

    /// Store in all lanes.
    pub(super) fn scatter(&mut self, buf: Buf, index: &Expr, x: &Expr) {
        let dtype = self.dtype(buf);
        let (unit, ty, shape) = (dtype.size() as i64, self.kernel.ty(x), self.shape(index));
        if shape == Shape::Uniform && self.shape(x) == Shape::Uniform {
            return self.store(buf, index, x);
        }
        let xs = self.vector(x);
        let (w, per) = (self.w(ty), self.per(ty));
        let step = self.step(shape, unit);
        if let (Shape::Affine(1), Some(step)) = (shape, step) {
            let first = self.address(buf, index, unit, self.reach(step));
            for (g, s) in xs.into_iter().enumerate() {
                let m = first.plus((g * per) as i32 * step);
                match dtype.size() {
                    4 | 8 => self.b.push(Op::VecStore { w, m, s }),
                    bytes => {
                        let t = self.b.mutable(Class::Vec);
                        self.b.push(Op::NarrowStore { w, m, s, t, bytes: bytes as u8 });
                    }
                }
            }
            return;
        }
        // Lane by lane, by way of memory.
        let (from, lane_bytes) = (self.transit(true), if ty == Ty::F64 { 8 } else { 4 });
        for (g, &s) in xs.iter().enumerate() {
            let m = Mem::frame(from + (g * per) as i32 * lane_bytes);
            self.b.push(Op::VecStore { w, m, s });
        }
        let first = step.map(|step| (self.address(buf, index, unit, self.reach(step)), step));
        self.each_lane(|lower| {
            let m = match first {
                Some((first, step)) => first.plus(lower.lane as i32 * step),
                None => lower.address(buf, index, unit, 0),
            };
            let at = Mem::frame(from + lower.lane as i32 * lane_bytes);
            let size = if ty == Ty::F64 { Size::W64 } else { Size::W32 };
            let s = lower.b.here(Class::Int, Op::IntLoad { d: NEW, m: at, size, narrow: None });
            lower.b.push(Op::IntStore { m, s, bytes: unit as u8 });
        });
    }

    /// Store in the current lane.
    pub(super) fn store(&mut self, buf: Buf, index: &Expr, x: &Expr) {
        let (dtype, ty) = (self.dtype(buf), self.kernel.ty(x));
        let s = self.scalar(x);
        let m = self.address(buf, index, dtype.size() as i64, 0);
        match ty {
            Ty::F32 | Ty::F64 => self.b.push(Op::VecStore { w: scalar_width(ty), m, s }),
            _ => self.b.push(Op::IntStore { m, s, bytes: dtype.size() as u8 }),
        }
    }
}
