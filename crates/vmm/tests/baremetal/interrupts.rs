//! What interrupts an instruction stream and what holds it off (SDM vol. 3, 6.7, 6.8, 6.15): shadows of STI and MOV SS,
//! NMI and its blocking, classes of exceptions, double and triple faults.

use std::sync::Arc;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use platform::x86::{gpr, rflags};
use platform::{AccessSize, BusDevice, MsiMessage, MsiSink};
use vmm::{EngineKind, VcpuExit};

use crate::harness::{FINISH, Machine, PORT, Paging, at, gate, handler, sel};

crate::stamp! {
    everywhere: nmis_ignore_the_flag, a_triple_fault_is_the_end;
    software: sti_opens_one_instruction_later, mov_ss_holds_interrupts_off, nmis_wait_for_iret,
        a_fault_in_iret_keeps_nmis_blocked, mov_ss_holds_what_arrives_off, faults_and_traps, faults_of_arithmetic,
        contributory_faults_double, a_page_fault_in_a_page_fault_doubles, a_page_fault_behind_a_fault_does_not,
        benign_faults_do_not_double, double_faults_have_a_handler, the_longest_instruction,
        lock_prefixes_want_a_writable_operand
}

const DE: u8 = 0;
const NMI: u8 = 2;
const BP: u8 = 3;
const OF: u8 = 4;
const BR: u8 = 5;
const UD: u8 = 6;
const DF: u8 = 8;
const NP: u8 = 11;
const GP: u8 = 13;
const PF: u8 = 14;

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Local APIC: interrupt command register; a self-IPI by it.
const ICR: u32 = 0xfee0_0300;
const SPURIOUS: u32 = 0xfee0_00f0;
const SELF: u32 = 0x4_0000;
const NMI_MODE: u32 = 0x400;

/// Sends this vCPU an interrupt or NMI, and lets it arrive: the way through the local APIC may take a few instructions.
fn send(a: &mut CodeAssembler, what: u32) -> Result<(), IcedError> {
    a.mov(dword_ptr(ICR), (SELF | what) as i32)?;
    let mut next = a.create_label();
    a.jmp(next)?;
    a.set_label(&mut next)?;
    a.nop()
}

fn enable_apic(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dword_ptr(SPURIOUS), 0x1ff)
}

fn sti_opens_one_instruction_later(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.code(|a| {
        enable_apic(a)?;
        send(a, 0x50)?;
        a.mov(ebx, 1)?;
        a.sti()?;
        a.mov(ebx, 2)?;
        a.mov(ebx, 3)
    });
    machine.run_to_handler(0x50);
    assert_eq!(machine.reg(gpr::RBX), 2);
    // A second STI has no shadow of its own; CLI in the shadow closes again.
    let mut machine = Machine::protected(engine);
    machine.code(|a| {
        enable_apic(a)?;
        send(a, 0x50)?;
        a.sti()?;
        a.cli()?;
        a.mov(ebx, 2)
    });
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RBX), 2);
}

fn mov_ss_holds_interrupts_off(engine: EngineKind) {
    for pop in [false, true] {
        let mut machine = Machine::protected(engine);
        machine.code(|a| {
            enable_apic(a)?;
            a.mov(eax, u32::from(sel::DATA))?;
            a.push(eax)?;
            a.push(rflags::IF as i32)?;
            send(a, 0x50)?;
            a.popfd()?;
            // The flag is set and the interrupt comes at once, without any shadow.
            a.mov(ebx, 1)
        });
        machine.run_to_handler(0x50);
        assert_eq!(machine.reg(gpr::RBX), 0);
        let mut machine = Machine::protected(engine);
        machine.set_flags(rflags::IF, 0);
        machine.code(|a| {
            enable_apic(a)?;
            a.mov(eax, u32::from(sel::DATA))?;
            a.push(eax)?;
            a.mov(edi, ICR)?;
            a.cli()?;
            send(a, 0x50)?;
            a.sti()?;
            // In the shadow of STI, and with one of its own.
            if pop { a.pop(ss) } else { a.mov(ss, eax) }?;
            a.mov(ebx, 1)?;
            a.mov(ebx, 2)
        });
        machine.run_to_handler(0x50);
        assert_eq!(machine.reg(gpr::RBX), 1);
    }
}

