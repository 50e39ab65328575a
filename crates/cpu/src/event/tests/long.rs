//! Long mode: frames, stacks, privileges.

use iced_x86::code_asm::*;
use platform::x86::{gpr, rflags, seg};

use crate::event::request::bit;
use crate::testing::{Machine, at, sel};

const USER_FLAGS: u64 = rflags::IF | rflags::FIXED;

#[test]
fn a_fault_pushes_an_aligned_frame_with_rf() {
    let mut m = Machine::long();
    m.set_reg(gpr::RSP, 0x6ffb);
    m.code(|a| a.ud2());
    m.step(1);
    m.assert_in_handler(6);
    assert_eq!(m.reg(gpr::RSP), 0x6ff0 - 40);
    assert_eq!(m.stack::<u64>(0), at::CODE);
    assert_eq!(m.stack::<u64>(1), u64::from(sel::CODE64));
    assert_eq!(m.stack::<u64>(2), rflags::FIXED | rflags::RF);
    assert_eq!(m.stack::<u64>(3), 0x6ffb);
    assert_eq!(m.stack::<u64>(4), u64::from(sel::DATA));
    assert_eq!(m.vcpu.rflags() & rflags::RF, 0);
}

#[test]
fn an_interrupt_from_ring_3_switches_the_stack_and_iretq_returns() {
    let mut m = Machine::long().into_user();
    m.set_flags(rflags::IF | rflags::CF, 0);
    m.code(|a| a.nop());
    m.code_at(Machine::handler(0x40), |a| a.iretq());
    m.world.interrupts.lock().unwrap().push_back(0x40);
    m.vcpu.events().raise(bit::INTERRUPT);
    m.step(1);
    m.assert_in_handler(0x40);
    assert_eq!(m.vcpu.cpl, 0);
    assert_eq!(m.vcpu.segments[seg::SS].selector, 0);
    assert_eq!(m.vcpu.segments[seg::CS].selector, sel::CODE64);
    assert_eq!(m.vcpu.rflags() & rflags::IF, 0, "an interrupt gate clears IF");
    assert_eq!(m.reg(gpr::RSP), at::STACK - 40);
    let frame: [u64; 5] = std::array::from_fn(|i| m.stack(i as u64));
    let expected =
        [at::CODE, u64::from(sel::USER_CODE64), USER_FLAGS | rflags::CF, at::USER_STACK, u64::from(sel::USER_DATA)];
    assert_eq!(frame, expected);
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl), (at::CODE, 3));
    assert_eq!(m.reg(gpr::RSP), at::USER_STACK);
    assert_eq!(m.vcpu.segments[seg::SS], m.segment(sel::USER_DATA));
    assert_eq!(m.vcpu.segments[seg::CS], m.segment(sel::USER_CODE64));
    assert_eq!(m.vcpu.rflags(), USER_FLAGS | rflags::CF);
}

#[test]
fn a_frame_may_cross_pages() {
    let mut m = Machine::long();
    m.set_reg(gpr::RSP, 0x6010);
    m.code(|a| a.int(0xff));
    m.vcpu.idtr.limit = 0xff0;
    m.code_at(Machine::handler(13), |a| {
        a.add(rsp, 8)?;
        a.iretq()
    });
    m.step(1);
    m.assert_in_handler(13);
    let frame: [u64; 6] = std::array::from_fn(|i| m.stack(i as u64));
    let flags = rflags::FIXED | rflags::RF;
    assert_eq!(frame, [0x7fa, at::CODE, u64::from(sel::CODE64), flags, 0x6010, u64::from(sel::DATA)]);
    m.step(2);
    assert_eq!((m.vcpu.rip(), m.reg(gpr::RSP)), (at::CODE, 0x6010));
}

#[test]
fn a_stack_pointer_that_is_not_canonical_is_a_stack_fault() {
    let mut m = Machine::long();
    m.put(at::TSS + 4, 1u64 << 48);
    m.put(at::TSS + 0x24, at::STACK);
    m.set_gate64(12, sel::CODE64, Machine::handler(12), 0x8e, 1);
    let mut m = m.into_user();
    m.code(|a| a.ud2());
    m.step(1);
    m.assert_in_handler(12);
    assert_eq!(m.stack::<u64>(0), 1);
}

#[test]
fn a_trap_gate_leaves_if() {
    let mut m = Machine::long();
    m.set_gate64(6, sel::CODE64, Machine::handler(6), 0x8f, 0);
    m.set_flags(rflags::IF, 0);
    m.code(|a| a.ud2());
    m.step(1);
    m.assert_in_handler(6);
    assert_ne!(m.vcpu.rflags() & rflags::IF, 0);
}

#[test]
fn int_n_needs_the_privilege_of_its_gate() {
    let mut m = Machine::long().into_user();
    m.code(|a| a.int(0x80));
    m.step(1);
    m.assert_in_handler(13);
    assert_eq!(m.stack::<u64>(0), 0x80 << 3 | 2, "IDT bit set, EXT clear");
    assert_eq!(m.stack::<u64>(1), at::CODE, "a fault in INT n leaves RIP at it");

    let mut m = Machine::long().into_user();
    m.set_gate64(0x80, sel::CODE64, Machine::handler(0x80), 0xee, 0);
    let len = m.code(|a| a.int(0x80)) as u64;
    m.step(1);
    m.assert_in_handler(0x80);
    assert_eq!(m.stack::<u64>(0), at::CODE + len);
    assert_eq!(m.stack::<u64>(2) & rflags::RF, 0);
}

