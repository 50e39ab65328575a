//! Puts BARs on the buses and takes them away as guests move them.
//!
//! A guest may place a BAR over something else. Then the BAR stays off the bus, which is said once, and is tried again
//! whenever another BAR moves: firmware that shuffles BARs while they decode ends in the state it wanted.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use config::pci::PciAddress;
use platform::{Bus, BusDevice};

use super::bar::Decode;

/// One BAR of one function.
pub(crate) type BarKey = (PciAddress, usize);

struct Placement {
    decode: Decode,
    device: Arc<dyn BusDevice>,
    mapped: bool,
}

/// The two buses and what PCI functions have on them.
pub(crate) struct BarMapper {
    ports: Arc<Bus>,
    memory: Arc<Bus>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    placements: BTreeMap<BarKey, Placement>,
    warned: bool,
}

impl BarMapper {
    pub(crate) fn new(ports: Arc<Bus>, memory: Arc<Bus>) -> Self {
        Self { ports, memory, state: Mutex::default() }
    }

    /// Makes a BAR decode `wanted`, or nothing.
    pub(crate) fn place(&self, key: BarKey, wanted: Option<Decode>, device: impl FnOnce() -> Arc<dyn BusDevice>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.placements.get(&key).map(|old| old.decode) == wanted {
            return;
        }
        let freed = self.take(&mut state, key);
        if let Some(decode) = wanted {
            let mut placement = Placement { decode, device: device(), mapped: false };
            if let Err(why) = self.map(&mut placement)
                && !state.warned
            {
                state.warned = true;
                log::warn!(
                    "pci slot {}: BAR {} stays off the bus where the guest put it: {why} (further cases are not reported)",
                    key.0,
                    key.1
                );
            }
            state.placements.insert(key, placement);
        }
        if freed {
            self.retry(&mut state);
        }
    }

    /// Takes a BAR off its bus for good.
    pub(crate) fn remove(&self, key: BarKey) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.take(&mut state, key) {
            self.retry(&mut state);
        }
    }

    /// Forgets a placement; returns whether that freed a range.
    fn take(&self, state: &mut State, key: BarKey) -> bool {
        let old = state.placements.remove(&key);
        old.is_some_and(|old| old.mapped && self.bus(&old.decode).unmap(old.decode.start))
    }

    fn retry(&self, state: &mut State) {
        for waiting in state.placements.values_mut().filter(|placement| !placement.mapped) {
            // Where something is still in the way, it keeps waiting.
            let _ = self.map(waiting);
        }
    }

    fn map(&self, placement: &mut Placement) -> Result<(), platform::BusError> {
        let Decode { start, size, .. } = placement.decode;
        self.bus(&placement.decode).map(start, size, placement.device.clone())?;
        placement.mapped = true;
        Ok(())
    }

    fn bus(&self, decode: &Decode) -> &Bus {
        if decode.io { &self.ports } else { &self.memory }
    }
}

impl Drop for BarMapper {
    fn drop(&mut self) {
        let state = std::mem::take(self.state.get_mut().unwrap_or_else(PoisonError::into_inner));
        for placement in state.placements.into_values().filter(|placement| placement.mapped) {
            self.bus(&placement.decode).unmap(placement.decode.start);
        }
    }
}

#[cfg(test)]
mod tests {
    use platform::AccessSize;

    use super::*;

    struct Id(u64);
    impl BusDevice for Id {
        fn read(&self, _: u64, _: AccessSize) -> u64 {
            self.0
        }
        fn write(&self, _: u64, _: AccessSize, _: u64) {}
    }

    #[test]
    fn a_bar_in_the_way_is_tried_again_when_the_way_is_free() {
        let (ports, memory) = (Arc::new(Bus::new("port")), Arc::new(Bus::new("memory")));
        let mapper = BarMapper::new(ports.clone(), memory.clone());
        let key = |slot| (PciAddress::new(0, slot, 0).unwrap(), 0);
        let at = |start| Some(Decode { io: false, start, size: 0x1000 });
        mapper.place(key(1), at(0xc000_0000), || Arc::new(Id(1)));
        mapper.place(key(2), at(0xc000_0000), || Arc::new(Id(2)));
        assert_eq!(memory.read(0xc000_0000, AccessSize::Dword), Some(1), "first come, first served");
        mapper.place(key(1), at(0xc000_1000), || Arc::new(Id(1)));
        assert_eq!(memory.read(0xc000_0000, AccessSize::Dword), Some(2));
        assert_eq!(memory.read(0xc000_1000, AccessSize::Dword), Some(1));
        mapper.place(key(2), None, || unreachable!("nothing to map"));
        assert_eq!(memory.read(0xc000_0000, AccessSize::Dword), None);
        drop(mapper);
        assert_eq!(memory.read(0xc000_1000, AccessSize::Dword), None, "a mapper leaves nothing behind");
        assert_eq!(ports.read(0, AccessSize::Byte), None);
    }
}
