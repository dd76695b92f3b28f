//! Where the time of one probed forward pass goes, kernel by kernel.
//!
//! `cargo run --release -p chimera-examples --bin profile -- [SCALE] [ROWS] [TOKENS] [THREADS]`

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, anyhow};
use chimera_compiler::{EntryKind, EntrySpec, Options, Scheme, UpdateRule, compile};
use chimera_frontends::config::{Overrides, Scale, preset};
use chimera_ir::plan::Step;
use chimera_runtime::{
    exec::{ExecOptions, Executable},
    train::init,
};

#[allow(clippy::print_stdout, reason = "the result of the program")]
fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: usize| args.get(i).map_or(Ok(default), |a| a.parse().context("a number"));
    let scale: Scale = args.first().map_or("pico", |s| s).parse().map_err(|_| anyhow!("no such scale"))?;
    let (rows, tokens, threads) = (number(1, 64)?, number(2, 32)?, number(3, 1)?);

    let model = preset(scale, &Overrides::default())?.model;
    let scheme = Scheme::PerSequence { rank: 1, kappa: 0.1, sigma_vec: 0.01 };
    let spec = |kind| EntrySpec { kind, rows, tokens, depth: None };
    let entries =
        vec![spec(EntryKind::DualLoss(scheme.clone())), spec(EntryKind::Update(scheme, UpdateRule::default()))];
    let plan = compile(&model, &Options { entries, ..Options::default() })?;
    let mut exec = Executable::new(plan, &ExecOptions { threads, ..ExecOptions::default() })?;
    init::initialise(&mut exec, 0)?;

    let ids: Vec<i32> = (0..rows * tokens).map(|i| (i * 31 % model.vocab_size) as i32).collect();
    for name in ["tokens", "labels"] {
        exec.set_input("dual_loss", name, &ids)?;
    }
    exec.set_input("dual_loss", "seg", &vec![0; rows * tokens])?;
    exec.set_input("update", "c", &vec![0.5f32; rows])?;
    exec.set_input("update", "lr", &[1e-3f32])?;
    for entry in ["prepare", "dual_loss", "update"] {
        if entry != "prepare" {
            exec.set_input(entry, "seed", &[1, 0])?;
            exec.set_input(entry, "step", &[0])?;
        }
        exec.run(entry)?;
        let times = exec.run_traced(entry)?;
        let mut by_kernel: BTreeMap<String, (Duration, u32)> = BTreeMap::new();
        let mut total = Duration::ZERO;
        for t in &times {
            let name = match &exec.plan().entry(entry).expect("it ran").steps[t.step] {
                Step::Run { kernel, .. } => exec.plan().kernels[kernel.0 as usize].name.clone(),
                Step::Copy { .. } => "copy".to_owned(),
                Step::LoopBegin { .. } | Step::LoopEnd { .. } => "loop".to_owned(),
            };
            let slot = by_kernel.entry(name).or_default();
            *slot = (slot.0 + t.time, slot.1 + 1);
            total += t.time;
        }
        let mut rows: Vec<_> = by_kernel.into_iter().collect();
        rows.sort_by_key(|r| std::cmp::Reverse(r.1.0));
        println!("{entry}: {total:.1?}");
        for (name, (time, n)) in rows.iter().take(16) {
            println!("  {:5.1} %  {time:>10.1?}  {n:4} x  {name}", 100.0 * time.as_secs_f64() / total.as_secs_f64());
        }
    }
    Ok(())
}
