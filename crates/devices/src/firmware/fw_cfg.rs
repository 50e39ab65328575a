//! QEMU's firmware configuration device (fw_cfg, "QEMU Firmware Configuration (fw_cfg) Device" specification): numbered
//! items and a directory of named files, read byte by byte or by DMA.
//!
//! | port    | size | register                                                     |
//! |---------|------|--------------------------------------------------------------|
//! | 510     | 2    | selector, little-endian                                      |
//! | 511     | 1    | the next byte of the selected item                           |
//! | 514–51B | 4    | DMA address, big-endian; the low half starts the transfer    |

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::{GuestMemory, MemoryError};
use platform::{AccessSize, BusDevice, Persist, StateError, state};
use serde::{Deserialize, Serialize};

/// Number of ports, from [`super::PORT`].
pub const LENGTH: u64 = 12;

const KIND: &str = "fw-cfg";
const VERSION: u32 = 1;

/// Numbers of items.
mod item {
    pub(super) const SIGNATURE: u16 = 0;
    pub(super) const ID: u16 = 1;
    pub(super) const CPUS: u16 = 5;
    pub(super) const MAX_CPUS: u16 = 0xf;
    pub(super) const DIRECTORY: u16 = 0x19;
    pub(super) const FIRST_FILE: u16 = 0x20;
}

/// Bits of [`item::ID`].
const HAS_PORTS: u32 = 1 << 0;
const HAS_DMA: u32 = 1 << 1;
/// Room for a name in the directory, with its closing NUL.
const NAME: usize = 56;
/// What the DMA address reads as.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
/// How far beyond an item's end a transfer may ask for zeroes: what firmware would never do is an error.
const MOST_BEYOND: u64 = 1 << 20;

mod offset {
    pub(super) const SELECTOR: u64 = 0;
    pub(super) const DATA: u64 = 1;
    pub(super) const DMA_HIGH: u64 = 4;
    pub(super) const DMA_LOW: u64 = 8;
}

/// Bits of a transfer's control field. The upper half is an item's number.
mod control {
    pub(super) const ERROR: u32 = 1 << 0;
    pub(super) const READ: u32 = 1 << 1;
    pub(super) const SKIP: u32 = 1 << 2;
    pub(super) const SELECT: u32 = 1 << 3;
    pub(super) const WRITE: u32 = 1 << 4;
}

/// What the device offers.
#[derive(Default)]
pub struct FwCfgItems {
    /// Offer DMA.
    pub dma: bool,
    /// Number of CPUs.
    pub cpus: u16,
    /// Files by name; names of more than 55 bytes are cut. Of several with one name the last counts.
    pub files: Vec<(String, Vec<u8>)>,
}

/// What the guest has selected.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Position {
    selector: u16,
    offset: u64,
    dma_high: u32,
}

/// The device on its ports.
pub struct FwCfg {
    memory: GuestMemory,
    items: BTreeMap<u16, Vec<u8>>,
    dma: bool,
    inner: Mutex<Position>,
}

