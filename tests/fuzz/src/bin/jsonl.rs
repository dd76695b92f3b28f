//! Fuzz target: see [`chimera_fuzz::jsonl`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| chimera_fuzz::jsonl(data));
