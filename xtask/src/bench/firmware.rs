//! `--firmware`: from the start of the program through Debian's OVMF to GRUB's menu, under bhyve and under QEMU in turn.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::record::{Column, Record};
use super::watch;
use crate::guests::Store;

/// The first entry of the menu, chosen.
const MENU: &str = "*linux";

/// The firmware, a private copy of its variables, and the disk with boot loaders, which no machine writes to.
pub(super) struct Bench {
    code: PathBuf,
    empty_vars: PathBuf,
    vars: PathBuf,
    disk: PathBuf,
    memory: u32,
}

impl Bench {
    /// Gets firmware and disk.
    pub(super) fn build(store: &Store, memory: u32) -> Result<Self> {
        let (folder, disk) = (store.ovmf_folder()?, store.efi_disk()?);
        let vars = store.folder("bench-firmware")?.join("vars.fd");
        let [code, empty_vars] = ["OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"].map(|name| folder.join(name));
        Ok(Self { code, empty_vars, vars, disk, memory })
    }

    /// Measures all machines once, each from empty variables.
    pub(super) fn round(&self, machines: &[(Column, PathBuf)], round: u32, record: &mut Record) -> Result<()> {
        let turn = round as usize % machines.len();
        for (column, program) in machines[turn..].iter().chain(&machines[..turn]) {
            let fresh = |why: &Path| format!("cannot copy the firmware's variables to {}", why.display());
            fs::copy(&self.empty_vars, &self.vars).with_context(|| fresh(&self.vars))?;
            let time = watch::until(&mut self.command(*column, program), MENU)?;
            record.add(*column, "firmware_grub", time.as_secs_f64());
        }
        Ok(())
    }

    fn command(&self, column: Column, program: &Path) -> Command {
        let [code, vars, disk] = [&self.code, &self.vars, &self.disk].map(|path| path.display().to_string());
        let mut command = Command::new(program);
        if column == Column::Tcg {
            // The board that bhyve shows to this firmware.
            command.args(["-accel", "tcg", "-machine", "pc", "-cpu", "max", "-nodefaults", "-no-user-config"]);
            command.args(["-display", "none", "-serial", "stdio", "-m", &self.memory.to_string()]);
            for drive in [
                format!("if=pflash,format=raw,readonly=on,file={code}"),
                format!("if=pflash,format=raw,file={vars}"),
                format!("if=virtio,format=raw,readonly=on,file={disk}"),
            ] {
                command.args(["-drive", &drive]);
            }
            return command;
        }
        command.args(["-A", "-H", "-P", "-m", &format!("{}M", self.memory), "-o", "cpu.engine=soft"]);
        command.args(["-s", "0,hostbridge", "-s", "31,lpc", "-l", "com1,stdio"]);
        command.args(["-s", &format!("4,virtio-blk,{disk},ro"), "-l", &format!("bootrom,{code},{vars}")]);
        command.arg(format!("bench-{}", std::process::id()));
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::describe;

    #[test]
    fn both_machines_get_the_same_firmware() {
        let [code, empty_vars, vars, disk] = ["/g/code", "/g/empty", "/g/vars", "/g/disk"].map(PathBuf::from);
        let bench = Bench { code, empty_vars, vars, disk, memory: 256 };
        for column in [Column::Tcg, Column::Bhyve] {
            let line = describe(&bench.command(column, Path::new("m")));
            for part in ["/g/code", "/g/vars", "/g/disk", "256"] {
                assert!(line.contains(part), "{part}: {line}");
            }
        }
    }
}
