//! `struct boot_params`, the "zero page": what a boot loader tells a Linux kernel
//! (Documentation/arch/x86/zero-page.rst).

use super::space::low;
use crate::board::Board;
use crate::e820::{ONE_MIB, e820};
use crate::tables::ACPI_BASE;

/// Where the setup header lies, in the zero page as in the file.
pub(super) const HEADER_OFFSET: usize = 0x1f1;

const SIZE: usize = 4096;
const EXT_MEM_K: usize = 0x02;
const OLD_COMMAND_LINE_MAGIC: usize = 0x20;
const OLD_COMMAND_LINE_OFFSET: usize = 0x22;
const ACPI_RSDP: usize = 0x70;
const EXT_RAMDISK_IMAGE: usize = 0xc0;
const EXT_RAMDISK_SIZE: usize = 0xc4;
const ALT_MEM_K: usize = 0x1e0;
const E820_ENTRIES: usize = 0x1e8;
const TYPE_OF_LOADER: usize = 0x210;
const CODE32_START: usize = 0x214;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const COMMAND_LINE_POINTER: usize = 0x228;
const E820_TABLE: usize = 0x2d0;
/// The header ends here at the latest: what follows is ours to fill in.
const HEADER_END: usize = 0x290;

/// A zero page in the making.
pub(super) struct Parameters([u8; SIZE]);

impl Parameters {
    /// One with the setup header of the kernel, and all else zero.
    pub(super) fn new(header: &[u8]) -> Self {
        let mut page = [0; SIZE];
        let len = header.len().min(HEADER_END - HEADER_OFFSET);
        page[HEADER_OFFSET..HEADER_OFFSET + len].copy_from_slice(&header[..len]);
        Self(page)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn put32(&mut self, offset: usize, value: u64) {
        self.put(offset, &(value as u32).to_le_bytes());
    }

    /// Says that a loader without a registered number put the kernel at `address`.
    pub(super) fn set_loader(&mut self, address: u32) {
        const UNREGISTERED: u8 = 0xff;
        self.put(TYPE_OF_LOADER, &[UNREGISTERED]);
        self.put32(CODE32_START, address.into());
    }

    /// The memory map, in today's form and in the two that were before it; and where ACPI begins.
    pub(super) fn set_memory(&mut self, board: &Board) {
        let entries = e820(board);
        self.put(E820_ENTRIES, &[entries.len() as u8]);
        for (index, entry) in entries.iter().enumerate() {
            let at = E820_TABLE + index * 20;
            self.put(at, &entry.range.start.0.to_le_bytes());
            self.put(at + 8, &entry.range.size.to_le_bytes());
            self.put32(at + 16, entry.kind as u64);
        }
        let kib = board.low_memory.saturating_sub(ONE_MIB) >> 10;
        self.put32(ALT_MEM_K, kib);
        self.put(EXT_MEM_K, &u16::try_from(kib).unwrap_or(u16::MAX).to_le_bytes());
        if board.acpi {
            self.put(ACPI_RSDP, &ACPI_BASE.to_le_bytes());
        }
    }

    /// Where the initrd is.
    pub(super) fn set_ramdisk(&mut self, address: u64, size: u64) {
        self.put32(RAMDISK_IMAGE, address);
        self.put32(EXT_RAMDISK_IMAGE, address >> 32);
        self.put32(RAMDISK_SIZE, size);
        self.put32(EXT_RAMDISK_SIZE, size >> 32);
    }

    /// Where the command line is; in the way of before protocol 2.02 unless `has_pointer`.
    pub(super) fn set_command_line(&mut self, address: u64, has_pointer: bool) {
        const OLD_MAGIC: u16 = 0xa33f;
        if has_pointer {
            self.put32(COMMAND_LINE_POINTER, address);
        } else {
            let offset = address.saturating_sub(low::PARAMETERS) as u16;
            self.put(OLD_COMMAND_LINE_MAGIC, &OLD_MAGIC.to_le_bytes());
            self.put(OLD_COMMAND_LINE_OFFSET, &offset.to_le_bytes());
        }
    }
}
