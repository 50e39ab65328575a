//! Hardware task switches (SDM vol. 3, chapter 8).

use iced_x86::code_asm::*;
use platform::x86::{cr0, gpr, rflags, seg};
use vmm::EngineKind;

use crate::harness::{Machine, at, descriptor, gate, handler, sel};

crate::stamp! {
    everywhere: ;
    software: jumps_switch_tasks, calls_nest_and_iret_returns, interrupts_through_a_task_gate, exceptions_push_their_code,
        checks_of_the_descriptor, checks_of_the_new_task, the_old_task_is_saved_whole, tasks_of_16_bit,
        the_trap_bit_of_a_task, a_new_task_has_its_own_space, tasks_do_not_exist_in_long_mode
}

const TS: u8 = 10;
const NP: u8 = 11;
const GP: u8 = 13;
const OWN: u16 = sel::FREE;

/// Offsets in a 32-bit task state segment (SDM vol. 3, figure 8-2).
mod tss {
    pub(super) const LINK: u64 = 0;
    pub(super) const CR3: u64 = 0x1c;
    pub(super) const EIP: u64 = 0x20;
    pub(super) const EFLAGS: u64 = 0x24;
    pub(super) const EAX: u64 = 0x28;
    pub(super) const ESP: u64 = 0x38;
    pub(super) const ES: u64 = 0x48;
    pub(super) const CS: u64 = 0x4c;
    pub(super) const SS: u64 = 0x50;
    pub(super) const DS: u64 = 0x54;
    pub(super) const FS: u64 = 0x58;
    pub(super) const GS: u64 = 0x5c;
    pub(super) const LDT: u64 = 0x60;
    pub(super) const TRAP: u64 = 0x64;
}

/// Where the second task begins.
const ENTRY: u64 = at::CODE + 0x800;

/// A protected-mode machine with a second task: registers 0x1111 × n, stack [`at::OTHER_STACK`], code at [`ENTRY`].
fn two_tasks(engine: EngineKind) -> Machine {
    let machine = Machine::protected(engine);
    let t = at::TSS2;
    machine.memory.fill(t, 0x68, 0).expect("RAM");
    machine.put32(t + tss::EIP, ENTRY as u32);
    machine.put32(t + tss::EFLAGS, rflags::FIXED as u32);
    for n in 0..8 {
        machine.put32(t + tss::EAX + 4 * n, 0x1111 * (n as u32 + 1));
    }
    machine.put32(t + tss::ESP, at::OTHER_STACK as u32);
    machine.put16(t + tss::CS, sel::CODE32);
    for segment in [tss::ES, tss::SS, tss::DS, tss::FS, tss::GS] {
        machine.put16(t + segment, sel::DATA);
    }
    machine.memory.write(ENTRY, &[0xe6, crate::harness::FINISH, 0xf4, 0xeb, 0xfd]).expect("RAM");
    machine.put32(at::DATA, 0);
    machine.put16(at::DATA + 4, sel::TSS2);
    machine
}

/// The type in a descriptor of the GDT: 9 an available task, 11 a busy one.
fn kind(machine: &Machine, selector: u16) -> u8 {
    machine.get8(at::GDT + u64::from(selector) + 5) & 15
}

fn jumps_switch_tasks(engine: EngineKind) {
    let mut machine = two_tasks(engine);
    machine.set_flags(rflags::CF | rflags::IF, 0);
    let end = machine.code(|a| a.jmp(fword_ptr(at::DATA)));
    machine.run_to_end();
    let state = &machine.state;
    assert_eq!(state.rip, ENTRY + 2);
    let expected = [1u64, 2, 3, 4, 0, 6, 7, 8].map(|n| 0x1111 * n);
    let mut got = state.gpr[..8].to_vec();
    got[gpr::RSP] = 0;
    assert_eq!(got, expected);
    assert_eq!((state.gpr[gpr::RSP], state.rflags), (at::OTHER_STACK, rflags::FIXED));
    assert_eq!((state.tr.selector, state.tr.base, state.tr.access & 15), (sel::TSS2, at::TSS2, 11));
    assert_ne!(state.cr0 & cr0::TS, 0);
    assert_eq!((kind(&machine, sel::TSS), kind(&machine, sel::TSS2)), (9, 11));
    assert_eq!(u64::from(machine.get32(at::TSS + tss::EIP)), end);
    assert_eq!(u64::from(machine.get32(at::TSS + tss::EFLAGS)), rflags::CF | rflags::IF | rflags::FIXED);
}

