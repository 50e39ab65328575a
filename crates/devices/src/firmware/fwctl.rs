//! bhyve's firmware control channel: ports 0x510 (requests) and 0x511 (replies).
//!
//! A 16-bit zero written to the request port begins anew; then four bytes read say `BHYV`. A request is a row of 32-bit words:
//! its length in bytes, operation, transaction number, payload. A reply is length, operation, transaction number, error,
//! payload. The only value is `hw.ncpu`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use platform::{AccessSize, BusDevice, Persist, PowerEvent, PowerSink, StateError, state};
use serde::{Deserialize, Serialize};

/// Number of ports, from [`super::PORT`]. A word at the second port reaches beyond it.
pub const LENGTH: u64 = 5;

const KIND: &str = "fwctl";
const VERSION: u32 = 1;

const SIGNATURE: [u8; 4] = *b"BHYV";
/// Bytes of a request's header; a shorter request cannot be.
const REQUEST_HEADER: u32 = 12;
const REPLY_HEADER: usize = 16;
/// Longest payload of a request in bytes.
const MAX_PAYLOAD: usize = 80;
/// Exit code of a VM whose firmware breaks the protocol.
const BROKEN: u8 = 4;

mod operation {
    pub(super) const GET: u32 = 3;
    pub(super) const GET_LENGTH: u32 = 4;
}

mod error {
    pub(super) const NONE: u32 = 0;
    pub(super) const NOT_FOUND: u32 = 2;
    pub(super) const TOO_BIG: u32 = 7;
}

/// Where the conversation stands.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
enum Phase {
    /// Nothing yet.
    #[default]
    Closed,
    /// The signature is being read; so many bytes are.
    Signature(u8),
    /// A request comes in.
    Request,
    /// A reply goes out.
    Reply,
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Chip {
    phase: Phase,
    /// Words of the request that have come: header first.
    header: Vec<u32>,
    payload: Vec<u8>,
    /// Words that are still to be received.
    left: u32,
    /// Words that are still to be read, the next one last.
    reply: Vec<u32>,
}

impl Chip {
    fn open(&mut self) {
        *self = Self { phase: Phase::Signature(0), ..Self::default() };
    }

    fn read_byte(&mut self) -> u8 {
        let Phase::Signature(read) = self.phase else { return 0 };
        let next = read + 1;
        self.phase = if usize::from(next) < SIGNATURE.len() { Phase::Signature(next) } else { Phase::Request };
        SIGNATURE.get(usize::from(read)).copied().unwrap_or(0)
    }

    fn read_word(&mut self) -> u32 {
        let word = self.reply.pop().unwrap_or(0);
        if self.phase == Phase::Reply && self.reply.is_empty() {
            self.phase = Phase::Request;
        }
        word
    }

    /// Returns whether the guest keeps to the protocol.
    fn write_word(&mut self, word: u32, cpus: u32) -> bool {
        if self.phase != Phase::Request {
            return true;
        }
        if self.header.is_empty() {
            if word < REQUEST_HEADER {
                return false;
            }
            self.left = word.div_ceil(4);
        }
        if self.header.len() < REQUEST_HEADER as usize / 4 {
            self.header.push(word);
        } else if self.payload.len() <= MAX_PAYLOAD {
            // One word more than allowed is enough to know.
            self.payload.extend(word.to_le_bytes());
        }
        self.left -= 1;
        if self.left == 0 {
            self.answer(cpus);
        }
        true
    }

    fn answer(&mut self, cpus: u32) {
        let header = std::mem::take(&mut self.header);
        let payload = std::mem::take(&mut self.payload);
        let [_, operation, transaction] = header[..] else { return };
        let name = payload.split(|byte| *byte == 0).next().unwrap_or_default();
        let known = name == b"hw.ncpu";
        let size = u64::from(u32::BITS / 8).to_le_bytes();
        let (error, mut data) = match operation {
            _ if payload.len() > MAX_PAYLOAD => (error::TOO_BIG, Vec::new()),
            operation::GET_LENGTH if known => (error::NONE, size.to_vec()),
            operation::GET if known => (error::NONE, [&size[..], &cpus.to_le_bytes()].concat()),
            _ => (error::NOT_FOUND, Vec::new()),
        };
        data.resize(data.len().next_multiple_of(4), 0);
        let words = data.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        let reply = [(REPLY_HEADER + data.len()) as u32, operation, transaction, error].into_iter().chain(words);
        self.reply = reply.collect();
        self.reply.reverse();
        self.phase = Phase::Reply;
    }

