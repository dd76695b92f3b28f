//! Fuzz target: see [`chimera_fuzz::preferences`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| chimera_fuzz::preferences(data));