fn calls_nest_and_iret_returns(engine: EngineKind) {
    let mut machine = two_tasks(engine);
    machine.code_at(ENTRY, |a| {
        a.pushfd()?;
        a.pop(dword_ptr(at::DATA + 0x10))?;
        a.str(ecx)?;
        a.iretd()
    });
    machine.code(|a| {
        a.mov(ebx, 0x77)?;
        a.call(fword_ptr(at::DATA))?;
        a.inc(ebx)
    });
    machine.run_to_end();
    assert_eq!(u64::from(machine.get32(at::DATA + 0x10)), rflags::NT | rflags::FIXED, "the inner task is nested");
    assert_eq!(machine.get16(at::TSS2 + tss::LINK), sel::TSS);
    assert_eq!((machine.reg(gpr::RBX), machine.state.tr.selector), (0x78, sel::TSS));
    assert_eq!((kind(&machine, sel::TSS), kind(&machine, sel::TSS2)), (11, 9));
    assert_eq!(machine.state.rflags & rflags::NT, 0);
    assert_eq!(u64::from(machine.get32(at::TSS2 + tss::EFLAGS)) & rflags::NT, 0, "saved without NT");
    // IRET under NT without a task to return to: the link is null.
    let mut machine = Machine::protected(engine);
    machine.set_flags(rflags::NT, 0);
    machine.put16(at::TSS, 0);
    machine.code(|a| a.iretd());
    machine.run_to_handler(TS);
    assert_eq!((machine.frame(true).error, machine.frame(true).rip), (0, at::CODE));
}

fn interrupts_through_a_task_gate(engine: EngineKind) {
    let mut machine = two_tasks(engine);
    machine.set_gate(0x40, gate(sel::TSS2, 0, 0x85, 0));
    let end = machine.code(|a| a.int(0x40)) as u32;
    machine.run_to_end();
    assert_eq!(machine.state.rip, ENTRY + 2);
    assert_ne!(machine.state.rflags & rflags::NT, 0);
    assert_eq!((machine.get32(at::TSS + tss::EIP), machine.get16(at::TSS2)), (end, sel::TSS));
    assert_eq!((kind(&machine, sel::TSS), kind(&machine, sel::TSS2)), (11, 11));
}

fn exceptions_push_their_code(engine: EngineKind) {
    let mut machine = two_tasks(engine);
    machine.set_gate(GP, gate(sel::TSS2, 0, 0x85, 0));
    machine.code(|a| {
        a.mov(eax, 0x100)?;
        a.mov(es, eax)
    });
    machine.run_to_end();
    assert_eq!(machine.state.rip, ENTRY + 2);
    assert_eq!((machine.reg(gpr::RSP), machine.get32(at::OTHER_STACK - 4)), (at::OTHER_STACK - 4, 0x100));
    assert_eq!(u64::from(machine.get32(at::TSS + tss::EIP)), at::CODE + 5, "the faulting instruction");
}

fn checks_of_the_descriptor(engine: EngineKind) {
    let own = |access, limit| descriptor(at::TSS2 as u32, limit, access, 0);
    for (entry, selector, vector, error) in [
        (own(0x8b, 0x67), OWN, GP, OWN),     // busy
        (own(0x09, 0x67), OWN, NP, OWN),     // not present
        (own(0x89, 0x66), OWN, TS, OWN),     // too small
        (own(0x89, 0x67), OWN | 3, GP, OWN), // RPL
        (own(0x89, 0x67), OWN | 4, GP, OWN | 4),
    ] {
        let mut machine = two_tasks(engine);
        machine.set_descriptor(OWN, entry);
        machine.put16(at::DATA + 4, selector);
        machine.code(|a| a.jmp(fword_ptr(at::DATA)));
        machine.run_to_handler(vector);
        assert_eq!((machine.frame(true).error, machine.frame(true).rip), (u64::from(error), at::CODE), "{entry:#x}");
        assert_eq!(machine.state.tr.selector, sel::TSS);
    }
}

/// What is wrong with the new task's registers is reported in the new task, with nothing of it executed.
fn checks_of_the_new_task(engine: EngineKind) {
    for (offset, selector, vector, error) in [
        (tss::CS, sel::DATA, TS, sel::DATA),
        (tss::CS, 0, TS, 0),
        (tss::SS, sel::CODE32, TS, sel::CODE32),
        (tss::SS, sel::USER_DATA, TS, sel::USER_DATA & !3),
        (tss::DS, 0x100, TS, 0x100),
        (tss::GS, OWN, NP, OWN),
        (tss::LDT, sel::DATA, TS, sel::DATA),
    ] {
        let mut machine = two_tasks(engine);
        machine.set_descriptor(OWN, descriptor(0, 0xffff, 0x12, 0));
        machine.put16(at::TSS2 + offset, selector);
        // The handler gets a task of its own: the new one has no usable segments.
        let third = at::FREE;
        machine.memory.fill(third, 0x68, 0).unwrap();
        machine.put32(third + tss::EIP, handler(vector) as u32);
        machine.put32(third + tss::ESP, at::STACK as u32);
        machine.put16(third + tss::CS, sel::CODE32);
        for segment in [tss::ES, tss::SS, tss::DS] {
            machine.put16(third + segment, sel::DATA);
        }
        machine.set_descriptor(OWN + 8, descriptor(third as u32, 0x67, 0x89, 0));
        machine.set_gate(vector, gate(OWN + 8, 0, 0x85, 0));
        machine.code(|a| a.jmp(fword_ptr(at::DATA)));
        machine.run_to_handler(vector);
        assert_eq!(machine.stack(0, 4), u64::from(error), "{offset:#x}");
        assert_eq!(machine.get16(third), sel::TSS2, "the fault belongs to the new task");
        assert_eq!(u64::from(machine.get32(at::TSS2 + tss::EIP)), ENTRY);
        assert_eq!(kind(&machine, sel::TSS), 9);
    }
}

