//! A TPM in the guest, by Debian's swtpm.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use e2e::{Bhyve, Debian, PATIENCE, debian, files};

/// A swtpm that ends with the value.
struct Swtpm(Child);

impl Swtpm {
    /// Starts one in `folder`; returns it and its socket.
    fn start(folder: &Path) -> (Self, PathBuf) {
        let socket = folder.join("swtpm.sock");
        let mut command = Command::new("swtpm");
        command.args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate"]);
        command.arg(format!("dir={}", folder.display()));
        command.arg("--server").arg(format!("type=unixio,path={}", socket.display()));
        let child = command.stdin(Stdio::null()).spawn();
        let swtpm = Self(child.unwrap_or_else(|why| panic!("cannot run swtpm ({why}): install it")));
        let started = Instant::now();
        while !socket.exists() {
            assert!(started.elapsed() < PATIENCE, "swtpm makes no socket");
            std::thread::yield_now();
        }
        (swtpm, socket)
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn linux_gets_random_numbers_and_extends_registers() {
    let folder = files::scratch();
    let (_swtpm, socket) = Swtpm::start(folder.path());
    let machine = Debian::amd64().args(&["-l", &format!("tpm,swtpm,{}", socket.display())]).build();
    let mut guest = machine.boot();
    // The driver's messages, should anything fail.
    guest.shell("modprobe tpm_crb; dmesg | grep -i tpm; ls -l /dev/tpm0 /dev/tpmrm0");
    let random = guest.shell("tpm2_getrandom --hex 16");
    let again = guest.shell("tpm2_getrandom --hex 16");
    let is_hex = |text: &str| text.trim().len() == 32 && text.trim().bytes().all(|byte| byte.is_ascii_hexdigit());
    guest.check(is_hex(&random) && is_hex(&again) && random != again, &format!("{random:?}, {again:?}"));

    let zero = "0".repeat(64);
    let read = guest.shell("tpm2_pcrread sha256:16");
    guest.check(read.contains(&format!("0x{zero}")), &read);
    guest.shell(&format!("tpm2_pcrextend 16:sha256={zero}"));
    let read = guest.shell("tpm2_pcrread sha256:16");
    // SHA-256 of 64 zero bytes.
    guest
        .check(read.to_lowercase().contains("f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"), &read);
    // Longer than a page of a pipe, and an object that is made, used and flushed.
    guest.shell("cd /tmp && tpm2_createprimary -Q -C o -c primary.ctx && echo data >message && tpm2_hash -C o -g sha256 -o digest message");
    debian::power_off(&mut guest);
}

/// Firmware measures what it starts, finds the physical presence interface, and says which operations it would carry out.
#[test]
fn ovmf_measures_and_offers_physical_presence() {
    let folder = files::scratch();
    let (_swtpm, socket) = Swtpm::start(folder.path());
    let vars = folder.path().join("vars.fd");
    std::fs::copy(files::guest_file("ovmf/OVMF_VARS_4M.fd"), &vars).unwrap();
    let rom = format!("{},{}", files::guest_file("ovmf/OVMF_CODE_4M.fd").display(), vars.display());
    let tpm = format!("tpm,swtpm,{}", socket.display());
    let mut guest = Debian::amd64().firmware(&rom).args(&["-l", &tpm]).build().boot();
    guest.shell("modprobe tpm_crb");
    let operations = guest.shell("cat /sys/class/tpm/tpm0/ppi/tcg_operations");
    // "5 4: User not required" or the like: number 5 clears the TPM.
    guest.check(operations.lines().any(|line| line.starts_with("5 ")), &operations);
    let area = guest.shell("od -An -tx4 -j64 -N12 /sys/firmware/acpi/tables/TPM2");
    let words: Vec<_> = area.split_whitespace().collect();
    guest.check(matches!(words[..], ["00010000", low, "00000000"] if low != "00000000"), &area);
    let registers = guest.shell("tpm2_pcrread sha256:0,4");
    guest.check(registers.contains("0 : 0x") && !registers.contains(&"0".repeat(64)), &registers);
    debian::power_off(&mut guest);
}

#[test]
fn what_cannot_be_a_tpm_ends_with_code_4() {
    for (argument, wanted) in [
        ("tpm,tis,/dev/tpm0", "Failed to init TPM device: unknown TPM type \"tis\""),
        ("tpm,swtpm,/nowhere/socket", "cannot connect to swtpm at /nowhere/socket"),
        ("tpm,passthru,/dev/null/tpm0", "cannot open the TPM device /dev/null/tpm0"),
        ("tpm,swtpm,/x,version=1.2", "unsupported TPM version \"1.2\""),
        ("tpm,swtpm,/x,intf=tis", "unsupported TPM interface \"tis\""),
        ("tpm,swtpm", "invalid tpm path \"tpm,swtpm\""),
    ] {
        let folder = files::scratch();
        let outcome = Bhyve::small(folder.path(), &["-l", argument]).run();
        assert_eq!(outcome.status.code(), Some(4), "{argument}: {outcome:?}");
        assert!(outcome.stderr.contains(wanted), "{argument}: {}", outcome.stderr);
    }
}
