//! Segmentation (SDM vol. 3, chapters 3 and 5): what loads check, limits and types of accesses.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use platform::x86::{SEGMENT_UNUSABLE, Segment, gpr, rflags, seg};
use vmm::EngineKind;

use crate::harness::{Machine, at, descriptor, sel};

crate::stamp! {
    everywhere: loads_check_the_descriptor, stack_segment_loads_check_more,
        null_selectors_load_but_do_not_work, a_failed_load_changes_nothing, loads_set_the_accessed_bit,
        far_pointers_load_two_registers, local_descriptors, bases_are_added, bases_of_64_bit_mode,
        stack_width_follows_its_segment, moves_to_cs_do_not_exist;
    software: limits_of_data_segments, limits_of_expand_down_segments, limits_of_stack_segments, types_of_accesses,
        limits_of_code, limits_in_real_mode, limits_do_not_count_in_64_bit_mode, rights_and_limits_can_be_asked_for,
        requested_privilege_can_be_adjusted, ring_3_loads_check_privilege
}

const SS: u8 = 12;
const NP: u8 = 11;
const GP: u8 = 13;

/// A selector of the GDT for a test's own descriptors.
const OWN: u16 = sel::FREE;

/// Runs `write` on a protected-mode machine whose [`OWN`] descriptor is `own`. Expects to end in the handler of a vector with
/// an error code, at the instruction `at::CODE + offset`; or to come to the end.
#[track_caller]
fn expect(
    engine: EngineKind,
    own: u64,
    outcome: Option<(u8, u64)>,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Machine {
    let machine = Machine::protected(engine);
    machine.set_descriptor(OWN, own);
    expect_on(machine, outcome, write)
}

#[track_caller]
fn expect_on(
    mut machine: Machine,
    outcome: Option<(u8, u64)>,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Machine {
    machine.code(write);
    match outcome {
        None => machine.run_to_end(),
        Some((vector, error)) => {
            machine.run_to_handler(vector);
            assert_eq!(machine.frame(true).error, error, "error code of vector {vector}");
        }
    }
    machine
}

/// The error code that names a selector.
fn names(selector: u16) -> u64 {
    u64::from(selector & !3)
}

fn loads_check_the_descriptor(engine: EngineKind) {
    let data = descriptor(0, 0xffff, 0x92, 0);
    for (own, selector, outcome) in [
        (data, OWN, None),
        (descriptor(0, 0xffff, 0x90, 0), OWN, None), // read-only data
        (descriptor(0, 0xffff, 0x96, 0), OWN, None), // expand-down data
        (descriptor(0, 0xffff, 0x9a, 0), OWN, None), // readable code
        (descriptor(0, 0xffff, 0x98, 0), OWN, Some((GP, names(OWN)))), // execute-only code
        (descriptor(0, 0xffff, 0x82, 0), OWN, Some((GP, names(OWN)))), // an LDT
        (descriptor(0, 0xffff, 0x8e, 0), OWN, Some((GP, names(OWN)))), // an interrupt gate
        (0, OWN, Some((GP, names(OWN)))),            // nothing
        (descriptor(0, 0xffff, 0x12, 0), OWN, Some((NP, names(OWN)))), // not present
        (data, OWN | 3, Some((GP, names(OWN)))),     // RPL beyond DPL
        (descriptor(0, 0xffff, 0x9e, 0), OWN | 3, None), // readable conforming code: any RPL
        (descriptor(0, 0xffff, 0x9a, 0), OWN | 3, Some((GP, names(OWN)))), // code that does not conform
        (data, 0x100, Some((GP, 0x100))),            // beyond the table
        (data, OWN | 4, Some((GP, names(OWN) | 4))), // of an LDT that is not there
    ] {
        expect(engine, own, outcome, |a| {
            a.mov(eax, u32::from(selector))?;
            a.mov(es, eax)
        });
        // The same by POP.
        expect(engine, own, outcome, |a| {
            a.push(i32::from(selector))?;
            a.pop(fs)
        });
    }
}

fn stack_segment_loads_check_more(engine: EngineKind) {
    let writable = descriptor(0, 0xfffff, 0x92, 0xc);
    for (own, selector, outcome) in [
        (writable, OWN, None),
        (descriptor(0, 0xfffff, 0x90, 0xc), OWN, Some((GP, names(OWN)))), // read-only
        (descriptor(0, 0xfffff, 0x9a, 0xc), OWN, Some((GP, names(OWN)))), // code
        (descriptor(0, 0xfffff, 0x12, 0xc), OWN, Some((SS, names(OWN)))), // not present
        (writable, OWN | 1, Some((GP, names(OWN)))),                      // RPL is not CPL
        (descriptor(0, 0xfffff, 0xf2, 0xc), OWN, Some((GP, names(OWN)))), // DPL is not CPL
        (writable, 0, Some((GP, 0))),                                     // null
        (writable, 0x100, Some((GP, 0x100))),                             // beyond the table
    ] {
        expect(engine, own, outcome, |a| {
            a.mov(eax, u32::from(selector))?;
            a.mov(ss, eax)
        });
    }
}

fn ring_3_loads_check_privilege(engine: EngineKind) {
    for (own, selector, allowed) in [
        (descriptor(0, 0xffff, 0xf2, 0), OWN | 3, true),
        (descriptor(0, 0xffff, 0xf2, 0), OWN, true),
        (descriptor(0, 0xffff, 0xb2, 0), OWN | 1, false),
        (descriptor(0, 0xffff, 0x92, 0), OWN, false),
        (descriptor(0, 0xffff, 0x9e, 0), OWN, true),
    ] {
        let mut machine = Machine::protected(engine);
        machine.set_descriptor(OWN, own);
        machine.open_gate(3);
        machine.enter_user();
        machine.code(|a| {
            a.mov(eax, u32::from(selector))?;
            a.mov(gs, eax)?;
            a.int3()
        });
        machine.run_to_handler(if allowed { 3 } else { GP });
        if !allowed {
            assert_eq!(machine.frame(true).error, names(OWN));
        }
    }
}

fn null_selectors_load_but_do_not_work(engine: EngineKind) {
    for null in 0..4u32 {
        expect(engine, 0, None, |a| {
            a.mov(eax, null)?;
            a.mov(es, eax)?;
            a.mov(gs, eax)
        });
        expect(engine, 0, Some((GP, 0)), |a| {
            a.mov(eax, null)?;
            a.mov(es, eax)?;
            a.mov(al, byte_ptr(at::DATA).es())
        });
    }
}

fn a_failed_load_changes_nothing(engine: EngineKind) {
    let machine = expect(engine, descriptor(0, 0xffff, 0x12, 0), Some((NP, names(OWN))), |a| {
        a.mov(eax, u32::from(OWN))?;
        a.mov(es, eax)
    });
    let loaded = machine.state.segments[seg::ES];
    assert_eq!((loaded.selector, loaded.access & SEGMENT_UNUSABLE), (sel::DATA, 0));
    assert_eq!(machine.frame(true).rip, at::CODE + 5);
    let machine = expect(engine, 0, Some((GP, names(OWN))), |a| {
        a.push(i32::from(OWN))?;
        a.pop(es)
    });
    assert_eq!(machine.reg(gpr::RSP), at::STACK - 4 - 16, "ESP did not move");
}

fn loads_set_the_accessed_bit(engine: EngineKind) {
    let machine = expect(engine, descriptor(0, 0xffff, 0x92, 0), None, |a| {
        a.mov(eax, u32::from(OWN))?;
        a.mov(es, eax)
    });
    assert_eq!(machine.get64(at::GDT + u64::from(OWN)) >> 40 & 0xff, 0x93);
    let loaded = machine.state.segments[seg::ES];
    assert_eq!(loaded, Segment { selector: OWN, base: 0, limit: 0xffff, access: 0x93 });
}

fn far_pointers_load_two_registers(engine: EngineKind) {
    let machine = Machine::protected(engine);
    machine.set_descriptor(OWN, descriptor(0x1234, 0xffff, 0x92, 0));
    machine.put32(at::DATA, 0x5566_7788);
    machine.put16(at::DATA + 4, OWN);
    let machine = expect_on(machine, None, |a| {
        a.lgs(ebx, fword_ptr(at::DATA))?;
        a.les(cx, dword_ptr(at::DATA + 2))
    });
    assert_eq!(machine.reg(gpr::RBX), 0x5566_7788);
    assert_eq!(machine.reg(gpr::RCX), 0x5566);
    let loaded = machine.state.segments[seg::GS];
    assert_eq!((loaded.selector, loaded.base), (OWN, 0x1234));
    assert_eq!(machine.state.segments[seg::ES].selector, OWN);
}

fn local_descriptors(engine: EngineKind) {
    let machine = Machine::protected(engine);
    machine.put64(at::LDT + 8, descriptor(0x5_0000, 0xfff, 0x92, 0));
    machine.put32(0x5_0010, 0x99);
    let machine = expect_on(machine, None, |a| {
        a.mov(eax, u32::from(sel::LDT))?;
        a.lldt(ax)?;
        a.mov(eax, 0xc)?;
        a.mov(fs, eax)?;
        a.mov(ebx, dword_ptr(0x10u32).fs())?;
        a.sldt(ecx)
    });
    assert_eq!((machine.reg(gpr::RBX), machine.reg(gpr::RCX)), (0x99, u64::from(sel::LDT)));
    assert_eq!((machine.state.ldtr.base, machine.state.ldtr.limit), (at::LDT, 0xff));
    // LLDT wants an LDT, of the GDT, that is present.
    expect(engine, descriptor(0, 0xff, 0x92, 0), Some((GP, names(OWN))), |a| {
        a.mov(eax, u32::from(OWN))?;
        a.lldt(ax)
    });
    expect(engine, descriptor(0, 0xff, 0x02, 0), Some((NP, names(OWN))), |a| {
        a.mov(eax, u32::from(OWN))?;
        a.lldt(ax)
    });
}

fn bases_are_added(engine: EngineKind) {
    let machine = Machine::protected(engine);
    machine.set_descriptor(OWN, descriptor(0xffff_f000, 0xfffff, 0x92, 0xc));
    machine.put32(0x1234, 0xabcd_0123);
    let machine = expect_on(machine, None, |a| {
        a.mov(eax, u32::from(OWN))?;
        a.mov(es, eax)?;
        // The sum wraps around at 4 GiB.
        a.mov(ebx, dword_ptr(0x2234u32).es())
    });
    assert_eq!(machine.reg(gpr::RBX), 0xabcd_0123);
}

/// 64-bit mode knows the bases of FS and GS only, and those in full width.
fn bases_of_64_bit_mode(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.put64(at::DATA + 0x20, 0x1122_3344);
    machine.state.segments[seg::ES].base = 0x7777;
    machine.state.segments[seg::FS].base = at::DATA + 0x1_0000_0000;
    machine.state.segments[seg::GS].base = at::DATA;
    let machine = expect_on(machine, None, |a| {
        a.mov(rcx, -0x1_0000_0000i64)?;
        a.mov(rax, qword_ptr(rcx + 0x20).fs())?;
        a.mov(ebx, 0x18)?;
        a.mov(rbx, qword_ptr(rbx + 8).gs())?;
        a.mov(edi, at::DATA as u32)?;
        a.mov(rdi, qword_ptr(rdi + 0x20).es())
    });
    assert_eq!(
        (machine.reg(gpr::RAX), machine.reg(gpr::RBX), machine.reg(gpr::RDI)),
        (0x1122_3344, 0x1122_3344, 0x1122_3344)
    );
}

fn stack_width_follows_its_segment(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.set_descriptor(OWN, descriptor(0x5_0000, 0xffff, 0x92, 0));
    machine.state.gpr[gpr::RSP] = 0x1234_0000;
    machine.code(|a| {
        a.mov(eax, u32::from(OWN))?;
        a.mov(ss, eax)?;
        a.push(0x1122_3344)?;
        a.push(word_ptr(at::DATA))
    });
    machine.put16(at::DATA, 0xbeef);
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RSP), 0x1234_fffa, "SP wraps around, and only SP changes");
    assert_eq!((machine.get32(0x5_fffc), machine.get16(0x5_fffa)), (0x1122_3344, 0xbeef));
}

