//! Who has which piece of guest memory while a kernel is being loaded.

use memory::{GuestMemory, HIGH_MEMORY_BASE, PAGE_SIZE};
use platform::GuestRange;

use super::error::BootError;
use crate::e820::{LEGACY_HOLE, ONE_MIB};

/// Interrupt vectors and BIOS data, which real-mode parts of a kernel look at.
const BIOS_DATA_END: u64 = 0x1000;

/// What the loader itself puts into conventional memory. Linux of before protocol 2.02 finds its parameters and command
/// line by their place in the segment at 0x90000, so everybody's are there. What Linux takes for its way
/// to 5-level paging, the last pages below [`LEGACY_HOLE`], stays free.
pub(super) mod low {
    /// Segment descriptors.
    pub(in crate::load) const GDT: u64 = 0x8_0000;
    /// Page tables for the 64-bit entry: 6 pages.
    pub(in crate::load) const PAGE_TABLES: u64 = 0x8_1000;
    /// Zero page, start info or multiboot information: 1 page.
    pub(in crate::load) const PARAMETERS: u64 = 0x9_0000;
    /// The command line.
    pub(in crate::load) const COMMAND_LINE: u64 = 0x9_1000;
    /// Room for it, with its terminator.
    pub(in crate::load) const COMMAND_LINE_SIZE: u64 = 0x7000;
    /// The string of a multiboot module.
    pub(in crate::load) const MODULE_STRING: u64 = 0x9_8000;
    /// Room for it, with its terminator.
    pub(in crate::load) const MODULE_STRING_SIZE: u64 = 0x1000;
    pub(in crate::load) const START: u64 = GDT;
    pub(in crate::load) const END: u64 = MODULE_STRING + MODULE_STRING_SIZE;
}

/// Guest memory and the claims on it.
pub(super) struct Space<'a> {
    memory: &'a GuestMemory,
    claims: Vec<(GuestRange, &'static str)>,
}

impl<'a> Space<'a> {
    pub(super) fn new(memory: &'a GuestMemory) -> Self {
        let claims = vec![
            (GuestRange::new(0, BIOS_DATA_END), "BIOS data area"),
            (GuestRange::new(low::START, low::END - low::START), "boot parameters"),
            (GuestRange::new(LEGACY_HOLE, ONE_MIB - LEGACY_HOLE), "BIOS area"),
        ];
        Self { memory, claims }
    }

