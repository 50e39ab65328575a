//! Interrupt, trap and call gates (SDM vol. 3, 5.8 and chapter 6): what they check, push and change; far transfers.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use platform::x86::{gpr, rflags, seg};
use vmm::EngineKind;

use crate::harness::{Frame, Machine, at, descriptor, gate, handler, sel};

crate::stamp! {
    everywhere: interrupt_gates_of_64_bit_mode, stack_tables_of_64_bit_mode,
        far_transfers_check_the_code_segment;
    software: interrupt_gates_clear_the_flag, gates_of_16_bit, gates_check_themselves, gates_check_their_target,
        faults_on_the_way_in_are_external, rings_of_protected_mode, conforming_handlers_stay_in_their_ring,
        bad_stacks_for_the_inner_ring, returns_to_the_outer_ring_take_segments_away, returns_go_outward_only,
        call_gates_within_a_ring, call_gates_copy_parameters, call_gates_check_privilege, call_gates_of_64_bit_mode,
        gates_of_64_bit_mode_lead_to_64_bit_code, far_calls_and_returns, rings_of_64_bit_mode
}

const TS: u8 = 10;
const NP: u8 = 11;
const GP: u8 = 13;
/// A vector for INT n.
const VECTOR: u8 = 0x40;
const OWN: u16 = sel::FREE;

/// The error code that names an IDT entry.
fn names_gate(vector: u8) -> u64 {
    u64::from(vector) * 8 + 2
}

fn int_own(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.int(i32::from(VECTOR))
}

fn interrupt_gates_clear_the_flag(engine: EngineKind) {
    for (access, stays) in [(0x8e, false), (0x8f, true)] {
        let mut machine = Machine::protected(engine);
        machine.set_gate(VECTOR, gate(sel::CODE32, handler(VECTOR) as u32, access, 0));
        machine.set_flags(rflags::IF | rflags::NT | rflags::CF, 0);
        machine.code(int_own);
        machine.run_to_handler(VECTOR);
        let frame = machine.frame(false);
        let pushed = rflags::IF | rflags::NT | rflags::CF | rflags::FIXED;
        assert_eq!((frame.rip, frame.cs, frame.flags), (at::CODE + 2, sel::CODE32, pushed));
        let expected = rflags::CF | rflags::FIXED | if stays { rflags::IF } else { 0 };
        assert_eq!(machine.state.rflags, expected);
        assert_eq!(machine.reg(gpr::RSP), at::STACK - 12);
    }
}

fn gates_of_16_bit(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.set_gate(VECTOR, gate(sel::CODE32, handler(VECTOR) as u32, 0x86, 0));
    machine.code(int_own);
    machine.run_to_handler(VECTOR);
    assert_eq!(machine.reg(gpr::RSP), at::STACK - 6);
    let frame: Vec<_> = (0..3).map(|n| machine.stack(n, 2)).collect();
    assert_eq!(frame, [at::CODE + 2, u64::from(sel::CODE32), rflags::FIXED]);
}

fn gates_check_themselves(engine: EngineKind) {
    let good = gate(sel::CODE32, handler(VECTOR) as u32, 0x8e, 0);
    let with_access = |access: u64| good & !(0xff << 40) | access << 40;
    for (entry, idt_limit, vector, error) in [
        (with_access(0x0e), 0x7ff, NP, names_gate(VECTOR)),
        (with_access(0x82), 0x7ff, GP, names_gate(VECTOR)),
        (with_access(0x92), 0x7ff, GP, names_gate(VECTOR)),
        (with_access(0x8c), 0x7ff, GP, names_gate(VECTOR)),
        (0, 0x7ff, GP, names_gate(VECTOR)),
        (good, u16::from(VECTOR) * 8 + 6, GP, names_gate(VECTOR)),
        (good, u16::from(VECTOR) * 8 - 1, GP, names_gate(VECTOR)),
    ] {
        let mut machine = Machine::protected(engine);
        machine.set_gate(VECTOR, entry);
        machine.state.idtr.limit = idt_limit;
        machine.code(int_own);
        machine.run_to_handler(vector);
        assert_eq!((machine.frame(true).error, machine.frame(true).rip), (error, at::CODE));
    }
    // From ring 3, INT n needs a gate of DPL 3; exceptions do not.
    let mut machine = Machine::protected(engine);
    machine.enter_user();
    machine.code(int_own);
    machine.run_to_handler(GP);
    assert_eq!(machine.frame(true).error, names_gate(VECTOR));
    let mut machine = Machine::protected(engine);
    machine.enter_user();
    machine.code(|a| a.ud2());
    machine.run_to_handler(6);
    assert_eq!(machine.frame(false).cs, sel::USER_CODE32);
}

