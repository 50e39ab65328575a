//! Code under the translator must do what it does under the interpreter.

mod legacy;
mod loops;
mod native;

use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions};
use platform::x86::{gpr, rflags};

use super::{TranslatorCounters, TranslatorOptions};
use crate::Exit;
use crate::testing::{Machine, at};

/// Where random programs have their data.
const DATA: u64 = 0x20_0000;

fn translated(mut machine: Machine) -> Machine {
    let options = TranslatorOptions { cache_bytes: 4 << 20, threshold: 1, check: 0 };
    machine.vcpu.set_translator(Some(options)).expect("this host runs translated code");
    machine
}

fn counters(machine: &Machine) -> TranslatorCounters {
    machine.vcpu.translator_counters().expect("the translator is on")
}

#[track_caller]
fn run(machine: &mut Machine) {
    assert!(matches!(machine.vcpu.run(), Exit::Halt { .. }), "stopped at {:#x}", machine.vcpu.rip());
}

struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// An opcode with a ModRM byte: its bytes, a fixed reg field if it has one, bytes of immediate (9: operand size up to 4).
struct Form(&'static [u8], Option<u8>, usize);

const FORMS: &[Form] = &[
    Form(&[0x01], None, 0),
    Form(&[0x03], None, 0),
    Form(&[0x09], None, 0),
    Form(&[0x11], None, 0),
    Form(&[0x1b], None, 0),
    Form(&[0x21], None, 0),
    Form(&[0x29], None, 0),
    Form(&[0x33], None, 0),
    Form(&[0x39], None, 0),
    Form(&[0x3b], None, 0),
    Form(&[0x85], None, 0),
    Form(&[0x89], None, 0),
    Form(&[0x8b], None, 0),
    Form(&[0x87], None, 0),
    Form(&[0x00], None, 0),
    Form(&[0x02], None, 0),
    Form(&[0x28], None, 0),
    Form(&[0x38], None, 0),
    Form(&[0x84], None, 0),
    Form(&[0x88], None, 0),
    Form(&[0x8a], None, 0),
    Form(&[0x86], None, 0),
    Form(&[0x83], Some(0), 1),
    Form(&[0x83], Some(2), 1),
    Form(&[0x83], Some(5), 1),
    Form(&[0x83], Some(7), 1),
    Form(&[0x81], Some(4), 9),
    Form(&[0x81], Some(6), 9),
    Form(&[0x80], Some(1), 1),
    Form(&[0xc7], Some(0), 9),
    Form(&[0xc6], Some(0), 1),
    Form(&[0xf7], Some(0), 9),
    Form(&[0xf7], Some(2), 0),
    Form(&[0xf7], Some(3), 0),
    Form(&[0xf7], Some(4), 0),
    Form(&[0xf7], Some(5), 0),
    Form(&[0xff], Some(0), 0),
    Form(&[0xff], Some(1), 0),
    Form(&[0xc1], Some(4), 1),
    Form(&[0xc1], Some(5), 1),
    Form(&[0xc1], Some(0), 1),
    Form(&[0xc1], Some(3), 1),
    Form(&[0xd1], Some(7), 0),
    Form(&[0xd3], Some(4), 0),
    Form(&[0xd3], Some(5), 0),
    Form(&[0xd3], Some(1), 0),
    Form(&[0xd3], Some(2), 0),
    Form(&[0x6b], None, 1),
    Form(&[0x69], None, 9),
    Form(&[0x0f, 0xaf], None, 0),
    Form(&[0x0f, 0xb6], None, 0),
    Form(&[0x0f, 0xbf], None, 0),
    Form(&[0x63], None, 0),
    Form(&[0x0f, 0x44], None, 0),
    Form(&[0x0f, 0x4c], None, 0),
    Form(&[0x0f, 0x92], Some(0), 0),
    Form(&[0x0f, 0x9f], Some(0), 0),
    Form(&[0x0f, 0xa3], None, 0),
    Form(&[0x0f, 0xba], Some(5), 1),
    Form(&[0x0f, 0xba], Some(7), 1),
    Form(&[0x0f, 0xa4], None, 1),
    Form(&[0x0f, 0xad], None, 0),
    Form(&[0x0f, 0xb1], None, 0),
    Form(&[0x0f, 0xc1], None, 0),
    Form(&[0x8d], None, 0),
];

/// Puts one random instruction with a ModRM byte into `code`.
fn random_form(random: &mut Random, code: &mut Vec<u8>) {
    let form = &FORMS[random.below(FORMS.len() as u64) as usize];
    let wide = random.below(2) as u8 | u8::from(form.0 == [0x0f, 0xb1]);
    // SHLD and SHRD of 16 bits by more leave the result undefined.
    let word = wide == 0 && random.below(6) == 0 && ![&[0x63][..], &[0x0f, 0xa4], &[0x0f, 0xad]].contains(&form.0);
    let reg = form.1.unwrap_or(random.below(16) as u8);
    let memory = form.0 == [0x8d] || random.below(2) == 0;
    let mut bytes = Vec::new();
    if word {
        bytes.push(0x66);
    }
    let rex_reg = if form.1.is_some() { 0 } else { reg >> 3 };
    if !memory {
        let rm = random.below(16) as u8;
        bytes.push(0x40 | wide << 3 | rex_reg << 2 | rm >> 3);
        bytes.extend(form.0);
        bytes.push(0xc0 | (reg & 7) << 3 | rm & 7);
    } else {
        // The base and index are loaded just before.
        let base = random.pick(&[0u8, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        let index = random.pick(&[0u8, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        let indexed = index != base && random.below(2) == 0;
        let address = DATA + 0x1000 * random.below(3) + random.pick(&[0x10, 0x800, 0xff0, 0xffd]);
        let disp = random.below(200) as i64 - 100;
        let scale = random.below(4) as u8;
        let position = random.below(0x40);
        let mut load = |r: u8, value: u64| {
            code.extend([0x48 | r >> 3, 0xb8 | r & 7]);
            code.extend(value.to_le_bytes());
        };
        let index_part = if indexed { position << scale } else { 0 };
        load(base, address.wrapping_sub(index_part).wrapping_sub(disp as u64));
        if indexed {
            load(index, position);
        }
        if (form.0 == [0x0f, 0xa3] || form.0 == [0x0f, 0xad]) && form.1.is_none() {
            load(reg, random.below(64));
            if reg == base || indexed && reg == index {
                return;
            }
        }
        let rex_index = if indexed { index >> 3 } else { 0 };
        bytes.push(0x40 | wide << 3 | rex_reg << 2 | rex_index << 1 | base >> 3);
        bytes.extend(form.0);
        let sib = indexed || base & 7 == 4;
        bytes.push(0x80 | (reg & 7) << 3 | if sib { 4 } else { base & 7 });
        if sib {
            let index = if indexed { index & 7 } else { 4 };
            bytes.push(if indexed { scale << 6 } else { 0 } | index << 3 | base & 7);
        }
        bytes.extend((disp as i32).to_le_bytes());
    }
    let immediate = match form.2 {
        9 if word => 2,
        9 => 4,
        n => n,
    };
    bytes.extend(&random.next().to_le_bytes()[..immediate]);
    code.extend(bytes);
}

/// Random steps; behind each, flags and stack pointer are as the next one may have them.
fn random_steps(random: &mut Random) -> Vec<Vec<u8>> {
    let mut steps = Vec::new();
    for _ in 0..24 {
        let mut one = Vec::new();
        match random.below(8) {
            0 => {
                // PUSH r; POP r
                let (a, b) = (random.below(16) as u8, random.pick(&[0u8, 1, 2, 3, 5, 9, 12, 15]));
                one.extend([0x40 | a >> 3, 0x50 | a & 7, 0x40 | b >> 3, 0x58 | b & 7]);
            }
            1 => one.extend(random.pick(&[
                [0x90u8, 0xf8, 0x90],
                [0x90, 0xf9, 0xf5],
                [0x48, 0x98, 0x90],
                [0x48, 0x99, 0x98],
                [0x41, 0x0f, 0xcc],
                [0x49, 0x0f, 0xc9],
                [0x0f, 0xb6, 0xc4],
                [0x88, 0xe3, 0x90],
                [0x00, 0xfc, 0x9c],
            ])),
            _ => random_form(random, &mut one),
        }
        let undefined = undefined_flags(&one);
        if undefined != 0 {
            // Nothing may depend on flags that the manual leaves open: CMP EAX, EBX.
            one.extend([0x39, 0xd8]);
        }
        // MOV RSP, STACK
        one.extend([0x48, 0xbc]);
        one.extend(at::STACK.to_le_bytes());
        steps.push(one);
    }
    steps
}

fn undefined_flags(code: &[u8]) -> u32 {
    let decoder = Decoder::new(64, code, DecoderOptions::NONE);
    decoder.into_iter().fold(0, |flags, instruction| flags | instruction.rflags_undefined())
}

/// The first difference between the tiers after a program.
fn difference(steps: &[Vec<u8>], seed: u64) -> Option<String> {
    let mut code = steps.concat();
    code.push(0xf4);
    let mut expected = prepare(&code, seed);
    run(&mut expected);
    let mut machine = translated(prepare(&code, seed));
    run(&mut machine);
    assert!(counters(&machine).blocks > 0);
    for r in 0..16 {
        let (a, b) = (expected.reg(r), machine.reg(r));
        if a != b {
            return Some(format!("register {r}: {a:#x}, translated {b:#x}"));
        }
    }
    let (a, b) = (expected.vcpu.rflags(), machine.vcpu.rflags());
    if a != b {
        return Some(format!("flags: {a:#x}, translated {b:#x}"));
    }
    for i in 0..0x800u64 {
        let (a, b) = (expected.get::<u64>(DATA + 8 * i), machine.get::<u64>(DATA + 8 * i));
        if a != b {
            return Some(format!("memory {:#x}: {a:#x}, translated {b:#x}", DATA + 8 * i));
        }
    }
    assert_eq!(expected.vcpu.rip(), machine.vcpu.rip());
    None
}

fn prepare(code: &[u8], seed: u64) -> Machine {
    let mut machine = Machine::long();
    let mut random = Random(seed | 1);
    for r in (0..16).filter(|&r| r != gpr::RSP) {
        machine.set_reg(r, random.next() >> (random.below(8) * 8));
    }
    for i in 0..0x800 {
        machine.put(DATA + 8 * i, random.next());
    }
    machine.set_flags(random.next() & rflags::ARITHMETIC, rflags::ARITHMETIC);
    machine.bytes(code);
    machine
}

fn listing(code: &[u8]) -> String {
    use iced_x86::Formatter;
    let mut formatter = iced_x86::IntelFormatter::new();
    let mut text = String::new();
    for instruction in Decoder::with_ip(64, code, at::CODE, DecoderOptions::NONE) {
        text += &format!("{:#x} ", instruction.ip());
        formatter.format(&instruction, &mut text);
        text.push('\n');
    }
    text
}

#[test]
fn random_programs_end_alike() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..400 {
        let seed = random.next();
        let mut steps = random_steps(&mut random);
        if difference(&steps, seed).is_none() {
            continue;
        }
        // Leave out what is not needed.
        let mut i = 0;
        while i < steps.len() {
            let left_out = steps.remove(i);
            if difference(&steps, seed).is_none() {
                steps.insert(i, left_out);
                i += 1;
            }
        }
        let what = difference(&steps, seed).unwrap_or_default();
        panic!("round {round}, seed {seed:#x}: {what}\n{}", listing(&steps.concat()));
    }
}

/// Runs code under both tiers; returns the translated machine.
fn both(write: impl Fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Machine {
    let mut expected = Machine::long();
    expected.code(&write);
    run(&mut expected);
    let mut machine = translated(Machine::long());
    machine.code(&write);
    run(&mut machine);
    for r in 0..16 {
        assert_eq!(expected.reg(r), machine.reg(r), "register {r}");
    }
    assert_eq!(expected.vcpu.rflags(), machine.vcpu.rflags());
    machine
}

#[test]
fn loops_calls_and_indirect_branches() {
    let machine = both(|a| {
        let (mut again, mut function, mut done) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(rcx, 1000u64)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.call(function)?;
        a.dec(rcx)?;
        a.jnz(again)?;
        a.lea(rdx, ptr(done))?;
        a.jmp(rdx)?;
        a.nop()?;
        a.set_label(&mut function)?;
        a.add(rax, rcx)?;
        a.ret()?;
        a.set_label(&mut done)?;
        a.hlt()
    });
    assert_eq!(machine.reg(gpr::RAX), 500_500);
    let counters = counters(&machine);
    assert!(counters.entries < 40, "the loop runs without leaving emitted code: {counters:?}");
}

#[test]
fn code_that_writes_itself() {
    // Each round overwrites the immediate of an instruction ahead of itself in the same block.
    both(|a| {
        let (mut again, mut target) = (a.create_label(), a.create_label());
        a.mov(ecx, 50)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(target) + 1, ecx)?;
        a.set_label(&mut target)?;
        a.mov(ebx, 0x1234_5678)?;
        a.add(eax, ebx)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.hlt()
    });
}

#[test]
fn branches_between_pages_and_instructions_across_them() {
    for position in 0..16u64 {
        let prepare = |mut machine: Machine| {
            // A loop whose body straddles the page boundary at 0x9000.
            machine.vcpu.set_rip(0x9000 - 24 + position);
            machine.code(|a| {
                let mut again = a.create_label();
                a.mov(ecx, 100)?;
                a.set_label(&mut again)?;
                a.add(rax, 0x1234_5678)?;
                a.add(rdx, 0x0123_4567)?;
                a.xor(rax, rdx)?;
                a.sub(rcx, 1)?;
                a.jnz(again)?;
                a.hlt()
            });
            run(&mut machine);
            machine
        };
        let (expected, machine) = (prepare(Machine::long()), prepare(translated(Machine::long())));
        assert_eq!(expected.reg(gpr::RAX), machine.reg(gpr::RAX), "at {position}");
        assert_eq!(expected.vcpu.rip(), machine.vcpu.rip());
    }
}

#[test]
fn the_checker_agrees_with_good_code() {
    let mut random = Random(77);
    for _ in 0..20 {
        let mut code = random_steps(&mut random).concat();
        code.push(0xf4);
        let mut machine = prepare(&code, 5);
        let options = TranslatorOptions { cache_bytes: 4 << 20, threshold: 1, check: 1 };
        machine.vcpu.set_translator(Some(options)).expect("this host runs translated code");
        run(&mut machine);
        assert!(counters(&machine).checked > 0);
    }
}

#[test]
fn the_checker_lets_undefined_flags_be_stored() {
    // AF after SHL differs between makers of processors: SHL EAX, 5; PUSHFQ; POP RDX; LAHF; HLT.
    let mut machine = prepare(&[0xc1, 0xe0, 5, 0x9c, 0x5a, 0x9f, 0xf4], 5);
    let options = TranslatorOptions { cache_bytes: 4 << 20, threshold: 1, check: 1 };
    machine.vcpu.set_translator(Some(options)).expect("this host runs translated code");
    run(&mut machine);
    assert!(counters(&machine).checked > 0);
}

/// Unmapped: what touches it faults.
const NOWHERE: u64 = 0x4000_0000;

/// What a page fault's frame shows after `code`, which ends in an access to [`NOWHERE`] in RBP.
fn frame(mut machine: Machine, code: &[u8]) -> [u64; 5] {
    machine.put(Machine::handler(14), 0xf4u8);
    machine.bytes(code);
    run(&mut machine);
    assert_eq!(machine.vcpu.rip(), Machine::handler(14) + 1);
    std::array::from_fn(|n| machine.stack(n as u64))
}

#[test]
fn fault_frames_show_the_flags_of_every_instruction_before() {
    // Accesses that fault, each followed by something that overwrites all flags unread.
    const FAULTS: [&[u8]; 6] = [
        &[0x8b, 0x4d, 0],
        &[0x89, 0x4d, 0],
        &[0x01, 0x4d, 0],
        &[0x48, 0x0f, 0xb6, 0x45, 7],
        &[0xff, 0x75, 0],
        &[0x0f, 0x44, 0x4d, 0],
    ];
    let mut random = Random(0x1234_5678_9abc_def1);
    for round in 0..1500 {
        let mut code = Vec::new();
        random_form(&mut random, &mut code);
        let undefined = crate::translate::flags::to_rflags(undefined_flags(&code));
        // MOV RSP, STACK; MOV RBP, NOWHERE; sometimes a good access, and something that overwrites some flags only.
        code.extend([0x48, 0xbc]);
        code.extend(at::STACK.to_le_bytes());
        code.extend([0x48, 0xbd]);
        code.extend(NOWHERE.to_le_bytes());
        if random.below(2) == 0 {
            code.extend([0x48, 0x8b, 0x04, 0x24]);
        }
        code.extend(random.pick(&[[0x90u8, 0x90], [0xf9, 0x90], [0xff, 0xc0], [0xd1, 0xc8], [0xf5, 0xf5]]));
        code.extend(FAULTS[round % FAULTS.len()]);
        code.extend([0x48, 0x39, 0xd8, 0xf4]);
        let seed = random.next();
        let mut expected = frame(prepare(&code, seed), &code);
        let mut found = frame(translated(prepare(&code, seed)), &code);
        expected[3] &= !undefined;
        found[3] &= !undefined;
        assert_eq!(expected, found, "round {round}\n{}", listing(&code));
    }
}

/// No entry of the TLB, empty ones included, matches an address that is not canonical.
#[test]
fn addresses_that_are_not_canonical_fault() {
    // MOV [RBX], CL; MOV [RBX], ECX; MOV ECX, [RBX]; ADD [RBX], ECX
    const ACCESSES: [&[u8]; 4] = [&[0x88, 0x0b], &[0x89, 0x0b], &[0x8b, 0x0b], &[0x01, 0x0b]];
    for bit in 47..64 {
        for (access, offset) in ACCESSES.iter().flat_map(|access| [(access, 0u64), (access, 0x7ff), (access, !0)]) {
            let address = (1u64 << bit).wrapping_add(offset);
            if ((address as i64) << 16) >> 16 == address as i64 {
                continue;
            }
            let mut code = vec![0x48, 0xbb];
            code.extend(address.to_le_bytes());
            code.extend(*access);
            code.push(0xf4);
            let mut machine = translated(prepare(&code, 1));
            machine.put(Machine::handler(13), 0xf4u8);
            machine.bytes(&code);
            run(&mut machine);
            assert_eq!(machine.vcpu.rip(), Machine::handler(13) + 1, "{address:#x} {access:02x?}");
        }
    }
}

/// A program whose accesses lie close together, around the address in RBX, R9 and R13.
fn neighbours(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    // The loop makes the block run often enough.
    for _ in 0..3 + random.below(20) {
        // RBX, RBP, R9, R13, or RBX + R8.
        let (base, sib) = random.pick(&[(3u8, None), (5, None), (9, None), (13, None), (3, Some(0x03u8))]);
        let reg = random.pick(&[0u8, 2, 6, 10, 14, 15]);
        let disp = random.below(96) as i8;
        let mut access = |opcode: &[u8]| {
            code.push(0x48 | ((reg >> 3) << 2) | (u8::from(sib.is_some()) << 1) | (base >> 3));
            code.extend(opcode);
            match sib {
                Some(sib) => code.extend([0x44 | ((reg & 7) << 3), sib, disp as u8]),
                None => code.extend([0x40 | ((reg & 7) << 3) | (base & 7), disp as u8]),
            }
        };
        match random.below(12) {
            0..=3 => access(&[0x8b]),
            4 | 5 => access(&[0x89]),
            6 => access(&[0x01]),
            7 => access(&[0x33]),
            8 => access(&[0x0f, 0xb6]),
            // ADD base, 8; LEA base, [base - 4]; a forward branch over MOV EAX, EDX
            9 => code.extend([0x48 | (base >> 3), 0x83, 0xc0 | (base & 7), 8]),
            10 => code.extend([0x48 | (5 * (base >> 3)), 0x8d, 0x40 | (9 * (base & 7)), 0xfc]),
            _ => code.extend([0x75, 2, 0x89, 0xd0]),
        }
        if random.below(4) == 0 {
            code.extend(random.pick(&[[0x50u8, 0x5a], [0x41, 0x56], [0x53, 0x90], [0x5a, 0x90]]));
        }
    }
    code.push(0xf4);
    code
}

#[test]
fn accesses_share_their_checks_only_where_they_may() {
    const READ_ONLY: u64 = 0x60_0000;
    const END_OF_RAM: u64 = 16 << 20;
    let mut random = Random(0x51ce_b00c);
    for round in 0..600 {
        let code = neighbours(&mut random);
        // In one page, across pages, into a page that may not be written, behind the end of memory.
        let place =
            random.pick(&[DATA, DATA, DATA + 0xfb0, DATA + 0xfd0, READ_ONLY - 0x40, END_OF_RAM - 0x40, READ_ONLY]);
        let check = u32::from(round % 4 == 0);
        let outcome = |translate: bool| {
            let mut machine = prepare(&code, 3);
            machine.put(at::PAGES + 0x2000 + 8 * (READ_ONLY >> 21), READ_ONLY | 0xe5);
            if translate {
                let options = TranslatorOptions { cache_bytes: 4 << 20, threshold: 1, check };
                machine.vcpu.set_translator(Some(options)).expect("this host runs translated code");
            }
            machine.put(Machine::handler(14), 0xf4u8);
            let mut ends = Vec::new();
            // Again, with the TLB filled, and with other values.
            for round in 0..3 {
                machine.vcpu.set_rip(at::CODE);
                machine.vcpu.regs[gpr::RSP] = at::STACK - 0x100;
                for r in [3, 5, 9, 13] {
                    machine.set_reg(r, place + 8 * round + (r as u64 & 4));
                }
                machine.set_reg(8, 16 * round);
                run(&mut machine);
                ends.push((machine.vcpu.regs, machine.vcpu.rflags(), machine.world.take_log()));
            }
            let mut memory = vec![0; 0x3000];
            machine.memory.read(DATA, &mut memory).unwrap();
            let mut stack = vec![0; 0x800];
            machine.memory.read(at::STACK - 0x800, &mut stack).unwrap();
            (ends, memory, stack)
        };
        let (expected, found) = (outcome(false), outcome(true));
        assert!(
            expected == found,
            "round {round} at {place:#x}: {:x?}\n{:x?}\n{}",
            expected.0,
            found.0,
            listing(&code)
        );
    }
}

/// BMI instructions: map and pp of the VEX prefix, opcode, whether VEX.vvvv is an operand.
const BMI: [(u8, u8, u8, bool); 10] = [
    (2, 0, 0xf2, true),
    (2, 0, 0xf5, true),
    (2, 2, 0xf5, true),
    (2, 3, 0xf5, true),
    (2, 3, 0xf6, true),
    (2, 0, 0xf7, true),
    (2, 1, 0xf7, true),
    (2, 2, 0xf7, true),
    (2, 3, 0xf7, true),
    (3, 3, 0xf0, false),
];

#[test]
fn one_register_may_be_several_operands() {
    let mut random = Random(77);
    let registers = [0u8, 1, 9, 12, 15];
    for (map, pp, opcode, third) in BMI {
        for [reg, vvvv, rm] in registers.iter().flat_map(|&a| registers.map(|b| registers.map(|c| [a, b, c]))).flatten()
        {
            let memory = random.below(4) == 0;
            let vvvv = if third { vvvv } else { 0 };
            let mut code = Vec::new();
            // The last one leaves its value in the host's scratch register.
            for r in [reg, vvvv, 13] {
                code.extend([0x48 | r >> 3, 0xb8 | r & 7]);
                code.extend(if random.below(2) == 0 { random.next() } else { random.below(64) }.to_le_bytes());
            }
            // A memory operand is [RBX + 8].
            code.extend([0x48, 0xbb]);
            code.extend(DATA.to_le_bytes());
            let rm = if memory { 3 } else { rm };
            let inverted = (!reg >> 3 & 1) << 7 | 0x40 | (!rm >> 3 & 1) << 5;
            let not_vvvv = if third { !vvvv & 15 } else { 15 };
            code.extend([0xc4, inverted | map, 0x80 | not_vvvv << 3 | pp, opcode]);
            code.push(if memory { 0x40 } else { 0xc0 } | (reg & 7) << 3 | rm & 7);
            code.extend(memory.then_some(8));
            code.extend((!third).then_some(13));
            if undefined_flags(&code) != 0 {
                code.extend([0x39, 0xd8]);
            }
            if let Some(what) = difference(std::slice::from_ref(&code), random.next()) {
                panic!("{what}\n{}", listing(&code));
            }
        }
    }
}