    /// Whether a state from outside is one that accesses could have led to.
    fn is_valid(&self) -> bool {
        let request = match self.header.len() {
            0 => self.left == 0 && self.payload.is_empty(),
            known @ 1..3 => self.payload.is_empty() && self.left as usize + known >= 3,
            3 => self.left > 0 && self.payload.len() <= MAX_PAYLOAD + 4,
            _ => false,
        };
        let phase = match self.phase {
            Phase::Closed => self.header.is_empty(),
            Phase::Signature(read) => self.header.is_empty() && usize::from(read) < SIGNATURE.len(),
            Phase::Request => true,
            Phase::Reply => self.header.is_empty() && !self.reply.is_empty(),
        };
        request && phase && self.reply.len() <= 7
    }
}

/// The channel on its ports.
pub struct FwCtl {
    cpus: u32,
    power: Arc<dyn PowerSink>,
    inner: Mutex<Chip>,
}

impl FwCtl {
    /// A channel that says there are `cpus` CPUs. Firmware that breaks the protocol ends the VM by `power`.
    pub fn new(cpus: u32, power: Arc<dyn PowerSink>) -> Arc<Self> {
        Arc::new(Self { cpus, power, inner: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Chip> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for FwCtl {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        match (offset, size) {
            (0 | 1, AccessSize::Byte) => self.lock().read_byte().into(),
            (0 | 1, AccessSize::Dword) => self.lock().read_word().into(),
            _ => 0,
        }
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        match (offset, size) {
            (0, AccessSize::Word) if value == 0 => self.lock().open(),
            (0, AccessSize::Dword) if !self.lock().write_word(value as u32, self.cpus) => {
                log::warn!("firmware sent a malformed request to the firmware control ports");
                self.power.request(PowerEvent::Exit(BROKEN));
            }
            _ => {}
        }
    }
}

impl Persist for FwCtl {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(KIND, &*self.lock())
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let restored: Chip = state::decode(KIND, VERSION, version, bytes)?;
        if !restored.is_valid() {
            return Err(StateError::Invalid { kind: KIND, why: "a request or reply is too long".into() });
        }
        *self.lock() = restored;
        Ok(())
    }

    fn reset(&self) {
        *self.lock() = Chip::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::fixture::{Bytewise, Garbage, Lines, Power, check_state};

    fn channel() -> (Arc<FwCtl>, Arc<Power>) {
        let power = Arc::new(Power::default());
        (FwCtl::new(3, power.clone()), power)
    }

    fn open(channel: &FwCtl) {
        channel.write(0, AccessSize::Word, 0);
        assert_eq!(std::array::from_fn(|_| channel.inb(1)), *b"BHYV");
    }

    fn ask(channel: &FwCtl, operation: u32, payload: &[u8]) -> Vec<u32> {
        let mut padded = payload.to_vec();
        padded.resize(payload.len().next_multiple_of(4), 0);
        let words = padded.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
        for word in [12 + padded.len() as u32, operation, 0xa5].into_iter().chain(words) {
            channel.write(0, AccessSize::Dword, word.into());
        }
        let read = || channel.read(1, AccessSize::Dword) as u32;
        let length = read();
        std::iter::once(length).chain((1..length / 4).map(|_| read())).collect()
    }

    #[test]
    fn tells_the_number_of_cpus() {
        let (channel, _) = channel();
        open(&channel);
        assert_eq!(ask(&channel, 4, b"hw.ncpu\0"), [24, 4, 0xa5, 0, 4, 0]);
        assert_eq!(ask(&channel, 3, b"hw.ncpu\0"), [28, 3, 0xa5, 0, 4, 0, 3]);
    }

    #[test]
    fn knows_nothing_else() {
        let (channel, power) = channel();
        open(&channel);
        assert_eq!(ask(&channel, 3, b"hw.model\0"), [16, 3, 0xa5, 2]);
        assert_eq!(ask(&channel, 5, b"hw.ncpu\0"), [16, 5, 0xa5, 2]);
        assert_eq!(ask(&channel, 1, b""), [16, 1, 0xa5, 2]);
        assert_eq!(ask(&channel, 3, &[b'x'; 80]), [16, 3, 0xa5, 2]);
        assert_eq!(ask(&channel, 3, &[b'x'; 84]), [16, 3, 0xa5, 7]);
        assert_eq!(ask(&channel, 3, &[b'x'; 4000]), [16, 3, 0xa5, 7]);
        assert_eq!(power.take(), []);
    }

    #[test]
    fn a_request_that_cannot_be_ends_the_vm() {
        let (channel, power) = channel();
        channel.write(0, AccessSize::Dword, 4);
        assert_eq!(power.take(), [], "not open yet");
        open(&channel);
        channel.write(0, AccessSize::Dword, 11);
        assert_eq!(power.take(), [PowerEvent::Exit(4)]);
    }

    #[test]
    fn garbage() {
        let (mut garbage, lines) = (Garbage(9), Lines::new());
        let (channel, power) = channel();
        for round in 0..100_000 {
            garbage.access(&*channel, LENGTH);
            match garbage.next() % 16 {
                0 => channel.write(0, AccessSize::Word, 0),
                1 => drop(channel.inb(1)),
                2..8 => channel.write(0, AccessSize::Dword, garbage.next() % 100),
                _ => {}
            }
            if round % 500 == 0 {
                check_state(&*channel, &lines, &mut garbage);
                power.take();
            }
        }
        channel.reset();
        open(&channel);
        assert_eq!(ask(&channel, 3, b"hw.ncpu\0").last(), Some(&3));
    }
}
