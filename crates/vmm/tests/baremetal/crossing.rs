//! Instructions and data that cross pages, pages that are not there, and instructions that fault half-way.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use platform::x86::gpr;
use vmm::EngineKind;

use crate::harness::{FINISH, Machine, Paging, at, gate, handler, pte, sel};

crate::stamp! {
    everywhere: instructions_across_pages, data_across_pages, strings_fault_between_elements;
    software: the_rest_of_an_instruction_is_missing, code_in_the_second_page_changes, the_second_page_moves,
        writes_across_pages_are_all_or_nothing, pushes_that_fault_leave_the_stack_pointer, frames_are_all_or_nothing,
        descriptors_across_pages, string_pages_are_asked_for_in_turn, locked_accesses_across_pages,
        exchanges_that_fault_change_nothing
}

const PF: u8 = 14;
/// Two pages that meet here. They lie apart in physical memory: the second one is where the first one's neighbour is not.
const BOUNDARY: u64 = at::FREE + 0x2000;
const SECOND: u64 = at::FREE + 0x8000;

/// A machine whose second page is mapped with `flags`, or not at all.
fn machine(engine: EngineKind, paging: Paging, flags: u64) -> Machine {
    let machine = Machine::paged(engine, paging);
    machine.set_entry(paging, machine.entry_at(paging, BOUNDARY), SECOND | flags);
    machine
}

/// Puts bytes across the boundary, as linear space shows them.
fn put_across(machine: &Machine, start: u64, bytes: &[u8]) {
    let split = (BOUNDARY - start) as usize;
    machine.memory.write(start, &bytes[..split.min(bytes.len())]).unwrap();
    if split < bytes.len() {
        machine.memory.write(SECOND, &bytes[split..]).unwrap();
    }
}

/// MOV EAX, 0x12345678; INC EAX; and the end of the run.
const CODE: [u8; 10] = [0xb8, 0x78, 0x56, 0x34, 0x12, 0x83, 0xc0, 1, 0xe6, FINISH];

fn modes(engine: EngineKind) -> &'static [Paging] {
    match engine {
        EngineKind::Soft => &[Paging::Bits32, Paging::Pae, Paging::Long],
        EngineKind::Kvm => &[Paging::Long],
    }
}

fn instructions_across_pages(engine: EngineKind) {
    for &paging in modes(engine) {
        for before in 1..8 {
            let mut machine = machine(engine, paging, pte::ALL);
            machine.state.rip = BOUNDARY - before;
            put_across(&machine, BOUNDARY - before, &CODE);
            machine.run_to_end();
            assert_eq!(machine.reg(gpr::RAX), 0x1234_5679, "{paging:?} {before}");
        }
    }
}

/// The fault is of the second page, the instruction to repeat the whole one.
fn the_rest_of_an_instruction_is_missing(engine: EngineKind) {
    for paging in [Paging::Bits32, Paging::Pae, Paging::Long] {
        for (flags, present) in [(0, 0), (pte::ALL | pte::NX, 1)] {
            if paging == Paging::Bits32 && present == 1 {
                continue;
            }
            let mut machine = machine(engine, paging, flags);
            machine.state.rip = BOUNDARY - 3;
            put_across(&machine, BOUNDARY - 3, &CODE);
            machine.run_to_handler(PF);
            let fetch = if paging == Paging::Bits32 { 0 } else { 0x10 };
            let frame = machine.frame(true);
            assert_eq!((frame.error, machine.state.cr2, frame.rip), (fetch | present, BOUNDARY, BOUNDARY - 3));
            assert_eq!(machine.reg(gpr::RAX), 0);
            // Once it is there, the instruction is executed as if nothing had been.
            machine.set_entry(paging, machine.entry_at(paging, BOUNDARY), SECOND | pte::ALL);
            machine.state.rip = frame.rip;
            machine.run_to_end();
            assert_eq!(machine.reg(gpr::RAX), 0x1234_5679);
        }
    }
    // An instruction that ends at the boundary asks for nothing behind it.
    let mut machine = machine(engine, Paging::Long, 0);
    machine.state.rip = BOUNDARY - 7;
    machine.memory.write(BOUNDARY - 7, &[0xb8, 1, 0, 0, 0, 0xeb, 0x80]).unwrap();
    machine.memory.write(BOUNDARY - 128, &[0xe6, FINISH, 0xf4]).unwrap();
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RAX), 1);
}

