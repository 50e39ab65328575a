//! `cargo xtask boot`: a Debian guest on this terminal.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};

use anyhow::{Context, Result, bail};

use crate::guests::{Guest, Store};
use crate::layout::{self, Arch};
use crate::process::{cargo, describe, need_tool, run as run_to_end, run_watched, say};

/// What to boot, and with what.
#[derive(Debug, PartialEq)]
pub(crate) struct Options {
    arch: Arch,
    cpus: u32,
    memory: String,
    append: String,
    test: Option<String>,
    qemu: bool,
    extra: Vec<OsString>,
}

impl Options {
    pub(crate) fn parse(args: Vec<OsString>) -> Result<Self> {
        use lexopt::prelude::*;
        let mut options = Self {
            arch: Arch::Amd64,
            cpus: 1,
            memory: "512M".to_owned(),
            append: String::new(),
            test: None,
            qemu: false,
            extra: Vec::new(),
        };
        let end = args.iter().position(|word| word == "--").unwrap_or(args.len());
        options.extra = args.iter().skip(end + 1).cloned().collect();
        let mut parser = lexopt::Parser::from_args(args.into_iter().take(end));
        while let Some(arg) = parser.next()? {
            match arg {
                Long("arch") => options.arch = parser.value()?.string()?.parse()?,
                Long("cpus") => options.cpus = parser.value()?.parse()?,
                Long("memory") => options.memory = parser.value()?.string()?,
                Long("append") => options.append = parser.value()?.string()?,
                Long("test") => options.test = Some(parser.value()?.string()?),
                Long("qemu") => options.qemu = true,
                _ => return Err(arg.unexpected().into()),
            }
        }
        Ok(options)
    }

    fn kernel_words(&self) -> String {
        let mut words = "console=ttyS0".to_owned();
        let terminal = rustix::termios::tcgetwinsize(std::io::stdout()).ok();
        let terminal = terminal.filter(|size| size.ws_row != 0 && size.ws_col != 0);
        match (&self.test, terminal) {
            (Some(test), _) => words += &format!(" guest.run={test}"),
            (None, Some(size)) => words += &format!(" guest.tty={}x{}", size.ws_row, size.ws_col),
            (None, None) => {}
        }
        if !self.append.is_empty() {
            words += &format!(" {}", self.append);
        }
        words
    }

    fn bhyve(&self, program: &Path, guest: &Guest, disk: &Path) -> Command {
        let mut command = Command::new(program);
        let disk = format!("4,virtio-blk,{}", disk.display());
        command.args(["-A", "-H", "-P", "-c", &self.cpus.to_string(), "-m", &self.memory]);
        for slot in ["0,hostbridge", "31,lpc", &disk, "5,virtio-rnd", "6,virtio-net,slirp,open"] {
            command.args(["-s", slot]);
        }
        command.args(["-l", "com1,stdio"]);
        let keys = [
            format!("kernel.image={}", guest.kernel.display()),
            format!("kernel.initrd={}", guest.initramfs.display()),
            format!("kernel.cmdline={}", self.kernel_words()),
        ];
        for key in &keys {
            command.args(["-o", key]);
        }
        command.args(&self.extra).arg(format!("xtask-{}", self.arch));
        command
    }

    fn qemu(&self, program: &Path, guest: &Guest, disk: &Path) -> Command {
        let mut command = Command::new(program);
        command.args(["-accel", "tcg", "-machine", "q35", "-cpu", "max", "-nodefaults"]);
        command.args(["-no-user-config", "-no-reboot", "-display", "none", "-serial"]);
        // Signals are off there, so that ^C goes to the guest.
        command.arg(if self.test.is_some() { "stdio" } else { "mon:stdio" });
        command.args(["-smp", &self.cpus.to_string(), "-m", &self.memory]);
        command.arg("-drive").arg(format!("if=virtio,format=raw,file={}", disk.display()));
        command.args(["-device", "virtio-rng-pci", "-nic", "user,model=virtio-net-pci"]);
        command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initramfs);
        command.args(["-append", &self.kernel_words()]).args(&self.extra);
        command
    }
}

