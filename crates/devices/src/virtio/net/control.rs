//! The control queue (virtio 1.2, 5.1.6.5): a command is a class, a code and data; the answer is one byte.

use super::bit;
use super::device::Net;
use super::filter::{Addresses, MAX_ADDRESSES, NetState};
use crate::virtio::Chain;

const OK: u8 = 0;
const ERROR: u8 = 1;

mod class {
    pub(super) const RX: u8 = 0;
    pub(super) const MAC: u8 = 1;
    pub(super) const VLAN: u8 = 2;
    pub(super) const MQ: u8 = 4;
    pub(super) const GUEST_OFFLOADS: u8 = 5;
}

/// Bytes of a command that are looked at: two lists of more addresses than are kept.
const MAX_COMMAND: usize = 64 << 10;

impl Net {
    /// Carries out the commands that wait.
    pub(super) fn serve_control(&self, index: u16) {
        let Some(queue) = self.context.queue(index) else { return };
        self.context.drain(queue, |chain| {
            let answer = if self.command(&chain) { OK } else { ERROR };
            // The chain's buffers were checked to be in RAM.
            let written = chain.writable.write(self.context.memory(), &[answer]).unwrap_or(0);
            self.context.complete(chain, written as u32);
        });
    }

    fn command(&self, chain: &Chain) -> bool {
        let mut bytes = vec![0; usize::try_from(chain.readable.len()).map_or(MAX_COMMAND, |len| len.min(MAX_COMMAND))];
        let Ok(count) = chain.readable.read(self.context.memory(), &mut bytes) else { return false };
        let Some(([class, code], data)) = bytes.get(..count).and_then(|bytes| bytes.split_first_chunk()) else {
            return false;
        };
        let mut state = self.state();
        let done = match *class {
            class::RX => rx_mode(&mut state, *code, data),
            class::MAC => addresses(&mut state, *code, data),
            class::VLAN => vlan(&mut state, *code, data),
            class::MQ if *code == 0 => self.set_pairs(&mut state, data),
            class::GUEST_OFFLOADS if *code == 0 => self.set_guest_offloads(&mut state, data),
            _ => None,
        };
        drop(state);
        if *class == class::GUEST_OFFLOADS && done.is_some() {
            self.tell_offloads();
        }
        done.is_some()
    }

    fn set_pairs(&self, state: &mut NetState, data: &[u8]) -> Option<()> {
        let pairs = u16::from_le_bytes(*data.first_chunk()?);
        let allowed = self.context.has(bit::MQ) && (1..=self.max_pairs).contains(&pairs);
        allowed.then(|| state.pairs = pairs)
    }

    fn set_guest_offloads(&self, state: &mut NetState, data: &[u8]) -> Option<()> {
        let offloads = u64::from_le_bytes(*data.first_chunk()?);
        let possible = bit::GUEST_CSUM | bit::GUEST_TSO4 | bit::GUEST_TSO6 | bit::GUEST_ECN;
        let allowed =
            self.context.has(bit::CTRL_GUEST_OFFLOADS) && offloads & !(self.context.features() & possible) == 0;
        allowed.then(|| state.offloads = Some(offloads))
    }
}

fn rx_mode(state: &mut NetState, code: u8, data: &[u8]) -> Option<()> {
    let on = *data.first()? != 0;
    let mode = match code {
        0 => &mut state.promiscuous,
        1 => &mut state.all_multicast,
        2 => &mut state.all_unicast,
        3 => &mut state.no_multicast,
        4 => &mut state.no_unicast,
        5 => &mut state.no_broadcast,
        _ => return None,
    };
    *mode = on;
    Some(())
}

fn addresses(state: &mut NetState, code: u8, data: &[u8]) -> Option<()> {
    match code {
        0 => {
            let (unicast, rest) = list(data)?;
            let (multicast, _) = list(rest)?;
            (state.unicast, state.multicast) = (unicast, multicast);
        }
        1 => state.mac = *data.first_chunk()?,
        _ => return None,
    }
    Some(())
}

/// A count and as many addresses; what follows them.
fn list(data: &[u8]) -> Option<(Addresses, &[u8])> {
    let (count, rest) = data.split_first_chunk()?;
    let len = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    let (listed, rest) = rest.split_at_checked(len)?;
    let (listed, _) = listed.as_chunks();
    let all = listed.len() > MAX_ADDRESSES;
    let listed = if all { Vec::new() } else { listed.to_vec() };
    Some((Addresses { listed, all }, rest))
}

fn vlan(state: &mut NetState, code: u8, data: &[u8]) -> Option<()> {
    let id = u16::from_le_bytes(*data.first_chunk()?);
    if id > 0xfff {
        return None;
    }
    match code {
        0 => drop(state.vlans.insert(id)),
        1 => drop(state.vlans.remove(&id)),
        _ => return None,
    }
    Some(())
}