fn gates_check_their_target(engine: EngineKind) {
    for (selector, own, vector, error) in [
        (0, 0, GP, 0),
        (sel::DATA, 0, GP, u64::from(sel::DATA)),
        (OWN, descriptor(0, 0xfffff, 0x1a, 0xc), NP, u64::from(OWN)),
        (OWN, descriptor(0, 0xfffff, 0xfa, 0xc), GP, u64::from(OWN)),
        (0x100, 0, GP, 0x100),
    ] {
        let mut machine = Machine::protected(engine);
        machine.set_descriptor(OWN, own);
        machine.set_gate(VECTOR, gate(selector, handler(VECTOR) as u32, 0x8e, 0));
        machine.code(int_own);
        machine.run_to_handler(vector);
        assert_eq!(machine.frame(true).error, error, "{selector:#x}");
    }
    // An offset beyond the code segment's limit.
    let mut machine = Machine::protected(engine);
    machine.set_descriptor(OWN, descriptor(0, 0x7fff, 0x9a, 4));
    machine.set_gate(VECTOR, gate(OWN, handler(VECTOR) as u32, 0x8e, 0));
    machine.code(int_own);
    machine.run_to_handler(GP);
    assert_eq!(machine.frame(true).error, 0);
}

/// What goes wrong with the delivery of a fault, rather than of INT n, sets EXT in the error code.
fn faults_on_the_way_in_are_external(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.set_gate(6, gate(sel::CODE32, 0, 0x0e, 0));
    machine.code(|a| a.ud2());
    machine.run_to_handler(NP);
    assert_eq!((machine.frame(true).error, machine.frame(true).rip), (names_gate(6) | 1, at::CODE));
    let mut machine = Machine::protected(engine);
    machine.set_gate(3, gate(sel::CODE32, 0, 0x0e, 0));
    machine.code(|a| a.int3());
    machine.run_to_handler(NP);
    assert_eq!(machine.frame(true).error, names_gate(3));
}

/// Into ring 0 on the stack of the task state segment, and back by IRET.
fn rings_of_protected_mode(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.open_gate(VECTOR);
    machine.open_gate(3);
    let inner = at::CODE + 0x400;
    machine.set_gate(VECTOR, gate(sel::CODE32, inner as u32, 0xee, 0));
    machine.code_at(inner, |a| {
        a.mov(esi, esp)?;
        a.mov(ecx, ss)?;
        a.mov(edx, cs)?;
        a.iretd()
    });
    machine.enter_user();
    machine.set_flags(rflags::IF, 0);
    machine.code(|a| {
        int_own(a)?;
        a.mov(ebx, esp)?;
        a.mov(edi, ss)?;
        a.int3()
    });
    machine.run_to_handler(3);
    assert_eq!(machine.reg(gpr::RSI), at::STACK - 20);
    assert_eq!((machine.reg(gpr::RCX), machine.reg(gpr::RDX)), (u64::from(sel::DATA), u64::from(sel::CODE32)));
    assert_eq!((machine.reg(gpr::RBX), machine.reg(gpr::RDI)), (at::USER_STACK, u64::from(sel::USER_DATA)));
    let frame = machine.frame(false);
    assert_eq!((frame.cs, frame.rsp, frame.ss), (sel::USER_CODE32, at::USER_STACK, sel::USER_DATA));
    assert_eq!(frame.flags, rflags::IF | rflags::FIXED);
}

