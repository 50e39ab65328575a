//! Hardware task switches.

use iced_x86::code_asm::*;
use platform::x86::{cr0, cr4, gpr, rflags, seg};

use crate::testing::{Machine, at, descriptor, gate, sel};

/// The other task: its TSS and its code.
const OTHER: u64 = 0x4000;
const OTHER_CODE: u64 = 0x9000;
/// Selectors of its TSS, of a task gate to it, and of one more descriptor.
const OTHER_TSS: u16 = sel::FREE;
const TASK_GATE: u16 = sel::FREE + 8;
const SPARE: u16 = sel::FREE + 16;

fn put_task(m: &mut Machine, flags: u32) {
    m.set_descriptor(OTHER_TSS, descriptor(OTHER as u32, 0x67, 0x89, 0));
    m.set_descriptor(TASK_GATE, gate(OTHER_TSS, 0, 0x85, 0));
    m.put(OTHER + 0x20, OTHER_CODE as u32);
    m.put(OTHER + 0x24, flags);
    for r in 0..8 {
        m.put(OTHER + 0x28 + 4 * r, 0x1111_1111u32 * r as u32);
    }
    m.put(OTHER + 0x38, 0x5800u32);
    for (i, selector) in [sel::DATA, sel::CODE32, sel::DATA, sel::DATA, sel::DATA16, 0].into_iter().enumerate() {
        m.put(OTHER + 0x48 + 4 * i as u64, selector);
    }
}

fn machine() -> Machine {
    let mut m = Machine::protected();
    // The current task is busy in the GDT too.
    m.set_descriptor(sel::TSS, descriptor(at::TSS as u32, 0x2fff, 0x8b, 0));
    put_task(&mut m, 2);
    for r in [0, 1, 2, 3, 5, 6, 7] {
        m.set_reg(r, 0xa0 + r as u64);
    }
    m
}

fn kind(m: &Machine, selector: u16) -> u8 {
    m.get::<u8>(at::GDT + u64::from(selector) + 5) & 15
}

/// JMP or CALL to a selector; the offset does not count.
fn far(opcode: u8, selector: u16) -> [u8; 7] {
    let [low, high] = selector.to_le_bytes();
    [opcode, 0xef, 0xbe, 0xad, 0xde, low, high]
}

const JMP: u8 = 0xea;
const CALL: u8 = 0x9a;

#[track_caller]
fn assert_in_other(m: &Machine) {
    assert_eq!(m.vcpu.rip(), OTHER_CODE);
    assert_eq!((m.reg(gpr::RAX), m.reg(gpr::RDI), m.reg(gpr::RSP)), (0, 0x7777_7777, 0x5800));
    assert_eq!(m.vcpu.segments[seg::FS], m.segment(sel::DATA16));
    assert_eq!((m.vcpu.tr.selector, m.vcpu.tr.base, m.vcpu.tr.access), (OTHER_TSS, OTHER, 0x8b));
    assert_ne!(m.vcpu.cr0 & cr0::TS, 0);
    assert_eq!(kind(m, OTHER_TSS), 11, "the new task is busy");
}

#[test]
fn jmp_to_a_task_and_back() {
    for selector in [OTHER_TSS, TASK_GATE] {
        let mut m = machine();
        m.bytes(&far(JMP, selector));
        m.step(1);
        assert_in_other(&m);
        assert_eq!(kind(&m, sel::TSS), 9, "the old task is available");
        assert_eq!(m.vcpu.rflags() & rflags::NT, 0);
        assert_eq!(m.get::<u32>(at::TSS + 0x20), at::CODE as u32 + 7);
        assert_eq!((m.get::<u32>(at::TSS + 0x28), m.get::<u32>(at::TSS + 0x38)), (0xa0, at::STACK as u32));
        assert_eq!((m.get::<u16>(at::TSS + 0x4c), m.get::<u16>(at::TSS + 0x50)), (sel::CODE32, sel::DATA));
        m.bytes(&far(JMP, sel::TSS));
        m.step(1);
        assert_eq!((m.vcpu.rip(), m.reg(gpr::RDI)), (at::CODE + 7, 0xa7));
        assert_eq!((kind(&m, sel::TSS), kind(&m, OTHER_TSS)), (11, 9));
    }
}