fn moves_to_cs_do_not_exist(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.bytes(&[0x8e, 0xc8]);
    machine.run_to_handler(6);
    assert_eq!(machine.frame(false).rip, at::CODE);
}

fn load_own(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, u32::from(OWN))?;
    a.mov(es, eax)
}

fn limits_of_data_segments(engine: EngineKind) {
    let small = descriptor(at::DATA as u32, 0xf, 0x92, 0);
    let pages = descriptor(at::DATA as u32, 0, 0x92, 8);
    for (own, offset, size, inside) in [
        (small, 0xfu32, 1, true),
        (small, 0x10, 1, false),
        (small, 0xc, 4, true),
        (small, 0xd, 4, false),
        (small, 0xf, 2, false),
        (small, 0x8, 8, true),
        (small, 0x9, 8, false),
        (small, 0xffff_ffff, 2, false),
        (pages, 0xfff, 1, true),
        (pages, 0xffc, 4, true),
        (pages, 0xffd, 4, false),
    ] {
        for write in [false, true] {
            let outcome = if inside { None } else { Some((GP, 0)) };
            expect(engine, own, outcome, |a| {
                load_own(a)?;
                let (byte, word) = (byte_ptr(offset).es(), word_ptr(offset).es());
                let (dword, qword) = (dword_ptr(offset).es(), qword_ptr(offset).es());
                match (size, write) {
                    (1, false) => a.mov(al, byte),
                    (1, true) => a.mov(byte, al),
                    (2, false) => a.mov(ax, word),
                    (2, true) => a.mov(word, ax),
                    (4, false) => a.mov(eax, dword),
                    (4, true) => a.mov(dword, eax),
                    (_, false) => a.fld(qword),
                    (_, true) => a.fst(qword),
                }
            });
        }
    }
}

