//! Values in and out of an executable: weights, states, inputs and outputs by name.
//!
//! Shapes and element types are compared with the plan before a byte moves.

use super::memory::{ALIGN, Block, Element, WeightMemory, bytes_of};
use super::program::stride;
use super::{EntryId, EntryKey, ExecError, Executable, WEIGHTS};
use crate::files::MappedSlice;
use chimera_ir::plan::{BufferId, Place};
use chimera_ir::{DType, Type};
use std::borrow::Cow;

/// The index of a name, or the error that lists the names there are.
fn find<'a>(
    what: &'static str,
    name: &str,
    names: impl Iterator<Item = &'a String> + Clone,
) -> Result<usize, ExecError> {
    names.clone().position(|n| n == name).ok_or_else(|| ExecError::Unknown {
        what,
        name: name.to_owned(),
        known: names.cloned().collect(),
    })
}

fn shape(what: &'static str, name: &str, found: String, expected: String) -> ExecError {
    ExecError::Shape { what, name: name.to_owned(), found, expected }
}

/// Whether `n` elements of `dtype` are what `ty` declares.
fn check_len(what: &'static str, name: &str, dtype: DType, n: usize, ty: &Type) -> Result<(), ExecError> {
    if ty.dtype == dtype && ty.numel() == n {
        return Ok(());
    }
    Err(shape(
        what,
        name,
        format!("{n} elements of {}", dtype.name()),
        format!("{ty}, which are {} elements", ty.numel()),
    ))
}

