//! Stopping, halting, shutting down.

use std::time::Instant;

use iced_x86::code_asm::*;
use platform::PowerEvent;
use platform::x86::{Activity, DescriptorTable, gpr, rflags};
use vmm::{EngineKind, VcpuExit};

use crate::harness::{HUNG, Machine, PORT};

crate::stamp! {
    everywhere: stops_while_it_runs, stops_while_it_is_halted, stops_before_it_runs, stops_are_never_lost,
        triple_fault_shuts_down, halted_for_good;
    software:
}

fn stops_while_it_runs(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.code(|a| {
        a.mov(eax, 1)?;
        a.mov(dx, u32::from(PORT))?;
        a.out(dx, al)?;
        let mut forever = a.create_label();
        a.set_label(&mut forever)?;
        a.inc(rbx)?;
        a.jmp(forever)
    });
    let exit = machine.run_with(|world| {
        world.await_output(1);
        world.stop(0);
    });
    assert_eq!(exit, VcpuExit::Stopped);
    assert!(machine.world.finishes().is_empty());
    assert_eq!(machine.state.activity, Activity::Running);
}

fn stops_while_it_is_halted(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.set_flags(rflags::IF, 0);
    machine.code(|a| {
        a.mov(eax, 1)?;
        a.mov(dx, u32::from(PORT))?;
        a.out(dx, al)?;
        a.hlt()
    });
    let exit = machine.run_with(|world| {
        world.await_output(1);
        world.stop(0);
    });
    assert_eq!(exit, VcpuExit::Stopped);
    assert!(machine.world.finishes().is_empty());
    // The first request may have come before the HLT; so go on until it is reached. It comes out of it, and goes back to it.
    let start = Instant::now();
    let mut halted = 0;
    while halted < 3 {
        let exit = machine.resume_with(|world| {
            std::thread::yield_now();
            world.stop(0);
        });
        assert_eq!(exit, VcpuExit::Stopped);
        assert!(machine.world.finishes().is_empty(), "nobody woke it");
        halted += u32::from(machine.vcpus[0].state().unwrap().activity == Activity::Halted);
        assert!(start.elapsed() < HUNG, "it never halts");
    }
}

fn stops_before_it_runs(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.code(|a| a.mov(ebx, 1));
    machine.world.stop(0);
    assert_eq!(machine.run(), VcpuExit::Stopped);
    assert_eq!(machine.reg(gpr::RBX), 0, "not one instruction");
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RBX), 1, "a request counts once");
}

/// Requests at random moments, among them those between two entries.
fn stops_are_never_lost(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.code(|a| {
        let mut forever = a.create_label();
        a.mov(dx, u32::from(PORT))?;
        a.set_label(&mut forever)?;
        a.in_(al, dx)?;
        a.jmp(forever)
    });
    machine.vcpus[0].set_state(&machine.state).unwrap();
    for round in 0..100u32 {
        let exit = machine.resume_with(|world| {
            for _ in 0..round * 50 {
                std::hint::spin_loop();
            }
            world.stop(0);
        });
        assert_eq!(exit, VcpuExit::Stopped);
        machine.world.take_log();
    }
}

fn triple_fault_shuts_down(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.state.idtr = DescriptorTable { base: 0, limit: 0 };
    machine.code(|a| a.int3());
    assert_eq!(machine.run(), VcpuExit::Shutdown);
    assert_eq!(machine.state.activity, Activity::Shutdown);
    assert_eq!(machine.resume_with(|_| ()), VcpuExit::Shutdown, "it stays that way");
    let mut fresh = Machine::protected(engine);
    fresh.code(|a| a.mov(ebx, 1));
    machine.state = fresh.state.clone();
    machine.code(|a| a.mov(ebx, 1));
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RBX), 1, "a new state revives it");
}

fn halted_for_good(engine: EngineKind) {
    let mut machine = Machine::real(engine);
    machine.code(|a| {
        a.cli()?;
        a.hlt()
    });
    assert_eq!(machine.run(), VcpuExit::Stopped);
    assert_eq!(machine.world.power(), [PowerEvent::Halt]);
    assert!(machine.world.finishes().is_empty());
}
