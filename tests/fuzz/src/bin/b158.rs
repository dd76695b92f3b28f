//! Fuzz target: see [`chimera_fuzz::b158`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| chimera_fuzz::b158(data));