#[test]
fn call_nests_and_iret_returns() {
    let mut m = machine();
    m.bytes(&far(CALL, TASK_GATE));
    m.step(1);
    assert_in_other(&m);
    assert_eq!(kind(&m, sel::TSS), 11, "the old task stays busy");
    assert_ne!(m.vcpu.rflags() & rflags::NT, 0);
    assert_eq!(m.get::<u16>(OTHER), sel::TSS, "back link");
    m.code(|a| a.iretd());
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.reg(gpr::RBX), m.vcpu.tr.selector), (at::CODE + 7, 0xa3, sel::TSS));
    assert_eq!((kind(&m, sel::TSS), kind(&m, OTHER_TSS)), (11, 9));
    assert_eq!(m.vcpu.rflags() & rflags::NT, 0);
    assert_eq!(m.get::<u32>(OTHER + 0x24) & rflags::NT as u32, 0, "NT is clear in the saved flags");
    assert_eq!(m.get::<u32>(OTHER + 0x20), OTHER_CODE as u32 + 1);
}

#[test]
fn an_exception_through_a_task_gate_pushes_its_error_code_there() {
    let mut m = machine();
    m.set_gate(13, gate(OTHER_TSS, 0, 0x85, 0));
    let mut m = m.into_user();
    m.code(|a| a.int(0x80));
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl, m.reg(gpr::RSP)), (OTHER_CODE, 0, 0x5800 - 4));
    assert_eq!(m.stack::<u32>(0), 0x80 << 3 | 2);
    assert_eq!(m.get::<u32>(at::TSS + 0x20), at::CODE as u32, "the faulting instruction");
    assert_ne!(m.get::<u32>(at::TSS + 0x24) & rflags::RF as u32, 0);
    assert_ne!(m.vcpu.rflags() & rflags::NT, 0);
    m.code(|a| {
        a.add(esp, 4)?;
        a.iretd()
    });
    m.step(2);
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl, m.reg(gpr::RSP)), (at::CODE, 3, at::USER_STACK));
}

#[test]
fn a_16_bit_task() {
    let mut m = machine();
    m.set_descriptor(SPARE, descriptor(0x5000, 0x2b, 0x81, 0));
    m.put(0x500e, OTHER_CODE as u16);
    m.put(0x5010, 0x202u16);
    m.put(0x5012, 0x1234u16);
    m.put(0x501a, 0x5800u16);
    for (i, selector) in [sel::DATA, sel::CODE32, sel::DATA, sel::DATA].into_iter().enumerate() {
        m.put(0x5022 + 2 * i as u64, selector);
    }
    m.bytes(&far(CALL, SPARE));
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.reg(gpr::RAX), m.reg(gpr::RSP)), (OTHER_CODE, 0x1234, 0x5800));
    assert_eq!((m.vcpu.segments[seg::FS].selector, m.vcpu.tr.access), (0, 0x83));
    assert_eq!(m.vcpu.rflags(), rflags::IF | rflags::NT | rflags::FIXED);
    m.set_reg(gpr::RDX, 0xbeef);
    m.code(|a| a.iretd());
    m.step(1);
    assert_eq!(m.vcpu.rip(), at::CODE + 7);
    assert_eq!(m.get::<u16>(0x5016), 0xbeef);
    assert_eq!(kind(&m, SPARE), 1);
}

#[test]
fn into_virtual_8086_mode() {
    let mut m = machine();
    put_task(&mut m, rflags::VM as u32 | 2);
    m.put(OTHER + 0x20, 0x10u32);
    m.put(OTHER + 0x4c, 0x900u16);
    m.bytes(&far(JMP, OTHER_TSS));
    m.step(1);
    assert!(m.vcpu.v8086());
    assert_eq!((m.vcpu.cpl, m.vcpu.rip(), m.vcpu.segments[seg::CS].base), (3, 0x10, 0x9000));
    assert_eq!(m.vcpu.segments[seg::DS].base, u64::from(sel::DATA) << 4);
}

