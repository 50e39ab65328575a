//! The CPU under test: a vCPU with a small kernel made of tables and HLT instructions, in long mode or in protected mode.
//!
//! Programs run at privilege level 3. Every exception goes through its gate in the IDT to a HLT at privilege level 0, so
//! that the delivery of exceptions is part of what is tested.

use std::sync::Arc;

use cpu::{Environment, Events, Exit, Features, SharedCpus, TranslatorOptions, Vcpu};
use memory::{GuestMemory, MemoryOptions};
use platform::x86::{VcpuState, gpr};

use crate::kernel::{Host, phys, read, segment_for, write};
use crate::layout::*;

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

pub(crate) struct Guest {
    vcpu: Vcpu,
    memory: GuestMemory,
    kernel: Kernel,
    /// Where programs start from.
    base: VcpuState,
    images: Vec<[u8; MEMORY_LEN]>,
    /// Programs that run as translated code; how many there were.
    translated: Option<u32>,
    /// Blocks that translators made that are no more.
    blocks: u64,
}

impl Guest {
    pub(crate) fn new(
        kernel: Kernel,
        images: &[[u8; MEMORY_LEN]; IMAGES + 1],
        constants: &[u8; PAGE as usize],
        host: Host,
    ) -> Self {
        let memory = GuestMemory::new(MemoryOptions { size: phys::SIZE, ..MemoryOptions::default() })
            .expect("a megabyte of guest memory");
        let features =
            Features::host(cpu::features::Placement { apic_id: 0, sockets: 1, cores: 1, threads: 1, x2apic: false });
        write(&memory, phys::CONSTANTS, constants);
        write(&memory, phys::CODE, &[FILLER; CODE_LEN]);
        kernel.install(&memory);
        let base = kernel.state(&features, host);
        let vcpu = Vcpu::new(
            memory.clone(),
            Arc::new(Nothing),
            Arc::new(Events::default()),
            Arc::new(SharedCpus::default()),
            Arc::new(features),
        );
        Self { vcpu, memory, kernel, base, images: images.to_vec(), translated: None, blocks: 0 }
    }

    /// The same with translated code, from the first time on that something runs.
    pub(crate) fn translating(mut self) -> Self {
        self.translated = Some(0);
        self
    }

    /// Blocks that were translated.
    pub(crate) fn translated_blocks(&self) -> u64 {
        self.blocks + self.vcpu.translator_counters().map_or(0, |counters| counters.blocks)
    }

    /// A page that is written too often is not translated any more, so that a translator serves for some programs only.
    fn renew_translator(&mut self) {
        const PROGRAMS: u32 = 64;
        let Some(count) = self.translated.as_mut() else { return };
        if *count % PROGRAMS == 0 {
            self.blocks += self.vcpu.translator_counters().map_or(0, |counters| counters.blocks);
            let options = TranslatorOptions { cache_bytes: 1 << 20, threshold: 1, check: 0 };
            self.vcpu.set_translator(Some(options)).expect("this host runs translated code");
        }
        *count += 1;
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
        self.renew_translator();
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
            if !self.kernel.owns(rip) {
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
        // All of it: the last program may have written beyond its own code.
        write(&self.memory, phys::CODE, &[FILLER; CODE_LEN]);
        write(&self.memory, phys::CODE + u64::from(input.code_at), &input.code[..input.code_len as usize]);
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
        let vector = self.kernel.vector_at(state.rip).ok_or(Failure::Entry(state.rip))?;
        let has_error = matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30);
        let [error, rip, cs, rflags, rsp, ss] = self.kernel.frame(&self.memory);
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
