//! Debugging by the guest (SDM vol. 3, chapter 19): single steps; breakpoints on code, data and ports.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use platform::x86::{cr4, gpr, rflags};
use vmm::EngineKind;

use crate::harness::{Access, Machine, PORT, at, gate, sel};

crate::stamp! {
    everywhere: ;
    software: steps_trap_after_each_instruction, steps_of_repeated_strings, steps_over_mov_ss, steps_into_handlers,
        popf_begins_stepping_one_later, int1_and_int3_are_traps, code_breakpoints_fault_before,
        resume_flag_skips_one_breakpoint, data_breakpoints_trap_after, data_breakpoints_have_a_length,
        breakpoints_on_repeated_strings, port_breakpoints_need_de, general_detect_guards_the_registers,
        disabled_breakpoints_do_not_trap, reserved_debug_registers, mov_ss_holds_data_breakpoints_off,
        breakpoints_of_a_page_crossing, debug_registers_hold_64_bits
}

const DB: u8 = 1;
const BP: u8 = 3;
const UD: u8 = 6;
const GP: u8 = 13;

/// DR6.
mod dr6 {
    pub(super) const FIXED: u64 = 0xffff_0ff0;
    pub(super) const BD: u64 = 1 << 13;
    pub(super) const BS: u64 = 1 << 14;
}

/// DR7 for breakpoint 0 with a kind and a length, enabled locally.
fn enable(kind: u64, length: u64) -> u64 {
    const LENGTHS: [u64; 9] = [0, 0, 1, 0, 3, 0, 0, 0, 2];
    0x400 | 1 | kind << 16 | LENGTHS[length as usize] << 18
}
const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const IO: u64 = 2;
const ACCESS: u64 = 3;

/// Makes the #DB handler say EIP and DR6 on the port, clear DR6, and return; with `resume` it sets RF in the frame first.
fn install_tracer(machine: &mut Machine, resume: bool) {
    let tracer = at::CODE + 0x800;
    machine.set_gate(DB, gate(sel::CODE32, tracer as u32, 0x8e, 0));
    machine.code_at(tracer, |a| {
        a.push(eax)?;
        a.push(edx)?;
        a.mov(edx, u32::from(PORT))?;
        a.mov(eax, dword_ptr(esp + 8))?;
        a.out(dx, eax)?;
        a.mov(eax, dr6)?;
        a.out(dx, eax)?;
        a.xor(eax, eax)?;
        a.mov(dr6, eax)?;
        if resume {
            a.or(dword_ptr(esp + 16), rflags::RF as i32)?;
        }
        a.pop(edx)?;
        a.pop(eax)?;
        a.iretd()
    });
}

/// What the tracer said: offsets from [`at::CODE`] and DR6 without its fixed bits.
fn trace(machine: &Machine) -> Vec<(u64, u64)> {
    machine.world.outputs().chunks(2).map(|pair| (pair[0] - at::CODE, pair[1] & !dr6::FIXED)).collect()
}

/// Code that sets TF by POPF, runs `write`, and clears TF; offsets of `write` are from [`STEPPED`] on.
fn stepped(machine: &mut Machine, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
    install_tracer(machine, false);
    machine.code(|a| {
        a.push(0x102)?;
        a.popfd()?;
        write(a)?;
        a.push(2)?;
        a.popfd()
    })
}
/// PUSH imm32 and POPFD.
const STEPPED: u64 = 6;

fn steps_trap_after_each_instruction(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    let end = stepped(&mut machine, |a| {
        let mut over = a.create_label();
        a.nop()?;
        a.mov(ecx, 1)?;
        a.jmp(over)?;
        a.ud2()?;
        a.set_label(&mut over)?;
        a.inc(ecx)
    });
    machine.run_to_end();
    let s = STEPPED;
    let last = end - at::CODE;
    let steps = [s + 1, s + 6, s + 10, s + 11, last - 1, last];
    assert_eq!(trace(&machine), steps.map(|at| (at, dr6::BS)));
    assert_eq!(machine.reg(gpr::RCX), 2);
}

