//! A client of the protocol against a folder of the host.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use rustix::io::Errno;
use tempfile::TempDir;

use super::wire::message::*;
use super::*;

const PATIENCE: Duration = Duration::from_secs(60);
const RDWR: u32 = 2;

struct Note {
    request: Vec<u8>,
    room: usize,
    answer: Sender<Vec<u8>>,
}

impl Message for Note {
    fn start(&self) -> Vec<u8> {
        self.request.iter().copied().take(HEADER).collect()
    }

    fn read(&self, limit: usize, into: &mut Vec<u8>) {
        *into = self.request.iter().copied().take(limit).collect();
    }

    fn room(&self) -> usize {
        self.room
    }

    fn reply(self: Box<Self>, bytes: &[u8]) {
        assert!(bytes.len() <= self.room || self.room < HEADER + 4, "{} bytes into {}", bytes.len(), self.room);
        let _ = self.answer.send(bytes.to_vec());
    }
}

/// The body of a request, piece by piece.
#[derive(Default, Clone)]
struct Body(Vec<u8>);

impl Body {
    fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn str(self, value: &str) -> Self {
        let mut body = self.u16(value.len() as u16);
        body.0.extend(value.as_bytes());
        body
    }
}

fn body() -> Body {
    Body::default()
}

fn packet(kind: u8, tag: u16, body: &Body) -> Vec<u8> {
    let size = (HEADER + body.0.len()) as u32;
    [&size.to_le_bytes()[..], &[kind], &tag.to_le_bytes(), &body.0].concat()
}

struct Bench {
    share: Share,
    dir: TempDir,
}

impl Bench {
    fn with(read_only: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("share");
        fs::create_dir(&path).unwrap();
        let share = Share::open(&ShareOptions { path, read_only }, "test").unwrap();
        let bench = Self { share, dir };
        bench.call(VERSION, &body().u32(1 << 20).str("9P2000.L")).unwrap();
        bench.attach(0);
        bench
    }

    fn new() -> Self {
        Self::with(false)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join("share").join(name)
    }

    fn send(&self, kind: u8, tag: u16, body: &Body) -> Receiver<Vec<u8>> {
        let (answer, receiver) = channel();
        self.share.submit(Box::new(Note { request: packet(kind, tag, body), room: MAX_MESSAGE, answer }));
        receiver
    }

    fn call(&self, kind: u8, body: &Body) -> Result<Vec<u8>, Errno> {
        let answer = self.send(kind, 7, body).recv_timeout(PATIENCE).unwrap();
        assert_eq!(u32::from_le_bytes(answer[..4].try_into().unwrap()) as usize, answer.len());
        assert_eq!(answer[5..7], 7u16.to_le_bytes());
        if answer[4] == LERROR + 1 {
            let code = i32::from_le_bytes(answer[7..11].try_into().unwrap());
            return Err(Errno::from_raw_os_error(code));
        }
        assert_eq!(answer[4], kind + 1);
        Ok(answer[HEADER..].to_vec())
    }

    fn attach(&self, fid: u32) {
        self.call(ATTACH, &body().u32(fid).u32(u32::MAX).str("root").str("").u32(0)).unwrap();
    }

    fn walk(&self, from: u32, to: u32, names: &[&str]) -> Result<usize, Errno> {
        let start = body().u32(from).u32(to).u16(names.len() as u16);
        let answer = self.call(WALK, &names.iter().fold(start, |body, name| body.str(name)))?;
        Ok(usize::from(u16::from_le_bytes([answer[0], answer[1]])))
    }

    fn create(&self, fid: u32, name: &str, mode: u32) {
        self.walk(0, fid, &[]).unwrap();
        self.call(LCREATE, &body().u32(fid).str(name).u32(RDWR).u32(mode).u32(0)).unwrap();
    }

    fn read(&self, fid: u32, offset: u64, count: u32) -> Result<Vec<u8>, Errno> {
        self.call(READ, &body().u32(fid).u64(offset).u32(count)).map(|answer| answer[4..].to_vec())
    }

