//! Virtual-8086 mode (SDM vol. 3, chapter 21).

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use platform::x86::{gpr, rflags, seg};
use vmm::EngineKind;

use crate::harness::{Access, Machine, PORT, at, gate, sel};

crate::stamp! {
    everywhere: ;
    software: iret_enters_and_interrupts_leave, segments_are_as_in_real_mode, sensitive_instructions_depend_on_iopl,
        software_interrupts_need_a_gate_of_ring_3, ports_ask_the_bitmap_alone, protected_mode_instructions_do_not_exist,
        the_monitor_reflects_an_interrupt, vme_virtualises_the_interrupt_flag, vme_redirects_interrupts,
        handlers_must_be_in_ring_0
}

const UD: u8 = 6;
const GP: u8 = 13;
/// The task's code: CS 0x600, IP 0.
const CS: u16 = (at::USER_CODE >> 4) as u16;
const SS: u16 = 0xa00;
const SP: u16 = 0xf00;

/// Where the task's interrupt 0x21 leads.
const INT_21: (u16, u16) = (CS, 0x300);

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A machine whose ring 0 enters `write` as a virtual-8086 task at once, with `flags` set.
fn task(engine: EngineKind, flags: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let mut machine = Machine::protected(engine);
    // GS, FS, DS, ES, SS, ESP, EFLAGS, CS, EIP, from the top.
    let flags = (flags | rflags::VM | rflags::FIXED) as u32;
    let frame = [0x5000, 0x4000, 0x3000, 0x2000, u32::from(SS), u32::from(SP), flags, u32::from(CS), 0];
    for (n, word) in (1..).zip(frame) {
        machine.put32(at::STACK - 4 * n, word);
    }
    machine.state.gpr[gpr::RSP] = at::STACK - 36;
    machine.code(|a| a.iretd());
    // Assembled for offset 0 of its segment.
    let mut assembler = CodeAssembler::new(16).unwrap();
    write(&mut assembler).unwrap();
    machine.memory.write(at::USER_CODE, &assembler.assemble(0).unwrap()).unwrap();
    machine.put32(4 * 0x21, u32::from(INT_21.0) << 16 | u32::from(INT_21.1));
    machine
}

/// The stack slots above the frame of the handler that ended the run: ES, DS, FS, GS.
fn pushed_segments(machine: &Machine, error: bool) -> Vec<u64> {
    (5..9).map(|n| machine.stack(n + u64::from(error), 4)).collect()
}

fn iret_enters_and_interrupts_leave(engine: EngineKind) {
    let mut machine = task(engine, rflags::IF, |a| {
        a.mov(ax, cs)?;
        a.ud2()
    });
    machine.run_to_handler(UD);
    assert_eq!(machine.reg(gpr::RAX), u64::from(CS));
    let frame = machine.frame(false);
    assert_eq!((frame.rip, frame.cs), (2, CS));
    assert_eq!(frame.flags, rflags::VM | rflags::IF | rflags::RF | rflags::FIXED, "a fault sets RF in the frame");
    assert_eq!((frame.rsp, frame.ss), (u64::from(SP), SS));
    assert_eq!(pushed_segments(&machine, false), [0x2000, 0x3000, 0x4000, 0x5000]);
    assert_eq!(machine.reg(gpr::RSP), at::STACK - 36);
    let selectors = [seg::ES, seg::DS, seg::FS, seg::GS].map(|index| machine.state.segments[index].selector);
    assert_eq!(selectors, [0; 4], "data segments are null in the handler");
    assert_eq!(machine.state.rflags & (rflags::VM | rflags::IF), 0);
    assert_eq!(machine.state.segments[seg::CS].selector, sel::CODE32);
}

fn segments_are_as_in_real_mode(engine: EngineKind) {
    let mut machine = task(engine, 0, |a| {
        a.mov(ax, 0xc00)?;
        a.mov(ds, ax)?;
        a.mov(bx, word_ptr(4))?;
        a.push(bx)?;
        a.mov(cx, sp)?;
        a.mov(word_ptr(6).ss(), ax)?;
        a.mov(si, 0xffff)?;
        a.mov(ax, word_ptr(si))
    });
    machine.put16(at::DATA + 4, 0x1234);
    machine.run_to_handler(GP);
    assert_eq!((machine.reg(gpr::RBX), machine.reg(gpr::RCX)), (0x1234, u64::from(SP) - 2));
    assert_eq!(machine.get16((u64::from(SS) << 4) + u64::from(SP) - 2), 0x1234);
    assert_eq!(machine.get16((u64::from(SS) << 4) + 6), 0xc00);
    assert_eq!(machine.frame(true).error, 0, "a word at 0xFFFF is beyond the limit");
}