/// A gate to conforming code does not change rings; nor does it switch stacks.
fn conforming_handlers_stay_in_their_ring(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.set_descriptor(OWN, descriptor(0, 0xfffff, 0x9e, 0xc));
    machine.set_gate(VECTOR, gate(OWN, handler(VECTOR) as u32, 0xee, 0));
    machine.enter_user();
    machine.set_flags(rflags::IOPL, 0);
    machine.code(int_own);
    machine.run_to_handler(VECTOR);
    assert_eq!(machine.state.segments[seg::CS].selector, OWN | 3);
    assert_eq!(machine.reg(gpr::RSP), at::USER_STACK - 12);
}

/// The task state segment names a stack that ring 0 cannot use. The handler is conforming code, which needs no new stack.
fn bad_stacks_for_the_inner_ring(engine: EngineKind) {
    let own = |access| descriptor(0, 0xfffff, access, 0xc);
    let next = OWN + 8;
    for (selector, entry, vector, error) in [
        (0, 0, TS, 0),
        (next, own(0xf2), TS, u64::from(next)),
        (next, own(0x90), TS, u64::from(next)),
        (next, own(0x12), 12, u64::from(next)),
        (next | 1, own(0x92), TS, u64::from(next)),
        (0x100, 0, TS, 0x100),
    ] {
        let mut machine = Machine::protected(engine);
        machine.set_descriptor(OWN, own(0x9e));
        machine.set_descriptor(next, entry);
        machine.put32(at::TSS + 8, u32::from(selector));
        machine.open_gate(VECTOR);
        for fault in [TS, 12] {
            machine.set_gate(fault, gate(OWN, handler(fault) as u32, 0x8e, 0));
        }
        machine.enter_user();
        machine.set_flags(rflags::IOPL, 0);
        machine.code(int_own);
        machine.run_to_handler(vector);
        assert_eq!((machine.frame(true).error, machine.frame(true).rip), (error, at::USER_CODE), "{selector:#x}");
    }
}

/// Writes a frame for IRETD or RETF on the stack and points ESP to it.
fn put_frame(machine: &mut Machine, words: &[u64]) {
    let bottom = at::STACK - 4 * words.len() as u64;
    for (n, word) in (0..).zip(words) {
        machine.put32(bottom + 4 * n, *word as u32);
    }
    machine.state.gpr[gpr::RSP] = bottom;
}

fn returns_to_the_outer_ring_take_segments_away(engine: EngineKind) {
    for far in [false, true] {
        let mut machine = Machine::protected(engine);
        machine.open_gate(3);
        machine.set_descriptor(OWN, descriptor(0, 0xfffff, 0x9e, 0xc));
        machine.state.segments[seg::ES] = machine.segment(sel::USER_DATA);
        machine.state.segments[seg::FS] = machine.segment(OWN);
        let (code, stack) = (u64::from(sel::USER_CODE32), u64::from(sel::USER_DATA));
        let frame = [at::USER_CODE, code, rflags::FIXED, at::USER_STACK, stack];
        let words = if far { vec![frame[0], frame[1], frame[3], frame[4]] } else { frame.to_vec() };
        put_frame(&mut machine, &words);
        machine.code(|a| if far { a.retf() } else { a.iretd() });
        machine.code_at(at::USER_CODE, |a| a.int3());
        machine.run_to_handler(3);
        let selector = |index: usize| machine.state.segments[index].selector;
        assert_eq!((selector(seg::DS), selector(seg::GS)), (0, 0), "ring 0 data is gone");
        assert_eq!((selector(seg::ES), selector(seg::FS)), (sel::USER_DATA, OWN), "the rest stays");
        assert_eq!(machine.frame(false).rsp, at::USER_STACK);
    }
}

fn returns_go_outward_only(engine: EngineKind) {
    for far in [false, true] {
        let mut machine = Machine::protected(engine);
        machine.enter_user();
        let bottom = at::USER_STACK - 16;
        machine.put32(bottom, at::CODE as u32);
        machine.put32(bottom + 4, u32::from(sel::CODE32));
        machine.put32(bottom + 8, rflags::FIXED as u32);
        machine.state.gpr[gpr::RSP] = bottom;
        machine.code(|a| if far { a.retf() } else { a.iretd() });
        machine.run_to_handler(GP);
        let frame = machine.frame(true);
        assert_eq!((frame.error, frame.rip, frame.rsp), (u64::from(sel::CODE32), at::USER_CODE, bottom));
    }
}

