//! Disks on files: what reaches the file, what comes back, and what goes wrong.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use memory::{GuestMemory, MemoryOptions};
use platform::GuestRange;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

fn ram() -> GuestMemory {
    GuestMemory::new(MemoryOptions { size: 4 << 20, ..Default::default() }).unwrap()
}

struct Bench {
    dir: tempfile::TempDir,
    memory: GuestMemory,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), memory: ram() }
    }

    fn image(&self, size: u64) -> BlockOptions {
        let path = self.dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(size).unwrap();
        BlockOptions::new(path)
    }

    fn open(&self, options: &BlockOptions) -> Result<Disk, BlockError> {
        Disk::open(options, self.memory.clone(), "blk-3:0")
    }

    /// Opens an image that was just closed. A program that another test is starting has the old file, and so its lock, until
    /// it is exec'd.
    fn reopen(&self, options: &BlockOptions) -> Disk {
        let start = Instant::now();
        loop {
            match self.open(options) {
                Err(BlockError::Locked { .. }) if start.elapsed() < PATIENCE => std::thread::yield_now(),
                opened => return opened.unwrap(),
            }
        }
    }
}

/// Submits and returns where the result will come.
fn submit(disk: &Disk, operation: Operation) -> Receiver<Result<(), IoError>> {
    let (tell, told) = mpsc::channel();
    disk.submit(Request { operation, done: Box::new(move |result| tell.send(result).unwrap()) });
    told
}

fn run(disk: &Disk, operation: Operation) -> Result<(), IoError> {
    submit(disk, operation).recv_timeout(PATIENCE).unwrap()
}

fn read(offset: u64, ranges: &[(u64, u64)]) -> Operation {
    Operation::Read { offset, to: ranges.iter().map(|(start, len)| GuestRange::new(*start, *len)).collect() }
}

fn write(offset: u64, ranges: &[(u64, u64)]) -> Operation {
    Operation::Write {
        offset,
        from: ranges.iter().map(|(start, len)| GuestRange::new(*start, *len)).collect(),
        fua: false,
    }
}

#[test]
fn moves_scattered_guest_memory() {
    for (nocache, ring) in [(false, false), (true, false), (false, true), (true, true)] {
        let b = Bench::new();
        let options = BlockOptions { nocache, ring, ..b.image(1 << 20) };
        let disk = b.open(&options).unwrap();
        b.memory.write(0x1000, &[0xaa; 512]).unwrap();
        b.memory.write(0x5001, &[0xbb; 512]).unwrap();
        // The second buffer is not aligned: direct I/O alone would refuse it.
        run(&disk, write(4096, &[(0x1000, 512), (0x5001, 512)])).unwrap();
        run(&disk, Operation::Flush).unwrap();
        let mut on_file = [0; 1024];
        File::open(&options.path).unwrap().read_exact_at(&mut on_file, 4096).unwrap();
        assert!(on_file[..512] == [0xaa; 512] && on_file[512..] == [0xbb; 512], "nocache={nocache} ring={ring}");

        run(&disk, read(4096 + 256, &[(0x9000, 512)])).unwrap();
        let mut back = [0; 512];
        b.memory.read(0x9000, &mut back).unwrap();
        assert!(back[..256] == [0xaa; 256] && back[256..] == [0xbb; 256]);
    }
}

#[test]
fn what_is_outside_the_disk_is_refused() {
    let b = Bench::new();
    let disk = b.open(&b.image((1 << 20) + 700)).unwrap();
    assert_eq!(disk.geometry().size, (1 << 20) + 512, "whole sectors only");
    run(&disk, read((1 << 20) + 256, &[(0, 256)])).unwrap();
    for operation in [
        read((1 << 20) + 512, &[(0, 1)]),
        read(u64::MAX, &[(0, 512)]),
        write((1 << 20) + 500, &[(0, 13)]),
        Operation::Discard { offset: 1024, len: 1 << 20 },
        Operation::WriteZeroes { offset: u64::MAX, len: u64::MAX, unmap: true },
    ] {
        assert!(matches!(run(&disk, operation), Err(IoError::OutOfRange { .. })));
    }
    assert!(matches!(run(&disk, read(0, &[(4 << 20, 512)])), Err(IoError::Memory(_))));
}