fn the_old_task_is_saved_whole(engine: EngineKind) {
    let mut machine = two_tasks(engine);
    for n in 0..8 {
        machine.state.gpr[n] = 0x8000_0000 + n as u64;
    }
    machine.state.segments[seg::FS] = machine.segment(sel::USER_DATA);
    machine.put32(at::TSS + tss::CR3, 0x9999);
    machine.code(|a| a.jmp(fword_ptr(at::DATA)));
    machine.run_to_end();
    let saved: Vec<_> = (0..8).map(|n| machine.get32(at::TSS + tss::EAX + 4 * n)).collect();
    assert_eq!(saved, (0..8).map(|n| 0x8000_0000 + n).collect::<Vec<u32>>());
    let selector = |offset| machine.get16(at::TSS + offset);
    assert_eq!((selector(tss::CS), selector(tss::SS), selector(tss::FS)), (sel::CODE32, sel::DATA, sel::USER_DATA));
    assert_eq!(machine.get32(at::TSS + tss::CR3), 0x9999, "CR3 and the LDT selector are never saved");
}

fn tasks_of_16_bit(engine: EngineKind) {
    let mut machine = two_tasks(engine);
    let t = at::TSS2;
    machine.memory.fill(t, 0x68, 0).unwrap();
    // IP, FLAGS, AX, CX, DX, BX, SP, BP, SI, DI, ES, CS, SS, DS, LDT from 0x0E on.
    let words =
        [ENTRY as u16, 2, 1, 2, 3, 4, at::OTHER_STACK as u16, 6, 7, 8, sel::DATA, sel::CODE32, sel::DATA, sel::DATA, 0];
    for (n, word) in (0..).zip(words) {
        machine.put16(t + 0xe + 2 * n, word);
    }
    machine.set_descriptor(sel::TSS2, descriptor(t as u32, 0x2b, 0x81, 0));
    machine.state.gpr[gpr::RDI] = 0xabcd_1234;
    machine.code(|a| a.call(fword_ptr(at::DATA)));
    machine.run_to_end();
    assert_eq!(machine.state.rip, ENTRY + 2);
    assert_eq!(machine.reg(gpr::RDI) & 0xffff, 8);
    assert_eq!(machine.reg(gpr::RSP) & 0xffff, at::OTHER_STACK);
    assert_eq!((machine.get16(t), kind(&machine, sel::TSS2)), (sel::TSS, 3));
}

/// The T bit raises a debug trap before the task's first instruction.
fn the_trap_bit_of_a_task(engine: EngineKind) {
    let mut machine = two_tasks(engine);
    machine.put16(at::TSS2 + tss::TRAP, 1);
    machine.code(|a| a.jmp(fword_ptr(at::DATA)));
    machine.run_to_handler(1);
    assert_eq!(machine.frame(false).rip, ENTRY);
    assert_eq!(machine.state.dr[4] & 1 << 15, 1 << 15, "DR6.BT");
}

fn a_new_task_has_its_own_space(engine: EngineKind) {
    let mut machine = Machine::paged(engine, crate::harness::Paging::Bits32);
    let other = two_tasks(engine);
    let mut bytes = vec![0; 0x1000];
    other.memory.read(at::TSS2, &mut bytes).unwrap();
    machine.memory.write(at::TSS2, &bytes).unwrap();
    machine.put16(at::DATA + 4, sel::TSS2);
    machine.memory.write(ENTRY, &[0xe6, crate::harness::FINISH, 0xf4, 0xeb, 0xfd]).unwrap();
    let mut tables = vec![0; 0x1_0000];
    machine.memory.read(at::PAGES, &mut tables).unwrap();
    machine.memory.write(at::PAGES + 0x4_0000, &tables).unwrap();
    machine.put32(at::TSS2 + tss::CR3, (at::PAGES + 0x4_0000) as u32);
    machine.code(|a| a.jmp(fword_ptr(at::DATA)));
    machine.run_to_end();
    assert_eq!((machine.state.cr3, machine.state.rip), (at::PAGES + 0x4_0000, ENTRY + 2));
}

fn tasks_do_not_exist_in_long_mode(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.set_descriptor(OWN, descriptor(at::TSS2 as u32, 0x67, 0x89, 0));
    machine.put16(at::DATA + 4, OWN);
    machine.code(|a| {
        a.mov(edi, at::DATA as u32)?;
        a.jmp(fword_ptr(rdi))
    });
    machine.run_to_handler(GP);
    assert_eq!(machine.frame(true).error, u64::from(OWN));
}
