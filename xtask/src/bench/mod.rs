//! `cargo xtask bench`: the same guests in turn under bhyve and under QEMU's software CPU, and their programs natively.
//!
//! | module   | what it does                                                       |
//! |----------|--------------------------------------------------------------------|
//! | `guest`  | builds the two guests                                               |
//! | `engine` | the command lines of the machines, and the native runs              |
//! | `io`     | the guest that measures disks                                      |
//! | `net`    | the guest that measures networks                                   |
//! | `firmware` | the way through firmware to a boot loader                       |
//! | `watch`  | runs one machine: its lines, its times, what it costs the host       |
//! | `record` | what was measured, by workload and column                           |
//! | `table`  | ratios, groups and bars; the table and the JSON file                |

mod engine;
mod firmware;
pub(crate) mod guest;
mod io;
mod machine;
mod net;
mod record;
mod table;
mod watch;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::boot;
use crate::guests::Store;
use crate::process::{need_tool, say};
use engine::{Engine, Job, Native};
use record::{Column, Record};

/// What to measure.
#[derive(Debug, PartialEq)]
pub(crate) struct Options {
    rounds: u32,
    /// Divides the work of the small programs.
    divisor: u32,
    /// Groups or names of workloads; empty: all that the other options ask for.
    only: Vec<String>,
    smp: bool,
    real: bool,
    /// Disks and networks instead of programs.
    io: bool,
    /// The way through firmware instead of programs.
    firmware: bool,
    peer: bool,
    json: Option<PathBuf>,
    /// MiB of each guest.
    memory: u32,
    /// Seconds for each test of a disk or a network.
    seconds: u32,
    extra: Vec<OsString>,
}

/// Groups of the small programs that one CPU runs.
const MICRO: [&str; 6] = ["int", "fp", "simd", "mem", "os", "i386"];

impl Options {
    pub(crate) fn parse(args: Vec<OsString>) -> Result<Self> {
        use lexopt::prelude::*;
        let mut options = Self {
            rounds: 5,
            divisor: 1,
            only: Vec::new(),
            smp: false,
            real: false,
            io: false,
            firmware: false,
            peer: true,
            json: None,
            memory: 512,
            seconds: 2,
            extra: Vec::new(),
        };
        let end = args.iter().position(|word| word == "--").unwrap_or(args.len());
        options.extra = args.iter().skip(end + 1).cloned().collect();
        let mut parser = lexopt::Parser::from_args(args.into_iter().take(end));
        while let Some(arg) = parser.next()? {
            match arg {
                Long("rounds") => options.rounds = parser.value()?.parse()?,
                Long("div") => options.divisor = parser.value()?.parse()?,
                Long("only") => {
                    options.only.extend(parser.value()?.string()?.split(',').map(str::to_owned));
                }
                Long("smp") => options.smp = true,
                Long("real") => options.real = true,
                Long("io") => options.io = true,
                Long("firmware") => options.firmware = true,
                Long("no-peer") => options.peer = false,
                Long("seconds") => options.seconds = parser.value()?.parse()?,
                Long("memory") => options.memory = parser.value()?.parse()?,
                Long("json") => options.json = Some(parser.value()?.into()),
                _ => return Err(arg.unexpected().into()),
            }
        }
        if [options.rounds, options.divisor, options.memory, options.seconds].contains(&0) {
            bail!("--rounds, --div, --memory and --seconds take numbers from 1 on");
        }
        options.smp |= options.only.iter().any(|name| in_group(name, "smp"));
        options.real |= options.only.iter().any(|name| in_group(name, "real"));
        Ok(options)
    }

    /// Whether a group is wanted at all.
    fn wants(&self, group: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| in_group(name, group))
    }

    /// What to ask of the program of the small guest, of the groups named; `None` for nothing.
    fn list(&self, groups: &[&str]) -> Option<String> {
        let wanted = |name: &&String| groups.iter().any(|group| in_group(name, group));
        let list = match self.only.is_empty() {
            true => groups.join(","),
            false => self.only.iter().filter(wanted).cloned().collect::<Vec<_>>().join(","),
        };
        (!list.is_empty()).then_some(list)
    }

    /// What to ask of the guest with real programs.
    fn real_list(&self) -> Option<String> {
        let names = self.only.iter().filter(|name| in_group(name, "real"));
        let names: Vec<_> = names.map(|name| name.strip_prefix("real_").unwrap_or("all")).collect();
        match (self.real, names.is_empty()) {
            (false, _) => None,
            (true, false) => Some(names.join(",")),
            (true, true) => self.only.is_empty().then(|| "all".to_owned()),
        }
    }

    /// The machine's runs of one round.
    fn jobs(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        let micro = self.list(&MICRO);
        let idle = self.wants("idle");
        if micro.is_some() || self.wants("boot") {
            jobs.push(Job { list: micro.unwrap_or_else(|| "none".into()), cpus: 1, real: false, idle: false });
        }
        if self.smp {
            // The same work on one CPU and on two is what scaling is computed from.
            let mut list = self.list(&["smp"]).unwrap_or_else(|| "smp".into());
            list += ",int_sha256";
            jobs.push(Job { list, cpus: 2, real: false, idle: false });
        }
        if idle {
            jobs.push(Job { list: "none".into(), cpus: 1, real: false, idle: true });
        }
        if let Some(list) = self.real_list() {
            jobs.push(Job { list, cpus: 1, real: true, idle: false });
        }
        jobs
    }
}

/// Whether a workload's name is the group's or begins with it.
fn in_group(name: &str, group: &str) -> bool {
    name.strip_prefix(group).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
}

