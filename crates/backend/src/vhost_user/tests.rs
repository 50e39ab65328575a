//! A back end that the test plays.

use std::io::Read;
use std::os::unix::net::UnixListener;

use memory::MemoryOptions;

use super::*;

/// Answers requests until the connection ends; returns them as (request, content).
fn backend(listener: &UnixListener, replies: bool) -> Vec<(u32, Vec<u8>)> {
    let (mut stream, _) = listener.accept().unwrap();
    let mut requests = Vec::new();
    let mut header = [0u8; 12];
    while stream.read_exact(&mut header).is_ok() {
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(8) as usize];
        stream.read_exact(&mut body).unwrap();
        let answer = match word(0) {
            1 => Some((PROTOCOL_FEATURES | 1 << 32).to_ne_bytes()),
            15 => Some((if replies { 9u64 } else { 1 }).to_ne_bytes()),
            17 => Some(8u64.to_ne_bytes()),
            11 => Some([0, 0, 0, 0, 5, 0, 0, 0]),
            _ if word(4) & message::NEED_REPLY != 0 => Some([0; 8]),
            _ => None,
        };
        if let Some(answer) = answer {
            let header = [word(0), 1 | message::REPLY, 8].map(u32::to_ne_bytes).concat();
            std::io::Write::write_all(&mut stream, &[&header[..], &answer].concat()).unwrap();
        }
        requests.push((word(0), body));
    }
    requests
}

#[test]
fn queues_are_handed_over_and_taken_back() {
    for replies in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || backend(&listener, replies));
        let memory = GuestMemory::new(MemoryOptions { size: 1 << 20, shared: true, ..Default::default() }).unwrap();
        let base = memory.base() as u64;
        let frontend = Frontend::connect(&path, 2, memory).unwrap();
        assert_eq!(frontend.features(), 1 << 32);
        let ring = Ring { size: 64, descriptors: 0x1000, available: 0x2000, used: 0x3000, base: 0, enabled: true };
        frontend.start(1 << 32, &[(1, ring)]).unwrap();
        assert!(!frontend.is_gone());
        assert_eq!((frontend.queues(), frontend.queue_limit()), (2, Some(8)));
        frontend.enable(1, false).unwrap();
        frontend.stop([1]).unwrap();
        frontend.wake();
        assert_eq!(frontend.wait_calls(None), 0);
        drop(frontend);
        let requests = thread.join().unwrap();
        let kinds: Vec<_> = requests.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [3, 1, 15, 16, 17, 2, 5, 8, 10, 9, 12, 13, 18, 18, 11]);
        let body = |kind: u32| &requests.iter().find(|request| request.0 == kind).unwrap().1;
        assert_eq!(body(2)[..], (PROTOCOL_FEATURES | 1 << 32).to_ne_bytes());
        let words = |bytes: &[u8]| -> Vec<u64> {
            bytes.chunks(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
        };
        assert_eq!(words(body(5)), [1, 0, 1 << 20, base, 0]);
        assert_eq!(words(body(9)), [1, base + 0x1000, base + 0x3000, base + 0x2000, 0]);
    }
}

#[test]
fn a_back_end_that_is_none_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let memory = GuestMemory::new(MemoryOptions { size: 4096, shared: true, ..Default::default() }).unwrap();
    let error = Frontend::connect(&path, 1, memory.clone()).err().unwrap().to_string();
    assert!(error.contains("is it running?"), "{error}");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || drop(listener.accept()));
    let error = Frontend::connect(&path, 1, memory).err().unwrap().to_string();
    assert!(error.contains("failed to say what it can do"), "{error}");
    thread.join().unwrap();
    // A listener again, for whom the memory is of no use.
    std::fs::remove_file(&path).unwrap();
    let _listener = UnixListener::bind(&path).unwrap();
    let own = GuestMemory::new(MemoryOptions { size: 4096, ..Default::default() }).unwrap();
    let error = Frontend::connect(&path, 1, own).err().unwrap().to_string();
    assert!(error.contains("memory.shared"), "{error}");
}