impl FwCfg {
    /// A device that offers `items` and transfers them to `memory`.
    pub fn new(memory: GuestMemory, items: FwCfgItems) -> Arc<Self> {
        let files: BTreeMap<String, Vec<u8>> = items.files.into_iter().collect();
        let id = if items.dma { HAS_PORTS | HAS_DMA } else { HAS_PORTS };
        let mut all = BTreeMap::from([
            (item::SIGNATURE, b"QEMU".to_vec()),
            (item::ID, id.to_le_bytes().to_vec()),
            (item::CPUS, items.cpus.to_le_bytes().to_vec()),
            (item::MAX_CPUS, items.cpus.to_le_bytes().to_vec()),
        ]);
        let mut directory = (files.len() as u32).to_be_bytes().to_vec();
        for (number, (name, contents)) in (item::FIRST_FILE..0x4000).zip(files) {
            directory.extend((contents.len() as u32).to_be_bytes());
            directory.extend(number.to_be_bytes());
            directory.extend([0; 2]);
            let mut entry: Vec<u8> = name.bytes().take(NAME - 1).collect();
            entry.resize(NAME, 0);
            directory.extend(entry);
            all.insert(number, contents);
        }
        all.insert(item::DIRECTORY, directory);
        Arc::new(Self { memory, items: all, dma: items.dma, inner: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Position> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is left of the selected item.
    fn rest(&self, position: &Position) -> &[u8] {
        let item = self.items.get(&position.selector).map(Vec::as_slice).unwrap_or_default();
        usize::try_from(position.offset).ok().and_then(|offset| item.get(offset..)).unwrap_or_default()
    }

    fn next_byte(&self) -> u8 {
        let mut position = self.lock();
        let byte = self.rest(&position).first().copied();
        position.offset = position.offset.saturating_add(1);
        byte.unwrap_or(0)
    }

    /// Does the transfer whose description (control, length, address, all big-endian) lies at `address`.
    fn transfer(&self, address: u64) {
        let read = |offset| self.memory.read_u32(address.wrapping_add(offset)).map(u32::from_be);
        let (Ok(control), Ok(length), Ok(high), Ok(low)) = (read(0), read(4), read(8), read(12)) else { return };
        let target = u64::from(high) << 32 | u64::from(low);
        let result = self.carry_out(control, length.into(), target);
        let status = if result.is_ok() { 0 } else { control::ERROR };
        // The description was readable RAM or ROM; in the second case nobody sees the outcome.
        let _ = self.memory.write_u32(address, status.to_be());
    }

    fn carry_out(&self, control: u32, length: u64, target: u64) -> Result<(), Refused> {
        let mut position = self.lock();
        if control & control::SELECT != 0 {
            (position.selector, position.offset) = ((control >> 16) as u16, 0);
        }
        if control & control::READ != 0 {
            let rest = self.rest(&position);
            let bytes = &rest[..rest.len().min(length as usize)];
            let beyond = length - bytes.len() as u64;
            if beyond > MOST_BEYOND {
                return Err(Refused);
            }
            self.memory.write(target, bytes)?;
            self.memory.fill(target.wrapping_add(bytes.len() as u64), beyond, 0)?;
        } else if control & control::WRITE != 0 {
            // There is no item that can be written.
            return Err(Refused);
        } else if control & control::SKIP == 0 {
            return Ok(());
        }
        position.offset = position.offset.saturating_add(length);
        Ok(())
    }
}

/// The device does not do it.
struct Refused;

impl From<MemoryError> for Refused {
    fn from(_: MemoryError) -> Self {
        Self
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        match (offset, size) {
            (offset::SELECTOR, AccessSize::Word) => self.lock().selector.into(),
            (offset::DATA, AccessSize::Byte) => self.next_byte().into(),
            (offset::DMA_HIGH.., _) if self.dma => {
                let at = (offset - offset::DMA_HIGH) as usize;
                let bytes = DMA_SIGNATURE.iter().skip(at).take(size.bytes() as usize);
                bytes.rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
            }
            _ => size.mask(),
        }
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        match (offset, size) {
            (offset::SELECTOR, AccessSize::Word) => {
                let mut position = self.lock();
                (position.selector, position.offset) = (value as u16, 0);
            }
            (offset::DMA_HIGH, AccessSize::Dword) if self.dma => self.lock().dma_high = (value as u32).swap_bytes(),
            (offset::DMA_LOW, AccessSize::Dword) if self.dma => {
                let high = std::mem::take(&mut self.lock().dma_high);
                self.transfer(u64::from(high) << 32 | u64::from((value as u32).swap_bytes()));
            }
            (offset::DMA_HIGH, AccessSize::Qword) if self.dma => self.transfer(value.swap_bytes()),
            _ => {}
        }
    }
}

impl Persist for FwCfg {
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
        *self.lock() = state::decode(KIND, VERSION, version, bytes)?;
        Ok(())
    }

    fn reset(&self) {
        *self.lock() = Position::default();
    }
}

#[cfg(test)]
mod tests {
    use memory::MemoryOptions;

    use super::*;
    use crate::chipset::fixture::{Bytewise, Garbage, Lines, check_state};

    fn device(dma: bool) -> (Arc<FwCfg>, GuestMemory) {
        let memory = GuestMemory::new(MemoryOptions { size: 4 << 20, ..Default::default() }).unwrap();
        let file = |name: &str, contents: &[u8]| (name.to_owned(), contents.to_vec());
        let files =
            vec![file("opt/b", b"bee"), file("etc/a", b"old"), file("etc/a", b"four"), file(&"n".repeat(80), b"")];
        (FwCfg::new(memory.clone(), FwCfgItems { dma, cpus: 5, files }), memory)
    }

    fn select(device: &FwCfg, item: u16) {
        device.write(0, AccessSize::Word, item.into());
    }

    fn bytes<const N: usize>(device: &FwCfg) -> [u8; N] {
        std::array::from_fn(|_| device.inb(1))
    }

    /// Describes a transfer at 0x1000 and starts it; returns the control field afterwards.
    fn transfer(device: &FwCfg, memory: &GuestMemory, control: u32, length: u32, target: u64) -> u32 {
        memory.write(0x1000, &control.to_be_bytes()).unwrap();
        memory.write(0x1004, &length.to_be_bytes()).unwrap();
        memory.write(0x1008, &target.to_be_bytes()).unwrap();
        device.write(4, AccessSize::Dword, 0);
        device.write(8, AccessSize::Dword, 0x1000u32.swap_bytes().into());
        memory.read_u32(0x1000).unwrap().swap_bytes()
    }

    #[test]
    fn numbered_items() {
        let (device, _) = device(true);
        select(&device, 0);
        assert_eq!(bytes(&device), *b"QEMU\0");
        select(&device, 1);
        assert_eq!(bytes(&device), [3, 0, 0, 0]);
        for cpus in [5, 0xf] {
            select(&device, cpus);
            assert_eq!(bytes(&device), [5, 0]);
        }
        select(&device, 0x1234);
        assert_eq!(bytes(&device), [0; 4]);
    }

    #[test]
    fn the_directory_is_sorted() {
        let (device, _) = device(false);
        select(&device, 1);
        assert_eq!(device.inb(1), 1, "no DMA");
        select(&device, 0x19);
        assert_eq!(bytes(&device), [0, 0, 0, 3]);
        assert_eq!(bytes(&device), [0, 0, 0, 4, 0, 0x20, 0, 0]);
        assert_eq!(bytes::<56>(&device)[..6], *b"etc/a\0");
        assert_eq!(bytes(&device), [0, 0, 0, 0, 0, 0x21, 0, 0]);
        assert_eq!(bytes::<56>(&device)[54..], [b'n', 0]);
        assert_eq!(bytes::<64>(&device)[8..14], *b"opt/b\0");
        select(&device, 0x20);
        assert_eq!(bytes(&device), *b"four\0");
    }

    #[test]
    fn transfers_to_memory() {
        let (device, memory) = device(true);
        assert_eq!(device.read(4, AccessSize::Dword), u64::from(u32::from_le_bytes(*b"QEMU")));
        memory.fill(0x2000, 16, 0xee).unwrap();
        assert_eq!(transfer(&device, &memory, 0x0020_000a, 6, 0x2001), 0);
        assert_eq!(memory.read_u64(0x2000).unwrap().to_le_bytes(), *b"\xeefour\0\0\xee");
        assert_eq!(transfer(&device, &memory, 0x0022_000c, 1, 0), 0, "select and skip");
        assert_eq!(transfer(&device, &memory, 2, 2, 0x2000), 0);
        assert_eq!(memory.read_u16(0x2000).unwrap().to_le_bytes(), *b"ee");
    }

    #[test]
    fn refuses_transfers_that_cannot_be() {
        let (device, memory) = device(true);
        for (control, length, target) in [
            (0x0020_000a, 4, 4 << 20),
            (0x0020_000a, 4, (4 << 20) - 2),
            (0x0020_000a, 4, u64::MAX - 1),
            (0x0020_000a, u32::MAX, 0),
            (0x0020_0018, 4, 0x2000),
        ] {
            assert_eq!(transfer(&device, &memory, control, length, target), 1, "{control:#x} {length:#x} {target:#x}");
        }
        for address in [u64::MAX, (4 << 20) - 8, 0xffff_ffff_ffff_fff8] {
            device.write(4, AccessSize::Qword, address.swap_bytes());
        }
    }

    #[test]
    fn garbage() {
        let (device, memory) = device(true);
        let (mut garbage, lines) = (Garbage(3), Lines::new());
        for round in 0..100_000 {
            garbage.access(&*device, LENGTH);
            let random = garbage.next();
            memory.write_u64(0x1000, random & 0x1f00_0000_ffff_ffff).unwrap();
            memory.write_u64(0x1008, garbage.next() & 0xffff_ff00_0000).unwrap();
            if random.is_multiple_of(4) {
                device.write(8, AccessSize::Dword, (0x1000 + random % 16u64).swap_bytes() >> 32);
            }
            if round % 1000 == 0 {
                check_state(&*device, &lines, &mut garbage);
            }
        }
        device.reset();
        assert_eq!(bytes(&device), *b"QEMU");
    }
}
