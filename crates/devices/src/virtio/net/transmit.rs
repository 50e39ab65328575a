//! Packets from the guest (virtio 1.2, 5.1.6.2).

use backend::net::{ETHERNET_HEADER, Frame, MAX_PACKET, PacketHeader, Sending};

use super::bit;
use super::device::Net;
use crate::virtio::Chain;

/// Packets that are given back to the driver together.
const BATCH: usize = 64;

impl Net {
    /// Sends what waits on queue `index`, the transmit queue of `pair`.
    pub(super) fn transmit(&self, index: u16, pair: u16) {
        let Some(queue) = self.context.queue(index) else { return };
        let mut sent = Vec::with_capacity(BATCH);
        loop {
            queue.suppress_notifications();
            while let Some(mut chain) = self.context.pop(queue) {
                if self.send_one(&mut chain, pair) == Sending::Busy {
                    queue.put_back([chain]);
                    self.context.complete_all(queue, &mut sent);
                    // The back end wakes this thread; doorbells would say nothing new.
                    return self.flush(pair);
                }
                sent.push((chain, 0));
                if sent.len() == BATCH {
                    self.context.complete_all(queue, &mut sent);
                    self.flush(pair);
                }
            }
            self.context.complete_all(queue, &mut sent);
            self.flush(pair);
            if !queue.enable_notifications() {
                return;
            }
        }
    }

    fn flush(&self, pair: u16) {
        if let Some(backend) = &self.backend {
            backend.flush(pair);
        }
    }

    /// Sends one packet; without a link, or if it makes no sense, it goes nowhere.
    fn send_one(&self, chain: &mut Chain, pair: u16) -> Sending {
        let Some(backend) = self.backend.as_ref().filter(|_| self.has_link()) else { return Sending::Taken };
        let mut header = [0; PacketHeader::SIZE];
        let memory = self.context.memory();
        let whole = chain.readable.read(memory, &mut header).is_ok_and(|count| count == header.len());
        let (_, packet) = std::mem::take(&mut chain.readable).split(self.header_len() as u64);
        let header = PacketHeader::decode(header);
        if !whole || !self.may_leave(&header) {
            return Sending::Taken;
        }
        match Frame::new(memory, packet.ranges(), header) {
            Ok(frame) if (ETHERNET_HEADER..=MAX_PACKET).contains(&frame.len()) => backend.send(pair, &frame),
            _ => Sending::Taken,
        }
    }

    /// Whether the driver may leave to us what the header says.
    fn may_leave(&self, header: &PacketHeader) -> bool {
        let mut needed = 0;
        if header.flags & PacketHeader::NEEDS_CHECKSUM != 0 {
            needed |= bit::CSUM;
        }
        if header.gso_type & PacketHeader::GSO_ECN != 0 {
            needed |= bit::HOST_ECN;
        }
        needed |= match header.gso_type & !PacketHeader::GSO_ECN {
            PacketHeader::GSO_NONE => 0,
            PacketHeader::GSO_TCP4 => bit::HOST_TSO4,
            PacketHeader::GSO_TCP6 => bit::HOST_TSO6,
            _ => return false,
        };
        self.context.has(needed)
    }
}
