//! Plans of single kernels, so that a kernel is run by what runs models.

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::{Result, bail};
use chimera_ir::loops::Kernel;
use chimera_ir::plan::{
    BufferDecl, BufferId, Entry, Group, KernelId, Place, Plan, StateDecl, Step, WeightDecl, WeightKind,
};
use chimera_ir::{DType, Data, Tensor, Type};
use chimera_runtime::exec::{ExecOptions, Executable};

/// An executable that several cases share.
pub type Shared = Rc<RefCell<Executable>>;

/// A plan under construction. All its entry points share the arena.
#[derive(Debug, Default)]
pub struct PlanBuilder {
    plan: Plan,
    arena: u64,
}

impl PlanBuilder {
    fn buffer(&mut self, name: &str, ty: &Type, place: Place) -> BufferId {
        self.plan.buffers.push(BufferDecl { ty: ty.clone(), place, name: name.to_owned() });
        BufferId(self.plan.buffers.len() as u32 - 1)
    }

    /// A read-only argument: a weight.
    pub fn weight(&mut self, name: &str, ty: &Type) -> BufferId {
        let index = self.plan.weights.len() as u32;
        self.plan.weights.push(WeightDecl { name: name.to_owned(), ty: ty.clone(), kind: WeightKind::Matrix });
        self.buffer(name, ty, Place::Weight(index))
    }

    /// Memory that entry points share: a state.
    pub fn state(&mut self, name: &str, ty: &Type) -> BufferId {
        let index = self.plan.states.len() as u32;
        self.plan.states.push(StateDecl { name: name.to_owned(), ty: ty.clone(), copies: 1 });
        self.buffer(name, ty, Place::State(index))
    }

    /// A result.
    pub fn result(&mut self, name: &str, ty: &Type) -> BufferId {
        let at = self.arena;
        self.arena += ty.bytes().next_multiple_of(64) as u64;
        self.buffer(name, ty, Place::Arena(at))
    }

    /// An entry point that runs a kernel several times.
    pub fn entry(
        &mut self,
        name: &str,
        kernel: &Kernel,
        args: &[BufferId],
        times: usize,
        outputs: &[(String, BufferId)],
    ) {
        self.entry_of(name, kernel, &vec![args.to_vec(); times], outputs);
    }

    /// An entry point that runs a kernel on several sets of buffers in turn.
    pub fn entry_of(&mut self, name: &str, kernel: &Kernel, calls: &[Vec<BufferId>], outputs: &[(String, BufferId)]) {
        let id = match self.plan.kernels.iter().position(|k| k == kernel) {
            Some(found) => found,
            None => {
                self.plan.kernels.push(kernel.clone());
                self.plan.kernels.len() - 1
            }
        };
        let step = |args: &Vec<BufferId>| Step::Run {
            kernel: KernelId(id as u32),
            args: args.clone(),
            split: kernel.grid > 1,
            group: 0,
        };
        self.plan.entries.push(Entry {
            name: name.to_owned(),
            outputs: outputs.to_vec(),
            steps: calls.iter().map(step).collect(),
            groups: vec![Group { name: kernel.name.clone(), ..Group::default() }],
            ..Entry::default()
        });
    }

    /// The plan, ready to run.
    ///
    /// # Errors
    /// When it cannot be executed here.
    pub fn executable(&self, options: &ExecOptions) -> Result<Executable> {
        let mut plan = self.plan.clone();
        plan.entries.iter_mut().for_each(|e| e.arena = self.arena);
        Ok(Executable::new(plan, options)?)
    }
}

/// Give a weight of any element type its value.
///
/// # Errors
/// When the plan has no such weight.
pub fn set_weight(exe: &mut Executable, name: &str, t: &Tensor) -> Result<()> {
    let dims = &t.ty.dims;
    match &t.data {
        Data::F32(v) => exe.set_weight(name, dims, v)?,
        Data::I32(v) => exe.set_weight(name, dims, v)?,
        Data::I8(v) => exe.set_weight(name, dims, v)?,
        Data::U8(v) => exe.set_weight(name, dims, v)?,
        other => bail!("no operand is {}", other.dtype().name()),
    }
    Ok(())
}

/// An output of any element type.
///
/// # Errors
/// When it is not there.
pub fn output(exe: &Executable, entry: &str, name: &str) -> Result<Data> {
    Ok(match exe.output_type(entry, name)?.dtype {
        DType::F32 => Data::F32(exe.output(entry, name)?.to_vec()),
        DType::I32 => Data::I32(exe.output(entry, name)?.to_vec()),
        DType::I8 => Data::I8(exe.output(entry, name)?.to_vec()),
        DType::U8 => Data::U8(exe.output(entry, name)?.to_vec()),
        other => bail!("no result is {}", other.name()),
    })
}
