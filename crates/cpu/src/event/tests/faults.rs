//! Double and triple faults, NMI blocking, debug exceptions.

use iced_x86::code_asm::*;
use platform::x86::{gpr, rflags, seg};

use crate::Exit;
use crate::event::request::bit;
use crate::testing::{Machine, at, sel};

/// Takes away the page at 0xa00000.
fn without_page() -> Machine {
    let mut m = Machine::long();
    m.put(at::PAGES + 0x2000 + 8 * 5, 0u64);
    m
}

#[test]
fn contributory_after_contributory_is_a_double_fault() {
    let mut m = Machine::long();
    // #GP whose gate is not present: #NP.
    m.set_gate64(13, sel::CODE64, Machine::handler(13), 0x0e, 0);
    m.bytes(&[0x0f, 0x01, 0x14, 0x25, 0, 0, 0, 0]);
    m.set_cs(sel::USER_CODE64);
    m.set_data(sel::USER_DATA);
    m.step(1);
    m.assert_in_handler(8);
    assert_eq!(m.stack::<u64>(0), 0);
    assert_eq!(m.stack::<u64>(1), at::CODE);
}

#[test]
fn benign_before_contributory_is_delivered_serially() {
    let mut m = Machine::long();
    m.set_gate64(6, sel::CODE64, Machine::handler(6), 0x0e, 0);
    m.code(|a| a.ud2());
    m.step(1);
    m.assert_in_handler(11);
    assert_eq!(m.stack::<u64>(0), 6 << 3 | 3);
}

#[test]
fn page_fault_combinations() {
    // Page fault, then contributory: double fault.
    let mut m = without_page();
    m.set_gate64(14, sel::CODE64, Machine::handler(14), 0x0e, 0);
    m.code(|a| a.mov(al, byte_ptr(0xa0_0000)));
    m.step(1);
    m.assert_in_handler(8);
    assert_eq!(m.vcpu.cr2, 0xa0_0000);
    // Page fault, then page fault on the handler's stack: double fault on its own stack, CR2 of the second.
    let mut m = without_page();
    m.put(at::TSS + 0x24, at::STACK);
    m.set_gate64(8, sel::CODE64, Machine::handler(8), 0x8e, 1);
    m.code(|a| a.mov(al, byte_ptr(0xa0_0000)));
    m.set_reg(gpr::RSP, 0xa0_1000);
    m.step(1);
    m.assert_in_handler(8);
    assert_eq!(m.vcpu.cr2, 0xa0_1000 - 8);
    // Contributory, then page fault: the page fault.
    let mut m = without_page();
    m.put(at::TSS + 0x24, 0xa0_1000u64);
    m.set_gate64(13, sel::CODE64, Machine::handler(13), 0x8e, 1);
    m.code(|a| a.int(0xff));
    m.vcpu.idtr.limit = 0xff0;
    m.step(1);
    m.assert_in_handler(14);
    assert_eq!(m.stack::<u64>(0), 2, "a supervisor write");
}

#[test]
fn a_fault_during_a_double_fault_shuts_down() {
    let mut m = Machine::long();
    m.vcpu.idtr.limit = 0;
    m.code(|a| a.ud2());
    assert_eq!(m.vcpu.step(1), Some(Exit::Shutdown));
    assert_eq!(m.vcpu.step(1), Some(Exit::Shutdown), "until INIT");
    m.vcpu.events().raise(bit::INIT);
    m.world.msrs.lock().unwrap().insert(0x1b, 1 << 8);
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.segments[seg::CS].base), (0xfff0, 0xffff_0000));
}

#[test]
fn real_mode_shuts_down_without_a_vector_table() {
    let mut m = Machine::real();
    m.vcpu.idtr.limit = 0;
    m.code(|a| a.ud2());
    assert_eq!(m.vcpu.step(1), Some(Exit::Shutdown));
}

#[test]
fn init_and_start_up() {
    let mut m = Machine::long();
    m.set_reg(gpr::RBX, 5);
    m.vcpu.msrs.star = 7;
    m.vcpu.events().raise(bit::INIT);
    assert_eq!(m.vcpu.step(2), Some(Exit::WaitForSipi));
    assert_eq!(m.world.take_log(), [crate::testing::Bus::InitReset]);
    assert_eq!((m.vcpu.efer, m.vcpu.cr4, m.reg(gpr::RBX)), (0, 0, 0));
    assert_eq!(m.reg(gpr::RDX), 0x806f8, "family, model, stepping");
    assert_eq!(m.vcpu.msrs.star, 7, "MSRs survive");
    m.vcpu.events().raise_startup(0x08);
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.segments[seg::CS].base, m.vcpu.segments[seg::CS].selector), (0, 0x8000, 0x800));
    m.memory.write(0x8000, &[0xb0, 0x42]).unwrap();
    m.step(1);
    assert_eq!(m.reg(gpr::RAX), 0x42);
}

