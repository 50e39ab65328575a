//! Every data instruction that the host has, with random operands.

use std::collections::HashMap;

use iced_x86::{Code, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::fixture::Bench;
use super::pair::Pair;
use super::random::Random;

/// Random encodings. Memory operands are `[RSI + disp8]`, or `[RSI + index]` for gathers.
fn encoding(random: &mut Random, kind: EncodingKind) -> Vec<u8> {
    let mut bytes = Vec::new();
    let opcode = random.byte();
    let vvvv = if random.below(2) == 0 { 0x78 } else { random.byte() & 0x78 };
    match kind {
        EncodingKind::Legacy => {
            if random.below(8) == 0 {
                bytes.push(0xd8 | random.byte() & 7);
                operand(random, &mut bytes);
                return bytes;
            }
            if let Some(prefix) = random.pick(&[None, Some(0x66), Some(0xf2), Some(0xf3)]) {
                bytes.push(prefix);
            }
            if random.below(2) == 0 {
                bytes.push(0x40 | random.byte() & 0xc);
            }
            bytes.push(0x0f);
            if let Some(map) = random.pick(&[None, None, Some(0x38), Some(0x3a)]) {
                bytes.push(map);
            }
        }
        EncodingKind::VEX => {
            bytes.extend([0xc4, 0x60 | random.byte() & 0x80 | (1 + random.below(3)) as u8]);
            bytes.push(vvvv | random.byte() & 0x87);
        }
        _ => {
            // Many instructions take neither mask nor broadcast.
            let last = if random.below(2) == 0 { random.byte() & 0x60 | 8 } else { random.byte() | 8 };
            bytes.extend([0x62, random.byte() & 0x90 | 0x60 | (1 + random.below(3)) as u8]);
            bytes.extend([vvvv | 4 | random.byte() & 0x83, last]);
        }
    }
    bytes.push(opcode);
    operand(random, &mut bytes);
    bytes.extend([random.byte(), random.byte()]);
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

/// Instructions that [`super::control`] compares.
fn is_control(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Fldcw
            | Fldenv
            | Frstor
            | Fnstenv
            | Fnsave
            | Fnclex
            | Fninit
            | Fneni
            | Fndisi
            | Fnsetpm
            | Fnstcw
            | Fnstsw
            | Emms
    )
}

/// Whether an instruction takes part: pure data on vector, opmask, MMX or x87 registers.
fn takes_part(bench: &mut Bench, instruction: &Instruction) -> bool {
    let registers = || (0..instruction.op_count()).map(|i| instruction.op_register(i));
    let x87 = instruction.cpuid_features().iter().any(|feature| format!("{feature:?}").starts_with("FPU"));
    let data = registers().any(|r| r.is_vector_register() || r.is_mm() || r.is_k()) || x87;
    // Only the registers that the frame can tell apart, and no address but through RSI.
    let gpr = registers()
        .filter(|r| r.is_gpr())
        .all(|r| !matches!(r.full_register(), Register::RSP | Register::RSI | Register::RDI));
    let memory = instruction.op_kinds().all(|kind| kind != OpKind::Memory)
        || instruction.memory_base() == Register::RSI
            && (instruction.memory_index() == Register::None || instruction.is_vsib());
    data && !is_control(instruction.mnemonic()) && gpr && memory && bench.has(instruction.cpuid_features())
}

/// Runs random encodings of one kind until `rounds` have been compared, and then until every code has been.
fn compare_with_host(kind: EncodingKind, rounds: usize, seed: u64) {
    let mut pair = Pair::new(seed);
    let mut seen: HashMap<Code, usize> = HashMap::new();
    let mut failures = Vec::new();
    let mut done = 0;
    let mut tries = 0u64;
    let mut missing = codes(kind);
    while failures.len() < 20 && (done < rounds || !missing.is_empty()) {
        tries += 1;
        assert!(tries < 20_000_000, "never generated: {missing:?}");
        let bytes = encoding(&mut pair.random, kind);
        let mut decoder = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() || !takes_part(&mut pair.bench, &instruction) {
            continue;
        }
        let count = seen.entry(instruction.code()).or_insert(0);
        *count += 1;
        if done >= rounds && *count > 4 {
            continue;
        }
        missing.retain(|code| *code != instruction.code());
        let bytes = &bytes[..instruction.len()];
        pair.prepare(&instruction);
        if let Err(difference) = pair.run(bytes) {
            failures.push(format!("{:?} {bytes:02x?}: {difference}", instruction.code()));
        }
        done += 1;
    }
    assert!(failures.is_empty(), "seed {seed:#x}, after {done}:\n{}", failures.join("\n"));
}

/// The data instructions of a kind that the host has.
fn codes(kind: EncodingKind) -> Vec<Code> {
    let mut bench = Bench::new();
    let wanted = |code: &Code| {
        let info = code.op_code();
        let mut instruction = Instruction::default();
        instruction.set_code(*code);
        let name = format!("{code:?}");
        let data = ["mm", "kr", "st0", "sti", "_m32fp", "_m64fp", "_vm"].iter().any(|part| name.contains(part));
        // Forms with FWAIT in front are two instructions.
        info.is_instruction()
            && info.mode64()
            && info.encoding() == kind
            && data
            && !info.fwait()
            && !is_control(instruction.mnemonic())
            && bench.has(instruction.cpuid_features())
    };
    Code::values().filter(wanted).collect()
}

#[test]
fn legacy() {
    compare_with_host(EncodingKind::Legacy, 10_000, 0x1234_5678_9abc_def1);
}

#[test]
fn vex() {
    compare_with_host(EncodingKind::VEX, 8_000, 0x2234_5678_9abc_def1);
}

#[test]
fn evex() {
    compare_with_host(EncodingKind::EVEX, 12_000, 0x3234_5678_9abc_def1);
}