    fn write(&self, fid: u32, offset: u64, bytes: &[u8]) -> Result<u32, Errno> {
        let mut request = body().u32(fid).u64(offset).u32(bytes.len() as u32);
        request.0.extend_from_slice(bytes);
        self.call(WRITE, &request).map(|answer| u32::from_le_bytes(answer.try_into().unwrap()))
    }

    fn clunk(&self, fid: u32) -> Result<(), Errno> {
        self.call(CLUNK, &body().u32(fid)).map(drop)
    }

    /// The inode number that the guest gets for a fid.
    fn inode(&self, fid: u32) -> u64 {
        let answer = self.call(GETATTR, &body().u32(fid).u64(0x7ff)).unwrap();
        u64::from_le_bytes(answer[13..21].try_into().unwrap())
    }

    fn lock(&self, fid: u32, kind: u8, range: (u64, u64), process: u32) -> u8 {
        let request = body().u32(fid).u8(kind).u32(0).u64(range.0).u64(range.1).u32(process).str("vm");
        self.call(LOCK, &request).unwrap()[0]
    }
}

fn inode(path: &Path) -> u64 {
    fs::symlink_metadata(path).unwrap().ino()
}

#[test]
fn files_are_made_written_and_read() {
    let b = Bench::new();
    b.create(1, "file", 0o640);
    assert_eq!(b.write(1, 3, b"hello"), Ok(5));
    assert_eq!(b.read(1, 0, 100).unwrap(), b"\0\0\0hello");
    assert_eq!(b.read(1, 100, 100).unwrap(), b"");
    b.call(FSYNC, &body().u32(1).u32(0)).unwrap();
    b.clunk(1).unwrap();
    assert_eq!(b.clunk(1), Err(Errno::BADF));
    assert_eq!(fs::read(b.path("file")).unwrap(), b"\0\0\0hello");
    assert_eq!(fs::metadata(b.path("file")).unwrap().permissions().mode() & 0o7777, 0o640, "no umask of ours");
    // Attributes: mode, size, times.
    b.walk(0, 1, &["file"]).unwrap();
    let change = body().u32(1).u32(1 | 8 | 0x20 | 0x100).u32(0o600).u32(0).u32(0).u64(2).u64(0).u64(0).u64(1000).u64(5);
    b.call(SETATTR, &change).unwrap();
    let meta = fs::metadata(b.path("file")).unwrap();
    assert_eq!((meta.len(), meta.mtime(), meta.mtime_nsec(), meta.mode() & 0o7777), (2, 1000, 5, 0o600));
    assert_eq!(b.inode(1), meta.ino());
}

#[test]
fn folders_links_and_names() {
    let b = Bench::new();
    b.call(MKDIR, &body().u32(0).str("a").u32(0o755).u32(0)).unwrap();
    b.call(SYMLINK, &body().u32(0).str("s").str("a/../../x").u32(0)).unwrap();
    b.call(MKNOD, &body().u32(0).str("p").u32(0o010644).u32(0).u32(0).u32(0)).unwrap();
    let device = body().u32(0).str("d").u32(0o020666).u32(1).u32(3).u32(0);
    assert_eq!(b.call(MKNOD, &device), Err(Errno::PERM), "no device of the host");
    b.create(1, "f", 0o644);
    b.call(LINK, &body().u32(0).u32(1).str("g")).unwrap();
    assert_eq!(inode(&b.path("f")), inode(&b.path("g")));
    b.walk(0, 2, &["s"]).unwrap();
    let target = b.call(READLINK, &body().u32(2)).unwrap();
    assert_eq!(target[2..], *b"a/../../x");
    assert_eq!(b.call(READLINK, &body().u32(1)), Err(Errno::INVAL));
    // A fid follows its file when it is renamed, also as the parent of others.
    b.walk(0, 3, &["a"]).unwrap();
    b.call(MKDIR, &body().u32(3).str("b").u32(0o755).u32(0)).unwrap();
    b.walk(3, 4, &["b"]).unwrap();
    b.call(RENAMEAT, &body().u32(0).str("a").u32(0).str("c")).unwrap();
    b.call(RENAME, &body().u32(4).u32(0).str("top")).unwrap();
    assert!(b.path("c").exists() && b.path("top").is_dir());
    b.call(REMOVE, &body().u32(4)).unwrap();
    assert!(!b.path("top").exists());
    b.call(UNLINKAT, &body().u32(0).str("c").u32(0x200)).unwrap();
    b.call(UNLINKAT, &body().u32(0).str("s").u32(0)).unwrap();
    for name in ["", ".", "..", "x/y", "nul\0"] {
        assert_eq!(b.call(MKDIR, &body().u32(0).str(name).u32(0o755).u32(0)), Err(Errno::INVAL), "{name:?}");
    }
}

