//! Debian's kernels, from start to end.

use std::os::unix::process::ExitStatusExt;
use std::time::Instant;

use e2e::linux::{Guest, host_cpus};
use e2e::{Linux, files, host};
use rustix::process::Signal;

/// What Linux knows of its interrupts, from /proc/interrupts.
struct Interrupts {
    cpus: usize,
    lines: Vec<String>,
}

impl Interrupts {
    fn parse(smoke: &str) -> Self {
        let mut lines = between(smoke, "INTERRUPTS").into_iter();
        let cpus = lines.next().unwrap_or_default().split_whitespace().count();
        Self { cpus, lines: lines.collect() }
    }

    /// The counts by CPU of the first line that has all `words`.
    fn counts(&self, words: &[&str]) -> Vec<u64> {
        let line = self.lines.iter().find(|line| words.iter().all(|word| line.contains(word)));
        let fields = line.into_iter().flat_map(|line| line.split_whitespace().skip(1).take(self.cpus));
        fields.map(|field| field.parse().unwrap_or(0)).collect()
    }

    fn total(&self, words: &[&str]) -> u64 {
        self.counts(words).iter().sum()
    }
}

/// The lines between NAME-BEGIN and NAME-END.
fn between(text: &str, name: &str) -> Vec<String> {
    let (begin, end) = (format!("{name}-BEGIN"), format!("{name}-END"));
    let lines = text.lines().skip_while(|line| *line != begin).skip(1).take_while(|line| *line != end);
    lines.map(str::to_owned).collect()
}

/// The text of a kernel message without level and time, numbers replaced by N.
fn general_form(message: &str) -> String {
    let text = message.split_once("] ").map_or(message, |(_, text)| text).trim();
    let mut form = String::new();
    for character in text.chars() {
        match character {
            '0'..='9' if form.ends_with('N') => {}
            '0'..='9' => form.push('N'),
            other => form.push(other),
        }
    }
    form
}

/// Checks that the kernel complains of nothing that it does not complain of on QEMU.
fn check_complaints(guest: &Guest, cpus: u32, smoke: &str) {
    let mut known: Vec<_> = include_str!("qemu-complaints.txt").lines().filter(|line| !line.starts_with(';')).collect();
    if cpus > host_cpus() {
        // A vCPU cannot help being away for a while where it has no host CPU of its own.
        known.push("hrtimer: interrupt took N ns");
    }
    let complaints = between(smoke, "COMPLAINTS");
    let new: Vec<_> = complaints.into_iter().filter(|line| !known.contains(&&*general_form(line))).collect();
    guest.check(smoke.contains("COMPLAINTS-END"), "the list of complaints has no end");
    guest.check(new.is_empty(), &format!("the kernel complains, and not on QEMU:\n{}", new.join("\n")));
}

/// Runs the guest's `smoke` and checks what every guest must have.
fn check_smoke(guest: &mut Guest, cpus: u32) {
    let smoke = guest.shell("sh /tests/smoke");
    guest.check(smoke.contains(&format!("NPROC {cpus}\n")), "another number of CPUs");
    let interrupts = Interrupts::parse(&smoke);
    guest.check(interrupts.cpus == cpus as usize, "interrupts of another number of CPUs");
    for name in ["timer", "ttyS0"] {
        guest.check(interrupts.total(&["IO-APIC", name]) > 0, &format!("no interrupt of {name} by the I/O APIC"));
    }
    let ticks = interrupts.counts(&["LOC:"]);
    guest.check(ticks.len() == cpus as usize && ticks.iter().all(|count| *count > 0), "a CPU without timer interrupts");
    check_complaints(guest, cpus, &smoke);
}

/// Checks that the virtio devices have MSI-X, and that it works.
fn check_msix(guest: &mut Guest) {
    let modes = guest.shell("cat /sys/bus/pci/devices/0000:00:0[45].0/msi_irqs/*");
    guest.check(!modes.is_empty() && modes.lines().all(|mode| mode == "msix"), "virtio interrupts that are no MSI-X");
    let counts = guest.shell("echo INTERRUPTS-BEGIN; cat /proc/interrupts; echo INTERRUPTS-END");
    let interrupts = Interrupts::parse(&counts);
    for name in ["virtio0-req", "virtio1-input"] {
        guest.check(interrupts.total(&["PCI-MSI", name]) > 0, &format!("no interrupt of {name}"));
    }
}

fn number(guest: &Guest, text: &str, name: &str) -> f64 {
    let words = text.split_whitespace().filter_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let mut values = words.filter_map(|value| value.parse().ok());
    values.next().unwrap_or_else(|| guest.fail(&format!("no {name} in {text:?}")))
}

#[test]
fn one_cpu_with_disk_and_entropy_until_power_off() {
    let folder = files::scratch();
    let disk = files::copy_disk(folder.path());
    let mut guest = Linux::amd64().disk(&disk, "").boot();
    check_smoke(&mut guest, 1);
    let written = guest.shell("sh /tests/disk");
    guest.check(number(&guest, &written, "bytes") >= 64e6, "less than 64 MB written");
    let random = guest.shell("sh /tests/rng");
    guest.check(number(&guest, &random, "bytes") == 65536.0, "not all random bytes");
    check_msix(&mut guest);
    guest.send("poweroff\n");
    guest.expect_exit(1);
    files::check_file_system(&disk);
}