#[test]
fn nmis_wait_for_iret() {
    let mut m = Machine::long().into_user();
    m.code(|a| a.nop());
    m.code_at(Machine::handler(2), |a| {
        a.nop()?;
        a.iretq()
    });
    m.vcpu.events().raise(bit::NMI);
    m.step(1);
    m.assert_in_handler(2);
    m.vcpu.events().raise(bit::NMI);
    m.step(1);
    assert_eq!(m.vcpu.rip(), Machine::handler(2) + 1, "the second waits");
    m.step(1);
    assert_eq!(m.vcpu.rip(), at::CODE);
    m.step(1);
    m.assert_in_handler(2);
    m.step(3);
    assert_eq!(m.vcpu.rip(), at::CODE + 1, "there is no third");
}

#[test]
fn a_load_of_ss_holds_off_interrupts_for_one_instruction() {
    let mut m = Machine::long();
    m.set_flags(rflags::IF, 0);
    m.set_reg(gpr::RAX, u64::from(sel::DATA));
    m.code(|a| {
        a.mov(ss, eax)?;
        a.mov(rsp, 0x5000u64)?;
        a.nop()
    });
    m.step(1);
    m.world.interrupts.lock().unwrap().push_back(0x40);
    m.vcpu.events().raise(bit::INTERRUPT);
    m.step(1);
    assert_eq!(m.reg(gpr::RSP), 0x5000);
    m.step(1);
    m.assert_in_handler(0x40);
}

#[test]
fn single_step_traps_after_each_instruction() {
    let mut m = Machine::long();
    m.code(|a| {
        a.nop()?;
        a.nop()
    });
    m.set_flags(rflags::TF, 0);
    m.step(2);
    m.assert_in_handler(1);
    assert_eq!(m.stack::<u64>(0), at::CODE + 1);
    assert_eq!(m.stack::<u64>(2), rflags::TF | rflags::FIXED);
    assert_eq!(m.vcpu.rflags() & rflags::TF, 0);
    assert_eq!(m.vcpu.dr6, 0xffff_4ff0);
    m.code(|a| a.iretq());
    m.step(1);
    assert_eq!(m.vcpu.rip(), at::CODE + 1);
    m.step(2);
    m.assert_in_handler(1);
    assert_eq!(m.stack::<u64>(0), at::CODE + 2);
}

#[test]
fn single_step_on_branches() {
    let mut m = Machine::long();
    m.vcpu.msrs.debugctl = 2;
    m.code(|a| {
        a.nop()?;
        a.nop()?;
        a.jmp(0x9000)
    });
    m.set_flags(rflags::TF, 0);
    m.step(4);
    m.assert_in_handler(1);
    assert_eq!(m.stack::<u64>(0), 0x9000);
    assert_eq!(m.vcpu.msrs.debugctl, 0);
}

#[test]
fn a_repeated_string_instruction_goes_on_behind_its_breakpoint() {
    let mut m = Machine::long();
    m.code(|a| a.rep().stosb());
    m.set_reg(gpr::RDI, 0x5000);
    m.set_reg(gpr::RCX, 3);
    m.set_flags(rflags::TF | rflags::RF, 0);
    m.vcpu.dr[0] = at::CODE;
    m.vcpu.dr7 |= 1;
    m.vcpu.update_debug_attention();
    m.step(2);
    m.assert_in_handler(1);
    assert_eq!((m.stack::<u64>(0), m.vcpu.dr6 & 15), (at::CODE, 0));
    assert_ne!(m.stack::<u64>(2) & rflags::RF, 0);
}

#[test]
fn alignment_is_checked_in_ring_3() {
    let mut m = Machine::long().into_user();
    m.vcpu.cr0 |= platform::x86::cr0::AM;
    m.set_flags(rflags::AC, 0);
    m.code(|a| {
        a.mov(ebx, dword_ptr(0x5004))?;
        a.mov(ebx, dword_ptr(0x5002))
    });
    m.step(2);
    m.assert_in_handler(17);
    assert_eq!((m.stack::<u64>(0), m.stack::<u64>(1)), (0, at::CODE + 7));
}

