//! Project tasks, run as `cargo xtask COMMAND`: fetch and build guests, boot one, test everything, compare speeds.
//!
//! Everything works as an ordinary user on Debian or Ubuntu; nothing outside the repository is
//! written. See [`layout`] for where the guests' files are.

mod apt;
mod bench;
mod boot;
mod cpio;
mod deb;
mod debian;
mod disk;
mod firmware;
mod fuzz;
mod guests;
mod initramfs;
mod iso;
mod layout;
mod modinfo;
mod process;
mod sources;
mod test;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
usage: cargo xtask COMMAND

  boot [--arch amd64|i386] [--cpus N] [--memory SIZE] [--append WORDS] [--test NAME] [--qemu] [-- BHYVE ARGUMENTS]
      Build bhyve, get a Debian guest with a disk, boot it to a shell on this terminal.
      --append  more words for the guest kernel's command line
      --test    run the guest script xtask/guest/tests/NAME instead of a shell
      --qemu    boot the same guest with QEMU's software CPU, to compare
  test
      Check formatting and lints, run all tests, those that boot guests included.
  bench [--only LIST] [--rounds N] [--div N] [--smp] [--real] [--io] [--firmware] [--seconds N] [--memory MIB] [--no-peer] [--json FILE] [-- BHYVE ARGUMENTS]
      Run the same guests in turn natively (their programs), under QEMU's software CPU and under bhyve's; print a table.
      --only    groups (boot int fp simd mem os i386 smp idle real) or workloads (int_fib, real_sqlite), separated by commas
      --rounds  how often; the table has medians (5)
      --div     divides the work, for a quick look
      --smp     two virtual CPUs too
      --io      disks and networks instead (or one: --only io, --only net), N seconds (2) for each test
      --firmware from OVMF's start to GRUB's menu instead
      --real    a Debian guest with ordinary programs too
      --no-peer without QEMU
  fuzz DEVICE|all [SECONDS] [--seed N]
      Run random drivers of a virtio device with new seeds each time (60 seconds): balloon blk console input net p9 rnd scsi vsock.
  guest NAME...
      Get or build parts of the guests and print their paths:
      kernel-amd64 kernel-i386 initramfs-amd64 initramfs-i386 memtest disk debian debian-i386 bench bench-real
      ovmf bhyve-firmware efi-disk installer-iso netboot, or all (all but debian-i386 and the benchmarks). debian and
      debian-i386 are installed systems on a disk of their own.

The guests are kept in guests/ (another folder: BHYVE_GUESTS) and fetched once; remove the folder to get
newer ones. They come from the Debian mirror that this machine uses (another one: BHYVE_DEBIAN_MIRROR).";

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let command = args.next().unwrap_or_default();
    match run(&command, args.collect()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &OsString, args: Vec<OsString>) -> Result<ExitCode> {
    match command.to_str() {
        Some("boot") => boot::run(boot::Options::parse(args)?),
        Some("bench") => bench::run(bench::Options::parse(args)?),
        Some("fuzz") => fuzz::run(&fuzz::Options::parse(args)?),
        Some("test") if args.is_empty() => test::run(),
        Some("guest") if !args.is_empty() => guest(&args),
        Some("help" | "-h" | "--help") => {
            println!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        _ => bail!("no such task\n{USAGE}"),
    }
}

fn guest(names: &[OsString]) -> Result<ExitCode> {
    let store = guests::Store::open()?;
    for name in names {
        let name = name.to_string_lossy();
        for path in store.by_name(&name)? {
            println!("{}", path.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}
