//! Fuzz target: see [`chimera_fuzz::vocab`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| chimera_fuzz::vocab(data));
