//! UEFI firmware, bhyve's own and Debian's OVMF: what people have installed boots through it.

use std::fs;
use std::path::{Path, PathBuf};

use e2e::linux::{Guest, PROMPT};
use e2e::{Bhyve, Debian, debian, files};

/// A firmware and a private copy of its variables, if they are in a file of their own.
struct Firmware {
    code: PathBuf,
    vars: Option<PathBuf>,
}

impl Firmware {
    fn new(folder: &Path, code: &str, vars: &str) -> Self {
        let copy = folder.join("vars.fd");
        fs::copy(files::guest_file(vars), &copy).unwrap();
        Self { code: files::guest_file(code), vars: Some(copy) }
    }

    fn ovmf(folder: &Path) -> Self {
        Self::new(folder, "ovmf/OVMF_CODE_4M.fd", "ovmf/OVMF_VARS_4M.fd")
    }

    fn secure(folder: &Path) -> Self {
        Self::new(folder, "ovmf/OVMF_CODE_4M.fd", "ovmf/OVMF_VARS_4M.ms.fd")
    }

    fn bhyve(folder: &Path) -> Self {
        Self::new(folder, "bhyve-firmware/BHYVE_CODE.fd", "bhyve-firmware/BHYVE_VARS.fd")
    }

    /// What follows `-l bootrom,`.
    fn files(&self) -> String {
        let vars = self.vars.as_ref().map(|vars| format!(",{}", vars.display()));
        format!("{}{}", self.code.display(), vars.unwrap_or_default())
    }

    fn start(&self, args: &[&str]) -> Guest {
        let bootrom = format!("bootrom,{}", self.files());
        let board =
            ["-A", "-H", "-P", "-m", "1G", "-s", "0,hostbridge", "-s", "31,lpc", "-l", "com1,stdio", "-l", &bootrom];
        Guest::start(&Bhyve::new(board.iter().chain(args)).arg("firmware"), 1)
    }

    /// Starts from the disk with Debian's boot loaders, which the guest does not write to, until GRUB shows its menu.
    fn menu(&self) -> Guest {
        let disk = format!("4,virtio-blk,{},ro", files::guest_file("efi-disk.img").display());
        let mut guest = self.start(&["-s", &disk]);
        guest.wait_for("*linux");
        guest
    }

    /// Starts the shell, which comes where there is nothing else to boot.
    fn shell(&self) -> Guest {
        let mut guest = self.start(&[]);
        guest.wait_for("Shell> ");
        guest
    }
}

/// Key of a menu: the next entry.
const DOWN: &str = "\x1b[B";

/// What is set in the firmware's shell is there after the process has ended and another has begun.
fn variables_are_kept(firmware: &Firmware) {
    const VARIABLE: &str = "E2eTest -guid 6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    let mut guest = firmware.shell();
    guest.send(&format!("setvar {VARIABLE} -nv -bs -rt =0x48656c6c6f\r"));
    guest.wait_for("Shell> ");
    guest.send("reset\r");
    guest.expect_exit(0);
    drop(guest);

    let mut guest = firmware.shell();
    guest.send(&format!("setvar {VARIABLE}\r"));
    guest.wait_for("6F 6C 6C 65 48");
    guest.wait_for("Shell> ");
    guest.send("reset -s\r");
    guest.expect_exit(1);
}

#[test]
fn ovmfs_shell_keeps_variables() {
    let folder = files::scratch();
    variables_are_kept(&Firmware::ovmf(folder.path()));
}

#[test]
fn bhyves_shell_keeps_variables() {
    let folder = files::scratch();
    variables_are_kept(&Firmware::bhyve(folder.path()));
}

