//! Firmware and what it boots: Debian's OVMF, bhyve's own firmware built from Debian's edk2 source package, a disk with Debian's
//! boot loaders.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::apt::Apt;
use crate::deb::remove_folder;
use crate::guests::{Guest, copy};
use crate::layout::Arch;
use crate::process::{need_tool, output, run, say};

/// Firmware built for QEMU, with variable stores: empty, and with Microsoft's and Debian's keys.
pub(crate) const OVMF: [&str; 5] =
    ["OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd", "OVMF_VARS_4M.ms.fd", "OVMF_CODE.fd", "OVMF_VARS.fd"];

/// Images of bhyve's firmware.
const BHYVE: [&str; 3] = ["BHYVE.fd", "BHYVE_CODE.fd", "BHYVE_VARS.fd"];

/// What the build needs: a file that shows that it is there, and the Debian package that has it.
pub(crate) const BUILD_TOOLS: [(&str, &str); 9] = [
    ("gcc", "gcc"),
    ("g++", "g++"),
    ("make", "make"),
    ("nasm", "nasm"),
    ("iasl", "acpica-tools"),
    ("patch", "patch"),
    ("python3", "python3"),
    ("dpkg-source", "dpkg-dev"),
    ("/usr/include/uuid/uuid.h", "uuid-dev"),
];

/// Breaks the bhyve platform, which has no library for it.
const REVERSED: &str = "debian/patches/Disable-the-Shell-when-SecureBoot-is-enabled.patch";

/// Builds bhyve's firmware in `folder` unless it is there. Takes about four minutes.
pub(crate) fn build_bhyve(folder: &Path) -> Result<Vec<PathBuf>> {
    let images = || BHYVE.iter().map(|name| folder.join(name)).collect();
    if folder.exists() {
        return Ok(images());
    }
    for (tool, package) in BUILD_TOOLS {
        need_tool(tool, package)?;
    }
    let work = folder.with_extension("build");
    remove_folder(&work)?;
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let source = unpack_source(&work)?;
    say("building bhyve's firmware (about four minutes)");
    let log = work.join("log");
    let output_to = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let errors_to = output_to.try_clone().context("cannot write the log")?;
    // The set-up script wants bash, and fails softly.
    let script = format!(
        "patch -R -p1 < {REVERSED} && make -C BaseTools -j \"$(nproc)\" && {{ . ./edksetup.sh; \
         build -a X64 -t GCC5 -b RELEASE -n \"$(nproc)\" -p OvmfPkg/Bhyve/BhyveX64.dsc -D FD_SIZE_4MB; }}"
    );
    let status = Command::new(need_tool("bash", "bash")?)
        .args(["-c", &script])
        .current_dir(&source)
        .env("PYTHON_COMMAND", need_tool("python3", "python3")?)
        .stdin(Stdio::null())
        .stdout(output_to)
        .stderr(errors_to)
        .status()
        .context("cannot start bash")?;
    if !status.success() {
        bail!("building bhyve's firmware failed ({status}): see {}", log.display());
    }
    let fresh = folder.with_extension("fresh");
    remove_folder(&fresh)?;
    for name in BHYVE {
        copy(&source.join("Build/BhyveX64/RELEASE_GCC5/FV").join(name), &fresh.join(name))?;
    }
    remove_folder(&work)?;
    fs::rename(&fresh, folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(images())
}

/// Debian's edk2, with Debian's patches applied.
fn unpack_source(work: &Path) -> Result<PathBuf> {
    let apt = Apt::open_sources(work.join("apt"), Arch::Amd64)?;
    let description = apt.download_source("edk2", work)?;
    let source = work.join("edk2");
    run(Command::new(need_tool("dpkg-source", "dpkg-dev")?)
        // The signature of the list that names the files was checked.
        .args(["--no-check", "-x"])
        .arg(&description)
        .arg(&source)
        .stdout(Stdio::null()))
    .context("cannot unpack the edk2 source package")?;
    Ok(source)
}

/// Size of the disk that firmware boots from, where its partition begins, and its size.
const DISK: u64 = 96 << 20;
const SECTOR: u64 = 512;
const PARTITION: u64 = 1 << 20;
const PARTITION_SECTORS: u64 = 190_000;

/// The menu: the second entry's kernel has no valid signature.
const MENU: &str = "\
set timeout=2
menuentry linux --id linux {
  linux /vmlinuz console=ttyS0
  initrd /initrd.gz
}
menuentry unsigned --id unsigned {
  linux /unsigned console=ttyS0
  initrd /initrd.gz
}
";

/// What goes onto the disk that firmware boots from.
pub(crate) struct EfiDisk<'a> {
    /// Debian's signed boot loaders.
    pub(crate) shim: &'a Path,
    pub(crate) grub: &'a Path,
    /// A small system.
    pub(crate) guest: &'a Guest,
}

