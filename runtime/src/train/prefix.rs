//! What goes into the first layer that a step changes, kept from pass to pass over the data.
//!
//! Invariant: what a row gives is a function of its tokens, its documents, its loop depth and of weights that stay as they are; where
//! it was found in memory and where it was computed, it has the same bits. Memory stays within its bound.

use super::TrainError;
use super::step::{DEPTH, input_type};
use crate::exec::{EntryId, Executable};
use crate::text::Batch;
use chimera_ir::plan::Plan;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// The entry point that computes it, and the port that takes it.
pub(super) const PREFIX: &str = "prefix";
/// Values of a hidden vector that share a scale in [`Form::Int8`].
const BLOCK: usize = 64;

/// How values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As they are.
    Exact,
    /// As codes of 8 bits with a scale for each 64 of them: a quarter of the memory, and other losses.
    Int8,
}

/// How much is kept, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keeping {
    /// In which form.
    pub form: Form,
    /// Most bytes, at 0 nothing.
    pub bytes: u64,
}

/// Values in one of the forms.
#[derive(Debug)]
enum Values {
    Exact(Vec<f32>),
    Int8(Vec<i8>, Vec<f32>),
}

/// A row that is kept.
#[derive(Debug)]
struct Row {
    /// Tokens, documents and depth, one behind the other.
    key: Vec<i32>,
    values: Values,
}

impl Values {
    fn of(form: Form, values: &[f32]) -> Values {
        match form {
            Form::Exact => Values::Exact(values.to_vec()),
            Form::Int8 => {
                let scale = |block: &[f32]| block.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
                let scales: Vec<f32> = values.chunks(BLOCK).map(scale).collect();
                let code = |x: f32, s: f32| if s > 0.0 { (x / s).round_ties_even() as i8 } else { 0 };
                let codes = values.chunks(BLOCK).zip(&scales).flat_map(|(b, &s)| b.iter().map(move |&x| code(x, s)));
                Values::Int8(codes.collect(), scales)
            }
        }
    }

    fn write(&self, out: &mut [f32]) {
        match self {
            Values::Exact(values) => out.copy_from_slice(values),
            Values::Int8(codes, scales) => {
                for ((out, codes), scale) in out.chunks_mut(BLOCK).zip(codes.chunks(BLOCK)).zip(scales) {
                    out.iter_mut().zip(codes).for_each(|(x, &code)| *x = f32::from(code) * scale);
                }
            }
        }
    }

    /// Bytes of `n` values.
    fn bytes(form: Form, n: usize) -> usize {
        match form {
            Form::Exact => 4 * n,
            Form::Int8 => n + 4 * n.div_ceil(BLOCK),
        }
    }
}

/// The rows that are kept, and the entry point that computes others.
#[derive(Debug)]
pub(super) struct Prefix {
    entry: EntryId,
    keeping: Keeping,
    /// Rows that the entry point takes at a time, and numbers of a row of its output.
    rows: usize,
    width: usize,
    /// Whether the entry point takes a loop depth.
    deep: bool,
    kept: HashMap<u64, Row>,
    bytes: u64,
    /// Rows that were found, of all that were asked for.
    found: (u64, u64),
    /// The values of a batch.
    values: Vec<f32>,
}

