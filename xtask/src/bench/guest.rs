//! The two guests: small programs in an initramfs, and a Debian root file system with ordinary ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::guests::{Store, copy};
use crate::initramfs;
use crate::layout::{self, Arch};
use crate::process::{need_tool, output, run, say};

/// `-fno-math-errno`: the work of `sqrt` is to be measured, not that of its error report.
const FLAGS: [&str; 6] = ["-O2", "-static", "-pthread", "-fno-math-errno", "-Wall", "-Wextra"];

/// For 32-bit code without a library: what gcc can build without the packages for it.
const FLAGS_32: [&str; 9] =
    ["-m32", "-O2", "-ffreestanding", "-nostdlib", "-static", "-fno-pie", "-no-pie", "-fno-stack-protector", "-Wall"];

/// The small guest: `bench/bench.c` and `bench/bench32.c` as static programs in an initramfs.
pub(crate) struct Small {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) program: PathBuf,
    pub(super) program_32: PathBuf,
}

impl Small {
    /// Builds it, or what of it has changed.
    pub(crate) fn build(store: &Store) -> Result<Self> {
        let folder = store.folder("bench")?;
        let source = layout::repository().join("bench");
        let [kernel, archive, program, program_32] =
            ["vmlinuz", "initramfs.cpio.gz", "bench", "bench32"].map(|name| folder.join(name));
        say("compiling the benchmarks");
        let compiler = need_tool("gcc", "gcc libc6-dev")?;
        output(Command::new(&compiler).args(FLAGS).arg("-o").arg(&program).arg(source.join("bench.c")))
            .context("cannot build a static program; libc6-dev has what gcc needs for it")?;
        output(Command::new(compiler).args(FLAGS_32).arg("-o").arg(&program_32).arg(source.join("bench32.c")))
            .context("cannot build a 32-bit program")?;
        let busybox = store.busybox(Arch::Amd64)?;
        let programs = [("bench", &*program), ("bench32", &*program_32)];
        initramfs::write(&initramfs::bench(&busybox, &programs, &source.join("init"))?, &archive)?;
        copy(&store.kernel(Arch::Amd64)?, &kernel)?;
        Ok(Self { kernel, initramfs: archive, program, program_32 })
    }

    /// Its files.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        vec![self.kernel.clone(), self.initramfs.clone(), self.program.clone(), self.program_32.clone()]
    }
}

/// What the guest with real programs has beyond Debian's minimal system.
const PACKAGES: &str = "python3,sqlite3,openssl,xz-utils,zstd,perl,busybox-static";
/// Debian's release: the programs, and with them the checksums, are to be the same everywhere.
const SUITE: &str = "bookworm";
/// Size of its disk.
const DISK: &str = "1500M";

/// The guest with real programs: a root file system on a read-only disk, which also runs natively.
pub(crate) struct Real {
    /// The root file system as a folder.
    pub(super) root: PathBuf,
    pub(super) disk: PathBuf,
    pub(super) initramfs: PathBuf,
    /// A disk for a guest to write to.
    pub(super) scratch: PathBuf,
}

impl Real {
    /// Builds it, or what of it has changed. The first time fetches some hundred MB of packages.
    pub(crate) fn build(store: &Store) -> Result<Self> {
        let folder = store.folder("bench-real")?;
        let source = layout::repository().join("bench/real");
        let [root, disk, archive, scratch] =
            ["rootfs", "root.ext4", "initramfs.cpio.gz", "scratch.img"].map(|name| folder.join(name));
        if !root.join("etc/debian_version").exists() {
            fetch(&folder, &root)?;
        }
        let scripts = ["bench-init", "bench-real.sh"];
        let same = |name: &&str| fs::read(source.join(name)).ok() == fs::read(root.join(name)).ok();
        if !disk.exists() || !scripts.iter().all(same) {
            for name in scripts {
                copy(&source.join(name), &root.join(name))?;
            }
            make_disk(&root, &disk)?;
        }
        let modules = store.kernel(Arch::Amd64)?.with_file_name("modules");
        let busybox = store.busybox(Arch::Amd64)?;
        initramfs::write(&initramfs::bench_real(&busybox, &modules, &source.join("init"))?, &archive)?;
        Ok(Self { root, disk, initramfs: archive, scratch })
    }

    /// Its files.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        vec![self.initramfs.clone(), self.disk.clone()]
    }
}

/// Fetches the root file system: as an ordinary user too, where user namespaces are allowed.
fn fetch(folder: &Path, root: &Path) -> Result<()> {
    let mmdebstrap = need_tool("mmdebstrap", "mmdebstrap")?;
    say("fetching a Debian root file system");
    let archive = folder.join("rootfs.tar");
    let mut command = Command::new(mmdebstrap);
    command.args(["--variant=minbase", "--aptopt=Acquire::Languages \"none\"", "--quiet"]);
    command.arg(format!("--include={PACKAGES}"));
    command.arg("--customize-hook=rm -rf \"$1\"/var/lib/apt/lists/* \"$1\"/var/cache/apt/*.bin");
    command.arg(SUITE).arg(&archive);
    run(&mut command).context("as an ordinary user, mmdebstrap needs user namespaces and the package uidmap")?;
    let fresh = root.with_extension("fresh");
    crate::deb::remove_folder(&fresh)?;
    fs::create_dir_all(&fresh).with_context(|| format!("cannot make {}", fresh.display()))?;
    // Devices cannot be made by everybody, and both the guest and the native run have a /dev of their own.
    let mut unpack = Command::new(need_tool("tar", "tar")?);
    unpack.args(["--no-same-owner", "--exclude=./dev/*", "-xpf"]).arg(&archive).arg("-C").arg(&fresh);
    run(&mut unpack)?;
    let _ = fs::remove_file(&archive);
    crate::deb::remove_folder(root)?;
    fs::rename(&fresh, root).with_context(|| format!("cannot make {}", root.display()))
}

fn make_disk(root: &Path, disk: &Path) -> Result<()> {
    say(&format!("building {}", disk.display()));
    let partial = disk.with_extension("partial");
    let _ = fs::remove_file(&partial);
    let mke2fs = need_tool("mke2fs", "e2fsprogs")?;
    let mut command = Command::new(mke2fs);
    command.args(["-q", "-t", "ext4", "-L", "bench-root", "-d"]).arg(root).arg(&partial).arg(DISK);
    run(&mut command)?;
    if !partial.exists() {
        bail!("mke2fs made no {}", partial.display());
    }
    fs::rename(&partial, disk).with_context(|| format!("cannot make {}", disk.display()))
}