fn sensitive_instructions_depend_on_iopl(engine: EngineKind) {
    let instructions: [(&str, Write); 6] = [
        ("cli", |a| a.cli()),
        ("sti", |a| a.sti()),
        ("pushf", |a| a.pushf()),
        ("popf", |a| a.popf()),
        ("int", |a| a.int(0x40)),
        ("iret", |a| a.iret()),
    ];
    for (name, write) in instructions {
        for level in [0u64, 2, 3] {
            let mut machine = task(engine, level << 12, |a| {
                write(a)?;
                a.ud2()
            });
            machine.open_gate(0x40);
            // What IRET and POPF take off the stack leads to the UD2.
            let stack = (u64::from(SS) << 4) + u64::from(SP);
            let words = if name == "popf" { [0x0202, 0, 0] } else { [1, CS, 0x0202] };
            for (n, word) in (0..).zip(words) {
                machine.put16(stack + 2 * n, word);
            }
            let expected = match (level, name) {
                (3, "int") => 0x40,
                (3, _) => UD,
                _ => GP,
            };
            machine.run_to_handler(expected);
            let error = expected == GP;
            let frame = machine.frame(error);
            assert_eq!((frame.error, frame.cs), (0, CS), "{name} {level}");
            match name {
                _ if error => assert_eq!(frame.rip, 0, "{name}"),
                "sti" | "popf" | "iret" => assert_eq!(frame.flags & rflags::IF, rflags::IF, "{name}"),
                _ => {}
            }
            assert_eq!(frame.flags & rflags::IOPL, level << 12, "IOPL never changes");
        }
    }
}

fn software_interrupts_need_a_gate_of_ring_3(engine: EngineKind) {
    let mut machine = task(engine, rflags::IOPL, |a| a.int(0x40));
    machine.run_to_handler(GP);
    assert_eq!(machine.frame(true).error, 0x40 * 8 + 2);
    // INT3 is not IOPL-sensitive, but wants the gate too.
    let mut machine = task(engine, 0, |a| a.int3());
    machine.open_gate(3);
    machine.run_to_handler(3);
    assert_eq!(machine.frame(false).rip, 1);
}

/// Whatever IOPL says.
fn ports_ask_the_bitmap_alone(engine: EngineKind) {
    for open in [false, true] {
        for level in [0u64, 3] {
            let mut machine = task(engine, level << 12, |a| {
                a.mov(dx, u32::from(PORT))?;
                a.out(dx, al)?;
                a.ud2()
            });
            if open {
                machine.put8(at::TSS + 0x68 + u64::from(PORT / 8), 0xfe);
            }
            machine.run_to_handler(if open { UD } else { GP });
            assert_eq!(machine.world.log(), if open { vec![Access::Out(0, 1, 0)] } else { vec![] });
        }
    }
}

fn protected_mode_instructions_do_not_exist(engine: EngineKind) {
    let unknown: [Write; 5] = [
        |a| a.sldt(ax),
        |a| a.str(ax),
        |a| a.lar(ax, bx),
        |a| a.verr(ax),
        |a| a.db(&[0x63, 0xc8]), // ARPL
    ];
    for write in unknown {
        let mut machine = task(engine, rflags::IOPL, write);
        machine.run_to_handler(UD);
        assert_eq!(machine.frame(false).rip, 0);
    }
    let privileged: [Write; 4] = [|a| a.hlt(), |a| a.clts(), |a| a.db(&[0x0f, 0x20, 0xc0]), |a| a.rdmsr()];
    for write in privileged {
        let mut machine = task(engine, rflags::IOPL, write);
        machine.run_to_handler(GP);
        assert_eq!((machine.frame(true).error, machine.frame(true).rip), (0, 0));
    }
}