/// One trap for each element.
fn steps_of_repeated_strings(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    (machine.state.gpr[gpr::RDI], machine.state.gpr[gpr::RCX]) = (at::DATA, 3);
    stepped(&mut machine, |a| a.rep().stosb());
    machine.run_to_end();
    let places: Vec<_> = trace(&machine).iter().map(|step| step.0).collect();
    assert_eq!(places[..3], [STEPPED, STEPPED, STEPPED + 2]);
}

/// The trap of an instruction that loads SS is lost: the next one comes after the instruction behind it.
fn steps_over_mov_ss(engine: EngineKind) {
    for pop in [false, true] {
        let mut machine = Machine::protected(engine);
        machine.state.gpr[gpr::RAX] = u64::from(sel::DATA);
        stepped(&mut machine, |a| {
            a.push(eax)?;
            if pop { a.pop(ss) } else { a.mov(ss, eax) }?;
            a.nop()?;
            a.nop()
        });
        machine.run_to_end();
        let places: Vec<_> = trace(&machine).iter().map(|step| step.0 - STEPPED).collect();
        let load = if pop { 1 } else { 2 };
        assert_eq!(places[..3], [1, 1 + load + 1, 1 + load + 2]);
    }
}

/// TF is clear in a handler, and set again behind it; INT n itself is followed by no trap before the handler.
fn steps_into_handlers(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    let handler = at::CODE + 0x600;
    machine.set_gate(0x40, gate(sel::CODE32, handler as u32, 0x8e, 0));
    machine.code_at(handler, |a| {
        a.inc(ebx)?;
        a.iretd()
    });
    stepped(&mut machine, |a| {
        a.int(0x40)?;
        a.nop()
    });
    machine.run_to_end();
    let places: Vec<_> = trace(&machine).iter().map(|step| step.0).collect();
    // The IRET that sets TF again is not itself trapped; the instruction behind INT is.
    assert_eq!(places[0], STEPPED + 3);
    assert_eq!(machine.reg(gpr::RBX), 1);
}

fn popf_begins_stepping_one_later(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.code(|a| {
        a.push(0x102)?;
        a.popfd()?;
        a.mov(ebx, 1)?;
        a.mov(ebx, 2)
    });
    machine.run_to_handler(DB);
    assert_eq!(machine.reg(gpr::RBX), 1);
    let frame = machine.frame(false);
    assert_eq!((frame.rip, frame.flags & rflags::TF), (at::CODE + STEPPED + 5, rflags::TF));
    assert_eq!(machine.state.rflags & rflags::TF, 0);
    assert_eq!(machine.state.dr[4], dr6::FIXED | dr6::BS);
}

fn int1_and_int3_are_traps(engine: EngineKind) {
    for (byte, vector) in [(0xf1, DB), (0xcc, BP)] {
        let mut machine = Machine::protected(engine);
        machine.bytes(&[byte]);
        machine.run_to_handler(vector);
        let frame = machine.frame(false);
        assert_eq!((frame.rip, frame.flags), (at::CODE + 1, rflags::FIXED));
    }
}

fn code_breakpoints_fault_before(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.state.dr[0] = at::CODE + 5;
    machine.state.dr[5] = enable(EXECUTE, 1);
    machine.code(|a| {
        a.mov(ebx, 1)?;
        a.mov(ebx, 2)
    });
    machine.run_to_handler(DB);
    assert_eq!((machine.reg(gpr::RBX), machine.frame(false).rip), (1, at::CODE + 5));
    assert_eq!(machine.state.dr[4], dr6::FIXED | 1);
    assert_eq!(machine.frame(false).flags & rflags::RF, 0, "it is the handler's business to go on");
}

