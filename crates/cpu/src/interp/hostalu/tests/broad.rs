//! Every data instruction that the host has, with random operands.

use std::collections::HashMap;

use iced_x86::{Code, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::fixture::Bench;
use super::native::{Machine, Runner};

/// The guest's copy of the memory operand.
const GUEST_DATA: u64 = 0x20_0000;
/// Bytes on either side of the operand's base that are compared.
const REACH: usize = 8192;

/// Xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
    fn byte(&mut self) -> u8 {
        (self.next() >> 24) as u8
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Bytes that make interesting numbers of any type.
    fn numbers(&mut self, bytes: &mut [u8]) {
        const F64: [u64; 12] = [
            0,
            1 << 63,
            0x3ff0_0000_0000_0000,
            0xbff8_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            1,
            0x000f_ffff_ffff_ffff,
            0x7fef_ffff_ffff_ffff,
            0x41df_ffff_ffe0_0000,
        ];
        const F32: [u32; 10] =
            [0, 1 << 31, 0x3f80_0000, 0xc040_0000, 0x7f80_0000, 0x7fc0_0000, 0x7f80_0001, 1, 0x7f7f_ffff, 0x4f00_0000];
        let kind = self.below(5);
        for chunk in bytes.chunks_mut(8) {
            let value = match kind {
                0 => self.next(),
                1 => self.pick(&F64),
                2 => u64::from(self.pick(&F32)) | u64::from(self.pick(&F32)) << 32,
                3 => f64::from_bits(self.next() & 0x800f_ffff_ffff_ffff | (1000 + self.below(50)) << 52).to_bits(),
                _ => {
                    let mut float =
                        || u64::from(self.next() as u32 & 0x807f_ffff | (110 + self.below(40) as u32) << 23);
                    float() | float() << 32
                }
            };
            let length = chunk.len();
            chunk.copy_from_slice(&value.to_le_bytes()[..length]);
        }
    }
}

/// Random encodings. Memory operands are `[RSI + disp8]`, or `[RSI + index]` for gathers.
fn encoding(random: &mut Random, kind: EncodingKind) -> Vec<u8> {
    let mut bytes = Vec::new();
    let opcode = random.byte();
    // EVEX maps 4-7 are not assigned to anything that hosts have.
    match kind {
        EncodingKind::Legacy => {
            if random.below(8) == 0 {
                return x87_encoding(random);
            }
            if let Some(prefix) = random.pick(&[None, Some(0x66), Some(0xf2), Some(0xf3)]) {
                bytes.push(prefix);
            }
            if random.below(2) == 0 {
                bytes.push(0x40 | random.byte() & 0xc);
            }
            bytes.push(0x0f);
            if let Some(map) = random.pick(&[None, Some(0x38), Some(0x3a)]) {
                bytes.push(map);
            }
        }
        EncodingKind::VEX => {
            bytes.extend([0xc4, 0x60 | random.byte() & 0x80 | (1 + random.below(3)) as u8]);
            let vvvv = if random.below(2) == 0 { 0x78 } else { random.byte() & 0x78 };
            bytes.push(vvvv | random.byte() & 0x87);
        }
        _ => {
            let vvvv = if random.below(2) == 0 { 0x78 } else { random.byte() & 0x78 };
            bytes.extend([0x62, random.byte() & 0x90 | 0x60 | (1 + random.below(3)) as u8]);
            bytes.push(vvvv | 4 | random.byte() & 0x83);
            bytes.push(random.byte() & 0xf7 | 8);
        }
    }
    bytes.push(opcode);
    operand(random, &mut bytes);
    bytes.push(random.byte());
    bytes
}

fn x87_encoding(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0xd8 | random.byte() & 7];
    operand(random, &mut bytes);
    bytes
}

/// ModRM and what follows it.
fn operand(random: &mut Random, bytes: &mut Vec<u8>) {
    let reg = random.byte() & 0x38;
    match random.below(3) {
        0 => bytes.push(0xc0 | random.byte() & 0x3f),
        1 => bytes.extend([0x46 | reg, random.pick(&[0, 64])]),
        // A SIB byte, as gathers need it: base RSI.
        _ => bytes.extend([0x44 | reg, random.byte() & 0xf8 | 6, 0]),
    }
}

