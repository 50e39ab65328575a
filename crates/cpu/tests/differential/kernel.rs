//! The guest's kernel: page tables, descriptor tables, and a HLT behind every gate.

use cpu::Features;
use memory::GuestMemory;
use platform::x86::{DescriptorTable, SEGMENT_UNUSABLE, Segment, VcpuState, cr0, cr4, efer};

use crate::layout::*;

/// Guest-physical addresses.
pub(crate) mod phys {
    pub(super) const TABLES: u64 = 0x1000;
    pub(super) const GDT: u64 = 0x1_0000;
    pub(super) const IDT: u64 = 0x1_1000;
    pub(super) const TSS: u64 = 0x1_2000;
    pub(super) const STUBS: u64 = 0x1_3000;
    pub(crate) const STACK_TOP: u64 = 0x1_5000;
    pub(super) const LDT: u64 = 0x1_6000;
    pub(crate) const CODE: u64 = 0x2_0000;
    pub(crate) const DATA: u64 = 0x3_0000;
    pub(crate) const CONSTANTS: u64 = 0x3_2000;
    pub(crate) const STACK: u64 = 0x4_0000;
    pub(crate) const SIZE: u64 = 0x10_0000;
}

const TSS_LIMIT: u32 = 0x67;
const VECTORS: u64 = 256;
const HLT: u8 = 0xf4;

/// What the two sides must agree on about the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    pub(crate) ldt: bool,
    pub(crate) fsgsbase: bool,
    pub(crate) xfeatures: u64,
}

impl Kernel {
    /// Linear address of guest-physical 0.
    fn base(self) -> u64 {
        match self {
            Kernel::Long => 0xffff_9234_0000_0000,
            Kernel::Protected => KERNEL_32,
        }
    }

    /// Whether a linear address is the kernel's.
    pub(crate) fn owns(self, linear: u64) -> bool {
        linear.wrapping_sub(self.base()) < phys::SIZE
    }

    /// The vector whose HLT ended at an instruction pointer.
    pub(crate) fn vector_at(self, rip: u64) -> Option<u64> {
        let entry = rip.wrapping_sub(self.base() + phys::STUBS + 1);
        (entry & 15 == 0 && entry < VECTORS * 16).then_some(entry / 16)
    }

    /// The exception frame on the kernel's stack: error code, RIP, CS, RFLAGS, RSP, SS.
    pub(crate) fn frame(self, memory: &GuestMemory) -> [u64; 6] {
        std::array::from_fn(|i| {
            let below = 6 - i as u64;
            let word = match self {
                Kernel::Long => memory.read_u64(phys::STACK_TOP - 8 * below),
                Kernel::Protected => memory.read_u32(phys::STACK_TOP - 4 * below).map(u64::from),
            };
            word.unwrap_or(0)
        })
    }

    /// Puts the kernel into memory.
    pub(crate) fn install(self, memory: &GuestMemory) {
        self.write_page_tables(memory);
        self.write_segments(memory);
        self.write_gates(memory);
    }

    /// The state of a vCPU that is about to enter a program: everything but what the program's input says.
    pub(crate) fn state(self, features: &Features, host: Host) -> VcpuState {
        let mut state = VcpuState::reset();
        state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        let wanted =
            cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::DE | cr4::SMEP | cr4::SMAP;
        state.cr4 = wanted & features.cr4_mask;
        if host.fsgsbase {
            state.cr4 |= cr4::FSGSBASE;
        }
        state.cr3 = phys::TABLES;
        state.efer = match self {
            Kernel::Long => efer::SCE | efer::LME | efer::LMA | efer::NXE,
            Kernel::Protected => efer::NXE,
        };
        state.xcr0 = (host.xfeatures & features.xcr0_mask) | 1;
        state.gdtr = DescriptorTable { base: self.base() + phys::GDT, limit: 16 * 8 - 1 };
        state.idtr = DescriptorTable { base: self.base() + phys::IDT, limit: (VECTORS * self.gate_size() - 1) as u16 };
        state.tr = Segment { selector: selector::TSS, ..self.system_segment(phys::TSS, TSS_LIMIT, 0x8b) };
        state.ldtr =
            Segment { selector: selector::LDT, ..self.system_segment(phys::LDT, LDT.len() as u32 * 8 - 1, 0x82) };
        if !host.ldt {
            state.ldtr = Segment { access: SEGMENT_UNUSABLE, ..Segment::default() };
        }
        state
    }

    fn gate_size(self) -> u64 {
        if self == Kernel::Long { 16 } else { 8 }
    }

    fn system_segment(self, at: u64, limit: u32, access: u32) -> Segment {
        Segment { selector: 0, base: self.base() + at, limit, access }
    }

