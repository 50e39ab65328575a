//! A request of the driver (virtio 1.2, 5.2.6): header, data, and a status byte at the end of what the device writes.

use backend::block::Operation;
use memory::GuestMemory;
use platform::GuestRange;

use super::layout::{MAX_CLEAR_SECTORS, SECTOR};
use crate::virtio::{Buffers, Chain};

const HEADER_LEN: usize = 16;
const CLEAR_LEN: usize = 16;

mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const FLUSH_OUT: u32 = 5;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

const FLAG_UNMAP: u32 = 1;

/// The answer in the status byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What a request asks for.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Action {
    /// Something for the back end. `input` bytes go to the guest if it succeeds.
    Disk { operation: Operation, input: u32 },
    /// The identification string, into these buffers.
    Identify(Buffers),
    /// Nothing: the answer is known already.
    Answer(Status),
}

/// A request without its chain.
pub(super) struct Parsed {
    /// Where the status byte goes.
    pub(super) status: GuestRange,
    pub(super) action: Action,
}

/// What the disk can do of what a driver may ask.
#[derive(Clone, Copy)]
pub(super) struct Abilities {
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
}

/// Reads a request; `None` if there is no byte to answer in.
pub(super) fn parse(memory: &GuestMemory, chain: &mut Chain, abilities: Abilities) -> Option<Parsed> {
    let readable = std::mem::take(&mut chain.readable);
    let writable = std::mem::take(&mut chain.writable);
    let (input, status) = writable.split_last()?;
    let action = action(memory, readable, input, abilities).unwrap_or(Action::Answer(Status::IoError));
    Some(Parsed { status, action })
}

/// `None`: the request is malformed.
fn action(memory: &GuestMemory, readable: Buffers, input: Buffers, abilities: Abilities) -> Option<Action> {
    let (header, output) = readable.split(HEADER_LEN as u64);
    let mut bytes = [0; HEADER_LEN];
    if header.read(memory, &mut bytes).ok()? < HEADER_LEN {
        return None;
    }
    let [k0, k1, k2, k3, _, _, _, _, s @ ..] = bytes;
    let offset = u64::from_le_bytes(s).checked_mul(SECTOR);
    match u32::from_le_bytes([k0, k1, k2, k3]) {
        kind::IN => {
            let len = whole_sectors(&input)?;
            Some(Action::Disk { operation: Operation::Read { offset: offset?, to: input.into_ranges() }, input: len })
        }
        kind::OUT => {
            whole_sectors(&output)?;
            Some(Action::Disk {
                operation: Operation::Write { offset: offset?, from: output.into_ranges(), fua: false },
                input: 0,
            })
        }
        kind::FLUSH | kind::FLUSH_OUT => Some(Action::Disk { operation: Operation::Flush, input: 0 }),
        kind::GET_ID => Some(Action::Identify(input)),
        kind::DISCARD if abilities.discard => clear(memory, &output, false),
        kind::WRITE_ZEROES if abilities.write_zeroes => clear(memory, &output, true),
        _ => Some(Action::Answer(Status::Unsupported)),
    }
}

/// Length of data in bytes, if it is whole sectors and fits the used length.
fn whole_sectors(data: &Buffers) -> Option<u32> {
    u32::try_from(data.len()).ok().filter(|len| u64::from(*len).is_multiple_of(SECTOR) && *len < u32::MAX)
}

/// A discard or write-zeroes request: one segment, as the configuration says.
fn clear(memory: &GuestMemory, output: &Buffers, zeroes: bool) -> Option<Action> {
    let mut bytes = [0; CLEAR_LEN];
    if output.len() != CLEAR_LEN as u64 || output.read(memory, &mut bytes).ok()? < CLEAR_LEN {
        return None;
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f @ ..] = bytes;
    let offset = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]).checked_mul(SECTOR)?;
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes(f);
    let allowed = if zeroes { FLAG_UNMAP } else { 0 };
    if flags & !allowed != 0 {
        return Some(Action::Answer(Status::Unsupported));
    }
    if sectors > MAX_CLEAR_SECTORS {
        return None;
    }
    let len = u64::from(sectors) * SECTOR;
    let operation = if zeroes {
        Operation::WriteZeroes { offset, len, unmap: flags & FLAG_UNMAP != 0 }
    } else {
        Operation::Discard { offset, len }
    };
    Some(Action::Disk { operation, input: 0 })
}