/// The limit of an expand-down segment is the last offset that is outside.
fn limits_of_expand_down_segments(engine: EngineKind) {
    let narrow = descriptor(0x5_0000, 0xfff, 0x96, 0);
    let wide = descriptor(0x5_0000, 0xfff, 0x96, 4);
    for (own, offset, inside) in [
        (narrow, 0x1000u32, true),
        (narrow, 0xffc, false),
        (narrow, 0xfff, false),
        (narrow, 0xfffc, true),
        (narrow, 0xfffd, false),
        (narrow, 0x1_0000, false),
        (wide, 0x1000, true),
        (wide, 0xffd, false),
        (wide, 0x1_0000, true),
    ] {
        let outcome = if inside { None } else { Some((GP, 0)) };
        expect(engine, own, outcome, |a| {
            load_own(a)?;
            a.mov(ebx, dword_ptr(offset).es())
        });
    }
}

fn limits_of_stack_segments(engine: EngineKind) {
    let own = descriptor(0, 0x7eff, 0x92, 4);
    // The handler needs a stack that works: it gets one from a task state segment, by coming from ring 3.
    for (offset, inside) in [(0x7efc, true), (0x7efd, false), (0x8000, false)] {
        for push in [false, true] {
            let mut machine = Machine::protected(engine);
            machine.set_descriptor(OWN, own | 0x60 << 40);
            machine.open_gate(3);
            machine.enter_user();
            machine.state.segments[seg::SS] = Segment { selector: OWN | 3, ..machine.segment(OWN) };
            machine.state.gpr[gpr::RBP] = offset;
            machine.state.gpr[gpr::RSP] = if push { offset + 4 } else { 0x1000 };
            machine.code(|a| {
                if push { a.push(eax) } else { a.mov(eax, dword_ptr(ebp)) }?;
                a.int3()
            });
            let start = machine.state.rip;
            machine.run_to_handler(if inside { 3 } else { SS });
            if !inside {
                assert_eq!((machine.frame(true).error, machine.frame(true).rip), (0, start));
            }
        }
    }
}

