//! A machine that starts a Linux kernel: the same on both sides of a comparison, each in its own words.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use super::record::Column;

/// What every machine of a comparison has.
pub(super) struct Machine<'a> {
    /// QEMU for [`Column::Tcg`], bhyve for all others.
    pub(super) column: Column,
    pub(super) program: &'a Path,
    pub(super) cpus: u32,
    /// In MB.
    pub(super) memory: u32,
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
    /// The kernel's command line.
    pub(super) words: &'a str,
}

impl Machine<'_> {
    /// The command that runs it, with `more` arguments in the program's own words.
    pub(super) fn command<S: AsRef<OsStr>>(&self, more: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(self.program);
        if self.column == Column::Tcg {
            command.args(["-accel", "tcg", "-machine", "q35", "-cpu", "max", "-nodefaults", "-no-user-config"]);
            command.args(["-no-reboot", "-display", "none", "-serial", "stdio"]);
            command.args(["-smp", &self.cpus.to_string(), "-m", &self.memory.to_string()]);
            command.arg("-kernel").arg(self.kernel).arg("-initrd").arg(self.initramfs).args(["-append", self.words]);
            command.args(more);
            return command;
        }
        command.args(["-A", "-H", "-P", "-c", &self.cpus.to_string(), "-m", &format!("{}M", self.memory)]);
        command.args(["-s", "0,hostbridge", "-s", "31,lpc", "-l", "com1,stdio"]);
        for key in [
            "cpu.engine=soft".to_owned(),
            format!("kernel.image={}", self.kernel.display()),
            format!("kernel.initrd={}", self.initramfs.display()),
            format!("kernel.cmdline={}", self.words),
        ] {
            command.args(["-o", &key]);
        }
        command.args(more).arg(format!("bench-{}", std::process::id()));
        command
    }
}
