//! Where things are: the repository, the guests' files.
//!
//! The guests' folder is `guests/` in the repository, or what `BHYVE_GUESTS` names. Tests rely on
//! these names in it (ARCH is `amd64` or `i386`):
//!
//! | file | content |
//! |---|---|
//! | `kernel-ARCH/vmlinuz` | Debian's kernel, a bzImage: the cloud flavour, or 686-pae |
//! | `kernel-ARCH/version` | its Debian package and version, one line |
//! | `kernel-ARCH/modules/` | the kernel modules that the initramfs loads; `order` lists them |
//! | `initramfs-ARCH.cpio.gz` | busybox, the modules, `/init`, the scripts of `xtask/guest/tests` in `/tests` |
//! | `kernel-generic/`, `initramfs-generic.cpio.gz` | the same with Debian's ordinary amd64 kernel and more modules |
//! | `memtest/memtest86+x64.bin`, `memtest/memtest86+ia32.bin` | memtest86+ as a bzImage |
//! | `disk.img` | a raw 256 MB disk with one ext4 file system; copy it before writing to it |
//! | `boot-disk.img` | the copy that `cargo xtask boot` uses and keeps |
//! | `debian-ARCH/disk.img` | an installed Debian on a raw, sparse 3 GB GPT disk: EFI system partition, ext4 root; copy it before use |
//! | `debian-ARCH/vmlinuz`, `debian-ARCH/initrd.img` | its kernel and initramfs, to boot it without firmware (`root=LABEL=root`) |
//! | `bench-real/` | the benchmark guest with real programs: `root.ext4`, `initramfs.cpio.gz`, and `rootfs/`, its files |
//! | `ovmf/` | UEFI firmware of Debian's package `ovmf`, with variable stores |
//! | `bhyve-firmware/` | `BHYVE.fd`, `BHYVE_CODE.fd`, `BHYVE_VARS.fd`: bhyve's own UEFI firmware, built from Debian's edk2 |
//! | `efi-disk.img` | a disk with Debian's signed shim and GRUB, and the amd64 guest |
//! | `installer.iso` | an ISO image with Debian's signed shim and GRUB, and Debian's installer |
//! | `netboot/` | Debian's installer: `linux`, `initrd.gz` |
//! | `bench/` | the benchmark guest: `vmlinuz`, `initramfs.cpio.gz`, and the program `bench` |
//! | `busybox-ARCH/`, `apt-ARCH/` | intermediate: the static busybox; package lists and packages |

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, bail};

/// A guest's architecture, by its Debian name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arch {
    Amd64,
    I386,
}

impl Arch {
    /// The package that depends on the newest kernel package.
    pub(crate) fn kernel_package(self) -> &'static str {
        match self {
            Self::Amd64 => "linux-image-cloud-amd64",
            Self::I386 => "linux-image-686-pae",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amd64 => "amd64",
            Self::I386 => "i386",
        })
    }
}

impl FromStr for Arch {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "amd64" => Ok(Self::Amd64),
            "i386" => Ok(Self::I386),
            _ => bail!("unknown architecture \"{name}\": amd64 or i386"),
        }
    }
}

/// The repository's top folder.
pub(crate) fn repository() -> PathBuf {
    let manifest =
        env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map_or(manifest.clone(), Path::to_owned)
}

/// The guests' folder, as an absolute path.
pub(crate) fn guests() -> Result<PathBuf> {
    let named = env::var_os("BHYVE_GUESTS").filter(|v| !v.is_empty());
    let folder = named.map_or_else(|| repository().join("guests"), PathBuf::from);
    Ok(std::path::absolute(folder)?)
}

/// Where `cargo build --release` puts a program.
pub(crate) fn release_program(name: &str) -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").filter(|v| !v.is_empty());
    let target = target.map_or_else(|| PathBuf::from("target"), PathBuf::from);
    repository().join(target).join("release").join(name)
}