#[test]
fn the_interrupt_stack_table_is_used_at_every_level() {
    for user in [false, true] {
        let mut m = Machine::long();
        m.put(at::TSS + 0x24, 0x5008u64);
        m.put(at::TSS + 0x54, 0x4ff0u64);
        m.set_gate64(6, sel::CODE64, Machine::handler(6), 0x8e, 1);
        m.set_gate64(13, sel::CODE64, Machine::handler(13), 0x8e, 7);
        let mut m = if user { m.into_user() } else { m };
        m.code(|a| a.ud2());
        m.step(1);
        m.assert_in_handler(6);
        assert_eq!(m.reg(gpr::RSP), 0x5000 - 40);
        let selector = if user { 0 } else { sel::DATA };
        assert_eq!(m.vcpu.segments[seg::SS].selector, selector, "SS is only changed with the level");
        m.code(|a| a.int(0xff));
        m.vcpu.idtr.limit = 0xff0;
        m.step(1);
        m.assert_in_handler(13);
        assert_eq!(m.reg(gpr::RSP), 0x4ff0 - 48);
        assert_eq!(m.stack::<u64>(0), 0xff << 3 | 2);
    }
}

#[test]
fn a_conforming_handler_stays_at_its_level() {
    let mut m = Machine::long();
    m.set_descriptor(sel::FREE, crate::testing::descriptor(0, 0xfffff, 0x9f, 0xa));
    m.set_gate64(6, sel::FREE, Machine::handler(6), 0x8e, 0);
    let mut m = m.into_user();
    m.code(|a| a.ud2());
    m.step(1);
    m.assert_in_handler(6);
    assert_eq!((m.vcpu.cpl, m.vcpu.segments[seg::CS].selector), (3, sel::FREE | 3));
    assert_eq!(m.reg(gpr::RSP), at::USER_STACK - 40);
}

#[test]
fn gates_and_code_segments_must_be_64_bit() {
    // (gate selector, access byte, error code of #GP or #NP, vector)
    let cases = [
        (sel::CODE32, 0x8e, sel::CODE32 | 1, 13),
        (sel::DATA, 0x8e, sel::DATA | 1, 13),
        (0, 0x8e, 1, 13),
        (0x1f8, 0x8e, 0x1f9, 13),
        (0x2f8, 0x8e, 0x2f9, 13),
        (sel::USER_CODE64 & !3, 0x8e, sel::USER_CODE64 & !3 | 1, 13),
        (sel::CODE64, 0x0e, 6 << 3 | 3, 11),
        (sel::CODE64, 0x86, 6 << 3 | 3, 13),
        (sel::CODE64, 0x85, 6 << 3 | 3, 13),
    ];
    for (selector, access, error, vector) in cases {
        let mut m = Machine::long();
        m.set_gate64(6, selector, Machine::handler(6), access, 0);
        m.code(|a| a.ud2());
        m.step(1);
        m.assert_in_handler(vector);
        assert_eq!(m.stack::<u64>(0), u64::from(error), "selector {selector:#x}, access {access:#x}");
    }
}

#[test]
fn a_handler_at_a_non_canonical_address_is_refused() {
    let mut m = Machine::long();
    m.set_gate64(6, sel::CODE64, 1 << 47, 0x8e, 0);
    m.code(|a| a.ud2());
    m.step(1);
    m.assert_in_handler(13);
    assert_eq!(m.stack::<u64>(0), 1);
}

#[test]
fn compatibility_mode_enters_64_bit_handlers() {
    let mut m = Machine::long();
    m.set_data(sel::USER_DATA);
    m.set_cs(sel::USER_CODE32);
    m.set_reg(gpr::RSP, at::USER_STACK);
    m.code(|a| a.ud2());
    m.code_at(Machine::handler(6), |a| a.nop());
    m.step(1);
    m.assert_in_handler(6);
    assert!(m.vcpu.in_64bit());
    assert_eq!(m.stack::<u64>(1), u64::from(sel::USER_CODE32));
    m.code(|a| a.iretq());
    m.step(1);
    assert!(!m.vcpu.in_64bit());
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl, m.reg(gpr::RSP)), (at::CODE, 3, at::USER_STACK));
}

#[test]
fn page_faults_set_cr2_and_the_error_code() {
    let mut m = Machine::long().into_user();
    // 0xa00000 is not present.
    m.put(at::PAGES + 0x2000 + 8 * 5, 0u64);
    m.code(|a| a.mov(qword_ptr(0xa0_1234), rax));
    m.step(1);
    m.assert_in_handler(14);
    assert_eq!(m.vcpu.cr2, 0xa0_1234);
    assert_eq!(m.stack::<u64>(0), 6, "write, user");
}
