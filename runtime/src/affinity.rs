//! How many threads this process may keep busy: CPU affinity, control-group quota and the machine's CPU count.
//!
//! Invariant: files of the kernel are read defensively; what cannot be read or understood sets no limit.

use std::io::Read;
use std::path::{Path, PathBuf};

/// Longest kernel file that is read.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// The number of threads that can run at the same time, at least 1: the smallest of the CPUs in the affinity mask, the
/// CPU quota of the control groups (rounded up) and the parallelism that the standard library reports.
pub fn available_threads() -> usize {
    let std = std::thread::available_parallelism().map_or(1, usize::from);
    let quota = cgroup_quota(read_text);
    [affinity_count(), quota].into_iter().flatten().fold(std, usize::min).max(1)
}

fn affinity_count() -> Option<usize> {
    Some(cores().len()).filter(|&count| count > 0)
}

/// The cores that this thread may run on, ascending; none where the system does not say.
#[cfg(target_os = "linux")]
pub(crate) fn cores() -> Vec<usize> {
    let set = rustix::thread::sched_getaffinity(None);
    set.map_or(vec![], |set| (0..rustix::thread::CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect())
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn cores() -> Vec<usize> {
    vec![]
}

/// Keeps this thread on a core, where the system has such a call.
pub(crate) fn stay_on(core: usize) {
    #[cfg(target_os = "linux")]
    {
        let mut set = rustix::thread::CpuSet::new();
        set.set(core);
        // A refusal leaves the thread where it may run already, which is slower at worst.
        let _ = rustix::thread::sched_setaffinity(None, &set);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = core;
}

fn read_text(path: &Path) -> Option<String> {
    let mut text = String::new();
    std::fs::File::open(path).ok()?.take(MAX_FILE_BYTES).read_to_string(&mut text).ok()?;
    Some(text)
}

/// CPU quota in whole CPUs, rounded up, over the process's control groups and all their ancestors; versions 1 and 2.
/// `read` returns the text of a file, or nothing where there is none.
fn cgroup_quota(read: impl Fn(&Path) -> Option<String>) -> Option<usize> {
    let groups = read(Path::new("/proc/self/cgroup"))?;
    let mut quota: Option<usize> = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let unified = id == "0" && controllers.is_empty();
        if !unified && !controllers.split(',').any(|controller| controller == "cpu") {
            continue;
        }
        for folder in ancestors(path) {
            let found = if unified { unified_quota(&read, &folder) } else { legacy_quota(&read, &folder) };
            quota = [quota, found].into_iter().flatten().min();
        }
    }
    quota
}

/// The group's folder and its ancestors down to the root, relative to the mount point. Components that lead out of the
/// mount are dropped: inside a container the path may name a group that only the host sees.
fn ancestors(path: &str) -> Vec<PathBuf> {
    let inside: PathBuf = path.split('/').filter(|part| !matches!(*part, "" | "." | "..")).collect();
    inside.ancestors().map(Path::to_path_buf).collect()
}

fn unified_quota(read: &impl Fn(&Path) -> Option<String>, folder: &Path) -> Option<usize> {
    let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
    let text = mounts.iter().find_map(|mount| read(&Path::new(mount).join(folder).join("cpu.max")))?;
    let mut words = text.split_whitespace();
    let quota = words.next()?.parse().ok()?;
    whole_cpus(quota, words.next()?.parse().ok()?)
}

fn legacy_quota(read: &impl Fn(&Path) -> Option<String>, folder: &Path) -> Option<usize> {
    let mounts = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"];
    mounts.iter().find_map(|mount| {
        let number =
            |file: &str| -> Option<i64> { read(&Path::new(mount).join(folder).join(file))?.trim().parse().ok() };
        whole_cpus(number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?)
    })
}

/// `ceil(quota / period)`, or nothing when either is not positive (version 1 writes -1 for no limit).
fn whole_cpus(quota: i64, period: i64) -> Option<usize> {
    let (quota, period) = (u64::try_from(quota).ok()?, u64::try_from(period).ok()?);
    if quota == 0 || period == 0 {
        return None;
    }
    usize::try_from(quota.div_ceil(period)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(files: &[(&str, &str)]) -> Option<usize> {
        cgroup_quota(|path| files.iter().find(|(name, _)| Path::new(name) == path).map(|(_, text)| text.to_string()))
    }

    #[test]
    fn reads_the_unified_hierarchy() {
        let own = ("/proc/self/cgroup", "0::/user.slice/job\n");
        assert_eq!(quota(&[own]), None);
        assert_eq!(quota(&[own, ("/sys/fs/cgroup/user.slice/job/cpu.max", "max 100000\n")]), None);
        let job = ("/sys/fs/cgroup/user.slice/job/cpu.max", "250000 100000\n");
        assert_eq!(quota(&[own, job]), Some(3));
        let parent = ("/sys/fs/cgroup/user.slice/cpu.max", "200000 100000\n");
        assert_eq!(quota(&[own, job, parent]), Some(2));
        assert_eq!(quota(&[own, ("/sys/fs/cgroup/cpu.max", "50000 100000")]), Some(1));
        assert_eq!(quota(&[own, ("/sys/fs/cgroup/unified/cpu.max", "400000 100000")]), Some(4));
    }

    #[test]
    fn reads_the_legacy_hierarchy() {
        let own = ("/proc/self/cgroup", "7:memory:/m\n4:cpu,cpuacct:/docker/ab\n0::/other\n");
        let period = ("/sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_period_us", "100000\n");
        let limit = |text| ("/sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_quota_us", text);
        assert_eq!(quota(&[own, period, limit("-1\n")]), None);
        assert_eq!(quota(&[own, period, limit("150000\n")]), Some(2));
        assert_eq!(quota(&[own, limit("150000\n")]), None);
        let root =
            [("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "700000"), ("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")];
        assert_eq!(quota(&[own, root[0], root[1]]), Some(7));
    }

    #[test]
    fn odd_text_sets_no_limit() {
        let texts = ["", "\0\u{1}", "::::", "0:", "0::", "x:cpu:/a", "4:cpu:", "0::/../../host\n"];
        let values = ["", " ", "max", "-5 100000", "1", "1 0", "x y", "99999999999999999999 1", "0 0"];
        for text in texts {
            for value in values {
                let files = [
                    ("/proc/self/cgroup", text),
                    ("/sys/fs/cgroup/cpu.max", value),
                    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", value),
                    ("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "0"),
                ];
                assert_eq!(quota(&files), None, "{text:?} {value:?}");
            }
        }
        let outside = ("/proc/self/cgroup", "0::/../../host\n");
        assert_eq!(quota(&[outside, ("/sys/fs/cgroup/cpu.max", "300000 100000")]), Some(3));
    }

    #[test]
    fn this_machine_has_a_thread() {
        let available = available_threads();
        assert!(available >= 1);
        assert!(available <= std::thread::available_parallelism().map_or(1, usize::from));
    }
}
