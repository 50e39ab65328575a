//! What the host's kernel says of a process.

use std::fs;
use std::time::Duration;

fn read(pid: u32, file: &str) -> String {
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).unwrap_or_else(|why| panic!("cannot read {path}: {why}"))
}

/// The command line as the kernel shows it, NUL bytes and all.
///
/// # Panics
/// There is no such process.
pub fn command_line(pid: u32) -> String {
    read(pid, "cmdline")
}

/// The name of the main thread (proc(5), `comm`).
///
/// # Panics
/// There is no such process.
pub fn thread_name(pid: u32) -> String {
    read(pid, "comm").trim_end().to_owned()
}

/// Resident memory in bytes: a page that is mapped twice, as those of translated code are, counts once.
///
/// # Panics
/// There is no such process.
pub fn resident_memory(pid: u32) -> u64 {
    let rollup = read(pid, "smaps_rollup");
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or_else(|| panic!("no Pss in smaps_rollup of process {pid}:\n{rollup}")) << 10
}

/// CPU time of all threads, in user and kernel mode.
///
/// # Panics
/// There is no such process.
pub fn cpu_time(pid: u32) -> Duration {
    let stat = read(pid, "stat");
    // The second field is in parentheses and may hold anything; utime and stime are fields 14 and 15.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().skip(14 - 3).take(2));
    let ticks: u64 = fields.into_iter().flatten().map(|field| field.parse::<u64>().expect("a number of ticks")).sum();
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}