/// Calls a far pointer at [`at::DATA`].
fn call_pointer(machine: &mut Machine, offset: u64, selector: u16) {
    machine.put32(at::DATA, offset as u32);
    machine.put16(at::DATA + 4, selector);
}

fn call_gates_within_a_ring(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    let target = at::CODE + 0x400;
    machine.set_descriptor(OWN, gate(sel::CODE32, target as u32, 0x8c, 0));
    machine.code_at(target, |a| {
        a.mov(esi, esp)?;
        a.mov(ebx, 1)?;
        a.retf()
    });
    call_pointer(&mut machine, 0xffff_ffff, OWN);
    machine.code(|a| {
        a.call(fword_ptr(at::DATA))?;
        a.inc(ebx)
    });
    machine.run_to_end();
    assert_eq!((machine.reg(gpr::RBX), machine.reg(gpr::RSI)), (2, at::STACK - 8));
    // JMP goes through as well, and pushes nothing.
    let mut machine = Machine::protected(engine);
    machine.set_descriptor(OWN, gate(sel::CODE32, handler(0x99) as u32, 0x8c, 0));
    call_pointer(&mut machine, 0, OWN);
    machine.code(|a| a.jmp(fword_ptr(at::DATA)));
    machine.run_to_handler(0x99);
    assert_eq!(machine.reg(gpr::RSP), at::STACK);
}

/// From ring 3 into ring 0 with two parameters, and back by RETF 8.
fn call_gates_copy_parameters(engine: EngineKind) {
    for wide in [true, false] {
        let mut machine = Machine::protected(engine);
        let target = at::CODE + 0x400;
        machine.open_gate(3);
        machine.set_descriptor(OWN, gate(sel::CODE32, target as u32, if wide { 0xec } else { 0xe4 }, 2));
        machine.code_at(target, |a| {
            a.mov(esi, esp)?;
            if wide {
                a.mov(ecx, dword_ptr(esp + 8))?;
                a.mov(edx, dword_ptr(esp + 12))?;
                a.retf_1(8)
            } else {
                a.movzx(ecx, word_ptr(esp + 4))?;
                a.movzx(edx, word_ptr(esp + 6))?;
                a.db(&[0x66])?;
                a.retf_1(4)
            }
        });
        call_pointer(&mut machine, 0, OWN | 3);
        machine.enter_user();
        machine.code(|a| {
            if wide {
                a.push(0x1111)?;
                a.push(0x2222)?;
            } else {
                a.push(0x1111_2222)?;
            }
            a.call(fword_ptr(at::DATA))?;
            a.mov(edi, esp)?;
            a.int3()
        });
        machine.run_to_handler(3);
        assert_eq!((machine.reg(gpr::RCX), machine.reg(gpr::RDX)), (0x2222, 0x1111));
        assert_eq!(machine.reg(gpr::RSI), at::STACK - if wide { 24 } else { 12 });
        assert_eq!(machine.reg(gpr::RDI), at::USER_STACK, "RETF n takes the parameters off both stacks");
        assert_eq!(machine.frame(false).cs, sel::USER_CODE32);
    }
}

fn call_gates_check_privilege(engine: EngineKind) {
    let inner = |access| gate(sel::CODE32, handler(0x99) as u32, access, 0);
    for (entry, selector, user, jump, vector, error) in [
        (inner(0x8c), OWN | 3, true, false, GP, OWN),        // the gate's DPL
        (inner(0x8c), OWN | 3, false, false, GP, OWN),       // the selector's RPL counts too
        (inner(0xec), OWN | 3, true, true, GP, sel::CODE32), // JMP cannot change rings
        (inner(0x6c), OWN | 3, true, false, NP, OWN),        // not present
        (gate(sel::DATA, 0, 0xec, 0), OWN, false, false, GP, sel::DATA),
        (gate(0, 0, 0xec, 0), OWN, false, false, GP, 0),
        (gate(sel::USER_CODE32, 0, 0xec, 0), OWN, false, false, GP, sel::USER_CODE32 & !3), // outward
    ] {
        let mut machine = Machine::protected(engine);
        machine.set_descriptor(OWN, entry);
        call_pointer(&mut machine, 0, selector);
        if user {
            machine.enter_user();
        }
        let start = machine.state.rip;
        machine.code(|a| if jump { a.jmp(fword_ptr(at::DATA)) } else { a.call(fword_ptr(at::DATA)) });
        machine.run_to_handler(vector);
        let frame = machine.frame(true);
        assert_eq!((frame.error, frame.rip), (u64::from(error), start), "{entry:#x}");
    }
}

