//! The client against a server that the tests control, and against qemu-nbd.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use memory::{GuestMemory, MemoryOptions};
use platform::GuestRange;

use crate::block::{BlockError, BlockOptions, Disk, Format, IoError, NbdUri, Operation, Request};

const PATIENCE: Duration = Duration::from_secs(20);
const SIZE: u64 = 16 << 20;
/// HAS_FLAGS, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES.
const PLAIN: u16 = 1 | 1 << 2 | 1 << 5 | 1 << 6;

/// What the server does besides serving.
#[derive(Clone, Copy, Default)]
struct Behaviour {
    flags: u16,
    /// Dies at this request of the first connection, at twice that of the second and so on; what was not flushed is lost.
    die_at: Option<u64>,
    /// Answers nothing after the handshake.
    mute: bool,
}

/// A disk with a volatile cache, by sector.
#[derive(Default)]
struct Store {
    durable: BTreeMap<u64, [u8; 512]>,
    cache: BTreeMap<u64, [u8; 512]>,
    connections: u64,
    /// Requests that were heard and are not answered.
    unanswered: u64,
    flushes: u64,
    fua: u64,
    /// Lengths of reads.
    reads: Vec<u64>,
}

struct Server {
    store: Arc<Mutex<Store>>,
    behaviour: Arc<Mutex<Behaviour>>,
    dir: tempfile::TempDir,
}

impl Server {
    fn start(behaviour: Behaviour) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("nbd.sock")).unwrap();
        let (store, behaviour) = (Arc::<Mutex<Store>>::default(), Arc::new(Mutex::new(behaviour)));
        let (theirs, how) = (store.clone(), behaviour.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut now = *how.lock().unwrap();
                let mut store = theirs.lock().unwrap();
                store.connections += 1;
                now.die_at = now.die_at.map(|at| at * store.connections);
                drop(store);
                // A client that goes away is no failure.
                let _ = serve(stream.unwrap(), &theirs, now);
                theirs.lock().unwrap().cache.clear();
            }
        });
        Self { store, behaviour, dir }
    }

    fn options(&self) -> BlockOptions {
        options(&self.dir.path().join("nbd.sock"), "disk")
    }

    fn become_good(&self) {
        let mut behaviour = self.behaviour.lock().unwrap();
        *behaviour = Behaviour { flags: behaviour.flags, ..Behaviour::default() };
    }
}

fn options(socket: &Path, export: &str) -> BlockOptions {
    let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
    BlockOptions { format: Format::Nbd(NbdUri::parse(&uri).unwrap()), ..BlockOptions::new(uri) }
}

