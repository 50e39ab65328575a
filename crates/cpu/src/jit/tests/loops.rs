//! Loops of one block, whose accesses are checked for many iterations at once.

use platform::x86::{cr4, gpr};

use super::{DATA, Random, TranslatorOptions, listing, prepare, run};
use crate::testing::{Machine, at};

/// Its 2 MiB may be read only.
const READ_ONLY: u64 = 0x60_0000;
const END_OF_RAM: u64 = 16 << 20;

/// RBX, RBP, R9, R13.
const BASES: [u8; 4] = [3, 5, 9, 13];

/// An access to [base + disp8], or [base + r8 * 2^scale + disp8].
fn access(code: &mut Vec<u8>, opcode: &[u8], rex_w: u8, reg: u8, base: u8, index: Option<u8>, disp: i8) {
    let prefix = usize::from(opcode[0] == 0x66);
    code.extend(&opcode[..prefix]);
    code.push(0x40 | rex_w << 3 | (reg >> 3) << 2 | u8::from(index.is_some()) << 1 | base >> 3);
    code.extend(&opcode[prefix..]);
    match index {
        Some(scale) => code.extend([0x44 | (reg & 7) << 3, scale << 6 | base & 7, disp as u8]),
        None => code.extend([0x40 | (reg & 7) << 3 | base & 7, disp as u8]),
    }
}

/// A loop that counts R11 down to zero.
fn random_loop(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..1 + random.below(9) {
        let base = random.pick(&BASES);
        let index = random.pick(&[None, None, None, Some(0), Some(3)]);
        let reg = random.pick(&[0u8, 2, 6, 10, 14, 15]);
        let disp = (random.below(200) as i64 - 100) as i8;
        match random.below(14) {
            0 | 1 => access(&mut code, &[0x8b], 1, reg, base, index, disp),
            2 => access(&mut code, &[0x89], 1, reg, base, index, disp),
            3 => access(&mut code, &[0x01], 0, reg, base, index, disp),
            // ADC takes the carry of the iteration before, which DEC leaves alone.
            4 => access(&mut code, &[0x13], 1, reg, base, index, disp),
            5 => access(&mut code, &[0x0f, 0xb6], 0, reg, base, index, disp),
            // MOVAPS, PADDQ, MOVUPS: aligned or not, to and from memory
            6 | 7 => access(&mut code, &[0x0f, 0x28], 0, reg, base, index, disp & -16),
            8 => access(&mut code, &[0x0f, 0x29], 0, reg, base, index, disp & -16),
            9 => access(&mut code, &[0x66, 0x0f, 0xd4], 0, reg, base, index, disp & -16),
            10 => access(&mut code, &[0x0f, 0x10], 0, reg, base, index, disp),
            11 => access(&mut code, &[0x0f, 0x11], 0, reg, base, index, disp),
            // A forward branch over MOV EAX, EDX; PUSH and POP
            12 => code.extend([0x72, 2, 0x89, 0xd0]),
            _ => code.extend(random.pick(&[[0x50u8, 0x5a], [0x58, 0x90]])),
        }
    }
    for base in BASES {
        let step = random.pick(&[0i8, 1, 8, 16, -16, 24, 48, 64, -8, 127]);
        let step = random.pick(&[step, 16, 16]);
        // LEA base, [base + step]
        code.extend([0x48 | (5 * (base >> 3)), 0x8d, 0x40 | (9 * (base & 7)), step as u8]);
    }
    if random.below(3) == 0 {
        // INC R8; ADD R8, 16
        code.extend(random.pick(&[&[0x49u8, 0xff, 0xc0][..], &[0x49, 0x83, 0xc0, 16]]));
    }
    // DEC R11D; JNZ
    code.extend([0x41, 0xff, 0xcb, 0x0f, 0x85]);
    let back = -(code.len() as i32 + 4);
    code.extend(back.to_le_bytes());
    code.push(0xf4);
    code
}

#[test]
fn many_iterations_share_their_checks_only_where_they_may() {
    let mut random = Random(0x100_b5ee);
    for round in 0..1200 {
        let code = random_loop(&mut random);
        let start = [DATA + 0x4000, DATA + 0x4fb0, READ_ONLY - 0x900, READ_ONLY + 0x900, END_OF_RAM - 0x1800];
        let places: [u64; 4] = std::array::from_fn(|_| random.pick(&start) + 16 * random.below(4));
        let odd = u64::from(random.below(8) == 0);
        let outcome = |translate: bool| {
            let mut machine = prepare(&code, 3);
            let mut state = machine.vcpu.state();
            state.cr4 |= cr4::OSFXSR;
            machine.vcpu.set_state(&state);
            machine.put(at::PAGES + 0x2000 + 8 * (READ_ONLY >> 21), READ_ONLY | 0xe5);
            machine.put(Machine::handler(13), 0xf4u8);
            machine.put(Machine::handler(14), 0xf4u8);
            if translate {
                let options = TranslatorOptions { cache_bytes: 4 << 20, threshold: 1, check: 0 };
                machine.vcpu.set_translator(Some(options)).expect("this host runs translated code");
            }
            let mut ends = Vec::new();
            // Again, with the TLB filled, and with other values.
            for turn in 0..3 {
                machine.vcpu.set_rip(at::CODE);
                machine.vcpu.regs[gpr::RSP] = at::STACK - 0x400;
                for (r, place) in BASES.into_iter().zip(places) {
                    machine.set_reg(r.into(), place + 8 * turn * odd);
                }
                machine.set_reg(8, 16 * turn);
                machine.set_reg(11, 40 + 130 * turn);
                run(&mut machine);
                let vectors = machine.vcpu.fpu.vectors;
                ends.push((machine.vcpu.regs, machine.vcpu.rflags(), machine.world.take_log(), vectors));
            }
            let mut memory = vec![0; 0x2_0000];
            machine.memory.read(DATA, &mut memory).unwrap();
            let mut top = vec![0; 0x8000];
            machine.memory.read(END_OF_RAM - 0x8000, &mut top).unwrap();
            let mut below = vec![0; 0x8000];
            machine.memory.read(READ_ONLY - 0x8000, &mut below).unwrap();
            let mut stack = vec![0; 0x1000];
            machine.memory.read(at::STACK - 0x1000, &mut stack).unwrap();
            (ends, [memory, top, below, stack])
        };
        let (expected, found) = (outcome(false), outcome(true));
        let same = expected.0 == found.0 && expected.1 == found.1;
        assert!(
            same,
            "round {round} at {places:#x?}: {:x?}\n{:x?}\n{}",
            expected.0.iter().map(|end| (end.0, end.1)).collect::<Vec<_>>(),
            found.0.iter().map(|end| (end.0, end.1)).collect::<Vec<_>>(),
            listing(&code)
        );
    }
}