#[test]
fn a_file_cut_short_gives_errors_not_zeroes() {
    let b = Bench::new();
    let options = b.image(1 << 20);
    let disk = b.open(&options).unwrap();
    File::options().write(true).open(&options.path).unwrap().set_len(4096).unwrap();
    assert!(matches!(run(&disk, read(0x8000, &[(0, 512)])), Err(IoError::Host(_))));
    run(&disk, read(0, &[(0, 512)])).unwrap();
}

#[test]
fn discard_gives_space_back_and_zeroes_read_zero() {
    let b = Bench::new();
    let options = b.image(4 << 20);
    fs::write(&options.path, vec![0x55; 4 << 20]).unwrap();
    let disk = b.open(&options).unwrap();
    let blocks = || fs::metadata(&options.path).unwrap().blocks();
    let full = blocks();
    if disk.geometry().discard {
        run(&disk, Operation::Discard { offset: 1 << 20, len: 1 << 20 }).unwrap();
        assert!(blocks() < full);
        run(&disk, Operation::WriteZeroes { offset: 2 << 20, len: 1 << 20, unmap: true }).unwrap();
        assert!(blocks() < full - 2048);
    }
    run(&disk, Operation::WriteZeroes { offset: 100, len: 200_000, unmap: false }).unwrap();
    let now = fs::read(&options.path).unwrap();
    assert_eq!(now.len(), 4 << 20, "the size stays");
    assert!(now[..100] == [0x55; 100] && now[100..200_100].iter().all(|byte| *byte == 0) && now[200_100] == 0x55);

    drop(disk);
    let disk = b.reopen(&BlockOptions { discard: false, ..options.clone() });
    assert!(!disk.geometry().discard);
    let before = blocks();
    run(&disk, Operation::WriteZeroes { offset: 3 << 20, len: 1 << 20, unmap: true }).unwrap();
    assert!(blocks() >= before, "nodelete keeps the space");
    assert!(fs::read(&options.path).unwrap()[3 << 20..].iter().all(|byte| *byte == 0));
}

#[test]
fn read_only_disks_refuse_changes() {
    let b = Bench::new();
    let options = BlockOptions { read_only: true, ..b.image(1 << 20) };
    let disk = b.open(&options).unwrap();
    assert!(disk.geometry().read_only && !disk.geometry().discard);
    run(&disk, read(0, &[(0, 512)])).unwrap();
    run(&disk, Operation::Flush).unwrap();
    for operation in [
        write(0, &[(0, 512)]),
        Operation::Discard { offset: 0, len: 512 },
        Operation::WriteZeroes { offset: 0, len: 512, unmap: false },
    ] {
        assert!(matches!(run(&disk, operation), Err(IoError::ReadOnly)));
    }
}

