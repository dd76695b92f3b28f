//! Fuzz target: see [`chimera_fuzz::npy`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| chimera_fuzz::npy(data));
