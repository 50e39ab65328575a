//! Start addresses for BARs, and the windows of each bus that ACPI describes.
//!
//! Guests without firmware rely on the addresses given here; firmware and operating systems move BARs as they like.

use std::ops::Range;

use config::pci::PciAddress;

use super::bar::{Bar, Window};

/// First port for BARs, and one past the last.
const PORTS: Range<u64> = 0x2000..0x1_0000;
/// Memory for BARs below 4 GiB; memory-mapped configuration begins where it ends.
const LOW_MEMORY: Range<u64> = 0xc000_0000..0xe000_0000;
/// Size of the window for large BARs, and the alignment of its start.
const HIGH_WINDOW: u64 = 32 << 30;

/// What each bus's share of a window is rounded up to.
const PORT_ROUND: u64 = 32;
const LOW_ROUND: u64 = 1 << 20;
const HIGH_ROUND: u64 = 512 << 20;

/// The address windows of one bus.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BusWindows {
    /// The bus.
    pub bus: u8,
    /// Its ports.
    pub io: Range<u64>,
    /// Its memory below 4 GiB.
    pub memory32: Range<u64>,
    /// Its memory above the guest's RAM.
    pub memory64: Range<u64>,
}

/// A BAR that does not fit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "pci slot {address}: BAR {bar} of {size:#x} bytes does not fit into the {window} window any more: configure fewer devices"
)]
pub struct NoSpace {
    address: PciAddress,
    bar: usize,
    size: u64,
    window: &'static str,
}

/// A window that is handed out from its start.
struct Allocator {
    name: &'static str,
    next: u64,
    end: u64,
    round: u64,
}

impl Allocator {
    fn new(name: &'static str, range: Range<u64>, round: u64) -> Self {
        Self { name, next: range.start, end: range.end, round }
    }

    /// A naturally aligned range of `size` bytes.
    fn take(&mut self, size: u64) -> Option<u64> {
        let start = self.next.checked_next_multiple_of(size)?;
        let end = start.checked_add(size).filter(|end| *end <= self.end)?;
        self.next = end;
        Some(start)
    }

    /// Ends a bus's share that began at `start`, with some room for the guest to move BARs.
    fn close(&mut self, start: u64) -> Range<u64> {
        self.next = (self.next + self.round).next_multiple_of(self.round).min(self.end);
        start..self.next
    }
}

/// Hands out addresses bus by bus.
pub(crate) struct Resources {
    ports: Allocator,
    low: Allocator,
    high: Allocator,
}

/// A BAR to be placed: function, register number, BAR.
pub(crate) type Request = (PciAddress, usize, Bar);

impl Resources {
    /// Addresses for a guest whose high memory ends at `high_memory_end` (4 GiB without high memory).
    pub(crate) fn new(high_memory_end: u64) -> Self {
        let high = high_memory_end.max(1 << 32).next_multiple_of(HIGH_WINDOW);
        Self {
            ports: Allocator::new("I/O port", PORTS, PORT_ROUND),
            low: Allocator::new("32-bit memory", LOW_MEMORY, LOW_ROUND),
            high: Allocator::new("64-bit memory", high..high + HIGH_WINDOW, HIGH_ROUND),
        }
    }

    /// Places the BARs of one bus, largest first, so that natural alignment wastes nothing.
    pub(crate) fn assign_bus(
        &mut self,
        bus: u8,
        mut requests: Vec<Request>,
        mut assigned: impl FnMut(Request, u64),
    ) -> Result<BusWindows, NoSpace> {
        requests.sort_by_key(|(address, index, bar)| (std::cmp::Reverse(bar.size()), *address, *index));
        let starts = [self.ports.next, self.low.next, self.high.next];
        for request in requests {
            let (address, index, bar) = request;
            let allocator = match bar.window() {
                Window::Io => &mut self.ports,
                Window::Low => &mut self.low,
                Window::High => &mut self.high,
            };
            let no_space = NoSpace { address, bar: index, size: bar.size(), window: allocator.name };
            assigned(request, allocator.take(bar.size()).ok_or(no_space)?);
        }
        Ok(BusWindows {
            bus,
            io: self.ports.close(starts[0]),
            memory32: self.low.close(starts[1]),
            memory64: self.high.close(starts[2]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::bar::BarKind;
    use super::*;

    fn at(slot: u8) -> PciAddress {
        PciAddress::new(0, slot, 0).unwrap()
    }

    #[test]
    fn places_largest_first_in_the_documented_windows() {
        let mut resources = Resources::new(5 << 30);
        let requests = vec![
            (at(1), 0, Bar::new(BarKind::Io, 0x80)),
            (at(1), 1, Bar::new(BarKind::Memory32, 0x2000)),
            (at(2), 0, Bar::new(BarKind::Io, 0x100)),
            (at(2), 1, Bar::new(BarKind::Memory32, 16 << 20)),
            (at(3), 0, Bar::new(BarKind::Memory64, 0x4000)),
            (at(3), 2, Bar::new(BarKind::Memory64, 256 << 20)),
        ];
        let mut got = Vec::new();
        let windows =
            resources.assign_bus(0, requests, |(a, index, _), start| got.push((a.slot, index, start))).unwrap();
        got.sort_unstable();
        assert_eq!(
            got,
            [
                (1, 0, 0x2100),
                (1, 1, 0xc100_4000),
                (2, 0, 0x2000),
                (2, 1, 0xc000_0000),
                (3, 0, 0xc100_0000),
                (3, 2, 0x8_0000_0000),
            ]
        );
        assert_eq!(windows.io, 0x2000..0x21a0);
        assert_eq!(windows.memory32, 0xc000_0000..0xc120_0000);
        assert_eq!(windows.memory64, 0x8_0000_0000..0x8_4000_0000);
        let next = resources.assign_bus(1, vec![(at(1), 0, Bar::new(BarKind::Io, 4))], |_, start| {
            assert_eq!(start, 0x21a0, "the next bus begins where the first one's window ends");
        });
        assert_eq!(next.unwrap().io, 0x21a0..0x21e0);
    }

    #[test]
    fn says_what_does_not_fit() {
        let mut resources = Resources::new(0);
        let error = resources.assign_bus(0, vec![(at(1), 2, Bar::new(BarKind::Memory32, 1 << 30))], |_, _| ());
        assert!(error.unwrap_err().to_string().starts_with("pci slot 0:1:0: BAR 2 of 0x40000000 bytes"));
    }

    #[test]
    fn the_high_window_lies_above_memory() {
        let start = |end| Resources::new(end).high.next;
        assert_eq!(start(1 << 32), 32 << 30);
        assert_eq!(start(32 << 30), 32 << 30);
        assert_eq!(start((32 << 30) + 4096), 64 << 30);
    }
}
