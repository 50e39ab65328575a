//! Virtual-8086 mode: in and out, and INT n with and without the virtual-mode extensions.

use platform::x86::{cr4, gpr, rflags, seg};

use crate::event::descriptor::segment_8086;
use crate::event::request::bit;
use crate::testing::{Machine, at, gate, sel};

/// A virtual-8086 task at 0800:0000 with its stack at 0500:1000.
fn v8086(iopl: u64) -> Machine {
    let mut m = Machine::protected();
    // The program may use INT n through gates at DPL 3, if IOPL allows it.
    for vector in 0x20..=0x7f {
        m.set_gate(vector, gate(sel::CODE32, Machine::handler(vector) as u32, 0xee, 0));
    }
    for (index, selector) in
        [(seg::CS, 0x800), (seg::SS, 0x500), (seg::DS, 0x11), (seg::ES, 0x22), (seg::FS, 0x33), (seg::GS, 0x44)]
    {
        m.vcpu.segments[index] = segment_8086(selector);
        m.vcpu.seg_base[index] = m.vcpu.segments[index].base;
    }
    m.vcpu.cpl = 3;
    m.vcpu.set_rip(0);
    m.set_reg(gpr::RSP, 0x1000);
    m.set_flags(rflags::VM | iopl << 12 | rflags::IF, 0);
    m.vcpu.update_mode();
    m
}

fn put_code(m: &mut Machine, bytes: &[u8]) {
    m.memory.write(0x8000, bytes).unwrap();
}

#[test]
fn an_interrupt_leaves_and_iret_returns() {
    let mut m = v8086(0);
    put_code(&mut m, &[0x90]);
    m.world.interrupts.lock().unwrap().push_back(0x90);
    m.vcpu.events().raise(bit::INTERRUPT);
    m.step(1);
    m.assert_in_handler(0x90);
    assert_eq!((m.vcpu.cpl, m.vcpu.v8086(), m.vcpu.mode.code_bits()), (0, false, 32));
    assert_eq!(m.reg(gpr::RSP), at::STACK - 36);
    let frame: [u32; 9] = std::array::from_fn(|i| m.stack(i as u64));
    let flags = (rflags::VM | rflags::IF | rflags::FIXED) as u32;
    assert_eq!(frame, [0, 0x800, flags, 0x1000, 0x500, 0x22, 0x11, 0x33, 0x44]);
    for index in [seg::DS, seg::ES, seg::FS, seg::GS] {
        assert_eq!(m.vcpu.segments[index].selector, 0);
    }
    m.code(|a| a.iretd());
    m.step(1);
    assert!(m.vcpu.v8086());
    assert_eq!((m.vcpu.cpl, m.vcpu.rip(), m.reg(gpr::RSP)), (3, 0, 0x1000));
    let selectors: [u16; 6] = std::array::from_fn(|i| m.vcpu.segments[i].selector);
    assert_eq!(selectors, [0x22, 0x800, 0x500, 0x11, 0x33, 0x44]);
    assert_eq!(m.vcpu.segments[seg::GS], segment_8086(0x44));
    assert_eq!(m.vcpu.rflags(), u64::from(flags));
}

#[test]
fn int_n_depends_on_iopl() {
    let mut m = v8086(3);
    put_code(&mut m, &[0xcd, 0x21]);
    m.step(1);
    m.assert_in_handler(0x21);
    assert_eq!(m.stack::<u32>(0), 2);
    let mut m = v8086(2);
    put_code(&mut m, &[0xcd, 0x21]);
    m.step(1);
    m.assert_in_handler(13);
    assert_eq!((m.stack::<u32>(0), m.stack::<u32>(1)), (0, 0));
    // INT3 does not.
    let mut m = v8086(0);
    m.set_gate(3, gate(sel::CODE32, Machine::handler(3) as u32, 0xee, 0));
    put_code(&mut m, &[0xcc]);
    m.step(1);
    m.assert_in_handler(3);
}

#[test]
fn a_handler_must_be_in_ring_0() {
    let mut m = v8086(3);
    m.set_gate(0x21, gate(sel::USER_CODE32, Machine::handler(0x21) as u32, 0xee, 0));
    put_code(&mut m, &[0xcd, 0x21]);
    m.step(1);
    m.assert_in_handler(13);
    assert_eq!(m.stack::<u32>(0), u32::from(sel::USER_CODE32 & !3));
}

#[test]
fn a_16_bit_gate_pushes_words() {
    let mut m = v8086(3);
    m.set_gate(0x21, gate(sel::CODE16, Machine::handler(0x21) as u32, 0xe6, 0));
    put_code(&mut m, &[0xcd, 0x21]);
    m.step(1);
    m.assert_in_handler(0x21);
    let frame: [u16; 9] = std::array::from_fn(|i| m.stack(i as u64));
    assert_eq!(frame, [2, 0x800, 0x3202, 0x1000, 0x500, 0x22, 0x11, 0x33, 0x44]);
}

