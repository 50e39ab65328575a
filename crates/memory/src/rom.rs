//! Read-only memory below 4 GiB: firmware code, and flash while it shows its contents.
#![allow(unsafe_code)]

use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use platform::GuestRange;

use crate::{GuestMemory, HIGH_MEMORY_BASE, MemoryError, PAGE_SIZE, ROM_WINDOW};

/// What writes do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RomKind {
    /// Nothing: the contents never change.
    Fixed,
    /// They are commands to a flash chip, which changes the contents and may hide them.
    Flash,
}

/// A piece of read-only memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rom {
    /// Its addresses.
    pub range: GuestRange,
    /// What writes do.
    pub kind: RomKind,
}

/// The pieces, stacked from 4 GiB downwards without gaps, and from where on they can be read.
pub(crate) struct RomState {
    pieces: Mutex<Vec<Rom>>,
    /// Lowest address of all pieces.
    base: AtomicU64,
    /// Lowest address that is memory now; what lies below is a device.
    visible: AtomicU64,
    /// Counts changes of `visible`.
    epoch: AtomicU32,
}

impl Default for RomState {
    fn default() -> Self {
        Self {
            pieces: Mutex::default(),
            base: AtomicU64::new(HIGH_MEMORY_BASE),
            visible: AtomicU64::new(HIGH_MEMORY_BASE),
            epoch: AtomicU32::new(0),
        }
    }
}