fn resume_flag_skips_one_breakpoint(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.state.dr[2] = at::CODE + 5;
    machine.state.dr[5] = 0x400 | 1 << 4;
    install_tracer(&mut machine, true);
    machine.code(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 3)?;
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jne(again)
    });
    machine.run_to_end();
    // The tracer's IRET sets RF for one instruction: one fault each time round.
    assert_eq!(trace(&machine), [(5, 4); 3]);
    assert_eq!(machine.reg(gpr::RCX), 0);
}

fn data_breakpoints_trap_after(engine: EngineKind) {
    for (kind, on_read) in [(WRITE, false), (ACCESS, true)] {
        let mut machine = Machine::protected(engine);
        machine.state.dr[0] = at::DATA;
        machine.state.dr[5] = enable(kind, 4);
        install_tracer(&mut machine, false);
        machine.code(|a| {
            a.mov(eax, dword_ptr(at::DATA))?; // 0: reads
            a.mov(dword_ptr(at::DATA), eax)?; // 5: writes
            a.inc(dword_ptr(at::DATA))?; // 10: both
            a.nop()
        });
        machine.run_to_end();
        let mut expected = if on_read { vec![(5, 1)] } else { vec![] };
        expected.extend([(10, 1), (16, 1)]);
        assert_eq!(trace(&machine), expected);
        assert_eq!(machine.get32(at::DATA), 1, "the write has happened");
    }
}

fn data_breakpoints_have_a_length(engine: EngineKind) {
    for (start, length, offset, size, hit) in [
        (0, 1, 0, 1, true),
        (0, 1, 1, 1, false),
        (0, 2, 1, 1, true),
        (0, 4, 3, 1, true),
        (0, 4, 4, 1, false),
        (4, 1, 1, 4, true),
        (4, 1, 0, 4, false),
        (0, 8, 7, 1, true),
        (0, 8, 8, 1, false),
    ] {
        let mut machine = Machine::protected(engine);
        machine.state.dr[0] = at::DATA + start;
        machine.state.dr[5] = enable(WRITE, length);
        install_tracer(&mut machine, false);
        let address = at::DATA + offset;
        machine.code(|a| if size == 1 { a.mov(byte_ptr(address), al) } else { a.mov(dword_ptr(address), eax) });
        machine.run_to_end();
        assert_eq!(trace(&machine).len(), usize::from(hit), "{start} {length} {offset} {size}");
    }
}

/// The trap comes after the element that hit.
fn breakpoints_on_repeated_strings(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.state.dr[0] = at::DATA + 8;
    machine.state.dr[5] = enable(WRITE, 4);
    (machine.state.gpr[gpr::RDI], machine.state.gpr[gpr::RCX]) = (at::DATA, 6);
    machine.code(|a| a.rep().stosd());
    machine.run_to_handler(DB);
    assert_eq!((machine.reg(gpr::RCX), machine.reg(gpr::RDI)), (3, at::DATA + 12));
    assert_eq!(machine.frame(false).rip, at::CODE);
}

fn port_breakpoints_need_de(engine: EngineKind) {
    for de in [false, true] {
        let mut machine = Machine::protected(engine);
        machine.state.cr4 |= if de { cr4::DE } else { 0 };
        machine.state.dr[0] = u64::from(PORT) + 4;
        machine.state.dr[5] = enable(IO, 4);
        machine.code(|a| {
            a.mov(edx, u32::from(PORT) + 2)?;
            a.out(dx, al)?;
            a.mov(edx, u32::from(PORT) + 7)?;
            a.out(dx, al)?;
            a.mov(ebx, 1)
        });
        if de {
            machine.run_to_handler(DB);
            assert_eq!(machine.state.dr[4], dr6::FIXED | 1);
            assert_eq!(machine.reg(gpr::RBX), 0, "right after the access");
        } else {
            machine.run_to_end();
        }
        assert_eq!(machine.world.log(), [Access::Out(2, 1, 0), Access::Out(7, 1, 0)]);
    }
}

