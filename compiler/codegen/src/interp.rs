//! The interpreting emitter: runs the meaning of a kernel on raw memory.
//!
//! Accepts everything; it is the fallback and the oracle of all other emitters.

use chimera_ir::DType;
use chimera_ir::loops::{Buf, Kernel, Memory, Role, interpret};

use crate::{Code, Emitter, Refusal, Target};

pub(crate) struct Interp;

impl Emitter for Interp {
    fn name(&self) -> &'static str {
        "interp"
    }

    fn version(&self) -> u32 {
        1
    }

    fn accepts(&self, _kernel: &Kernel, _target: &Target) -> Result<(), Refusal> {
        Ok(())
    }

    fn emit(&self, _kernel: &Kernel, _target: &Target) -> Result<Code, Refusal> {
        Ok(Code::Interpreted)
    }
}

/// Where a buffer lives.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// Position in the table of arguments.
    Arg(usize),
    /// Byte offset in the scratch memory.
    Scratch(usize),
}

/// The place of every buffer of a kernel. The one definition of the layout of arguments and scratch memory.
pub(crate) fn places(kernel: &Kernel) -> Vec<Place> {
    let (mut args, mut bytes) = (0, 0);
    let place = |b: &chimera_ir::loops::BufDecl| {
        if b.role == Role::Scratch {
            let at = bytes;
            bytes += (b.len * b.dtype.size()).next_multiple_of(64);
            Place::Scratch(at)
        } else {
            args += 1;
            Place::Arg(args - 1)
        }
    };
    kernel.bufs.iter().map(place).collect()
}

/// A kernel ready to be interpreted.
#[derive(Debug)]
pub(crate) struct Interpreted {
    kernel: Kernel,
    places: Vec<Place>,
}

impl Interpreted {
    pub(crate) fn new(kernel: &Kernel) -> Interpreted {
        Interpreted { kernel: kernel.clone(), places: places(kernel) }
    }

    /// Run the instances `lo .. hi`.
    ///
    /// # Safety
    /// As for [`Entry::call`](crate::Entry::call).
    pub(crate) unsafe fn call(&self, args: *const *mut u8, scratch: *mut u8, lo: i64, hi: i64) {
        interpret(&self.kernel, &mut Raw { of: self, args, scratch }, lo, hi);
    }
}

struct Raw<'a> {
    of: &'a Interpreted,
    args: *const *mut u8,
    scratch: *mut u8,
}

impl Raw<'_> {
    fn dtype(&self, buf: Buf) -> DType {
        self.of.kernel.bufs[buf.0 as usize].dtype
    }

    /// Element `i` of a buffer seen as an array of `T`.
    fn at<T>(&self, buf: Buf, i: i64) -> *mut T {
        let base = match self.of.places[buf.0 as usize] {
            // SAFETY: the caller of `call` passed one pointer for every buffer that is not scratch.
            Place::Arg(n) => unsafe { *self.args.add(n) },
            Place::Scratch(at) => self.scratch.wrapping_add(at),
        };
        base.cast::<T>().wrapping_offset(i as isize)
    }

    fn read<T: Copy>(&self, buf: Buf, i: i64) -> T {
        // SAFETY: the interpreter keeps `i` within the declared length, which the caller of `call` provides.
        unsafe { self.at::<T>(buf, i).read_unaligned() }
    }

    fn write<T: Copy>(&mut self, buf: Buf, i: i64, x: T) {
        // SAFETY: as for `read`; the caller gives exclusive access to what its instances write.
        unsafe { self.at::<T>(buf, i).write_unaligned(x) }
    }
}

impl Memory for Raw<'_> {
    fn load_f32(&self, buf: Buf, i: i64) -> f32 {
        match self.dtype(buf) {
            DType::BF16 => f32::from_bits(u32::from(self.read::<u16>(buf, i)) << 16),
            _ => self.read(buf, i),
        }
    }

    fn load_f64(&self, buf: Buf, i: i64) -> f64 {
        self.read(buf, i)
    }

    fn load_i32(&self, buf: Buf, i: i64) -> i32 {
        match self.dtype(buf) {
            DType::I8 => self.read::<i8>(buf, i).into(),
            DType::U8 => self.read::<u8>(buf, i).into(),
            DType::I16 => self.read::<i16>(buf, i).into(),
            _ => self.read(buf, i),
        }
    }

    fn word(&self, buf: Buf, i: i64) -> i32 {
        i32::from_le_bytes(self.read(buf, i))
    }

    fn store_f32(&mut self, buf: Buf, i: i64, x: f32) {
        self.write(buf, i, x);
    }

    fn store_f64(&mut self, buf: Buf, i: i64, x: f64) {
        self.write(buf, i, x);
    }

    fn store_i32(&mut self, buf: Buf, i: i64, x: i32) {
        match self.dtype(buf) {
            DType::I8 | DType::U8 => self.write(buf, i, x as u8),
            DType::I16 => self.write(buf, i, x as i16),
            _ => self.write(buf, i, x),
        }
    }
}
