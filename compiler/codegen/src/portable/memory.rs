//! Loads and stores of all element types, of one lane and of four.
//!
//! Never touches a byte outside of the addressed elements. No access is assumed to be aligned.

use chimera_ir::DType;
use chimera_ir::loops::{Buf, Expr, Ty};
use cranelift_codegen::ir::{ConstantData, Endianness, InstBuilder, MemFlagsData, Value, types};

use super::index::Address;
use super::stmt::Lower;
use crate::shape::Shape;

/// Accesses do not trap; they may be unaligned.
pub(super) const MEM: MemFlagsData = LITTLE.with_notrap();
/// Casts between vector types number lanes from the low end.
pub(super) const LITTLE: MemFlagsData = MemFlagsData::new().with_endianness(Endianness::Little);

impl Lower<'_, '_> {
    fn dtype(&self, buf: Buf) -> DType {
        self.kernel.bufs[buf.0 as usize].dtype
    }

    /// One element.
    pub(super) fn load(&mut self, buf: Buf, index: &Expr) -> Value {
        let dtype = self.dtype(buf);
        let a = self.address(buf, index, dtype.size() as i64, 0);
        self.load_at(dtype, a)
    }

    fn load_at(&mut self, dtype: DType, Address { at, offset, flags }: Address) -> Value {
        let ins = self.b.ins();
        match dtype {
            DType::F32 => ins.load(types::F32, flags, at, offset),
            DType::F64 => ins.load(types::F64, flags, at, offset),
            DType::I32 => ins.load(types::I32, flags, at, offset),
            DType::I8 => ins.sload8(types::I32, flags, at, offset),
            DType::U8 => ins.uload8(types::I32, flags, at, offset),
            DType::I16 => ins.sload16(types::I32, flags, at, offset),
            DType::BF16 => {
                let x = ins.uload16(types::I32, flags, at, offset);
                let x = self.b.ins().ishl_imm_u(x, 16);
                self.b.ins().bitcast(types::F32, LITTLE, x)
            }
        }
    }

    fn store_at(&mut self, dtype: DType, x: Value, Address { at, offset, .. }: Address) {
        let ins = self.b.ins();
        match dtype {
            DType::F32 | DType::F64 | DType::I32 => ins.store(MEM, x, at, offset),
            DType::I8 | DType::U8 => ins.istore8(MEM, x, at, offset),
            DType::I16 => ins.istore16(MEM, x, at, offset),
            DType::BF16 => unreachable!("refused by `accepts`"),
        };
    }

    /// Four neighbours, widened.
    fn load4(&mut self, dtype: DType, Address { at, offset, flags }: Address) -> Value {
        match dtype {
            DType::F32 => self.b.ins().load(types::F32X4, flags, at, offset),
            DType::I32 => self.b.ins().load(types::I32X4, flags, at, offset),
            DType::I16 => {
                let at = self.offset(at, offset);
                self.b.ins().sload16x4(flags, at, 0)
            }
            DType::BF16 => {
                let at = self.offset(at, offset);
                let x = self.b.ins().uload16x4(flags, at, 0);
                let x = self.b.ins().ishl_imm_u(x, 16);
                self.b.ins().bitcast(types::F32X4, LITTLE, x)
            }
            DType::I8 | DType::U8 => {
                let x = self.b.ins().load(types::F32, flags, at, offset);
                let x = self.b.ins().scalar_to_vector(types::F32X4, x);
                let x = self.b.ins().bitcast(types::I8X16, LITTLE, x);
                if dtype == DType::I8 {
                    let x = self.b.ins().swiden_low(x);
                    self.b.ins().swiden_low(x)
                } else {
                    let x = self.b.ins().uwiden_low(x);
                    self.b.ins().uwiden_low(x)
                }
            }
            DType::F64 => unreachable!("f64 is loaded lane by lane"),
        }
    }

    /// Cranelift's widening vector loads fold no offset of their own.
    fn offset(&mut self, at: Value, offset: i32) -> Value {
        if offset == 0 { at } else { self.b.ins().iadd_imm_s(at, i64::from(offset)) }
    }

    /// Four neighbours, narrowed by wrapping.
    fn store4(&mut self, dtype: DType, x: Value, Address { at, offset, .. }: Address) {
        match dtype {
            DType::F32 | DType::I32 => {
                self.b.ins().store(MEM, x, at, offset);
            }
            DType::I16 => {
                let x = self.shuffle(x, x, [0, 1, 4, 5, 8, 9, 12, 13, 0, 1, 4, 5, 8, 9, 12, 13]);
                let x = self.b.ins().bitcast(types::F64X2, LITTLE, x);
                let x = self.b.ins().extractlane(x, 0);
                self.b.ins().store(MEM, x, at, offset);
            }
            DType::I8 | DType::U8 => {
                let x = self.shuffle(x, x, [0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12]);
                let x = self.b.ins().bitcast(types::F32X4, LITTLE, x);
                let x = self.b.ins().extractlane(x, 0);
                self.b.ins().store(MEM, x, at, offset);
            }
            DType::F64 | DType::BF16 => unreachable!("stored lane by lane, or refused by `accepts`"),
        }
    }