/// With CR4.VME, an I/O map at 0x100 in the TSS and the redirection bitmap below it.
fn extended(iopl: u64, redirected: bool) -> Machine {
    let mut m = v8086(iopl);
    m.vcpu.cr4 |= cr4::VME;
    m.put(at::TSS + 0x66, 0x100u16);
    m.put(at::TSS + 0xe0 + 0x21 / 8, if redirected { 1u8 << 1 } else { 0 });
    m.put(4 * 0x21, 0x0900_0040u32);
    put_code(&mut m, &[0xcd, 0x21]);
    m
}

#[test]
fn the_redirection_bitmap() {
    let mut m = extended(3, true);
    m.step(1);
    m.assert_in_handler(0x21);
    let mut m = extended(0, true);
    m.step(1);
    m.assert_in_handler(13);
    // To the program's own handler, owning IF.
    let mut m = extended(3, false);
    m.step(1);
    assert_eq!((m.vcpu.v8086(), m.vcpu.rip(), m.vcpu.segments[seg::CS]), (true, 0x40, segment_8086(0x900)));
    let frame: [u16; 3] = std::array::from_fn(|i| m.get(0x5000 + 0xffa + 2 * i as u64));
    assert_eq!(frame, [2, 0x800, 0x3202]);
    assert_eq!(m.vcpu.rflags() & rflags::IF, 0);
    // To the program's own handler, with the virtual interrupt flag.
    let mut m = extended(0, false);
    m.set_flags(rflags::VIF, rflags::IF);
    m.step(1);
    let frame: [u16; 3] = std::array::from_fn(|i| m.get(0x5000 + 0xffa + 2 * i as u64));
    assert_eq!(frame, [2, 0x800, 0x3202], "IF shows VIF, and IOPL is 3");
    assert_eq!(m.vcpu.rflags() & (rflags::VIF | rflags::IOPL), 0);
    // IRET gives it back.
    m.memory.write(0x9040, &[0xcf]).unwrap();
    m.step(1);
    assert_eq!(m.vcpu.rip(), 2);
    assert_eq!(m.vcpu.rflags() & (rflags::VIF | rflags::IF | rflags::IOPL), rflags::VIF);
}

#[test]
fn iret_needs_iopl_3_or_the_extensions() {
    for (iopl, bytes, vme, good) in [
        (3, &[0xcf][..], false, true),
        (3, &[0x66, 0xcf], false, true),
        (0, &[0xcf], false, false),
        (0, &[0x66, 0xcf], true, false),
        (0, &[0xcf], true, true),
    ] {
        let mut m = v8086(iopl);
        if vme {
            m.vcpu.cr4 |= cr4::VME;
        }
        put_code(&mut m, bytes);
        let step = if bytes.len() == 1 { 2 } else { 4 };
        for (i, value) in [0x1234u64, 0x900, 0x2].into_iter().enumerate() {
            m.memory.write(0x6000 + step * i as u64, &value.to_le_bytes()[..step as usize]).unwrap();
        }
        m.step(1);
        if good {
            assert_eq!((m.vcpu.rip(), m.vcpu.segments[seg::CS].base), (0x1234, 0x9000));
            assert_eq!((m.reg(gpr::RSP), m.vcpu.iopl()), (0x1000 + 3 * step, iopl as u8));
        } else {
            m.assert_in_handler(13);
        }
    }
}

#[test]
fn virtual_interrupts_pending_refuse_iret() {
    let mut m = v8086(0);
    m.vcpu.cr4 |= cr4::VME;
    m.set_flags(rflags::VIP, 0);
    put_code(&mut m, &[0xcf]);
    m.put(0x6004, rflags::IF as u16);
    m.step(1);
    m.assert_in_handler(13);
}

#[test]
fn far_jumps_and_segment_loads_are_the_8086s() {
    let mut m = v8086(0);
    // MOV AX, 1234; MOV DS, AX; JMP FAR 0900:0010
    put_code(&mut m, &[0xb8, 0x34, 0x12, 0x8e, 0xd8, 0xea, 0x10, 0x00, 0x00, 0x09]);
    m.step(3);
    assert_eq!(m.vcpu.segments[seg::DS], segment_8086(0x1234));
    assert_eq!((m.vcpu.rip(), m.vcpu.segments[seg::CS]), (0x10, segment_8086(0x900)));
    assert_eq!(m.vcpu.cpl, 3);
}
