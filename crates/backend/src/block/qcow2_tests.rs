//! qcow2 images made and checked by qemu-img.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use memory::{GuestMemory, MemoryOptions};
use platform::GuestRange;

use super::*;

const MIB: u64 = 1 << 20;

struct Bench {
    dir: tempfile::TempDir,
    memory: GuestMemory,
}

/// Runs qemu-img, which must succeed; returns what it printed.
fn qemu_img(words: &[&str]) -> String {
    let output = Command::new("qemu-img").args(words).output().expect("qemu-img (Debian package qemu-utils) is needed");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "qemu-img {words:?}: {text}");
    text
}

impl Bench {
    fn new() -> Self {
        let memory = GuestMemory::new(MemoryOptions { size: 8 << 20, ..Default::default() }).unwrap();
        Self { dir: tempfile::tempdir().unwrap(), memory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new image; `more` are further words for qemu-img.
    fn create(&self, name: &str, more: &[&str]) -> PathBuf {
        let path = self.path(name);
        qemu_img(&[&["create", "-q", "-f", "qcow2"], more, &[path.to_str().unwrap(), "64M"]].concat());
        path
    }

    fn open(&self, path: &Path) -> Result<Disk, BlockError> {
        let options = BlockOptions { format: Format::Qcow2, ..BlockOptions::new(path) };
        Disk::open(&options, self.memory.clone(), "blk-3:0")
    }

    fn refusal(&self, path: &Path) -> String {
        self.open(path).err().expect("it is refused").to_string()
    }

    fn write(&self, disk: &Disk, offset: u64, len: u64, byte: u8) {
        self.memory.fill(0x1000, len, byte).unwrap();
        let from = vec![GuestRange::new(0x1000, 100), GuestRange::new(0x1064, len - 100)];
        run(disk, Operation::Write { offset, from, fua: false }).unwrap();
    }

    fn assert_reads(&self, disk: &Disk, offset: u64, len: u64, byte: u8) {
        self.memory.fill(0x1000, len, !byte).unwrap();
        run(disk, Operation::Read { offset, to: vec![GuestRange::new(0x1000, len)] }).unwrap();
        let mut bytes = vec![0; len as usize];
        self.memory.read(0x1000, &mut bytes).unwrap();
        assert!(bytes.iter().all(|read| *read == byte), "{len} bytes at {offset} are not all {byte:#x}");
    }
}

fn run(disk: &Disk, operation: Operation) -> Result<(), IoError> {
    let (tell, told) = mpsc::channel();
    disk.submit(Request { operation, done: Box::new(move |result| tell.send(result).unwrap()) });
    told.recv_timeout(Duration::from_secs(20)).unwrap()
}

/// Overwrites a byte of a file.
fn patch(path: &Path, at: usize, value: u8) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] = value;
    std::fs::write(path, &bytes).unwrap();
}

fn check(path: &Path) {
    let report = qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    assert!(report.contains("No errors were found"), "{report}");
}

#[test]
fn reads_and_writes_what_qemu_reads_and_writes() {
    let b = Bench::new();
    for (name, more) in [
        ("v3.qcow2", &[] as &[&str]),
        ("v2.qcow2", &["-o", "compat=0.10"]),
        ("small.qcow2", &["-o", "cluster_size=4096"]),
        ("lazy.qcow2", &["-o", "lazy_refcounts=on"]),
        ("data.qcow2", &["-o", "data_file=data.raw"]),
    ] {
        let more: Vec<_> =
            more.iter().map(|word| word.replace("data.raw", b.path("data.raw").to_str().unwrap())).collect();
        let path = b.create(name, &more.iter().map(String::as_str).collect::<Vec<_>>());
        let disk = b.open(&path).unwrap();
        assert_eq!(disk.geometry().size, 64 * MIB);
        b.assert_reads(&disk, 5 * MIB, 8192, 0);
        for n in 0..20 {
            b.write(&disk, n * 3 * MIB + 512 * n, 4096, 1 + n as u8);
        }
        run(&disk, Operation::Flush).unwrap();
        drop(disk);
        check(&path);
        let raw = b.path("raw");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
        let bytes = std::fs::read(&raw).unwrap();
        for n in 0..20usize {
            let at = n * (3 * MIB as usize + 512);
            assert!(bytes[at..at + 4096].iter().all(|byte| *byte == 1 + n as u8), "{name}: write {n}");
        }
        assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 20 * 4096, "{name}");
        let disk = b.open(&path).unwrap();
        b.assert_reads(&disk, 3 * MIB + 512, 4096, 2);
    }
}

#[test]
fn discard_and_zeroes() {
    let b = Bench::new();
    let path = b.create("d.qcow2", &[]);
    let disk = b.open(&path).unwrap();
    assert!(disk.geometry().discard);
    b.write(&disk, 0, MIB, 0x11);
    b.write(&disk, MIB, MIB, 0x22);
    run(&disk, Operation::Discard { offset: 0, len: MIB }).unwrap();
    run(&disk, Operation::WriteZeroes { offset: MIB + 512, len: 1024, unmap: false }).unwrap();
    run(&disk, Operation::WriteZeroes { offset: MIB + 128 * 1024, len: 256 * 1024, unmap: true }).unwrap();
    run(&disk, Operation::Flush).unwrap();
    b.assert_reads(&disk, MIB, 512, 0x22);
    b.assert_reads(&disk, MIB + 512, 1024, 0);
    b.assert_reads(&disk, MIB + 1536, 128 * 1024 - 1536, 0x22);
    b.assert_reads(&disk, MIB + 128 * 1024, 256 * 1024, 0);
    drop(disk);
    check(&path);
    let old = b.create("old.qcow2", &["-o", "compat=0.10"]);
    assert!(!b.open(&old).unwrap().geometry().discard, "version 2 cannot");
}

