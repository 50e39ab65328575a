//! The bus: port I/O and memory-mapped accesses on their way from a vCPU to a device.
//!
//! One type serves both spaces. Ranges come and go at run time, because guests move PCI BARs.
//! A device is called without any bus lock held, so it may re-map itself from inside an access.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// The width of one bus access.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum AccessSize {
    /// 1 byte.
    Byte = 1,
    /// 2 bytes.
    Word = 2,
    /// 4 bytes.
    Dword = 4,
    /// 8 bytes.
    Qword = 8,
}

impl AccessSize {
    /// The size for a number of bytes, or `None` unless it is 1, 2, 4 or 8.
    pub fn from_bytes(bytes: usize) -> Option<Self> {
        Some(match bytes {
            1 => Self::Byte,
            2 => Self::Word,
            4 => Self::Dword,
            8 => Self::Qword,
            _ => return None,
        })
    }

    /// Number of bytes.
    pub const fn bytes(self) -> u64 {
        self as u64
    }

    /// All ones in this width: what a read that nobody answers returns.
    pub const fn mask(self) -> u64 {
        match self {
            Self::Qword => u64::MAX,
            _ => (1 << (self as u64 * 8)) - 1,
        }
    }
}

/// A device as the bus sees it. Accesses arrive on vCPU threads, several at a time.
///
/// Guest input is hostile: an access must neither panic nor block for long. Whatever the device
/// does not implement reads as ones (or what the device's specification says) and ignores writes.
pub trait BusDevice: Send + Sync {
    /// Reads `size` bytes at `offset` from the start of the mapped range; the value is zero-extended.
    fn read(&self, offset: u64, size: AccessSize) -> u64;
    /// Writes the low `size` bytes of `value` at `offset` from the start of the mapped range.
    fn write(&self, offset: u64, size: AccessSize, value: u64);
}

/// Why a range could not be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Another range is (partly) there.
    #[error("{bus} range {start:#x}+{size:#x} overlaps {other_start:#x}+{other_size:#x}")]
    Overlap {
        /// Name of the bus.
        bus: &'static str,
        /// Start of the new range.
        start: u64,
        /// Size of the new range.
        size: u64,
        /// Start of the range in the way.
        other_start: u64,
        /// Size of the range in the way.
        other_size: u64,
    },
    /// The range is empty or wraps around the end of the address space.
    #[error("{bus} range {start:#x}+{size:#x} is empty or wraps around")]
    Invalid {
        /// Name of the bus.
        bus: &'static str,
        /// Start of the range.
        start: u64,
        /// Size of the range.
        size: u64,
    },
}

#[derive(Clone)]
struct Mapping {
    size: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space of devices.
pub struct Bus {
    name: &'static str,
    ranges: RwLock<BTreeMap<u64, Mapping>>,
}

impl Bus {
    /// An empty bus; `name` appears in errors ("port", "memory").
    pub fn new(name: &'static str) -> Self {
        Self { name, ranges: RwLock::new(BTreeMap::new()) }
    }

    /// Maps `device` at `start`, `size` bytes long.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps another one.
    pub fn map(&self, start: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        if size == 0 || start.checked_add(size - 1).is_none() {
            return Err(BusError::Invalid { bus: self.name, start, size });
        }
        let last = start + (size - 1);
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&other_start, other)) = ranges.range(..=last).next_back()
            && other_start + (other.size - 1) >= start
        {
            return Err(BusError::Overlap { bus: self.name, start, size, other_start, other_size: other.size });
        }
        ranges.insert(start, Mapping { size, device });
        Ok(())
    }

    /// Takes away the range that starts exactly at `start`; returns whether there was one.
    pub fn unmap(&self, start: u64) -> bool {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).remove(&start).is_some()
    }

    fn find(&self, addr: u64, size: AccessSize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (&start, mapping) = ranges.range(..=addr).next_back()?;
        let offset = addr - start;
        let end = offset.checked_add(size.bytes())?;
        (end <= mapping.size).then(|| (offset, mapping.device.clone()))
    }

    /// Reads `size` bytes at `addr`; `None` where no device answers the whole access.
    pub fn read(&self, addr: u64, size: AccessSize) -> Option<u64> {
        let (offset, device) = self.find(addr, size)?;
        Some(device.read(offset, size) & size.mask())
    }

    /// Writes `size` bytes at `addr`; `false` where no device answers the whole access.
    pub fn write(&self, addr: u64, size: AccessSize, value: u64) -> bool {
        match self.find(addr, size) {
            Some((offset, device)) => {
                device.write(offset, size, value & size.mask());
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Probe(Mutex<Vec<(u64, u64)>>);
    impl BusDevice for Probe {
        fn read(&self, offset: u64, _: AccessSize) -> u64 {
            offset | 0xabcd_0000_0000
        }
        fn write(&self, offset: u64, _: AccessSize, value: u64) {
            self.0.lock().unwrap().push((offset, value));
        }
    }

    #[test]
    fn routes_by_range_and_masks_values() {
        let bus = Bus::new("port");
        let probe = Arc::new(Probe(Mutex::default()));
        bus.map(0x10, 4, probe.clone()).unwrap();
        assert_eq!(bus.read(0x12, AccessSize::Word), Some(2));
        assert_eq!(bus.read(0x13, AccessSize::Word), None, "an access that leaves the range is nobody's");
        assert_eq!(bus.read(0xf, AccessSize::Byte), None);
        assert!(bus.write(0x10, AccessSize::Byte, 0x1ff));
        assert_eq!(*probe.0.lock().unwrap(), [(0, 0xff)]);
        assert!(bus.unmap(0x10));
        assert!(!bus.write(0x10, AccessSize::Byte, 0));
    }

    #[test]
    fn refuses_overlap_and_wrap() {
        let bus = Bus::new("memory");
        let probe = Arc::new(Probe(Mutex::default()));
        bus.map(0x1000, 0x1000, probe.clone()).unwrap();
        assert!(matches!(bus.map(0x1fff, 1, probe.clone()), Err(BusError::Overlap { .. })));
        assert!(matches!(bus.map(0, 0x1001, probe.clone()), Err(BusError::Overlap { .. })));
        assert!(matches!(bus.map(0x3000, 0, probe.clone()), Err(BusError::Invalid { .. })));
        assert!(matches!(bus.map(u64::MAX, 2, probe.clone()), Err(BusError::Invalid { .. })));
        bus.map(u64::MAX, 1, probe.clone()).unwrap();
        bus.map(0, 0x1000, probe).unwrap();
        assert_eq!(bus.read(u64::MAX, AccessSize::Word), None);
    }
}
