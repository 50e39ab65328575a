//! Where systems keep UEFI firmware, and where this program keeps what belongs to a VM.

use std::path::{Path, PathBuf};

/// An installed firmware.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Found {
    pub(super) rom: PathBuf,
    /// Variables to begin with, unless they are in the ROM.
    pub(super) vars: Option<PathBuf>,
}

/// Folder, code, variables: FreeBSD's package of bhyve's own, then Debian, Fedora, Arch, openSUSE. The larger images first.
const PLACES: [(&str, &str, Option<&str>); 11] = [
    ("usr/local/share/uefi-firmware", "BHYVE_UEFI_CODE.fd", Some("BHYVE_UEFI_VARS.fd")),
    ("usr/local/share/uefi-firmware", "BHYVE_UEFI.fd", None),
    ("usr/share/uefi-firmware", "BHYVE_UEFI_CODE.fd", Some("BHYVE_UEFI_VARS.fd")),
    ("usr/share/uefi-firmware", "BHYVE_UEFI.fd", None),
    ("usr/share/OVMF", "OVMF_CODE_4M.fd", Some("OVMF_VARS_4M.fd")),
    ("usr/share/OVMF", "OVMF_CODE.fd", Some("OVMF_VARS.fd")),
    ("usr/share/edk2/ovmf", "OVMF_CODE.fd", Some("OVMF_VARS.fd")),
    ("usr/share/edk2/x64", "OVMF_CODE.4m.fd", Some("OVMF_VARS.4m.fd")),
    ("usr/share/edk2/x64", "OVMF_CODE.fd", Some("OVMF_VARS.fd")),
    ("usr/share/edk2-ovmf/x64", "OVMF_CODE.fd", Some("OVMF_VARS.fd")),
    ("usr/share/qemu", "ovmf-x86_64-code.bin", Some("ovmf-x86_64-vars.bin")),
];

/// The first firmware below `root` that is there with its variables.
pub(super) fn first(root: &Path) -> Option<Found> {
    PLACES.iter().find_map(|(folder, rom, vars)| {
        let folder = root.join(folder);
        let file = |name: &str| Some(folder.join(name)).filter(|file| file.is_file());
        let vars = match vars {
            Some(vars) => Some(file(vars)?),
            None => None,
        };
        Some(Found { rom: file(rom)?, vars })
    })
}

/// The folder of what VMs keep between runs: `BHYVE_STATE_DIR`, or `/var/lib/bhyve` for root, or `bhyve` in the user's folder
/// for state (XDG Base Directory Specification).
pub(super) fn state_folder() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = variable("BHYVE_STATE_DIR") {
        return folder;
    }
    if rustix::process::geteuid().is_root() {
        return "/var/lib/bhyve".into();
    }
    let state = variable("XDG_STATE_HOME").or_else(|| Some(variable("HOME")?.join(".local/state")));
    state.map_or_else(|| "/var/tmp/bhyve".into(), |state| state.join("bhyve"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_place_with_all_files_counts() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(first(root.path()), None);
        let put = |file: &str| {
            let file = root.path().join(file);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, "").unwrap();
        };
        let rom = || first(root.path()).map(|found| found.rom.strip_prefix(root.path()).unwrap().to_owned());
        put("usr/share/edk2/x64/OVMF_CODE.4m.fd");
        assert_eq!(rom(), None, "no variables");
        put("usr/share/edk2/x64/OVMF_VARS.4m.fd");
        assert_eq!(rom(), Some("usr/share/edk2/x64/OVMF_CODE.4m.fd".into()));
        put("usr/local/share/uefi-firmware/BHYVE_UEFI.fd");
        assert_eq!(rom(), Some("usr/local/share/uefi-firmware/BHYVE_UEFI.fd".into()));
        assert_eq!(first(root.path()).unwrap().vars, None);
    }
}