fn serve(mut stream: UnixStream, store: &Mutex<Store>, behaviour: Behaviour) -> std::io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    let mut word = [0; 4];
    stream.read_exact(&mut word)?;
    assert_eq!(word, [0, 0, 0, 3], "client flags");
    // An option that it does not know, then the old one.
    for round in 0..2 {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let len = u32::from_be_bytes(header[12..].try_into().unwrap());
        stream.read_exact(&mut vec![0; len as usize])?;
        let option: [u8; 4] = header[8..12].try_into().unwrap();
        if round == 0 {
            assert_eq!(u32::from_be_bytes(option), 7, "NBD_OPT_GO first");
            let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
            stream.write_all(&[&magic[..], &option, &0x8000_0001_u32.to_be_bytes(), &[0; 4]].concat())?;
        } else {
            assert_eq!(u32::from_be_bytes(option), 1, "NBD_OPT_EXPORT_NAME then");
            stream.write_all(&[&SIZE.to_be_bytes()[..], &behaviour.flags.to_be_bytes()].concat())?;
        }
    }
    for number in 0.. {
        let mut header = [0; 28];
        stream.read_exact(&mut header)?;
        let field =
            |at: usize, len: usize| header[at..at + len].iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        let (kind, offset, len) = (field(6, 2), field(16, 8), field(24, 4));
        let mut data = vec![0; if kind == 1 { len as usize } else { 0 }];
        stream.read_exact(&mut data)?;
        if kind == 2 || behaviour.die_at == Some(number) {
            return Ok(());
        }
        if behaviour.mute {
            store.lock().unwrap().unanswered += 1;
            // Until the client has had enough.
            loop {
                stream.read_exact(&mut [0])?;
            }
        }
        let mut store = store.lock().unwrap();
        let (sector, sectors) = (offset / 512, len / 512);
        let mut answer = Vec::new();
        for at in sector..sector + sectors {
            match kind {
                0 => {
                    let found = store.cache.get(&at).or_else(|| store.durable.get(&at));
                    answer.extend(found.copied().unwrap_or([0; 512]));
                }
                1 => {
                    let from = (at - sector) as usize * 512;
                    store.cache.insert(at, data[from..from + 512].try_into().unwrap());
                }
                4 | 6 => drop(store.cache.insert(at, [0; 512])),
                _ => panic!("request {kind} with a length"),
            }
        }
        match kind {
            0 => store.reads.push(len),
            3 => store.flushes += 1,
            _ => {}
        }
        let fua = field(4, 2) & 1 != 0;
        store.fua += u64::from(fua);
        if kind == 3 || fua {
            let cache = std::mem::take(&mut store.cache);
            store.durable.extend(cache);
        }
        drop(store);
        stream.write_all(&[&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &header[8..16], &answer].concat())?;
    }
    Ok(())
}

struct Bench {
    memory: GuestMemory,
    disk: Disk,
}

impl Bench {
    fn open(options: &BlockOptions) -> Result<Self, BlockError> {
        let memory = GuestMemory::new(MemoryOptions { size: 16 << 20, ..Default::default() }).unwrap();
        let disk = Disk::open(options, memory.clone(), "blk-3:0")?;
        Ok(Self { memory, disk })
    }

    fn submit(&self, operation: Operation) -> Receiver<Result<(), IoError>> {
        let (tell, told) = mpsc::channel();
        self.disk.submit(Request { operation, done: Box::new(move |result| tell.send(result).unwrap()) });
        told
    }

    fn run(&self, operation: Operation) -> Result<(), IoError> {
        self.submit(operation).recv_timeout(PATIENCE).unwrap()
    }

    fn write(&self, offset: u64, len: u64, byte: u8, fua: bool) -> Result<(), IoError> {
        self.memory.fill(0x1000, len, byte).unwrap();
        self.run(Operation::Write { offset, from: vec![GuestRange::new(0x1000, len)], fua })
    }

    fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        self.memory.fill(0x1000, len, 0xee).unwrap();
        let to = vec![GuestRange::new(0x1000, len / 2), GuestRange::new(0x1000 + len / 2, len - len / 2)];
        self.run(Operation::Read { offset, to }).unwrap();
        let mut bytes = vec![0; len as usize];
        self.memory.read(0x1000, &mut bytes).unwrap();
        bytes
    }
}

fn all(bytes: &[u8], value: u8) -> bool {
    bytes.iter().all(|byte| *byte == value)
}

#[test]
fn every_kind_of_request() {
    let server = Server::start(Behaviour { flags: PLAIN | 1 << 3, ..Behaviour::default() });
    let b = Bench::open(&server.options()).unwrap();
    assert_eq!(b.disk.geometry().size, SIZE);
    assert!(b.disk.geometry().discard);
    b.write(1024, 1024, 0x11, false).unwrap();
    b.write(8 << 20, 5 << 20, 0x22, false).unwrap();
    assert!(all(&b.read(1024, 1024), 0x11) && all(&b.read(8 << 20, 5 << 20), 0x22) && all(&b.read(0, 1024), 0));
    assert_eq!(server.store.lock().unwrap().flushes, 0);
    b.write(4096, 512, 0x33, true).unwrap();
    assert_eq!(server.store.lock().unwrap().fua, 1, "force unit access is a flag");
    b.run(Operation::Discard { offset: 8 << 20, len: 1 << 20 }).unwrap();
    b.run(Operation::WriteZeroes { offset: 9 << 20, len: 1 << 20, unmap: true }).unwrap();
    b.run(Operation::Flush).unwrap();
    assert!(all(&b.read(9 << 20, 1 << 20), 0) && all(&b.read(10 << 20, 1 << 20), 0x22));
    let store = server.store.lock().unwrap();
    assert!(store.flushes == 1 && store.cache.is_empty());
}

