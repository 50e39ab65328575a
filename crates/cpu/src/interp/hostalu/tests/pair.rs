//! A vCPU and the host's CPU side by side.

use std::ops::Range;

use iced_x86::{EncodingKind, Instruction};

use super::fixture::Bench;
use super::native::{Machine, Runner, as_bytes};
use super::random::Random;
use crate::Trap;

/// Guest address of the middle of the memory that is compared.
pub(super) const GUEST_DATA: u64 = 0x20_0000;
/// Bytes on either side of it.
pub(super) const REACH: usize = 8192;

/// Both, with the same registers and memory. RSI and RDI point to the middle of the memory.
pub(super) struct Pair {
    pub(super) random: Random,
    pub(super) bench: Bench,
    machine: Box<Machine>,
    runner: Runner,
    storage: Vec<u64>,
}

impl Pair {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            random: Random(seed),
            bench: Bench::new(),
            machine: Machine::new(),
            runner: Runner::new(),
            storage: vec![0; 2 * REACH / 8 + 8],
        }
    }

    /// The host's memory, in whole 64-byte lines.
    fn memory(&mut self) -> &mut [u8] {
        let skew = self.storage.as_ptr().align_offset(64);
        as_bytes(&mut self.storage[skew..], 2 * REACH)
    }

    /// Fills registers and memory of both for `instruction`.
    pub(super) fn prepare(&mut self, instruction: &Instruction) {
        let mut image = vec![0; 2 * REACH];
        for chunk in image.chunks_mut(64) {
            self.random.numbers(chunk);
        }
        self.set_memory(&image);
        self.fill_vectors(instruction);
        self.fill_x87();
        let mxcsr = 0x1f80 | self.random.next() as u32 & 0xe07f;
        let area = &mut self.machine.xsave;
        area[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        area[512..520].copy_from_slice(&self.bench.vcpu.xcr0.to_le_bytes());
        self.take_state();

        for gpr in &mut self.machine.gpr {
            *gpr = if self.random.below(2) == 0 { self.random.next() } else { self.random.below(40) };
        }
        self.machine.rflags = 2 | self.random.next() & 0x8d5;
        self.bench.vcpu.regs[..16].copy_from_slice(&self.machine.gpr);
        let middle = self.memory().as_ptr().wrapping_add(REACH) as u64;
        (self.machine.gpr[6], self.machine.gpr[7]) = (middle, middle);
        (self.bench.vcpu.regs[6], self.bench.vcpu.regs[7]) = (GUEST_DATA, GUEST_DATA);
        self.bench.vcpu.flags.set_value(self.machine.rflags);
    }

    /// Gives the vCPU the vector and x87 state that the host will have.
    pub(super) fn take_state(&mut self) {
        let length = self.bench.vcpu.xsave_area().len();
        self.bench.vcpu.set_xsave_area(&self.machine.xsave[..length]);
    }

    /// The saved state that the host starts with.
    pub(super) fn area(&mut self) -> &mut [u8] {
        &mut self.machine.xsave
    }

    /// Sets a general-purpose register of both.
    pub(super) fn set_gpr(&mut self, n: usize, value: u64) {
        (self.machine.gpr[n], self.bench.vcpu.regs[n]) = (value, value);
    }

    /// Writes to the memory of both, relative to its middle.
    pub(super) fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.memory()[REACH + offset..][..bytes.len()].copy_from_slice(bytes);
        self.bench.memory.write(GUEST_DATA + offset as u64, bytes).expect("guest memory");
    }

    fn set_memory(&mut self, image: &[u8]) {
        self.memory().copy_from_slice(image);
        self.bench.memory.write(GUEST_DATA - REACH as u64, image).expect("guest memory");
    }

    /// Copies the host's memory to the guest.
    pub(super) fn share_memory(&mut self) {
        let image = self.memory().to_vec();
        self.set_memory(&image);
    }

    /// Copies the guest's memory to the host.
    pub(super) fn share_our_memory(&mut self) {
        let mut image = vec![0; 2 * REACH];
        self.bench.memory.read(GUEST_DATA - REACH as u64, &mut image).expect("guest memory");
        self.set_memory(&image);
    }

    fn fill_vectors(&mut self, instruction: &Instruction) {
        let length = self.bench.vcpu.xsave_area().len();
        let (random, area) = (&mut self.random, &mut self.machine.xsave);
        area.fill(0);
        for at in (576..length).step_by(32) {
            random.numbers(&mut area[at..(at + 32).min(length)]);
        }
        for at in (160..416).step_by(16) {
            random.numbers(&mut area[at..at + 16]);
        }
        if instruction.is_vsib() {
            // Small indices: the elements stay inside the buffer.
            let width = if instruction.is_vsib64() { 8 } else { 4 };
            for at in (160..416).chain(576..length) {
                area[at] = if at % width == 0 { random.byte() & 0x7f } else { 0 };
            }
            select_elements(random, area, instruction);
        }
    }

    fn fill_x87(&mut self) {
        const EXPONENTS: [u16; 11] = [0, 1, 0x3fff, 0x3ffe, 0x4000, 0x403e, 0x7ffe, 0x7fff, 0xbfff, 0xffff, 0x3f80];
        let (random, area) = (&mut self.random, &mut self.machine.xsave);
        for st in 0..8 {
            let at = 32 + 16 * st;
            let exponent = random.pick(&EXPONENTS);
            let mantissa = random.next() | random.pick(&[0, 1 << 63]);
            let mantissa = random.pick(&[mantissa, 1 << 63, 0xc000 << 48, 0]);
            area[at..at + 8].copy_from_slice(&mantissa.to_le_bytes());
            area[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
        }
        // All masked; rounding and precision vary.
        let fcw = 0x7f | (random.below(16) as u16) << 8;
        area[..2].copy_from_slice(&fcw.to_le_bytes());
        let fsw = random.next() as u16 & 0x7f7f;
        area[2..4].copy_from_slice(&fsw.to_le_bytes());
        area[4] = random.byte() | random.pick(&[0, 0xff]);
    }

    /// Runs `instruction` on both; says how they differ.
    pub(super) fn run(&mut self, instruction: &[u8]) -> Result<(), String> {
        self.run_ours(instruction).map_err(|trap| format!("{trap:?}"))?;
        self.run_host(instruction);
        self.compare(&[])
    }

    pub(super) fn run_ours(&mut self, instruction: &[u8]) -> Result<(), Trap> {
        self.bench.run(instruction)
    }

    pub(super) fn run_host(&mut self, instruction: &[u8]) {
        self.runner.run(instruction, &mut self.machine);
    }

    /// Compares all state, and memory except `ignored` (relative to its middle).
    pub(super) fn compare(&mut self, ignored: &[Range<usize>]) -> Result<(), String> {
        let ours = self.bench.vcpu.xsave_area();
        let host = &self.machine.xsave;
        // x87 pointers are addresses; reserved parts and the header may hold anything.
        let mut compared = (0..6).chain(24..28).chain(160..416).chain(576..ours.len());
        if let Some(at) = compared.find(|&at| ours[at] != host[at]) {
            let line = at & !15..(at & !15) + 16;
            return Err(format!("state byte {at}: ours {:02x?} host {:02x?}", &ours[line.clone()], &host[line]));
        }
        for st in 0..8 {
            let bytes = 32 + 16 * st..42 + 16 * st;
            if ours[bytes.clone()] != host[bytes.clone()] {
                return Err(format!("ST{st}: ours {:02x?} host {:02x?}", &ours[bytes.clone()], &host[bytes]));
            }
        }
        let vcpu = &self.bench.vcpu;
        for r in (0..16).filter(|r| !matches!(r, 4 | 6 | 7)) {
            if vcpu.regs[r] != self.machine.gpr[r] {
                return Err(format!("GPR {r}: ours {:#x} host {:#x}", vcpu.regs[r], self.machine.gpr[r]));
            }
        }
        if (vcpu.rflags() ^ self.machine.rflags) & platform::x86::rflags::ARITHMETIC != 0 {
            return Err(format!("flags: ours {:#x} host {:#x}", vcpu.rflags(), self.machine.rflags));
        }
        let mut guest = vec![0; 2 * REACH];
        self.bench.memory.read(GUEST_DATA - REACH as u64, &mut guest).expect("guest memory");
        let host = self.memory();
        let differs =
            |&i: &usize| guest[i] != host[i] && !ignored.iter().any(|range| range.contains(&(i.wrapping_sub(REACH))));
        match (0..guest.len()).find(differs) {
            Some(i) => {
                Err(format!("memory at {:+}: ours {:#x} host {:#x}", i as i64 - REACH as i64, guest[i], host[i]))
            }
            None => Ok(()),
        }
    }
}

/// Makes about half the elements of a VEX gather's mask selected, in the saved area.
fn select_elements(random: &mut Random, area: &mut [u8], instruction: &Instruction) {
    if instruction.encoding() != EncodingKind::VEX || instruction.op_count() < 3 {
        return;
    }
    let mask = instruction.op2_register().number();
    if mask == instruction.memory_index().number() {
        return;
    }
    // XMM, and the upper half in the AVX component.
    for base in [160, 576] {
        for byte in (3..16).step_by(4) {
            area[base + 16 * mask + byte] = if random.below(2) == 0 { 0x80 } else { 0 };
        }
    }
}
