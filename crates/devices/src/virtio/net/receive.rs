//! Packets for the guest (virtio 1.2, 5.1.6.4).

use std::sync::Arc;

use backend::net::{Delivery, Packet, PacketHeader};

use super::bit;
use super::device::Net;
use crate::virtio::{Chain, VirtQueue};

/// Room for one packet: chains, and how many bytes go into each.
pub(super) type Room = Vec<(Chain, u32)>;

/// How the search for room ended.
enum Found {
    Room,
    /// The packet will never fit.
    TooLarge,
    /// Not now: the driver tells when there is more.
    Wait,
}

impl Net {
    /// Puts a packet into the driver's buffers.
    pub(super) fn deliver(&self, queue: u16, packet: &Packet<'_>) -> Delivery {
        if !self.is_started() {
            return Delivery::Done;
        }
        let start = packet.pieces.first().copied().unwrap_or_default();
        let Some(pair) = self.pair_for(queue, start) else { return Delivery::Done };
        let (Some(queue), Some(room)) = (self.context.queue(2 * pair), self.room.get(usize::from(pair))) else {
            return Delivery::Done;
        };
        let mut room = room.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !queue.is_ready() {
            return Delivery::Done;
        }
        match self.find_room(queue, &mut room, self.header_len() + packet.len()) {
            Found::Room => {
                self.fill(&mut room, packet);
                self.context.complete_all(queue, &mut room);
                Delivery::Done
            }
            Found::TooLarge => Delivery::Done,
            Found::Wait => Delivery::NoRoom,
        }
    }

    /// Takes chains for `bytes` off the queue, or none at all.
    fn find_room(&self, queue: &Arc<VirtQueue>, room: &mut Room, bytes: usize) -> Found {
        let mergeable = self.context.has(bit::MRG_RXBUF);
        loop {
            let mut capacity = 0u64;
            while capacity < bytes as u64 && (mergeable || room.is_empty()) {
                let Some(chain) = self.context.pop(queue) else { break };
                capacity = capacity.saturating_add(chain.writable.len());
                room.push((chain, 0));
            }
            // The first buffer must hold the header, as drivers rely on that.
            let first = room.first().map_or(0, |(chain, _)| chain.writable.len());
            if capacity >= bytes as u64 && first >= self.header_len() as u64 {
                return Found::Room;
            }
            let known = room.len() as u16;
            if known > 0 && (!mergeable || known >= queue.size() || first < self.header_len() as u64) {
                // Its buffers stay for another packet, unless no packet at all could begin in the first.
                let useless = first < self.header_len() as u64;
                queue.put_back(room.drain(usize::from(useless)..).map(|(chain, _)| chain));
                self.context.complete_all(queue, room);
                return Found::TooLarge;
            }
            queue.put_back(room.drain(..).map(|(chain, _)| chain));
            if !queue.enable_notifications_after(known) {
                return if queue.is_ready() { Found::Wait } else { Found::TooLarge };
            }
        }
    }

    /// Writes the header and the packet across the chains and notes how much went into each.
    fn fill(&self, room: &mut Room, packet: &Packet<'_>) {
        let mut header = [0; PacketHeader::SIZE + 2];
        let header_len = self.header_len();
        header[..PacketHeader::SIZE].copy_from_slice(&packet.header.encode());
        header[PacketHeader::SIZE..].copy_from_slice(&(room.len() as u16).to_le_bytes());
        let mut pieces = std::iter::once(&header[..header_len]).chain(packet.pieces.iter().copied());
        let mut piece: &[u8] = &[];
        let memory = self.context.memory();
        for (chain, written) in room {
            for range in chain.writable.ranges() {
                let (mut at, mut left) = (range.start.0, range.size as usize);
                while left > 0 {
                    if piece.is_empty() {
                        match pieces.next() {
                            Some(next) => piece = next,
                            None => return,
                        }
                    }
                    let (now, later) = piece.split_at(piece.len().min(left));
                    // The chain's buffers were checked to be in RAM.
                    if memory.write(at, now).is_err() {
                        return;
                    }
                    at += now.len() as u64;
                    left -= now.len();
                    *written += now.len() as u32;
                    piece = later;
                }
            }
        }
    }
}