fn nmis_ignore_the_flag(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.code(|a| {
        send(a, NMI_MODE)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.inc(ebx)?;
        a.cmp(ebx, 10_000_000)?;
        a.jne(wait)
    });
    machine.run_to_handler(NMI);
    assert_eq!(machine.frame(false).flags & rflags::IF, 0);
}

/// Says a value on the port.
fn say(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(edx, u32::from(PORT))?;
    a.mov(eax, value)?;
    a.out(dx, al)
}

/// A second NMI arrives in the handler of the first: it waits for IRET.
fn nmis_wait_for_iret(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    let nmi = at::CODE + 0x400;
    machine.set_gate(NMI, gate(sel::CODE32, nmi as u32, 0x8e, 0));
    machine.code_at(nmi, |a| {
        say(a, 1)?;
        a.inc(ebx)?;
        let mut last = a.create_label();
        a.cmp(ebx, 2)?;
        a.je(last)?;
        send(a, NMI_MODE)?;
        send(a, NMI_MODE)?;
        a.nop()?;
        a.set_label(&mut last)?;
        say(a, 2)?;
        a.iretd()
    });
    machine.code(|a| {
        send(a, NMI_MODE)?;
        say(a, 3)
    });
    machine.run_to_end();
    assert_eq!(machine.world.outputs(), [1, 2, 1, 2, 3], "two that wait are one");
}

/// An IRET that faults does unblock NMIs (SDM vol. 3, 6.7.1): the NMI comes before the fault's handler runs its first
/// instruction, or after it; one way or the other it comes.
fn a_fault_in_iret_keeps_nmis_blocked(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    let (nmi, fault) = (at::CODE + 0x400, at::CODE + 0x500);
    machine.set_gate(NMI, gate(sel::CODE32, nmi as u32, 0x8e, 0));
    machine.set_gate(GP, gate(sel::CODE32, fault as u32, 0x8e, 0));
    machine.code_at(nmi, |a| {
        say(a, 1)?;
        a.inc(ebx)?;
        let mut last = a.create_label();
        a.cmp(ebx, 2)?;
        a.je(last)?;
        send(a, NMI_MODE)?;
        // A frame that no IRET can take.
        a.mov(dword_ptr(esp + 4), 0x100)?;
        a.set_label(&mut last)?;
        a.iretd()
    });
    machine.code_at(fault, |a| {
        say(a, 2)?;
        a.nop()?;
        a.nop()?;
        a.out(u32::from(FINISH), al)?;
        a.hlt()
    });
    machine.code(|a| send(a, NMI_MODE));
    machine.run();
    let mut said = machine.world.outputs();
    said.sort_unstable();
    assert_eq!(said, [1, 1, 2]);
}

/// A device that answers with a selector, and interrupts before it does.
struct Interrupter {
    msi: Arc<dyn MsiSink>,
    data: u32,
}

impl BusDevice for Interrupter {
    fn read(&self, _: u64, _: AccessSize) -> u64 {
        self.msi.send(MsiMessage { address: 0xfee0_0000, data: self.data });
        u64::from(sel::DATA)
    }
    fn write(&self, _: u64, _: AccessSize, _: u64) {}
}

/// What arrives while SS is loaded waits for one more instruction, NMIs included.
fn mov_ss_holds_what_arrives_off(engine: EngineKind) {
    const DEVICE: u64 = 0xd100_0000;
    for (data, vector) in [(0x50, 0x50), (NMI_MODE, NMI)] {
        for shadow in [true, false] {
            let mut machine = Machine::protected(engine);
            let msi = machine.chips.msi();
            machine.mmio.map(DEVICE, 4, Arc::new(Interrupter { msi, data })).unwrap();
            machine.set_flags(rflags::IF, 0);
            machine.code(|a| {
                enable_apic(a)?;
                let selector = word_ptr(DEVICE);
                if shadow { a.mov(ss, selector) } else { a.mov(es, selector) }?;
                a.mov(ebx, 1)?;
                let mut next = a.create_label();
                a.jmp(next)?;
                a.set_label(&mut next)?;
                a.mov(ebx, 2)
            });
            machine.run_to_handler(vector);
            assert!(machine.reg(gpr::RBX) < 2);
            assert!(!shadow || machine.reg(gpr::RBX) == 1, "{data:#x}");
        }
    }
}