    /// Bytes of two vectors of any type.
    pub(super) fn shuffle(&mut self, a: Value, b: Value, bytes: [u8; 16]) -> Value {
        let mask = self.b.func.dfg.immediates.push(ConstantData::from(&bytes[..]));
        let [a, b] = [a, b].map(|x| self.b.ins().bitcast(types::I8X16, LITTLE, x));
        self.b.ins().shuffle(a, b, mask)
    }

    /// Elements for all lanes; the index differs between them.
    pub(super) fn gather(&mut self, buf: Buf, index: &Expr) -> Vec<Value> {
        let (dtype, groups) = (self.dtype(buf), self.width() / 4);
        let unit = dtype.size() as i64;
        let ty = chimera_ir::loops::load_ty(dtype);
        let Shape::Affine(stride) = self.shape(index) else {
            return self.lanewise(ty, |lower| lower.load(buf, index));
        };
        let Some(step) = self.step(stride, unit) else {
            return self.lanewise(ty, |lower| lower.load(buf, index));
        };
        let first = self.address(buf, index, unit, self.reach(step));
        let group = |g: usize| first.plus(4 * g as i32 * step);
        if stride == 1 {
            return (0..groups).map(|g| self.load4(dtype, group(g))).collect();
        }
        let mut load = |g: usize| {
            let xs = [0, 1, 2, 3].map(|l| self.load_at(dtype, group(g).plus(l * step)));
            self.pack(ty, xs)
        };
        (0..groups).map(&mut load).collect()
    }

    /// Words for all lanes; the index differs between them.
    pub(super) fn gather_words(&mut self, buf: Buf, index: &Expr) -> Vec<Value> {
        let word = |lower: &mut Self| {
            let a = lower.address(buf, index, 4, 0);
            lower.load_at(DType::I32, a)
        };
        if self.shape(index) != Shape::Affine(1) {
            return self.lanewise(Ty::I32, word);
        }
        let first = self.address(buf, index, 4, self.reach(4));
        let groups = self.width() as i32 / 4;
        (0..groups).map(|g| self.load4(DType::I32, first.plus(16 * g))).collect()
    }

    /// Store in all lanes.
    pub(super) fn scatter(&mut self, buf: Buf, index: &Expr, x: &Expr) {
        let dtype = self.dtype(buf);
        let unit = dtype.size() as i64;
        let (ty, shape) = (self.kernel.ty(x), self.shape(index));
        if shape == Shape::Uniform && self.shape(x) == Shape::Uniform {
            return self.store(buf, index, x);
        }
        let step = match shape {
            Shape::Affine(s) => self.step(s, unit),
            Shape::Uniform => Some(0),
            Shape::Varying => None,
        };
        let vector = matches!(ty, Ty::F32 | Ty::I32);
        if vector {
            let xs = self.vector(x);
            match step {
                Some(step) => {
                    let first = self.address(buf, index, unit, self.reach(step));
                    for (g, x) in xs.into_iter().enumerate() {
                        let group = first.plus(4 * g as i32 * step);
                        if shape == Shape::Affine(1) {
                            self.store4(dtype, x, group);
                            continue;
                        }
                        for l in 0..4 {
                            let x = self.b.ins().extractlane(x, l as u8);
                            self.store_at(dtype, x, group.plus(l * step));
                        }
                    }
                }
                None => self.each_lane(|lower, l| {
                    let x = lower.b.ins().extractlane(xs[l / 4], (l % 4) as u8);
                    let a = lower.address(buf, index, unit, 0);
                    lower.store_at(dtype, x, a);
                }),
            }
        } else {
            self.each_lane(|lower, _| lower.store(buf, index, x));
        }
    }

    /// Store in the current lane.
    pub(super) fn store(&mut self, buf: Buf, index: &Expr, x: &Expr) {
        let dtype = self.dtype(buf);
        let x = self.scalar(x);
        let a = self.address(buf, index, dtype.size() as i64, 0);
        self.store_at(dtype, x, a);
    }

    /// Bytes from lane to lane, if offsets within the group fit an instruction.
    fn step(&self, stride: i64, unit: i64) -> Option<i32> {
        let step = stride.checked_mul(unit)?;
        let far = step.checked_mul(self.width() as i64)?;
        if far.unsigned_abs() < 1 << 30 { i32::try_from(step).ok() } else { None }
    }

    fn reach(&self, step: i32) -> i64 {
        i64::from(step).abs() * self.width() as i64
    }
}
