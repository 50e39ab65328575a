use iced_x86::code_asm::fword_ptr;
use platform::x86::{Segment, gpr, seg};

use crate::testing::{Machine, at, descriptor, gate, sel};

const TARGET: u64 = 0x9000;
const SPARE: u16 = sel::FREE + 8;

/// JMP or CALL far, immediate, 32-bit offset.
fn far(opcode: u8, selector: u16, offset: u32) -> Vec<u8> {
    let mut bytes = vec![opcode];
    bytes.extend(offset.to_le_bytes());
    bytes.extend(selector.to_le_bytes());
    bytes
}

const JMP: u8 = 0xea;
const CALL: u8 = 0x9a;
const RETFQ: [u8; 2] = [0x48, 0xcb];

#[test]
fn real_mode() {
    let mut m = Machine::real();
    // CALL 0900:0010, there RETF 2.
    m.bytes(&[0x9a, 0x10, 0x00, 0x00, 0x09]);
    m.memory.write(0x9010, &[0xca, 0x02, 0x00]).unwrap();
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.segments[seg::CS].base), (0x10, 0x9000));
    assert_eq!((m.stack::<u16>(0), m.stack::<u16>(1)), (at::CODE as u16 + 5, 0));
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.reg(gpr::RSP)), (at::CODE + 5, at::STACK + 2));
    // With 66h the offset has 32 bits and must be inside the limit.
    m.bytes(&[0x66, 0xea, 0, 0, 1, 0, 0, 0]);
    m.step(1);
    m.assert_in_handler(13);
}

#[test]
fn unreal_mode_keeps_limits() {
    let mut m = Machine::real();
    m.vcpu.set_segment(seg::DS, Segment { limit: u32::MAX, ..Segment::real(0) });
    m.bytes(&[0x8e, 0xd8]);
    m.set_reg(gpr::RAX, 0x123);
    m.step(1);
    assert_eq!(m.vcpu.segments[seg::DS], Segment { limit: u32::MAX, ..Segment::real(0x123) });
}

#[test]
fn into_protected_mode() {
    let mut m = Machine::protected();
    m.vcpu.set_segment(seg::CS, Segment { access: 0x9b, ..Segment::real(0) });
    assert_eq!(m.vcpu.mode.code_bits(), 16);
    m.bytes(&[0x66, 0xea, 0, 0x90, 0, 0, 8, 0]);
    m.code_at(TARGET, |a| a.nop());
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.mode.code_bits()), (TARGET, 32));
    assert_eq!(m.vcpu.segments[seg::CS], m.segment(sel::CODE32));
}

#[test]
fn between_64_bit_and_compatibility_code() {
    let mut m = Machine::long();
    m.put(0x5000, 0xffff_ffffu32);
    m.put(0x5000, TARGET as u32);
    m.put(0x5004, sel::CODE32);
    m.code(|a| a.call(fword_ptr(0x5000)));
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.mode.code_bits(), m.vcpu.cpl), (TARGET, 32, 0));
    assert_eq!((m.stack::<u32>(0), m.stack::<u32>(1)), (at::CODE as u32 + 7, u32::from(sel::CODE64)));
    m.bytes(&[0xcb]);
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.in_64bit(), m.reg(gpr::RSP)), (at::CODE + 7, true, at::STACK));
    // JMP m16:64 beyond 4 GiB faults on the fetch, not before; non-canonical at once.
    for (target, fetched) in [(1u64 << 40, true), (1 << 47, false)] {
        let mut m = Machine::long();
        m.put(0x5000, target);
        m.put(0x5008, sel::CODE64);
        m.bytes(&[0x48, 0xff, 0x2c, 0x25, 0x00, 0x50, 0, 0]);
        m.step(1);
        if fetched {
            assert_eq!(m.vcpu.rip(), target);
        } else {
            m.assert_in_handler(13);
            assert_eq!(m.stack::<u64>(0), 0);
        }
    }
}

#[test]
fn retfq_to_the_same_and_an_outer_level() {
    for (cs, ss, user) in [(sel::CODE64, sel::DATA, false), (sel::USER_CODE64, sel::USER_DATA, true)] {
        let mut m = Machine::long();
        m.code(|a| {
            a.push(i32::from(ss))?;
            a.push(0x5000)?;
            a.push(i32::from(cs))?;
            a.push(TARGET as i32)?;
            a.db(&RETFQ)
        });
        m.step(5);
        assert_eq!((m.vcpu.rip(), m.vcpu.cpl), (TARGET, if user { 3 } else { 0 }));
        assert_eq!(m.reg(gpr::RSP), if user { 0x5000 } else { at::STACK - 16 });
        assert_eq!(m.vcpu.segments[seg::SS].selector, ss);
        assert_eq!(m.vcpu.segments[seg::DS].selector, if user { 0 } else { sel::DATA });
    }
}

