//! The embedded corpus: this project's own documents and sources, taken in when the crate is built.
//!
//! Deterministic for a given tree, at most 600 KB, documents kept apart.

/// Written by the build script: documents separated by NUL.
static CORPUS: &str = include_str!(concat!(env!("OUT_DIR"), "/corpus.txt"));

/// The documents: Markdown files first, then library sources, each group sorted by path. Never empty.
pub fn documents() -> Vec<&'static str> {
    CORPUS.split('\0').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corpus_is_there_and_bounded() {
        let documents = documents();
        let bytes: usize = documents.iter().map(|d| d.len()).sum();
        assert!(documents.len() > 5 && bytes > 20_000 && bytes <= 600_000, "{} of {bytes}", documents.len());
        assert!(documents.iter().all(|d| !d.trim().is_empty()));
        assert!(documents.iter().any(|d| d.contains("pub fn")));
    }
}
