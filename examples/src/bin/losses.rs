//! Compile a preset, give it initial weights, and measure its loss on a sentence of bytes.
//!
//! `cargo run --release -p chimera-examples --bin losses`

use anyhow::Result;
use chimera_compiler::{EntryKind, EntrySpec, Options, compile};
use chimera_frontends::config::{Overrides, Scale, preset};
use chimera_runtime::{
    exec::{ExecOptions, Executable},
    train::init,
};

fn main() -> Result<()> {
    let text = b"A plan is data, never machine code.";
    let tokens: Vec<i32> = text[..text.len() - 1].iter().map(|&b| b.into()).collect();
    let labels: Vec<i32> = text[1..].iter().map(|&b| b.into()).collect();

    let model = preset(Scale::Pico, &Overrides::default())?.model;
    let entry = EntrySpec { kind: EntryKind::Loss, rows: 1, tokens: tokens.len(), depth: None };
    let plan = compile(&model, &Options { entries: vec![entry], ..Options::default() })?;
    let mut exec = Executable::new(plan, &ExecOptions::default())?;
    init::initialise(&mut exec, 0)?;

    exec.set_input("loss", "tokens", &tokens)?;
    exec.set_input("loss", "labels", &labels)?;
    exec.set_input("loss", "seg", &vec![0; tokens.len()])?;
    exec.run("loss")?;
    let nats = exec.output::<f32>("loss", "loss")?[0];
    #[allow(clippy::print_stdout, reason = "the result of the program")]
    {
        println!("untrained: {:.3} bits a byte; a coin for each bit would give 8", nats / std::f32::consts::LN_2);
    }
    Ok(())
}
