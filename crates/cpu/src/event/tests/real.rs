//! Real mode.

use platform::x86::{Segment, gpr, rflags, seg};

use crate::event::request::bit;
use crate::testing::{Machine, at};

#[test]
fn an_interrupt_pushes_three_words_and_iret_returns() {
    let mut m = Machine::real();
    m.put(4 * 0x21, 0x0900_0010u32);
    m.vcpu.set_segment(seg::SS, Segment::real(0x100));
    m.vcpu.set_segment(seg::CS, Segment { access: 0x9b, ..Segment::real(0x400) });
    m.vcpu.set_rip(0x4000);
    m.set_reg(gpr::RSP, 0xabcd_0000);
    m.set_flags(rflags::IF | rflags::TF | rflags::AC | rflags::CF, 0);
    m.memory.write(0x8000, &[0xcd, 0x21]).unwrap();
    m.memory.write(0x9010, &[0xcf]).unwrap();
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.segments[seg::CS].selector, m.vcpu.segments[seg::CS].base), (0x10, 0x900, 0x9000));
    assert_eq!(m.reg(gpr::RSP), 0xabcd_fffa, "the stack pointer wraps in 16 bits");
    let frame: [u16; 3] = std::array::from_fn(|i| m.get(0x1000 + 0xfffa + 2 * i as u64));
    assert_eq!(frame, [0x4002, 0x400, 0x303]);
    assert_eq!(m.vcpu.rflags(), rflags::CF | rflags::FIXED);
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.segments[seg::CS].base), (0x4002, 0x4000));
    assert_eq!(m.reg(gpr::RSP), 0xabcd_0000);
    assert_eq!(m.vcpu.rflags() & 0xffff, 0x303);
}

#[test]
fn a_fault_has_no_error_code() {
    let mut m = Machine::real();
    // MOV AX, [0xFFFF] crosses the limit.
    m.bytes(&[0xa1, 0xff, 0xff]);
    m.step(1);
    m.assert_in_handler(13);
    assert_eq!(m.reg(gpr::RSP), at::STACK - 6);
    assert_eq!(m.stack::<u16>(0), at::CODE as u16);
}

#[test]
fn a_stack_without_room_is_a_stack_fault() {
    let mut m = Machine::real();
    m.set_reg(gpr::RSP, 3);
    m.bytes(&[0xcd, 0x21]);
    // INT pushes at 1 and then at FFFF: #SS, which fails the same way: double fault, and again: shutdown.
    assert_eq!(m.vcpu.step(1), Some(crate::Exit::Shutdown));
}

#[test]
fn hlt_wakes_for_an_interrupt() {
    let mut m = Machine::real();
    m.bytes(&[0xfb, 0xf4]);
    assert_eq!(m.vcpu.step(3), Some(crate::Exit::Halt { interruptible: true }));
    assert_eq!(m.vcpu.step(1), Some(crate::Exit::Halt { interruptible: true }), "nothing has happened");
    m.world.interrupts.lock().unwrap().push_back(0x30);
    m.vcpu.events().raise(bit::INTERRUPT);
    m.step(1);
    m.assert_in_handler(0x30);
    assert_eq!(m.stack::<u16>(0), at::CODE as u16 + 2);
}