#[test]
fn cr3_is_loaded_when_paging_is_on() {
    let mut m = machine();
    // 4 MiB pages: the first at both addresses, the second different.
    for (table, second) in [(0x20_0000u64, 0x40_0000u32), (0x20_1000, 0)] {
        m.put(table, 0xe7u32);
        m.put(table + 4, second | 0xe7);
    }
    m.vcpu.cr4 |= cr4::PSE;
    m.vcpu.cr3 = 0x20_0000;
    m.vcpu.cr0 |= cr0::PG;
    m.vcpu.tlb.flush_all();
    m.put(OTHER + 0x1c, 0x20_1000u32);
    m.put(0x40_0000 + 0x5000, 0x11u8);
    m.put(0x5000, 0x22u8);
    m.bytes(&far(JMP, OTHER_TSS));
    m.step(1);
    assert_eq!(m.vcpu.cr3, 0x20_1000);
    m.code(|a| a.mov(al, byte_ptr(0x40_5000)));
    m.step(1);
    assert_eq!(m.reg(gpr::RAX), 0x22);
}

#[test]
fn the_t_flag_raises_a_debug_trap() {
    let mut m = machine();
    m.put(OTHER + 0x64, 1u16);
    m.vcpu.dr7 |= 0x101;
    m.bytes(&far(JMP, OTHER_TSS));
    m.step(2);
    m.assert_in_handler(1);
    assert_eq!(m.stack::<u32>(0), OTHER_CODE as u32);
    assert_ne!(m.vcpu.dr6 & 1 << 15, 0);
    assert_eq!(m.vcpu.dr7 & 0x1ff, 0, "local breakpoints end with their task");
}

/// Changes the machine before the switch.
type Change = fn(&mut Machine);

#[test]
fn what_is_refused_before_the_switch() {
    let tss = u32::from(OTHER_TSS);
    let cases: [(Change, u8, u32); 6] = [
        (|m| m.set_descriptor(OTHER_TSS, descriptor(OTHER as u32, 0x67, 0x8b, 0)), 13, tss),
        (|m| m.set_descriptor(OTHER_TSS, descriptor(OTHER as u32, 0x67, 0x09, 0)), 11, tss),
        (|m| m.set_descriptor(OTHER_TSS, descriptor(OTHER as u32, 0x66, 0x89, 0)), 10, tss),
        (|m| m.set_descriptor(TASK_GATE, gate(OTHER_TSS | 4, 0, 0x85, 0)), 13, tss | 4),
        (|m| m.set_descriptor(TASK_GATE, gate(0x208, 0, 0x85, 0)), 13, 0x208),
        (|m| m.set_descriptor(TASK_GATE, gate(OTHER_TSS, 0, 0x05, 0)), 11, u32::from(TASK_GATE)),
    ];
    for (i, (change, vector, error)) in cases.into_iter().enumerate() {
        let mut m = machine();
        change(&mut m);
        m.bytes(&far(JMP, TASK_GATE));
        m.step(1);
        m.assert_in_handler(vector);
        assert_eq!((m.stack::<u32>(0), m.stack::<u32>(1)), (error, at::CODE as u32), "case {i}");
        assert_eq!(m.vcpu.tr.selector, sel::TSS);
        assert_eq!(kind(&m, sel::TSS), 11);
    }
}

