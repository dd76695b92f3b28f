//! Fuzz target: see [`chimera_fuzz::safetensors`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| chimera_fuzz::safetensors(data));
