//! The program under test, guests' files, scratch folders.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// The repository's top folder.
pub fn repository() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    folder.canonicalize().unwrap_or(folder)
}

fn variable(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The program under test.
///
/// # Panics
/// There is none.
pub fn program() -> PathBuf {
    let path = variable("BHYVE_BIN").unwrap_or_else(|| {
        let target = variable("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
        repository().join(target).join("release/bhyve")
    });
    path.canonicalize().unwrap_or_else(|why| {
        panic!(
            "there is no bhyve at {} ({why}): build it with `cargo build --release -p bhyve`, or name it in BHYVE_BIN",
            path.display()
        )
    })
}

/// A file of the guests' folder.
///
/// # Panics
/// It is missing.
pub fn guest_file(name: &str) -> PathBuf {
    let folder = variable("BHYVE_GUESTS").unwrap_or_else(|| repository().join("guests"));
    let path = folder.join(name);
    path.canonicalize().unwrap_or_else(|why| {
        panic!(
            "the guest file {} is not there ({why}): make it with `cargo xtask guest all`, or name the guests' folder in \
             BHYVE_GUESTS",
            path.display()
        )
    })
}

/// A new folder for what a test leaves on the disk; it goes when dropped.
///
/// # Panics
/// The host has no room for it.
pub fn scratch() -> TempDir {
    tempfile::Builder::new().prefix("bhyve-e2e-").tempdir().expect("cannot make a folder for temporary files")
}

/// A private copy of the guests' disk image in `folder`.
///
/// # Panics
/// It is missing, or there is no room.
pub fn copy_disk(folder: &Path) -> PathBuf {
    let (from, to) = (guest_file("disk.img"), folder.join("disk.img"));
    fs::copy(&from, &to).unwrap_or_else(|why| panic!("cannot copy {} to {}: {why}", from.display(), to.display()));
    to
}

/// Copies a file; holes stay holes, and where the file system can share the blocks nothing is copied.
///
/// # Panics
/// There is no room.
pub fn copy_sparse(from: &Path, to: &Path) {
    let output = Command::new("cp").args(["--sparse=always", "--reflink=auto"]).args([from, to]).output();
    let output = output.unwrap_or_else(|why| panic!("cannot run cp: {why}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Checks the ext4 file system of an installed Debian's disk (its second partition) and changes nothing.
///
/// # Panics
/// There is something to repair, or no e2fsck.
pub fn check_root_file_system(disk: &Path) {
    // Where the recipe puts it: behind 1 MB for the partition table and the EFI system partition of 64 MB.
    let place = format!("{}?offset={}", disk.display(), 65 << 20);
    check_file_system(Path::new(&place));
}

/// Checks the ext4 file system in `image` and changes nothing.
///
/// # Panics
/// There is something to repair, or no e2fsck.
pub fn check_file_system(image: &Path) {
    // Not on the path of ordinary users everywhere.
    let places = ["/usr/sbin/e2fsck", "/sbin/e2fsck"].map(Path::new);
    let program = places.into_iter().find(|place| place.exists()).unwrap_or(Path::new("e2fsck"));
    let output = Command::new(program).arg("-fn").arg(image).output();
    let output = output.unwrap_or_else(|why| panic!("cannot run e2fsck ({why}): install e2fsprogs"));
    assert!(output.status.success(), "e2fsck -fn: {}\n{}", output.status, String::from_utf8_lossy(&output.stdout));
}

/// The names of all files and folders in `folder`, sorted.
///
/// # Panics
/// It cannot be read.
pub fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|why| panic!("cannot list {}: {why}", folder.display()));
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