fn types_of_accesses(engine: EngineKind) {
    let (read_only, code) = (descriptor(at::DATA as u32, 0xff, 0x90, 4), descriptor(at::DATA as u32, 0xff, 0x9a, 4));
    for own in [read_only, code] {
        expect(engine, own, None, |a| {
            load_own(a)?;
            a.mov(ebx, dword_ptr(4u32).es())
        });
        expect(engine, own, Some((GP, 0)), |a| {
            load_own(a)?;
            a.mov(dword_ptr(4u32).es(), ebx)
        });
        expect(engine, own, Some((GP, 0)), |a| {
            load_own(a)?;
            a.add(dword_ptr(4u32).es(), 1)
        });
    }
    // Code can be read through CS if it is readable, and never written.
    expect(engine, 0, None, |a| a.mov(ebx, dword_ptr(at::DATA).cs()));
    expect(engine, 0, Some((GP, 0)), |a| a.mov(dword_ptr(at::DATA).cs(), ebx));
    let mut machine = Machine::protected(engine);
    machine.state.segments[seg::CS].access &= !2;
    expect_on(machine, Some((GP, 0)), |a| a.mov(ebx, dword_ptr(at::DATA).cs()));
}

fn limits_of_code(engine: EngineKind) {
    // A near jump beyond the limit faults where the jump is.
    let mut machine = Machine::protected(engine);
    machine.state.segments[seg::CS].limit = 0x8fff;
    let machine = expect_on(machine, Some((GP, 0)), |a| {
        a.nop()?;
        a.jmp(0x9000)
    });
    assert_eq!(machine.frame(true).rip, at::CODE + 1);
    // Running past the limit faults at the first instruction that is not all inside.
    let mut machine = Machine::protected(engine);
    machine.state.rip = 0x8ffc;
    machine.state.segments[seg::CS].limit = 0x8fff;
    machine.bytes(&[0x90, 0x90, 0xb8, 1, 0, 0, 0]);
    machine.set_gate(GP, crate::harness::gate(sel::CODE32, crate::harness::handler(GP) as u32, 0x8e, 0));
    machine.run_to_handler(GP);
    assert_eq!((machine.frame(true).error, machine.frame(true).rip), (0, 0x8ffe));
}

