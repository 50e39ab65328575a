//! Descriptor chains (virtio 1.2, 2.7.5): the walk through guest tables, every step checked before anything is used.

use memory::{GuestMemory, MemoryError};
use platform::GuestRange;

use super::buffers::Buffers;

const DESCRIPTOR_SIZE: u64 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Descriptors of one chain, at most. The specification's limit is the queue size, but drivers that use indirect
/// tables go beyond it; this is as far as any known driver goes, and bounds the work of a hostile chain.
const MAX_DESCRIPTORS: u32 = 1024;

/// What is wrong with a chain. The driver broke the protocol; its queue stops until it is reset.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A descriptor's index is outside its table.
    #[error("descriptor {index} is outside a table of {size}")]
    Index {
        /// The index.
        index: u32,
        /// Entries of the table.
        size: u32,
    },
    /// The chain is a loop, or too long.
    #[error("a chain of more than {MAX_DESCRIPTORS} descriptors, or one that loops")]
    Length,
    /// A table or a buffer is not in RAM.
    #[error("descriptor names memory that is not there")]
    Memory(#[from] MemoryError),
    /// A buffer for the device to read follows one to write.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// An indirect descriptor where none may be, or with a table of odd size.
    #[error("an indirect descriptor that is not negotiated, nested, chained on, or of {0} bytes")]
    Indirect(u32),
}

/// A table of descriptors in guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    pub(crate) address: u64,
    pub(crate) entries: u32,
}

struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Table {
    fn descriptor(&self, memory: &GuestMemory, index: u32) -> Result<Descriptor, ChainError> {
        if index >= self.entries {
            return Err(ChainError::Index { index, size: self.entries });
        }
        let mut bytes = [0; DESCRIPTOR_SIZE as usize];
        let offset = u64::from(index) * DESCRIPTOR_SIZE;
        let outside = MemoryError::OutsideRam { address: self.address, len: offset };
        memory.read(self.address.checked_add(offset).ok_or(outside)?, &mut bytes)?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Ok(Descriptor {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

/// Follows the chain that begins at `head` of `table`: (buffers for the device to read, buffers for it to write).
pub(crate) fn walk(
    memory: &GuestMemory,
    table: Table,
    head: u16,
    indirect_allowed: bool,
) -> Result<(Buffers, Buffers), ChainError> {
    let (mut readable, mut writable) = (Buffers::new(), Buffers::new());
    let mut table = table;
    let mut may_be_indirect = indirect_allowed;
    let mut index = u32::from(head);
    for _ in 0..MAX_DESCRIPTORS {
        let descriptor = table.descriptor(memory, index)?;
        if descriptor.flags & INDIRECT != 0 {
            table = indirect_table(&descriptor, may_be_indirect)?;
            may_be_indirect = false;
            index = 0;
            continue;
        }
        let range = GuestRange::new(descriptor.address, u64::from(descriptor.len));
        if range.size > 0 && !memory.is_ram(range.start.0, range.size) {
            return Err(MemoryError::OutsideRam { address: range.start.0, len: range.size }.into());
        }
        if descriptor.flags & WRITE != 0 {
            writable.push(range);
        } else if writable.is_empty() {
            readable.push(range);
        } else {
            return Err(ChainError::Order);
        }
        if descriptor.flags & NEXT == 0 {
            return Ok((readable, writable));
        }
        index = u32::from(descriptor.next);
    }
    Err(ChainError::Length)
}

fn indirect_table(descriptor: &Descriptor, allowed: bool) -> Result<Table, ChainError> {
    let entries = descriptor.len / DESCRIPTOR_SIZE as u32;
    let whole = entries > 0 && descriptor.len.is_multiple_of(DESCRIPTOR_SIZE as u32);
    if allowed && whole && descriptor.flags & NEXT == 0 {
        Ok(Table { address: descriptor.address, entries })
    } else {
        Err(ChainError::Indirect(descriptor.len))
    }
}

#[cfg(test)]
mod tests {
    use memory::MemoryOptions;

    use super::*;

    const TABLE: Table = Table { address: 0x1000, entries: 8 };

    struct Bench(GuestMemory);

    impl Bench {
        fn new() -> Self {
            Self(GuestMemory::new(MemoryOptions { size: 0x10_0000, ..Default::default() }).unwrap())
        }

        fn set(&self, table: u64, index: u64, (address, len, flags, next): (u64, u32, u16, u16)) -> &Self {
            let at = table + index * 16;
            self.0.write_u64(at, address).unwrap();
            self.0.write_u32(at + 8, len).unwrap();
            self.0.write_u16(at + 12, flags).unwrap();
            self.0.write_u16(at + 14, next).unwrap();
            self
        }

        fn walk(&self, head: u16) -> Result<(Buffers, Buffers), ChainError> {
            walk(&self.0, TABLE, head, true)
        }
    }

    #[test]
    fn gathers_readable_and_writable_buffers() {
        let b = Bench::new();
        b.set(0x1000, 2, (0x2000, 16, NEXT, 5)).set(0x1000, 5, (0x3000, 512, NEXT | WRITE, 0));
        b.set(0x1000, 0, (0x4000, 1, WRITE, 0));
        let (readable, writable) = b.walk(2).unwrap();
        assert_eq!(readable.ranges(), [GuestRange::new(0x2000, 16)]);
        assert_eq!(writable.ranges(), [GuestRange::new(0x3000, 512), GuestRange::new(0x4000, 1)]);
    }

    #[test]
    fn follows_one_indirect_table() {
        let b = Bench::new();
        b.set(0x1000, 0, (0x8000, 32, INDIRECT, 0));
        b.set(0x8000, 0, (0x2000, 16, NEXT, 1)).set(0x8000, 1, (0x3000, 4, WRITE, 0));
        assert_eq!(b.walk(0).unwrap().1.len(), 4);
        assert!(matches!(walk(&b.0, TABLE, 0, false), Err(ChainError::Indirect(32))), "not negotiated");
        b.set(0x8000, 1, (0x9000, 16, INDIRECT, 0));
        assert!(matches!(b.walk(0), Err(ChainError::Indirect(16))), "nested");
        b.set(0x8000, 0, (0x2000, 16, NEXT, 2));
        assert!(matches!(b.walk(0), Err(ChainError::Index { index: 2, size: 2 })));
        for len in [0, 8, 24] {
            b.set(0x1000, 0, (0x8000, len, INDIRECT, 0));
            assert!(matches!(b.walk(0), Err(ChainError::Indirect(_))), "table of {len} bytes");
        }
        b.set(0x1000, 0, (0x8000, 32, INDIRECT | NEXT, 1));
        assert!(matches!(b.walk(0), Err(ChainError::Indirect(_))), "chained on");
    }

    #[test]
    fn ends_loops_and_refuses_nonsense() {
        let b = Bench::new();
        b.set(0x1000, 0, (0x2000, 16, NEXT, 0));
        assert!(matches!(b.walk(0), Err(ChainError::Length)));
        assert!(matches!(b.walk(8), Err(ChainError::Index { index: 8, .. })));
        b.set(0x1000, 1, (0x2000, 4, WRITE | NEXT, 2)).set(0x1000, 2, (0x2000, 4, 0, 0));
        assert!(matches!(b.walk(1), Err(ChainError::Order)));
        for (address, len) in [(0xf_ffff, 2), (u64::MAX, 1), (u64::MAX - 1, 16), (0x2000, u32::MAX)] {
            b.set(0x1000, 3, (address, len, 0, 0));
            assert!(matches!(b.walk(3), Err(ChainError::Memory(_))), "{address:#x}+{len:#x}");
        }
        let outside = Table { address: u64::MAX - 4, entries: 8 };
        assert!(matches!(walk(&b.0, outside, 7, true), Err(ChainError::Memory(_))));
        b.set(0x1000, 4, (u64::MAX, 0, 0, 0));
        assert!(b.walk(4).unwrap().0.is_empty(), "an empty buffer may be anywhere");
    }
}
