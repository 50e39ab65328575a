//! Base address registers: sizes, register contents, and where they decode.

use super::config_space::ConfigSpace;
use super::regs;

/// Number of base address registers of a type 0 header.
pub const BARS: usize = 6;

/// 64-bit BARs up to this size are placed below 4 GiB, because some guests cannot reach them above.
const LARGEST_LOW_64: u64 = 128 << 20;

/// The kind of a base address register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two registers.
    Memory64,
}

/// Which of the three address windows of a bus a BAR is placed in at power-on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Window {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Low,
    /// Memory above the guest's RAM.
    High,
}

/// A base address register a function has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bar {
    kind: BarKind,
    size: u64,
}

/// An address range that a BAR decodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Decode {
    pub(crate) io: bool,
    pub(crate) start: u64,
    pub(crate) size: u64,
}

impl Bar {
    /// A BAR of at least `size` bytes: rounded up to a power of two and the minimum of its kind (4 ports, 16 bytes of
    /// memory, 128 with 64-bit addresses).
    pub fn new(kind: BarKind, size: u64) -> Self {
        let minimum = match kind {
            BarKind::Io => 4,
            BarKind::Memory32 => 16,
            BarKind::Memory64 => 128,
        };
        Self { kind, size: size.max(minimum).next_power_of_two() }
    }

    /// Its kind.
    pub fn kind(&self) -> BarKind {
        self.kind
    }

    /// Its size in bytes, a power of two.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where it is placed at power-on.
    pub fn window(&self) -> Window {
        match self.kind {
            BarKind::Io => Window::Io,
            BarKind::Memory64 if self.size > LARGEST_LOW_64 => Window::High,
            _ => Window::Low,
        }
    }

    /// The flag bits of the register.
    fn flags(&self) -> u32 {
        match self.kind {
            BarKind::Io => regs::bar::IO,
            BarKind::Memory32 => 0,
            BarKind::Memory64 if self.window() == Window::High => regs::bar::MEMORY_64 | regs::bar::PREFETCHABLE,
            BarKind::Memory64 => regs::bar::MEMORY_64,
        }
    }

    /// COMMAND bit that makes it decode.
    pub(crate) fn enable_bit(&self) -> u16 {
        if self.kind == BarKind::Io { regs::command::IO } else { regs::command::MEMORY }
    }

    /// Whether it is a port BAR.
    pub(crate) fn is_io(&self) -> bool {
        self.kind == BarKind::Io
    }

    /// Sets up the register(s) of BAR `index`: flags, and which bits can be written. That is also what sizing reads.
    pub(crate) fn install(&self, space: &mut ConfigSpace, index: usize) {
        let at = register(index);
        let mask = !(self.size - 1);
        let low = match self.kind {
            BarKind::Io => mask as u32 & 0xffff & !regs::bar::IO_FLAGS,
            _ => mask as u32 & !regs::bar::MEMORY_FLAGS,
        };
        space.set(at, &self.flags().to_le_bytes());
        space.make_writable(at, &low.to_le_bytes());
        if self.kind == BarKind::Memory64 {
            space.make_writable(at + 4, &((mask >> 32) as u32).to_le_bytes());
        }
    }

    /// Writes an address into the register(s).
    pub(crate) fn assign(&self, space: &mut ConfigSpace, index: usize, address: u64) {
        let at = register(index);
        space.set(at, &(address as u32 | self.flags()).to_le_bytes());
        if self.kind == BarKind::Memory64 {
            space.set(at + 4, &((address >> 32) as u32).to_le_bytes());
        }
    }

    /// The range the register(s) decode now, if the COMMAND register lets them.
    ///
    /// Address 0 and a range that ends with the last byte of the (32-bit or port) space count as "not assigned": they
    /// are what a register holds before assignment and while it is being sized.
    pub(crate) fn decode(&self, space: &ConfigSpace, index: usize) -> Option<Decode> {
        if space.u16(regs::COMMAND) & self.enable_bit() == 0 {
            return None;
        }
        let at = register(index);
        let low = space.u32(at);
        let (start, top) = match self.kind {
            BarKind::Io => (u64::from(low & !regs::bar::IO_FLAGS), 0x1_0000),
            BarKind::Memory32 => (u64::from(low & !regs::bar::MEMORY_FLAGS), 1 << 32),
            BarKind::Memory64 => {
                (u64::from(low & !regs::bar::MEMORY_FLAGS) | u64::from(space.u32(at + 4)) << 32, u64::MAX)
            }
        };
        let end = start.checked_add(self.size)?;
        (start != 0 && end < top && start + self.size != 1 << 32).then_some(Decode {
            io: self.is_io(),
            start,
            size: self.size,
        })
    }
}

/// Offset of register `index` in configuration space.
pub(crate) fn register(index: usize) -> u16 {
    regs::BAR0 + 4 * index as u16
}

#[cfg(test)]
mod tests {
    use platform::AccessSize;

    use super::*;

    fn space(bar: Bar) -> ConfigSpace {
        let mut space = ConfigSpace::new();
        bar.install(&mut space, 0);
        space.set(regs::COMMAND, &(regs::command::IO | regs::command::MEMORY).to_le_bytes());
        space
    }

    fn sized(bar: Bar) -> (u32, u32) {
        let mut space = space(bar);
        space.write(regs::BAR0, AccessSize::Dword, u32::MAX);
        space.write(regs::BAR0 + 4, AccessSize::Dword, u32::MAX);
        assert_eq!(bar.decode(&space, 0), None, "a BAR being sized decodes nothing");
        (space.u32(regs::BAR0), space.u32(regs::BAR0 + 4))
    }

    #[test]
    fn sizing_reads_the_size() {
        assert_eq!(sized(Bar::new(BarKind::Io, 84)), (0xff81, 0));
        assert_eq!(sized(Bar::new(BarKind::Io, 1)), (0xfffd, 0));
        assert_eq!(sized(Bar::new(BarKind::Memory32, 0x2000)), (0xffff_e000, 0));
        assert_eq!(sized(Bar::new(BarKind::Memory64, 0x4000)), (0xffff_c004, 0xffff_ffff));
        assert_eq!(sized(Bar::new(BarKind::Memory64, 16 << 30)), (0xc, 0xffff_fffc));
    }

    #[test]
    fn decodes_what_was_assigned() {
        let bar = Bar::new(BarKind::Memory64, 256 << 20);
        let mut space = space(bar);
        assert_eq!(bar.decode(&space, 0), None, "unassigned");
        bar.assign(&mut space, 0, 0x8_0000_0000);
        assert_eq!(bar.decode(&space, 0), Some(Decode { io: false, start: 0x8_0000_0000, size: 256 << 20 }));
        space.write(regs::COMMAND, AccessSize::Word, 0);
        assert_eq!(bar.decode(&space, 0), None, "decoding is off");
    }

    #[test]
    fn small_64_bit_bars_go_below_4_gib() {
        assert_eq!(Bar::new(BarKind::Memory64, 128 << 20).window(), Window::Low);
        assert_eq!(Bar::new(BarKind::Memory64, 129 << 20).window(), Window::High);
        assert_eq!(Bar::new(BarKind::Io, 1).size(), 4);
        assert_eq!(Bar::new(BarKind::Memory32, 1).size(), 16);
        assert_eq!(Bar::new(BarKind::Memory64, 1).size(), 128);
    }
}