/// An installed Debian, through firmware and GRUB to a login: it works on its disk, restarts through the firmware, and finds the boot
/// entries that it made after another process has begun.
fn debian_lives_with(firmware: &Firmware, cpus: u32) {
    let machine = Debian::amd64().cpus(cpus).firmware(&firmware.files()).build();
    let mut guest = machine.boot();
    assert_eq!(guest.shell("nproc").trim(), cpus.to_string());
    assert_eq!(guest.shell("cat /sys/firmware/efi/fw_platform_size").trim(), "64");
    assert_eq!(guest.shell("dmidecode -s system-product-name").trim(), "BHYVE");
    guest.shell("efibootmgr --create --disk /dev/vda --part 1 --label Mine --loader '\\EFI\\BOOT\\BOOTX64.EFI'");
    guest.shell(
        "dd if=/dev/urandom of=/var/tmp/noise bs=1M count=32 status=none && md5sum /var/tmp/noise >/var/tmp/sum",
    );
    guest.send("reboot\n");
    guest.expect_exit(0);
    drop(guest);

    let mut guest = machine.boot();
    let entries = guest.shell("efibootmgr --verbose");
    guest.check(entries.contains("Mine"), "the boot entry is gone");
    guest.check(entries.contains("BootCurrent"), "the firmware does not say what it booted");
    guest.shell("md5sum --check --quiet /var/tmp/sum");
    debian::power_off(&mut guest);
    files::check_root_file_system(machine.disk());
}

#[test]
fn debian_boots_through_ovmf() {
    let folder = files::scratch();
    debian_lives_with(&Firmware::ovmf(folder.path()), 2);
}

#[test]
fn debian_boots_through_bhyves_firmware() {
    let folder = files::scratch();
    debian_lives_with(&Firmware::bhyve(folder.path()), 4);
}

/// OVMF's other board, with one CPU and memory beyond where that board's memory-mapped configuration is.
#[test]
fn debian_boots_on_a_q35() {
    let folder = files::scratch();
    let machine = Debian::amd64()
        .memory("4G")
        .firmware(&Firmware::ovmf(folder.path()).files())
        .args(&["-o", "pci.0.0.0.compat=q35"])
        .build();
    let mut guest = machine.boot();
    assert_eq!(guest.shell("nproc").trim(), "1");
    let bridge = guest.shell("lspci -n -s 0:0.0");
    guest.check(bridge.contains("8086:29c0"), &bridge);
    // Where the firmware put it, 35:28 of the address and the enable bit.
    let register = guest.shell("setpci -s 0:0.0 60.l");
    guest.check(register.trim().ends_with("0000001"), &register);
    let memory: u64 = guest.shell("awk '/MemTotal/ { print $2 }' /proc/meminfo").trim().parse().unwrap();
    guest.check((3_700_000..=4 << 20).contains(&memory), &format!("{memory} KiB of memory"));
    debian::power_off(&mut guest);
}

/// With Microsoft's and Debian's keys enrolled, Debian's signed shim, GRUB and kernel run, and a kernel with a byte changed does not.
#[test]
fn secure_boot_refuses_what_is_not_signed() {
    let folder = files::scratch();
    let firmware = Firmware::secure(folder.path());
    let mut guest = firmware.menu();
    guest.send(&format!("{DOWN}\r"));
    guest.wait_for("bad shim signature");
    drop(guest);

    let mut guest = firmware.menu();
    guest.send("\r");
    guest.wait_for(PROMPT);
    let log = guest.shell("dmesg");
    guest.check(log.contains("secureboot: Secure boot enabled"), "secure boot is off");
    guest.send("reboot -f\n");
    guest.expect_exit(0);
}

/// Code and variables of the firmware are in one file.
#[test]
fn firmware_in_one_file_starts_grub() {
    Firmware { code: files::guest_file("bhyve-firmware/BHYVE.fd"), vars: None }.menu();
}

/// From an ISO image without a partition table: only its El Torito boot catalogue leads to the boot loader.
#[test]
fn debians_installer_starts_from_an_iso_image() {
    let folder = files::scratch();
    let medium = format!("4,virtio-blk,{},ro", files::guest_file("installer.iso").display());
    let mut guest = Firmware::ovmf(folder.path()).start(&["-s", &medium]);
    guest.wait_for("*installer");
    guest.send("\r");
    guest.wait_for("Select a language");
}
