//! Fuzz target: see [`chimera_fuzz::zstd`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| chimera_fuzz::zstd(data));