/// Real mode has limits too: a word at 0xFFFF does not wrap around.
fn limits_in_real_mode(engine: EngineKind) {
    let mut machine = Machine::real(engine);
    machine.code(|a| {
        a.mov(bx, 0xffffu32 as i32)?;
        a.mov(ax, word_ptr(bx))
    });
    machine.run_to_handler(GP);
    assert_eq!(machine.stack(0, 2), at::CODE + 3, "no error code");
    let mut machine = Machine::real(engine);
    machine.code(|a| {
        a.mov(bp, 0xffffu32 as i32)?;
        a.mov(word_ptr(bp), ax)
    });
    machine.run_to_handler(SS);
    let mut machine = Machine::real(engine);
    machine.put8(0xffff, 0x77);
    machine.code(|a| {
        a.mov(bx, 0xffffu32 as i32)?;
        a.mov(al, byte_ptr(bx))
    });
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RAX) & 0xff, 0x77);
}

fn limits_do_not_count_in_64_bit_mode(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    for index in [seg::DS, seg::ES, seg::SS] {
        machine.state.segments[index] = Segment { selector: 0, base: 0, limit: 0, access: SEGMENT_UNUSABLE };
    }
    machine.put32(at::DATA, 0x77);
    machine.code(|a| {
        a.mov(ebx, at::DATA as u32)?;
        a.push(rbx)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.mov(dword_ptr(rbx + 4).es(), eax)
    });
    machine.run_to_end();
    assert_eq!(machine.get32(at::DATA + 4), 0x77);
}

/// LAR, LSL, VERR, VERW.
fn rights_and_limits_can_be_asked_for(engine: EngineKind) {
    let own = descriptor(0x1234, 0xabcde, 0x92, 0xc);
    let machine = expect(engine, own, None, |a| {
        a.mov(ecx, u32::from(OWN))?;
        a.lar(eax, ecx)?;
        a.lsl(ebx, ecx)?;
        a.verw(cx)?;
        a.sete(dl)?;
        a.mov(ecx, u32::from(sel::CODE32))?;
        a.verw(cx)?;
        a.sete(dh)
    });
    assert_eq!(machine.reg(gpr::RAX), 0xca_9200 & 0xf0_ff00 | 0x0a_0000, "limit bits 19:16 show too");
    assert_eq!(machine.reg(gpr::RBX), 0xabcd_efff);
    assert_eq!(machine.reg(gpr::RDX) & 0xffff, 1);
    // What may not be looked at clears ZF and leaves the register.
    for (own, selector) in [(0, OWN), (descriptor(0, 0, 0x8e, 0), OWN), (own, OWN | 3), (own, 0x100), (own, 0)] {
        let machine = expect(engine, own, None, |a| {
            a.mov(ecx, u32::from(selector))?;
            a.mov(ebx, 0x55)?;
            a.cmp(ebx, ebx)?;
            a.lsl(ebx, ecx)
        });
        assert_eq!(machine.reg(gpr::RBX), 0x55, "{selector:#x}");
        assert_eq!(machine.state.rflags & rflags::ZF, 0, "{selector:#x}");
    }
}

fn requested_privilege_can_be_adjusted(engine: EngineKind) {
    let machine = expect(engine, 0, None, |a| {
        a.mov(eax, 0x10)?;
        a.mov(ecx, 0x33)?;
        a.arpl(ax, cx)?;
        a.setz(bl)?;
        a.arpl(cx, ax)?;
        a.setz(bh)
    });
    assert_eq!(machine.reg(gpr::RAX), 0x13);
    assert_eq!(machine.reg(gpr::RCX), 0x33);
    assert_eq!(machine.reg(gpr::RBX), 1);
}