#[test]
fn int_n_is_not_single_stepped_into() {
    let mut m = Machine::long();
    m.code(|a| a.int(0x30));
    m.code_at(Machine::handler(0x30), |a| a.nop());
    m.set_flags(rflags::TF, 0);
    m.step(2);
    assert_eq!(m.vcpu.rip(), Machine::handler(0x30) + 1);
}

#[test]
fn an_instruction_breakpoint_is_a_fault_that_rf_overrides() {
    let mut m = Machine::long();
    m.code(|a| {
        a.nop()?;
        a.inc(rbx)?;
        a.nop()
    });
    m.vcpu.dr[2] = at::CODE + 1;
    m.vcpu.dr7 |= 1 << 4 | 1 << 13;
    m.vcpu.update_debug_attention();
    m.step(2);
    m.assert_in_handler(1);
    assert_eq!(m.stack::<u64>(0), at::CODE + 1);
    assert_eq!(m.stack::<u64>(2) & rflags::RF, 0);
    assert_eq!(m.vcpu.dr6 & 15, 4);
    assert_eq!(m.vcpu.dr7 & 1 << 13, 0, "general detect is off in the handler");
    // The handler sets RF in the frame.
    m.code(|a| {
        a.or(qword_ptr(rsp + 16), 0x10000)?;
        a.iretq()
    });
    m.step(3);
    assert_eq!((m.vcpu.rip(), m.reg(gpr::RBX)), (at::CODE + 4, 1));
    assert_eq!(m.vcpu.rflags() & rflags::RF, 0);
}

#[test]
fn data_breakpoints_trap_after_the_access() {
    let mut m = Machine::long();
    m.code(|a| {
        a.mov(rbx, qword_ptr(0x5000))?;
        a.mov(qword_ptr(0x5000), rbx)
    });
    m.vcpu.dr[0] = 0x5004;
    m.vcpu.dr7 |= 1 | 1 << 16 | 3 << 18;
    m.vcpu.tlb.flush_all();
    m.vcpu.update_debug_attention();
    m.step(2);
    assert_eq!(m.vcpu.rip(), at::CODE + 16);
    m.step(1);
    m.assert_in_handler(1);
    assert_eq!(m.vcpu.dr6 & 15, 1);
}

#[test]
fn a_load_of_ss_holds_off_debug_traps_too() {
    // Single step: the trap of MOV SS is lost, the next one comes.
    let mut m = Machine::long();
    m.set_reg(gpr::RAX, u64::from(sel::DATA));
    m.code(|a| {
        a.mov(ss, eax)?;
        a.nop()
    });
    m.set_flags(rflags::TF, 0);
    m.step(3);
    m.assert_in_handler(1);
    assert_eq!(m.stack::<u64>(0), at::CODE + 3);
    // A data breakpoint of MOV SS waits, here until INT3 has entered its handler.
    let mut m = Machine::long();
    m.put(0x5000, sel::DATA);
    m.code(|a| {
        a.mov(ss, word_ptr(0x5000))?;
        a.int3()
    });
    m.vcpu.dr[0] = 0x5000;
    m.vcpu.dr7 |= 1 | 3 << 16 | 1 << 18;
    m.vcpu.tlb.flush_all();
    m.vcpu.update_debug_attention();
    m.step(3);
    m.assert_in_handler(1);
    assert_eq!((m.stack::<u64>(0), m.vcpu.dr6 & 15), (Machine::handler(3), 1));
    // An instruction breakpoint behind MOV SS does not hit.
    let mut m = Machine::long();
    m.set_reg(gpr::RAX, u64::from(sel::DATA));
    m.code(|a| {
        a.mov(ss, eax)?;
        a.nop()?;
        a.nop()
    });
    m.vcpu.dr[0] = at::CODE + 2;
    m.vcpu.dr7 |= 1;
    m.vcpu.update_debug_attention();
    m.step(3);
    assert_eq!(m.vcpu.rip(), at::CODE + 4);
}

#[test]
fn general_detect_guards_the_debug_registers() {
    let mut m = Machine::long();
    m.vcpu.dr7 |= 1 << 13;
    m.code(|a| a.mov(rax, dr6));
    m.step(1);
    m.assert_in_handler(1);
    assert_eq!(m.stack::<u64>(0), at::CODE);
    assert_eq!((m.vcpu.dr6 >> 13 & 1, m.vcpu.dr7 >> 13 & 1), (1, 0));
}
