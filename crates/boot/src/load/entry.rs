//! The states in which kernels are entered: 32-bit flat protected mode, and 64-bit mode with an identity map.

use platform::x86::{DescriptorTable, SEGMENT_UNUSABLE, Segment, VcpuState, cr0, cr4, efer, rflags, seg};

use super::error::BootError;
use super::space::{Space, low};

/// Selectors, as the Linux boot protocol names them (`__BOOT_CS`, `__BOOT_DS`).
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Access rights in VMX's form: present, ring 0, page granularity; code can be read, data written.
const CODE32: u32 = 0xc09b;
const CODE64: u32 = 0xa09b;
const DATA: u32 = 0xc093;
/// A busy 32-bit or 64-bit TSS.
const TASK: u32 = 0x008b;
const TASK_LIMIT: u32 = 0x67;
/// A present local descriptor table, which is in no use.
const NO_LDT: u32 = SEGMENT_UNUSABLE | 0x82;

/// The identity map covers this much.
const MAPPED: u64 = 4 << 30;
const LARGE_PAGE: u64 = 2 << 20;
const PAGE_TABLE: u64 = 0x1000;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// The 8 bytes of a segment descriptor with base 0 (SDM 3.4.5).
fn descriptor(limit: u32, access: u32) -> u64 {
    let (limit, access) = (u64::from(limit), u64::from(access));
    limit & 0xffff | (access & 0xff) << 40 | (limit >> 16 & 0xf) << 48 | (access >> 12 & 0xf) << 52
}

/// Writes a descriptor table with the segments of [`state`].
fn write_descriptors(space: &Space<'_>, code: u32) -> Result<DescriptorTable, BootError> {
    const FOUR_GIB_IN_PAGES: u32 = 0xf_ffff;
    // In 64-bit mode the descriptor of a TSS has two entries; its upper half is the upper half of the base, 0.
    let entries = [
        0,
        0,
        descriptor(FOUR_GIB_IN_PAGES, code),
        descriptor(FOUR_GIB_IN_PAGES, DATA),
        descriptor(TASK_LIMIT, TASK),
        0,
    ];
    let bytes = entries.map(u64::to_le_bytes).concat();
    space.write(low::GDT, &bytes, "segment descriptors")?;
    Ok(DescriptorTable { base: low::GDT, limit: bytes.len() as u16 - 1 })
}

fn state(entry: u64, code: u32, gdtr: DescriptorTable) -> VcpuState {
    let segment = |selector, access| Segment { selector, base: 0, limit: u32::MAX, access };
    let mut segments = [segment(DATA_SELECTOR, DATA); 6];
    segments[seg::CS] = segment(CODE_SELECTOR, code);
    VcpuState {
        gpr: [0; 16],
        rip: entry,
        rflags: rflags::FIXED,
        segments,
        ldtr: Segment { selector: 0, base: 0, limit: 0, access: NO_LDT },
        tr: Segment { selector: TASK_SELECTOR, base: 0, limit: TASK_LIMIT, access: TASK },
        gdtr,
        idtr: DescriptorTable::default(),
        cr0: cr0::PE | cr0::ET,
        ..VcpuState::reset()
    }
}

/// Flat 32-bit protected mode without paging, interrupts off, all general-purpose registers 0.
pub(super) fn protected_mode(space: &Space<'_>, entry: u32) -> Result<VcpuState, BootError> {
    let gdtr = write_descriptors(space, CODE32)?;
    Ok(state(entry.into(), CODE32, gdtr))
}

/// 64-bit mode with the first 4 GiB mapped to themselves, interrupts off, all general-purpose registers 0.
pub(super) fn long_mode(space: &Space<'_>, entry: u64) -> Result<VcpuState, BootError> {
    let gdtr = write_descriptors(space, CODE64)?;
    write_page_tables(space)?;
    Ok(VcpuState {
        cr0: cr0::PE | cr0::ET | cr0::PG,
        cr3: low::PAGE_TABLES,
        cr4: cr4::PAE,
        efer: efer::LME | efer::LMA,
        ..state(entry, CODE64, gdtr)
    })
}

