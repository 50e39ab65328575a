use std::io::{PipeReader, PipeWriter, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use super::line::Parts;
use super::output::{QUEUE_BYTES, WhenFull};
use super::stdio::{FileSink, FileSource, StdioClaim};
use super::*;

/// Fails a test that hangs, far beyond anything a slow machine needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A device with room for `room` more bytes.
struct Device {
    state: Mutex<DeviceState>,
    changed: Condvar,
}

#[derive(Default)]
struct DeviceState {
    room: usize,
    received: Vec<u8>,
    /// How often the backend found the device full.
    refusals: usize,
    output_ready: usize,
}

impl Device {
    fn new(room: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(DeviceState { room, ..Default::default() }), changed: Condvar::new() })
    }

    fn attach(self: &Arc<Self>, tty: &Tty) {
        let device: Arc<dyn SerialDevice> = self.clone();
        tty.attach(Arc::downgrade(&device));
    }

    fn wait(&self, what: &str, done: impl Fn(&DeviceState) -> bool) {
        let state = self.state.lock().unwrap();
        let (_state, timeout) = self.changed.wait_timeout_while(state, PATIENCE, |s| !done(s)).unwrap();
        assert!(!timeout.timed_out(), "waited in vain: {what}");
    }

    fn received(&self) -> Vec<u8> {
        self.state.lock().unwrap().received.clone()
    }
}

impl SerialDevice for Device {
    fn receive(&self, bytes: &[u8]) -> usize {
        let mut state = self.state.lock().unwrap();
        let taken = bytes.len().min(state.room);
        state.room -= taken;
        state.received.extend(&bytes[..taken]);
        state.refusals += usize::from(taken < bytes.len());
        self.changed.notify_all();
        taken
    }

    fn output_ready(&self) {
        self.state.lock().unwrap().output_ready += 1;
        self.changed.notify_all();
    }
}

fn read_exactly(mut from: impl Read, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

struct Pipe {
    tty: Tty,
    /// Write here what the device shall receive.
    input: Option<PipeWriter>,
    /// Read here what the device sent.
    output: PipeReader,
}

fn pipe(when_full: WhenFull) -> Pipe {
    let (stdin, input) = std::io::pipe().unwrap();
    let (output, stdout) = std::io::pipe().unwrap();
    let parts = Parts::new(Some(Box::new(FileSource(stdin))), Box::new(FileSink(stdout)), when_full);
    Pipe { tty: Tty::start(parts).unwrap(), input: Some(input), output }
}

/// A pseudo terminal: its master, and the path of its slave.
fn pty() -> (OwnedFd, String) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    (master, path)
}

fn is_raw(tty: impl AsFd) -> bool {
    !tcgetattr(tty).unwrap().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
}

#[test]
fn pipes_carry_both_directions_and_survive_the_end_of_input() {
    let mut pipe = pipe(WhenFull::Wait);
    let device = Device::new(1000);
    pipe.input.as_mut().unwrap().write_all(b"early").unwrap();
    device.attach(&pipe.tty);
    device.wait("input", |s| s.received == b"early");
    pipe.input = None;
    assert_eq!(pipe.tty.send(b"hello"), 5);
    assert_eq!(read_exactly(&pipe.output, 5), b"hello");
    assert!(pipe.tty.drain(PATIENCE));
}

#[test]
fn input_waits_for_a_full_device() {
    let mut pipe = pipe(WhenFull::Wait);
    let device = Device::new(3);
    device.attach(&pipe.tty);
    let text: Vec<u8> = (0..=255).cycle().take(2000).collect();
    pipe.input.as_mut().unwrap().write_all(&text).unwrap();
    let mut room = 3;
    while room < text.len() {
        device.wait("the backend to find the device full", |s| s.refusals > 0 && s.room == 0);
        assert_eq!(device.received(), text[..room], "nothing is lost, nothing comes too early");
        let mut state = device.state.lock().unwrap();
        state.room = 100;
        state.refusals = 0;
        drop(state);
        pipe.tty.resume_input();
        room += 100;
    }
    device.wait("the rest", |s| s.received.len() == text.len());
    assert_eq!(device.received(), text);
}