fn far_transfers_check_the_code_segment(engine: EngineKind) {
    for (own, selector, outcome) in [
        (descriptor(0, 0xfffff, 0x9a, 0xc), OWN, None),
        (descriptor(0, 0xfffff, 0x98, 0xc), OWN, None),
        (descriptor(0, 0xfffff, 0x9c, 0xc), OWN | 3, None),
        (descriptor(0, 0xfffff, 0x9a, 0xc), OWN | 3, Some((GP, OWN))),
        (descriptor(0, 0xfffff, 0xfa, 0xc), OWN, Some((GP, OWN))),
        (descriptor(0, 0xfffff, 0xfe, 0xc), OWN, Some((GP, OWN))),
        (descriptor(0, 0xfffff, 0x1a, 0xc), OWN, Some((NP, OWN))),
        (descriptor(0, 0xfffff, 0x92, 0xc), OWN, Some((GP, OWN))),
        (descriptor(0, 0xfffff, 0x82, 0xc), OWN, Some((GP, OWN))),
        (0, 0, Some((GP, 0))),
        (0, 0x100, Some((GP, 0x100))),
        (descriptor(0, 0x7fff, 0x9a, 4), OWN, Some((GP, 0))),
    ] {
        let mut machine = Machine::protected(engine);
        machine.set_descriptor(OWN, own);
        call_pointer(&mut machine, handler(0x99), selector);
        machine.code(|a| a.jmp(fword_ptr(at::DATA)));
        match outcome {
            None => {
                machine.run_to_handler(0x99);
                assert_eq!(machine.state.segments[seg::CS].selector, OWN, "RPL becomes CPL");
                assert_eq!(machine.get8(at::GDT + u64::from(OWN) + 5) & 1, 1, "accessed");
            }
            Some((vector, error)) => {
                machine.run_to_handler(vector);
                let frame = machine.frame(true);
                assert_eq!((frame.error, frame.rip), (u64::from(error), at::CODE), "{own:#x}");
            }
        }
    }
}

/// Between code segments of 32 and 16 bits.
fn far_calls_and_returns(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    let target = at::CODE + 0x400;
    machine.code_of(16, target, |a| {
        a.mov(ax, 0x1234)?;
        a.mov(si, sp)?;
        a.db(&[0x66])?;
        a.retf()
    });
    call_pointer(&mut machine, target, sel::CODE16);
    machine.code(|a| {
        a.mov(eax, 0xffff_0000u32)?;
        a.call(fword_ptr(at::DATA))?;
        a.mov(ebx, cs)
    });
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RAX), 0xffff_1234);
    assert_eq!(machine.reg(gpr::RSI), at::STACK - 8);
    assert_eq!((machine.reg(gpr::RBX), machine.reg(gpr::RSP)), (u64::from(sel::CODE32), at::STACK));
}

fn interrupt_gates_of_64_bit_mode(engine: EngineKind) {
    for (access, stays) in [(0x8e, false), (0x8f, true)] {
        let mut machine = Machine::long(engine);
        machine.set_gate64(VECTOR, handler(VECTOR), access, 0);
        machine.set_flags(rflags::IF | rflags::CF, 0);
        machine.state.gpr[gpr::RSP] = at::STACK - 3;
        machine.code(int_own);
        machine.run_to_handler(VECTOR);
        assert_eq!(machine.state.rflags & rflags::IF != 0, stays);
        let expected = Frame {
            error: 0,
            rip: at::CODE + 2,
            cs: sel::CODE64,
            flags: rflags::IF | rflags::CF | rflags::FIXED,
            rsp: at::STACK - 3,
            ss: sel::DATA,
        };
        assert_eq!(machine.frame(false), expected, "SS and RSP are always pushed");
        assert_eq!(machine.reg(gpr::RSP), ((at::STACK - 3) & !15) - 40, "after alignment");
    }
}

