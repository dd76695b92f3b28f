//! Generation: a prompt in, one token after another out.
//!
//! Memory does not grow with the text: what earlier tokens left behind is in the states of the executable, and the window of the
//! repetition penalty is bounded. The token at a position depends on plan, weights, prompt, settings and seed only.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::ops::ControlFlow;

use crate::exec::{EntryId, ExecError, Executable};
use crate::rng;
use crate::text::{SampleError, Sampler, Sampling, Vocab};
use chimera_ir::plan::OWN;

/// The entry point that takes one token and returns `logits`.
pub const DECODE: &str = "decode";
/// The entry point that takes a chunk of tokens; a plan without it reads prompts by [`DECODE`].
pub const PREFILL: &str = "prefill";
/// The stream of uniform numbers that tokens are drawn with, indexed by position.
const SAMPLE_STREAM: &str = "@sample";

/// How to continue a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// How to draw tokens.
    pub sampling: Sampling,
    /// The repetition penalty looks at this many latest tokens, the prompt included.
    pub penalty_window: usize,
    /// Most new tokens.
    pub max_tokens: usize,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { sampling: Sampling::default(), penalty_window: 1024, max_tokens: 256, seed: 0 }
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model ended the document.
    EndOfDocument,
    /// The number of tokens that was asked for.
    Length,
    /// The caller had enough.
    Asked,
}

impl Stop {
    /// A word for output.
    pub fn name(self) -> &'static str {
        match self {
            Stop::EndOfDocument => "end-of-document",
            Stop::Length => "length",
            Stop::Asked => "asked",
        }
    }
}

/// Why nothing could be generated.
#[derive(Debug)]
pub enum GenerateError {
    /// Execution failed.
    Exec(ExecError),
    /// No token could be drawn, or a setting is out of range.
    Sample(SampleError),
    /// The plan is not one for generation.
    Plan {
        /// What was found and what was expected.
        reason: String,
    },
    /// A token that the model does not have.
    Token {
        /// The token.
        id: u32,
        /// Size of the vocabulary.
        size: usize,
    },
    /// There is nothing to continue.
    EmptyPrompt,
}

impl fmt::Display for GenerateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GenerateError::Exec(e) => e.fmt(f),
            GenerateError::Sample(e) => e.fmt(f),
            GenerateError::Plan { reason } => {
                write!(f, "the plan cannot generate text: {reason}; compile it with decode and prefill for one row")
            }
            GenerateError::Token { id, size } => write!(f, "token {id} is outside the vocabulary of {size} tokens"),
            GenerateError::EmptyPrompt => write!(f, "the prompt is empty, expected at least one token to continue"),
        }
    }
}

impl std::error::Error for GenerateError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            GenerateError::Exec(e) => Some(e),
            GenerateError::Sample(e) => Some(e),
            _ => None,
        }
    }
}

impl From<ExecError> for GenerateError {
    fn from(e: ExecError) -> GenerateError {
        GenerateError::Exec(e)
    }
}

impl From<SampleError> for GenerateError {
    fn from(e: SampleError) -> GenerateError {
        GenerateError::Sample(e)
    }
}

/// One text over an executable with the entry points [`DECODE`] and, optionally, [`PREFILL`], each for one row.
#[derive(Debug)]
pub struct Generator<'a> {
    exe: &'a mut Executable,
    decode: EntryId,
    /// Entry point and chunk length.
    prefill: Option<(EntryId, usize)>,
    vocab: Vocab,
    /// Logits of the next token, tokens without a meaning masked; empty before the first token.
    logits: Vec<f32>,
    /// Tokens so far.
    position: u64,
    /// The latest tokens, for the repetition penalty.
    recent: VecDeque<u32>,
    window: usize,
    /// One chunk of input.
    chunk: Vec<i32>,
}

/// Make the states of generating fresh; those of a training entry point are its own.
fn fresh(exe: &mut Executable) {
    exe.reset_states_where(&|name| !name.contains(OWN));
}

