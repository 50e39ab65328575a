//! Modes, state, code.

use iced_x86::code_asm::*;
use platform::x86::{VcpuState, cr0, efer, gpr, rflags, seg};
use platform::{AccessSize, BusDevice};
use std::sync::Arc;
use vmm::{EngineKind, VcpuExit};

use crate::harness::{Access, FINISH, Machine, PORT, at, descriptor, sel};

crate::stamp! {
    everywhere: runs_in_real_mode, runs_in_protected_mode, runs_in_long_mode, climbs_from_real_to_long_mode,
        starts_at_the_reset_vector, keeps_its_state, goes_on_where_it_stopped, code_that_modifies_itself,
        code_modified_from_outside, says_that_it_is_bhyve;
    software:
}

fn runs_in_real_mode(engine: EngineKind) {
    let mut machine = Machine::real(engine);
    machine.state.segments[seg::DS].selector = 0xc00;
    machine.state.segments[seg::DS].base = at::DATA;
    machine.put16(at::DATA + 4, 0x1234);
    machine.code(|a| {
        a.mov(ax, word_ptr(4))?;
        a.add(ax, 1)?;
        a.mov(dx, u32::from(PORT))?;
        a.out(dx, ax)
    });
    machine.run_to_end();
    assert_eq!(machine.world.log(), [Access::Out(0, 2, 0x1235)]);
}

fn runs_in_protected_mode(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.code(|a| {
        a.mov(eax, 0x1234_5678)?;
        a.push(eax)?;
        a.pop(dword_ptr(at::DATA))
    });
    machine.run_to_end();
    assert_eq!(machine.get32(at::DATA), 0x1234_5678);
}

fn runs_in_long_mode(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.code(|a| {
        a.mov(r9, 0x1234_5678_9abc_def0u64)?;
        a.lea(r10, ptr(r9 + r9 * 2 + 1))?;
        a.mov(qword_ptr(at::DATA), r10)
    });
    machine.run_to_end();
    assert_eq!(machine.get64(at::DATA), 0x1234_5678_9abc_def0u64.wrapping_mul(3) + 1);
}

/// The guest goes through all modes by itself, as a boot loader does.
fn climbs_from_real_to_long_mode(engine: EngineKind) {
    let mut machine = Machine::real(engine);
    // Tables as the constructors write them; the vCPU starts in real mode all the same.
    let real = machine.state.clone();
    machine.enter_long();
    machine.state = real;
    let (gdtr, in_32, in_64) = (at::DATA, at::CODE + 0x100, at::CODE + 0x200);
    machine.put16(gdtr, 0xff);
    machine.put32(gdtr + 2, at::GDT as u32);
    machine.code_of(16, at::CODE, |a| {
        a.cli()?;
        a.lgdt(ptr(gdtr))?;
        a.mov(eax, cr0)?;
        a.or(eax, cr0::PE as i32)?;
        a.mov(cr0, eax)?;
        // jmp CODE32:in_32
        a.db(&[0x66, 0xea])?;
        a.dd(&[in_32 as u32])?;
        a.dw(&[sel::CODE32])
    });
    machine.code_of(32, in_32, |a| {
        a.mov(eax, u32::from(sel::DATA))?;
        a.mov(ds, eax)?;
        a.mov(ss, eax)?;
        a.mov(esp, at::STACK as u32)?;
        a.mov(eax, cr4)?;
        a.or(eax, 1 << 5)?;
        a.mov(cr4, eax)?;
        a.mov(eax, at::PAGES as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.or(eax, efer::LME as i32)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, cr0::PG as i32)?;
        a.mov(cr0, eax)?;
        a.db(&[0xea])?;
        a.dd(&[in_64 as u32])?;
        a.dw(&[sel::CODE64])
    });
    machine.code_of(64, in_64, |a| {
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.push(rax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.out(u32::from(FINISH), al)?;
        a.hlt()
    });
    machine.run_to_end();
    assert_eq!(machine.state.efer & (efer::LME | efer::LMA), efer::LME | efer::LMA);
    assert_eq!(machine.reg(gpr::RAX) & (efer::LME | efer::LMA), efer::LME | efer::LMA);
    assert_eq!(machine.stack(0, 8), 0x1122_3344_5566_7788);
    assert_eq!(machine.state.segments[seg::CS].selector, sel::CODE64);
}

/// A boot ROM that is a device on the bus, as read-only as it gets.
struct Rom;

impl BusDevice for Rom {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        // At the reset vector: mov al, 0x5a; jmp 0:CODE.
        let code = [0xb0, 0x5a, 0xea, at::CODE as u8, (at::CODE >> 8) as u8, 0, 0];
        let byte = |at: u64| at.checked_sub(0xfff0).and_then(|at| code.get(at as usize)).copied().unwrap_or(0xf4);
        (0..size.bytes()).rev().fold(0, |value, i| value << 8 | u64::from(byte(offset + i)))
    }
    fn write(&self, _: u64, _: AccessSize, _: u64) {}
}

