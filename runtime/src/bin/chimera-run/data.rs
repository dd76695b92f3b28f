//! Options that say what data there are, and what is shown while they are encoded.
//!
//! Invariant: options that are not given leave those of a resumed run as they are.

use crate::hyper::Hyper;
use crate::options::user_cache;
use chimera_runtime::text::{Cache, Cached, DataSpec, Reading, TokenSource, Vocab};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;

/// Data and how they are read.
#[derive(clap::Args, Clone, Debug)]
pub struct DataArgs {
    /// Text files (a document each), .jsonl files (a document a line) and folders of them, plain or packed with gzip or zstd; with
    /// =WEIGHT, drawn so many times as often
    #[arg(long, num_args = 1.., value_name = "PATH[=WEIGHT]", env = "CHIMERA_DATA", value_delimiter = ';')]
    pub data: Vec<DataSpec>,
    /// Read every file as lines of JSON and take this field: a string or a list of chat messages, `a.b` inside of `a` [default for
    /// .jsonl: text, or else messages]
    #[arg(long, value_name = "NAME", env = "CHIMERA_FIELD")]
    pub field: Option<String>,
    /// Take files with zero bytes, which are refused as binary otherwise
    #[arg(long, env = "CHIMERA_BINARY")]
    pub binary: bool,
    /// Keep tokens in this folder and use them again while data and vocabulary are the same [default: `chimera` in the user's folder
    /// of caches, for data of 4 MB and more]
    #[arg(long, value_name = "DIR|off", env = "CHIMERA_CACHE")]
    pub cache: Option<PathBuf>,
}

impl DataArgs {
    /// How files are read.
    pub fn reading(&self) -> Reading {
        Reading { field: self.field.clone(), binary: self.binary }
    }

    /// Where tokens are kept.
    pub fn cache(&self) -> Cache {
        match &self.cache {
            Some(off) if off.as_os_str() == "off" => Cache::Off,
            Some(path) => Cache::Folder(path.clone()),
            None => user_cache().map_or(Cache::Off, Cache::Automatic),
        }
    }

    /// Puts what was given over the options of a run.
    pub fn overlay(&self, hyper: &mut Hyper) {
        if !self.data.is_empty() {
            let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
            hyper.data = self.data.iter().map(|d| DataSpec { path: absolute(&d.path), weight: d.weight }).collect();
        }
        if self.field.is_some() {
            hyper.field.clone_from(&self.field);
        }
        hyper.binary |= self.binary;
    }
}

/// Shows how far the encoding of data is, on a terminal.
pub struct Encoding {
    bar: ProgressBar,
    quiet: bool,
}

impl Encoding {
    /// Nothing is shown when `quiet`.
    pub fn new(quiet: bool) -> Encoding {
        let style =
            ProgressStyle::with_template("reading data {bytes}/{total_bytes} {bar:30} {bytes_per_sec} eta {eta}");
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::no_length() };
        Encoding { bar: bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())), quiet }
    }

    /// What hears of progress.
    pub fn hear(&self) -> impl FnMut(u64, u64) + '_ {
        |done, total| {
            self.bar.set_length(total);
            self.bar.set_position(done);
        }
    }

    /// Ends the progress line, and says what the tokens mean and where they are kept.
    pub fn finish(&self, vocab: &Vocab, sources: &[TokenSource]) {
        self.bar.finish_and_clear();
        if self.quiet {
            return;
        }
        vocab.meaning().iter().for_each(|meaning| eprintln!("{meaning}"));
        for source in sources {
            let (tokens, documents) = (source.tokens.len(), source.tokens.documents());
            match &source.cached {
                None => {}
                Some((path, Cached::Reused)) => {
                    eprintln!(
                        "{}: {tokens} tokens of {documents} documents are those in {}",
                        source.name,
                        path.display()
                    );
                }
                Some((path, Cached::Written)) => {
                    eprintln!(
                        "{}: {tokens} tokens of {documents} documents are kept in {}",
                        source.name,
                        path.display()
                    );
                }
            }
        }
    }
}