impl<'a> Generator<'a> {
    /// Begin an empty text with fresh states.
    ///
    /// # Errors
    /// When the plan has no `decode` for one row and one token, or a smaller vocabulary than `vocab`.
    pub fn new(exe: &'a mut Executable, vocab: &Vocab) -> Result<Generator<'a>, GenerateError> {
        let bad = |reason: String| Err(GenerateError::Plan { reason });
        let decode = exe.entry(DECODE)?;
        if chunk_length(exe, DECODE) != Some(1) {
            return bad("`decode` does not take one row of one token".into());
        }
        let size = exe.output_type(decode, "logits")?.numel();
        if vocab.size() > size {
            return bad(format!("it has {size} logits, the vocabulary {} tokens", vocab.size()));
        }
        let prefill = match exe.plan().entry(PREFILL) {
            None => None,
            Some(_) => match chunk_length(exe, PREFILL) {
                Some(tokens) => Some((exe.entry(PREFILL)?, tokens)),
                None => return bad("`prefill` does not take one row".into()),
            },
        };
        let longest = prefill.map_or(1, |p| p.1);
        for (entry, tokens) in [(decode, 1)].into_iter().chain(prefill) {
            exe.set_input(entry, "seg", &vec![0i32; tokens])?;
        }
        fresh(exe);
        Ok(Generator {
            exe,
            decode,
            prefill,
            vocab: vocab.clone(),
            logits: Vec::with_capacity(size),
            position: 0,
            recent: VecDeque::new(),
            window: Settings::default().penalty_window,
            chunk: Vec::with_capacity(longest),
        })
    }

    /// Forget the text.
    pub fn reset(&mut self) {
        fresh(self.exe);
        self.logits.clear();
        self.recent.clear();
        self.position = 0;
    }

    /// The number of tokens so far, given or drawn.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The logits of the next token `[vocabulary]`, masked tokens at minus infinity; empty before the first token.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// How many of the latest tokens are remembered for the repetition penalty.
    pub fn set_penalty_window(&mut self, window: usize) {
        self.window = window;
        self.recent.drain(..self.recent.len().saturating_sub(window));
    }

    /// Append given tokens: whole chunks by `prefill`, what remains, and the last token in any case, by `decode`.
    ///
    /// # Errors
    /// A token outside the vocabulary; then nothing was appended.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<(), GenerateError> {
        let size = self.vocab.size();
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= size) {
            return Err(GenerateError::Token { id, size });
        }
        let mut rest = tokens;
        if let Some((prefill, length)) = self.prefill {
            while rest.len() > length {
                let (chunk, after) = rest.split_at(length);
                self.run(prefill, chunk)?;
                rest = after;
            }
        }
        rest.iter().try_for_each(|id| self.run(self.decode, std::slice::from_ref(id)))?;
        if !tokens.is_empty() {
            self.logits.clear();
            self.logits.extend_from_slice(self.exe.output(self.decode, "logits")?);
            self.vocab.mask_unassigned(&mut self.logits);
            self.logits[size..].fill(f32::NEG_INFINITY);
        }
        Ok(())
    }

    fn run(&mut self, entry: EntryId, tokens: &[u32]) -> Result<(), GenerateError> {
        self.chunk.clear();
        self.chunk.extend(tokens.iter().map(|&id| id as i32));
        self.exe.set_input(entry, "tokens", &self.chunk)?;
        self.exe.run(entry)?;
        self.position += tokens.len() as u64;
        for &id in &tokens[tokens.len().saturating_sub(self.window)..] {
            if self.recent.len() == self.window {
                self.recent.pop_front();
            }
            self.recent.push_back(id);
        }
        Ok(())
    }

    /// Draw the next token without appending it.
    ///
    /// # Errors
    /// Before the first token, or when the logits are not numbers.
    pub fn draw(&mut self, sampler: &mut Sampler, seed: u64) -> Result<u32, GenerateError> {
        if self.logits.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        let uniform = rng::Stream::new(SAMPLE_STREAM, 0, 0, seed).uniform(self.position);
        Ok(sampler.draw(&self.logits, self.recent.make_contiguous(), uniform)?)
    }

    /// Continue the text: every new token but the end of the document goes to `sink`, which may stop the generation.
    ///
    /// # Errors
    /// Before the first token, for settings out of range, or when the logits are not numbers.
    pub fn generate(
        &mut self,
        settings: &Settings,
        sink: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Stop, GenerateError> {
        let mut sampler = Sampler::new(settings.sampling)?;
        self.set_penalty_window(settings.penalty_window);
        for _ in 0..settings.max_tokens {
            let id = self.draw(&mut sampler, settings.seed)?;
            if id == self.vocab.end_of_document() {
                return Ok(Stop::EndOfDocument);
            }
            if sink(id).is_break() {
                return Ok(Stop::Asked);
            }
            self.feed(&[id])?;
        }
        Ok(Stop::Length)
    }
}

/// Tokens of a call of an entry point for one row.
fn chunk_length(exe: &Executable, entry: &str) -> Option<usize> {
    let plan = exe.plan();
    let inputs = &plan.entry(entry)?.inputs;
    let buffer = inputs.iter().find(|(name, _)| name == "tokens")?.1;
    match plan.buffer(buffer).ty.dims[..] {
        [1, tokens] => Some(tokens),
        _ => None,
    }
}