/// One PML4, one page-directory-pointer table, and a page directory of 2 MiB pages for each of four GiB.
fn write_page_tables(space: &Space<'_>) -> Result<(), BootError> {
    let directory_pointers = low::PAGE_TABLES + PAGE_TABLE;
    let directories = directory_pointers + PAGE_TABLE;
    let gibs = MAPPED >> 30;
    let mut tables = vec![0; (PAGE_TABLE / 8 * (2 + gibs)) as usize];
    let entries = [directory_pointers].into_iter().chain((0..gibs).map(|gib| directories + gib * PAGE_TABLE));
    let slots = [0].into_iter().chain(PAGE_TABLE / 8..);
    for (slot, address) in slots.zip(entries) {
        tables[slot as usize] = address | PRESENT_WRITABLE;
    }
    let pages = &mut tables[(2 * PAGE_TABLE / 8) as usize..];
    for (page, address) in pages.iter_mut().zip((0..).map(|index| index * LARGE_PAGE)) {
        *page = address | PRESENT_WRITABLE | LARGE;
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    space.write(low::PAGE_TABLES, &bytes, "page tables")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{board, memory_of};
    use memory::GuestMemory;

    /// Walks 4-level page tables as a CPU does.
    fn translate(memory: &GuestMemory, cr3: u64, linear: u64) -> Option<u64> {
        let mut table = cr3;
        for shift in [39, 30, 21, 12] {
            let entry = memory.read_u64(table + (linear >> shift & 0x1ff) * 8).unwrap();
            if entry & 1 == 0 {
                return None;
            }
            table = entry & 0x000f_ffff_ffff_f000;
            if shift == 21 && entry & LARGE != 0 {
                return Some(table | linear & (LARGE_PAGE - 1));
            }
        }
        Some(table | linear & 0xfff)
    }

    #[test]
    fn long_mode_maps_four_gigabytes_to_themselves() {
        let memory = memory_of(&board());
        let state = long_mode(&Space::new(&memory), 0x100_0200).unwrap();
        assert_eq!((state.rip, state.rflags), (0x100_0200, 2));
        assert_eq!((state.cr0, state.cr4, state.efer), (0x8000_0011, 0x20, 0x500));
        for linear in [0, 0x1234, 0x1f_ffff, 0x20_0000, 0x3fff_ffff, 0x4000_0000, 0xe012_3456, 0xffff_ffff] {
            assert_eq!(translate(&memory, state.cr3, linear), Some(linear), "{linear:#x}");
        }
        for linear in [1 << 32, 1 << 38, 1 << 39, 0x7fff_ffff_f000] {
            assert_eq!(translate(&memory, state.cr3, linear), None, "{linear:#x}");
        }
        assert!((low::PAGE_TABLES..low::PARAMETERS).contains(&(low::PAGE_TABLES + 6 * PAGE_TABLE - 1)));
    }

    #[test]
    fn segment_registers_agree_with_their_descriptors() {
        let memory = memory_of(&board());
        let space = Space::new(&memory);
        let states = [protected_mode(&space, 0x10_0000).unwrap(), long_mode(&space, 0x10_0000).unwrap()];
        assert_eq!((states[0].cr0, states[0].cr4, states[0].efer), (0x11, 0, 0));
        assert_eq!(states[0].segments[seg::CS].access, 0xc09b);
        // The table in memory is that of the second state.
        for state in [&states[1]] {
            for segment in state.segments.iter().chain([&state.tr]) {
                let entry = memory.read_u64(state.gdtr.base + u64::from(segment.selector)).unwrap();
                let access = entry >> 40 & 0xff | (entry >> 52 & 0xf) << 12;
                assert_eq!(access, segment.access.into(), "{:#x}", segment.selector);
                let limit = entry & 0xffff | (entry >> 48 & 0xf) << 16;
                let scaled = if access & 0x8000 != 0 { limit << 12 | 0xfff } else { limit };
                assert_eq!(scaled, segment.limit.into(), "{:#x}", segment.selector);
                assert!(segment.selector + 7 <= state.gdtr.limit);
            }
        }
    }
}