#[test]
fn every_way_of_writing_reaches_the_file() {
    for (nocache, ring, sync, fua) in (0..16).map(|bits| (bits & 1 > 0, bits & 2 > 0, bits & 4 > 0, bits & 8 > 0)) {
        let b = Bench::new();
        let options = BlockOptions { nocache, ring, sync, ..b.image(8 << 20) };
        let disk = b.open(&options).unwrap();
        // More requests than a ring has room for, some with more pieces than the kernel takes at once.
        let results: Vec<_> = (0..1500u64)
            .map(|n| {
                b.memory.fill(0x1000 * (n % 512), 4096, 1 + (n % 250) as u8).unwrap();
                let pieces = if n % 100 == 0 { 2048 } else { 2 };
                let from = (0..pieces)
                    .map(|piece| GuestRange::new(0x1000 * (n % 512) + 4096 / pieces * piece, 4096 / pieces))
                    .collect();
                let operation = Operation::Write { offset: 4096 * n, from, fua };
                if n % 512 == 511 {
                    run(&disk, operation).map_or_else(|why| panic!("{why}"), |()| None)
                } else {
                    Some(submit(&disk, operation))
                }
            })
            .collect();
        for result in results.into_iter().flatten() {
            result.recv_timeout(PATIENCE).unwrap().unwrap();
        }
        disk.wait_idle();
        drop(disk);
        assert_eq!(fs::metadata(&options.path).unwrap().len(), 8 << 20);
        let bytes = fs::read(&options.path).unwrap();
        for n in (0..1500usize).filter(|n| (n / 512) * 512 + 511 < 1500 || *n >= 1024) {
            let page = &bytes[4096 * n..4096 * (n + 1)];
            assert!(page.iter().all(|byte| *byte != 0), "page {n} nocache={nocache} ring={ring} sync={sync} fua={fua}");
        }
        assert!(bytes[4096 * 1500..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_ring_reads_many_requests_in_any_order() {
    let b = Bench::new();
    let options = BlockOptions { lock: false, ..b.image(8 << 20) };
    let pattern: Vec<u8> = (0..8u32 << 20).map(|at| (at / 4096 % 251) as u8 ^ at as u8).collect();
    fs::write(&options.path, &pattern).unwrap();
    for ring in [true, false] {
        let disk = b.open(&BlockOptions { ring, ..options.clone() }).unwrap();
        let mut results = Vec::new();
        for n in 0..700u64 {
            let page = n * 7919 % 2048;
            results.push((n, page, submit(&disk, read(4096 * page, &[(0x1000 * n, 1000), (0x1000 * n + 1000, 3096)]))));
        }
        for (n, page, result) in results {
            result.recv_timeout(PATIENCE).unwrap().unwrap();
            let mut bytes = vec![0; 4096];
            b.memory.read(0x1000 * n, &mut bytes).unwrap();
            assert!(bytes == pattern[4096 * page as usize..][..4096], "request {n}, page {page}, ring={ring}");
        }
    }
}

#[test]
fn a_file_that_grows_makes_the_disk_larger() {
    let b = Bench::new();
    let options = b.image(1 << 20);
    let disk = b.open(&options).unwrap();
    let (tell, told) = mpsc::channel();
    disk.on_resize(Box::new(move || tell.send(()).unwrap()));
    File::options().write(true).open(&options.path).unwrap().set_len(3 << 20).unwrap();
    told.recv_timeout(PATIENCE).unwrap();
    assert_eq!(disk.geometry().size, 3 << 20);
    run(&disk, write((3 << 20) - 512, &[(0, 512)])).unwrap();
    // Writes of this disk itself are no news, and a touch makes it look again.
    File::options().write(true).open(&options.path).unwrap().set_len(4 << 20).unwrap();
    told.recv_timeout(PATIENCE).unwrap();
    assert_eq!(disk.geometry().size, 4 << 20);
}

#[test]
fn limits_hold_requests_back() {
    let b = Bench::new();
    let limits = Limits { iops: 200, bps: 0 };
    let options = BlockOptions { limits, ..b.image(1 << 20) };
    let disk = b.open(&options).unwrap();
    let start = Instant::now();
    let results: Vec<_> = (0..61).map(|n| submit(&disk, read(n * 512, &[(0, 512)]))).collect();
    for result in results {
        result.recv_timeout(PATIENCE).unwrap().unwrap();
    }
    // 61 requests less a burst of 20.
    assert!(start.elapsed() >= Duration::from_millis(195), "{:?}", start.elapsed());
    disk.wait_idle();

    drop(disk);
    let limits = Limits { iops: 0, bps: 1 << 20 };
    let disk = b.reopen(&BlockOptions { limits, ..options });
    let start = Instant::now();
    let results: Vec<_> = (0..3).map(|_| submit(&disk, write(0, &[(0, 256 << 10)]))).collect();
    disk.wait_idle();
    assert!(start.elapsed() >= Duration::from_millis(300), "{:?}", start.elapsed());
    assert!(results.into_iter().all(|result| result.try_recv().unwrap().is_ok()));
    let waiting: Vec<_> = (0..50).map(|_| submit(&disk, write(0, &[(0, 1 << 20)]))).collect();
    disk.cancel_queued();
    let cancelled = waiting.into_iter().map(|result| result.recv_timeout(PATIENCE).unwrap());
    assert!(cancelled.filter(|result| matches!(result, Err(IoError::Cancelled))).count() >= 47);
}

#[test]
fn falls_back_to_reading_only() {
    // A file that nobody may open for writing, not even root, for whom permissions do not count.
    let path = "/sys/kernel/uevent_seqnum";
    assert!(File::options().write(true).open(path).is_err());
    let disk = Bench::new().open(&BlockOptions::new(path)).unwrap();
    assert!(disk.geometry().read_only && !disk.geometry().discard);
}

#[test]
fn sector_sizes_are_presented_as_asked() {
    let b = Bench::new();
    let options = b.image(1 << 20);
    let natural = b.open(&options).unwrap().geometry().sector_size;
    assert_eq!(natural.logical, 512);
    assert!(natural.physical >= 512 && natural.physical.is_power_of_two());
    let wanted = SectorSize { logical: 4096, physical: 8192 };
    let disk = b.open(&BlockOptions { sector_size: Some(wanted), ..options }).unwrap();
    assert_eq!(disk.geometry().sector_size, wanted);
}

#[test]
fn says_why_a_disk_cannot_be_opened() {
    let b = Bench::new();
    let missing = b.dir.path().join("missing.img");
    let error = b.open(&BlockOptions::new(&missing)).err().unwrap();
    assert_eq!(error.to_string(), format!("Could not open backing file: {}", missing.display()));
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "No such file or directory (os error 2)");
    let error = b.open(&BlockOptions::new("/dev/null")).err().unwrap().to_string();
    assert!(error.ends_with("it is a character device, not a regular file or block device"), "{error}");
    let error = b.open(&BlockOptions::new(b.dir.path())).err().unwrap().to_string();
    assert!(error.contains("it is a directory"), "{error}");
}

#[test]
fn one_writer_or_many_readers() {
    let b = Bench::new();
    let options = b.image(1 << 20);
    let reader = BlockOptions { read_only: true, ..options.clone() };
    let writing = b.open(&options).unwrap();
    let error = b.open(&options).err().unwrap().to_string();
    assert!(error.contains("in use by another process") && error.contains("lock=off"), "{error}");
    assert!(matches!(b.open(&reader), Err(BlockError::Locked { .. })));
    b.open(&BlockOptions { lock: false, ..options.clone() }).unwrap();
    drop(writing);

    let _one = b.open(&reader).unwrap();
    let _two = b.open(&reader).unwrap();
    assert!(matches!(b.open(&options), Err(BlockError::Locked { .. })));
}

#[test]
fn names_the_process_that_holds_the_lock() {
    let b = Bench::new();
    let options = b.image(1 << 20);
    let file = File::options().read(true).write(true).open(&options.path).unwrap();
    lock::lock(&file, &options.path, true).unwrap();
    // The lock belongs to the open file, which the child keeps when this process lets go of it.
    let mut child = std::process::Command::new("sleep").arg("1000").stdin(file).spawn().unwrap();
    // A process that has only just become another program has no command line for a moment.
    let command = format!("/proc/{}/cmdline", child.id());
    while std::fs::read(&command).unwrap().is_empty() {
        std::thread::yield_now();
    }
    let error = b.open(&options).err().unwrap().to_string();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(error.contains(&format!("in use by process {} (sleep 1000)", child.id())), "{error}");
    b.open(&options).unwrap();
}

/// An image whose reads wait until the test lets them.
struct Slow {
    barrier: Arc<Barrier>,
    reads: Arc<AtomicUsize>,
}

impl Image for Slow {
    fn geometry(&self) -> Geometry {
        let sector_size = SectorSize { logical: 512, physical: 512 };
        Geometry { size: 1 << 30, sector_size, read_only: false, discard: true }
    }
    fn read(&self, _: u64, _: &HostBuffers) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.barrier.wait();
        Ok(())
    }
    fn write(&self, _: u64, _: &HostBuffers, _: bool) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
    fn flush(&self) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
}

fn slow(parties: usize) -> (Disk, Arc<Barrier>, Arc<AtomicUsize>) {
    let (barrier, reads) = (Arc::new(Barrier::new(parties)), Arc::new(AtomicUsize::new(0)));
    let image = Arc::new(Slow { barrier: barrier.clone(), reads: reads.clone() });
    (Disk::with_image(image, ram(), "blk-0:0", "slow".into()).unwrap(), barrier, reads)
}

#[test]
fn eight_requests_at_a_time() {
    // The barrier opens only when eight reads are inside it at once.
    let (disk, _, reads) = slow(8);
    let results: Vec<_> = (0..16).map(|_| submit(&disk, read(0, &[(0, 512)]))).collect();
    for result in results {
        result.recv_timeout(PATIENCE).unwrap().unwrap();
    }
    assert_eq!(reads.load(Ordering::SeqCst), 16);
}

#[test]
fn cancels_what_has_not_begun_and_waits_for_the_rest() {
    let (disk, barrier, reads) = slow(9);
    let results: Vec<_> = (0..20).map(|_| submit(&disk, read(0, &[(0, 512)]))).collect();
    while reads.load(Ordering::SeqCst) < 8 {
        std::thread::yield_now();
    }
    disk.cancel_queued();
    barrier.wait();
    disk.wait_idle();
    let results: Vec<_> = results.into_iter().map(|result| result.recv_timeout(PATIENCE).unwrap()).collect();
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 8);
    assert_eq!(results.iter().filter(|result| matches!(result, Err(IoError::Cancelled))).count(), 12);
}

#[test]
fn host_errors_come_back_as_errors() {
    let (disk, ..) = slow(1);
    assert!(
        matches!(run(&disk, write(0, &[(0, 512)])), Err(IoError::Host(why)) if why.raw_os_error() == Some(libc::EIO))
    );
    assert!(
        matches!(run(&disk, Operation::Flush), Err(IoError::Host(why)) if why.raw_os_error() == Some(libc::ENOSPC))
    );
}

#[test]
fn deferred_calls_run_on_the_disks_threads_and_may_own_the_disk() {
    let (disk, ..) = slow(1);
    let disk = Arc::new(disk);
    let (tell, told) = mpsc::channel();
    let (theirs, tell_end) = (disk.clone(), tell.clone());
    disk.defer(move || {
        let name = || std::thread::current().name().unwrap_or_default().to_owned();
        let (before, here) = (tell.clone(), name());
        let done = Box::new(move |result: Result<(), IoError>| {
            result.unwrap();
            tell.send(name()).unwrap();
        });
        theirs.perform(Request { operation: read(0, &[(0, 512)]), done });
        before.send(here).unwrap();
    });
    for _ in 0..2 {
        assert!(told.recv_timeout(PATIENCE).unwrap().starts_with("blk-0:0-"));
    }
    let theirs = disk.clone();
    let (go, gone) = mpsc::channel::<()>();
    disk.defer(move || {
        // It holds the last reference when the other one is gone.
        assert!(gone.recv().is_err());
        drop((theirs, tell_end));
    });
    drop(disk);
    drop(go);
    assert!(told.recv_timeout(PATIENCE).is_err(), "the channel closes with the call");
}

#[test]
fn a_call_that_hangs_does_not_hold_up_the_others() {
    let (disk, barrier, reads) = slow(2);
    let first = submit(&disk, read(0, &[(0, 512)]));
    while reads.load(Ordering::SeqCst) < 1 {
        std::thread::yield_now();
    }
    // Behind it there is one that fails at once; the first goes on when that has been told.
    let second = submit(&disk, write(0, &[(0, 512)]));
    assert!(second.recv_timeout(PATIENCE).unwrap().is_err());
    assert!(first.try_recv().is_err());
    barrier.wait();
    first.recv_timeout(PATIENCE).unwrap().unwrap();
}

#[test]
fn ends_are_settled_after_they_are_told() {
    let b = Bench::new();
    let options = BlockOptions { lock: false, ..b.image(1 << 20) };
    let open = |ring| b.open(&BlockOptions { ring, ..options.clone() }).unwrap();
    for disk in [slow(1).0, open(true), open(false)] {
        let (told, settled) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (tell, settle) = (told.clone(), settled.clone());
        disk.on_settled(Box::new(move || {
            settle.fetch_max(tell.load(Ordering::SeqCst), Ordering::SeqCst);
        }));
        for n in 0..200 {
            let told = told.clone();
            let len = if n % 50 == 0 { 256 << 10 } else { 512 };
            let done = Box::new(move |_| {
                told.fetch_add(1, Ordering::SeqCst);
            });
            let operation = if n % 3 == 0 { read(0, &[(0, len)]) } else { write(0, &[(0, len)]) };
            disk.submit(Request { operation, done });
        }
        disk.wait_idle();
        assert_eq!((told.load(Ordering::SeqCst), settled.load(Ordering::SeqCst)), (200, 200));
    }
}
