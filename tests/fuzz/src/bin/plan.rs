//! Fuzz target: see [`chimera_fuzz::plan`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| chimera_fuzz::plan(data));