impl Executable {
    /// The entry point of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn entry(&self, name: &str) -> Result<EntryId, ExecError> {
        find("entry point", name, self.plan.entries.iter().map(|e| &e.name)).map(EntryId)
    }

    fn weight_index(&self, name: &str) -> Result<usize, ExecError> {
        find("weight", name, self.plan.weights.iter().map(|w| &w.name))
    }

    /// Set a weight to `values` of shape `dims`. A weight that is `bf16` in memory takes `f32` values too, rounded to nearest even.
    ///
    /// # Errors
    /// No such weight, another shape or element type than the plan declares, or memory beyond the limit.
    pub fn set_weight<T: Element>(&mut self, name: &str, dims: &[usize], values: &[T]) -> Result<(), ExecError> {
        let i = self.weight_index(name)?;
        let ty = &self.plan.weights[i].ty;
        let narrowed = ty.dtype == DType::BF16 && T::DTYPE == DType::F32;
        if ty.dims != dims || (ty.dtype != T::DTYPE && !narrowed) {
            return Err(shape("weight", name, Type::new(T::DTYPE, dims).to_string(), ty.to_string()));
        }
        let n = ty.numel();
        if values.len() != n {
            return Err(shape("weight", name, format!("{} elements", values.len()), format!("{n}")));
        }
        let block = self.own(i)?;
        if narrowed {
            let bytes = bytes_of(values).chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
            for (to, x) in block.slice_mut::<half::bf16>(0, n).iter_mut().zip(bytes) {
                *to = half::bf16::from_f32(x);
            }
        } else {
            block.slice_mut::<T>(0, n).copy_from_slice(values);
        }
        self.changed(i);
        Ok(())
    }

    /// Give a weight the values `bytes` of type `ty`, without a copy where that is possible: when no entry point writes the weight and
    /// the bytes start at a multiple of 64. Returns whether they stay where they are; otherwise the weight has a copy. Nobody may
    /// change the bytes meanwhile, see [`MappedSlice`].
    ///
    /// # Errors
    /// No such weight, another shape, element type or number of bytes than the plan declares, or memory beyond the limit.
    pub fn bind_weight(&mut self, name: &str, ty: &Type, bytes: MappedSlice) -> Result<bool, ExecError> {
        let i = self.weight_index(name)?;
        let declared = &self.plan.weights[i].ty;
        if declared != ty {
            return Err(shape("weight", name, ty.to_string(), declared.to_string()));
        }
        if bytes.len() != ty.bytes() {
            return Err(shape(
                "weight",
                name,
                format!("{} bytes", bytes.len()),
                format!("{} bytes of {ty}", ty.bytes()),
            ));
        }
        // Numbers in files are little-endian.
        let usable =
            bytes.as_ptr().addr().is_multiple_of(ALIGN) && (cfg!(target_endian = "little") || ty.dtype.size() == 1);
        let in_place = usable && !self.entries.iter().any(|e| e.writes.binary_search(&i).is_ok());
        if in_place {
            if let WeightMemory::Own(block) = &self.memory.weights[i] {
                self.bytes -= block.bytes() as u64;
            }
            self.memory.weights[i] = WeightMemory::Mapped(bytes);
            self.table.move_weight(i, self.memory.weights[i].address(declared.bytes()));
        } else {
            let size = ty.dtype.size();
            let to = self.own(i)?.slice_mut::<u8>(0, bytes.len());
            to.copy_from_slice(&bytes);
            if cfg!(target_endian = "big") {
                to.chunks_exact_mut(size).for_each(<[u8]>::reverse);
            }
        }
        self.changed(i);
        Ok(in_place)
    }

    /// The memory of a weight's own, made now if there is none.
    fn own(&mut self, i: usize) -> Result<&mut Block, ExecError> {
        if !matches!(self.memory.weights[i], WeightMemory::Own(_)) {
            let needed = self.plan.weights[i].ty.bytes() as u64;
            let allowed = self.max_bytes.saturating_sub(self.bytes);
            if needed > allowed {
                return Err(ExecError::Memory { what: WEIGHTS, needed, allowed: Some(allowed) });
            }
            let block = Block::zeroed(&mut self.regions, needed);
            let block = block.ok_or(ExecError::Memory { what: WEIGHTS, needed, allowed: None })?;
            self.bytes += needed;
            self.table.move_weight(i, block.address(0, needed as usize));
            self.memory.weights[i] = WeightMemory::Own(block);
        }
        match &mut self.memory.weights[i] {
            WeightMemory::Own(block) => Ok(block),
            WeightMemory::Unset | WeightMemory::Mapped(_) => unreachable!("the weight has just been given memory"),
        }
    }

    /// A weight has new values.
    fn changed(&mut self, i: usize) {
        self.weight_set[i] = true;
        self.stale |= self.prepare.is_some_and(|p| self.entries[p.0].reads.binary_search(&i).is_ok());
    }

    /// The elements of a weight, row-major.
    ///
    /// # Errors
    /// No such weight, another element type, or a weight that was never set.
    pub fn weight<T: Element>(&self, name: &str) -> Result<&[T], ExecError> {
        let i = self.weight_index(name)?;
        let ty = &self.plan.weights[i].ty;
        check_len("weight", name, T::DTYPE, ty.numel(), ty)?;
        self.memory.weights[i].slice(ty.numel()).ok_or_else(|| ExecError::Unset { name: name.to_owned() })
    }

    /// The elements of an `f32` or `bf16` weight as `f32`.
    ///
    /// # Errors
    /// No such weight, another element type, or a weight that was never set.
    pub fn weight_f32(&self, name: &str) -> Result<Cow<'_, [f32]>, ExecError> {
        match self.plan.weights[self.weight_index(name)?].ty.dtype {
            DType::BF16 => Ok(self.weight::<half::bf16>(name)?.iter().map(|x| x.to_f32()).collect()),
            _ => self.weight(name).map(Cow::Borrowed),
        }
    }

    /// The bytes of a weight whose elements are bytes, signed or not.
    ///
    /// # Errors
    /// No such weight, wider elements, or a weight that was never set.
    pub fn weight_bytes(&self, name: &str) -> Result<&[u8], ExecError> {
        let i = self.weight_index(name)?;
        let ty = &self.plan.weights[i].ty;
        if ty.dtype.size() != 1 {
            return Err(shape("weight", name, Type::new(DType::U8, &ty.dims).to_string(), ty.to_string()));
        }
        self.memory.weights[i].slice(ty.numel()).ok_or_else(|| ExecError::Unset { name: name.to_owned() })
    }

    /// Names of the weights that have no values yet.
    pub fn missing_weights(&self) -> Vec<&str> {
        let weights = self.plan.weights.iter().zip(&self.weight_set);
        weights.filter(|(_, set)| !**set).map(|(w, _)| w.name.as_str()).collect()
    }

    fn state_index(&self, name: &str, copy: usize) -> Result<usize, ExecError> {
        let i = find("state", name, self.plan.states.iter().map(|s| &s.name))?;
        let copies = self.plan.states[i].copies as usize;
        if copy >= copies {
            return Err(shape(
                "state",
                name,
                format!("copy {copy}"),
                format!("one of {copies} copies, counted from 0"),
            ));
        }
        Ok(i)
    }

    /// The bytes of one copy of a state.
    ///
    /// # Errors
    /// No such state or copy.
    pub fn state(&self, name: &str, copy: usize) -> Result<&[u8], ExecError> {
        let i = self.state_index(name, copy)?;
        Ok(self.memory.states[i].slice(stride(&self.plan, i) * copy, self.plan.states[i].ty.bytes()))
    }

    /// Overwrite one copy of a state.
    ///
    /// # Errors
    /// No such state or copy, or another number of bytes.
    pub fn set_state(&mut self, name: &str, copy: usize, bytes: &[u8]) -> Result<(), ExecError> {
        let i = self.state_index(name, copy)?;
        let n = self.plan.states[i].ty.bytes();
        if bytes.len() != n {
            return Err(shape(
                "state",
                name,
                format!("{} bytes", bytes.len()),
                format!("{n} bytes of {}", self.plan.states[i].ty),
            ));
        }
        let at = stride(&self.plan, i) * copy;
        self.memory.states[i].slice_mut(at, n).copy_from_slice(bytes);
        Ok(())
    }

    /// Make every state fresh: zero.
    pub fn reset_states(&mut self) {
        self.reset_states_where(&|_| true);
    }

    /// Make the states of these names fresh.
    pub fn reset_states_where(&mut self, named: &dyn Fn(&str) -> bool) {
        for (block, state) in self.memory.states.iter_mut().zip(&self.plan.states) {
            if named(&state.name) {
                let n = block.bytes();
                block.slice_mut::<u8>(0, n).fill(0);
            }
        }
    }

    /// Set an input of an entry point, for this and all later calls.
    ///
    /// # Errors
    /// No such input, or another number or type of elements than the plan declares.
    pub fn set_input<T: Element>(&mut self, entry: impl EntryKey, name: &str, values: &[T]) -> Result<(), ExecError> {
        let entry = entry.of(self)?;
        let ports = &self.plan.entries[entry.0].inputs;
        let i = find("input", name, ports.iter().map(|p| &p.0))?;
        check_len("input", name, T::DTYPE, values.len(), &self.plan.buffer(ports[i].1).ty)?;
        let input = &mut self.inputs[entry.0][i];
        input.value.slice_mut(0, values.len()).copy_from_slice(values);
        input.set = true;
        Ok(())
    }

    /// An output of an entry point, row-major, as its last run left it.
    ///
    /// # Errors
    /// No such output, another element type, or another entry point ran since.
    pub fn output<T: Element>(&self, entry: impl EntryKey, name: &str) -> Result<&[T], ExecError> {
        let entry = entry.of(self)?;
        let buffer = self.output_buffer(entry, name)?;
        let decl = self.plan.buffer(buffer);
        check_len("output", name, T::DTYPE, decl.ty.numel(), &decl.ty)?;
        let stale = || ExecError::Stale { entry: self.plan.entries[entry.0].name.clone(), name: name.to_owned() };
        if matches!(decl.place, Place::Arena(_)) && self.live != Some(entry) {
            return Err(stale());
        }
        self.memory.slice(&self.plan, buffer).ok_or_else(stale)
    }

    /// Element type and shape of an output.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn output_type(&self, entry: impl EntryKey, name: &str) -> Result<&Type, ExecError> {
        Ok(&self.plan.buffer(self.output_buffer(entry.of(self)?, name)?).ty)
    }

    fn output_buffer(&self, entry: EntryId, name: &str) -> Result<BufferId, ExecError> {
        let ports = &self.plan.entries[entry.0].outputs;
        Ok(ports[find("output", name, ports.iter().map(|p| &p.0))?].1)
    }
}
