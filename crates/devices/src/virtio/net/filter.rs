//! What the driver wants to receive, and what else it sets through the control queue (virtio 1.2, 5.1.6.5).

use std::collections::BTreeSet;

use backend::net::MacAddress;
use serde::{Deserialize, Serialize};

const BROADCAST: [u8; 6] = [0xff; 6];
const VLAN_TAG: [u8; 2] = [0x81, 0x00];
const VLAN_ID: u16 = 0xfff;

/// Addresses of each kind that are kept; with more of them, all packets of the kind are let through.
pub(super) const MAX_ADDRESSES: usize = 64;

/// A list of addresses, or all.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Addresses {
    pub(super) listed: Vec<[u8; 6]>,
    /// There were more than fit.
    pub(super) all: bool,
}

/// What a driver has set: what of the NIC survives a snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct NetState {
    pub(super) mac: [u8; 6],
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
    pub(super) all_unicast: bool,
    pub(super) no_multicast: bool,
    pub(super) no_unicast: bool,
    pub(super) no_broadcast: bool,
    pub(super) unicast: Addresses,
    pub(super) multicast: Addresses,
    pub(super) vlans: BTreeSet<u16>,
    /// Pairs of queues in use.
    pub(super) pairs: u16,
    /// Offloads of the driver, as feature bits, once it has set them apart from the features.
    pub(super) offloads: Option<u64>,
    /// The cable is in.
    pub(super) link: bool,
}

impl NetState {
    /// The state at power-on. Until a driver says otherwise, everything is received.
    pub(super) fn new(mac: MacAddress, link: bool) -> Self {
        Self {
            mac: mac.0,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Addresses::default(),
            multicast: Addresses::default(),
            vlans: BTreeSet::new(),
            pairs: 1,
            offloads: None,
            link,
        }
    }

    /// Whether a saved state can be.
    pub(super) fn is_valid(&self, max_pairs: u16) -> bool {
        let lists = [&self.unicast, &self.multicast];
        lists.iter().all(|list| list.listed.len() <= MAX_ADDRESSES)
            && self.vlans.iter().all(|id| *id <= VLAN_ID)
            && (1..=max_pairs).contains(&self.pairs)
    }

    /// Whether the driver wants a packet that begins with `start`. `by_vlan`: it has chosen its VLANs.
    pub(super) fn accepts(&self, start: &[u8], by_vlan: bool) -> bool {
        let Some((to, rest)) = start.split_first_chunk::<6>() else { return false };
        // Behind the sender's address.
        if by_vlan
            && let Some([a, b, c, d]) = rest.get(6..).and_then(|rest| rest.first_chunk())
            && [*a, *b] == VLAN_TAG
            && !self.vlans.contains(&(u16::from_be_bytes([*c, *d]) & VLAN_ID))
        {
            return false;
        }
        if self.promiscuous {
            return true;
        }
        if *to == BROADCAST {
            return !self.no_broadcast;
        }
        if to[0] & 1 != 0 {
            return !self.no_multicast
                && (self.all_multicast || self.multicast.all || self.multicast.listed.contains(to));
        }
        !self.no_unicast
            && (*to == self.mac || self.all_unicast || self.unicast.all || self.unicast.listed.contains(to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

    fn packet(to: [u8; 6], vlan: Option<u16>) -> Vec<u8> {
        let mut bytes = [&to[..], &[2, 0, 0, 0, 0, 9]].concat();
        if let Some(vlan) = vlan {
            bytes.extend([0x81, 0]);
            bytes.extend(vlan.to_be_bytes());
        }
        bytes.extend([8, 0, 1, 2]);
        bytes
    }

    fn accepts(state: &NetState) -> [bool; 4] {
        [OURS, OTHER, GROUP, BROADCAST].map(|to| state.accepts(&packet(to, None), true))
    }

    #[test]
    fn addresses() {
        let mut state = NetState::new(MacAddress(OURS), true);
        assert_eq!(accepts(&state), [true; 4], "promiscuous at first");
        state.promiscuous = false;
        assert_eq!(accepts(&state), [true, false, false, true]);
        state.unicast.listed.push(OTHER);
        state.multicast.listed.push(GROUP);
        assert_eq!(accepts(&state), [true; 4]);
        (state.no_unicast, state.no_multicast, state.no_broadcast) = (true, true, true);
        assert_eq!(accepts(&state), [false; 4]);
        state = NetState { all_multicast: true, ..NetState::new(MacAddress(OURS), true) };
        (state.promiscuous, state.unicast.all) = (false, true);
        assert_eq!(accepts(&state), [true; 4]);
        assert!(!state.accepts(&[], true) && !state.accepts(&OURS[..5], true));
    }

    #[test]
    fn vlans() {
        let mut state = NetState::new(MacAddress(OURS), true);
        assert!(state.accepts(&packet(OURS, Some(5)), false));
        assert!(!state.accepts(&packet(OURS, Some(5)), true), "also when promiscuous");
        state.vlans.insert(5);
        // Priority and the drop bit are no part of the number.
        assert!(state.accepts(&packet(OURS, Some(0xf005)), true));
        assert!(!state.accepts(&packet(OURS, Some(6)), true));
    }
}
