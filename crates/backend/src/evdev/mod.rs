//! Input devices of the host (Linux' evdev): what they are, and the events they send.

mod description;
mod sys;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use crate::tty::{Wake, readable};

/// Bytes of the kernel's `input_event`: a time of two words, then type, code and value.
const EVENT_LEN: usize = 24;
/// Events read at a time.
const EVENTS: usize = 64;
/// Types of events (`EV_*`), and axes (`ABS_*`).
const TYPES: u8 = 0x20;
const AXES: u8 = 0x40;
/// Longest line of a description, and longest description, in bytes.
const MAX_LINE: usize = 1024;
const MAX_DESCRIPTION: usize = 64 << 10;
/// How long a program may take for a line of its description.
const PATIENCE: Duration = Duration::from_secs(10);
/// The type of events about absolute axes.
const EV_ABS: u8 = 3;

/// An event: type, code, value. An event of type and code 0 ends a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InputEvent {
    /// `EV_*`.
    pub kind: u16,
    /// Which key, axis, light.
    pub code: u16,
    /// What happened to it.
    pub value: u32,
}

/// What an input device is.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct InputInfo {
    /// Its name.
    pub name: Vec<u8>,
    /// Its serial number.
    pub serial: Vec<u8>,
    /// Bus, vendor, product, version.
    pub ids: [u16; 4],
    /// Bitmap of properties.
    pub properties: Vec<u8>,
    /// For each type of events a bitmap of codes.
    pub events: BTreeMap<u8, Vec<u8>>,
    /// For each absolute axis minimum, maximum, fuzz, flat and resolution.
    pub axes: BTreeMap<u8, [u32; 5]>,
}

/// Ends a wait for events.
pub struct Waker(Wake);

impl Waker {
    /// A waker.
    ///
    /// # Errors
    /// The host has no descriptor for it.
    pub fn new() -> io::Result<Self> {
        Wake::new().map(Self)
    }

    /// Ends the wait, now or when it begins.
    pub fn set(&self) {
        self.0.set();
    }

    /// Waits until the device has events or is gone; `false` when woken instead.
    pub fn wait(&self, device: &Evdev) -> bool {
        readable(Some(device.as_fd()), &self.0)
    }
}

/// An input device in use by this process alone.
pub struct Evdev {
    file: OwnedFd,
    info: InputInfo,
}

impl Evdev {
    /// Opens a device and takes it away from everybody else.
    ///
    /// # Errors
    /// It cannot be opened, is no input device, or somebody else has it for himself.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let file = rustix::fs::open(path, flags, Mode::empty())?;
        let info = info(file.as_fd())?;
        sys::grab(file.as_fd())?;
        Ok(Self { file, info })
    }

    /// A device that another program has: it listens at `path`, describes the device in lines of text ([`description`]) up
    /// to an empty one, then sends events as this kernel's devices do (`input_event`). It gets those for the device.
    ///
    /// # Errors
    /// Nobody listens there, or the description is none.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut info = InputInfo::default();
        let mut budget = MAX_DESCRIPTION;
        while let Some(line) = read_line(&stream, &mut budget)? {
            description::line(&mut info, &line)?;
        }
        stream.set_nonblocking(true)?;
        Ok(Self { file: stream.into(), info })
    }

    /// A device whose events come from any non-blocking file, for recorded ones.
    pub fn recorded(file: OwnedFd, info: InputInfo) -> Self {
        Self { file, info }
    }

    /// What it is.
    pub fn info(&self) -> &InputInfo {
        &self.info
    }

    /// Reads the events that are there; none if there are none.
    ///
    /// # Errors
    /// The device is gone.
    pub fn read(&self) -> io::Result<Vec<InputEvent>> {
        let mut bytes = [0; EVENT_LEN * EVENTS];
        match rustix::io::read(&self.file, &mut bytes) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => Ok(bytes[..count].chunks_exact(EVENT_LEN).map(event).collect()),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(Vec::new()),
            Err(why) => Err(why.into()),
        }
    }

    /// Sends an event to the device, such as for a light.
    ///
    /// # Errors
    /// The device is gone, or takes none.
    pub fn write(&self, event: InputEvent) -> io::Result<()> {
        let mut bytes = [0; EVENT_LEN];
        bytes[16..18].copy_from_slice(&event.kind.to_ne_bytes());
        bytes[18..20].copy_from_slice(&event.code.to_ne_bytes());
        bytes[20..24].copy_from_slice(&event.value.to_ne_bytes());
        rustix::io::write(&self.file, &bytes)?;
        Ok(())
    }
}

