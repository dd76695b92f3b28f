//! `chimera-run generate`: continue a prompt.
//!
//! Invariant: stdout carries the new text and nothing else, token by token; with `--json` it carries one object at the end.

use crate::model::{Model, Source, with_entries};
use crate::options::{Failure, ModelOptions, RunOptions};
use crate::session::Interrupt;
use crate::weights::{self, WeightOptions};
use chimera_compiler::{EntryKind, EntrySpec};
use chimera_frontends::layers::Depth;
use chimera_runtime::exec::Executable;
use chimera_runtime::generate::{DECODE, Generator, PREFILL, Settings, Stop};
use chimera_runtime::text::{Sampling, StreamDecoder, Vocab};
use serde_json::json;
use std::fs;
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Continue a prompt.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    exec: RunOptions,
    #[command(flatten)]
    weights: WeightOptions,
    /// Text to continue
    #[arg(short, long, env = "CHIMERA_PROMPT", required_unless_present = "file")]
    prompt: Option<String>,
    /// File with the text to continue; - is stdin
    #[arg(short, long, env = "CHIMERA_FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Most new tokens; the configuration's number when absent
    #[arg(short = 'n', long = "predict", env = "CHIMERA_PREDICT", value_name = "N")]
    n: Option<usize>,
    /// Softness of the choice; 0 takes the most likely token
    #[arg(long, env = "CHIMERA_TEMP")]
    temp: Option<f32>,
    /// Choose among this many most likely tokens
    #[arg(long, env = "CHIMERA_TOP_K")]
    top_k: Option<usize>,
    /// Choose among the most likely tokens that together have this probability
    #[arg(long, env = "CHIMERA_TOP_P")]
    top_p: Option<f32>,
    /// Divides the scores of tokens that occurred; 1 leaves them
    #[arg(long, env = "CHIMERA_REPEAT_PENALTY")]
    repeat_penalty: Option<f32>,
    /// How many of the latest tokens count as occurred
    #[arg(long, env = "CHIMERA_REPEAT_LAST_N", default_value_t = Settings::default().penalty_window)]
    repeat_last_n: usize,
    /// Seed of the choice
    #[arg(short, long, env = "CHIMERA_SEED", default_value_t = 0)]
    seed: u64,
    /// Iterations of the looped layers; the configuration's number when absent
    #[arg(long, env = "CHIMERA_LOOPS", value_parser = clap::value_parser!(u16).range(1..))]
    loops: Option<u16>,
    /// Tokens of the prompt that are read at a time
    #[arg(long, env = "CHIMERA_CHUNK", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    chunk: u16,
    /// Print one JSON object instead of text
    #[arg(long, env = "CHIMERA_JSON")]
    json: bool,
    /// No report on stderr
    #[arg(short, long, env = "CHIMERA_QUIET")]
    quiet: bool,
}

/// Run the command.
///
/// # Errors
/// A model that cannot be opened, a prompt that cannot be read, or a failed execution.
pub fn run(args: Args) -> Result<(), Failure> {
    let model = Model::open(&args.model, None)?;
    if !args.quiet {
        model.warnings.iter().for_each(|w| eprintln!("warning: {w}"));
    }
    let vocab = model.vocab(args.model.vocab()?.as_ref())?;
    args.model.check_vocab(&vocab)?;
    let prompt = prompt(&args, &vocab)?;
    let (mut exe, unused) = executable(&args, &model)?;
    let memory = [exe.bytes(), exe.mapped_bytes()];
    let cached = exe.module().cached;
    let interrupt = Interrupt::register()?;
    let defaults = &model.config.generation;
    let settings = Settings {
        sampling: Sampling {
            temperature: args.temp.unwrap_or(defaults.temperature as f32),
            top_k: args.top_k,
            top_p: args.top_p.unwrap_or(defaults.top_p as f32),
            repetition_penalty: args.repeat_penalty.unwrap_or(defaults.repetition_penalty as f32),
        },
        penalty_window: args.repeat_last_n,
        max_tokens: args.n.unwrap_or(defaults.max_new_tokens),
        seed: args.seed,
    };
    let mut out = Output {
        out: io::stdout().lock(),
        decoder: StreamDecoder::new(&vocab),
        text: String::new(),
        tokens: vec![],
        args: &args,
        unused,
        memory,
        cached,
    };
    args.exec.trace.start(&mut exe);
    let started = Instant::now();
    let mut generator = Generator::new(&mut exe, &vocab)?;
    generator.set_penalty_window(settings.penalty_window);
    generator.feed(&prompt)?;
    let read = started.elapsed().as_secs_f64();
    let mut failed = None;
    let stop = generator.generate(&settings, &mut |id| match out.add(id) {
        Ok(()) if interrupt.requested() => ControlFlow::Break(()),
        Ok(()) => ControlFlow::Continue(()),
        Err(e) => {
            failed = Some(e);
            ControlFlow::Break(())
        }
    })?;
    let wrote = started.elapsed().as_secs_f64() - read;
    if let Some(e) = failed {
        return Err(e.into());
    }
    out.finish(prompt.len(), stop, [read, wrote])?;
    args.exec.trace.finish(&mut exe)
}