/// Builds what is needed, runs all rounds and prints the table.
pub(crate) fn run(options: Options) -> Result<ExitCode> {
    let program = boot::build()?;
    let qemu = options.peer.then(|| need_tool("qemu-system-x86_64", "qemu-system-x86")).transpose()?;
    let store = Store::open()?;
    if options.firmware {
        return run_firmware(&options, &store, program, qemu);
    }
    if options.io {
        return run_io(&options, &store, program, qemu);
    }
    let small = guest::Small::build(&store)?;
    let real = options.real.then(|| guest::Real::build(&store)).transpose()?;
    drop(store);
    let mut engines = vec![Engine::bhyve(program, options.extra.clone())];
    engines.extend(qemu.map(Engine::qemu));

    let mut record = Record::default();
    let jobs = options.jobs();
    if jobs.is_empty() {
        bail!(
            "--only names nothing that there is: groups boot, int, fp, simd, mem, os, i386, smp, idle, real, or workloads"
        );
    }
    for round in 0..options.rounds {
        for job in &jobs {
            say(&format!("round {} of {}: {}", round + 1, options.rounds, job.describe()));
            let native = Native { small: &small, real: real.as_ref(), divisor: options.divisor };
            native.run(job, &mut record)?;
            // Neither machine is always the first after the other.
            let (first, rest): (Vec<_>, Vec<_>) =
                engines.iter().enumerate().partition(|(i, _)| *i == round as usize % engines.len());
            for (_, engine) in first.into_iter().chain(rest) {
                let command = engine.command(job, &small, real.as_ref(), &options)?;
                engine.run(command, job, &options, &mut record)?;
            }
        }
    }
    finish(&options, &record)
}

/// Measures disks and networks.
fn run_io(options: &Options, store: &Store, program: PathBuf, qemu: Option<PathBuf>) -> Result<ExitCode> {
    let (seconds, memory) = (options.seconds, options.memory);
    let disks = options.wants("io").then(|| io::Bench::build(store, seconds, memory)).transpose()?;
    let networks = options.wants("net").then(|| net::Bench::build(store, seconds, memory)).transpose()?;
    let machines = machines(program, qemu);
    let mut record = Record::default();
    for round in 0..options.rounds {
        say(&format!("round {} of {}: disks and networks", round + 1, options.rounds));
        if let Some(disks) = &disks {
            disks.round(&machines, round, &mut record)?;
        }
        if let Some(networks) = &networks {
            networks.round(&machines, round, &mut record)?;
        }
    }
    finish(options, &record)
}

/// Measures the way to the boot loader.
fn run_firmware(options: &Options, store: &Store, program: PathBuf, qemu: Option<PathBuf>) -> Result<ExitCode> {
    let bench = firmware::Bench::build(store, options.memory)?;
    let machines = machines(program, qemu);
    let mut record = Record::default();
    for round in 0..options.rounds {
        say(&format!("round {} of {}: firmware", round + 1, options.rounds));
        bench.round(&machines, round, &mut record)?;
    }
    finish(options, &record)
}

/// The programs in the order of a first round.
fn machines(program: PathBuf, qemu: Option<PathBuf>) -> Vec<(Column, PathBuf)> {
    let mut machines = vec![(Column::Bhyve, program)];
    machines.extend(qemu.map(|program| (Column::Tcg, program)));
    machines
}

/// Prints the table, and says whether the results are right.
fn finish(options: &Options, record: &Record) -> Result<ExitCode> {
    let table = table::Table::new(record);
    print!("{table}");
    if let Some(path) = &options.json {
        table::write_json(record, path)?;
    }
    let wrong = record.mismatches();
    for line in &wrong {
        say(line);
    }
    if wrong.is_empty() && record.has(Column::Bhyve) { Ok(ExitCode::SUCCESS) } else { Ok(ExitCode::FAILURE) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Options> {
        Options::parse(words.split_whitespace().map(OsString::from).collect())
    }

    fn lists(words: &str) -> Vec<(String, u32, bool, bool)> {
        let jobs = parse(words).unwrap().jobs();
        jobs.into_iter().map(|job| (job.list, job.cpus, job.real, job.idle)).collect()
    }

    #[test]
    fn options_choose_the_runs() {
        let micro = ("int,fp,simd,mem,os,i386".to_owned(), 1, false, false);
        let idle = ("none".to_owned(), 1, false, true);
        assert_eq!(lists(""), [micro.clone(), idle.clone()]);
        let smp = ("smp,int_sha256".to_owned(), 2, false, false);
        let real = ("all".to_owned(), 1, true, false);
        assert_eq!(lists("--smp --real"), [micro, smp, idle.clone(), real]);
        assert_eq!(lists("--only boot"), [("none".to_owned(), 1, false, false)]);
        assert_eq!(lists("--only int_fib,mem"), [("int_fib,mem".to_owned(), 1, false, false)]);
        assert_eq!(lists("--only real_sqlite,idle"), [idle, ("sqlite".to_owned(), 1, true, false)]);
        assert_eq!(lists("--only smp_xadd"), [("smp_xadd,int_sha256".to_owned(), 2, false, false)]);
        assert_eq!(lists("--only nothing"), []);
    }

    #[test]
    fn mistakes_are_refused() {
        for words in ["--rounds 0", "--rounds", "--div x", "stray", "--memory 0"] {
            assert!(parse(words).is_err(), "{words}");
        }
        let options = parse("--rounds 3 --div 20 --json /x/y --no-peer -- -o cpu.jit=false").unwrap();
        assert_eq!((options.rounds, options.divisor, options.peer), (3, 20, false));
        assert_eq!(options.extra, ["-o", "cpu.jit=false"]);
    }
}