#[test]
fn direct_targets_are_checked() {
    // (selector, descriptor at FREE, offset, vector, error code)
    let free = sel::FREE;
    let cases = [
        (0, 0, 0, 13, 0),
        (3, 0, 0, 13, 0),
        (0x208, 0, 0, 13, 0x208),
        (0x0c, 0, 0, 13, 0x0c),
        (sel::DATA, 0, 0, 13, sel::DATA),
        (sel::USER_CODE32, 0, 0, 13, sel::USER_CODE32 & !3),
        (sel::CODE32 | 1, 0, 0, 13, sel::CODE32),
        (free, descriptor(0, 0xfffff, 0x1b, 0xc), 0, 11, free),
        (free, descriptor(0, 0x8fff, 0x9b, 0x4), TARGET as u32, 13, 0),
        (free, descriptor(0, 0xfffff, 0xff, 0xc), 0, 13, free),
        (free, descriptor(0, 0xfffff, 0x82, 0xc), 0, 13, free),
    ];
    for (selector, raw, offset, vector, error) in cases {
        for opcode in [JMP, CALL] {
            let mut m = Machine::protected();
            m.set_descriptor(free, raw);
            m.bytes(&far(opcode, selector, offset));
            m.step(1);
            m.assert_in_handler(vector);
            assert_eq!((m.stack::<u32>(0), m.stack::<u32>(1)), (u32::from(error), at::CODE as u32), "{selector:#x}");
        }
    }
}

#[test]
fn conforming_code_runs_at_the_callers_level() {
    let mut m = Machine::protected();
    m.set_descriptor(sel::FREE, descriptor(0, 0xfffff, 0x9e, 0xc));
    let mut m = m.into_user();
    m.bytes(&far(CALL, sel::FREE, TARGET as u32));
    m.code_at(TARGET, |a| a.retf());
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl), (TARGET, 3));
    assert_eq!(m.vcpu.segments[seg::CS].selector, sel::FREE | 3);
    assert_eq!(m.get::<u8>(at::GDT + u64::from(sel::FREE) + 5), 0x9f);
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.segments[seg::CS].selector), (at::CODE + 7, sel::USER_CODE32));
}

/// A call gate to ring 0 that ring 3 may use, with two parameters.
fn with_call_gate(access: u8, code: u16) -> Machine {
    let mut m = Machine::protected();
    m.set_descriptor(sel::FREE, gate(code, TARGET as u32, access, 2));
    m
}

#[test]
fn a_call_gate_to_ring_0_copies_parameters() {
    let mut m = with_call_gate(0xec, sel::CODE32).into_user();
    m.code(|a| {
        a.push(0x111)?;
        a.push(0x222)
    });
    m.step(2);
    m.bytes(&far(CALL, sel::FREE | 3, 0xffff_ffff));
    let start = m.vcpu.rip() as u32;
    m.code_at(TARGET, |a| a.retf_1(8));
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl, m.vcpu.segments[seg::SS].selector), (TARGET, 0, sel::DATA));
    let frame: [u32; 6] = std::array::from_fn(|i| m.stack(i as u64));
    let (code, stack) = (u32::from(sel::USER_CODE32), u32::from(sel::USER_DATA));
    assert_eq!(frame, [start + 7, code, 0x222, 0x111, at::USER_STACK as u32 - 8, stack]);
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl, m.reg(gpr::RSP)), (u64::from(start) + 7, 3, at::USER_STACK));
    assert_eq!(m.vcpu.segments[seg::DS].selector, sel::USER_DATA);
}

#[test]
fn a_16_bit_call_gate_at_the_same_level() {
    let mut m = with_call_gate(0xe4, sel::CODE16);
    m.bytes(&far(CALL, sel::FREE, 0));
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.mode.code_bits()), (TARGET, 16));
    assert_eq!((m.stack::<u16>(0), m.stack::<u16>(1)), (at::CODE as u16 + 7, sel::CODE32));
    assert_eq!(m.reg(gpr::RSP), at::STACK - 4, "no parameters without a change of level");
}

#[test]
fn a_jump_through_a_call_gate_keeps_the_level() {
    let mut m = with_call_gate(0xec, sel::CODE32);
    m.bytes(&far(JMP, sel::FREE, 0));
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl, m.reg(gpr::RSP)), (TARGET, 0, at::STACK));
    let mut m = with_call_gate(0xec, sel::CODE32).into_user();
    m.bytes(&far(JMP, sel::FREE, 0));
    m.step(1);
    m.assert_in_handler(13);
    assert_eq!(m.stack::<u32>(0), u32::from(sel::CODE32));
}

#[test]
fn call_gates_are_checked() {
    // (access byte, target selector, RPL of the caller, vector, error code)
    let cases = [
        (0x8c, sel::CODE32, 3, 13, sel::FREE),
        (0xac, sel::CODE32, 3, 13, sel::FREE),
        (0x6c, sel::CODE32, 3, 11, sel::FREE),
        (0xec, 0, 3, 13, 0),
        (0xec, sel::DATA, 3, 13, sel::DATA),
        (0xec, 0x208, 3, 13, 0x208),
        (0xec, SPARE, 3, 11, SPARE),
    ];
    for (access, target, rpl, vector, error) in cases {
        let mut m = with_call_gate(access, target);
        m.set_descriptor(SPARE, descriptor(0, 0xfffff, 0x1b, 0xc));
        let mut m = m.into_user();
        m.bytes(&far(CALL, sel::FREE | rpl, 0));
        m.step(1);
        m.assert_in_handler(vector);
        assert_eq!(m.stack::<u32>(0), u32::from(error), "{access:#x} {target:#x}");
    }
    // Ring 0 with RPL 3 through a gate at DPL 0.
    let mut m = with_call_gate(0x8c, sel::CODE32);
    m.bytes(&far(CALL, sel::FREE | 3, 0));
    m.step(1);
    m.assert_in_handler(13);
}

