//! Fuzz target: see [`chimera_fuzz::config`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| chimera_fuzz::config(data));
