//! Unpacking Debian packages, without installing them.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::{need_tool, run};

/// Unpacks a package's files into a folder that is made anew.
pub(crate) fn unpack(package: &Path, folder: &Path) -> Result<()> {
    remove_folder(folder)?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    run(Command::new(need_tool("dpkg-deb", "dpkg")?).arg("-x").arg(package).arg(folder))
        .with_context(|| format!("cannot unpack {}", package.display()))
}

/// Removes a folder with all that is in it, if it is there.
pub(crate) fn remove_folder(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}