/// A monitor of a few instructions: on #GP it calls the task's handler of interrupt 0x21, as in real mode.
fn the_monitor_reflects_an_interrupt(engine: EngineKind) {
    let mut machine = task(engine, 0, |a| {
        a.mov(ax, 5)?;
        a.int(0x21)?;
        a.add(ax, 1)?;
        a.ud2()
    });
    let monitor = at::CODE + 0x400;
    machine.set_gate(GP, gate(sel::CODE32, monitor as u32, 0x8e, 0));
    machine.code_of(32, monitor, |a| {
        a.push(eax)?;
        a.mov(eax, u32::from(sel::DATA))?;
        a.mov(ds, eax)?;
        a.pop(eax)?;
        a.add(esp, 4)?;
        // The frame: EIP, CS, EFLAGS, ESP, SS. Push FLAGS, CS, IP + 2 on the task's stack.
        a.movzx(ebx, word_ptr(esp + 16))?;
        a.shl(ebx, 4)?;
        a.sub(dword_ptr(esp + 12), 6)?;
        a.add(ebx, dword_ptr(esp + 12))?;
        a.mov(ecx, dword_ptr(esp + 8))?;
        a.mov(word_ptr(ebx + 4), cx)?;
        a.mov(ecx, dword_ptr(esp + 4))?;
        a.mov(word_ptr(ebx + 2), cx)?;
        a.mov(ecx, dword_ptr(esp))?;
        a.add(ecx, 2)?;
        a.mov(word_ptr(ebx), cx)?;
        a.movzx(ecx, word_ptr(4 * 0x21u32))?;
        a.mov(dword_ptr(esp), ecx)?;
        a.movzx(ecx, word_ptr(4 * 0x21u32 + 2))?;
        a.mov(dword_ptr(esp + 4), ecx)?;
        a.iretd()
    });
    // The task's handler returns with RETF 2, which is not sensitive.
    machine.code_of(16, at::USER_CODE + u64::from(INT_21.1), |a| {
        a.shl(ax, 4)?;
        a.retf_1(2)
    });
    machine.run_to_handler(UD);
    assert_eq!(machine.reg(gpr::RAX), 0x51);
    assert_eq!(machine.frame(false).rsp, u64::from(SP));
}

const VME: u64 = 1;

/// With CR4.VME and IOPL below 3, CLI and STI change VIF; an interrupt that waits (VIP) faults at STI.
fn vme_virtualises_the_interrupt_flag(engine: EngineKind) {
    let mut machine = task(engine, rflags::IF, |a| {
        a.sti()?;
        a.pushf()?;
        a.pop(ax)?;
        a.cli()?;
        a.pushf()?;
        a.pop(bx)?;
        a.ud2()
    });
    machine.state.cr4 |= VME;
    machine.run_to_handler(UD);
    let flags = machine.frame(false).flags;
    assert_eq!((flags & rflags::VIF, flags & rflags::IF), (0, rflags::IF), "the real flag stays");
    assert_eq!(machine.reg(gpr::RAX) & rflags::IF, rflags::IF, "PUSHF shows VIF as IF");
    assert_eq!(machine.reg(gpr::RBX) & rflags::IF, 0);
    assert_eq!(machine.reg(gpr::RAX) & rflags::IOPL, rflags::IOPL, "and IOPL as 3");
    let mut machine = task(engine, rflags::IF | rflags::VIP, |a| a.sti());
    machine.state.cr4 |= VME;
    machine.run_to_handler(GP);
    assert_eq!((machine.frame(true).error, machine.frame(true).rip), (0, 0));
}

/// With CR4.VME, a clear bit in the redirection map sends INT n to the task's own handler.
fn vme_redirects_interrupts(engine: EngineKind) {
    for (level, redirected) in [(0u64, true), (3, true), (0, false)] {
        let mut machine = task(engine, level << 12 | rflags::IF, |a| a.int(0x21));
        machine.state.cr4 |= VME;
        // The map lies below the I/O bitmap, which is moved up.
        machine.put16(at::TSS + 0x66, 0x88);
        machine.memory.fill(at::TSS + 0x68, 0x20, if redirected { 0 } else { 0xff }).unwrap();
        machine.code_of(16, at::USER_CODE + u64::from(INT_21.1), |a| a.ud2());
        machine.run_to_handler(if redirected { UD } else { GP });
        if redirected {
            let frame = machine.frame(false);
            assert_eq!((frame.cs, frame.rip, frame.rsp), (INT_21.0, u64::from(INT_21.1), u64::from(SP) - 6));
            let word = |n: u64| u64::from(machine.get16((u64::from(SS) << 4) + u64::from(SP) - 6 + 2 * n));
            assert_eq!((word(0), word(1)), (2, u64::from(CS)));
            if level == 3 {
                assert_eq!((frame.flags & rflags::IF, word(2) & rflags::IF), (0, rflags::IF));
            }
        }
    }
}

fn handlers_must_be_in_ring_0(engine: EngineKind) {
    // A gate to conforming code would stay in ring 3, which virtual-8086 tasks may not.
    let mut machine = task(engine, 0, |a| a.ud2());
    machine.set_descriptor(sel::FREE, crate::harness::descriptor(0, 0xfffff, 0x9e, 0xc));
    machine.set_gate(UD, gate(sel::FREE, crate::harness::handler(UD) as u32, 0x8e, 0));
    machine.run_to_handler(GP);
    assert_eq!(machine.frame(true).error, u64::from(sel::FREE) | 1);
}
