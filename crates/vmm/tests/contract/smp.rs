//! Several vCPUs.

use iced_x86::code_asm::*;
use platform::x86::{Activity, gpr};
use vmm::{EngineKind, PolicyOptions, VcpuExit};

use crate::harness::{Access, Config, FINISH, Machine, PORT, at, sel};

crate::stamp! {
    everywhere: waits_for_a_startup_ipi, startup_ipi_starts_a_vcpu, locked_instructions_count_right;
    software:
}

/// The local APIC's interrupt command register.
const ICR: u32 = 0xfee0_0300;
const INIT_OTHERS: u32 = 0x000c_4500;
const STARTUP_OTHERS: u32 = 0x000c_4600;
/// Where the other vCPU starts; a whole page in its SIPI vector.
const ENTRY: u64 = 0x9_0000;
/// Rounds of each vCPU.
const ROUNDS: u32 = 2000;

fn two(engine: EngineKind) -> Machine {
    let mut machine = Machine::new(Config { engine, cpus: 2, policy: PolicyOptions::default() });
    machine.enter_protected();
    machine
}

fn waits_for_a_startup_ipi(engine: EngineKind) {
    let mut machine = two(engine);
    machine.code(|a| a.mov(ebx, 1));
    machine.run_to_end();
    assert_eq!(machine.vcpus[1].state().unwrap().activity, Activity::WaitForSipi);
    assert_eq!(machine.vcpus[1].index(), 1);
}

fn start_other(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.mov(dword_ptr(ICR), INIT_OTHERS as i32)?;
    a.mov(dword_ptr(ICR), (STARTUP_OTHERS | (ENTRY >> 12) as u32) as i32)
}

fn startup_ipi_starts_a_vcpu(engine: EngineKind) {
    let mut machine = two(engine);
    machine.code(|a| {
        start_other(a)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(at::DATA), 1)?;
        a.jne(wait)
    });
    machine.code_of(16, ENTRY, |a| {
        // CS is the SIPI's page, and everything else is as after INIT.
        a.mov(ax, cs)?;
        a.mov(dx, u32::from(PORT))?;
        a.out(dx, ax)?;
        a.mov(word_ptr(at::DATA), 1)?;
        a.hlt()
    });
    machine.run_to_end();
    assert_eq!(machine.world.log(), [Access::Out(0, 2, ENTRY >> 4)]);
}

/// Both count in one place, by LOCK ADD and LOCK CMPXCHG.
fn locked_instructions_count_right(engine: EngineKind) {
    let mut machine = two(engine);
    let (ready, done, counter) = (at::DATA, at::DATA + 4, at::DATA + 0x40);
    let count = |a: &mut CodeAssembler| {
        a.mov(ecx, ROUNDS)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.lock().inc(dword_ptr(counter))?;
        let mut retry = a.create_label();
        a.mov(eax, dword_ptr(counter + 4))?;
        a.set_label(&mut retry)?;
        a.mov(edx, eax)?;
        a.add(edx, 3)?;
        a.lock().cmpxchg(dword_ptr(counter + 4), edx)?;
        a.jne(retry)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.lock().inc(dword_ptr(done))
    };
    let (gdtr, in_32) = (at::DATA + 0x80, ENTRY + 0x100);
    machine.put16(gdtr, 0xff);
    machine.put32(gdtr + 2, at::GDT as u32);
    machine.code(|a| {
        start_other(a)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(ready), 1)?;
        a.jne(wait)?;
        count(a)?;
        let mut both = a.create_label();
        a.set_label(&mut both)?;
        a.pause()?;
        a.cmp(dword_ptr(done), 2)?;
        a.jne(both)
    });
    machine.code_of(16, ENTRY, |a| {
        a.lgdt(ptr(gdtr))?;
        a.mov(eax, cr0)?;
        a.or(al, 1)?;
        a.mov(cr0, eax)?;
        a.db(&[0x66, 0xea])?;
        a.dd(&[in_32 as u32])?;
        a.dw(&[sel::CODE32])
    });
    machine.code_of(32, in_32, |a| {
        a.mov(eax, u32::from(sel::DATA))?;
        a.mov(ds, eax)?;
        a.mov(dword_ptr(ready), 1)?;
        count(a)?;
        a.hlt()
    });
    assert_eq!(machine.run(), VcpuExit::Stopped);
    assert_eq!(machine.vector(), None);
    assert_eq!(machine.get32(counter), 2 * ROUNDS);
    assert_eq!(machine.get32(counter + 4), 6 * ROUNDS);
    assert_eq!(machine.reg(gpr::RCX), 0);
    let _ = FINISH;
}
