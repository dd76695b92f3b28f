//! What a run trains and measures on.
//!
//! Invariant: what identifies the data depends on all that decides the rows of a step, the seed and the length of a row apart.

use super::{Phase, reference};
use crate::hyper::Hyper;
use crate::options::Failure;
use crate::session::measured_rows;
use chimera_runtime::text::{
    self, Answers, Batches, Cache, Feed, HeldOut, LongText, Pairs, Reading, Segments, Split, Taken, TokenSource,
    TokenStream, Vocab,
};
use chimera_runtime::train::Trainer;
use chimera_runtime::train::standing::Standing;
use std::path::Path;

/// Rows of a phase.
#[derive(Debug)]
pub enum Course {
    /// Text.
    Text {
        /// To train on.
        train: Batches,
        /// To measure on.
        held: TokenStream,
        /// What identifies the data.
        data: String,
    },
    /// Long text.
    Long {
        /// To train on.
        train: Segments,
        /// To measure on.
        held: LongText,
        /// What identifies the data.
        data: String,
    },
    /// Conversations.
    Answers {
        /// To train on.
        train: Answers,
        /// To measure on.
        held: Answers,
    },
    /// Preferences.
    Pairs {
        /// To train on.
        train: Pairs,
        /// To measure on.
        held: Pairs,
    },
}

impl Course {
    /// The rows of a run; `tokens` are those of a phase on text.
    ///
    /// # Errors
    /// Data that cannot be read or are too short.
    pub fn of(hyper: &Hyper, vocab: &Vocab, tokens: &[TokenSource]) -> Result<Course, Failure> {
        let (seq, fraction, seed) = (hyper.seq_len as usize, hyper.val_fraction, hyper.seed);
        Ok(match &hyper.phase {
            Phase::Pretrain => {
                let data = fingerprint(tokens);
                let Split { train, validation } = text::split(tokens, fraction, vocab.end_of_document())?;
                Course::Text { train: hyper.paradigms.batches(train, hyper)?, held: validation, data }
            }
            Phase::CtxExtend { stages } => {
                let data = fingerprint(tokens);
                let Split { train, validation } = text::split(tokens, fraction, vocab.end_of_document())?;
                let longest = stages.last().map_or(seq, |s| s.tokens);
                let held = LongText::new(validation, longest, measured_rows(hyper));
                Course::Long { train: Segments::new(&train, stages, seed)?, held, data }
            }
            Phase::Sft => {
                let (train, held) = text::answers(vocab, &hyper.data, hyper.field.as_deref(), seq, fraction, seed)?;
                Course::Answers { train, held }
            }
            Phase::Dpo { .. } => {
                let (train, held) = text::pairs(vocab, &hyper.data, seq, fraction, seed)?;
                Course::Pairs { train, held }
            }
        })
    }

    /// The rows of a run, read again for steps behind a checkpoint.
    ///
    /// # Errors
    /// Data that are gone or others.
    pub fn again(standing: &Standing, hyper: &Hyper, trainer: &mut Trainer) -> Result<Course, Failure> {
        let vocab = Vocab::from_text(&standing.meta.vocab)?;
        let reading = Reading { field: hyper.field.clone(), binary: hyper.binary };
        let tokens = match hyper.phase.reads_text() {
            true => text::tokenise(&vocab, &hyper.data, &reading, &Cache::Off, &mut |_, _| {})?,
            false => vec![],
        };
        let mut course = Course::of(hyper, &vocab, &tokens)?;
        let found = course.data();
        if found != standing.meta.data {
            return Err(Failure::new(format!(
                "{}: the steps behind this checkpoint need the data of the run ({}), found {found} in its files; restore them, or name the step of a checkpoint",
                standing.file.path().display(),
                standing.meta.data
            )));
        }
        let folder = standing.file.path().parent().unwrap_or(Path::new("."));
        reference::Place { hyper, folder }.resume(&mut course, trainer)?;
        Ok(course)
    }

    /// Rows to train on.
    pub fn feed(&self) -> &dyn Feed {
        match self {
            Course::Text { train, .. } => train,
            Course::Long { train, .. } => train,
            Course::Answers { train, .. } => train,
            Course::Pairs { train, .. } => train,
        }
    }

    /// Rows to measure on.
    pub fn held(&self) -> &dyn HeldOut {
        match self {
            Course::Text { held, .. } => held,
            Course::Long { held, .. } => held,
            Course::Answers { held, .. } => held,
            Course::Pairs { held, .. } => held,
        }
    }

    /// Rows of a pass over the data, where a phase counts passes.
    pub fn rows(&self) -> Option<usize> {
        match self {
            Course::Text { .. } | Course::Long { .. } => None,
            Course::Answers { train, .. } => Some(train.rows()),
            Course::Pairs { train, .. } => Some(2 * train.len()),
        }
    }

    /// What identifies the data.
    pub fn data(&self) -> String {
        match self {
            Course::Text { data, .. } | Course::Long { data, .. } => data.clone(),
            Course::Answers { train, held } => {
                let n = train.taken().examples + held.taken().examples;
                format!("{n} conversations, crc32c {:08x}", train.checksum())
            }
            Course::Pairs { train, held } => {
                format!("{} preferences, crc32c {:08x}", train.len() + held.len(), train.checksum())
            }
        }
    }

    /// How much there is, in words.
    pub fn describe(&self, vocab: &Vocab) -> String {
        match self {
            Course::Text { train, held, .. } => {
                let unigram = text::unigram_bits_per_byte(vocab, train.tokens())
                    .map_or(String::new(), |b| format!(", unigram entropy {b:.3} bits/byte"));
                format!("{} training and {} held-out tokens{unigram}", train.len(), held.len())
            }
            Course::Long { train, held, .. } => {
                format!("{} training and {} held-out tokens in long sequences", train.tokens(), held.tokens())
            }
            Course::Answers { train, held } => {
                let (a, b) = (train.taken(), held.taken());
                format!(
                    "{} training and {} held-out conversations in {} and {} rows, {} tokens of answers to learn{}",
                    a.examples,
                    b.examples,
                    train.rows(),
                    held.rows(),
                    a.counted,
                    lost(a, b, "conversations")
                )
            }
            Course::Pairs { train, held } => {
                let (a, b) = (train.taken(), held.taken());
                format!("{} training and {} held-out pairs of answers{}", a.examples, b.examples, lost(a, b, "pairs"))
            }
        }
    }
}

/// What did not fit into rows, if anything.
fn lost(a: Taken, b: Taken, what: &str) -> String {
    let mut out = String::new();
    if a.cut + b.cut > 0 {
        out += &format!("; {} {what} are longer than a row and cut at its end", a.cut + b.cut);
    }
    if a.skipped + b.skipped > 0 {
        out += &format!("; {} {what} are left out, no answer begins within a row", a.skipped + b.skipped);
    }
    out
}

/// What identifies text: number and checksum of all tokens, and how often they are drawn.
fn fingerprint(tokens: &[TokenSource]) -> String {
    let count: usize = tokens.iter().map(|s| s.tokens.len()).sum();
    let sum = tokens.iter().fold(0, |sum, source| {
        let sum = crc32c::crc32c_append(sum, &source.tokens.checksum().to_le_bytes());
        crc32c::crc32c_append(sum, &source.weight.to_le_bytes())
    });
    format!("{count} tokens, crc32c {sum:08x}")
}
