//! The guest's memory map, in the form of the BIOS call of that name.

use memory::HIGH_MEMORY_BASE;
use platform::GuestRange;

use crate::board::Board;
use crate::tables::ECAM;

/// What a range of addresses is (ACPI 6.5, table 15.4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum E820Kind {
    /// RAM that the guest may use.
    Ram = 1,
    /// Not for use as RAM, and no BAR may be put there.
    Reserved = 2,
}

/// One entry of the map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct E820Entry {
    /// The addresses.
    pub range: GuestRange,
    /// What they are.
    pub kind: E820Kind,
}

/// End of conventional memory, start of the VGA and ROM area.
pub(crate) const LEGACY_HOLE: u64 = 0xa0000;
/// End of the BIOS area.
pub(crate) const ONE_MIB: u64 = 0x10_0000;
/// The area that holds the firmware tables.
const BIOS_AREA: GuestRange = GuestRange { start: platform::GuestAddress(0xc0000), size: ONE_MIB - 0xc0000 };

/// The memory map of `board`: sorted by address, no overlaps, no empty entries.
///
/// The PCI Express configuration window is in it as reserved, so that a guest need not evaluate ACPI's AML before it
/// trusts that window.
pub fn e820(board: &Board) -> Vec<E820Entry> {
    let ram = |start: u64, end: u64| E820Entry {
        range: GuestRange::new(start, end.saturating_sub(start)),
        kind: E820Kind::Ram,
    };
    let reserved = |range| E820Entry { range, kind: E820Kind::Reserved };
    let all = [
        ram(0, board.low_memory.min(LEGACY_HOLE)),
        reserved(BIOS_AREA),
        ram(ONE_MIB, board.low_memory),
        reserved(ECAM),
        ram(HIGH_MEMORY_BASE, HIGH_MEMORY_BASE.saturating_add(board.high_memory)),
    ];
    all.into_iter().filter(|entry| entry.range.size > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::board;

    fn spans(low: u64, high: u64) -> Vec<(u64, u64, E820Kind)> {
        let board = Board { low_memory: low, high_memory: high, ..board() };
        e820(&board).iter().map(|entry| (entry.range.start.0, entry.range.end(), entry.kind)).collect()
    }

    #[test]
    fn hides_the_bios_area_and_shows_both_pieces_of_ram() {
        assert_eq!(
            spans(3 << 30, 1 << 30),
            [
                (0, 0xa0000, E820Kind::Ram),
                (0xc0000, 0x100000, E820Kind::Reserved),
                (0x100000, 0xc000_0000, E820Kind::Ram),
                (0xe000_0000, 0xf000_0000, E820Kind::Reserved),
                (0x1_0000_0000, 0x1_4000_0000, E820Kind::Ram),
            ]
        );
    }

    #[test]
    fn has_no_empty_entries_in_small_machines() {
        let ram = |low| spans(low, 0).into_iter().filter(|entry| entry.2 == E820Kind::Ram).collect::<Vec<_>>();
        assert_eq!(ram(0x10_0000), [(0, 0xa0000, E820Kind::Ram)]);
        assert_eq!(ram(0x1_0000), [(0, 0x1_0000, E820Kind::Ram)]);
    }
}
