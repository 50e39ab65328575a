//! Messages about ports (virtio 1.2, 5.3.6.2): port, event, value, and for some events more.

use std::collections::VecDeque;

/// Messages that wait for room, at most. A driver that takes none has no use for more.
const MAX_WAITING: usize = 256;

/// What happened to a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub(super) enum Event {
    DeviceReady = 0,
    PortAdd = 1,
    PortReady = 3,
    ConsolePort = 4,
    Resize = 5,
    PortOpen = 6,
    PortName = 7,
}

impl Event {
    fn from_number(number: u16) -> Option<Self> {
        use Event::{ConsolePort, DeviceReady, PortAdd, PortName, PortOpen, PortReady, Resize};
        [DeviceReady, PortAdd, PortReady, ConsolePort, Resize, PortOpen, PortName]
            .into_iter()
            .find(|event| *event as u16 == number)
    }
}

/// Bytes of a message without more.
pub(super) const LEN: usize = 8;

/// A message of the driver: (port, event, value).
pub(super) fn parse(bytes: [u8; LEN]) -> Option<(u32, Event, u16)> {
    let [a, b, c, d, e, f, g, h] = bytes;
    let event = Event::from_number(u16::from_le_bytes([e, f]))?;
    Some((u32::from_le_bytes([a, b, c, d]), event, u16::from_le_bytes([g, h])))
}

/// Messages to the driver that wait for room.
#[derive(Default)]
pub(super) struct Outbox(pub(super) VecDeque<Vec<u8>>);

impl Outbox {
    pub(super) fn push(&mut self, port: usize, event: Event, value: u16, more: &[u8]) {
        if self.0.len() < MAX_WAITING {
            let mut message = (port as u32).to_le_bytes().to_vec();
            message.extend_from_slice(&(event as u16).to_le_bytes());
            message.extend_from_slice(&value.to_le_bytes());
            message.extend_from_slice(more);
            self.0.push_back(message);
        }
    }
}
