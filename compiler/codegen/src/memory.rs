//! Executable memory: the only place where bytes become code.
//!
//! No page is ever writable and executable at once: everything is written first, then the pages change to read and execute.

use std::fmt;

use cranelift_codegen::isa::TargetIsa;
use cranelift_jit::{JITBuilder, JITModule};
use cranelift_module::{FuncId, Linkage, Module, ModuleError, default_libcall_names};

/// Finished code of several functions, freed on drop.
pub(crate) struct CodeMemory {
    module: Option<JITModule>,
    entries: Vec<*const u8>,
}

// SAFETY: after `place` nothing writes to the pages or to the fields; only `drop` takes the module, with exclusive access.
unsafe impl Send for CodeMemory {}
// SAFETY: as above; shared access only reads `entries`.
unsafe impl Sync for CodeMemory {}

impl CodeMemory {
    /// Place functions at multiples of 64 and make them executable.
    pub(crate) fn place(isa: std::sync::Arc<dyn TargetIsa>, functions: &[&[u8]]) -> Result<CodeMemory, String> {
        let mut module = JITModule::new(JITBuilder::with_isa(isa, default_libcall_names()));
        let signature = module.make_signature();
        let text = |e: ModuleError| e.to_string();
        let define = |(n, bytes): (usize, &&[u8])| -> Result<FuncId, String> {
            let name = format!("kernel{n}");
            let id = module.declare_function(&name, Linkage::Local, &signature).map_err(text)?;
            module.define_function_bytes(id, 64, bytes, &[]).map_err(text)?;
            Ok(id)
        };
        let ids: Result<Vec<FuncId>, String> = functions.iter().enumerate().map(define).collect();
        let finished = ids.and_then(|ids| module.finalize_definitions().map(|()| ids).map_err(text));
        let mut memory = CodeMemory { module: Some(module), entries: vec![] };
        let ids = finished?;
        if let Some(module) = &memory.module {
            memory.entries = ids.into_iter().map(|id| module.get_finalized_function(id)).collect();
        }
        Ok(memory)
    }

    /// The address of a function, valid as long as this memory lives.
    pub(crate) fn entry(&self, n: usize) -> *const u8 {
        self.entries[n]
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        if let Some(module) = self.module.take() {
            // SAFETY: every `Entry` that could run this code holds a reference to this memory, so none is left.
            unsafe { module.free_memory() }
        }
    }
}

impl fmt::Debug for CodeMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CodeMemory({} functions)", self.entries.len())
    }
}
