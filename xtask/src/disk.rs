//! The guests' disk: a raw image that is one file system, made without being root.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::deb::remove_folder;
use crate::process::{output, say};

const SIZE: u64 = 256 << 20;

const README: &str = "\
This is the guest's disk: an ext4 file system on a virtio block device.
What you write here is still there the next time you boot the guest.
";

/// Makes the image, sparse, unless it is there. `mke2fs` gives the command that makes file systems.
pub(crate) fn make(image: &Path, mke2fs: impl FnOnce() -> Result<Command>) -> Result<()> {
    if image.exists() {
        return Ok(());
    }
    say(&format!("making the disk {}", image.display()));
    let content = image.with_extension("content");
    let partial = image.with_extension("partial");
    remove_folder(&content)?;
    fs::create_dir_all(&content)
        .and_then(|()| fs::write(content.join("README"), README))
        .with_context(|| format!("cannot write {}", content.display()))?;
    File::create(&partial)
        .and_then(|file| file.set_len(SIZE))
        .with_context(|| format!("cannot make {}", partial.display()))?;
    // Nothing is left for the guest's kernel to initialise in the background.
    let options = "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0";
    output(mke2fs()?.args(["-q", "-F", "-t", "ext4", "-L", "guest", "-E", options, "-d"]).arg(&content).arg(&partial))
        .with_context(|| format!("cannot make a file system in {}", partial.display()))?;
    remove_folder(&content)?;
    fs::rename(&partial, image).with_context(|| format!("cannot make {}", image.display()))
}