#[test]
fn two_cpus_until_reboot() {
    let folder = files::scratch();
    let disk = files::copy_disk(folder.path());
    let mut guest = Linux::amd64().cpus(2).disk(&disk, "").boot();
    check_smoke(&mut guest, 2);
    guest.shell("sh /tests/rng");
    guest.shell("ls /mnt && sync");
    check_msix(&mut guest);
    guest.shell("sh /tests/busy");
    guest.send("reboot\n");
    guest.expect_exit(0);
    files::check_file_system(&disk);
}

#[test]
fn four_cpus_until_halt() {
    let mut guest = Linux::amd64().cpus(4).boot();
    check_smoke(&mut guest, 4);
    guest.shell("sh /tests/busy");
    guest.send("halt\n");
    guest.expect_exit(2);
}

#[test]
fn more_cpus_than_the_host_has() {
    let mut guest = Linux::amd64().cpus(16).boot();
    assert_eq!(guest.shell("nproc").trim(), "16");
    guest.send("poweroff\n");
    guest.expect_exit(1);
}

#[test]
fn a_read_only_disk_until_panic() {
    let folder = files::scratch();
    let disk = files::copy_disk(folder.path());
    let mut guest = Linux::amd64().words("panic=-1").disk(&disk, ",ro").boot();
    assert_eq!(guest.shell("cat /sys/block/vda/ro").trim(), "1");
    let (_, status) = guest.shell_status("dd if=/dev/zero of=/dev/vda bs=512 count=1");
    guest.check(status != 0, "a read-only disk was written");
    guest.send("sh /tests/crash\n");
    guest.wait_for("Kernel panic");
    guest.expect_exit(0);
    files::check_file_system(&disk);
}

/// By the interpreter alone; the other guests are translated where the host has no hardware virtualisation.
#[test]
fn the_interpreter_until_triple_fault() {
    let engine = ["cpu.engine=soft", "cpu.jit=off"];
    let linux = engine.iter().fold(Linux::amd64().cpus(2).words("reboot=triple"), |linux, key| linux.key(key));
    let mut guest = linux.boot();
    check_smoke(&mut guest, 2);
    guest.send("reboot\n");
    guest.expect_exit(3);
}

#[test]
fn sigterm_before_acpi_is_enabled() {
    let mut guest = Linux::amd64().start();
    guest.wait_for("Linux version");
    guest.signal(Signal::TERM);
    let status = guest.wait();
    guest.check(status.signal() == Some(Signal::TERM.as_raw()), &format!("it ended with {status}"));
}

/// An idle guest with much memory: what it costs, whether its clock is right, and the power button. One test, because
/// each needs a minute in which nothing happens.
#[test]
fn an_idle_guest_of_four_gigabytes_until_the_power_button() {
    let mut guest = Linux::amd64().memory("4G").boot();
    let resident = host::resident_memory(guest.pid());
    guest.check(resident < 250 << 20, &format!("{} MB resident", resident >> 20));

    let mark = |guest: &mut Guest, name: &str| {
        guest.wait_for(&format!("CLOCK-{name} "));
        let line = guest.wait_for("\n");
        let (time, cpu) = (Instant::now(), host::cpu_time(guest.pid()));
        (number(guest, &line, "uptime"), number(guest, &line, "epoch"), time, cpu)
    };
    guest.send("sh /tests/clock\n");
    let (first_uptime, first_epoch, start, first_cpu) = mark(&mut guest, "BEGIN");
    let (uptime, epoch, end, cpu) = mark(&mut guest, "END");
    let real = (end - start).as_secs_f64();
    guest.check(real > 50.0, &format!("a minute took {real:.2} s"));
    let guest_time = uptime - first_uptime;
    let drift = (guest_time / real - 1.0).abs();
    guest.check(drift < 0.01, &format!("{guest_time:.2} s in the guest were {real:.2} s"));
    let clock = epoch - first_epoch;
    guest.check((clock - real).abs() < 2.0, &format!("the guest's clock went {clock} s in {real:.2} s"));
    let load = (cpu - first_cpu).as_secs_f64() / real;
    guest.check(load < 0.02, &format!("an idle guest takes {:.1} % of a CPU", load * 100.0));
    println!("idle: {} MB, {:.2} % of a CPU, clock {:+.3} %", resident >> 20, load * 100.0, drift * 100.0);

    guest.signal(Signal::TERM);
    guest.wait_for("POWER-BUTTON");
    guest.expect_exit(1);
}

#[test]
fn i386_with_disk() {
    let folder = files::scratch();
    let disk = files::copy_disk(folder.path());
    let mut guest = Linux::i386().disk(&disk, "").boot();
    assert_eq!(guest.shell("uname -m").trim(), "i686");
    check_smoke(&mut guest, 1);
    guest.shell("sh /tests/disk");
    check_msix(&mut guest);
    // Leaving the shell powers off.
    guest.send("exit\n");
    guest.expect_exit(1);
    files::check_file_system(&disk);
}