/// Prepares the guest, boots it and waits for its end.
pub(crate) fn run(options: Options) -> Result<ExitCode> {
    let program = if options.qemu { need_tool("qemu-system-x86_64", "qemu-system-x86")? } else { build()? };
    let (guest, disk) = prepare(options.arch)?;
    let mut command =
        if options.qemu { options.qemu(&program, &guest, &disk) } else { options.bhyve(&program, &guest, &disk) };
    say(&describe(&command));
    if options.test.is_some() {
        return run_test(&mut command);
    }
    say("to leave, type \"exit\" or \"poweroff\" in the guest (if it hangs, kill it from another terminal)");
    loop {
        // Not through a pipe: the guest's console is this terminal.
        let status = command.status().with_context(|| format!("cannot start {}", program.display()))?;
        if options.qemu || !std::io::stdin().is_terminal() || status.code() != Some(0) {
            return verdict(status, options.qemu);
        }
        say("the guest rebooted");
    }
}

/// Builds bhyve, optimised, and returns the program.
pub(crate) fn build() -> Result<PathBuf> {
    say("building bhyve (the first time takes some minutes)");
    run_to_end(cargo().args(["build", "--release", "--package", "bhyve"]))?;
    let program = layout::release_program("bhyve");
    if !program.is_file() {
        bail!("cargo built no {}; is its target folder elsewhere? (CARGO_TARGET_DIR)", program.display());
    }
    Ok(program)
}

fn prepare(arch: Arch) -> Result<(Guest, PathBuf)> {
    let store = Store::open()?;
    Ok((store.guest(arch)?, store.boot_disk()?))
}

/// Runs a guest test: it has passed if the guest's script says so.
fn run_test(command: &mut Command) -> Result<ExitCode> {
    let mut result = None;
    let status = run_watched(command, |line| {
        if let Some((_, code)) = line.split_once("GUEST-DONE rc=") {
            result = code.trim().parse::<u8>().ok();
        }
    })?;
    match result {
        Some(0) => Ok(ExitCode::SUCCESS),
        Some(code) => bail!("the guest's test failed with status {code}"),
        None => bail!("the guest ended without the result of its test ({status})"),
    }
}

/// What bhyve's exit status says of the guest's end (bhyve(8), EXIT STATUS).
fn verdict(status: ExitStatus, qemu: bool) -> Result<ExitCode> {
    match status.code() {
        Some(0) => Ok(ExitCode::SUCCESS),
        Some(1) if !qemu => Ok(ExitCode::SUCCESS),
        Some(2) if !qemu => {
            say("the guest halted");
            Ok(ExitCode::SUCCESS)
        }
        Some(3) if !qemu => bail!("the guest ended by a triple fault"),
        _ => bail!("{status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Options> {
        Options::parse(words.split_whitespace().map(OsString::from).collect())
    }

    fn guest() -> Guest {
        Guest { kernel: "/g/vmlinuz".into(), initramfs: "/g/initramfs".into() }
    }

    fn bhyve(words: &str) -> String {
        let options = parse(words).unwrap();
        describe(&options.bhyve(Path::new("bhyve"), &guest(), Path::new("/g/disk")))
    }

    #[test]
    fn without_options_there_is_one_amd64_cpu() {
        let options = parse("").unwrap();
        assert_eq!((options.arch, options.cpus, options.memory.as_str()), (Arch::Amd64, 1, "512M"));
        assert_eq!((options.test, options.qemu, options.extra), (None, false, vec![]));
    }

    #[test]
    fn options_reach_the_command_line() {
        let line = bhyve("--arch i386 --cpus 4 --memory 1G --test disk --append quiet -- -o cpu.engine=soft");
        let want = "bhyve -A -H -P -c 4 -m 1G -s 0,hostbridge -s 31,lpc -s 4,virtio-blk,/g/disk \
                    -s 5,virtio-rnd -s 6,virtio-net,slirp,open -l com1,stdio -o kernel.image=/g/vmlinuz -o kernel.initrd=/g/initramfs \
                    -o kernel.cmdline=console=ttyS0 guest.run=disk quiet -o cpu.engine=soft xtask-i386";
        assert_eq!(line, want);
    }

    #[test]
    fn words_after_the_dashes_are_not_ours() {
        let options = parse("--cpus 2 -- --cpus 3 -- -x").unwrap();
        assert_eq!(options.cpus, 2);
        assert_eq!(options.extra, ["--cpus", "3", "--", "-x"]);
    }

    #[test]
    fn mistakes_are_refused() {
        for words in ["--arch arm64", "--cpus", "--cpus many", "--cpu 1", "stray", "-x"] {
            assert!(parse(words).is_err(), "{words}");
        }
    }
}