/// DR7.GD: an access to a debug register faults, and the handler finds GD clear.
fn general_detect_guards_the_registers(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.state.dr[5] = 0x400 | 1 << 13;
    machine.code(|a| {
        a.mov(ebx, 1)?;
        a.mov(eax, dr3)
    });
    machine.run_to_handler(DB);
    assert_eq!((machine.frame(false).rip, machine.state.dr[4]), (at::CODE + 5, dr6::FIXED | dr6::BD));
    assert_eq!(machine.state.dr[5] & 1 << 13, 0);
}

fn disabled_breakpoints_do_not_trap(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.state.dr[0] = at::CODE + 5;
    machine.state.dr[1] = at::DATA;
    machine.state.dr[5] = 0x400 | WRITE << 20;
    install_tracer(&mut machine, false);
    machine.code(|a| {
        a.mov(ebx, 1)?;
        a.mov(dword_ptr(at::DATA), ebx)
    });
    machine.run_to_end();
    assert!(trace(&machine).is_empty());
    // The guest enables one itself, globally.
    machine.state.rip = at::CODE;
    machine.code(|a| {
        a.mov(eax, 0x400 | 8 | (WRITE << 20) as u32)?;
        a.mov(dr7, eax)?;
        a.mov(dword_ptr(at::DATA), ebx)
    });
    machine.run_to_end();
    assert_eq!(trace(&machine), [(14, 2)]);
}

fn reserved_debug_registers(engine: EngineKind) {
    // DR4 and DR5 are DR6 and DR7 unless CR4.DE.
    for de in [false, true] {
        let mut machine = Machine::protected(engine);
        machine.state.cr4 |= if de { cr4::DE } else { 0 };
        machine.bytes(&[0x0f, 0x21, 0xe0]);
        if de {
            machine.run_to_handler(UD);
        } else {
            machine.run_to_end();
            assert_eq!(machine.reg(gpr::RAX), dr6::FIXED);
        }
    }
    // The upper halves of DR6 and DR7 are reserved.
    for register in [6, 7] {
        let mut machine = Machine::long(engine);
        machine.code(|a| {
            a.mov(rax, 0x1_0000_0400u64)?;
            if register == 6 { a.mov(dr6, rax) } else { a.mov(dr7, rax) }
        });
        machine.run_to_handler(GP);
        assert_eq!(machine.frame(true).error, 0);
    }
}

/// A data breakpoint hit by the load of SS itself waits for the instruction behind.
fn mov_ss_holds_data_breakpoints_off(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.put16(at::DATA, sel::DATA);
    machine.state.dr[0] = at::DATA;
    machine.state.dr[5] = enable(ACCESS, 2);
    machine.code(|a| {
        a.mov(ss, word_ptr(at::DATA))?;
        a.mov(ebx, 1)?;
        a.mov(ebx, 2)
    });
    machine.run_to_handler(DB);
    assert_eq!(machine.reg(gpr::RBX), 1);
    assert_eq!(machine.state.dr[4], dr6::FIXED | 1);
}

/// An access that crosses into another page, where the breakpoint is.
fn breakpoints_of_a_page_crossing(engine: EngineKind) {
    let mut machine = Machine::paged(engine, crate::harness::Paging::Pae);
    let boundary = at::FREE + 0x1000;
    machine.state.dr[0] = boundary;
    machine.state.dr[5] = enable(WRITE, 1);
    install_tracer(&mut machine, false);
    machine.code(|a| {
        a.mov(dword_ptr(boundary - 4), eax)?;
        a.mov(dword_ptr(boundary - 3), eax)
    });
    machine.run_to_end();
    assert_eq!(trace(&machine), [(10, 1)]);
}

fn debug_registers_hold_64_bits(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    let high = 0xffff_8000_0000_1000u64;
    machine.code(|a| {
        a.mov(rax, high)?;
        a.mov(dr1, rax)?;
        a.mov(rbx, dr1)
    });
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RBX), high);
}