#[test]
fn a_lossless_queue_refuses_when_full_and_tells_of_room() {
    let Pipe { tty, input: _input, output } = pipe(WhenFull::Wait);
    let device = Device::new(0);
    device.attach(&tty);
    // More than the queue and the pipe behind it hold.
    let text: Vec<u8> = (0..=250).cycle().take(QUEUE_BYTES * 4).collect();
    let (refused, first_refusal) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rest = text.as_slice();
            while !rest.is_empty() {
                let ready = device.state.lock().unwrap().output_ready;
                let taken = tty.send(rest);
                rest = &rest[taken..];
                if !rest.is_empty() {
                    refused.send(text.len() - rest.len()).unwrap();
                    device.wait("room", |s| s.output_ready > ready);
                }
            }
        });
        let sent = first_refusal.recv_timeout(PATIENCE).expect("refused");
        assert!(sent >= QUEUE_BYTES);
        assert!(read_exactly(&output, text.len()) == text, "all of it arrives, in order");
    });
}

#[test]
fn a_lossy_queue_takes_everything_at_once() {
    let pipe = pipe(WhenFull::Drop);
    let text = vec![7; QUEUE_BYTES * 4];
    assert_eq!(pipe.tty.send(&text), text.len());
    assert_eq!(read_exactly(&pipe.output, 1000), [7; 1000]);
}

#[test]
fn output_to_a_closed_pipe_is_dropped() {
    let Pipe { tty, input: _input, output } = pipe(WhenFull::Wait);
    drop(output);
    let text = vec![0; QUEUE_BYTES];
    for _ in 0..4 {
        // Until the writer has found out, the queue may fill up.
        tty.send(&text);
        assert!(tty.drain(PATIENCE));
    }
    assert_eq!(tty.send(&text), text.len());
}

#[test]
fn a_reader_that_sleeps_does_not_keep_the_device() {
    let pipe = pipe(WhenFull::Wait);
    let device = Device::new(10);
    device.attach(&pipe.tty);
    pipe.input.as_ref().unwrap().write_all(b"x").unwrap();
    device.wait("input", |s| s.received == b"x");
    drop(device);
    pipe.input.as_ref().unwrap().write_all(b"y").unwrap();
    drop(pipe);
}

#[test]
fn a_device_that_owns_its_line_can_be_dropped_by_the_lines_thread() {
    /// Drops itself at the first input.
    struct Owner(
        Mutex<Option<Arc<Owner>>>,
        #[expect(dead_code, reason = "owned, so that it is dropped with this")] Arc<Tty>,
    );
    impl SerialDevice for Owner {
        fn receive(&self, bytes: &[u8]) -> usize {
            drop(self.0.lock().unwrap().take());
            bytes.len()
        }
        fn output_ready(&self) {}
    }
    let Pipe { tty, input, output } = pipe(WhenFull::Wait);
    let tty = Arc::new(tty);
    let owner = Arc::new(Owner(Mutex::new(None), tty.clone()));
    *owner.0.lock().unwrap() = Some(owner.clone());
    let device: Arc<dyn SerialDevice> = owner;
    tty.attach(Arc::downgrade(&device));
    drop((device, tty));
    input.unwrap().write_all(b"x").unwrap();
    // The line's end of the pipe is closed when the line is gone.
    assert_eq!((&output).read(&mut [0]).unwrap(), 0);
}

#[test]
fn pseudo_terminal_is_raw_while_in_use() {
    let (master, path) = pty();
    let mut master = std::fs::File::from(master);
    assert!(!is_raw(&master));
    let tty = TtySpec::parse(&path).unwrap().open().unwrap();
    assert!(is_raw(&master));
    let device = Device::new(100);
    device.attach(&tty);
    master.write_all(b"\x03\r\n\xff").unwrap();
    device.wait("raw input", |s| s.received == b"\x03\r\n\xff");
    tty.send(b"a\nb");
    assert_eq!(read_exactly(&master, 3), b"a\nb");
    drop(tty);
    assert!(!is_raw(&master));
}