#[test]
fn lists_of_any_length_are_read_in_parts() {
    let b = Bench::new();
    let mut wanted: Vec<_> = (0..500).map(|n| format!("file-{n}")).collect();
    wanted.iter().for_each(|name| fs::write(b.path(name), b"").unwrap());
    b.walk(0, 1, &[]).unwrap();
    b.call(LOPEN, &body().u32(1).u32(0)).unwrap();
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let answer = b.call(READDIR, &body().u32(1).u64(offset).u32(1000)).unwrap();
        let mut rest = &answer[4..];
        if rest.is_empty() {
            break;
        }
        assert!(rest.len() <= 1000);
        while !rest.is_empty() {
            offset = u64::from_le_bytes(rest[13..21].try_into().unwrap());
            let len = usize::from(u16::from_le_bytes([rest[22], rest[23]]));
            let name = String::from_utf8(rest[24..24 + len].to_vec()).unwrap();
            let number = u64::from_le_bytes(rest[5..13].try_into().unwrap());
            if name == ".." {
                assert_eq!(number, inode(&b.path("")), "what is above the share is not told");
            }
            names.push(name);
            rest = &rest[24 + len..];
        }
    }
    wanted.extend([".".to_owned(), "..".to_owned()]);
    wanted.sort();
    names.sort();
    assert_eq!(names, wanted);
}

#[test]
fn nothing_leads_out_of_the_share() {
    let b = Bench::new();
    fs::write(b.dir.path().join("secret"), b"secret").unwrap();
    fs::create_dir(b.path("in")).unwrap();
    symlink("..", b.path("up")).unwrap();
    symlink("/", b.path("root")).unwrap();
    symlink("../secret", b.path("link")).unwrap();
    b.walk(0, 1, &["..", "..", "in", "..", ".."]).unwrap();
    assert_eq!(b.inode(1), inode(&b.path("")));
    assert_eq!(b.walk(0, 2, &["..", "secret"]), Ok(1), "only the first step succeeds");
    assert_eq!(b.walk(0, 2, &["up", "secret"]), Ok(1));
    assert_eq!(b.walk(0, 2, &["root", "etc"]), Ok(1));
    for name in ["../secret", "/etc/passwd", "in/../../secret", ""] {
        assert_eq!(b.walk(0, 2, &[name]), Err(Errno::INVAL), "{name:?}");
    }
    let away = body().u32(9).u32(u32::MAX).str("").str("in/../..").u32(0);
    assert_eq!(b.call(ATTACH, &away), Err(Errno::INVAL));
    // A symbolic link is a file of its own: it cannot be opened, nor written through.
    b.walk(0, 3, &["link"]).unwrap();
    assert_eq!(b.call(LOPEN, &body().u32(3).u32(0)), Err(Errno::LOOP));
    assert_eq!(b.call(LOPEN, &body().u32(3).u32(0o1001)), Err(Errno::LOOP));
    let truncate = body().u32(3).u32(8).u32(0).u32(0).u32(0).u64(0).u64(0).u64(0).u64(0).u64(0);
    assert_eq!(b.call(SETATTR, &truncate), Err(Errno::LOOP));
    b.walk(0, 4, &[]).unwrap();
    assert_eq!(b.call(LCREATE, &body().u32(4).str("link").u32(RDWR).u32(0o644).u32(0)), Err(Errno::LOOP));
    b.call(LINK, &body().u32(0).u32(3).str("hard")).unwrap();
    assert!(fs::symlink_metadata(b.path("hard")).unwrap().is_symlink(), "a link to the link, not to its target");
    // A folder that is moved out of the share takes its `..` along, but not the guest.
    b.walk(0, 5, &["in"]).unwrap();
    fs::rename(b.path("in"), b.dir.path().join("out")).unwrap();
    b.walk(5, 6, &["..", ".."]).unwrap();
    assert_eq!(b.inode(6), inode(&b.path("")));
    assert_eq!(fs::read(b.dir.path().join("secret")).unwrap(), b"secret");
}

