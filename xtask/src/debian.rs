//! Installed Debian systems, each on a disk of its own that firmware can boot.
//!
//! mmdebstrap installs the packages; the scripts of `xtask/guest/debian` do the rest. An ordinary user needs subordinate
//! user ids (package uidmap): the work is done in a user namespace then.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::{Apt, RELEASE};
use crate::deb::remove_folder;
use crate::guests::{replace_folder, write};
use crate::layout::{self, Arch};
use crate::process::{find_tool, need_tool, run, say};

/// Packages of every system: what makes it boot, and what tests run in it.
const PACKAGES: [&str; 17] = [
    "acpica-tools",
    "curl",
    "dbus",
    "dmidecode",
    "dosfstools",
    "e2fsprogs",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "lz4",
    "numactl",
    "pciutils",
    "python3-minimal",
    "socat",
    "systemd-sysv",
    "udev",
];

/// More packages of the amd64 system, which is the one that firmware boots and benchmarks run in.
const AMD64_PACKAGES: [&str; 8] = [
    "efibootmgr",
    "fio",
    "grub-efi-amd64",
    "grub-efi-amd64-signed",
    "iperf3",
    "qemu-guest-agent",
    "shim-signed",
    "tpm2-tools",
];

/// More packages of the i386 system; Debian signs nothing for it.
const I386_PACKAGES: [&str; 2] = ["grub-common", "grub-efi-amd64-bin"];

/// Documentation stays away.
const LEFT_OUT: [&str; 3] = ["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*"];

/// Makes the folder of a system, unless it is there and made by this recipe.
pub(crate) fn make(apt: &Apt, arch: Arch, folder: &Path) -> Result<()> {
    let scripts = layout::repository().join("xtask/guest/debian");
    let recipe = recipe(arch, &scripts)?;
    if fs::read_to_string(folder.join("recipe")).is_ok_and(|old| old == recipe) {
        return Ok(());
    }
    say(&format!("installing Debian {RELEASE} for {arch} (takes a few minutes)"));
    for (tool, package) in
        [("sfdisk", "fdisk"), ("mkfs.vfat", "dosfstools"), ("mcopy", "mtools"), ("mke2fs", "e2fsprogs")]
    {
        need_tool(tool, package)?;
    }
    let fresh = folder.with_extension("fresh");
    let is_root = rustix::process::geteuid().is_root();
    clean(&fresh, is_root)?;
    fs::create_dir_all(&fresh).with_context(|| format!("cannot make {}", fresh.display()))?;
    let tar = fresh.join("root.tar");
    install(apt, arch, &scripts, &tar, is_root)?;
    run(as_root(is_root)?.arg("sh").arg(scripts.join("image")).args([&tar, &fresh]))
        .with_context(|| format!("cannot make the disk of Debian for {arch}"))?;
    fs::remove_file(&tar).with_context(|| format!("cannot remove {}", tar.display()))?;
    write(&fresh.join("recipe"), &recipe)?;
    replace_folder(&fresh, folder)
}

/// Everything that the disk is made of, but for the packages' versions.
fn recipe(arch: Arch, scripts: &Path) -> Result<String> {
    let mut text = packages(arch).join("\n");
    for script in ["customize", "image"] {
        let file = scripts.join(script);
        text += &fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    }
    Ok(text)
}

fn packages(arch: Arch) -> Vec<&'static str> {
    let more: &[_] = match arch {
        Arch::Amd64 => &AMD64_PACKAGES,
        Arch::I386 => &I386_PACKAGES,
    };
    [&PACKAGES, more, &[arch.kernel_package()]].concat()
}

/// Installs the packages into a tar file.
fn install(apt: &Apt, arch: Arch, scripts: &Path, tar: &Path, is_root: bool) -> Result<()> {
    let mut command = Command::new(need_tool("mmdebstrap", "mmdebstrap")?);
    command.args(["--quiet", "--variant=apt", "--format=tar"]);
    command.arg(if is_root { "--mode=root" } else { "--mode=unshare" });
    command.arg(format!("--architectures={arch}"));
    command.args([
        "--aptopt=APT::Install-Recommends \"false\"",
        "--aptopt=Acquire::Languages \"none\"",
        "--aptopt=Acquire::Retries \"3\"",
    ]);
    command.args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
    command.arg(format!("--include={}", packages(arch).join(",")));
    command.arg(format!("--customize-hook={}", scripts.join("customize").display()));
    command.arg(RELEASE).arg(tar).arg(apt.sources());
    run(&mut command).with_context(|| format!("cannot install Debian for {arch}"))
}

/// The start of a command that may own files as any user.
fn as_root(is_root: bool) -> Result<Command> {
    if is_root {
        return Ok(Command::new("env"));
    }
    if find_tool("newuidmap").is_none() {
        bail!("newuidmap is not installed: get it with \"sudo apt-get install uidmap\"");
    }
    let mut command = Command::new(need_tool("unshare", "util-linux")?);
    command.args(["--map-root-user", "--map-auto"]);
    Ok(command)
}

/// Removes what an interrupted run has left, other users' files too.
fn clean(folder: &Path, is_root: bool) -> Result<()> {
    if folder.exists() && !is_root {
        run(as_root(is_root)?.args(["rm", "-rf"]).arg(folder))?;
    }
    remove_folder(folder)
}
