//! The other side of vhost-user, played by tests.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use testkit::irq::PATIENCE;

const GET_FEATURES: u32 = 1;
pub(crate) const SET_BASE: u32 = 10;
pub(crate) const GET_BASE: u32 = 11;
const GET_PROTOCOL: u32 = 15;
const QUEUE_NUM: u32 = 17;
pub(crate) const ENABLE: u32 = 18;
const NEED_REPLY: u32 = 8;

/// The requests of a kind: its number, and the first two words of its content.
type Requests = Arc<Mutex<Vec<(u32, [u32; 2])>>>;

/// A back end for one connection at a time. It knows the protocol, and never touches the queues.
pub(crate) struct BackEnd {
    folder: tempfile::TempDir,
    features: u64,
    requests: Requests,
    connection: Arc<Mutex<Option<UnixStream>>>,
}

impl BackEnd {
    /// Listens, and offers `features`.
    pub(crate) fn start(features: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let this = Self { folder, features, requests: Arc::default(), connection: Arc::default() };
        this.listen();
        this
    }

    /// Accepts one connection.
    fn listen(&self) {
        let listener = UnixListener::bind(self.path()).unwrap();
        let (told, known, features) = (self.requests.clone(), self.connection.clone(), self.features);
        std::thread::spawn(move || {
            let stream = listener.accept().unwrap().0;
            drop(listener);
            *known.lock().unwrap() = Some(stream.try_clone().unwrap());
            answer(stream, features, &told);
        });
    }

    /// After [`hang_up`](Self::hang_up): accepts another connection.
    pub(crate) fn start_again(&self) {
        std::fs::remove_file(self.path()).unwrap();
        self.listen();
    }

    /// Its socket.
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// Ends the connection.
    pub(crate) fn hang_up(&self) {
        self.connection.lock().unwrap().take().unwrap().shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// The requests of a kind so far, with the first two words of each.
    pub(crate) fn asked(&self, kind: u32) -> Vec<[u32; 2]> {
        let requests = self.requests.lock().unwrap();
        requests.iter().filter(|request| request.0 == kind).map(|request| request.1).collect()
    }
}

fn answer(mut stream: UnixStream, features: u64, requests: &Requests) {
    let mut header = [0u8; 12];
    while stream.read_exact(&mut header).is_ok() {
        let word = |bytes: &[u8], at: usize| {
            bytes.get(at..at + 4).map_or(0, |word| u32::from_ne_bytes(word.try_into().unwrap()))
        };
        let (kind, flags) = (word(&header, 0), word(&header, 4));
        let mut body = vec![0; word(&header, 8) as usize];
        stream.read_exact(&mut body).unwrap();
        requests.lock().unwrap().push((kind, [word(&body, 0), word(&body, 4)]));
        let answer = match kind {
            GET_FEATURES => features,
            GET_PROTOCOL => 9,
            QUEUE_NUM => 2,
            GET_BASE => u64::from(word(&body, 0)),
            _ if flags & NEED_REPLY != 0 => 0,
            _ => continue,
        };
        let header = [kind, 5, 8].map(u32::to_ne_bytes).concat();
        // The NIC may be gone by now.
        let _ = stream.write_all(&[&header[..], &answer.to_ne_bytes()].concat());
    }
}

/// Waits for `condition`.
pub(crate) fn wait_until(condition: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "it does not come true");
        std::thread::yield_now();
    }
}