    fn write_segments(self, memory: &GuestMemory) {
        let mut gdt = [0u64; 16];
        gdt[1] = descriptor(flat(0xc09b));
        gdt[2] = descriptor(flat(if self == Kernel::Long { 0xa09b } else { 0xc09b }));
        gdt[3] = descriptor(flat(0xc093));
        for selector in [selector::CODE32, selector::DATA, selector::CODE64] {
            gdt[usize::from(selector >> 3)] = descriptor(segment_for(selector));
        }
        let tss = self.system_segment(phys::TSS, TSS_LIMIT, 0x8b);
        let ldt = self.system_segment(phys::LDT, LDT.len() as u32 * 8 - 1, 0x82);
        // The upper halves of system descriptors; nothing in protected mode.
        (gdt[8], gdt[9]) = (descriptor(tss), tss.base >> 32);
        (gdt[10], gdt[11]) = (descriptor(ldt), ldt.base >> 32);
        for (i, entry) in gdt.into_iter().enumerate() {
            write(memory, phys::GDT + 8 * i as u64, &entry.to_le_bytes());
        }
        for i in 0..LDT.len() as u64 {
            write(memory, phys::LDT + 8 * i, &descriptor(segment_for((i as u16) << 3 | 7)).to_le_bytes());
        }
        let stack = self.base() + phys::STACK_TOP;
        match self {
            Kernel::Long => write(memory, phys::TSS + 4, &stack.to_le_bytes()),
            Kernel::Protected => {
                write(memory, phys::TSS + 4, &(stack as u32).to_le_bytes());
                write(memory, phys::TSS + 8, &selector::KERNEL_DATA.to_le_bytes());
            }
        }
        // No I/O permission bitmap.
        write(memory, phys::TSS + 0x66, &(TSS_LIMIT as u16 + 1).to_le_bytes());
    }

    fn write_gates(self, memory: &GuestMemory) {
        for vector in 0..VECTORS {
            // Programs may raise breakpoint and overflow themselves.
            let dpl = if vector == 3 || vector == 4 { 3 } else { 0 };
            let offset = self.base() + phys::STUBS + 16 * vector;
            let low = offset & 0xffff
                | u64::from(selector::KERNEL_CODE) << 16
                | (0x8e | dpl << 5) << 40
                | (offset >> 16 & 0xffff) << 48;
            let at = phys::IDT + self.gate_size() * vector;
            write(memory, at, &low.to_le_bytes());
            if self == Kernel::Long {
                write(memory, at + 8, &(offset >> 32).to_le_bytes());
            }
            write(memory, phys::STUBS + 16 * vector, &[HLT]);
        }
    }

    fn write_page_tables(self, memory: &GuestMemory) {
        const RW: u64 = 2;
        const US: u64 = 4;
        const NX: u64 = 1 << 63;
        let mut tables = Tables { memory, levels: if self == Kernel::Long { 4 } else { 3 }, next: phys::TABLES + PAGE };
        for page in 0..phys::SIZE / PAGE {
            tables.map(self.base() + page * PAGE, page * PAGE, RW);
        }
        for page in 0..2 {
            tables.map(CODE + page * PAGE, phys::CODE + page * PAGE, US);
            tables.map(WRITABLE_CODE + page * PAGE, phys::CODE + page * PAGE, US | RW);
            tables.map(DATA + page * PAGE, phys::DATA + page * PAGE, US | RW | NX);
        }
        tables.map(CONSTANTS, phys::CONSTANTS, US | NX);
        tables.map(STACK, phys::STACK, US | RW | NX);
        assert!(tables.next <= phys::GDT, "page tables fit below the descriptor tables");
    }
}

/// Page tables in the making.
struct Tables<'a> {
    memory: &'a GuestMemory,
    levels: u32,
    /// Where the next table goes.
    next: u64,
}

impl Tables<'_> {
    fn map(&mut self, linear: u64, target: u64, rights: u64) {
        const P: u64 = 1;
        const RW_US: u64 = 6;
        const ACCESSED_DIRTY: u64 = 0x60;
        let mut table = phys::TABLES;
        for level in (1..self.levels).rev() {
            let at = table + (linear >> (12 + 9 * level) & 511) * 8;
            let mut entry = self.memory.read_u64(at).unwrap_or(0);
            if entry == 0 {
                // The four top-level entries of PAE paging have no rights.
                let rights = if self.levels == 3 && level == 2 { 0 } else { RW_US };
                entry = self.next | P | rights;
                self.next += PAGE;
                write(self.memory, at, &entry.to_le_bytes());
            }
            table = entry & !0xfff;
        }
        let entry = target | rights | P | ACCESSED_DIRTY;
        write(self.memory, table + (linear >> 12 & 511) * 8, &entry.to_le_bytes());
    }
}

pub(crate) fn write(memory: &GuestMemory, at: u64, bytes: &[u8]) {
    memory.write(at, bytes).expect("addresses of the test's own guest");
}

pub(crate) fn read(memory: &GuestMemory, at: u64, bytes: &mut [u8]) {
    memory.read(at, bytes).expect("addresses of the test's own guest");
}

/// A descriptor of the GDT.
fn flat(access: u32) -> Segment {
    Segment { selector: 0, base: 0, limit: u32::MAX, access }
}

/// The segment register that a load of `selector` gives.
pub(crate) fn segment_for(selector: u16) -> Segment {
    let segment = match selector {
        selector::CODE32 => flat(0xc0fb),
        selector::DATA => flat(0xc0f3),
        selector::CODE64 => flat(0xa0fb),
        0 => Segment { access: SEGMENT_UNUSABLE, ..Segment::default() },
        _ => {
            let entry = LDT[usize::from(selector >> 3)];
            Segment {
                selector: 0,
                base: u64::from(entry.base),
                limit: entry.limit,
                access: u32::from(entry.kind)
                    | 0x70
                    | u32::from(entry.present) << 7
                    | 1 << 12
                    | u32::from(entry.big) << 14,
            }
        }
    };
    Segment { selector, ..segment }
}

fn descriptor(segment: Segment) -> u64 {
    let granular = segment.access & 0x8000 != 0;
    let limit = u64::from(if granular { segment.limit >> 12 } else { segment.limit });
    let base = segment.base;
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(segment.access & 0xff) << 40
        | (limit >> 16 & 15) << 48
        | u64::from(segment.access >> 12 & 15) << 52
        | (base >> 24 & 0xff) << 56
}
