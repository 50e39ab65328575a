//! Runs one machine: what its guest says, when, and what it costs the host.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::process::describe;

/// A guest that says nothing for so long has hung.
const SILENCE: Duration = Duration::from_secs(900);

/// Clock ticks per second in /proc, the same on every architecture that this runs on.
const USER_HZ: f64 = 100.0;

/// How a run went.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// What the guest said from its start on, without line ends.
    pub(super) lines: Vec<String>,
    /// From the start of the program to the guest's init.
    pub(super) init: Option<Duration>,
    /// The guest has done all it was asked for.
    pub(super) done: bool,
    /// CPU time per time while the guest was idle.
    pub(super) idle_load: Option<f64>,
    /// Resident memory beyond the guest's, in bytes, while it was idle.
    pub(super) own_memory: Option<u64>,
    pub(super) code: Option<i32>,
}

impl Outcome {
    /// The error that `command` did not end well, with the last that its guest said.
    pub(super) fn failure(&self, command: &Command) -> anyhow::Error {
        let lines = self.lines[self.lines.len().saturating_sub(20)..].join("\n");
        anyhow!("{} did not end well ({:?}):\n{lines}", describe(command), self.code)
    }
}

/// Kills a program that is left behind.
pub(super) struct Guard(pub(super) Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a machine with `memory` bytes to its end.
pub(super) fn run(command: &mut Command, memory: u64) -> Result<Outcome> {
    let start = Instant::now();
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", describe(command)))?;
    let mut child = Guard(child);
    let pid = child.0.id();
    let stdout = child.0.stdout.take().context("no pipe to the guest's console")?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            // The time is that of the line, however late it is looked at.
            if sender.send((Instant::now(), String::from_utf8_lossy(&line).trim_end().to_owned())).is_err() {
                break;
            }
        }
    });
    let mut outcome = Outcome::default();
    let mut idle = None;
    loop {
        let (time, line) = match receiver.recv_timeout(SILENCE) {
            Ok(said) => said,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                bail!("the guest said nothing for {} s: {}", SILENCE.as_secs(), describe(command));
            }
        };
        if line.contains("GUEST-INIT-UP") {
            outcome.init = Some(time - start);
        } else if line.contains("GUEST-IDLE-BEGIN") {
            idle = cpu_time(pid).map(|cpu| (Instant::now(), cpu));
        } else if line.contains("GUEST-IDLE-END")
            && let (Some((begin, before)), Some(after)) = (idle, cpu_time(pid))
        {
            outcome.idle_load = Some((after - before) / begin.elapsed().as_secs_f64());
            outcome.own_memory = own_memory(pid, memory);
        } else if line.contains("BENCH-DONE") {
            outcome.done = true;
        }
        outcome.lines.push(line);
    }
    outcome.code = child.0.wait()?.code();
    Ok(outcome)
}

/// Runs a machine until its console has shown `text`, and ends it; returns how long that took.
pub(super) fn until(command: &mut Command, text: &str) -> Result<Duration> {
    let start = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = Guard(child.with_context(|| format!("cannot start {}", describe(command)))?);
    let mut console = child.0.stdout.take().context("no pipe to the guest's console")?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(read @ 1..) = console.read(&mut bytes) {
            if sender.send((Instant::now(), bytes[..read].to_vec())).is_err() {
                break;
            }
        }
    });
    let mut said = Vec::new();
    while let Ok((time, bytes)) = receiver.recv_timeout(SILENCE) {
        // What was looked at already can only be the beginning of it.
        let from = said.len().saturating_sub(text.len());
        said.extend(bytes);
        if said[from..].windows(text.len()).any(|window| window == text.as_bytes()) {
            return Ok(time - start);
        }
    }
    let last = String::from_utf8_lossy(&said[said.len().saturating_sub(1000)..]).into_owned();
    bail!("{} has not shown {text:?} but:\n{last}", describe(command));
}

/// CPU time that a process has used so far, in seconds (proc(5), /proc/PID/stat, fields 14 and 15).
fn cpu_time(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may contain anything but ends with the last parenthesis.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |n: usize| fields.get(n - 3)?.parse::<f64>().ok();
    Some((ticks(14)? + ticks(15)?) / USER_HZ)
}

/// Resident memory of a process without that of the guest's RAM, in bytes. What is mapped twice counts once.
fn own_memory(pid: u32, guest: u64) -> Option<u64> {
    beyond_guest(&fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?, guest)
}

/// As [`own_memory`], from the text of smaps: the guest's RAM is what is called so, or a nameless mapping of its size.
fn beyond_guest(smaps: &str, guest: u64) -> Option<u64> {
    let (mut sum, mut named, mut nameless, mut size) = (0, false, false, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next()? {
            "Size:" => size = kib(words.next())?,
            "Pss:" if named || nameless && size == guest => {}
            "Pss:" => sum += kib(words.next())?,
            word if !word.ends_with(':') => {
                named = line.contains("memfd:guest-ram");
                nameless = words.nth(3).is_some_and(|inode| inode == "0") && words.next().is_none();
            }
            _ => {}
        }
    }
    Some(sum)
}

fn kib(word: Option<&str>) -> Option<u64> {
    word?.parse::<u64>().ok().map(|n| n << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_memory_is_left_out() {
        let smaps = "\
7f0000000000-7f0020000000 rw-s 00000000 00:01 77 /memfd:guest-ram (deleted)
Size:             524288 kB
Pss:              100000 kB
7f1000000000-7f1020000000 rw-p 00000000 00:00 0
Size:             524288 kB
Pss:               50000 kB
7f2000000000-7f2000100000 rw-p 00000000 00:00 0
Size:               1024 kB
Pss:                 100 kB
7f3000000000-7f3000100000 rw-p 00000000 00:00 0 [heap]
Size:             524288 kB
Pss:                  20 kB
";
        assert_eq!(beyond_guest(smaps, 512 << 20), Some(120 << 10));
        assert_eq!(beyond_guest("", 1), Some(0));
    }

    #[test]
    fn a_text_is_waited_for() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; printf 'tw'; printf 'o here'; exec sleep 1000"]);
        assert!(until(&mut command, "two").is_ok());
        let error = until(Command::new("echo").arg("three"), "two").unwrap_err().to_string();
        assert!(error.contains("has not shown \"two\" but:\nthree"), "{error}");
    }

    #[test]
    fn lines_and_times_are_seen() {
        let script =
            "echo one; echo GUEST-INIT-UP 1; echo GUEST-IDLE-BEGIN; echo GUEST-IDLE-END; echo BENCH-DONE; exit 3";
        let outcome = run(Command::new("sh").args(["-c", script]), 1 << 20).unwrap();
        assert_eq!((outcome.lines.len(), outcome.done, outcome.code), (5, true, Some(3)));
        assert!(outcome.init.is_some());
        assert!(run(&mut Command::new("/nonexistent/program"), 0).is_err());
    }
}
