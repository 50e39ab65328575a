//! The CPU under test: a vCPU in long mode with a small kernel made of tables and HLT instructions.
//!
//! Programs run at privilege level 3. Every exception goes through its gate in the IDT to a HLT at privilege level 0, so
//! that the delivery of exceptions is part of what is tested.

use std::sync::Arc;

use cpu::{Environment, Events, Exit, Features, SharedCpus, Vcpu};
use memory::{GuestMemory, MemoryOptions};
use platform::x86::{DescriptorTable, Segment, VcpuState, cr0, cr4, efer, gpr};

use crate::layout::*;

/// Guest-physical addresses.
mod phys {
    pub(super) const TABLES: u64 = 0x1000;
    pub(super) const GDT: u64 = 0x1_0000;
    pub(super) const IDT: u64 = 0x1_1000;
    pub(super) const TSS: u64 = 0x1_2000;
    pub(super) const STUBS: u64 = 0x1_3000;
    pub(super) const STACK_TOP: u64 = 0x1_5000;
    pub(super) const LDT: u64 = 0x1_6000;
    pub(super) const CODE: u64 = 0x2_0000;
    pub(super) const DATA: u64 = 0x3_0000;
    pub(super) const CONSTANTS: u64 = 0x3_2000;
    pub(super) const STACK: u64 = 0x4_0000;
    pub(super) const SIZE: u64 = 0x10_0000;
}

/// Linear address of guest-physical 0 for the kernel.
const KERNEL: u64 = 0xffff_9234_0000_0000;
const TSS_LIMIT: u32 = 0x67;
const VECTORS: u64 = 256;

/// Nothing is outside.
struct Nothing;

impl Environment for Nothing {
    fn mmio_read(&self, _: u64, _: u8) -> u64 {
        u64::MAX
    }
    fn mmio_write(&self, _: u64, _: u8, _: u64) {}
    fn io_read(&self, _: u16, _: u8, _: u64) -> u32 {
        u32::MAX
    }
    fn io_write(&self, _: u16, _: u8, _: u32, _: u64) {}
    fn interrupt_pending(&self) -> bool {
        false
    }
    fn interrupt_acknowledge(&self) -> Option<u8> {
        None
    }
    fn read_cr8(&self) -> u8 {
        0
    }
    fn write_cr8(&self, _: u8) {}
    fn read_msr(&self, _: u32) -> Option<u64> {
        None
    }
    fn write_msr(&self, _: u32, _: u64) -> bool {
        false
    }
    fn tsc(&self) -> u64 {
        0
    }
}

/// How a run on the vCPU failed to end in an exception.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// It ended otherwise.
    Exit(Option<Exit>),
    /// The kernel was entered at an address that is no exception's.
    Entry(u64),
}

/// What the two sides must agree on about the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    pub(crate) ldt: bool,
    pub(crate) fsgsbase: bool,
    pub(crate) xfeatures: u64,
}

pub(crate) struct Guest {
    vcpu: Vcpu,
    memory: GuestMemory,
    base: VcpuState,
    images: Vec<[u8; MEMORY_LEN]>,
    /// Where the last program's code lies.
    code: (u64, usize),
}

impl Guest {
    pub(crate) fn new(images: &[[u8; MEMORY_LEN]; IMAGES + 1], constants: &[u8; PAGE as usize], host: Host) -> Self {
        let memory = GuestMemory::new(MemoryOptions { size: phys::SIZE, ..MemoryOptions::default() })
            .expect("a megabyte of guest memory");
        let features =
            Features::host(cpu::features::Placement { apic_id: 0, sockets: 1, cores: 1, threads: 1, x2apic: false });
        write(&memory, phys::CONSTANTS, constants);
        write(&memory, phys::CODE, &[FILLER; CODE_LEN]);
        write_page_tables(&memory);
        write_descriptors(&memory);
        let base = base_state(&features, host);
        let vcpu = Vcpu::new(
            memory.clone(),
            Arc::new(Nothing),
            Arc::new(Events::default()),
            Arc::new(SharedCpus::default()),
            Arc::new(features),
        );
        Self { vcpu, memory, base, images: images.to_vec(), code: (0, 0) }
    }

    pub(crate) fn set_own_image(&mut self, image: &[u8; MEMORY_LEN]) {
        self.images[OWN_IMAGE] = *image;
    }

    /// Runs a program to its exception. With `trace`, runs it instruction by instruction and notes where each was.
    pub(crate) fn run(
        &mut self,
        input: &Input,
        trace: Option<&mut Vec<u64>>,
        outcome: &mut Outcome,
    ) -> Result<(), Failure> {
        self.load(input);
        match trace {
            None => {
                let exit = self.vcpu.run();
                if !matches!(exit, Exit::Halt { .. }) {
                    return Err(Failure::Exit(Some(exit)));
                }
            }
            Some(trace) => self.run_traced(trace)?,
        }
        self.save(outcome, input.use_xsave != 0)
    }