#[test]
fn terminals_are_restored_without_a_drop() {
    let (first, first_path) = pty();
    let (second, second_path) = pty();
    let open = |path: &str| std::fs::File::options().read(true).write(true).open(path).unwrap();
    let raw_first = RawTerminal::enter(open(&first_path).into()).unwrap();
    let raw_second = RawTerminal::enter(open(&second_path).into()).unwrap();
    // Held, because a pseudo terminal whose slave nobody has open forgets its modes.
    let _hold = (open(&first_path), open(&second_path));
    drop(raw_first);
    assert!(!is_raw(&first) && is_raw(&second));
    raw::restore_terminal_for_test(&raw_second);
    assert!(!is_raw(&second));
    // Whoever restored it first has done it: what comes later finds other modes and leaves them.
    let mut modes = tcgetattr(&second).unwrap();
    modes.make_raw();
    rustix::termios::tcsetattr(&second, rustix::termios::OptionalActions::Now, &modes).unwrap();
    drop(raw_second);
    assert!(is_raw(&second));
}

#[test]
fn paths_that_are_no_terminals() {
    let directory = std::env::temp_dir().join(format!("tty-test-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let open = |path: &str| TtySpec::parse(path).unwrap().open().err().expect("no backend").to_string();
    let log = directory.join("log");
    std::fs::write(&log, b"old ").unwrap();
    let path = log.to_str().unwrap();
    assert_eq!(
        open(path),
        format!("{path} is not a terminal or other character device; to write output to a file use file:{path}")
    );
    assert!(open("/nonexistent/tty").contains("cannot open /nonexistent/tty"));
    assert!(open("file:/nonexistent/log").contains("cannot open /nonexistent/log"));

    let tty = TtySpec::parse(&format!("file:{path}")).unwrap().open().unwrap();
    tty.send(b"new");
    drop(tty);
    assert_eq!(std::fs::read(&log).unwrap(), b"old new");
    std::fs::remove_dir_all(&directory).unwrap();

    let null = TtySpec::parse("/dev/null").unwrap().open().unwrap();
    null.send(b"gone");
    assert!(null.drain(PATIENCE));
}

#[test]
fn only_one_port_has_stdio() {
    let claim = StdioClaim::take().unwrap();
    assert!(matches!(StdioClaim::take(), Err(TtyError::StdioTaken)));
    assert!(matches!(TtySpec::Stdio.open(), Err(TtyError::StdioTaken)));
    drop(claim);
    drop(StdioClaim::take().unwrap());
}

fn listen(spec: &str) -> (Tty, std::net::SocketAddr) {
    let tty = TtySpec::parse(spec).unwrap().open().unwrap();
    let address = tty.local_address().unwrap();
    (tty, address)
}

fn connect(address: std::net::SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Has the backend notice the client: connecting alone is done by the kernel.
fn greet(mut client: &TcpStream, device: &Device, text: &[u8]) {
    client.write_all(text).unwrap();
    device.wait("a greeting", |s| s.received.ends_with(text));
}

#[test]
fn tcp_serves_one_client_at_a_time() {
    let (tty, address) = listen("tcp=0");
    assert!(address.ip().is_loopback());
    let device = Device::new(1000);
    device.attach(&tty);
    tty.send(b"nobody hears this");
    assert!(tty.drain(PATIENCE));

    let first = connect(address);
    greet(&first, &device, b"one");
    tty.send(b"to one");
    assert_eq!(read_exactly(&first, 6), b"to one");

    let mut extra = connect(address);
    // Closed with or without a reset, but closed.
    assert!(matches!(extra.read(&mut [0]), Ok(0) | Err(_)));
    greet(&first, &device, b"still there");

    drop(first);
    let second = connect_until_served(address, &device, b"two");
    tty.send(b"to two");
    assert_eq!(read_exactly(&second, 6), b"to two");
    drop(tty);
    assert_eq!((&second).read(&mut [0]).unwrap(), 0);
}

/// Connects again until the backend has noticed that its last client left.
fn connect_until_served(address: std::net::SocketAddr, device: &Device, text: &[u8]) -> TcpStream {
    loop {
        let mut client = connect(address);
        let sent = client.write_all(text);
        client.set_nonblocking(true).unwrap();
        while sent.is_ok() {
            if device.received().ends_with(text) {
                client.set_nonblocking(false).unwrap();
                return client;
            }
            match client.read(&mut [0]) {
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
                _ => break,
            }
        }
    }
}

#[test]
fn tcp_client_that_left_makes_place_while_the_device_is_full() {
    let (tty, address) = listen("tcp=[::1]:0");
    let device = Device::new(2);
    device.attach(&tty);
    let mut first = connect(address);
    first.write_all(b"more than there is room for").unwrap();
    device.wait("the device to be full", |s| s.refusals > 0);
    drop(first);
    // Served without input being read: output tells.
    let served = loop {
        let client = connect(address);
        client.set_nonblocking(true).unwrap();
        let answer = loop {
            tty.send(b"!");
            match (&client).read(&mut [0]) {
                Ok(1) => break true,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
                _ => break false,
            }
        };
        if answer {
            break client;
        }
    };
    drop(served);
}

#[test]
fn tcp_client_that_does_not_read_does_not_stall_the_guest() {
    let (tty, address) = listen("tcp=0");
    let device = Device::new(100);
    device.attach(&tty);
    let client = connect(address);
    greet(&client, &device, b"hi");
    let text = vec![b'x'; QUEUE_BYTES];
    for _ in 0..400 {
        assert_eq!(tty.send(&text), text.len());
    }
    greet(&client, &device, b"input still flows");
}

#[test]
fn tcp_port_in_use() {
    let (_tty, address) = listen("tcp=0");
    let error = TtySpec::Tcp(address).open().err().expect("taken").to_string();
    assert_eq!(error, format!("cannot listen on {address}"));
}

#[test]
fn a_unix_socket_serves_one_client_and_goes_with_the_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let spec = format!("unix:{}", path.display());
    let open = || TtySpec::parse(&spec).unwrap().open();
    let tty = open().unwrap();
    let device = Device::new(1000);
    device.attach(&tty);
    let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"hello").unwrap();
    device.wait("input", |s| s.received == b"hello");
    tty.send(b"answer");
    let mut answer = [0; 6];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    let error = open().err().unwrap();
    assert!(error.to_string().contains("cannot listen on"), "{error}");
    drop(tty);
    assert!(!path.exists());
    // What a dead process left is replaced, what is no socket is not.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(open().unwrap());
    std::fs::write(&path, b"precious").unwrap();
    assert!(open().is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_new_pseudo_terminal_drops_output_until_somebody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    let tty = TtySpec::parse(&format!("pty:{}", link.display())).unwrap().open().unwrap();
    assert_eq!(tty.peer(), Some(&*link));
    let device = Device::new(1000);
    device.attach(&tty);
    for round in 0..3u8 {
        tty.send(&[b'x'; 10_000]);
        assert!(tty.drain(PATIENCE));
        let mut client = std::fs::File::options().read(true).write(true).open(&link).unwrap();
        client.write_all(&[b'0' + round]).unwrap();
        device.wait("input", |s| s.received.len() == usize::from(round) + 1);
        tty.send(b"now");
        let mut answer = [0; 3];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"now", "nothing of what nobody heard");
    }
    drop(tty);
    assert!(!link.exists());
}

#[test]
fn a_null_modem_has_two_ends() {
    let dir = tempfile::tempdir().unwrap();
    // Not in /dev: the file's folder stands for it.
    let (a, b) = (dir.path().join("nmdm0A"), dir.path().join("nmdm0B"));
    let first = super::pty::open_null_modem(&a).unwrap();
    assert_eq!(first.peer(), Some(&*b));
    let second = super::pty::open_null_modem(&b).unwrap();
    let (left, right) = (Device::new(1000), Device::new(1000));
    left.attach(&first);
    right.attach(&second);
    first.send(b"from the first");
    right.wait("output of the first", |s| s.received == b"from the first");
    second.send(b"from the second");
    left.wait("output of the second", |s| s.received == b"from the second");
}