/// The instruction has been executed before with other bytes in the second page.
fn code_in_the_second_page_changes(engine: EngineKind) {
    let mut machine = machine(engine, Paging::Long, pte::ALL);
    put_across(&machine, BOUNDARY - 2, &[0xb8, 1, 0, 0, 0, 0xc3]);
    machine.code(|a| {
        a.mov(edi, BOUNDARY as u32)?;
        a.mov(esi, BOUNDARY as u32 - 2)?;
        a.call(rsi)?;
        a.mov(ebx, eax)?;
        a.mov(byte_ptr(rdi), 0x77)?;
        a.call(rsi)
    });
    machine.run_to_end();
    assert_eq!((machine.reg(gpr::RBX), machine.reg(gpr::RAX)), (1, 0x7701));
}

/// The same linear address leads to another second page after a change of the page table.
fn the_second_page_moves(engine: EngineKind) {
    let mut machine = machine(engine, Paging::Long, pte::ALL);
    put_across(&machine, BOUNDARY - 2, &[0xb8, 1, 0, 0, 0, 0xc3]);
    let other = SECOND + 0x1000;
    machine.memory.write(other, &[0x55, 0, 0, 0xc3]).unwrap();
    let entry = machine.entry_at(Paging::Long, BOUNDARY);
    machine.code(|a| {
        a.mov(esi, BOUNDARY as u32 - 2)?;
        a.call(rsi)?;
        a.mov(ebx, eax)?;
        a.mov(ecx, entry as u32)?;
        a.mov(dword_ptr(rcx), (other | pte::ALL) as i32)?;
        a.invlpg(byte_ptr(rsi + 2))?;
        a.call(rsi)
    });
    machine.run_to_end();
    assert_eq!((machine.reg(gpr::RBX), machine.reg(gpr::RAX)), (1, 0x5501));
}

fn data_across_pages(engine: EngineKind) {
    for &paging in modes(engine) {
        let mut machine = machine(engine, paging, pte::ALL);
        put_across(&machine, BOUNDARY - 3, &[1, 2, 3, 4, 5, 6, 7, 8]);
        machine.code(|a| {
            a.mov(eax, dword_ptr(BOUNDARY - 3))?;
            a.mov(bx, word_ptr(BOUNDARY - 1))?;
            a.add(dword_ptr(BOUNDARY - 2), 0x1010_1010)?;
            a.mov(ecx, 0xaabb_ccddu32)?;
            a.mov(dword_ptr(BOUNDARY - 1), ecx)
        });
        machine.run_to_end();
        assert_eq!((machine.reg(gpr::RAX), machine.reg(gpr::RBX)), (0x0403_0201, 0x0403));
        let mut bytes = [0; 8];
        machine.memory.read(BOUNDARY - 3, &mut bytes[..3]).unwrap();
        machine.memory.read(SECOND, &mut bytes[3..]).unwrap();
        assert_eq!(bytes, [1, 0x12, 0xdd, 0xcc, 0xbb, 0xaa, 7, 8], "{paging:?}");
    }
}

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A store that faults in its second page has not touched its first.
fn writes_across_pages_are_all_or_nothing(engine: EngineKind) {
    let stores: [(&str, Write); 8] = [
        ("mov", |a| a.mov(dword_ptr(rdi - 2), eax)),
        ("mov 64", |a| a.mov(qword_ptr(rdi - 7), rax)),
        ("add", |a| a.add(word_ptr(rdi - 1), ax)),
        ("not", |a| a.not(dword_ptr(rdi - 3))),
        ("movups", |a| a.movups(xmmword_ptr(rdi - 5), xmm0)),
        ("fstp", |a| a.fstp(tword_ptr(rdi - 4))),
        ("stosq", |a| {
            a.sub(rdi, 3)?;
            a.stosq()
        }),
        ("fxsave", |a| a.fxsave64(ptr(rdi - 0x100))),
    ];
    for (name, write) in stores {
        for flags in [0, pte::P | pte::U] {
            let mut machine = machine(engine, Paging::Long, flags);
            machine.memory.fill(BOUNDARY - 0x200, 0x200, 0xee).unwrap();
            machine.memory.fill(SECOND, 0x200, 0xee).unwrap();
            machine.state.gpr[gpr::RDI] = BOUNDARY;
            machine.state.gpr[gpr::RAX] = 0x1122_3344_5566_7788;
            machine.code(write);
            machine.run_to_handler(PF);
            let frame = machine.frame(true);
            assert_eq!((frame.error, machine.state.cr2), (2 | u64::from(flags != 0), BOUNDARY), "{name}");
            let mut bytes = [0; 0x200];
            machine.memory.read(BOUNDARY - 0x200, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 0xee), "{name}");
        }
    }
}

