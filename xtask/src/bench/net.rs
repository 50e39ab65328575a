//! `--io`: iperf3 of an installed Debian in turn under bhyve and under QEMU, both ways, through user-mode networking and
//! through a tap device.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::machine::Machine;
use super::record::{Column, Record};
use super::watch::{self, Guard};
use crate::guests::Store;
use crate::initramfs;
use crate::layout::{self, Arch};
use crate::process::{describe, need_tool, output, say};

/// The tap device, and the host's and the guest's address on it.
const TAP: (&str, &str, &str) = ("tapbench0", "192.168.234.1", "192.168.234.2");

/// The guest and the programs.
pub(super) struct Bench {
    kernel: PathBuf,
    initramfs: PathBuf,
    disk: PathBuf,
    iperf3: PathBuf,
    /// Seconds for each test.
    seconds: u32,
    memory: u32,
    tap: Option<Tap>,
}

/// What the NIC is plugged into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Slirp,
    Tap,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Slirp => "slirp",
            Self::Tap => "tap",
        }
    }

    /// The guest's address, that of the host as the guest sees it, and where the host listens.
    fn addresses(self) -> [&'static str; 3] {
        match self {
            Self::Slirp => ["10.0.2.15", "10.0.2.2", "127.0.0.1"],
            Self::Tap => [TAP.2, TAP.1, TAP.1],
        }
    }
}

impl Bench {
    /// Builds the guest.
    pub(super) fn build(store: &Store, seconds: u32, memory: u32) -> Result<Self> {
        let iperf3 = need_tool("iperf3", "iperf3")?;
        let folder = store.folder("bench-net")?;
        let initramfs = folder.join("initramfs.cpio.gz");
        let kernel = store.kernel(Arch::Amd64)?;
        let (busybox, modules) = (store.busybox(Arch::Amd64)?, kernel.with_file_name("modules"));
        let init = layout::repository().join("bench/net-init");
        initramfs::write(&initramfs::bench_net(&busybox, &modules, &init)?, &initramfs)?;
        let files = store.by_name("debian-amd64")?;
        let disk = files.into_iter().next().context("the installed Debian has a disk")?;
        let tap = Tap::make().inspect_err(|why| say(&format!("left out: tap devices: {why:#}"))).ok();
        Ok(Self { kernel, initramfs, disk, iperf3, seconds, memory, tap })
    }

    /// Measures all networks under all machines, once.
    pub(super) fn round(&self, machines: &[(Column, PathBuf)], round: u32, record: &mut Record) -> Result<()> {
        for kind in [Kind::Slirp].into_iter().chain(self.tap.as_ref().map(|_| Kind::Tap)) {
            let (_server, port) = self.serve(kind)?;
            let turn = round as usize % machines.len();
            for (column, program) in machines[turn..].iter().chain(&machines[..turn]) {
                let mut command = self.command(*column, program, kind, port);
                let outcome = watch::run(&mut command, u64::from(self.memory) << 20)?;
                if !outcome.done {
                    return Err(outcome.failure(&command));
                }
                record.lines(*column, &outcome.lines, "");
            }
        }
        Ok(())
    }

    fn command(&self, column: Column, program: &Path, kind: Kind, port: u16) -> Command {
        let [guest, host, _] = kind.addresses();
        let words = format!(
            "console=ttyS0 quiet net.address={guest} net.host={host} net.port={port} net.seconds={} net.name={}",
            self.seconds,
            kind.name()
        );
        let disk = self.disk.display();
        let devices = if column == Column::Tcg {
            let network = match kind {
                Kind::Slirp => "user,model=virtio-net-pci".to_owned(),
                Kind::Tap => format!("tap,ifname={},script=no,downscript=no,model=virtio-net-pci", TAP.0),
            };
            let disk = format!("if=virtio,format=raw,readonly=on,file.locking=off,file={disk}");
            ["-drive".to_owned(), disk, "-nic".to_owned(), network]
        } else {
            let network = match kind {
                Kind::Slirp => "6,virtio-net,slirp,open".to_owned(),
                Kind::Tap => format!("6,virtio-net,{}", TAP.0),
            };
            ["-s".to_owned(), format!("4,virtio-blk,{disk},ro,lock=off"), "-s".to_owned(), network]
        };
        let (kernel, initramfs, words) = (&self.kernel, &self.initramfs, &words);
        Machine { column, program, cpus: 1, memory: self.memory, kernel, initramfs, words }.command(devices)
    }

    /// An iperf3 that serves one client after the other, and its port.
    fn serve(&self, kind: Kind) -> Result<(Guard, u16)> {
        let [.., address] = kind.addresses();
        // Nobody else takes it in the meantime, most likely: the kernel goes round.
        let port = TcpListener::bind((address, 0)).context("cannot listen")?.local_addr()?.port();
        let mut command = Command::new(&self.iperf3);
        command.args(["--server", "--bind", address, "--port", &port.to_string()]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok((Guard(child.with_context(|| format!("cannot start {}", describe(&command)))?), port))
    }
}

/// The tap device; goes with the value.
struct Tap;

impl Tap {
    fn make() -> Result<Self> {
        let ip = need_tool("ip", "iproute2")?;
        let run = |words: &str| output(Command::new(&ip).args(words.split(' ')));
        run(&format!("tuntap add {} mode tap", TAP.0))?;
        let tap = Self;
        run(&format!("addr add {}/24 dev {}", TAP.1, TAP.0))?;
        run(&format!("link set {} up", TAP.0))?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // Somebody may have removed it.
        let _ = Command::new("ip").args(["link", "delete", TAP.0]).status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_machines_get_the_same_network() {
        let path = |name: &str| PathBuf::from(format!("/g/{name}"));
        let bench = Bench {
            kernel: path("k"),
            initramfs: path("i"),
            disk: path("d"),
            iperf3: path("iperf3"),
            seconds: 3,
            memory: 256,
            tap: None,
        };
        for kind in [Kind::Slirp, Kind::Tap] {
            let words = format!("net.port=77 net.seconds=3 net.name={}", kind.name());
            let network = if kind == Kind::Tap { TAP.0 } else { "virtio-net" };
            for column in [Column::Tcg, Column::Bhyve] {
                let line = describe(&bench.command(column, Path::new("m"), kind, 77));
                for part in ["/g/d", network, &words, "/g/k", "/g/i", "virtio-net"] {
                    assert!(line.contains(part), "{part}: {line}");
                }
            }
        }
    }
}
