//! Installed Debian systems (`cargo xtask guest debian`), for tests that need a whole Linux with systemd and tools.
//!
//! A [`Machine`] is a command line of bhyve and a private copy of the system's disk, which lives as long as the machine:
//! what the guest writes is there when the machine is started again.
//!
//! ```no_run
//! let machine = e2e::Debian::amd64().cpus(2).args(&["-s", "6,virtio-console,port=/run/x"]).build();
//! let mut guest = machine.boot(); // until root has logged in over the serial line
//! assert_eq!(guest.shell("nproc").trim(), "2"); // fails unless its exit status is 0
//! let (_output, status) = guest.shell_status("test -e /nowhere");
//! assert_eq!(status, 1);
//! e2e::debian::power_off(&mut guest);
//! ```
//!
//! Without [`Debian::firmware`] the kernel is started directly. The guest has fio, iperf3, qemu-guest-agent, efibootmgr,
//! dmidecode, acpica-tools, tpm2-tools, numactl, lspci, socat, python3 and curl; network cards get an address by DHCP.
//! The disk has about 2 GB of free space.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::linux::{Guest, PROMPT};
use crate::{Bhyve, files};

/// An installed Debian and the machine that it gets.
pub struct Debian {
    arch: &'static str,
    cpus: u32,
    topology: Option<String>,
    memory: String,
    words: String,
    disk: String,
    firmware: Option<String>,
    args: Vec<String>,
}

impl Debian {
    /// The amd64 system with the cloud kernel: one vCPU, 1 GB of RAM, its disk on virtio-blk.
    pub fn amd64() -> Self {
        Self {
            arch: "amd64",
            cpus: 1,
            topology: None,
            memory: "1G".into(),
            words: "root=LABEL=root ro console=ttyS0 quiet".into(),
            disk: "virtio-blk".into(),
            firmware: None,
            args: Vec::new(),
        }
    }

    /// The i386 system with the 686-pae kernel (`cargo xtask guest debian-i386`).
    pub fn i386() -> Self {
        Self { arch: "i386", ..Self::amd64() }
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// What `-c` says; [`Self::cpus`] has to be told the number of vCPUs too.
    #[must_use]
    pub fn topology(mut self, topology: &str) -> Self {
        self.topology = Some(topology.to_owned());
        self
    }

    /// Size of RAM, as for `-m`.
    #[must_use]
    pub fn memory(mut self, memory: &str) -> Self {
        memory.clone_into(&mut self.memory);
        self
    }

    /// More words for the kernel's command line where it is started directly.
    #[must_use]
    pub fn words(mut self, words: &str) -> Self {
        self.words = format!("{} {words}", self.words);
        self
    }

    /// The emulation that has the system's disk in slot 4, such as `nvme`.
    #[must_use]
    pub fn disk(mut self, emulation: &str) -> Self {
        emulation.clone_into(&mut self.disk);
        self
    }

    /// Boots from firmware: `bootrom` is what follows `-l bootrom,`.
    #[must_use]
    pub fn firmware(mut self, bootrom: &str) -> Self {
        self.firmware = Some(bootrom.to_owned());
        self
    }

    /// More arguments. Slots 0, 4, 5 and 31 are taken.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// Gives it a copy of the disk.
    ///
    /// # Panics
    /// The guest's files are missing, or there is no room.
    pub fn build(self) -> Machine {
        let folder = files::scratch();
        let disk = folder.path().join("disk.img");
        files::copy_sparse(&files::guest_file(&format!("debian-{}/disk.img", self.arch)), &disk);
        Machine { debian: self, folder, disk }
    }
}

/// A Debian with a disk of its own.
pub struct Machine {
    debian: Debian,
    folder: TempDir,
    disk: PathBuf,
}

impl Machine {
    /// A folder that goes with the machine, in which bhyve is started.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The system's disk.
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    /// The command line.
    pub fn bhyve(&self) -> Bhyve {
        let Debian { arch, cpus, topology, memory, words, disk, firmware, args } = &self.debian;
        let mut all: Vec<String> = ["-A", "-H", "-P", "-m", memory, "-l", "com1,stdio"].map(str::to_owned).into();
        all.extend(["-c".to_owned(), topology.clone().unwrap_or_else(|| cpus.to_string())]);
        let disk = format!("4,{disk},{}", self.disk.display());
        for slot in ["0,hostbridge", &disk, "5,virtio-rnd", "31,lpc"] {
            all.extend(["-s".to_owned(), slot.to_owned()]);
        }
        if let Some(bootrom) = firmware {
            all.extend(["-l".to_owned(), format!("bootrom,{bootrom}")]);
        } else {
            let file = |name| files::guest_file(&format!("debian-{arch}/{name}")).display().to_string();
            let (image, initrd) = (file("vmlinuz"), file("initrd.img"));
            let keys = [("image", &image), ("initrd", &initrd), ("cmdline", words)];
            all.extend(keys.into_iter().flat_map(|(key, value)| ["-o".to_owned(), format!("kernel.{key}={value}")]));
        }
        Bhyve::new(all.iter().chain(args)).arg("debian").in_folder(self.folder())
    }

    /// Starts it, when not too many others run.
    ///
    /// # Panics
    /// The program or the guest's files are missing.
    pub fn start(&self) -> Guest {
        Guest::start(&self.bhyve(), self.debian.cpus)
    }

    /// Starts it and logs in.
    ///
    /// # Panics
    /// Something is missing, or the login prompt does not come.
    pub fn boot(&self) -> Guest {
        let mut guest = self.start();
        log_in(&mut guest);
        println!(
            "Debian {}, {} CPUs: shell after {:.1} s",
            self.debian.arch,
            self.debian.cpus,
            guest.age().as_secs_f64()
        );
        guest
    }
}

/// Waits for the login prompt on the serial line and logs root in.
///
/// # Panics
/// It does not come.
pub fn log_in(guest: &mut Guest) {
    guest.wait_for("debian login: ");
    guest.send("root\n");
    guest.wait_for(":~# ");
    // A shell without line editing; kernel messages stay out of commands' output.
    guest.send(&format!("dmesg -n 1; cd /; exec env TERM=dumb PS1='{PROMPT}' sh\n"));
    // The first one is the echo's.
    guest.wait_for(PROMPT);
    guest.wait_for(PROMPT);
}

/// Shuts the system down; the process has to end as after a power-off.
///
/// # Panics
/// It does not.
pub fn power_off(guest: &mut Guest) {
    guest.send("poweroff\n");
    guest.expect_exit(1);
}