fn stack_tables_of_64_bit_mode(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.put64(at::TSS + 0x24 + 8, at::OTHER_STACK);
    machine.set_gate64(GP, handler(GP), 0x8e, 2);
    machine.code(|a| {
        a.xor(eax, eax)?;
        a.mov(cr8, rax)?;
        a.mov(rax, -1i64)?;
        a.mov(cr8, rax)
    });
    machine.run_to_handler(GP);
    assert_eq!(machine.reg(gpr::RSP), at::OTHER_STACK - 48);
    let frame = machine.frame(true);
    assert_eq!((frame.error, frame.rsp, frame.ss), (0, at::STACK, sel::DATA));
    assert_eq!(machine.state.segments[seg::SS].selector, sel::DATA, "no change of rings, no new SS");
}

fn rings_of_64_bit_mode(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    let inner = at::CODE + 0x400;
    machine.set_gate64(VECTOR, inner, 0xee, 0);
    machine.open_gate(3);
    machine.code_at(inner, |a| {
        a.mov(rsi, rsp)?;
        a.mov(ecx, ss)?;
        a.iretq()
    });
    machine.enter_user();
    machine.code(|a| {
        a.mov(ecx, 7)?;
        int_own(a)?;
        a.mov(rbx, rsp)?;
        a.mov(edi, ss)?;
        a.int3()
    });
    machine.run_to_handler(3);
    assert_eq!((machine.reg(gpr::RSI), machine.reg(gpr::RCX)), (at::STACK - 40, 0), "SS is null in the inner ring");
    assert_eq!((machine.reg(gpr::RBX), machine.reg(gpr::RDI)), (at::USER_STACK, u64::from(sel::USER_DATA)));
    assert_eq!(machine.frame(false).cs, sel::USER_CODE64);
}

fn gates_of_64_bit_mode_lead_to_64_bit_code(engine: EngineKind) {
    for (low, high, error) in [
        (gate(sel::CODE32, handler(VECTOR) as u32, 0x8e, 0), 0, u64::from(sel::CODE32)),
        (gate(sel::CODE64, 0, 0x8e, 0), 0x8000, 0),
        (gate(sel::CODE64, handler(VECTOR) as u32, 0x86, 0), 0, names_gate(VECTOR)),
        (gate(sel::CODE64, handler(VECTOR) as u32, 0x85, 0), 0, names_gate(VECTOR)),
    ] {
        let mut machine = Machine::long(engine);
        machine.put64(at::IDT + 16 * u64::from(VECTOR), low);
        machine.put64(at::IDT + 16 * u64::from(VECTOR) + 8, high);
        machine.code(int_own);
        machine.run_to_handler(GP);
        assert_eq!((machine.frame(true).error, machine.frame(true).rip), (error, at::CODE), "{low:#x}");
    }
}

/// Call gates of 16 bytes, without parameters.
fn call_gates_of_64_bit_mode(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    let target = at::CODE + 0x400;
    machine.open_gate(3);
    machine.set_descriptor(OWN, gate(sel::CODE64, target as u32, 0xec, 0));
    machine.set_descriptor(OWN + 8, 0);
    machine.code_at(target, |a| {
        a.mov(rsi, rsp)?;
        a.mov(ecx, ss)?;
        a.db(&[0x48, 0xcb])
    });
    call_pointer(&mut machine, 0, OWN | 3);
    machine.enter_user();
    machine.code(|a| {
        a.mov(edi, at::DATA as u32)?;
        a.call(fword_ptr(rdi))?;
        a.mov(rbx, rsp)?;
        a.int3()
    });
    machine.run_to_handler(3);
    assert_eq!((machine.reg(gpr::RSI), machine.reg(gpr::RCX)), (at::STACK - 32, 0));
    assert_eq!(machine.reg(gpr::RBX), at::USER_STACK);
}
