//! Protected mode outside long mode: gates of both widths, privilege changes, error codes.

use iced_x86::code_asm::*;
use platform::x86::{gpr, rflags, seg};

use crate::testing::{Machine, at, descriptor, gate, sel};

#[test]
fn a_fault_at_the_same_level() {
    let mut m = Machine::protected();
    m.set_flags(rflags::IF | rflags::NT, 0);
    m.code(|a| a.ud2());
    m.step(1);
    m.assert_in_handler(6);
    assert_eq!(m.reg(gpr::RSP), at::STACK - 12);
    let frame: [u32; 3] = std::array::from_fn(|i| m.stack(i as u64));
    let flags = (rflags::IF | rflags::NT | rflags::RF | rflags::FIXED) as u32;
    assert_eq!(frame, [at::CODE as u32, u32::from(sel::CODE32), flags]);
    assert_eq!(m.vcpu.rflags(), rflags::FIXED, "IF, NT, RF are clear in the handler");
}

#[test]
fn from_ring_3_and_back() {
    let mut m = Machine::protected();
    m.set_gate(0x80, gate(sel::CODE32, Machine::handler(0x80) as u32, 0xef, 0));
    let mut m = m.into_user();
    m.set_flags(rflags::IF, 0);
    m.code(|a| a.int(0x80));
    m.code_at(Machine::handler(0x80), |a| a.iretd());
    m.step(1);
    m.assert_in_handler(0x80);
    assert_eq!((m.vcpu.cpl, m.reg(gpr::RSP)), (0, at::STACK - 20));
    assert_eq!(m.vcpu.segments[seg::SS], m.segment(sel::DATA));
    let frame: [u32; 5] = std::array::from_fn(|i| m.stack(i as u64));
    let (code, stack) = (u32::from(sel::USER_CODE32), u32::from(sel::USER_DATA));
    assert_eq!(frame, [at::CODE as u32 + 2, code, 0x202, at::USER_STACK as u32, stack]);
    assert_ne!(m.vcpu.rflags() & rflags::IF, 0, "a trap gate");
    m.step(1);
    assert_eq!((m.vcpu.cpl, m.vcpu.rip(), m.reg(gpr::RSP)), (3, at::CODE + 2, at::USER_STACK));
    assert_eq!(m.vcpu.segments[seg::DS].selector, sel::USER_DATA);
}

#[test]
fn iret_takes_away_privileged_data_segments() {
    let mut m = Machine::protected();
    m.set_descriptor(sel::FREE, descriptor(0, 0xfffff, 0x9f, 0xc));
    let conforming = m.segment(sel::FREE);
    m.vcpu.set_segment(seg::FS, conforming);
    m.code(|a| {
        a.push(i32::from(sel::USER_DATA))?;
        a.push(at::USER_STACK as i32)?;
        a.push(0x202)?;
        a.push(i32::from(sel::USER_CODE32))?;
        a.push(0x5000)?;
        a.iretd()
    });
    m.step(6);
    assert_eq!((m.vcpu.cpl, m.vcpu.rip()), (3, 0x5000));
    for index in [seg::DS, seg::ES, seg::GS] {
        assert_eq!(m.vcpu.segments[index].selector, 0);
        assert_ne!(m.vcpu.segments[index].access & platform::x86::SEGMENT_UNUSABLE, 0);
    }
    assert_eq!(m.vcpu.segments[seg::FS], conforming);
    m.code_at(0x5000, |a| a.mov(al, byte_ptr(ebx)));
    m.step(1);
    m.assert_in_handler(13);
}

#[test]
fn a_16_bit_gate_pushes_words() {
    let mut m = Machine::protected();
    m.set_descriptor(sel::FREE, descriptor(0, 0xfffff, 0x9a, 0x8));
    m.set_gate(13, gate(sel::FREE, Machine::handler(13) as u32 | 0xabcd_0000, 0x86, 0));
    let mut m = m.into_user();
    m.code(|a| a.int(0x80));
    m.step(1);
    m.assert_in_handler(13);
    assert_eq!(m.reg(gpr::RSP), at::STACK - 12);
    let frame: [u16; 6] = std::array::from_fn(|i| m.stack(i as u64));
    assert_eq!(frame, [0x80 << 3 | 2, at::CODE as u16, sel::USER_CODE32, 2, at::USER_STACK as u16, sel::USER_DATA]);
    assert_eq!(m.vcpu.mode.code_bits(), 16);
    assert_eq!(m.get::<u8>(at::GDT + u64::from(sel::FREE) + 5), 0x9b, "the accessed bit is set");
}

#[test]
fn a_16_bit_task_state_segment_gives_the_stack() {
    let mut m = Machine::protected();
    m.vcpu.tr.access = 0x83;
    m.put(at::TSS + 2, 0x6800u16);
    m.put(at::TSS + 4, sel::DATA);
    let mut m = m.into_user();
    m.code(|a| a.ud2());
    m.step(1);
    m.assert_in_handler(6);
    assert_eq!(m.reg(gpr::RSP), 0x6800 - 20);
}