    fn run_traced(&mut self, trace: &mut Vec<u64>) -> Result<(), Failure> {
        const LONGEST: u32 = 1_000_000;
        for _ in 0..LONGEST {
            let rip = self.vcpu.state().rip;
            if rip < KERNEL {
                trace.push(rip);
            }
            match self.vcpu.step(1) {
                None => {}
                Some(Exit::Halt { .. }) => return Ok(()),
                exit => return Err(Failure::Exit(exit)),
            }
        }
        Err(Failure::Exit(None))
    }

    fn load(&mut self, input: &Input) {
        let (at, len) = self.code;
        const FILLERS: [u8; MAX_PROGRAM] = [FILLER; MAX_PROGRAM];
        write(&self.memory, at + phys::CODE, &FILLERS[..len]);
        self.code = (u64::from(input.code_at), input.code_len as usize);
        write(&self.memory, phys::CODE + self.code.0, &input.code[..self.code.1]);
        let (data, stack) = self.images[usize::from(input.image)].split_at(DATA_LEN);
        write(&self.memory, phys::DATA, data);
        write(&self.memory, phys::STACK, stack);
        let mut state = self.base.clone();
        state.gpr = input.gpr;
        state.rip = input.rip;
        state.rflags = input.rflags;
        for (segment, selector) in state.segments.iter_mut().zip(input.selectors) {
            *segment = segment_for(selector);
        }
        if input.selectors[4..] == [0, 0] {
            state.segments[4].base = input.fs_base;
            state.segments[5].base = input.gs_base;
        }
        self.vcpu.set_state(&state);
        if input.use_xsave != 0 {
            self.vcpu.set_xsave_area(&input.xsave);
        }
    }

    fn save(&mut self, outcome: &mut Outcome, with_xsave: bool) -> Result<(), Failure> {
        let state = self.vcpu.state();
        let entry = state.rip.wrapping_sub(KERNEL + phys::STUBS + 1);
        if entry & 15 != 0 || entry >= VECTORS * 16 {
            return Err(Failure::Entry(state.rip));
        }
        let vector = entry / 16;
        let has_error = matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30);
        let mut frame = [0; 6];
        for (i, word) in frame.iter_mut().enumerate() {
            *word = self.memory.read_u64(phys::STACK_TOP - 48 + 8 * i as u64).unwrap_or(0);
        }
        let [error, rip, cs, rflags, rsp, ss] = frame;
        outcome.gpr = state.gpr;
        outcome.gpr[gpr::RSP] = rsp;
        outcome.rip = rip;
        outcome.rflags = rflags;
        outcome.vector = vector;
        outcome.error = if has_error { error } else { 0 };
        outcome.cr2 = state.cr2;
        (outcome.fs_base, outcome.gs_base) = (state.segments[4].base, state.segments[5].base);
        outcome.selectors = state.segments.map(|segment| segment.selector);
        outcome.selectors[1] = cs as u16;
        outcome.selectors[2] = ss as u16;
        outcome.has_xsave = u16::from(with_xsave);
        if with_xsave {
            let area = self.vcpu.xsave_area();
            outcome.xsave[..area.len()].copy_from_slice(&area);
        }
        let (data, stack) = outcome.memory.split_at_mut(DATA_LEN);
        read(&self.memory, phys::DATA, data);
        read(&self.memory, phys::STACK, stack);
        Ok(())
    }
}

fn write(memory: &GuestMemory, at: u64, bytes: &[u8]) {
    memory.write(at, bytes).expect("addresses of the test's own guest");
}

fn read(memory: &GuestMemory, at: u64, bytes: &mut [u8]) {
    memory.read(at, bytes).expect("addresses of the test's own guest");
}

fn base_state(features: &Features, host: Host) -> VcpuState {
    let mut state = VcpuState::reset();
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
    let wanted = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::DE | cr4::SMEP | cr4::SMAP;
    state.cr4 = wanted & features.cr4_mask;
    if host.fsgsbase {
        state.cr4 |= cr4::FSGSBASE;
    }
    state.cr3 = phys::TABLES;
    state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    state.xcr0 = (host.xfeatures & features.xcr0_mask) | 1;
    state.gdtr = DescriptorTable { base: KERNEL + phys::GDT, limit: 16 * 8 - 1 };
    state.idtr = DescriptorTable { base: KERNEL + phys::IDT, limit: (VECTORS * 16 - 1) as u16 };
    state.tr = Segment { selector: selector::TSS, base: KERNEL + phys::TSS, limit: TSS_LIMIT, access: 0x8b };
    state.ldtr = if host.ldt {
        Segment { selector: selector::LDT, base: KERNEL + phys::LDT, limit: LDT.len() as u32 * 8 - 1, access: 0x82 }
    } else {
        Segment { selector: 0, base: 0, limit: 0, access: platform::x86::SEGMENT_UNUSABLE }
    };
    state
}

