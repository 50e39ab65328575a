//! The command lines of the machines, and the native runs.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::Options;
use super::guest::{Real, Small};
use super::machine::Machine;
use super::record::{Column, Record};
use super::watch::{self, Outcome};
use crate::process::{find_tool, output, say};

/// Seconds for which the idle guest is watched.
pub(super) const IDLE_SECONDS: u32 = 20;
/// Size of the scratch disk of the real-programs guest.
const SCRATCH: u64 = 128 << 20;

/// One run of a machine.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Job {
    /// What the guest is to run.
    pub(super) list: String,
    pub(super) cpus: u32,
    /// The guest with real programs.
    pub(super) real: bool,
    /// The guest is watched while it does nothing.
    pub(super) idle: bool,
}

impl Job {
    pub(super) fn describe(&self) -> String {
        let guest = if self.real { "real programs" } else { "guest" };
        let idle = if self.idle { ", idle" } else { "" };
        format!("{guest} with {} CPU{}: {}{idle}", self.cpus, if self.cpus == 1 { "" } else { "s" }, self.list)
    }
}

/// A machine.
pub(super) struct Engine {
    column: Column,
    program: PathBuf,
    extra: Vec<OsString>,
}

impl Engine {
    pub(super) fn bhyve(program: PathBuf, extra: Vec<OsString>) -> Self {
        Self { column: Column::Bhyve, program, extra }
    }

    pub(super) fn qemu(program: PathBuf) -> Self {
        Self { column: Column::Tcg, program, extra: Vec::new() }
    }

    /// The command that runs `job`.
    pub(super) fn command(&self, job: &Job, small: &Small, real: Option<&Real>, options: &Options) -> Result<Command> {
        let mut words = format!("console=ttyS0 quiet bench={} benchdiv={}", job.list, options.divisor);
        if job.idle {
            words += &format!(" benchidle={IDLE_SECONDS}");
        }
        let (initramfs, disks) = match (job.real, real) {
            (true, Some(real)) => {
                // Sparse, and fresh for every run.
                let scratch = &real.scratch;
                File::create(scratch)
                    .and_then(|file| file.set_len(SCRATCH))
                    .with_context(|| format!("cannot make {}", scratch.display()))?;
                (&real.initramfs, vec![(&real.disk, true), (scratch, false)])
            }
            (true, None) => bail!("the guest with real programs was not built"),
            (false, _) => (&small.initramfs, Vec::new()),
        };
        let machine = Machine {
            column: self.column,
            program: &self.program,
            cpus: job.cpus,
            memory: options.memory,
            kernel: &small.kernel,
            initramfs,
            words: &words,
        };
        let disks = disks.iter().enumerate().flat_map(|(i, (disk, read_only))| self.disk(i, disk, *read_only));
        Ok(machine.command(disks.chain(self.extra.iter().cloned())))
    }

    fn disk(&self, number: usize, disk: &Path, read_only: bool) -> [OsString; 2] {
        let disk = disk.display();
        let (option, value) = if self.column == Column::Tcg {
            let read_only = if read_only { "on" } else { "off" };
            ("-drive", format!("if=virtio,format=raw,readonly={read_only},file={disk}"))
        } else {
            let read_only = if read_only { ",ro" } else { "" };
            ("-s", format!("{},virtio-blk,{disk}{read_only}", 4 + number))
        };
        [option.into(), value.into()]
    }

    /// Runs the machine to its end and records what it says and costs.
    pub(super) fn run(&self, mut command: Command, job: &Job, options: &Options, record: &mut Record) -> Result<()> {
        let outcome = watch::run(&mut command, u64::from(options.memory) << 20)?;
        // "Powered off", in the terms of each.
        let good = if self.column == Column::Tcg { 0 } else { 1 };
        if !outcome.done || outcome.code != Some(good) {
            return Err(outcome.failure(&command));
        }
        record.lines(self.column, &outcome.lines, scaled(job));
        self.record_costs(&outcome, job, record);
        Ok(())
    }

    fn record_costs(&self, outcome: &Outcome, job: &Job, record: &mut Record) {
        let mut add = |name: &str, value: Option<f64>| {
            if let Some(value) = value {
                record.add(self.column, name, value);
            }
        };
        let boot = outcome.init.map(|time| time.as_secs_f64());
        match (job.real, job.cpus) {
            (true, _) => add("boot_real", boot),
            (false, 1) => add("boot", boot),
            (false, _) => add("boot_2cpus", boot),
        }
        if job.idle {
            add("idle_cpu %", outcome.idle_load.map(|load| load * 100.0));
            add("idle_rss MB", outcome.own_memory.map(|bytes| bytes as f64 / f64::from(1 << 20)));
        }
    }
}

