//! Model-specific registers that nobody has, or that bhyve answers itself.

use iced_x86::code_asm::*;
use platform::x86::gpr;
use vmm::{EngineKind, PolicyOptions};

use crate::harness::{Config, Machine, host_is_amd};

crate::stamp! {
    everywhere: unknown_msrs_are_ignored_when_lax, known_msrs_work, bhyve_answers_msrs_that_guests_expect,
        unknown_msrs_fault_when_strict;
    software:
}

/// Nobody's.
const UNKNOWN: u32 = 0x4242;

fn machine(engine: EngineKind, strict_msr: bool) -> Machine {
    let policy = PolicyOptions { strict_msr, amd: host_is_amd(), ..Default::default() };
    let mut machine = Machine::new(Config { engine, cpus: 1, policy });
    machine.enter_long();
    machine
}

fn unknown_msrs_are_ignored_when_lax(engine: EngineKind) {
    let mut machine = machine(engine, false);
    machine.code(|a| {
        a.mov(ecx, UNKNOWN)?;
        a.mov(eax, 5)?;
        a.mov(edx, 6)?;
        a.wrmsr()?;
        a.rdmsr()
    });
    machine.run_to_end();
    assert_eq!((machine.reg(gpr::RAX), machine.reg(gpr::RDX)), (0, 0));
}

fn unknown_msrs_fault_when_strict(engine: EngineKind) {
    for write in [false, true] {
        let mut machine = machine(engine, true);
        machine.code(|a| {
            a.mov(ecx, UNKNOWN)?;
            if write { a.wrmsr() } else { a.rdmsr() }
        });
        let start = machine.state.rip;
        machine.run_to_handler(13);
        assert_eq!((machine.frame(true).error, machine.frame(true).rip), (0, start + 5));
    }
}

fn known_msrs_work(engine: EngineKind) {
    let mut machine = machine(engine, true);
    machine.code(|a| {
        a.mov(ecx, 0xc000_0102u32)?;
        a.mov(eax, 0x1234_5678)?;
        a.mov(edx, 0xffff_8000u32)?;
        a.wrmsr()?;
        a.mov(eax, 0)?;
        a.rdmsr()?;
        a.swapgs()?;
        a.mov(ecx, 0xc000_0101u32)?;
        a.mov(r8d, eax)?;
        a.rdmsr()
    });
    machine.run_to_end();
    assert_eq!((machine.reg(8), machine.reg(gpr::RAX)), (0x1234_5678, 0x1234_5678));
    assert_eq!(machine.reg(gpr::RDX), 0xffff_8000);
}

/// Whatever the engine itself knows of them: bhyve's answers (HWCR; the RAPL unit).
fn bhyve_answers_msrs_that_guests_expect(engine: EngineKind) {
    let mut machine = machine(engine, true);
    let (own, value) = if host_is_amd() { (0xc001_0015u32, 0x0100_0210u64) } else { (0x606, 0x000a_1003) };
    machine.code(|a| {
        a.mov(ecx, 0x8b)?;
        a.rdmsr()?;
        a.mov(ecx, own)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.rdmsr()
    });
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RAX), value);
}
