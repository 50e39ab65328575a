//! Pseudo-random tables and code: whatever the guest does, nothing panics and nothing hangs.

use platform::x86::gpr;

use crate::event::request::bit;
use crate::testing::{Machine, at};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// First bytes of the instructions that touch segments, tables and gates.
const INTERESTING: [&[u8]; 34] = [
    &[0xcf],
    &[0x48, 0xcf],
    &[0x66, 0xcf],
    &[0xcb],
    &[0xca, 8, 0],
    &[0x48, 0xcb],
    &[0xea],
    &[0x9a],
    &[0x66, 0xea],
    &[0xff, 0x2b],
    &[0xff, 0x1b],
    &[0x48, 0xff, 0x1b],
    &[0xcd],
    &[0xcc],
    &[0xce],
    &[0xf1],
    &[0x8e],
    &[0x8c],
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x48, 0x0f, 0x07],
    &[0x0f, 0x07],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0xb2],
    &[0x0f, 0xa1],
    &[0xc5],
    &[0x1f],
    &[0x17],
    &[0x9d],
    &[0x0f, 0x22],
];

/// A descriptor or gate that is more likely to be taken than plain noise.
fn entry(random: &mut Random) -> u64 {
    let noise = random.next();
    let access = (noise >> 40 & 0xff) | if random.below(8) != 0 { 0x80 } else { 0 };
    match random.below(3) {
        // Flat, or a gate to somewhere near.
        0 => access << 40 | (noise & 0xf0 << 48) | 0xf << 48 | 0xffff,
        1 => access << 40 | random.below(0x40) << 19 | (random.below(0x8000) + 0x4000),
        _ => noise,
    }
}

fn fill(m: &mut Machine, random: &mut Random) {
    for i in 0..64 {
        let value = if i > 9 || random.below(8) == 0 { entry(random) } else { continue };
        m.put(at::GDT + 8 * i, value);
    }
    for i in 0..512 {
        if random.below(2) == 0 {
            m.put(at::IDT + 8 * i, entry(random));
        }
    }
    for i in 0..0x80 {
        let value = if random.below(2) == 0 { random.below(0x200) } else { random.next() };
        m.put(at::TSS + 4 * i, value as u32);
        m.put(at::STACK - 0x100 + 4 * i, value as u32);
        m.put(0x5000 + 4 * i, value as u32);
    }
    let mut code = at::CODE;
    for _ in 0..64 {
        let opcode = INTERESTING[random.below(INTERESTING.len() as u64) as usize];
        m.memory.write(code, opcode).unwrap();
        code += opcode.len() as u64;
        m.put(code, random.next());
        code += random.below(5);
    }
}

#[test]
fn nothing_panics() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let machines = [Machine::real, Machine::protected, Machine::long];
    for round in 0..1500u64 {
        let seed = random.next();
        let mut random = Random(seed);
        let mut m = machines[random.below(3) as usize]();
        if m.vcpu.protected() && random.below(2) == 0 {
            m = m.into_user();
        }
        fill(&mut m, &mut random);
        for r in 0..16 {
            let value = if random.below(2) == 0 { random.below(0x200) * 8 + 0x5000 } else { random.next() };
            m.set_reg(r, value);
        }
        m.set_reg(gpr::RSP, at::STACK - 8 * random.below(32));
        let flags = random.next() & 0x3f_7fd7 & !(1 << 17);
        m.set_flags(flags, 0);
        m.vcpu.msrs.star = random.next();
        m.vcpu.msrs.sysenter_cs = random.below(0x200);
        m.vcpu.cr4 |= random.next() & 0xb;
        m.vcpu.dr7 = random.next() & 0xffff_2bff | 0x400;
        m.vcpu.dr[0] = at::CODE + random.below(64);
        m.vcpu.update_debug_attention();
        for _ in 0..40 {
            match random.below(8) {
                0 => m.vcpu.events().raise(bit::NMI),
                1 => {
                    m.world.interrupts.lock().unwrap().push_back(random.next() as u8);
                    m.vcpu.events().raise(bit::INTERRUPT);
                }
                _ => {}
            }
            if m.vcpu.step(3).is_some() {
                break;
            }
            let level = crate::event::descriptor::segment_dpl(&m.vcpu.segments[platform::x86::seg::SS]);
            let expected = if !m.vcpu.protected() { 0 } else { m.vcpu.cpl };
            assert!(!m.vcpu.protected() || level == expected, "round {round}: SS.DPL is CPL");
        }
    }
}