/// The prompt in tokens.
fn prompt(args: &Args, vocab: &Vocab) -> Result<Vec<u32>, Failure> {
    let tokens = match (&args.prompt, &args.file) {
        (Some(text), _) => vocab.encode(text),
        (None, Some(path)) => {
            let shown = if path == Path::new("-") { "stdin".into() } else { path.display().to_string() };
            let mut bytes = vec![];
            let read = match path == Path::new("-") {
                true => io::stdin().lock().read_to_end(&mut bytes).map(drop),
                false => fs::read(path).map(|b| bytes = b),
            };
            read.map_err(|e| Failure::new(format!("{shown}: cannot read the prompt: {e}")))?;
            let encoded = vocab.encode_bytes(&bytes);
            encoded.map_err(|e| {
                Failure::new(format!("{shown}: the prompt is not UTF-8, which vocabulary {} needs: {e}", vocab.name()))
            })?
        }
        (None, None) => vec![],
    };
    match tokens.is_empty() {
        true => Err(Failure::usage("the prompt is empty; give --prompt TEXT or a file with text")),
        false => Ok(tokens),
    }
}

/// The compiled model with its weights, and the tensors of the weight file that it does not read.
fn executable(args: &Args, model: &Model) -> Result<(Executable, Vec<String>), Failure> {
    if args.loops.is_some() && model.config.looping.is_none() {
        return Err(Failure::usage("--loops has no meaning for a model without looped layers"));
    }
    let depth = args.loops.map(|n| Depth::Fixed(n.into()));
    let spec = |kind, tokens| EntrySpec { kind, rows: 1, tokens, depth };
    let entries = vec![spec(EntryKind::Prefill, args.chunk.into()), spec(EntryKind::Decode, 1)];
    let file = weights::open(&args.weights, model)?;
    let packed = weights::packed(&file, &model.config)?;
    let plan = match (&model.source, depth) {
        (Source::Plan(_), Some(_)) => {
            return Err(Failure::usage("--loops is built into a compiled plan; name the configuration instead"));
        }
        // A plan may do without prefill.
        (Source::Plan(plan), None) => with_entries(plan, &[PREFILL, DECODE]),
        _ => model.plan(entries, packed, &args.exec)?,
    };
    let mut exe = Executable::new(plan, &args.exec.exec())?;
    let unused = weights::load(&file, &model.config, &mut exe, args.quiet)?;
    Ok((exe, unused))
}

/// New tokens on their way to stdout.
struct Output<'a> {
    out: io::StdoutLock<'a>,
    decoder: StreamDecoder,
    /// Everything so far, for `--json`.
    text: String,
    tokens: Vec<u32>,
    args: &'a Args,
    /// Tensors of the weight file that nothing reads, for `--json`.
    unused: Vec<String>,
    /// Bytes allocated, and bytes of weights that stay in their file.
    memory: [u64; 2],
    /// Whether the machine code was that of an earlier run, for `--json`.
    cached: bool,
}

impl Output<'_> {
    fn add(&mut self, id: u32) -> io::Result<()> {
        let text = self.decoder.push(id);
        if self.args.json {
            self.tokens.push(id);
        }
        self.text(&text)
    }

    fn text(&mut self, text: &str) -> io::Result<()> {
        if self.args.json {
            self.text.push_str(text);
            return Ok(());
        }
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    fn finish(mut self, prompt: usize, stop: Stop, seconds: [f64; 2]) -> io::Result<()> {
        let rest = self.decoder.flush();
        self.text(&rest)?;
        let [read, wrote] = seconds;
        if self.args.json {
            let result = json!({
                "text": self.text,
                "tokens": self.tokens,
                "stop": stop.name(),
                "prompt_tokens": prompt,
                "seed": self.args.seed,
                "prefill_seconds": read,
                "decode_seconds": wrote,
                "allocated_bytes": self.memory[0],
                "mapped_bytes": self.memory[1],
                "cached_code": self.cached,
                "unused_weights": self.unused,
            });
            return writeln!(self.out, "{result}");
        }
        writeln!(self.out)?;
        if !self.args.quiet {
            let [allocated, mapped] = self.memory.map(|bytes| bytes >> 20);
            eprintln!(
                "{prompt} tokens read in {read:.2} s, stopped after {wrote:.2} s by {}; {allocated} MB allocated, {mapped} MB of weights mapped",
                stop.name()
            );
        }
        Ok(())
    }
}
