//! The store of guests: each part is fetched or built when it is first asked for, and kept.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use crate::apt::Apt;
use crate::firmware::EfiDisk;
use crate::iso::Medium;
use crate::layout::{self, Arch};
use crate::modinfo::Modules;
use crate::process::{find_tool, say};
use crate::{bench, deb, debian, disk, firmware, initramfs, iso};

/// The guests' folder, locked for this process while the store is open.
pub(crate) struct Store {
    folder: PathBuf,
    _lock: File,
    amd64: Apt,
    i386: Apt,
}

/// The files that boot one guest.
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
}

impl Store {
    /// Opens the store, waiting for another process that has it open.
    pub(crate) fn open() -> Result<Self> {
        let folder = layout::guests()?;
        fs::create_dir_all(&folder).with_context(|| format!("cannot make the guests' folder {}", folder.display()))?;
        let path = folder.join(".lock");
        let lock = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            say("waiting for another xtask that prepares guests");
            flock(&lock, FlockOperation::LockExclusive).context("cannot lock the guests' folder")?;
        }
        let apt = |arch: Arch| Apt::open(folder.join(format!("apt-{arch}")), arch);
        Ok(Self { amd64: apt(Arch::Amd64)?, i386: apt(Arch::I386)?, folder, _lock: lock })
    }

    /// Gets the parts that a name of the command line stands for and returns their files.
    pub(crate) fn by_name(&self, name: &str) -> Result<Vec<PathBuf>> {
        Ok(match name {
            "kernel-amd64" => vec![self.kernel(Arch::Amd64)?],
            "kernel-i386" => vec![self.kernel(Arch::I386)?],
            "generic" => {
                let guest = self.generic()?;
                vec![guest.kernel, guest.initramfs]
            }
            "initramfs-amd64" => vec![self.guest(Arch::Amd64)?.initramfs],
            "initramfs-i386" => vec![self.guest(Arch::I386)?.initramfs],
            "memtest" => self.memtest()?,
            "disk" => vec![self.disk()?],
            "debian" | "debian-amd64" => self.debian(Arch::Amd64)?,
            "debian-i386" => self.debian(Arch::I386)?,
            "bench" => bench::guest::Small::build(self)?.files(),
            "bench-real" => bench::guest::Real::build(self)?.files(),
            "ovmf" => self.ovmf()?,
            "bhyve-firmware" => self.bhyve_firmware()?,
            "efi-disk" => vec![self.efi_disk()?],
            "installer-iso" => vec![self.installer_iso()?],
            "netboot" => self.netboot()?.into(),
            "all" => self.all()?,
            _ => bail!(
                "unknown guest part \"{name}\": kernel-amd64, kernel-i386, initramfs-amd64, initramfs-i386, generic, memtest, \
                 disk, debian, debian-i386, ovmf, bhyve-firmware, efi-disk, installer-iso, netboot, bench, bench-real or all"
            ),
        })
    }

    /// A folder in the store, made if it is not there.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }

    /// Everything that the tests boot.
    pub(crate) fn all(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for arch in [Arch::Amd64, Arch::I386] {
            let guest = self.guest(arch)?;
            files.extend([guest.kernel, guest.initramfs]);
        }
        let generic = self.generic()?;
        files.extend([generic.kernel, generic.initramfs]);
        files.extend(self.memtest()?);
        files.push(self.disk()?);
        files.extend(self.debian(Arch::Amd64)?);
        files.extend(self.netboot()?);
        files.extend(self.ovmf()?);
        files.extend(self.bhyve_firmware()?);
        files.push(self.efi_disk()?);
        files.push(self.installer_iso()?);
        Ok(files)
    }

    /// Kernel and initramfs of an architecture.
    pub(crate) fn guest(&self, arch: Arch) -> Result<Guest> {
        let kernel = self.kernel(arch)?;
        let busybox = self.busybox(arch)?;
        let modules = kernel.with_file_name("modules");
        let scripts = layout::repository().join("xtask/guest");
        let file = self.folder.join(format!("initramfs-{arch}.cpio.gz"));
        initramfs::write(&initramfs::standard(&busybox, &modules, &scripts)?, &file)?;
        Ok(Guest { kernel, initramfs: file })
    }

    /// The kernel, with the modules of the initramfs beside it.
    pub(crate) fn kernel(&self, arch: Arch) -> Result<PathBuf> {
        self.kernel_with(arch, arch.kernel_package(), &format!("kernel-{arch}"), &initramfs::MODULES)
    }

    /// Debian's ordinary kernel for amd64, which has modules that the cloud flavour lacks, and an initramfs with them.
    pub(crate) fn generic(&self) -> Result<Guest> {
        let wanted = [&initramfs::MODULES[..], &initramfs::GENERIC_MODULES].concat();
        let kernel = self.kernel_with(Arch::Amd64, "linux-image-amd64", "kernel-generic", &wanted)?;
        let busybox = self.busybox(Arch::Amd64)?;
        let file = self.folder.join("initramfs-generic.cpio.gz");
        let scripts = layout::repository().join("xtask/guest");
        initramfs::write(&initramfs::standard(&busybox, &kernel.with_file_name("modules"), &scripts)?, &file)?;
        Ok(Guest { kernel, initramfs: file })
    }

    /// The kernel of a meta package in a folder of its own, with modules beside it.
    fn kernel_with(&self, arch: Arch, meta_package: &str, folder: &str, modules: &[&str]) -> Result<PathBuf> {
        let folder = self.folder.join(folder);
        let kernel = folder.join("vmlinuz");
        let wanted = modules.join("\n");
        if fs::read_to_string(folder.join("wanted")).is_ok_and(|old| old == wanted) {
            return Ok(kernel);
        }
        let apt = self.apt(arch);
        let known = fs::read_to_string(folder.join("version")).ok();
        let package = match known.as_deref().and_then(|line| line.split_whitespace().next()) {
            Some(package) => package.to_owned(),
            None => apt.resolve(meta_package, "linux-image-")?,
        };
        let file = apt.download(&package)?;
        say(&format!("unpacking {package}"));
        let (unpacked, fresh) = (folder.with_extension("unpacked"), folder.with_extension("fresh"));
        deb::unpack(&file, &unpacked)?;
        deb::remove_folder(&fresh)?;
        let version = package.trim_start_matches("linux-image-");
        copy(&unpacked.join(format!("boot/vmlinuz-{version}")), &fresh.join("vmlinuz"))?;
        let order = Modules::in_folder(&unpacked.join("lib/modules").join(version))?.in_order(modules)?;
        for (name, module) in &order {
            copy(module, &fresh.join(format!("modules/{name}.ko")))?;
        }
        let names: String = order.iter().map(|(name, _)| format!("{name}\n")).collect();
        write(&fresh.join("modules/order"), &names)?;
        write(&fresh.join("version"), &format!("{package} {}\n", package_version(&file)))?;
        write(&fresh.join("wanted"), &wanted)?;
        deb::remove_folder(&unpacked)?;
        replace_folder(&fresh, &folder)?;
        Ok(kernel)
    }

    /// The static busybox of an architecture.
    pub(crate) fn busybox(&self, arch: Arch) -> Result<PathBuf> {
        let folder = self.folder.join(format!("busybox-{arch}"));
        self.files_of(arch, "busybox-static", &folder, &[("bin/busybox", "busybox")])?;
        Ok(folder.join("busybox"))
    }

    fn memtest(&self) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join("memtest");
        let names = ["memtest86+x64.bin", "memtest86+ia32.bin"];
        let files = names.map(|name| (format!("boot/{name}"), name));
        let files: Vec<_> = files.iter().map(|(from, to)| (from.as_str(), *to)).collect();
        self.files_of(Arch::Amd64, "memtest86+", &folder, &files)?;
        Ok(names.iter().map(|name| folder.join(name)).collect())
    }

    /// An installed system: its disk, kernel and initramfs.
    fn debian(&self, arch: Arch) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join(format!("debian-{arch}"));
        debian::make(self.apt(arch), arch, &folder)?;
        Ok(["disk.img", "vmlinuz", "initrd.img"].map(|name| folder.join(name)).into())
    }

    /// UEFI firmware as Debian has it.
    fn ovmf(&self) -> Result<Vec<PathBuf>> {
        let folder = self.ovmf_folder()?;
        Ok(firmware::OVMF.iter().map(|name| folder.join(name)).collect())
    }

    /// The folder that it is in.
    pub(crate) fn ovmf_folder(&self) -> Result<PathBuf> {
        let folder = self.folder.join("ovmf");
        let files = firmware::OVMF.map(|name| (format!("usr/share/OVMF/{name}"), name));
        let files: Vec<_> = files.iter().map(|(from, to)| (from.as_str(), *to)).collect();
        self.files_of(Arch::Amd64, "ovmf", &folder, &files)?;
        Ok(folder)
    }

    /// Firmware built for bhyve.
    fn bhyve_firmware(&self) -> Result<Vec<PathBuf>> {
        firmware::build_bhyve(&self.folder.join("bhyve-firmware"))
    }

    /// A disk that UEFI firmware boots from.
    pub(crate) fn efi_disk(&self) -> Result<PathBuf> {
        let image = self.folder.join("efi-disk.img");
        let (shim, grub) = (self.shim()?, self.grub("grub", "grubx64.efi.signed")?);
        firmware::efi_disk(&image, &EfiDisk { shim: &shim, grub: &grub, guest: &self.guest(Arch::Amd64)? })?;
        Ok(image)
    }

    /// Debian's installer on an ISO image.
    fn installer_iso(&self) -> Result<PathBuf> {
        let image = self.folder.join("installer.iso");
        let (shim, grub) = (self.shim()?, self.grub("grub-cd", "gcdx64.efi.signed")?);
        let [kernel, initramfs] = self.netboot()?;
        iso::make(&image, &Medium { shim: &shim, grub: &grub, installer: &Guest { kernel, initramfs } })?;
        Ok(image)
    }

    /// Debian's boot loader that Microsoft signed.
    fn shim(&self) -> Result<PathBuf> {
        let folder = self.folder.join("shim");
        self.files_of(Arch::Amd64, "shim-signed", &folder, &[("usr/lib/shim/shimx64.efi.signed", "shim.efi")])?;
        Ok(folder.join("shim.efi"))
    }

    /// One of the variants of GRUB that Debian signed, kept in `folder`.
    fn grub(&self, folder: &str, variant: &str) -> Result<PathBuf> {
        let folder = self.folder.join(folder);
        let signed = format!("usr/lib/grub/x86_64-efi-signed/{variant}");
        self.files_of(Arch::Amd64, "grub-efi-amd64-signed", &folder, &[(&signed, "grub.efi")])?;
        Ok(folder.join("grub.efi"))
    }

    /// Debian's installer for serial consoles and the network: kernel and initramfs.
    fn netboot(&self) -> Result<[PathBuf; 2]> {
        let folder = self.folder.join("netboot");
        let from = "usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64";
        let (kernel, initramfs) = (format!("{from}/linux"), format!("{from}/initrd.gz"));
        let files = [(kernel.as_str(), "linux"), (initramfs.as_str(), "initrd.gz")];
        self.files_of(Arch::Amd64, "debian-installer-12-netboot-amd64", &folder, &files)?;
        Ok(files.map(|(_, name)| folder.join(name)))
    }

    /// The untouched disk.
    pub(crate) fn disk(&self) -> Result<PathBuf> {
        let image = self.folder.join("disk.img");
        disk::make(&image, || self.mke2fs())?;
        Ok(image)
    }

    /// The disk of `cargo xtask boot`, which keeps what guests write.
    pub(crate) fn boot_disk(&self) -> Result<PathBuf> {
        let image = self.folder.join("boot-disk.img");
        disk::make(&image, || self.mke2fs())?;
        Ok(image)
    }

    /// The program that makes file systems: this machine's, or else, since small installations have none, Debian's.
    fn mke2fs(&self) -> Result<Command> {
        if let Some(program) = find_tool("mke2fs") {
            return Ok(Command::new(program));
        }
        let folder = self.folder.join("e2fsprogs");
        let libraries = "lib/x86_64-linux-gnu";
        let (ext2fs, e2p) = (format!("{libraries}/libext2fs.so.2"), format!("{libraries}/libe2p.so.2"));
        let com_err = format!("{libraries}/libcom_err.so.2");
        for (package, part, files) in [
            ("e2fsprogs", "program", &[("sbin/mke2fs", "mke2fs"), ("etc/mke2fs.conf", "mke2fs.conf")][..]),
            ("libext2fs2", "libext2fs", &[(&*ext2fs, "libext2fs.so.2"), (&*e2p, "libe2p.so.2")]),
            ("libcom-err2", "libcom-err", &[(&*com_err, "libcom_err.so.2")]),
        ] {
            self.files_of(Arch::Amd64, package, &folder.join(part), files)?;
        }
        let mut command = Command::new(folder.join("program/mke2fs"));
        command.env("MKE2FS_CONFIG", folder.join("program/mke2fs.conf"));
        command
            .env("LD_LIBRARY_PATH", std::env::join_paths(["libext2fs", "libcom-err"].map(|part| folder.join(part)))?);
        Ok(command)
    }

    /// Makes a folder of chosen files of a package, unless it is there.
    fn files_of(&self, arch: Arch, package: &str, folder: &Path, files: &[(&str, &str)]) -> Result<()> {
        if folder.exists() {
            return Ok(());
        }
        let file = self.apt(arch).download(package)?;
        let (unpacked, fresh) = (folder.with_extension("unpacked"), folder.with_extension("fresh"));
        deb::unpack(&file, &unpacked)?;
        deb::remove_folder(&fresh)?;
        for (from, to) in files {
            copy(&unpacked.join(from), &fresh.join(to))?;
        }
        deb::remove_folder(&unpacked)?;
        replace_folder(&fresh, folder)
    }

    fn apt(&self, arch: Arch) -> &Apt {
        match arch {
            Arch::Amd64 => &self.amd64,
            Arch::I386 => &self.i386,
        }
    }
}

/// The version in a package's file name, `NAME_VERSION_ARCH.deb`.
fn package_version(file: &Path) -> String {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    stem.split('_').nth(1).unwrap_or_default().replace("%3a", ":")
}

/// Copies a file, making its folder.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

pub(crate) fn write(file: &Path, content: &str) -> Result<()> {
    fs::write(file, content).with_context(|| format!("cannot write {}", file.display()))
}

/// Puts a finished folder in the place of an old one.
pub(crate) fn replace_folder(fresh: &Path, folder: &Path) -> Result<()> {
    deb::remove_folder(folder)?;
    fs::rename(fresh, folder).with_context(|| format!("cannot make {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_in_the_file_name() {
        let version = |name: &str| package_version(Path::new(name));
        assert_eq!(version("/x/linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb"), "6.1.192-2");
        assert_eq!(version("busybox-static_1%3a1.35.0-4_i386.deb"), "1:1.35.0-4");
        assert_eq!(version("odd.deb"), "");
    }
}