#[test]
fn a_server_that_can_little() {
    let server = Server::start(Behaviour { flags: 1 | 1 << 2, ..Behaviour::default() });
    let b = Bench::open(&BlockOptions { sync: true, ..server.options() }).unwrap();
    assert!(!b.disk.geometry().discard);
    b.write(0, 8192, 0x11, false).unwrap();
    assert_eq!(server.store.lock().unwrap().flushes, 1, "a flush stands in for force unit access");
    b.run(Operation::WriteZeroes { offset: 4096, len: 4096, unmap: true }).unwrap();
    assert!(all(&b.read(4096, 4096), 0) && all(&b.read(0, 4096), 0x11));

    let server = Server::start(Behaviour { flags: 1 | 2, ..Behaviour::default() });
    let b = Bench::open(&server.options()).unwrap();
    assert!(b.disk.geometry().read_only);
    assert!(matches!(b.write(0, 512, 1, false), Err(IoError::ReadOnly)));
    b.run(Operation::Flush).unwrap();
}

#[test]
fn one_long_read_comes_before_the_first_large_request_of_a_connection() {
    let server = Server::start(Behaviour { flags: PLAIN, die_at: Some(6), ..Behaviour::default() });
    let b = Bench::open(&server.options()).unwrap();
    let reads = || std::mem::take(&mut server.store.lock().unwrap().reads);
    assert!(all(&b.read(0, 4096), 0));
    assert_eq!(reads(), [4096]);
    b.write(1 << 20, 1 << 20, 0x11, false).unwrap();
    assert_eq!(reads(), [4 << 20]);
    assert!(all(&b.read(1 << 20, 1 << 20), 0x11) && all(&b.read(1 << 20, 512), 0x11));
    assert_eq!(reads(), [1 << 20, 512]);
    b.write(2 << 20, 1 << 20, 0x22, false).unwrap();
    // The server dies; the journal is written first, which needs no such read.
    b.write(3 << 20, 1 << 20, 0x33, false).unwrap();
    assert_eq!((reads(), server.store.lock().unwrap().connections), (vec![4 << 20], 2));
    for (n, value) in [(1, 0x11), (2, 0x22), (3, 0x33)] {
        assert!(all(&b.read(n << 20, 1 << 20), value), "{n} MB");
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_the_server_dies() {
    for fua in [0, 1 << 3] {
        let server = Server::start(Behaviour { flags: PLAIN | fua, die_at: Some(37), ..Behaviour::default() });
        let b = Bench::open(&server.options()).unwrap();
        for round in 0..4u64 {
            for n in 0..40u64 {
                b.write(512 * (n * 7 % 64), 512, (round * 40 + n + 1) as u8, n % 13 == 0).unwrap();
            }
            b.run(Operation::WriteZeroes { offset: 512 * (100 + round), len: 512, unmap: false }).unwrap();
        }
        b.run(Operation::Flush).unwrap();
        let store = server.store.lock().unwrap();
        assert!(store.connections > 2, "it died often: {}", store.connections);
        let mut expected = BTreeMap::new();
        for round in 0..4u64 {
            expected.extend((0..40u64).map(|n| (n * 7 % 64, (round * 40 + n + 1) as u8)));
        }
        for (sector, byte) in expected {
            assert_eq!(store.durable.get(&sector), Some(&[byte; 512]), "sector {sector}");
        }
        assert_eq!(store.durable.get(&103), Some(&[0; 512]));
    }
}

#[test]
fn many_requests_survive_a_reconnection() {
    let server = Server::start(Behaviour { flags: PLAIN, die_at: Some(500), ..Behaviour::default() });
    let b = Bench::open(&server.options()).unwrap();
    let mut results = Vec::new();
    for n in 0..1500u64 {
        let at = 0x1000 + 0x1000 * n;
        b.memory.fill(at, 4096, n as u8 | 1).unwrap();
        results.push(b.submit(Operation::Write {
            offset: 4096 * n,
            from: vec![GuestRange::new(at, 4096)],
            fua: false,
        }));
    }
    for result in results {
        result.recv_timeout(PATIENCE).unwrap().unwrap();
    }
    for n in 0..1500 {
        assert!(all(&b.read(4096 * n, 4096), n as u8 | 1), "block {n}");
    }
    assert!(server.store.lock().unwrap().connections > 1);
}

#[test]
fn a_server_that_stays_away_gives_errors_and_may_come_back() {
    let server = Server::start(Behaviour { flags: PLAIN, ..Behaviour::default() });
    let mut options = server.options();
    options.reconnect = Duration::ZERO;
    let b = Bench::open(&options).unwrap();
    b.write(0, 512, 0x11, false).unwrap();
    // The next connections are cut at once.
    server.behaviour.lock().unwrap().die_at = Some(0);
    let moved = server.dir.path().join("moved");
    let socket = server.dir.path().join("nbd.sock");
    std::fs::rename(&socket, &moved).unwrap();
    // The connection there is ends with a request that the server dies of.
    let store = server.store.clone();
    let poisoned = thread::spawn(move || {
        let _guard = store.lock().unwrap();
        panic!("on purpose: the server's thread ends when it meets this");
    });
    assert!(poisoned.join().is_err());
    let result = b.write(512, 512, 0x22, false);
    assert!(matches!(&result, Err(IoError::Host(why)) if why.raw_os_error() == Some(libc::ETIMEDOUT)), "{result:?}");
    assert!(b.run(Operation::Flush).is_err(), "what was acknowledged is not durable");

    // Another server takes the place: it gets what was acknowledged.
    let second = Server::start(Behaviour { flags: PLAIN, ..Behaviour::default() });
    std::os::unix::fs::symlink(second.dir.path().join("nbd.sock"), &socket).unwrap();
    let start = Instant::now();
    while b.run(Operation::Flush).is_err() {
        assert!(start.elapsed() < PATIENCE, "it does not reconnect");
        thread::yield_now();
    }
    assert_eq!(second.store.lock().unwrap().durable.get(&0), Some(&[0x11; 512]));
}

#[test]
fn a_reset_does_not_wait_for_a_server_that_says_nothing() {
    let server = Server::start(Behaviour { flags: PLAIN, mute: true, ..Behaviour::default() });
    let b = Bench::open(&server.options()).unwrap();
    let results: Vec<_> = (0..300)
        .map(|n| b.submit(Operation::Read { offset: 512 * n, to: vec![GuestRange::new(0x1000, 512)] }))
        .collect();
    // Only a connection on which something was sent is given up.
    while server.store.lock().unwrap().unanswered == 0 {
        thread::yield_now();
    }
    // The connection there is stays as it is.
    server.become_good();
    b.disk.cancel_queued();
    for result in results {
        assert!(matches!(result.recv_timeout(PATIENCE).unwrap(), Err(IoError::Cancelled)));
    }
    b.write(0, 512, 0x11, false).unwrap();
    assert!(all(&b.read(0, 512), 0x11));
}

#[test]
fn says_why_a_server_cannot_be_used() {
    let line = |options: &BlockOptions| {
        let error = Bench::open(options).err().unwrap();
        format!("{error}: {}", std::error::Error::source(&error).unwrap())
    };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    assert!(line(&options(&socket, "")).contains("No such file"));
    let listener = UnixListener::bind(&socket).unwrap();
    let speaker = thread::spawn(move || {
        for greeting in [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"NBDMAGIC\0\x42\x02\x81\x86\x12\x53xxxxxxxx", b""] {
            listener.accept().unwrap().0.write_all(greeting).unwrap();
        }
    });
    assert!(line(&options(&socket, "")).contains("it is no NBD server"));
    assert!(line(&options(&socket, "")).contains("newstyle"));
    assert!(line(&options(&socket, "")).contains("closed the connection"));
    speaker.join().unwrap();
    assert!(line(&options(&socket, "")).contains("Connection refused"));
}

#[test]
fn garbage_from_the_server_is_an_error() {
    let mut seed = 3u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as u8
    };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let speaker = thread::spawn(move || {
        for round in 0..200usize {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes =
                b"NBDMAGICIHAVEOPT\0\x03\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c".to_vec();
            bytes.extend((0..64).map(|_| random()));
            let keep = bytes.len() - 64;
            bytes[keep..keep + 2].fill(0);
            bytes.truncate(20 + round % 80);
            let at = round % bytes.len();
            bytes[at] ^= random();
            // The client may have hung up.
            let _ = stream.write_all(&bytes);
        }
    });
    for _ in 0..200 {
        assert!(Bench::open(&options(&socket, "x")).is_err());
    }
    speaker.join().unwrap();
}

/// A qemu-nbd that ends with the test.
struct QemuNbd(Child);

impl QemuNbd {
    fn start(image: &Path, socket: &Path) -> Self {
        let mut command = Command::new("qemu-nbd");
        command.args([
            "--persistent",
            "--shared=4",
            "--export-name=disk",
            "--format=qcow2",
            "--discard=unmap",
            "--socket",
        ]);
        let child = command.arg(socket).arg(image).spawn();
        let server = Self(child.expect("qemu-nbd (Debian package qemu-utils) is needed"));
        let start = Instant::now();
        while UnixStream::connect(socket).is_err() {
            assert!(start.elapsed() < PATIENCE, "qemu-nbd does not listen");
            thread::yield_now();
        }
        server
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn qcow2(dir: &Path) -> PathBuf {
    let image = dir.join("disk.qcow2");
    let status = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("64M").status();
    assert!(status.expect("qemu-img (Debian package qemu-utils) is needed").success());
    image
}

#[test]
fn qemu_nbd_killed_in_the_middle_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (qcow2(dir.path()), dir.path().join("nbd.sock"));
    let first = QemuNbd::start(&image, &socket);
    let b = Bench::open(&options(&socket, "disk")).unwrap();
    assert_eq!(b.disk.geometry().size, 64 << 20);
    for n in 0..200 {
        b.write(n * 65536, 4096, n as u8 | 1, false).unwrap();
    }
    // Its metadata is in its memory, so that what it acknowledged goes with it.
    drop(first);
    std::fs::remove_file(&socket).unwrap();
    let waiting = b.submit(Operation::Flush);
    let second = QemuNbd::start(&image, &socket);
    waiting.recv_timeout(PATIENCE).unwrap().unwrap();
    b.run(Operation::Discard { offset: 32 << 20, len: 1 << 20 }).unwrap();
    for n in 0..200 {
        assert!(all(&b.read(n * 65536, 4096), n as u8 | 1), "block {n}");
    }
    assert!(all(&b.read(60 << 20, 4096), 0));
    drop(b);
    drop(second);
    let report = Command::new("qemu-img").arg("check").arg(&image).output().unwrap();
    assert!(report.status.code().is_some_and(|code| code == 0 || code == 3), "only leaks at most: {report:?}");
    let error = Bench::open(&options(&socket, "disk")).err().unwrap();
    assert!(matches!(error, BlockError::Nbd { .. }));
}

#[test]
fn qemu_nbd_does_not_have_every_export() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (qcow2(dir.path()), dir.path().join("nbd.sock"));
    let _server = QemuNbd::start(&image, &socket);
    let error = Bench::open(&options(&socket, "other")).err().unwrap();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("it refuses export \"other\""), "{source}");
}
