//! Kernel memory over dense data: the safe way to run the interpreter.
//!
//! Argument count, element types and lengths agree with the kernel, checked once when the memory is made.

use super::{Buf, Kernel, Memory, Role};
use crate::Data;

#[derive(Clone, Copy, Debug)]
enum Place {
    Arg(usize),
    Scratch(usize),
}

/// The arguments of a kernel as [`Data`], in order, and scratch memory of its own.
#[derive(Debug)]
pub struct Tensors<'a> {
    args: &'a mut [Data],
    scratch: Vec<Data>,
    places: Vec<Place>,
}

impl<'a> Tensors<'a> {
    /// Memory for `kernel` over its arguments: the buffers that are not scratch, in order. Scratch starts as NaN or -1, so that a
    /// kernel which relies on its contents is noticed.
    ///
    /// # Panics
    /// When an argument is missing, superfluous, or not of the element type and length that the kernel declares.
    pub fn new(kernel: &Kernel, args: &'a mut [Data]) -> Tensors<'a> {
        let (mut scratch, mut places, mut n) = (vec![], vec![], 0);
        for b in &kernel.bufs {
            if b.role == Role::Scratch {
                places.push(Place::Scratch(scratch.len()));
                scratch.push(Data::poison(b.dtype, b.len));
                continue;
            }
            let (name, found) = (&kernel.name, args.get(n).map(|a| (a.dtype(), a.len())));
            assert_eq!(found, Some((b.dtype, b.len)), "kernel {name}: argument {n} is what {} declares", b.name);
            places.push(Place::Arg(n));
            n += 1;
        }
        assert_eq!(args.len(), n, "kernel {}: every argument has a buffer", kernel.name);
        Tensors { args, scratch, places }
    }

    fn data(&self, buf: Buf) -> &Data {
        match self.places[buf.0 as usize] {
            Place::Arg(n) => &self.args[n],
            Place::Scratch(n) => &self.scratch[n],
        }
    }

    fn data_mut(&mut self, buf: Buf) -> &mut Data {
        match self.places[buf.0 as usize] {
            Place::Arg(n) => &mut self.args[n],
            Place::Scratch(n) => &mut self.scratch[n],
        }
    }
}

#[cold]
fn ill(data: &Data, wanted: &str) -> ! {
    panic!("a verified kernel uses buffers by their type, found {} used as {wanted}", data.dtype().name())
}

impl Memory for Tensors<'_> {
    fn load_f32(&self, buf: Buf, i: i64) -> f32 {
        match self.data(buf) {
            Data::F32(v) => v[i as usize],
            Data::BF16(v) => f32::from_bits(u32::from(v[i as usize]) << 16),
            other => ill(other, "f32"),
        }
    }

    fn load_f64(&self, buf: Buf, i: i64) -> f64 {
        match self.data(buf) {
            Data::F64(v) => v[i as usize],
            other => ill(other, "f64"),
        }
    }

    fn load_i32(&self, buf: Buf, i: i64) -> i32 {
        match self.data(buf) {
            Data::I32(v) => v[i as usize],
            Data::U8(v) => v[i as usize].into(),
            Data::I8(v) => v[i as usize].into(),
            Data::I16(v) => v[i as usize].into(),
            other => ill(other, "integer"),
        }
    }

    fn word(&self, buf: Buf, i: i64) -> i32 {
        let at = 4 * i as usize;
        let bytes: [u8; 4] = match self.data(buf) {
            Data::U8(v) => std::array::from_fn(|j| v[at + j]),
            Data::I8(v) => std::array::from_fn(|j| v[at + j] as u8),
            other => ill(other, "bytes"),
        };
        i32::from_le_bytes(bytes)
    }

    fn store_f32(&mut self, buf: Buf, i: i64, x: f32) {
        match self.data_mut(buf) {
            Data::F32(v) => v[i as usize] = x,
            other => ill(other, "f32"),
        }
    }

    fn store_f64(&mut self, buf: Buf, i: i64, x: f64) {
        match self.data_mut(buf) {
            Data::F64(v) => v[i as usize] = x,
            other => ill(other, "f64"),
        }
    }

    fn store_i32(&mut self, buf: Buf, i: i64, x: i32) {
        match self.data_mut(buf) {
            Data::I32(v) => v[i as usize] = x,
            Data::U8(v) => v[i as usize] = x as u8,
            Data::I8(v) => v[i as usize] = x as i8,
            Data::I16(v) => v[i as usize] = x as i16,
            other => ill(other, "integer"),
        }
    }
}