/// Makes a disk with a GPT and an EFI system partition: Debian's signed shim and GRUB where firmware looks for them on a disk that
/// it does not know, a kernel, and the same kernel with a byte changed.
pub(crate) fn efi_disk(image: &Path, disk: &EfiDisk<'_>) -> Result<()> {
    let EfiDisk { shim, grub, guest } = disk;
    if image.exists() {
        return Ok(());
    }
    say(&format!("making the disk {}", image.display()));
    let (content, partial) = (image.with_extension("content"), image.with_extension("partial"));
    remove_folder(&content)?;
    copy(shim, &content.join("EFI/BOOT/BOOTX64.EFI"))?;
    copy(grub, &content.join("EFI/BOOT/grubx64.efi"))?;
    copy(&guest.kernel, &content.join("vmlinuz"))?;
    copy(&guest.initramfs, &content.join("initrd.gz"))?;
    let mut kernel = fs::read(&guest.kernel).with_context(|| format!("cannot read {}", guest.kernel.display()))?;
    if let Some(byte) = kernel.get_mut(4 << 20) {
        *byte ^= 0xff;
    }
    let write = |name: &str, bytes: &[u8]| -> Result<()> {
        let file = content.join(name);
        fs::create_dir_all(file.parent().unwrap_or(&content))?;
        fs::write(&file, bytes).with_context(|| format!("cannot write {}", file.display()))
    };
    write("unsigned", &kernel)?;
    write("EFI/debian/grub.cfg", MENU.as_bytes())?;
    format(&partial)?;
    fill(&partial, &content)?;
    remove_folder(&content)?;
    fs::rename(&partial, image).with_context(|| format!("cannot make {}", image.display()))
}

fn format(image: &Path) -> Result<()> {
    File::create(image)
        .and_then(|file| file.set_len(DISK))
        .with_context(|| format!("cannot make {}", image.display()))?;
    let table = format!("label: gpt\nstart={}, size={PARTITION_SECTORS}, type=uefi\n", PARTITION / SECTOR);
    let mut sfdisk = Command::new(need_tool("sfdisk", "fdisk")?)
        .arg("--quiet")
        .arg(image)
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start sfdisk")?;
    if let Some(mut input) = sfdisk.stdin.take() {
        input.write_all(table.as_bytes()).context("cannot write to sfdisk")?;
    }
    let status = sfdisk.wait().context("cannot wait for sfdisk")?;
    if !status.success() {
        bail!("sfdisk failed ({status})");
    }
    let sectors = PARTITION_SECTORS.to_string();
    let mut mformat = mtool("mformat", image)?;
    output(mformat.args(["-T", &sectors, "-h", "16", "-s", "63", "-F", "::"])).map(drop)
}

fn fill(image: &Path, content: &Path) -> Result<()> {
    let entries = fs::read_dir(content).with_context(|| format!("cannot read {}", content.display()))?;
    for entry in entries.flatten() {
        output(mtool("mcopy", image)?.arg("-s").arg(entry.path()).arg("::/"))?;
    }
    Ok(())
}

/// A program of mtools for the image's partition.
fn mtool(name: &str, image: &Path) -> Result<Command> {
    let mut command = Command::new(need_tool(name, "mtools")?);
    command.arg("-i").arg(format!("{}@@{PARTITION}", image.display()));
    Ok(command)
}
