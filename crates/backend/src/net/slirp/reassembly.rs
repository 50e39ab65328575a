//! IP packets in parts (RFC 791, 3.2; RFC 8200, 4.5). The cable keeps the order, so parts that do not come in order are
//! parts of nothing.

use std::net::IpAddr;

use crate::net::wire::{Fragment, IpPacket};

/// Packets that are being put together.
const MAX_PACKETS: usize = 16;
/// Bytes of the largest packet.
const MAX_LEN: usize = 65535;

/// Packets of which parts have come.
#[derive(Default)]
pub(super) struct Reassembly(Vec<Partial>);

struct Partial {
    key: (IpAddr, IpAddr, u8, u32),
    data: Vec<u8>,
}

impl Reassembly {
    /// Takes a part; returns the payload when it was the last one.
    pub(super) fn add(&mut self, packet: &IpPacket, fragment: Fragment, data: &[u8]) -> Option<Vec<u8>> {
        let key = (packet.source, packet.destination, packet.protocol, fragment.id);
        let at = self.0.iter().position(|partial| partial.key == key);
        let mut partial = match at {
            Some(at) => self.0.remove(at),
            None => Partial { key, data: Vec::new() },
        };
        if fragment.offset == 0 {
            partial.data.clear();
        }
        if fragment.offset != partial.data.len() || partial.data.len() + data.len() > MAX_LEN {
            return None;
        }
        partial.data.extend(data);
        if !fragment.more {
            return Some(partial.data);
        }
        if self.0.len() == MAX_PACKETS {
            self.0.remove(0);
        }
        self.0.push(partial);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(all: &mut Reassembly, id: u32, offset: usize, more: bool, data: &[u8]) -> Option<Vec<u8>> {
        let address = IpAddr::from([10, 0, 2, 15]);
        let fragment = Fragment { id, offset, more };
        let packet = IpPacket {
            source: address,
            destination: address,
            protocol: 17,
            payload: 34,
            len: 0,
            fragment: Some(fragment),
        };
        all.add(&packet, fragment, data)
    }

    #[test]
    fn parts_in_order_make_a_packet() {
        let mut all = Reassembly::default();
        assert_eq!(add(&mut all, 1, 0, true, b"01234567"), None);
        assert_eq!(add(&mut all, 2, 0, true, b"abcdefgh"), None);
        assert_eq!(add(&mut all, 1, 8, false, b"89"), Some(b"0123456789".to_vec()));
        assert_eq!(add(&mut all, 2, 16, true, b"x"), None, "a gap");
        assert_eq!(add(&mut all, 2, 8, false, b"x"), None);
        for id in 0..100 {
            assert_eq!(add(&mut all, id, 0, true, &[0; 60000]), None);
            assert_eq!(add(&mut all, id, 60000, true, &[0; 60000]), None);
        }
        assert!(all.0.len() <= MAX_PACKETS);
    }
}