/// Whether an instruction takes part: pure data on vector, opmask, MMX or x87 registers.
fn takes_part(bench: &mut Bench, instruction: &Instruction) -> bool {
    use Mnemonic as N;
    let registers = || (0..instruction.op_count()).map(|i| instruction.op_register(i));
    let x87 = instruction.cpuid_features().iter().any(|f| format!("{f:?}").starts_with("FPU"));
    let data = registers().any(|r| r.is_vector_register() || r.is_mm() || r.is_k()) || x87;
    let control = matches!(
        instruction.mnemonic(),
        N::Fldcw
            | N::Fldenv
            | N::Frstor
            | N::Fnstenv
            | N::Fnsave
            | N::Fnclex
            | N::Fninit
            | N::Fneni
            | N::Fndisi
            | N::Fnsetpm
    );
    // Only the registers that the frame can tell apart, and no address but through RSI.
    let gpr = registers()
        .filter(|r| r.is_gpr())
        .all(|r| !matches!(r.full_register(), Register::RSP | Register::RSI | Register::RDI));
    let memory = instruction.op_kinds().all(|kind| kind != OpKind::Memory)
        || instruction.memory_base() == Register::RSI
            && (instruction.memory_index() == Register::None || instruction.is_vsib());
    let features = bench.vcpu.features.clone();
    data && !control && gpr && memory && bench.vcpu.host_alu.features.all(instruction.cpuid_features(), &features)
}