/// Faults point at their instruction and set RF in the frame; traps point behind it.
fn faults_and_traps(engine: EngineKind) {
    let cases: [(u8, Write, u64, bool); 6] = [
        (UD, |a| a.ud2(), 0, true),
        (BP, |a| a.int3(), 1, false),
        (0x80, |a| a.int(0x80), 2, false),
        (OF, |a| a.db(&[0xce]), 1, false),
        (BR, |a| a.bound(eax, qword_ptr(at::DATA)), 0, true),
        (DE, |a| a.div(ecx), 0, true),
    ];
    for (vector, write, offset, fault) in cases {
        let mut machine = Machine::protected(engine);
        machine.set_flags(rflags::OF, 0);
        machine.state.gpr[gpr::RAX] = 99;
        machine.code(write);
        machine.run_to_handler(vector);
        let frame = machine.frame(false);
        assert_eq!(frame.rip, at::CODE + offset, "{vector}");
        assert_eq!(frame.flags & rflags::RF != 0, fault, "{vector}");
        assert_eq!(machine.state.rflags & rflags::RF, 0);
    }
    // INTO without overflow, BOUND inside: nothing.
    let mut machine = Machine::protected(engine);
    machine.put32(at::DATA + 4, 100);
    machine.state.gpr[gpr::RAX] = 99;
    machine.code(|a| {
        a.db(&[0xce])?;
        a.bound(eax, qword_ptr(at::DATA))
    });
    machine.run_to_end();
}

fn faults_of_arithmetic(engine: EngineKind) {
    let cases: [Write; 4] = [
        |a| {
            a.mov(edx, 1)?;
            a.mov(ecx, 1)?;
            a.div(ecx)
        },
        |a| {
            a.mov(eax, 0x8000_0000u32)?;
            a.cdq()?;
            a.mov(ecx, -1)?;
            a.idiv(ecx)
        },
        |a| {
            a.mov(ax, 0x100)?;
            a.mov(cl, 1)?;
            a.div(cl)
        },
        |a| a.db(&[0xd4, 0]), // AAM 0
    ];
    for write in cases {
        let mut machine = Machine::protected(engine);
        machine.code(write);
        machine.run_to_handler(DE);
    }
}

/// #GP whose gate is not present: #NP, another contributory one, makes it a double fault.
fn contributory_faults_double(engine: EngineKind) {
    for vector in [DE, GP] {
        let mut machine = Machine::protected(engine);
        machine.set_gate(vector, gate(sel::CODE32, 0, 0x0e, 0));
        machine.code(|a| {
            if vector == DE { a.div(ecx) } else { a.mov(eax, dword_ptr(at::DATA).gs()) }?;
            a.nop()
        });
        machine.state.segments[platform::x86::seg::GS].access |= platform::x86::SEGMENT_UNUSABLE;
        machine.run_to_handler(DF);
        assert_eq!((machine.frame(true).error, machine.frame(true).rip), (0, at::CODE));
    }
}

fn a_page_fault_in_a_page_fault_doubles(engine: EngineKind) {
    // The gate of #PF leads to a stack that is not mapped.
    for (contributory, first) in [(false, "another page fault"), (true, "a bad gate")] {
        let mut machine = Machine::paged(engine, Paging::Pae);
        machine.put64(at::TSS2, 0);
        if contributory {
            machine.set_gate(PF, gate(0x100, 0, 0x8e, 0));
        } else {
            // The table's entry for #PF lies in a page that is not there.
            let idt = at::FREE + 0x1000 - 14 * 8;
            let mut bytes = vec![0; 14 * 8];
            machine.memory.read(at::IDT, &mut bytes).unwrap();
            machine.memory.write(idt, &bytes).unwrap();
            machine.map_page(Paging::Pae, at::FREE + 0x1000, 0);
            machine.state.idtr.base = idt;
        }
        machine.map_page(Paging::Pae, at::FREE + 0x5000, 0);
        machine.code(|a| a.mov(eax, dword_ptr(at::FREE + 0x5678)));
        machine.run_to_handler(DF);
        assert_eq!(machine.frame(true).rip, at::CODE, "{first}");
        let second = if contributory { at::FREE + 0x5678 } else { at::FREE + 0x1000 };
        assert_eq!(machine.state.cr2, second, "{first}");
    }
}

