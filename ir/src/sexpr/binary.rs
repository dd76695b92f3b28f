//! The byte form of S-expressions.
//!
//! ```text
//! form   := varint(strings) { varint(length) utf8 } node
//! node   := byte(kind | small << 3) [varint] [payload]
//! ```
//!
//! The argument of a node is `small` up to 30; 31 means 31 plus the varint that follows. Kinds: symbol and string (argument: place in
//! the table), integer (zigzag), binary32 and binary64 (argument 0, little-endian bits follow), list (argument: number of elements).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::{MAX_BYTES, MAX_DEPTH, Sexpr, SexprError};

const SYM: u8 = 0;
const STR: u8 = 1;
const INT: u8 = 2;
const F32: u8 = 3;
const F64: u8 = 4;
const LIST: u8 = 5;
/// The least argument that needs a varint.
const LARGE: u8 = 31;

#[derive(Default)]
struct Encoder<'a> {
    places: HashMap<&'a str, u64>,
    table: Vec<u8>,
    nodes: Vec<u8>,
}

/// The byte form of a tree.
pub(super) fn encode(s: &Sexpr) -> Vec<u8> {
    let mut e = Encoder::default();
    e.node(s);
    let mut out = Vec::with_capacity(10 + e.table.len() + e.nodes.len());
    push_varint(&mut out, e.places.len() as u64);
    out.extend_from_slice(&e.table);
    out.extend_from_slice(&e.nodes);
    out
}

fn push_varint(out: &mut Vec<u8>, mut x: u64) {
    while x >= 0x80 {
        out.push(x as u8 | 0x80);
        x >>= 7;
    }
    out.push(x as u8);
}

impl<'a> Encoder<'a> {
    fn node(&mut self, s: &'a Sexpr) {
        match s {
            Sexpr::Sym(s) => self.string(SYM, s),
            Sexpr::Str(s) => self.string(STR, s),
            Sexpr::Int(x) => self.head(INT, ((x << 1) ^ (x >> 63)) as u64),
            Sexpr::F32(bits) => {
                self.head(F32, 0);
                self.nodes.extend_from_slice(&bits.to_le_bytes());
            }
            Sexpr::F64(bits) => {
                self.head(F64, 0);
                self.nodes.extend_from_slice(&bits.to_le_bytes());
            }
            Sexpr::List(items) => {
                self.head(LIST, items.len() as u64);
                items.iter().for_each(|s| self.node(s));
            }
        }
    }

    fn string(&mut self, kind: u8, s: &'a str) {
        let next = self.places.len() as u64;
        let place = *self.places.entry(s).or_insert_with(|| {
            push_varint(&mut self.table, s.len() as u64);
            self.table.extend_from_slice(s.as_bytes());
            next
        });
        self.head(kind, place);
    }

    fn head(&mut self, kind: u8, argument: u64) {
        if argument < LARGE.into() {
            self.nodes.push(kind | (argument as u8) << 3);
        } else {
            self.nodes.push(kind | LARGE << 3);
            push_varint(&mut self.nodes, argument - u64::from(LARGE));
        }
    }
}

struct Decoder<'a> {
    bytes: &'a [u8],
    at: usize,
    strings: Vec<Arc<str>>,
    /// How many of the strings were used.
    used: usize,
}

/// The tree of a byte form.
pub(super) fn decode(bytes: &[u8]) -> Result<Sexpr, SexprError> {
    let mut d = Decoder { bytes, at: 0, strings: vec![], used: 0 };
    if bytes.len() > MAX_BYTES {
        return d.wrong(format!("{} bytes, expected at most {MAX_BYTES}", bytes.len()));
    }
    d.table()?;
    let tree = d.tree()?;
    if d.used != d.strings.len() {
        return d.wrong("a string that nothing uses");
    }
    if d.at != bytes.len() {
        return d.wrong("bytes after the end");
    }
    Ok(tree)
}

