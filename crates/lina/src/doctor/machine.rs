//! Cores, vector instructions and memory.

use std::fmt;
use std::fs;
use std::num::NonZero;

use serde::Serialize;

/// This machine, as far as it tells.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    cpu: Option<String>,
    /// Cores of the machine, counted as the operating system does.
    logical_cores: Option<usize>,
    /// Cores that this process may use.
    usable_cores: usize,
    simd: Vec<Simd>,
    memory_total_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
    /// Limit of the control group that this process is in.
    memory_limit_bytes: Option<u64>,
}

/// A set of vector instructions that the kernels can use.
#[derive(Debug, Serialize)]
struct Simd {
    name: &'static str,
    available: bool,
}

impl Machine {
    pub(super) fn examine() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let cores = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
        Machine {
            cpu: field(&cpuinfo, "model name").map(str::to_owned),
            logical_cores: (cores > 0).then_some(cores),
            usable_cores: std::thread::available_parallelism().map_or(1, NonZero::get),
            simd: simd(),
            memory_total_bytes: kibibytes(&meminfo, "MemTotal"),
            memory_available_bytes: kibibytes(&meminfo, "MemAvailable"),
            memory_limit_bytes: memory_limit_bytes(),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpu = self.cpu.as_deref().unwrap_or("of unknown make");
        write!(f, "CPU      {cpu}, {} core(s) usable", self.usable_cores)?;
        if let Some(cores) = self.logical_cores {
            write!(f, " of {cores}")?;
        }
        let (have, lack): (Vec<_>, Vec<_>) = self.simd.iter().partition(|simd| simd.available);
        let names = |sets: Vec<&Simd>| match sets.as_slice() {
            [] => "none".to_owned(),
            sets => sets.iter().map(|simd| simd.name).collect::<Vec<_>>().join(", "),
        };
        writeln!(f, "\nSIMD     {}; missing: {}", names(have), names(lack))?;
        let gib = |bytes: Option<u64>| {
            bytes.map_or("unknown".to_owned(), |bytes| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)))
        };
        write!(f, "memory   {}, {} available", gib(self.memory_total_bytes), gib(self.memory_available_bytes))?;
        if self.memory_limit_bytes.is_some() {
            write!(f, ", limited to {}", gib(self.memory_limit_bytes))?;
        }
        writeln!(f)
    }
}

#[cfg(target_arch = "x86_64")]
fn simd() -> Vec<Simd> {
    vec![
        Simd { name: "avx2", available: is_x86_feature_detected!("avx2") },
        Simd { name: "fma", available: is_x86_feature_detected!("fma") },
        Simd { name: "avx512f", available: is_x86_feature_detected!("avx512f") },
    ]
}

#[cfg(not(target_arch = "x86_64"))]
fn simd() -> Vec<Simd> {
    Vec::new()
}

/// The value of the first line `name : value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then_some(value.trim())
    })
}

/// A value of `/proc/meminfo`, whose unit is called kB and is KiB.
fn kibibytes(meminfo: &str, name: &str) -> Option<u64> {
    let value = field(meminfo, name)?.strip_suffix("kB")?.trim();
    value.parse::<u64>().ok()?.checked_mul(1024)
}

/// The limit of the control group, version 2 or 1; `None` without one.
fn memory_limit_bytes() -> Option<u64> {
    // Version 1 writes "no limit" as the largest number of pages.
    const NO_LIMIT_BYTES: u64 = 1 << 60;
    ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .into_iter()
        .find_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok())
        .filter(|limit_bytes| *limit_bytes < NO_LIMIT_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_by_their_whole_name() {
        let meminfo = "MemTotal:       24111 kB\nMemTotalish: 1 kB\nHugePages_Total:   0\n";
        assert_eq!(kibibytes(meminfo, "MemTotal"), Some(24111 << 10));
        assert_eq!(kibibytes(meminfo, "Mem"), None);
        assert_eq!(kibibytes(meminfo, "HugePages_Total"), None);
    }
}