impl GuestMemory {
    /// Puts read-only memory with `contents` right below what read-only memory there is, or below 4 GiB. To be called before
    /// vCPUs run. Returns where it lies.
    ///
    /// # Errors
    /// Empty, not whole pages, larger than what is left of the window, or the host has no memory for it.
    pub fn add_rom(&self, kind: RomKind, contents: &[u8]) -> Result<GuestRange, MemoryError> {
        let rom = &self.0.rom;
        let mut pieces = rom.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        let (end, size) = (rom.base.load(Ordering::SeqCst), contents.len() as u64);
        let address = end.saturating_sub(size);
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) || address < ROM_WINDOW {
            return Err(MemoryError::Rom { address, size });
        }
        let host = |source| MemoryError::Host { what: "map", size, source };
        self.0.map.place(address, size, None).map_err(host)?;
        pieces.push(Rom { range: GuestRange::new(address, size), kind });
        rom.base.store(address, Ordering::SeqCst);
        self.write_rom(address, contents)?;
        self.show_rom_from(address);
        Ok(GuestRange::new(address, size))
    }

    /// The pieces of read-only memory, from the uppermost downwards.
    pub fn roms(&self) -> Vec<Rom> {
        self.0.rom.pieces.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether `len` bytes from `gpa` lie inside one range of RAM, or inside read-only memory that shows its contents.
    #[inline]
    pub fn is_readable(&self, gpa: u64, len: u64) -> bool {
        self.is_ram(gpa, len)
            || gpa >= self.0.rom.visible.load(Ordering::Acquire)
                && gpa.checked_add(len).is_some_and(|end| end <= HIGH_MEMORY_BASE)
    }

    /// Makes read-only memory from `address` up readable, and what lies below a device: a flash chip hides its contents while
    /// it shows its status. A vCPU sees the change after its own next access to a device, others when they next look at
    /// [`GuestMemory::rom_epoch`].
    pub fn show_rom_from(&self, address: u64) {
        let visible = address.max(self.0.rom.base.load(Ordering::SeqCst));
        if self.0.rom.visible.swap(visible, Ordering::SeqCst) != visible {
            self.0.rom.epoch.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// How often [`GuestMemory::show_rom_from`] changed something, wrapping. While it stands still, so does what is readable.
    #[inline]
    pub fn rom_epoch(&self) -> u32 {
        self.0.rom.epoch.load(Ordering::Acquire)
    }

    fn rom_address(&self, gpa: u64, len: u64) -> Result<*mut u8, MemoryError> {
        let inside = gpa >= self.0.rom.base.load(Ordering::Acquire)
            && gpa.checked_add(len).is_some_and(|end| end <= HIGH_MEMORY_BASE);
        let outside = MemoryError::OutsideRam { address: gpa, len };
        if inside { self.0.map.at(gpa, len).ok_or(outside) } else { Err(outside) }
    }

    /// Copies contents of read-only memory out, hidden or not.
    ///
    /// # Errors
    /// Not wholly inside read-only memory.
    pub fn read_rom(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let at = self.rom_address(gpa, bytes.len() as u64)?;
        // SAFETY: the source is mapped memory of the guest's and cannot overlap a Rust slice; races give mixed bytes only.
        unsafe { ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Changes contents of read-only memory, for the chip behind it.
    ///
    /// # Errors
    /// Not wholly inside read-only memory.
    pub fn write_rom(&self, gpa: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let at = self.rom_address(gpa, bytes.len() as u64)?;
        // SAFETY: as for `read_rom`, in the other direction; the mapping is writable for this process.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
        self.0.pages.note_write(gpa, bytes.len() as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryOptions;

    fn memory() -> GuestMemory {
        GuestMemory::new(MemoryOptions { size: 5 << 30, ..Default::default() }).unwrap()
    }

    #[test]
    fn is_stacked_below_four_gigabytes() {
        let memory = memory();
        assert!(memory.read_u8(0xffff_ffff).is_err());
        let code = memory.add_rom(RomKind::Fixed, &[7; 0x2000]).unwrap();
        let flash = memory.add_rom(RomKind::Flash, &[9; 0x1000]).unwrap();
        assert_eq!((code.start.0, flash.start.0), (0xffff_e000, 0xffff_d000));
        assert_eq!(memory.read_u16(0xffff_dfff).unwrap(), 0x0709, "reads cross from one piece into the other");
        assert!(memory.read_u16(0xffff_ffff).is_err(), "but not into RAM above");
        assert!(memory.read_u8(0xffff_cfff).is_err());
        assert!(memory.write_u8(0xffff_ffff, 1).is_err() && memory.host_address(0xffff_e000, 1).is_err());
        assert_eq!(memory.roms().iter().map(|rom| rom.kind).collect::<Vec<_>>(), [RomKind::Fixed, RomKind::Flash]);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let memory = memory();
        for size in [0, 1, 0xfff, (16 << 20) + 0x1000] {
            assert!(matches!(memory.add_rom(RomKind::Fixed, &vec![0; size]), Err(MemoryError::Rom { .. })), "{size}");
        }
        memory.add_rom(RomKind::Fixed, &vec![0; 16 << 20]).unwrap();
        assert!(memory.add_rom(RomKind::Flash, &[0; 0x1000]).is_err(), "the window is full");
    }

    #[test]
    fn flash_can_hide_and_change() {
        let memory = memory();
        memory.add_rom(RomKind::Fixed, &[7; 0x1000]).unwrap();
        memory.add_rom(RomKind::Flash, &[9; 0x1000]).unwrap();
        let epoch = memory.rom_epoch();
        memory.show_rom_from(0xffff_f000);
        assert!(memory.read_u8(0xffff_e000).is_err() && memory.read_u8(0xffff_f000).is_ok());
        assert_ne!(memory.rom_epoch(), epoch);
        let tag = memory.pages().mark_code(0xffff_e000).unwrap();
        memory.write_rom(0xffff_e010, &[1, 2]).unwrap();
        assert!(!memory.pages().is_current(0xffff_e000, tag), "decoded code ends with its bytes");
        memory.show_rom_from(0);
        assert_eq!(memory.read_u16(0xffff_e010).unwrap(), 0x0201);
        assert!(memory.write_rom(0xffff_d000, &[1]).is_err() && memory.write_rom(0xffff_ffff, &[1, 2]).is_err());
    }

    #[test]
    fn is_never_taken_for_untouched_memory() {
        let memory = memory();
        memory.pages().all_writes_are_noted();
        memory.add_rom(RomKind::Flash, &[0; 0x1000]).unwrap();
        assert!(!memory.pages().is_untouched(0xffff_f000) && !memory.pages().is_untouched(ROM_WINDOW));
    }
}