/// Contributory, then page fault: one after the other.
fn a_page_fault_behind_a_fault_does_not(engine: EngineKind) {
    let mut machine = Machine::paged(engine, Paging::Pae);
    // #GP's entry is in a page that is not there; #PF's is behind it and is.
    let idt = at::FREE + 0x1000 - 14 * 8;
    let mut bytes = vec![0; 0x100];
    machine.memory.read(at::IDT, &mut bytes).unwrap();
    machine.memory.write(idt, &bytes).unwrap();
    machine.state.idtr.base = idt;
    machine.map_page(Paging::Pae, at::FREE, 0);
    machine.code(|a| {
        a.mov(eax, 0x100)?;
        a.mov(es, eax)
    });
    machine.run_to_handler(PF);
    assert_eq!((machine.state.cr2, machine.frame(true).rip), (idt + 13 * 8, at::CODE + 5));
    assert_eq!(machine.frame(true).error & !1, 0, "a read by the processor itself");
}

fn benign_faults_do_not_double(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.set_gate(UD, gate(sel::CODE32, 0, 0x0e, 0));
    machine.code(|a| a.ud2());
    machine.run_to_handler(NP);
}

/// In a task of its own the handler works even when the stack is gone.
fn double_faults_have_a_handler(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.put64(at::TSS + 0x24, at::OTHER_STACK);
    machine.set_gate64(DF, handler(DF), 0x8e, 1);
    machine.put64(at::PAGES + 0x2000 + 8 * 9, 0);
    machine.code(|a| {
        a.mov(rsp, 0x120_1000u64)?;
        a.push(rax)
    });
    machine.run_to_handler(DF);
    assert_eq!(machine.reg(gpr::RSP), at::OTHER_STACK - 48);
    let frame = machine.frame(true);
    assert_eq!((frame.error, frame.rsp), (0, 0x120_1000), "RSP is as before the push");
    assert_eq!(machine.state.cr2 & !0xfff, 0x120_0000);
}

fn a_triple_fault_is_the_end(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    for vector in [UD, DF, NP, GP] {
        machine.set_gate64(vector, 0, 0x0e, 0);
    }
    machine.code(|a| a.ud2());
    assert_eq!(machine.run(), VcpuExit::Shutdown);
    assert!(machine.world.finishes().is_empty());
}

/// 15 bytes are an instruction, 16 are #GP.
fn the_longest_instruction(engine: EngineKind) {
    for prefixes in [13, 14, 15] {
        let mut machine = Machine::protected(engine);
        let mut bytes = vec![0x66; prefixes];
        bytes.extend([0x89, 0xd8]); // mov ax, bx
        machine.bytes(&bytes);
        if bytes.len() <= 15 {
            machine.run_to_end();
        } else {
            machine.run_to_handler(GP);
            assert_eq!((machine.frame(true).error, machine.frame(true).rip), (0, at::CODE));
        }
    }
}

fn lock_prefixes_want_a_writable_operand(engine: EngineKind) {
    for (bytes, good) in [
        (&[0xf0, 0xff, 0x05, 0, 0xc0, 0, 0][..], true),   // lock inc [0xc000]
        (&[0xf0, 0xff, 0xc0], false),                     // lock inc eax
        (&[0xf0, 0x8b, 0x05, 0, 0xc0, 0, 0], false),      // lock mov eax, [0xc000]
        (&[0xf0, 0x39, 0x05, 0, 0xc0, 0, 0], false),      // lock cmp [0xc000], eax
        (&[0xf0, 0x90], false),                           // lock nop
        (&[0xf0, 0x87, 0x05, 0, 0xc0, 0, 0], true),       // lock xchg [0xc000], eax
        (&[0xf0, 0x0f, 0xc7, 0x0d, 0, 0xc0, 0, 0], true), // lock cmpxchg8b [0xc000]
    ] {
        let mut machine = Machine::protected(engine);
        machine.bytes(bytes);
        if good {
            machine.run_to_end();
        } else {
            machine.run_to_handler(UD);
            assert_eq!(machine.frame(false).rip, at::CODE, "{bytes:x?}");
        }
    }
}