fn starts_at_the_reset_vector(engine: EngineKind) {
    let mut machine = Machine::real(engine);
    machine.mmio.map(0xffff_0000, 0x1_0000, Arc::new(Rom)).unwrap();
    machine.code(|a| a.mov(bl, 1));
    machine.state = VcpuState::reset();
    machine.run_to_end();
    assert_eq!((machine.reg(gpr::RAX) & 0xff, machine.reg(gpr::RBX)), (0x5a, 1));
    assert_eq!(machine.state.segments[seg::CS].base, 0);
}

fn keeps_its_state(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.state.gpr = std::array::from_fn(|i| 0x0101_0101_0101_0101 * i as u64);
    machine.state.rflags |= rflags::CF | rflags::DF | rflags::IF;
    machine.state.cr2 = 0x7777_7000;
    machine.state.cr8 = 5;
    machine.state.dr[1] = 0x1234_5678;
    machine.state.segments[seg::FS].base = 0x12_3456_7000;
    machine.state.segments[seg::GS].base = 0xffff_8000_0000_1000;
    machine.state.segments[seg::ES].access |= 1 << 12;
    machine.state.msrs = vec![(0xc000_0081, 0x0023_0010_0000_0000), (0xc000_0082, 0xffff_8000_0000_2000), (0x174, 8)];
    machine.vcpus[0].set_state(&machine.state).unwrap();
    let got = machine.vcpus[0].state().unwrap();
    for msr in &machine.state.msrs {
        assert!(got.msrs.contains(msr), "{msr:x?} in {:x?}", got.msrs);
    }
    let mut wanted = machine.state.clone();
    wanted.msrs.clone_from(&got.msrs);
    assert_eq!(got, wanted);
    // What an engine says, it takes.
    machine.vcpus[0].set_state(&got).unwrap();
    let mut again = machine.vcpus[0].state().unwrap();
    again.msrs.clone_from(&got.msrs);
    assert_eq!(again, got);
}

/// Stopping between instructions changes nothing that the guest can see.
fn goes_on_where_it_stopped(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.code(|a| {
        a.mov(eax, 1)?;
        a.out(u32::from(FINISH), al)?;
        a.add(eax, 41)?;
        a.mov(dx, u32::from(PORT))?;
        a.out(dx, eax)
    });
    assert_eq!(machine.run(), VcpuExit::Stopped);
    let half_way = machine.vcpus[0].state().unwrap();
    machine.vcpus[0].set_state(&half_way).unwrap();
    assert_eq!(machine.resume_with(|_| ()), VcpuExit::Stopped);
    assert_eq!(machine.world.outputs(), [42]);
    assert_eq!(machine.world.finishes(), [1, 42]);
}

fn code_that_modifies_itself(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    // The immediate of MOV EAX (at the loop's start) counts up; the next instruction is changed just before it runs.
    let start = machine.state.rip as u32;
    machine.code(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(eax, 7)?;
        a.mov(byte_ptr(start + 19), 0x40)?;
        a.add(dword_ptr(start + 1), 1)?;
        // At start + 19: NOP, which becomes INC EAX.
        a.nop()?;
        a.mov(byte_ptr(start + 19), 0x90)?;
        a.cmp(eax, 20)?;
        a.jne(again)
    });
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RAX), 20);
    assert_eq!(machine.get32(u64::from(start) + 1), 20);
}

/// A device (or the loader of the next guest) writes over code that has run.
fn code_modified_from_outside(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    let start = machine.state.clone();
    machine.code(|a| a.mov(ecx, 1));
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RCX), 1);
    machine.state = start;
    machine.code(|a| a.mov(ecx, 2));
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RCX), 2);
}

fn says_that_it_is_bhyve(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.code(|a| {
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.mov(r8d, ecx)?;
        a.mov(r9d, ebx)?;
        a.mov(eax, 0x4000_0000u32)?;
        a.cpuid()
    });
    machine.run_to_end();
    let name: Vec<u8> =
        [gpr::RBX, gpr::RCX, gpr::RDX].iter().flat_map(|&r| (machine.reg(r) as u32).to_le_bytes()).collect();
    assert_eq!(name, b"bhyve bhyve ");
    assert_eq!(machine.reg(8) >> 31 & 1, 1, "a hypervisor is present");
    assert_eq!(machine.reg(8) >> 5 & 1, 0, "no VMX");
    assert_eq!(machine.reg(9) >> 24, 0, "APIC id");
}

#[test]
fn descriptors_are_what_the_manual_says() {
    assert_eq!(descriptor(0x1234_5678, 0xabcde, 0x9b, 0xc), 0x12ca_9b34_5678_bcde);
}