#[test]
fn a_16_bit_stack_keeps_the_upper_half_of_esp() {
    let mut m = Machine::protected();
    m.put(at::TSS + 4, 0xabcd_0004u32);
    m.put(at::TSS + 8, sel::DATA16);
    let mut m = m.into_user();
    m.code(|a| a.ud2());
    m.step(1);
    m.assert_in_handler(6);
    assert_eq!(m.reg(gpr::RSP), 0xabcd_fff0, "20 bytes below 4, in 16 bits");
    assert_eq!(m.get::<u32>(0xfff0), at::CODE as u32);
}

#[test]
fn the_inner_stack_is_checked() {
    let free = sel::FREE;
    // (SS0, its descriptor at FREE, TR limit, vector, error code)
    let cases = [
        (0, 0, 0x2fff, 10, 1),
        (sel::DATA | 1, 0, 0x2fff, 10, sel::DATA | 1),
        (sel::USER_DATA, 0, 0x2fff, 10, sel::USER_DATA & !3 | 1),
        (sel::CODE32, 0, 0x2fff, 10, sel::CODE32 | 1),
        (0x208, 0, 0x2fff, 10, 0x209),
        (free, descriptor(0, 0xfffff, 0x91, 0xc), 0x2fff, 10, free | 1),
        (free, descriptor(0, 0xfffff, 0x13, 0xc), 0x2fff, 12, free | 1),
        (free, descriptor(0, 0x6000, 0x93, 0x4), 0x2fff, 12, free | 1),
        (sel::DATA, 0, 8, 10, sel::TSS | 1),
    ];
    for (ss0, raw, limit, vector, error) in cases {
        let mut m = Machine::protected();
        m.set_descriptor(free, raw);
        m.put(at::TSS + 8, ss0);
        // The exception that results goes to a conforming handler, which needs no stack.
        m.set_descriptor(free + 8, descriptor(0, 0xfffff, 0x9f, 0xc));
        for v in 10..=13 {
            m.set_gate(v, gate(free + 8, Machine::handler(v) as u32, 0x8e, 0));
        }
        m.vcpu.tr.limit = limit;
        let mut m = m.into_user();
        m.code(|a| a.ud2());
        m.step(1);
        m.assert_in_handler(vector);
        assert_eq!(m.stack::<u32>(0), u32::from(error), "SS0 {ss0:#x}, {raw:#x}");
        assert_eq!(m.stack::<u32>(1), at::CODE as u32);
    }
}

#[test]
fn an_expand_down_stack() {
    let mut m = Machine::protected();
    // Offsets above 0x5FFF.
    m.set_descriptor(sel::FREE, descriptor(0, 5, 0x97, 0xc));
    m.put(at::TSS + 4, 0x6014u32);
    m.put(at::TSS + 8, sel::FREE);
    let mut m = m.into_user();
    m.code(|a| a.ud2());
    m.step(1);
    m.assert_in_handler(6);
    assert_eq!(m.reg(gpr::RSP), 0x6000);
}

#[test]
fn the_handlers_code_segment_is_checked() {
    let free = sel::FREE;
    // (descriptor at FREE, vector, error code); the gate's offset is 0xA060.
    let cases = [
        (descriptor(0, 0xfffff, 0x93, 0xc), 13, free | 1),
        (descriptor(0, 0xfffff, 0xfb, 0xc), 13, free | 1),
        (descriptor(0, 0xfffff, 0x1b, 0xc), 11, free | 1),
        (descriptor(0, 0xa05f, 0x9b, 0x4), 13, 1),
    ];
    for (raw, vector, error) in cases {
        let mut m = Machine::protected();
        m.set_descriptor(free, raw);
        m.set_gate(6, gate(free, 0xa060, 0x8e, 0));
        m.code(|a| a.ud2());
        m.step(1);
        m.assert_in_handler(vector);
        assert_eq!(m.stack::<u32>(0), u32::from(error), "{raw:#x}");
    }
}

#[test]
fn int3_and_into_check_the_gate_but_int1_does_not() {
    for (code, vector) in [(0xcc, 3), (0xce, 4), (0xf1, 1)] {
        let mut m = Machine::protected().into_user();
        m.set_flags(rflags::OF, 0);
        m.bytes(&[code]);
        m.step(1);
        if code == 0xf1 {
            m.assert_in_handler(1);
            assert_eq!(m.stack::<u32>(0), at::CODE as u32 + 1);
        } else {
            m.assert_in_handler(13);
            assert_eq!(m.stack::<u32>(0), vector << 3 | 2);
        }
        let mut m = Machine::protected();
        m.set_gate(vector as u8, gate(sel::CODE32, Machine::handler(vector as u8) as u32, 0xee, 0));
        let mut m = m.into_user();
        m.set_flags(rflags::OF, 0);
        m.bytes(&[code]);
        m.step(1);
        m.assert_in_handler(vector as u8);
        assert_eq!(m.stack::<u32>(0), at::CODE as u32 + 1);
    }
    let mut m = Machine::protected();
    m.bytes(&[0xce]);
    m.step(1);
    assert_eq!(m.vcpu.rip(), at::CODE + 1, "INTO without overflow");
}
