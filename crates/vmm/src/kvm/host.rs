//! Whether this host can run VMs in KVM.

use std::path::Path;

#[cfg(target_arch = "x86_64")]
use kvm_ioctls::{Cap, Kvm};

/// Version of the KVM interface that this engine speaks; the only one there has been since Linux 2.6.22.
#[cfg(target_arch = "x86_64")]
const API_VERSION: i32 = 12;

/// Capabilities without which the engine cannot run.
#[cfg(target_arch = "x86_64")]
const NEEDED: [Cap; 15] = [
    Cap::Irqchip,
    Cap::Pit2,
    Cap::UserMemory,
    Cap::SetTssAddr,
    Cap::SetIdentityMapAddr,
    Cap::IrqRouting,
    Cap::SignalMsi,
    Cap::ExtCpuid,
    Cap::MpState,
    Cap::VcpuEvents,
    Cap::Debugregs,
    Cap::Xcrs,
    Cap::ImmediateExit,
    Cap::X86UserSpaceMsr,
    Cap::X86MsrFilter,
];

/// Whether the host's processor offers VT-x or SVM to this system, and the kernel module for it is there.
///
/// A /dev/kvm that opens is not enough: KVM also exists in forms that emulate most instructions, slower than the software CPU.
///
/// # Errors
/// Why not, in words.
pub fn hardware() -> Result<(), String> {
    let path = "/proc/cpuinfo";
    let cpuinfo = std::fs::read_to_string(path).map_err(|error| format!("{path} cannot be read: {error}"))?;
    judge(&cpuinfo, |module| Path::new("/sys/module").join(module).exists())
}

fn judge(cpuinfo: &str, is_loaded: impl Fn(&str) -> bool) -> Result<(), String> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).and_then(|line| line.split_once(':'));
    let has = |name| flags.is_some_and(|(_, flags)| flags.split_ascii_whitespace().any(|flag| flag == name));
    let (extension, module) = match () {
        () if has("vmx") => ("VT-x", "kvm_intel"),
        () if has("svm") => ("SVM", "kvm_amd"),
        () => return Err("the host's processor offers neither VT-x nor SVM".into()),
    };
    if is_loaded(module) {
        Ok(())
    } else {
        Err(format!("the host's processor has {extension}, but the kernel module {module} is not loaded"))
    }
}

/// Whether /dev/kvm can be used.
///
/// # Errors
/// Why not, and what to do.
pub fn probe() -> Result<(), String> {
    #[cfg(target_arch = "x86_64")]
    return open().map(|_| ());
    #[cfg(not(target_arch = "x86_64"))]
    Err("the host's processor is not an x86-64 one".into())
}

/// Opens /dev/kvm and checks what it can do.
#[cfg(target_arch = "x86_64")]
pub(super) fn open() -> Result<Kvm, String> {
    let kvm = Kvm::new().map_err(|error| cannot_open(error.errno()))?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(format!(
            "/dev/kvm speaks version {version} of its interface, not {API_VERSION}: update the kernel"
        ));
    }
    let missing: Vec<_> =
        NEEDED.into_iter().filter(|cap| !kvm.check_extension(*cap)).map(|cap| format!("{cap:?}")).collect();
    if missing.is_empty() {
        Ok(kvm)
    } else {
        Err(format!("/dev/kvm lacks {}: Linux 5.10 or newer is needed", missing.join(", ")))
    }
}

#[cfg(target_arch = "x86_64")]
fn cannot_open(errno: i32) -> String {
    match errno {
        libc::ENOENT => "there is no /dev/kvm: load the kernel module kvm_intel or kvm_amd".into(),
        libc::EACCES | libc::EPERM => {
            "no permission to open /dev/kvm: add yourself to the group kvm (usermod -aG kvm USER) and log in again"
                .into()
        }
        _ => format!("/dev/kvm cannot be opened: {}", std::io::Error::from_raw_os_error(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: &str = "processor\t: 0\nflags\t\t: fpu vme vmx ssse3\n";
    const AMD: &str = "flags : fpu svm\n";

    #[test]
    fn hardware_wants_the_extension_and_its_module() {
        assert_eq!(judge(INTEL, |module| module == "kvm_intel"), Ok(()));
        assert_eq!(judge(AMD, |module| module == "kvm_amd"), Ok(()));
        assert!(judge(INTEL, |_| false).unwrap_err().contains("kvm_intel"));
        assert!(judge(AMD, |module| module == "kvm_intel").unwrap_err().contains("kvm_amd"));
        assert!(judge("flags : fpu vmx_other\nbugs: svm\n", |_| true).unwrap_err().contains("neither"));
        assert!(judge("", |_| true).is_err());
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn says_what_to_do() {
        assert!(cannot_open(libc::EACCES).contains("group kvm"));
        assert!(cannot_open(libc::ENOENT).contains("kernel module"));
        assert!(cannot_open(libc::EBUSY).contains("busy"));
    }
}
