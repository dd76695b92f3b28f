//! What the operating system says about the machine and this process.
//!
//! Where it says nothing, figures are absent and nothing fails.

use std::fs;

/// The name of the processor.
pub fn cpu_name() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |key: &str| text.lines().find_map(|l| Some(l.strip_prefix(key)?.split_once(':')?.1.trim().to_owned()));
    value("model name").or_else(|| value("Model")).unwrap_or_else(|| format!("unknown {}", std::env::consts::ARCH))
}

/// Bytes that caches do not hold: more than the last level, at least 512 MB, at most half of the free memory.
pub fn beyond_caches() -> u64 {
    let cache = last_level_cache().unwrap_or(0);
    (cache + cache / 4).max(512 << 20).min(available().map_or(u64::MAX, |m| m / 2))
}

/// Bytes of the last-level cache.
fn last_level_cache() -> Option<u64> {
    let size = |i: u32| {
        let text = fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{i}/size")).ok()?;
        text.trim().strip_suffix('K')?.parse::<u64>().ok().map(|k| k << 10)
    };
    (0..8).filter_map(size).max()
}

/// Bytes of memory that a line of a file of the process or the system gives in kB.
fn kilobytes(file: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|k| k << 10)
}

/// Resident bytes of this process.
pub fn resident() -> Option<u64> {
    kilobytes("/proc/self/status", "VmRSS")
}

/// Bytes that may be allocated without swapping.
fn available() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemAvailable")
}