/// Fills registers and memory of both.
fn prepare(
    random: &mut Random,
    bench: &mut Bench,
    machine: &mut Machine,
    buffer: &mut [u8],
    instruction: &Instruction,
) {
    for chunk in buffer.chunks_mut(64) {
        random.numbers(chunk);
    }
    let area = &mut machine.xsave;
    area.fill(0);
    let length = bench.vcpu.xsave_area().len();
    let mut at = 576;
    while at < length {
        let end = (at + 32).min(length);
        random.numbers(&mut area[at..end]);
        at = end;
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
        sign_bits(random, area, instruction);
    }
    for st in 0..8 {
        let at = 32 + 16 * st;
        let exponent = random.pick(&[0u16, 1, 0x3fff, 0x3ffe, 0x4000, 0x403e, 0x7ffe, 0x7fff, 0xbfff, 0xffff, 0x3f80]);
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
    let mxcsr = 0x1f80 | random.next() as u32 & 0xe07f;
    area[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    let xcr0 = bench.vcpu.xcr0;
    area[512..520].copy_from_slice(&xcr0.to_le_bytes());
    bench.vcpu.set_xsave_area(&area[..length]);

    for gpr in &mut machine.gpr {
        *gpr = if random.below(2) == 0 { random.next() } else { random.below(40) };
    }
    machine.rflags = 2 | random.next() & 0x8d5;
    bench.vcpu.regs[..16].copy_from_slice(&machine.gpr);
    let middle = buffer.as_mut_ptr().wrapping_add(REACH) as u64;
    (machine.gpr[6], machine.gpr[7]) = (middle, middle);
    (bench.vcpu.regs[6], bench.vcpu.regs[7]) = (GUEST_DATA, GUEST_DATA);
    bench.vcpu.flags.set_value(machine.rflags);
    bench.memory.write(GUEST_DATA - REACH as u64, buffer).expect("guest memory");
}

/// Makes about half the elements of a VEX gather's mask selected, in the saved area. The mask's upper half is in the AVX
/// component.
fn sign_bits(random: &mut Random, area: &mut [u8], instruction: &Instruction) {
    if instruction.encoding() != EncodingKind::VEX || instruction.op_count() < 3 {
        return;
    }
    let mask = instruction.op2_register().number();
    if mask == instruction.memory_index().number() {
        return;
    }
    for base in [160, 576] {
        for byte in (3..16).step_by(4) {
            area[base + 16 * mask + byte] = if random.below(2) == 0 { 0x80 } else { 0 };
        }
    }
}

/// Differences between the two, for people.
fn compare(bench: &Bench, machine: &Machine, buffer: &[u8]) -> Option<String> {
    let ours = bench.vcpu.xsave_area();
    // The pointers are addresses; reserved parts and the header may hold anything.
    let compared = (0..6).chain(24..28).chain(160..416).chain(576..ours.len());
    if let Some(at) = compared.clone().find(|&at| ours[at] != machine.xsave[at]) {
        return Some(format!(
            "state byte {at}: ours {:02x?} host {:02x?}",
            &ours[at & !15..(at & !15) + 16],
            &machine.xsave[at & !15..(at & !15) + 16]
        ));
    }
    for st in 0..8 {
        let at = 32 + 16 * st;
        if ours[at..at + 10] != machine.xsave[at..at + 10] {
            let (a, b) = (&ours[at..at + 10], &machine.xsave[at..at + 10]);
            return Some(format!("ST{st}: ours {a:02x?} host {b:02x?}"));
        }
    }
    for r in (0..16).filter(|r| !matches!(r, 4 | 6 | 7)) {
        if bench.vcpu.regs[r] != machine.gpr[r] {
            return Some(format!("GPR {r}: ours {:#x} host {:#x}", bench.vcpu.regs[r], machine.gpr[r]));
        }
    }
    if (bench.vcpu.rflags() ^ machine.rflags) & platform::x86::rflags::ARITHMETIC != 0 {
        return Some(format!("flags: ours {:#x} host {:#x}", bench.vcpu.rflags(), machine.rflags));
    }
    let mut guest = vec![0; buffer.len()];
    bench.memory.read(GUEST_DATA - REACH as u64, &mut guest).expect("guest memory");
    (0..buffer.len()).find(|&i| guest[i] != buffer[i]).map(|i| format!("memory at {:+}", i as i64 - REACH as i64))
}

/// Runs random encodings of one kind until `rounds` have been compared; returns how often each code was.
fn compare_with_host(kind: EncodingKind, rounds: usize, seed: u64) -> HashMap<Code, usize> {
    let mut random = Random(seed);
    let mut bench = Bench::new();
    let mut machine = Machine::new();
    let mut runner = Runner::new();
    let mut storage = vec![0u64; 2 * REACH / 8 + 8];
    // Whole 64-byte lines inside the allocation.
    let skew = storage.as_ptr().align_offset(64);
    let mut seen = HashMap::new();
    let mut failures = Vec::new();
    let mut done = 0;
    while done < rounds {
        let bytes = encoding(&mut random, kind);
        let mut decoder = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() || !takes_part(&mut bench, &instruction) {
            continue;
        }
        let bytes = &bytes[..instruction.len()];
        let buffer = bytes_of(&mut storage[skew..], 2 * REACH);
        prepare(&mut random, &mut bench, &mut machine, buffer, &instruction);
        let ours = bench.run(bytes);
        let count = seen.entry(instruction.code()).or_insert(0);
        *count += 1;
        done += 1;
        if let Err(trap) = ours {
            failures.push(format!("{:?} {bytes:02x?} {instruction:?}: {trap:?}", instruction.code()));
        } else {
            runner.run(bytes, &mut machine);
            if let Some(difference) = compare(&bench, &machine, buffer) {
                failures.push(format!("{:?} {bytes:02x?}: {difference}", instruction.code()));
            }
        }
        if failures.len() > 20 {
            break;
        }
    }
    assert!(failures.is_empty(), "seed {seed}, after {done}:\n{}", failures.join("\n"));
    seen
}

/// The storage as bytes.
fn bytes_of(words: &mut [u64], length: usize) -> &mut [u8] {
    super::native::as_bytes(words, length)
}

/// Codes of a kind that the host has and the generator can reach, but that were never compared.
fn missing(kind: EncodingKind, seen: &HashMap<Code, usize>) -> Vec<Code> {
    let mut bench = Bench::new();
    let features = bench.vcpu.features.clone();
    let wanted = |code: &Code| {
        let info = code.op_code();
        let mut instruction = Instruction::default();
        instruction.set_code(*code);
        let name = format!("{code:?}");
        let vector = ["mm", "kr", "st", "_m32fp", "_m64fp", "_vm"].iter().any(|part| name.contains(part));
        info.is_instruction()
            && info.mode64()
            && info.encoding() == kind
            && vector
            && bench.vcpu.host_alu.features.all(instruction.cpuid_features(), &features)
    };
    Code::values().filter(wanted).filter(|code| !seen.contains_key(code)).collect()
}

#[test]
fn legacy() {
    let seen = compare_with_host(EncodingKind::Legacy, 40_000, 0x1234_5678_9abc_def1);
    eprintln!("{} codes, missing {:?}", seen.len(), missing(EncodingKind::Legacy, &seen));
}

#[test]
fn vex() {
    let seen = compare_with_host(EncodingKind::VEX, 40_000, 0x2234_5678_9abc_def1);
    eprintln!("{} codes, missing {:?}", seen.len(), missing(EncodingKind::VEX, &seen));
}

#[test]
fn evex() {
    let seen = compare_with_host(EncodingKind::EVEX, 60_000, 0x3234_5678_9abc_def1);
    eprintln!("{} codes, missing {:?}", seen.len(), missing(EncodingKind::EVEX, &seen));
}