/// Somebody on the host swaps a folder and a symbolic link that leads out, as fast as they can.
#[test]
fn races_do_not_lead_out_either() {
    let b = Bench::new();
    let outside = b.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("f"), b"outside").unwrap();
    fs::create_dir(b.path("real")).unwrap();
    fs::write(b.path("real/f"), b"inside").unwrap();
    symlink(&outside, b.path("evil")).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (folder, flags) = (fs::File::open(b.path("")).unwrap(), rustix::fs::RenameFlags::EXCHANGE);
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                rustix::fs::renameat_with(&folder, "real", &folder, "evil", flags).unwrap();
            }
        });
        let mut inside = 0;
        for _ in 0..5000 {
            if b.walk(0, 1, &["real", "f"]) == Ok(2) {
                b.call(LOPEN, &body().u32(1).u32(0)).unwrap();
                assert_eq!(b.read(1, 0, 10).unwrap(), b"inside");
                b.clunk(1).unwrap();
                inside += 1;
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(inside > 0, "the folder was never in its place");
    });
}

#[test]
fn special_files_are_not_opened() {
    let b = Bench::new();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        b.path("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o666),
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(b.path("socket")).unwrap();
    for (fid, name) in [(1, "fifo"), (2, "socket")] {
        b.walk(0, fid, &[name]).unwrap();
        assert_eq!(b.call(LOPEN, &body().u32(fid).u32(0)), Err(Errno::OPNOTSUPP));
        b.walk(0, fid + 2, &[]).unwrap();
        let create = body().u32(fid + 2).str(name).u32(RDWR).u32(0o644).u32(0);
        assert_eq!(b.call(LCREATE, &create), Err(Errno::OPNOTSUPP));
    }
}

#[test]
fn a_read_only_share_stays_as_it_is() {
    let b = Bench::with(true);
    fs::write(b.path("f"), b"text").unwrap();
    b.walk(0, 1, &["f"]).unwrap();
    let change = body().u32(1).u32(1).u32(0).u32(0).u32(0).u64(0).u64(0).u64(0).u64(0).u64(0);
    for (kind, request) in [
        (LOPEN, body().u32(1).u32(1)),
        (LOPEN, body().u32(1).u32(0o1000)),
        (LCREATE, body().u32(0).str("x").u32(RDWR).u32(0o644).u32(0)),
        (MKDIR, body().u32(0).str("x").u32(0o755).u32(0)),
        (SYMLINK, body().u32(0).str("x").str("y").u32(0)),
        (MKNOD, body().u32(0).str("x").u32(0o100644).u32(0).u32(0).u32(0)),
        (LINK, body().u32(0).u32(1).str("x")),
        (RENAMEAT, body().u32(0).str("f").u32(0).str("x")),
        (UNLINKAT, body().u32(0).str("f").u32(0)),
        (RENAME, body().u32(1).u32(0).str("x")),
        (SETATTR, change),
        (XATTRCREATE, body().u32(1).str("user.x").u64(1).u32(0)),
    ] {
        assert_eq!(b.call(kind, &request), Err(Errno::ROFS), "message {kind}");
    }
    b.call(LOPEN, &body().u32(1).u32(0)).unwrap();
    assert_eq!(b.write(1, 0, b"x"), Err(Errno::ROFS));
    assert_eq!(b.read(1, 0, 9).unwrap(), b"text");
    b.walk(0, 2, &["f"]).unwrap();
    assert_eq!(b.call(REMOVE, &body().u32(2)), Err(Errno::ROFS));
    assert_eq!(fs::read_dir(b.path("")).unwrap().count(), 1);
}

#[test]
fn extended_attributes() {
    let b = Bench::new();
    b.create(1, "f", 0o644);
    b.walk(0, 2, &["f"]).unwrap();
    b.call(XATTRCREATE, &body().u32(2).str("user.colour").u64(4).u32(0)).unwrap();
    assert_eq!(b.write(2, 0, b"bl"), Ok(2));
    assert_eq!(b.write(2, 3, b"x"), Err(Errno::NOSPC), "in order");
    assert_eq!(b.write(2, 2, b"ue"), Ok(2));
    match b.clunk(2) {
        Err(Errno::OPNOTSUPP) => return, // This file system has none.
        other => other.unwrap(),
    }
    let size = b.call(XATTRWALK, &body().u32(1).u32(3).str("user.colour")).unwrap();
    assert_eq!(size, 4u64.to_le_bytes());
    assert_eq!(b.read(3, 0, 100).unwrap(), b"blue");
    b.call(XATTRWALK, &body().u32(1).u32(4).str("")).unwrap();
    assert!(b.read(4, 0, 1000).unwrap().windows(12).any(|name| name == b"user.colour\0"));
    assert_eq!(b.call(XATTRWALK, &body().u32(1).u32(5).str("user.none")), Err(Errno::NODATA));
    // Without value it goes.
    b.walk(0, 6, &["f"]).unwrap();
    b.call(XATTRCREATE, &body().u32(6).str("user.colour").u64(0).u32(0)).unwrap();
    b.clunk(6).unwrap();
    assert_eq!(b.call(XATTRWALK, &body().u32(1).u32(7).str("user.colour")), Err(Errno::NODATA));
}

#[test]
fn locks_hold_inside_and_outside() {
    let b = Bench::new();
    b.create(1, "f", 0o644);
    assert_eq!(b.lock(1, 1, (0, 10), 1), 0);
    assert_eq!(b.lock(1, 1, (5, 10), 2), 1, "another process has to wait");
    assert_eq!(b.lock(1, 0, (10, 0), 2), 0);
    assert_eq!(b.lock(1, 1, (3, 4), 1), 0, "one's own are no hindrance");
    // Another program on the host sees them.
    let other = fs::File::options().read(true).write(true).open(b.path("f")).unwrap();
    let try_lock = |start, end| sys::set_lock(std::os::fd::AsFd::as_fd(&other), sys::HostLock::Write, start, end);
    assert_eq!(try_lock(0, 0), Err(Errno::AGAIN));
    assert_eq!(b.lock(1, 2, (2, 4), 1), 0, "a hole");
    assert_eq!(try_lock(2, 5), Ok(()));
    assert_eq!(try_lock(6, 6), Err(Errno::AGAIN));
    assert_eq!(b.lock(1, 0, (2, 1), 1), 1, "and the guest sees the other's");
    let found = b.call(GETLOCK, &body().u32(1).u8(1).u64(2).u64(2).u32(1).str("vm")).unwrap();
    assert_eq!(found[0], 1, "a write lock is in the way");
    assert_eq!(found[1..9], 2u64.to_le_bytes());
    b.clunk(1).unwrap();
    assert_eq!(try_lock(0, u64::MAX), Ok(()), "locks end with the fid");
}

#[test]
fn a_state_restored_goes_on_where_it_was() {
    let b = Bench::new();
    b.create(1, "f", 0o644);
    b.write(1, 0, b"text").unwrap();
    b.call(MKDIR, &body().u32(0).str("d").u32(0o755).u32(0)).unwrap();
    b.walk(0, 2, &["d"]).unwrap();
    assert_eq!(b.lock(1, 1, (0, 1), 9), 0);
    let state = b.share.state();
    b.share.reset();
    assert_ne!(b.share.state(), state);
    assert_eq!(b.read(1, 0, 9), Err(Errno::BADF));
    b.share.restore(state.clone()).unwrap();
    assert_eq!(b.share.state(), state);
    assert_eq!(b.read(1, 0, 9).unwrap(), b"text");
    assert_eq!(b.lock(1, 1, (0, 1), 8), 1);
    assert_eq!(b.inode(2), inode(&b.path("d")));
    fs::remove_file(b.path("f")).unwrap();
    b.share.restore(state).unwrap();
    assert_eq!(b.read(1, 0, 9), Err(Errno::STALE), "it is gone");
}

#[test]
fn closed_handles_are_opened_again() {
    let b = Bench::new();
    fs::create_dir_all(b.path("a/b")).unwrap();
    b.walk(0, 1, &["a"]).unwrap();
    b.walk(1, 2, &["b"]).unwrap();
    let state = b.share.state();
    // Restored nodes have no handles.
    b.share.restore(state).unwrap();
    b.call(RENAMEAT, &body().u32(0).str("a").u32(0).str("c")).unwrap();
    assert_eq!(b.inode(2), inode(&b.path("c/b")));
}

#[test]
fn flushes_are_answered_after_what_they_flush() {
    let b = Bench::new();
    b.create(1, "f", 0o644);
    let (sender, receiver) = channel();
    for tag in 0..200u16 {
        let mut write = body().u32(1).u64(0).u32(8192);
        write.0.resize(write.0.len() + 8192, 1);
        b.share.submit(Box::new(Note { request: packet(WRITE, tag, &write), room: 100, answer: sender.clone() }));
        let flush = packet(FLUSH, 1000 + tag, &body().u16(tag));
        b.share.submit(Box::new(Note { request: flush, room: 100, answer: sender.clone() }));
        // A flush of the flush, and one of itself.
        let flush = packet(FLUSH, 2000 + tag, &body().u16(1000 + tag));
        b.share.submit(Box::new(Note { request: flush, room: 100, answer: sender.clone() }));
        let flush = packet(FLUSH, 3000 + tag, &body().u16(3000 + tag));
        b.share.submit(Box::new(Note { request: flush, room: 100, answer: sender.clone() }));
    }
    let mut seen = std::collections::HashSet::new();
    for _ in 0..800 {
        let answer = receiver.recv_timeout(PATIENCE).unwrap();
        let tag = u16::from_le_bytes([answer[5], answer[6]]);
        assert!(seen.insert(tag), "{tag} twice");
        if (1000..2000).contains(&tag) {
            assert!(seen.contains(&(tag - 1000)), "the flush of {} came first", tag - 1000);
        }
        if tag < 1000 {
            assert!([WRITE + 1, LERROR + 1].contains(&answer[4]));
        } else {
            assert_eq!(answer[4], FLUSH + 1);
        }
    }
}

#[test]
fn paths_longer_than_any_stack() {
    let b = Bench::new();
    b.walk(0, 1, &[]).unwrap();
    for _ in 0..3000 {
        b.call(MKDIR, &body().u32(1).str("d").u32(0o755).u32(0)).unwrap();
        b.walk(1, 1, &["d"]).unwrap();
    }
    let state = b.share.state();
    b.share.restore(state).unwrap();
    let deepest = b.inode(1);
    b.walk(1, 2, &["..", "d"]).unwrap();
    assert_eq!(b.inode(2), deepest);
    b.share.reset();
    // The host's own tools remove it only from inside out.
    b.attach(0);
    b.walk(0, 1, &[]).unwrap();
    while b.walk(1, 1, &["d"]).is_ok() {}
    while b.walk(1, 1, &[".."]).is_ok() && b.call(UNLINKAT, &body().u32(1).str("d").u32(0x200)).is_ok() {}
    assert_eq!(fs::read_dir(b.path("")).unwrap().count(), 0);
}

/// Repeatable random numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

const KINDS: [u8; 29] = [
    LERROR,
    STATFS,
    LOPEN,
    LCREATE,
    SYMLINK,
    MKNOD,
    RENAME,
    READLINK,
    GETATTR,
    SETATTR,
    XATTRWALK,
    XATTRCREATE,
    READDIR,
    FSYNC,
    LOCK,
    GETLOCK,
    LINK,
    MKDIR,
    RENAMEAT,
    UNLINKAT,
    ATTACH,
    FLUSH,
    WALK,
    READ,
    WRITE,
    CLUNK,
    REMOVE,
    102,
    255,
];
const NAMES: [&str; 10] = ["a", "b", "c", "d", "..", ".", "a/b", "user.x", "", "\0"];

/// The arguments of each message in order, `f` a fid, `n` a name, `1` to `8` a number.
fn shape(kind: u8) -> &'static str {
    match kind {
        STATFS | READLINK | CLUNK | REMOVE => "f",
        LOPEN => "f4",
        LCREATE => "fn444",
        SYMLINK => "fnn4",
        MKNOD => "fn4444",
        RENAME => "ffn",
        GETATTR => "f8",
        SETATTR => "f444488888",
        XATTRWALK => "ffn",
        XATTRCREATE => "fn84",
        READDIR | READ => "f84",
        FSYNC => "f4",
        LOCK => "f14884n",
        GETLOCK => "f1884n",
        LINK => "ffn",
        MKDIR => "fn44",
        RENAMEAT => "fnfn",
        UNLINKAT => "fn4",
        ATTACH => "f4nn4",
        FLUSH => "2",
        WALK => "ff2nnn",
        WRITE => "f844",
        _ => "888",
    }
}