impl AsFd for Evdev {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Reads a line and not a byte more; `None` for an empty one.
fn read_line(mut stream: &UnixStream, budget: &mut usize) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        io::Read::read_exact(&mut stream, &mut byte)?;
        *budget = budget.checked_sub(1).filter(|_| line.len() < MAX_LINE).ok_or(io::ErrorKind::InvalidData)?;
        match byte[0] {
            b'\n' if line.is_empty() => return Ok(None),
            b'\n' => return Ok(Some(String::from_utf8_lossy(&line).into_owned())),
            byte => line.push(byte),
        }
    }
}

fn event(bytes: &[u8]) -> InputEvent {
    let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
    let value = u32::from_ne_bytes([bytes[20], bytes[21], bytes[22], bytes[23]]);
    InputEvent { kind: word(16), code: word(18), value }
}

fn info(file: BorrowedFd<'_>) -> io::Result<InputInfo> {
    // What a device does not have, it has none of.
    let text = |bytes: Vec<u8>| bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
    let mut info = InputInfo {
        ids: sys::ids(file)?,
        name: text(sys::bytes(file, sys::NAME, 128).unwrap_or_default()),
        serial: text(sys::bytes(file, sys::SERIAL, 128).unwrap_or_default()),
        properties: sys::bytes(file, sys::PROPERTIES, 4).unwrap_or_default(),
        ..InputInfo::default()
    };
    for kind in 0..TYPES {
        let codes = sys::bytes(file, sys::CODES + kind, 96).unwrap_or_default();
        if codes.iter().any(|byte| *byte != 0) {
            info.events.insert(kind, codes);
        }
    }
    let has_axis = |axis: u8| {
        let bits = info.events.get(&EV_ABS).and_then(|bits| bits.get(usize::from(axis / 8)));
        bits.is_some_and(|byte| byte & 1 << (axis % 8) != 0)
    };
    let axes: BTreeMap<_, _> =
        (0..AXES).filter(|axis| has_axis(*axis)).filter_map(|axis| Some((axis, sys::axis(file, axis).ok()?))).collect();
    info.axes = axes;
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_input_device_is_refused() {
        assert!(Evdev::open(Path::new("/dev/null")).is_err());
        assert!(Evdev::open(Path::new("/dev/input/none")).is_err());
    }

    #[test]
    fn a_device_of_another_program() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            io::Write::write_all(&mut stream, b"N: keys\nI: 3 1 2 3\nB: 01 00 02\n\n").unwrap();
            let far = Evdev::recorded(stream.into(), InputInfo::default());
            far.write(InputEvent { kind: 1, code: 9, value: 1 }).unwrap();
            // Two that are no device.
            io::Write::write_all(&mut listener.accept().unwrap().0, b"hello\n\n").unwrap();
            io::Write::write_all(&mut listener.accept().unwrap().0, &[b'x'; 2 * MAX_LINE]).unwrap();
        });
        let device = Evdev::connect(&path).unwrap();
        assert_eq!((device.info().name.as_slice(), device.info().ids), (&b"keys"[..], [3, 1, 2, 3]));
        assert!(Waker::new().unwrap().wait(&device));
        assert_eq!(device.read().unwrap(), [InputEvent { kind: 1, code: 9, value: 1 }]);
        assert!(Evdev::connect(&path).err().unwrap().to_string().contains("\"hello\" describes no input device"));
        assert!(Evdev::connect(&path).is_err());
        thread.join().unwrap();
        assert!(Evdev::connect(&path).is_err());
    }

    #[test]
    fn recorded_events_are_read_whole() {
        let (reader, writer) = std::io::pipe().unwrap();
        let device = Evdev::recorded(reader.into(), InputInfo::default());
        rustix::io::ioctl_fionbio(&device, true).unwrap();
        assert!(device.read().unwrap().is_empty());
        let sender = Evdev::recorded(writer.into(), InputInfo::default());
        let key = InputEvent { kind: 1, code: 30, value: 1 };
        sender.write(key).unwrap();
        sender.write(InputEvent { kind: 0, code: 0, value: 0 }).unwrap();
        assert_eq!(device.read().unwrap(), [key, InputEvent { kind: 0, code: 0, value: 0 }]);
        drop(sender);
        assert!(device.read().is_err());
    }
}
