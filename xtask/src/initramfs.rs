//! The guests' initramfs: busybox, kernel modules, `/init` and the test scripts, as a gzipped cpio
//! archive. Made anew whenever its content has changed.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::cpio::Archive;
use crate::process::say;

/// The modules for which the guest's kernel may need loading, beside what these need themselves.
pub(crate) const MODULES: [&str; 8] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_rng",
    "virtio_net", // the machine's devices
    "crc32c_generic",
    "ext4", // ext4 asks for the checksum by algorithm, not by module
    "button",
    "evdev", // the power button and how programs hear of it
];

/// More modules of the guest with Debian's ordinary kernel.
pub(crate) const GENERIC_MODULES: [&str; 7] = [
    "9p",
    "9pnet_virtio", // shared folders
    "virtiofs",
    "virtio_console",
    "virtio_balloon",
    "virtio_input",
    "vmw_vsock_virtio_transport",
];

/// What acpid runs when the power button is pressed.
const POWER_BUTTON: &[u8] = b"#!/bin/sh\necho POWER-BUTTON >/dev/console\npoweroff\n";

/// Content of the usual initramfs. `modules` are in loading order.
pub(crate) fn standard(busybox: &Path, modules: &Path, scripts: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    let folders = ["bin", "dev", "proc", "sys", "mnt", "etc", "etc/acpi", "etc/acpi/PWRF", "modules", "tests"];
    for folder in folders {
        archive.directory(folder);
    }
    // Init's first output needs a console before devtmpfs is mounted.
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.character_device("dev/null", 0o666, (1, 3));
    archive.file("bin/busybox", 0o755, &read(busybox)?);
    archive.link("bin/sh", "busybox");
    archive.file("etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.file("etc/acpi/PWRF/00000080", 0o755, POWER_BUTTON);
    archive.file("init", 0o755, &read(&scripts.join("init"))?);
    archive.file("etc/session", 0o755, &read(&scripts.join("session"))?);
    archive.file("etc/dhcp", 0o755, &read(&scripts.join("dhcp"))?);
    add_modules(&mut archive, modules)?;
    for test in files_in(&scripts.join("tests"))? {
        let name = test.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("tests/{name}"), 0o755, &read(&test)?);
    }
    Ok(archive.finish())
}

/// Content of the benchmark guest's initramfs.
pub(crate) fn bench(busybox: &Path, programs: &[(&str, &Path)], init: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for folder in ["bin", "dev", "proc", "sys"] {
        archive.directory(folder);
    }
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("bin/busybox", 0o755, &read(busybox)?);
    for applet in ["sh", "mount", "mkdir", "cat", "grep", "sleep", "poweroff"] {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    for (name, program) in programs {
        archive.file(&format!("bin/{name}"), 0o755, &read(program)?);
    }
    archive.file("init", 0o755, &read(init)?);
    Ok(archive.finish())
}

/// Content of the initramfs of the guest with real programs: on to its disk.
pub(crate) fn bench_real(busybox: &Path, modules: &Path, init: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for folder in ["bin", "dev", "proc", "root", "modules"] {
        archive.directory(folder);
    }
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("bin/busybox", 0o755, &read(busybox)?);
    for applet in ["sh", "mount", "umount", "insmod", "sleep", "switch_root", "poweroff"] {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive.file("init", 0o755, &read(init)?);
    add_modules(&mut archive, modules)?;
    Ok(archive.finish())
}

/// Content of the initramfs of the guest that measures disks.
pub(crate) fn bench_io(busybox: &Path, modules: &Path, program: &Path, init: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for folder in ["bin", "dev", "proc", "sys", "modules"] {
        archive.directory(folder);
    }
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("bin/busybox", 0o755, &read(busybox)?);
    for applet in ["sh", "mount", "cat", "insmod", "sleep", "poweroff"] {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive.file("bin/io", 0o755, &read(program)?);
    archive.file("init", 0o755, &read(init)?);
    add_modules(&mut archive, modules)?;
    Ok(archive.finish())
}

/// Content of the initramfs of the guest that measures networks.
pub(crate) fn bench_net(busybox: &Path, modules: &Path, init: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for folder in ["bin", "dev", "proc", "sys", "root", "modules"] {
        archive.directory(folder);
    }
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("bin/busybox", 0o755, &read(busybox)?);
    for applet in ["sh", "mount", "cat", "insmod", "sleep", "poweroff", "ip", "ping", "awk", "chroot"] {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive.file("init", 0o755, &read(init)?);
    add_modules(&mut archive, modules)?;
    Ok(archive.finish())
}

fn add_modules(archive: &mut Archive, modules: &Path) -> Result<()> {
    let order = read(&modules.join("order"))?;
    archive.file("modules/order", 0o644, &order);
    for name in String::from_utf8_lossy(&order).lines() {
        let file = format!("{name}.ko");
        archive.file(&format!("modules/{file}"), 0o644, &read(&modules.join(&file))?);
    }
    Ok(())
}

/// Writes an archive, gzipped, unless the file holds the same already.
pub(crate) fn write(archive: &[u8], file: &Path) -> Result<()> {
    if holds(file, archive) {
        return Ok(());
    }
    say(&format!("building {}", file.display()));
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(archive)?;
    let partial = file.with_extension("partial");
    fs::write(&partial, encoder.finish()?)
        .and_then(|()| fs::rename(&partial, file))
        .with_context(|| format!("cannot write {}", file.display()))
}

/// Whether a gzip file holds these bytes, by the CRC and the length in its trailer (RFC 1952, 2.3.1).
fn holds(file: &Path, bytes: &[u8]) -> bool {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    let trailer = [crc.sum().to_le_bytes(), crc.amount().to_le_bytes()].concat();
    fs::read(file).is_ok_and(|old| old.ends_with(&trailer))
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    Ok(files)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_archive_is_not_written_again() {
        let file = std::env::temp_dir().join(format!("xtask-initramfs-{}.gz", std::process::id()));
        assert!(!holds(&file, b"content"));
        write(b"content", &file).unwrap();
        assert!(holds(&file, b"content"));
        assert!(!holds(&file, b"Content"));
        fs::remove_file(&file).unwrap();
    }
}
