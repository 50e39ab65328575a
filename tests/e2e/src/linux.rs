//! The Debian guests of `cargo xtask guest all` and their shell.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::{Bhyve, Vm, files};

/// The prompt of the guest's shell.
pub const PROMPT: &str = "/ # ";

/// The host's CPUs that running guests occupy.
static TAKEN: Mutex<u32> = Mutex::new(0);
static FREED: Condvar = Condvar::new();

/// The host's CPUs.
pub fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| count.get().try_into().unwrap_or(u32::MAX))
}

/// The right to run a guest: starved ones tell little, so each gets as many of the host's CPUs as it has itself, or all.
struct Permit(u32);

impl Permit {
    fn wait(cpus: u32) -> Self {
        let cpus = cpus.min(host_cpus());
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken + cpus > host_cpus() {
            taken = FREED.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken += cpus;
        Self(cpus)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *TAKEN.lock().unwrap_or_else(PoisonError::into_inner) -= self.0;
        FREED.notify_all();
    }
}

/// A Debian guest and the machine it gets.
pub struct Linux {
    arch: &'static str,
    cpus: u32,
    memory: &'static str,
    words: String,
    disk: Option<String>,
    devices: Vec<String>,
    keys: Vec<String>,
}

impl Linux {
    /// The cloud kernel for amd64.
    pub fn amd64() -> Self {
        Self {
            arch: "amd64",
            cpus: 1,
            memory: "512M",
            words: "console=ttyS0".into(),
            disk: None,
            devices: Vec::new(),
            keys: Vec::new(),
        }
    }

    /// Debian's ordinary kernel for amd64, with modules for shared folders, consoles, and more.
    pub fn generic() -> Self {
        Self { arch: "generic", ..Self::amd64() }
    }

    /// The 686-pae kernel.
    pub fn i386() -> Self {
        Self { arch: "i386", ..Self::amd64() }
    }

    /// Number of vCPUs; one otherwise.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Size of RAM; 512 MB otherwise.
    #[must_use]
    pub fn memory(mut self, memory: &'static str) -> Self {
        self.memory = memory;
        self
    }

    /// More words for the kernel's command line.
    #[must_use]
    pub fn words(mut self, words: &str) -> Self {
        self.words = format!("{} {words}", self.words);
        self
    }

    /// Sets a key of the configuration, in the form `key=value`.
    #[must_use]
    pub fn key(mut self, assignment: &str) -> Self {
        self.keys.push(assignment.to_owned());
        self
    }

    /// Gives it `disk`, with more options behind commas.
    #[must_use]
    pub fn disk(mut self, disk: &Path, options: &str) -> Self {
        self.disk = Some(format!("4,virtio-blk,{}{options}", disk.display()));
        self
    }

    /// Adds a device, as behind `-s`. Slots 0, 4, 5 and 31 are taken.
    #[must_use]
    pub fn device(mut self, device: &str) -> Self {
        self.devices.push(device.to_owned());
        self
    }

    fn file(&self, name: &str) -> PathBuf {
        files::guest_file(&name.replace("ARCH", self.arch))
    }

    /// The command line.
    ///
    /// # Panics
    /// The program or the guest's files are missing.
    pub fn bhyve(&self) -> Bhyve {
        let (cpus, cmdline) = (self.cpus.to_string(), format!("kernel.cmdline={}", self.words));
        let kernel = format!("kernel.image={}", self.file("kernel-ARCH/vmlinuz").display());
        let initrd = format!("kernel.initrd={}", self.file("initramfs-ARCH.cpio.gz").display());
        let mut args = vec!["-A", "-H", "-P", "-c", &cpus, "-m", self.memory, "-l", "com1,stdio"];
        for slot in ["0,hostbridge", "31,lpc", "5,virtio-rnd"] {
            args.extend(["-s", slot]);
        }
        for device in self.disk.iter().chain(&self.devices) {
            args.extend(["-s", device]);
        }
        for key in [&kernel, &initrd, &cmdline].into_iter().chain(&self.keys) {
            args.extend(["-o", key]);
        }
        Bhyve::new(args).arg("linux")
    }

    /// Starts it, when not too many others run.
    ///
    /// # Panics
    /// The program or the guest's files are missing.
    pub fn start(&self) -> Guest {
        Guest::start(&self.bhyve(), self.cpus)
    }

    /// Starts it and waits for the prompt of its shell.
    ///
    /// # Panics
    /// Something is missing, or the prompt does not come.
    pub fn boot(&self) -> Guest {
        let mut guest = self.start();
        guest.wait_for(PROMPT);
        println!("{} with {} CPUs: shell after {:.1} s", self.arch, self.cpus, guest.age().as_secs_f64());
        guest
    }
}

/// A running guest; a [`Vm`] that counts among those that run.
pub struct Guest {
    vm: Vm,
    _permit: Permit,
}

impl Guest {
    /// Starts `bhyve` with so many vCPUs when not too many other guests run. A test that has several at a time names the
    /// sum for the first and 0 for the others: two tests that each have one and wait for another would wait for ever.
    ///
    /// # Panics
    /// It does not start.
    pub fn start(bhyve: &Bhyve, cpus: u32) -> Self {
        let permit = Permit::wait(cpus);
        Self { vm: bhyve.start(), _permit: permit }
    }

    /// Runs `command` in the guest's shell; returns what it printed and its exit status.
    ///
    /// # Panics
    /// It does not end.
    pub fn shell_status(&mut self, command: &str) -> (String, i32) {
        // The echo of the command must not look like the end of its output.
        self.send(&format!("{command}; echo \"STATUS\"\"=$?\"\n"));
        let mut output = self.wait_for("STATUS=");
        let status = self.wait_for("\n");
        self.wait_for(PROMPT);
        output.truncate(output.len() - "STATUS=".len());
        let output = output.split_once('\n').map(|(_echo, output)| output.to_owned()).unwrap_or_default();
        let status = status.trim().parse().unwrap_or_else(|_| self.fail(&format!("{status:?} is no exit status")));
        (output, status)
    }

    /// Runs `command` in the guest's shell, which must succeed; returns what it printed.
    ///
    /// # Panics
    /// It fails.
    pub fn shell(&mut self, command: &str) -> String {
        let (output, status) = self.shell_status(command);
        self.check(status == 0, &format!("{command:?} failed in the guest with status {status}"));
        output
    }
}

impl Deref for Guest {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        &self.vm
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Vm {
        &mut self.vm
    }
}
