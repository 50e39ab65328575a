//! `--io`: one disk in turn under bhyve and under QEMU, as a raw image, as qcow2, and behind qemu-nbd.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::machine::Machine;
use super::record::{Column, Record};
use super::watch::{self, Guard};
use crate::guests::Store;
use crate::initramfs;
use crate::layout::{self, Arch};
use crate::process::{describe, need_tool, output, run, say};

/// Size of the disk.
const SIZE: u64 = 256 << 20;
/// For how long qemu-nbd may take to start.
const PATIENCE: Duration = Duration::from_secs(20);

/// The guest, its disk, and the programs.
pub(super) struct Bench {
    kernel: PathBuf,
    initramfs: PathBuf,
    raw: PathBuf,
    qcow2: PathBuf,
    socket: PathBuf,
    nbd: PathBuf,
    /// Seconds for each test.
    seconds: u32,
    memory: u32,
}

/// What the disk is for the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Raw,
    Qcow2,
    Nbd,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Raw, Self::Qcow2, Self::Nbd];

    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Nbd => "nbd",
        }
    }
}

impl Bench {
    /// Builds guest and disks.
    pub(super) fn build(store: &Store, seconds: u32, memory: u32) -> Result<Self> {
        let folder = store.folder("bench-io")?;
        let source = layout::repository().join("bench");
        let [program, initramfs, raw, qcow2, socket] =
            ["io", "initramfs.cpio.gz", "disk.img", "disk.qcow2", "nbd.sock"].map(|name| folder.join(name));
        let compiler = need_tool("gcc", "gcc libc6-dev")?;
        output(
            Command::new(compiler)
                .args(["-O2", "-static", "-Wall", "-Wextra", "-o"])
                .arg(&program)
                .arg(source.join("io.c")),
        )
        .context("cannot build a static program; libc6-dev has what gcc needs for it")?;
        let kernel = store.kernel(Arch::Amd64)?;
        let (busybox, modules) = (store.busybox(Arch::Amd64)?, kernel.with_file_name("modules"));
        initramfs::write(&initramfs::bench_io(&busybox, &modules, &program, &source.join("io-init"))?, &initramfs)?;
        if !raw.exists() {
            say(&format!("building {}", raw.display()));
            let mut file = File::create(&raw).with_context(|| format!("cannot write {}", raw.display()))?;
            // Blocks that are there, not holes.
            for _ in 0..SIZE >> 20 {
                file.write_all(&[0x5a; 1 << 20])?;
            }
        }
        // A fresh one: what is written to it must not change what the next run finds.
        let mut convert = Command::new(need_tool("qemu-img", "qemu-utils")?);
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]).args([&raw, &qcow2]);
        run(&mut convert)?;
        Ok(Self { kernel, initramfs, raw, qcow2, socket, nbd: need_tool("qemu-nbd", "qemu-utils")?, seconds, memory })
    }

    /// Measures all kinds of disks under all machines, once.
    pub(super) fn round(&self, machines: &[(Column, PathBuf)], round: u32, record: &mut Record) -> Result<()> {
        for kind in Kind::ALL {
            let turn = round as usize % machines.len();
            for (column, program) in machines[turn..].iter().chain(&machines[..turn]) {
                // What the run before wrote must not be written to storage during this one.
                run(&mut Command::new("sync"))?;
                let server = (kind == Kind::Nbd).then(|| self.serve()).transpose()?;
                let mut command = self.command(*column, program, kind);
                let outcome = watch::run(&mut command, u64::from(self.memory) << 20)?;
                drop(server);
                if !outcome.done {
                    return Err(outcome.failure(&command));
                }
                record.lines(*column, &outcome.lines, "");
            }
        }
        Ok(())
    }

    fn command(&self, column: Column, program: &Path, kind: Kind) -> Command {
        let words = format!("console=ttyS0 quiet io.seconds={} io.name={}", self.seconds, kind.name());
        let path = match kind {
            Kind::Raw => self.raw.display().to_string(),
            Kind::Qcow2 => self.qcow2.display().to_string(),
            Kind::Nbd => format!("nbd+unix:///disk?socket={}", self.socket.display()),
        };
        let disk = match (column, kind) {
            (Column::Tcg, Kind::Raw) => {
                ["-drive".to_owned(), format!("if=virtio,format=raw,discard=unmap,file={path}")]
            }
            (Column::Tcg, Kind::Qcow2) => {
                ["-drive".to_owned(), format!("if=virtio,format=qcow2,discard=unmap,file={path}")]
            }
            (Column::Tcg, Kind::Nbd) => ["-drive".to_owned(), format!("if=virtio,format=raw,file={path}")],
            _ => ["-s".to_owned(), format!("4,virtio-blk,{path}")],
        };
        let (kernel, initramfs, words) = (&self.kernel, &self.initramfs, &words);
        Machine { column, program, cpus: 1, memory: self.memory, kernel, initramfs, words }.command(disk)
    }

    /// A qemu-nbd that has the raw image.
    fn serve(&self) -> Result<Guard> {
        let _ = fs::remove_file(&self.socket);
        let mut command = Command::new(&self.nbd);
        command.args(["--persistent", "--format=raw", "--export-name=disk", "--socket"]);
        let child = command.arg(&self.socket).arg(&self.raw).spawn();
        let server = Guard(child.with_context(|| format!("cannot start {}", describe(&command)))?);
        let start = Instant::now();
        while UnixStream::connect(&self.socket).is_err() {
            if start.elapsed() > PATIENCE {
                bail!("qemu-nbd does not listen on {}", self.socket.display());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_machines_get_the_same_disk() {
        let path = |name: &str| PathBuf::from(format!("/g/{name}"));
        let bench = Bench {
            kernel: path("k"),
            initramfs: path("i"),
            raw: path("r"),
            qcow2: path("q"),
            socket: path("s"),
            nbd: path("n"),
            seconds: 3,
            memory: 256,
        };
        for (kind, disk) in [(Kind::Raw, "/g/r"), (Kind::Qcow2, "/g/q"), (Kind::Nbd, "nbd+unix:///disk?socket=/g/s")] {
            let words = format!("io.seconds=3 io.name={}", kind.name());
            for column in [Column::Tcg, Column::Bhyve] {
                let line = describe(&bench.command(column, Path::new("m"), kind));
                for part in [disk, &words, "/g/k", "/g/i"] {
                    assert!(line.contains(part), "{part}: {line}");
                }
            }
        }
    }
}
