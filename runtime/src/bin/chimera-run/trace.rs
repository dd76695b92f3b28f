//! `--trace`: what ran when, as a file for trace viewers, and what each kernel took, as a table.
//!
//! Invariant: nothing is timed unless it was asked for.

use crate::options::Failure;
use chimera_runtime::exec::Executable;
use chimera_runtime::files::atomic::write_atomic;
use std::path::PathBuf;

/// What to record.
#[derive(clap::Args, Clone, Debug)]
pub struct TraceOptions {
    /// Write a trace for Chrome or Perfetto: one span for each plan step and thread; a table of all kernels goes to stderr
    #[arg(long, env = "CHIMERA_TRACE", value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Most plan steps of the trace; it has whole calls from the first one on
    #[arg(long, env = "CHIMERA_TRACE_STEPS", value_name = "N", default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub trace_steps: u32,
}

impl TraceOptions {
    /// Begin to record, if that was asked for.
    pub fn start(&self, exe: &mut Executable) {
        if self.trace.is_some() {
            exe.start_trace(self.trace_steps as usize);
        }
    }

    /// Write what was recorded.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(&self, exe: &mut Executable) -> Result<(), Failure> {
        let (Some(path), Some(trace)) = (&self.trace, exe.end_trace()) else { return Ok(()) };
        write_atomic(path, |out| trace.write(exe.plan(), out))?;
        let (recorded, left_out) = trace.calls();
        let rest = match left_out {
            0 => String::new(),
            n => format!(
                "; {n} calls behind them are in the table only, for more give --trace-steps above {}",
                self.trace_steps
            ),
        };
        eprintln!("{}{recorded} calls traced in {}{rest}", trace.roofline(exe.plan()), path.display());
        Ok(())
    }
}