fn pushes_that_fault_leave_the_stack_pointer(engine: EngineKind) {
    let pushes: [(&str, Write); 7] = [
        ("push", |a| a.push(eax)),
        ("pushad", |a| a.pushad()),
        ("pushfd", |a| a.pushfd()),
        ("call", |a| a.call(at::CODE + 0x100)),
        ("call far", |a| a.db(&[0x9a, 0, 0x51, 0, 0, 8, 0])),
        ("enter", |a| a.enter(0x20, 0)),
        ("push [m]", |a| a.push(dword_ptr(at::DATA))),
    ];
    for (name, write) in pushes {
        let mut machine = machine(engine, Paging::Pae, 0);
        // The first push still fits for none of them: the stack begins two bytes into the page above.
        machine.state.gpr[gpr::RSP] = BOUNDARY + 0x1002;
        machine.state.gpr[gpr::RBP] = 0x77;
        // The handler needs a stack of its own: a task.
        let t = at::TSS2;
        machine.memory.fill(t, 0x68, 0).unwrap();
        machine.put32(t + 0x1c, machine.state.cr3 as u32);
        machine.put32(t + 0x20, handler(PF) as u32);
        machine.put32(t + 0x38, at::STACK as u32);
        machine.put16(t + 0x4c, sel::CODE32);
        for segment in [0x48, 0x50, 0x54] {
            machine.put16(t + segment, sel::DATA);
        }
        machine.set_gate(PF, gate(sel::TSS2, 0, 0x85, 0));
        machine.code(write);
        machine.run_to_handler(PF);
        let saved = |offset| u64::from(machine.get32(at::TSS + offset));
        assert_eq!((saved(0x20), saved(0x38), saved(0x3c)), (at::CODE, BOUNDARY + 0x1002, 0x77), "{name}");
        assert_eq!(machine.stack(0, 4) & !1, 2, "{name}: a write");
    }
}

/// An interrupt frame that crosses into a missing page: a fault in the fault, on another stack.
fn frames_are_all_or_nothing(engine: EngineKind) {
    let mut machine = machine(engine, Paging::Long, pte::ALL);
    machine.map_page(Paging::Long, BOUNDARY - 0x1000, 0);
    machine.put64(at::TSS + 0x24, at::OTHER_STACK);
    machine.set_gate64(PF, handler(PF), 0x8e, 1);
    machine.memory.fill(SECOND, 0x20, 0xee).unwrap();
    machine.state.gpr[gpr::RSP] = BOUNDARY + 0x10;
    machine.code(|a| a.int(0x40));
    machine.run_to_handler(PF);
    let frame = machine.frame(true);
    assert_eq!((frame.error, frame.rip, frame.rsp), (2, at::CODE, BOUNDARY + 0x10));
    assert_eq!(machine.state.cr2 & !0xfff, BOUNDARY - 0x1000);
}

fn descriptors_across_pages(engine: EngineKind) {
    let mut machine = machine(engine, Paging::Pae, pte::ALL);
    // The GDT's entry 1 has its first four bytes before the boundary.
    let base = BOUNDARY - 12;
    let mut bytes = vec![0; 0x100];
    machine.memory.read(at::GDT, &mut bytes).unwrap();
    put_across(&machine, base, &bytes);
    machine.state.gdtr.base = base;
    machine.code(|a| {
        a.mov(eax, u32::from(sel::DATA))?;
        a.mov(es, eax)?;
        a.db(&[0xea, 0, 0x53, 0, 0, 8, 0])
    });
    machine.code_at(0x5300, |a| {
        a.mov(ebx, dword_ptr(at::DATA).es())?;
        a.out(u32::from(FINISH), al)
    });
    machine.put32(at::DATA, 0x66);
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RBX), 0x66);
}

/// Registers say how far a repeated string instruction got; it goes on from there.
fn strings_fault_between_elements(engine: EngineKind) {
    let paging = Paging::Long;
    for compare in [false, true] {
        let mut machine = machine(engine, paging, 0);
        machine.memory.fill(BOUNDARY - 0x40, 0x40, 0x5a).unwrap();
        machine.memory.fill(SECOND, 0x40, 0x5a).unwrap();
        machine.memory.fill(at::DATA, 0x80, 0x5a).unwrap();
        machine.state.gpr[gpr::RSI] = at::DATA;
        machine.state.gpr[gpr::RDI] = BOUNDARY - 12;
        machine.state.gpr[gpr::RCX] = 8;
        machine.code(|a| if compare { a.repe().cmpsd() } else { a.rep().movsd() });
        machine.run_to_handler(PF);
        assert_eq!((machine.state.cr2, machine.frame(true).rip), (BOUNDARY, at::CODE));
        let progress = [gpr::RCX, gpr::RSI, gpr::RDI].map(|r| machine.reg(r));
        assert_eq!(progress, [5, at::DATA + 12, BOUNDARY], "{compare}");
    }
}

