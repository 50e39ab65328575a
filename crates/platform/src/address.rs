//! Guest-physical addresses.

use std::fmt;

/// A guest-physical address, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestAddress(pub u64);

impl GuestAddress {
    /// The address `offset` bytes further, or `None` past the end of the 64-bit space.
    pub fn checked_add(self, offset: u64) -> Option<Self> {
        self.0.checked_add(offset).map(Self)
    }
}

impl fmt::Debug for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A range of guest-physical addresses: `start` up to, not including, `start + size`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GuestRange {
    /// First byte of the range.
    pub start: GuestAddress,
    /// Length in bytes.
    pub size: u64,
}

impl GuestRange {
    /// A range of `size` bytes from `start`.
    pub fn new(start: u64, size: u64) -> Self {
        Self { start: GuestAddress(start), size }
    }

    /// First address after the range; saturates at the end of the address space.
    pub fn end(&self) -> u64 {
        self.start.0.saturating_add(self.size)
    }

    /// Whether `len` bytes from `addr` lie inside the range.
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        addr >= self.start.0 && addr.checked_add(len).is_some_and(|end| end <= self.end())
    }

    /// Whether the two ranges share a byte.
    pub fn overlaps(&self, other: &GuestRange) -> bool {
        self.start.0 < other.end() && other.start.0 < self.end()
    }
}