#[test]
fn a_64_bit_call_gate() {
    let make = |upper: u64| {
        let mut m = Machine::long();
        m.set_descriptor(sel::FREE, gate(sel::CODE64, TARGET as u32, 0xec, 0));
        m.set_descriptor(SPARE, upper);
        m.put(0x5000, 0u32);
        m.put(0x5004, sel::FREE | 3);
        m
    };
    let call = |m: &mut Machine| m.bytes(&[0xff, 0x1c, 0x25, 0, 0x50, 0, 0]);
    let mut m = make(0).into_user();
    call(&mut m);
    m.memory.write(TARGET, &RETFQ).unwrap();
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl, m.vcpu.segments[seg::SS].selector), (TARGET, 0, 0));
    let frame: [u64; 4] = std::array::from_fn(|i| m.stack(i as u64));
    let (code, stack) = (u64::from(sel::USER_CODE64), u64::from(sel::USER_DATA));
    assert_eq!(frame, [at::CODE + 7, code, at::USER_STACK, stack]);
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl, m.reg(gpr::RSP)), (at::CODE + 7, 3, at::USER_STACK));
    // At the same level two values are pushed, and the upper half of the offset counts.
    let mut m = make(1);
    call(&mut m);
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.reg(gpr::RSP)), (1 << 32 | TARGET, at::STACK - 16));
    // The second half must not look like a descriptor.
    let mut m = make(1 << 40);
    call(&mut m);
    m.step(1);
    m.assert_in_handler(13);
    assert_eq!(m.stack::<u64>(0), u64::from(sel::FREE));
}

#[test]
fn returns_are_checked() {
    let free = sel::FREE;
    // (CS, SS, descriptor at FREE, vector, error code) for RETF in ring 0
    let cases = [
        (0, 0, 0, 13, 0),
        (sel::DATA, 0, 0, 13, sel::DATA),
        (sel::CODE32 | 3, 0, 0, 13, sel::CODE32),
        (free, 0, descriptor(0, 0xfffff, 0x1b, 0xc), 11, free),
        (sel::USER_CODE32, 0, 0, 13, 0),
        (sel::USER_CODE32, sel::DATA, 0, 13, sel::DATA),
        (sel::USER_CODE32, sel::USER_CODE32, 0, 13, sel::USER_CODE32 & !3),
        (sel::USER_CODE32, free | 3, descriptor(0, 0xfffff, 0x73, 0xc), 12, free),
        (free, 0, descriptor(0, 0xff, 0x9b, 0x4), 13, 0),
    ];
    for (cs, ss, raw, vector, error) in cases {
        let mut m = Machine::protected();
        m.set_descriptor(free, raw);
        for (i, value) in [TARGET as u32, u32::from(cs), 0x5000, u32::from(ss)].into_iter().enumerate() {
            m.put(0x6800 + 4 * i as u64, value);
        }
        m.set_reg(gpr::RSP, 0x6800);
        m.bytes(&[0xcb]);
        m.step(1);
        m.assert_in_handler(vector);
        assert_eq!((m.stack::<u32>(0), m.stack::<u32>(1)), (u32::from(error), at::CODE as u32), "{cs:#x} {ss:#x}");
        assert_eq!(m.reg(gpr::RSP), 0x6800 - 16);
    }
    // Inwards.
    let mut m = Machine::protected().into_user();
    m.put(at::USER_STACK, TARGET as u32);
    m.put(at::USER_STACK + 4, u32::from(sel::CODE32));
    m.bytes(&[0xcb]);
    m.step(1);
    m.assert_in_handler(13);
    assert_eq!(m.stack::<u32>(0), u32::from(sel::CODE32));
}

#[test]
fn far_pointers_of_64_bits_are_intels() {
    for amd in [false, true] {
        let mut m = Machine::with_vendor(amd).into_long();
        // As m16:64 the selector is the second one, as m16:32 the first.
        m.put(0x5000, TARGET as u32);
        m.put(0x5004, u32::from(sel::CODE32));
        m.put(0x5008, sel::CODE64);
        m.bytes(&[0x48, 0xff, 0x2c, 0x25, 0x00, 0x50, 0, 0]);
        m.step(1);
        if amd {
            assert_eq!((m.vcpu.rip(), m.vcpu.in_64bit()), (TARGET, false));
        } else {
            assert_eq!((m.vcpu.rip(), m.vcpu.in_64bit()), (u64::from(sel::CODE32) << 32 | TARGET, true));
        }
    }
}