    pub(super) fn memory(&self) -> &'a GuestMemory {
        self.memory
    }

    /// Claims `size` bytes at `start`: they must be low memory that nobody has.
    pub(super) fn claim(&mut self, start: u64, size: u64, what: &'static str) -> Result<(), BootError> {
        let ram = self.memory.low_size();
        let range = GuestRange::new(start, size);
        if start.checked_add(size).is_none_or(|end| end > ram) {
            return Err(BootError::DoesNotFit { what, size, start, ram });
        }
        if let Some((_, other)) = self.claims.iter().find(|(taken, _)| size > 0 && taken.overlaps(&range)) {
            return Err(BootError::Overlap { what, start, end: range.end(), other });
        }
        self.claims.push((range, what));
        Ok(())
    }

    /// Claims `size` bytes as high as possible, in whole pages of low memory below `limit`; or of high memory, if `limit`
    /// is beyond that and low memory is too small. Returns their address.
    pub(super) fn place(&mut self, size: u64, limit: u64, what: &'static str) -> Result<u64, BootError> {
        let end_of_high = HIGH_MEMORY_BASE.saturating_add(self.memory.high_size());
        let pieces = [(ONE_MIB, self.memory.low_size()), (HIGH_MEMORY_BASE, end_of_high)];
        let found = pieces.into_iter().find_map(|(start, end)| self.highest(start, end.min(limit), size));
        let start = found.ok_or(BootError::NoRoom { what, size, ram: self.memory.size() })?;
        self.claims.push((GuestRange::new(start, size), what));
        Ok(start)
    }

    /// The highest page from which `size` bytes are free between `start` and `end`.
    fn highest(&self, start: u64, mut end: u64, size: u64) -> Option<u64> {
        loop {
            let at = end.checked_sub(size)? / PAGE_SIZE * PAGE_SIZE;
            if at < start {
                return None;
            }
            let wanted = GuestRange::new(at, size);
            match self.claims.iter().find(|(taken, _)| taken.overlaps(&wanted)) {
                // Each round ends below one claim more, so this comes to an end.
                Some((taken, _)) => end = taken.start.0,
                None => return Some(at),
            }
        }
    }

    /// Writes the loader's own structures.
    pub(super) fn write(&self, gpa: u64, bytes: &[u8], what: &'static str) -> Result<(), BootError> {
        self.memory.write(gpa, bytes).map_err(|source| BootError::Memory { what, source })
    }

    /// Writes the command line and its terminator; `limit` is what the kernel takes without the terminator.
    pub(super) fn write_command_line(&self, text: &[u8], limit: usize) -> Result<(), BootError> {
        let limit = limit.min(low::COMMAND_LINE_SIZE as usize - 1);
        if text.len() > limit {
            return Err(BootError::CommandLine { len: text.len(), limit });
        }
        self.write(low::COMMAND_LINE, &[text, &[0]].concat(), "command line")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::MemoryOptions;

    fn ram(size: u64) -> GuestMemory {
        GuestMemory::new(MemoryOptions { size, ..Default::default() }).unwrap()
    }

    #[test]
    fn claims_exclude_each_other() {
        let memory = ram(16 << 20);
        let mut space = Space::new(&memory);
        space.claim(0x10_0000, 0x1234, "kernel").unwrap();
        space.claim(0x10_1234, 0x10, "other").unwrap();
        let error = space.claim(0x10_1233, 1, "third").unwrap_err();
        assert!(matches!(error, BootError::Overlap { other: "kernel", .. }), "{error}");
        for (start, size) in [(0x500, 1), (0x9_0000, 0x100), (0x9_ffff, 2), (0x7_ffff, 2)] {
            assert!(matches!(space.claim(start, size, "low"), Err(BootError::Overlap { .. })), "{start:#x}");
        }
        for (start, size) in [(16 << 20, 1), (0x20_0000, u64::MAX), (u64::MAX, 2), (4 << 30, 1)] {
            assert!(matches!(space.claim(start, size, "far"), Err(BootError::DoesNotFit { .. })), "{start:#x}");
        }
    }

    #[test]
    fn places_go_to_the_top_and_around_claims() {
        let memory = ram(16 << 20);
        let mut space = Space::new(&memory);
        assert_eq!(space.place(0x1001, u64::MAX, "first").unwrap(), (16 << 20) - 0x2000);
        assert_eq!(space.place(0x1000, u64::MAX, "second").unwrap(), (16 << 20) - 0x3000);
        assert_eq!(space.place(0x1000, 0x20_0800, "limited").unwrap(), 0x1f_f000);
        assert_eq!(space.place(0xff_0000 - 0x20_0000, 0xff_0000, "large").unwrap(), 0x20_0000);
        for size in [0xf0_0000, 16 << 20, u64::MAX] {
            assert!(matches!(space.place(size, u64::MAX, "huge"), Err(BootError::NoRoom { .. })));
        }
    }

    #[test]
    fn high_memory_is_the_second_choice() {
        let memory = ram(5 << 30);
        let mut space = Space::new(&memory);
        assert_eq!(space.place(1 << 30, u64::MAX, "first").unwrap(), 2 << 30);
        assert_eq!(space.place(2 << 30, u64::MAX, "second").unwrap(), 4 << 30);
        assert!(space.place(2 << 30, 1 << 32, "third").is_err());
    }
}