#[test]
fn backing_chains() {
    let b = Bench::new();
    let base = b.path("base.img");
    std::fs::write(&base, vec![0x33; 64 << 20]).unwrap();
    b.create("mid.qcow2", &["-b", "base.img", "-F", "raw"]);
    let disk = b.open(&b.path("mid.qcow2")).unwrap();
    b.write(&disk, MIB, 65536, 0x44);
    drop(disk);
    let top = b.create("top.qcow2", &["-b", "mid.qcow2", "-F", "qcow2"]);
    let disk = b.open(&top).unwrap();
    b.assert_reads(&disk, 0, 4096, 0x33);
    b.assert_reads(&disk, MIB, 4096, 0x44);
    // Less than a cluster: the rest comes from below.
    b.write(&disk, MIB + 512, 512, 0x55);
    b.assert_reads(&disk, MIB, 512, 0x44);
    b.assert_reads(&disk, MIB + 512, 512, 0x55);
    b.assert_reads(&disk, MIB + 1024, 512, 0x44);
    let second = BlockOptions { format: Format::Qcow2, ..BlockOptions::new(b.path("mid.qcow2")) };
    let error = Disk::open(&second, b.memory.clone(), "blk-4:0").err().unwrap().to_string();
    assert!(error.contains("in use by"), "what others read cannot be written: {error}");
    drop(disk);
    check(&top);
    assert!(std::fs::read(&base).unwrap().iter().all(|byte| *byte == 0x33), "the base is only read");
}

#[test]
fn what_cannot_be_had_is_refused_in_words() {
    let b = Bench::new();
    let raw = b.path("raw.img");
    std::fs::write(&raw, vec![0; 4096]).unwrap();
    assert!(b.refusal(&raw).contains("format=raw"));
    std::fs::write(b.path("short"), b"QFI\xfb").unwrap();
    assert!(b.refusal(&b.path("short")).contains("too short"));
    let zstd = b.create("zstd.qcow2", &["-o", "compression_type=zstd"]);
    assert!(b.refusal(&zstd).contains("zstd"));
    let extended = b.create("extended.qcow2", &["-o", "extended_l2=on"]);
    assert!(b.refusal(&extended).contains("extended L2"));
    let luks = b.create("luks.qcow2", &[]);
    patch(&luks, 35, 2);
    assert!(b.refusal(&luks).contains("LUKS"));

    let top = b.create("top.qcow2", &["-u", "-b", "gone.img", "-F", "raw"]);
    assert!(b.refusal(&top).contains("gone.img"));
    let odd = b.create("odd.qcow2", &["-u", "-b", "gone.vmdk", "-F", "vmdk"]);
    assert!(b.refusal(&odd).contains("vmdk"));
    let remote = b.create("remote.qcow2", &["-u", "-b", "nbd://h/x", "-F", "raw"]);
    assert!(b.refusal(&remote).contains("only names of files"));
    b.create("loop.qcow2", &["-u", "-b", "loop2.qcow2", "-F", "qcow2"]);
    let looped = b.create("loop2.qcow2", &["-u", "-b", "loop.qcow2", "-F", "qcow2"]);
    let error = b.refusal(&looped);
    assert!(error.contains("loop") || error.contains("in use"), "{error}");
    let dirty = b.create("dirty.qcow2", &[]);
    patch(&dirty, 79, 1);
    assert!(b.refusal(&dirty).contains("qemu-img check -r all"));
}

#[test]
fn damaged_images_are_errors_not_panics() {
    let b = Bench::new();
    let path = b.create("x.qcow2", &["-o", "cluster_size=512"]);
    let disk = b.open(&path).unwrap();
    for n in 0..16 {
        b.write(&disk, n * 4 * MIB, 4096, 0x77);
    }
    drop(disk);
    let good = std::fs::read(&path).unwrap();
    let mut seed = 1u64;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as usize % below
    };
    for _ in 0..150 {
        let mut bad = good.clone();
        for _ in 0..4 {
            let at = if random(2) == 0 { random(256) } else { random(bad.len()) };
            bad[at] = random(256) as u8;
        }
        std::fs::write(&path, &bad).unwrap();
        let Ok(disk) = b.open(&path) else { continue };
        for n in 0..16 {
            let at = (n * 4 * MIB).min(disk.geometry().size.saturating_sub(4096));
            // Either is right, as long as it comes back.
            let _ = run(&disk, Operation::Read { offset: at, to: vec![GuestRange::new(0x1000, 4096)] });
            let _ = run(&disk, Operation::Write { offset: at, from: vec![GuestRange::new(0x1000, 512)], fua: false });
        }
        let _ = run(&disk, Operation::Flush);
    }
}
