//! The benchmark guest: `bench/bench.c` as a static program in an initramfs of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::guests::{Store, copy};
use crate::initramfs;
use crate::layout::{self, Arch};
use crate::process::{need_tool, output, say};

/// `-fno-math-errno`: the work of `sqrt` is to be measured, not that of its error report.
const FLAGS: [&str; 6] = ["-O2", "-static", "-pthread", "-fno-math-errno", "-Wall", "-Wextra"];

/// Builds the guest in a folder and returns its files.
pub(crate) fn build(store: &Store, folder: &Path) -> Result<Vec<PathBuf>> {
    let source = layout::repository().join("bench");
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let [kernel, archive, program] = ["vmlinuz", "initramfs.cpio.gz", "bench"].map(|name| folder.join(name));
    say("compiling the benchmarks");
    let compiler = need_tool("gcc", "gcc libc6-dev")?;
    output(Command::new(compiler).args(FLAGS).arg("-o").arg(&program).arg(source.join("bench.c")))
        .context("cannot build a static program; libc6-dev has what gcc needs for it")?;
    let busybox = store.busybox(Arch::Amd64)?;
    initramfs::write(&initramfs::bench(&busybox, &program, &source.join("init"))?, &archive)?;
    copy(&store.kernel(Arch::Amd64)?, &kernel)?;
    Ok(vec![kernel, archive, program])
}