fn garbage(random: &mut Random) -> Vec<u8> {
    let kind = KINDS[random.below(KINDS.len() as u64) as usize];
    let mut request = body();
    for argument in shape(kind).chars() {
        let number = match random.below(4) {
            0 => random.below(4),
            1 => u64::MAX - random.below(3),
            2 => 1 << random.below(64),
            _ => random.below(0o200000),
        };
        request = match argument {
            'f' => request.u32(random.below(12) as u32),
            'n' => request.str(NAMES[random.below(NAMES.len() as u64) as usize]),
            '1' => request.u8(number as u8),
            '2' => request.u16(random.below(5) as u16),
            '4' => request.u32(number as u32),
            _ => request.u64(number),
        };
    }
    // A file of 2^60 bytes is no harm, but slow to copy; a size of that is tested elsewhere.
    let mut bytes = packet(kind, random.below(8) as u16, &request);
    match random.below(16) {
        0 => bytes.truncate(random.below(bytes.len() as u64 + 1) as usize),
        1 => bytes.iter_mut().take(4).for_each(|byte| *byte = random.below(256) as u8),
        2 => {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = random.below(256) as u8;
        }
        _ => {}
    }
    bytes
}

#[test]
fn hostile_messages_do_no_harm() {
    let b = Bench::new();
    let canary = b.dir.path().join("canary");
    fs::write(&canary, b"alive").unwrap();
    let mut random = Random(0x1234_5678_9abc_def1);
    let (sender, receiver) = channel();
    for round in 0..120_000u32 {
        let room = if random.below(32) == 0 { random.below(64) as usize } else { 8192 };
        b.share.submit(Box::new(Note { request: garbage(&mut random), room, answer: sender.clone() }));
        // A few at once, as a guest with several CPUs would.
        if round % 4 == 3 {
            (0..4).for_each(|_| drop(receiver.recv_timeout(PATIENCE).expect("every message is answered")));
        }
        if round % 20_000 == 19_999 {
            let state = b.share.state();
            b.share.restore(state).unwrap();
        }
    }
    b.share.reset();
    let above: Vec<_> = fs::read_dir(b.dir.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(above.len(), 2, "{above:?}");
    assert_eq!(fs::read(canary).unwrap(), b"alive");
    b.call(VERSION, &body().u32(8192).str("9P2000.L")).unwrap();
    b.attach(0);
    b.create(1, "works", 0o644);
    assert_eq!(b.write(1, 0, b"x"), Ok(1));
}

#[test]
fn a_folder_that_is_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), b"").unwrap();
    let message = |path: &Path| {
        Share::open(&ShareOptions { path: path.into(), read_only: false }, "x").err().unwrap().to_string()
    };
    assert!(message(Path::new("relative")).contains("must be absolute"));
    assert!(message(&dir.path().join("f")).contains("not a folder"));
    assert!(message(&dir.path().join("none")).contains("cannot open the folder to share"));
}