fn string_pages_are_asked_for_in_turn(engine: EngineKind) {
    // The second page comes with the fault; the string goes on and is whole.
    let paging = Paging::Long;
    let mut machine = machine(engine, paging, 0);
    let entry = machine.entry_at(paging, BOUNDARY);
    let repair = at::CODE + 0x400;
    machine.set_gate64(PF, repair, 0x8e, 0);
    machine.code_at(repair, |a| {
        a.mov(r8d, entry as u32)?;
        a.mov(dword_ptr(r8), (SECOND | pte::ALL) as i32)?;
        a.inc(ebx)?;
        a.add(rsp, 8)?;
        a.iretq()
    });
    for (n, address) in (0..).zip(at::DATA..at::DATA + 0x80) {
        machine.put8(address, n);
    }
    machine.state.gpr[gpr::RSI] = at::DATA;
    machine.state.gpr[gpr::RDI] = BOUNDARY - 0x1e;
    machine.state.gpr[gpr::RCX] = 0x10;
    // Elements of 8 bytes, of which one crosses.
    machine.code(|a| a.rep().movsq());
    machine.run_to_end();
    assert_eq!((machine.reg(gpr::RBX), machine.reg(gpr::RCX)), (1, 0));
    let mut bytes = [0; 0x80];
    machine.memory.read(BOUNDARY - 0x1e, &mut bytes[..0x1e]).unwrap();
    machine.memory.read(SECOND, &mut bytes[0x1e..]).unwrap();
    assert_eq!(bytes, std::array::from_fn(|n| n as u8));
}

fn locked_accesses_across_pages(engine: EngineKind) {
    let mut machine = machine(engine, Paging::Long, pte::ALL);
    put_across(&machine, BOUNDARY - 3, &0x1111_1111_1111_1111u64.to_le_bytes());
    machine.code(|a| {
        a.mov(edi, BOUNDARY as u32 - 3)?;
        a.mov(eax, 0x2222_2222)?;
        a.lock().xadd(dword_ptr(rdi), eax)?;
        a.lock().or(qword_ptr(rdi), 0x8)
    });
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RAX), 0x1111_1111);
    let mut bytes = [0; 8];
    machine.memory.read(BOUNDARY - 3, &mut bytes[..3]).unwrap();
    machine.memory.read(SECOND, &mut bytes[3..]).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 0x1111_1111_3333_333b);
}

/// Registers and flags of an instruction whose store faults stay as they were.
fn exchanges_that_fault_change_nothing(engine: EngineKind) {
    let exchanges: [(&str, Write); 7] = [
        ("xchg", |a| a.xchg(dword_ptr(rdi), eax)),
        ("xadd", |a| a.xadd(dword_ptr(rdi), eax)),
        ("cmpxchg", |a| a.cmpxchg(dword_ptr(rdi), ecx)),
        ("cmpxchg8b", |a| a.cmpxchg8b(qword_ptr(rdi))),
        ("adc", |a| a.adc(dword_ptr(rdi), ecx)),
        ("rcl", |a| a.rcl(dword_ptr(rdi), 3)),
        ("pop", |a| a.pop(qword_ptr(rdi))),
    ];
    for (name, write) in exchanges {
        let mut machine = machine(engine, Paging::Long, pte::P | pte::U);
        machine.state.gpr[gpr::RDI] = BOUNDARY + 8;
        machine.state.gpr[gpr::RAX] = 0x5555_5555;
        machine.state.gpr[gpr::RCX] = 0x7fff_ffff;
        machine.put32(SECOND + 8, 0x5555_5555);
        machine.set_flags(1, 0);
        let before = machine.state.clone();
        machine.code(write);
        machine.run_to_handler(PF);
        let frame = machine.frame(true);
        assert_eq!((frame.error, machine.state.cr2), (3, BOUNDARY + 8), "{name}");
        assert_eq!((frame.rsp, frame.flags & 0xfff), (before.gpr[gpr::RSP], before.rflags & 0xfff), "{name}");
        machine.state.gpr[gpr::RSP] = before.gpr[gpr::RSP];
        assert_eq!(machine.state.gpr, before.gpr, "{name}");
        assert_eq!(machine.get32(SECOND + 8), 0x5555_5555, "{name}");
    }
}