impl Decoder<'_> {
    fn wrong<T>(&self, why: impl Into<String>) -> Result<T, SexprError> {
        Err(SexprError::Bytes { offset: self.at, why: why.into() })
    }

    fn take(&mut self, n: usize) -> Result<&[u8], SexprError> {
        if n > self.bytes.len() - self.at {
            return self.wrong(format!("the end, expected {n} more bytes"));
        }
        let part = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(part)
    }

    fn varint(&mut self) -> Result<u64, SexprError> {
        let mut x = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            if shift == 63 && byte > 1 {
                return self.wrong("a number above 64 bits");
            }
            x |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                if byte == 0 && shift > 0 {
                    return self.wrong("a number with superfluous zeros");
                }
                return Ok(x);
            }
        }
        self.wrong("a number above 64 bits")
    }

    /// A number of things that take at least one byte each.
    fn count(&mut self) -> Result<usize, SexprError> {
        let n = self.varint()?;
        self.fits(n)
    }

    fn fits(&self, n: u64) -> Result<usize, SexprError> {
        let left = self.bytes.len() - self.at;
        match usize::try_from(n) {
            Ok(n) if n <= left => Ok(n),
            _ => self.wrong(format!("a count of {n} with {left} bytes left")),
        }
    }

    fn table(&mut self) -> Result<(), SexprError> {
        let n = self.count()?;
        let mut seen = HashSet::new();
        for _ in 0..n {
            let length = self.count()?;
            let string = match std::str::from_utf8(self.take(length)?) {
                Ok(s) => Arc::<str>::from(s),
                Err(_) => return self.wrong("a string that is not UTF-8"),
            };
            if !seen.insert(string.clone()) {
                return self.wrong("a string that occurred before");
            }
            self.strings.push(string);
        }
        Ok(())
    }

    fn string(&mut self, place: u64) -> Result<Arc<str>, SexprError> {
        let place = usize::try_from(place).unwrap_or(usize::MAX);
        if place >= self.strings.len() || place > self.used {
            return self.wrong("a string before its turn, expected order of first use");
        }
        self.used = self.used.max(place + 1);
        Ok(self.strings[place].clone())
    }

    fn tree(&mut self) -> Result<Sexpr, SexprError> {
        // Elements still to come of every open list, and those read.
        let mut open: Vec<(usize, Vec<Sexpr>)> = vec![];
        // Nodes still to come; each takes a byte at least.
        let mut promised = 1;
        loop {
            let head = self.take(1)?[0];
            promised -= 1;
            let argument = match head >> 3 {
                LARGE => match self.varint()?.checked_add(LARGE.into()) {
                    Some(x) => x,
                    None => return self.wrong("a number above 64 bits"),
                },
                small => small.into(),
            };
            let mut node = match head & 7 {
                SYM => Sexpr::Sym(self.string(argument)?),
                STR => Sexpr::Str(self.string(argument)?),
                INT => Sexpr::Int((argument >> 1) as i64 ^ -((argument & 1) as i64)),
                F32 if argument == 0 => Sexpr::F32(u32::from_le_bytes(self.array()?)),
                F64 if argument == 0 => Sexpr::F64(u64::from_le_bytes(self.array()?)),
                LIST => {
                    let n = self.fits(argument.saturating_add(promised))? - promised as usize;
                    if open.len() >= MAX_DEPTH {
                        return self.wrong(format!("nesting above {MAX_DEPTH}"));
                    }
                    if n > 0 {
                        promised += n as u64;
                        open.push((n, Vec::with_capacity(n)));
                        continue;
                    }
                    Sexpr::List(vec![])
                }
                _ => return self.wrong(format!("node {head:#04x}, which is not defined")),
            };
            // Close every list that this element completes.
            loop {
                let Some((left, items)) = open.last_mut() else { return Ok(node) };
                items.push(node);
                *left -= 1;
                if *left > 0 {
                    break;
                }
                let (_, items) = open.pop().expect("a list is open");
                node = Sexpr::List(items);
            }
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], SexprError> {
        let part = self.take(N)?;
        Ok(std::array::from_fn(|i| part[i]))
    }
}