#[test]
fn what_is_refused_in_the_new_task() {
    let spare = u32::from(SPARE);
    let segment = |index: u64| OTHER + 0x48 + 4 * index;
    // (offset in the new TSS, selector, descriptor at SPARE, vector, error code)
    let cases = [
        (OTHER + 0x60, SPARE, descriptor(0, 0xff, 0x89, 0), 10, spare),
        (OTHER + 0x60, SPARE, descriptor(0, 0xff, 0x02, 0), 10, spare),
        (OTHER + 0x60, SPARE | 4, descriptor(0, 0xff, 0x82, 0), 10, spare | 4),
        (segment(1), 0, 0, 10, 0),
        (segment(1), sel::DATA, 0, 10, u32::from(sel::DATA)),
        (segment(1), SPARE, descriptor(0, 0xfffff, 0x1b, 0xc), 11, spare),
        (segment(1), SPARE, descriptor(0, 0xfffff, 0xbb, 0xc), 10, spare),
        (segment(1), SPARE, descriptor(0, 0x8fff, 0x9b, 0x4), 13, 0),
        (segment(3), SPARE, descriptor(0, 0xfffff, 0x13, 0xc), 11, spare),
        (segment(3), SPARE, descriptor(0, 0xfffff, 0x99, 0xc), 10, spare),
        (segment(5), 0x208, 0, 10, 0x208),
    ];
    for (i, (address, selector, raw, vector, error)) in cases.into_iter().enumerate() {
        let mut m = machine();
        m.put(address, selector);
        m.set_descriptor(SPARE, raw);
        // A task gives the handler a stack even where the new one's is not loaded yet.
        m.set_descriptor(SPARE + 8, descriptor(0x5000, 0x67, 0x89, 0));
        put_handler_task(&mut m);
        for v in 10..=13 {
            m.set_gate(v, gate(SPARE + 8, 0, 0x85, 0));
        }
        m.bytes(&far(JMP, OTHER_TSS));
        m.step(1);
        assert_eq!(m.vcpu.rip(), 0xa800, "case {i}");
        assert_eq!(m.stack::<u32>(0), error, "case {i}, vector {vector}");
        assert_eq!(m.get::<u16>(0x5000), OTHER_TSS, "the exception is the new task's");
        assert_eq!(m.get::<u32>(OTHER + 0x20), OTHER_CODE as u32);
    }
}

fn put_handler_task(m: &mut Machine) {
    m.put(0x5020, 0xa800u32);
    m.put(0x5024, 2u32);
    m.put(0x5038, 0x5f00u32);
    for (i, selector) in [sel::DATA, sel::CODE32, sel::DATA, sel::DATA, 0, 0].into_iter().enumerate() {
        m.put(0x5048 + 4 * i as u64, selector);
    }
}

#[test]
fn the_new_stack_must_suit_the_new_level() {
    let mut m = machine();
    m.put(OTHER + 0x50, sel::USER_DATA);
    m.set_descriptor(SPARE + 8, descriptor(0x5000, 0x67, 0x89, 0));
    put_handler_task(&mut m);
    m.set_gate(10, gate(SPARE + 8, 0, 0x85, 0));
    m.bytes(&far(JMP, OTHER_TSS));
    m.step(1);
    assert_eq!(m.stack::<u32>(0), u32::from(sel::USER_DATA & !3));
}

#[test]
fn iret_to_a_task_that_is_not_busy() {
    let mut m = machine();
    m.put(at::TSS, OTHER_TSS);
    m.set_flags(rflags::NT, 0);
    m.code(|a| a.iretd());
    m.step(1);
    m.assert_in_handler(10);
    assert_eq!(m.stack::<u32>(0), u32::from(OTHER_TSS));
}

#[test]
fn long_mode_has_no_task_switches() {
    let mut m = Machine::long();
    put_task(&mut m, 2);
    m.set_flags(rflags::NT, 0);
    m.code(|a| a.iretq());
    m.step(1);
    m.assert_in_handler(13);
    for selector in [OTHER_TSS, TASK_GATE] {
        let mut m = Machine::long();
        put_task(&mut m, 2);
        m.put(0x5000, 0u32);
        m.put(0x5004, selector);
        m.bytes(&[0xff, 0x2c, 0x25, 0x00, 0x50, 0x00, 0x00]);
        m.step(1);
        m.assert_in_handler(13);
        assert_eq!(m.stack::<u64>(0), u64::from(selector));
    }
}