/// The small programs' names with two CPUs are apart from those with one.
fn scaled(job: &Job) -> &'static str {
    if job.cpus > 1 { "2cpus_" } else { "" }
}

/// The programs on this machine itself.
pub(super) struct Native<'a> {
    pub(super) small: &'a Small,
    pub(super) real: Option<&'a Real>,
    pub(super) divisor: u32,
}

impl Native<'_> {
    /// Runs what `job` runs in a guest and records it.
    pub(super) fn run(&self, job: &Job, record: &mut Record) -> Result<()> {
        let said = match (job.real, self.real) {
            (true, Some(real)) => match output(&mut native_real(real, &job.list)?) {
                Ok(said) => said,
                Err(error) => {
                    say(&format!("no native run of the real programs: {error:#}"));
                    return Ok(());
                }
            },
            (false, _) if job.list != "none" => {
                let divisor = self.divisor.to_string();
                let said = |program| output(Command::new(program).args(["-d", &divisor, &job.list]));
                let wide = said(&self.small.program)?;
                // Not every kernel runs 32-bit programs.
                wide + &said(&self.small.program_32).unwrap_or_default()
            }
            _ => return Ok(()),
        };
        let lines: Vec<_> = said.lines().map(str::to_owned).collect();
        record.lines(Column::Native, &lines, scaled(job));
        Ok(())
    }
}

/// The real programs in a root of their own, on one CPU: with a /dev of four harmless nodes, and a /tmp.
fn native_real(real: &Real, list: &str) -> Result<Command> {
    const SCRIPT: &str = r#"set -e
mount -t tmpfs tmpfs "$1/tmp"
mount -t proc proc "$1/proc" 2>/dev/null || mount --rbind /proc "$1/proc"
mount -t tmpfs tmpfs "$1/dev"
for n in null zero random urandom; do touch "$1/dev/$n"; mount --bind "/dev/$n" "$1/dev/$n"; done
exec taskset -c "$3" chroot "$1" /bench-real.sh "$2"
"#;
    let unshare = find_tool("unshare").context("unshare is not installed: it is in the package util-linux")?;
    let cpu = rustix::thread::sched_getaffinity(None)?;
    let first = (0..rustix::thread::CpuSet::MAX_CPU).find(|&n| cpu.is_set(n)).unwrap_or(0);
    let mut command = Command::new(unshare);
    command.args(["-m", "--propagation", "private"]);
    if !rustix::process::geteuid().is_root() {
        command.args(["-U", "-r"]);
    }
    command.args(["sh", "-c", SCRIPT, "native"]).arg(&real.root).arg(list).arg(first.to_string());
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::describe;

    fn line(engine: &Engine, job: &Job) -> String {
        let [kernel, initramfs, program] = ["/g/k", "/g/i", "/g/b"].map(PathBuf::from);
        let small = Small { kernel, initramfs, program, program_32: "bench32".into() };
        let options = Options::parse(Vec::new()).unwrap();
        describe(&engine.command(job, &small, None, &options).unwrap())
    }

    #[test]
    fn both_machines_get_the_same_guest() {
        let job = Job { list: "int".into(), cpus: 2, real: false, idle: true };
        let ours = line(&Engine::bhyve("bhyve".into(), vec!["-x".into()]), &job);
        let theirs = line(&Engine::qemu("qemu".into()), &job);
        for part in ["console=ttyS0 quiet bench=int benchdiv=1 benchidle=20", "/g/k", "/g/i"] {
            assert!(ours.contains(part) && theirs.contains(part), "{part}: {ours}\n{theirs}");
        }
        assert!(ours.contains("-c 2 -m 512M") && ours.contains(" -x bench-"), "{ours}");
        assert!(theirs.contains("-smp 2 -m 512 "), "{theirs}");
        let job = Job { real: true, ..job };
        let options = Options::parse(Vec::new()).unwrap();
        let small = Small { kernel: "k".into(), initramfs: "i".into(), program: "b".into(), program_32: "c".into() };
        assert!(Engine::qemu("qemu".into()).command(&job, &small, None, &options).is_err());
    }
}