/// A descriptor of the GDT.
fn flat(access: u32) -> Segment {
    Segment { selector: 0, base: 0, limit: u32::MAX, access }
}

/// The segment register that a load of `selector` gives.
fn segment_for(selector: u16) -> Segment {
    let segment = match selector {
        selector::CODE32 => flat(0xc0fb),
        selector::DATA => flat(0xc0f3),
        selector::CODE64 => flat(0xa0fb),
        0 => Segment { access: platform::x86::SEGMENT_UNUSABLE, ..Segment::default() },
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

fn write_descriptors(memory: &GuestMemory) {
    let mut gdt = [0u64; 16];
    gdt[1] = descriptor(flat(0xc09b));
    gdt[2] = descriptor(flat(0xa09b));
    gdt[3] = descriptor(flat(0xc093));
    for selector in [selector::CODE32, selector::DATA, selector::CODE64] {
        gdt[usize::from(selector >> 3)] = descriptor(segment_for(selector));
    }
    // The tables lie low, so these system descriptors' upper halves hold the kernel's base.
    let tss = Segment { selector: 0, base: phys::TSS, limit: TSS_LIMIT, access: 0x8b };
    let ldt = Segment { selector: 0, base: phys::LDT, limit: LDT.len() as u32 * 8 - 1, access: 0x82 };
    (gdt[8], gdt[9]) = (descriptor(tss), KERNEL >> 32);
    (gdt[10], gdt[11]) = (descriptor(ldt), KERNEL >> 32);
    for (i, entry) in gdt.into_iter().enumerate() {
        write(memory, phys::GDT + 8 * i as u64, &entry.to_le_bytes());
    }
    for i in 0..LDT.len() as u64 {
        write(memory, phys::LDT + 8 * i, &descriptor(segment_for((i as u16) << 3 | 7)).to_le_bytes());
    }
    for vector in 0..VECTORS {
        // Programs may raise breakpoint and overflow themselves.
        let dpl = if vector == 3 || vector == 4 { 3 } else { 0 };
        let offset = KERNEL + phys::STUBS + 16 * vector;
        let low = offset & 0xffff
            | u64::from(selector::KERNEL_CODE) << 16
            | (0x8e | dpl << 5) << 40
            | (offset >> 16 & 0xffff) << 48;
        write(memory, phys::IDT + 16 * vector, &low.to_le_bytes());
        write(memory, phys::IDT + 16 * vector + 8, &(offset >> 32).to_le_bytes());
        const HLT: u8 = 0xf4;
        write(memory, phys::STUBS + 16 * vector, &[HLT]);
    }
    write(memory, phys::TSS + 4, &(KERNEL + phys::STACK_TOP).to_le_bytes());
    // No I/O permission bitmap.
    write(memory, phys::TSS + 0x66, &(TSS_LIMIT as u16 + 1).to_le_bytes());
}

fn write_page_tables(memory: &GuestMemory) {
    const P: u64 = 1;
    const RW: u64 = 2;
    const US: u64 = 4;
    const ACCESSED_DIRTY: u64 = 0x60;
    const NX: u64 = 1 << 63;
    let mut next_table = phys::TABLES + PAGE;
    let mut map = |linear: u64, target: u64, rights: u64| {
        let mut table = phys::TABLES;
        for level in (1..4).rev() {
            let at = table + (linear >> (12 + 9 * level) & 511) * 8;
            let mut entry = memory.read_u64(at).unwrap_or(0);
            if entry == 0 {
                entry = next_table | P | RW | US;
                next_table += PAGE;
                write(memory, at, &entry.to_le_bytes());
            }
            table = entry & !0xfff;
        }
        let entry = target | rights | P | ACCESSED_DIRTY;
        write(memory, table + (linear >> 12 & 511) * 8, &entry.to_le_bytes());
    };
    for page in 0..phys::SIZE / PAGE {
        map(KERNEL + page * PAGE, page * PAGE, RW);
    }
    for page in 0..2 {
        map(CODE + page * PAGE, phys::CODE + page * PAGE, US);
        map(DATA + page * PAGE, phys::DATA + page * PAGE, US | RW | NX);
    }
    map(CONSTANTS, phys::CONSTANTS, US | NX);
    map(STACK, phys::STACK, US | RW | NX);
    assert!(next_table <= phys::GDT, "page tables fit below the descriptor tables");
}