impl Prefix {
    /// For a plan that has the entry point; nothing for others.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub(super) fn of(exec: &Executable, keeping: Keeping) -> Result<Option<Prefix>, TrainError> {
        let plan = exec.plan();
        if plan.entry(PREFIX).is_none() {
            return Ok(None);
        }
        let [rows, _] = super::step::matrix(plan, PREFIX, "tokens")?;
        let entry = exec.entry(PREFIX)?;
        let width = exec.output_type(entry, PREFIX)?.numel() / rows.max(1);
        let deep = input_type(plan, PREFIX, DEPTH).is_ok();
        let (kept, values) = (HashMap::new(), vec![]);
        Ok(Some(Prefix { entry, keeping, rows, width, deep, kept, bytes: 0, found: (0, 0), values }))
    }

    /// Most bytes that rows may take.
    pub(super) fn most(&self) -> u64 {
        self.keeping.bytes
    }

    /// Rows that were found, of all that were asked for.
    pub(super) fn found(&self) -> (u64, u64) {
        self.found
    }

    /// Forgets all rows: weights were replaced.
    pub(super) fn forget(&mut self) {
        self.kept.clear();
        self.bytes = 0;
    }

    /// What the rows of a batch give, one behind the other; `depths` has a loop depth for each.
    ///
    /// # Errors
    /// When execution fails.
    pub(super) fn rows(
        &mut self,
        exec: &mut Executable,
        batch: &Batch,
        depths: Option<&[i32]>,
    ) -> Result<&[f32], TrainError> {
        let (n, width, form) = (batch.seq, self.width, self.keeping.form);
        self.values.resize(batch.batch * width, 0.0);
        let depth = |row: usize| depths.filter(|_| self.deep).and_then(|d| d.get(row).copied());
        let key = |row: usize| -> Vec<i32> {
            let cells = row * n..(row + 1) * n;
            let of = |all: &[i32]| all.get(cells.clone()).unwrap_or_default().to_vec();
            [of(&batch.tokens), of(&batch.seg), depth(row).into_iter().collect()].concat()
        };
        let hash = |key: &[i32]| {
            let mut hasher = DefaultHasher::new();
            key.hash(&mut hasher);
            hasher.finish()
        };
        let mut missing = vec![];
        for row in 0..batch.batch {
            let key = key(row);
            let hash = hash(&key);
            match self.kept.get(&hash).filter(|kept| kept.key == key) {
                Some(kept) => kept.values.write(&mut self.values[row * width..(row + 1) * width]),
                None => missing.push((row, hash, key)),
            }
        }
        self.found.0 += (batch.batch - missing.len()) as u64;
        self.found.1 += batch.batch as u64;
        for part in missing.chunks_mut(self.rows) {
            // A part that is not full repeats its last row.
            let at = |i: usize| part[i.min(part.len() - 1)].0;
            let cells = |all: &[i32]| -> Vec<i32> {
                (0..self.rows).flat_map(|i| all[at(i) * n..(at(i) + 1) * n].iter().copied()).collect()
            };
            let given = [("tokens", cells(&batch.tokens)), ("seg", cells(&batch.seg))];
            for (name, values) in &given {
                exec.set_input(self.entry, name, values)?;
            }
            if self.deep {
                let depths: Vec<i32> = (0..self.rows).map(|i| depth(at(i)).unwrap_or(1)).collect();
                exec.set_input(self.entry, DEPTH, &depths)?;
            }
            exec.run_entry(self.entry)?;
            let found = exec.output::<f32>(self.entry, PREFIX)?;
            for ((row, hash, key), values) in part.iter_mut().zip(found.chunks(width)) {
                let values = Values::of(form, values);
                values.write(&mut self.values[*row * width..(*row + 1) * width]);
                let bytes = (Values::bytes(form, width) + 4 * key.len() + size_of::<(u64, Row)>()) as u64;
                if self.bytes + bytes <= self.keeping.bytes && !self.kept.contains_key(hash) {
                    self.bytes += bytes;
                    self.kept.insert(*hash, Row { key: std::mem::take(key), values });
                }
            }
        }
        Ok(&self.values)
    }
}

/// Whether a plan leaves the beginning of its model to an entry point of its own.
pub(super) fn is_cut(plan: &Plan, entry: &str) -> bool {
    input_type(plan, entry, PREFIX).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_values_come_back_and_codes_are_near() {
        let values: Vec<f32> =
            (0..150).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.03 * if i < 64 { 1.0 } else { 1e-3 }).collect();
        let mut out = vec![0.0; 150];
        Values::of(Form::Exact, &values).write(&mut out);
        assert_eq!(out, values);
        let kept = Values::of(Form::Int8, &values);
        kept.write(&mut out);
        for (block, near) in values.chunks(BLOCK).zip(out.chunks(BLOCK)) {
            let most = block.iter().fold(0f32, |m, x| m.max(x.abs()));
            assert!(block.iter().zip(near).all(|(a, b)| (a - b).abs() <= most / 253.0), "half a code of the block");
        }
        let Values::Int8(codes, scales) = &kept else { panic!("codes") };
        assert_eq!(codes.len() + 4 * scales.len(), Values::bytes(Form::Int8, 150));
        Values::of(Form::Int8, &[0.0; 150]).write(&mut out);
        assert!(out.iter().all(|&x| x == 0.0));
    }
}
