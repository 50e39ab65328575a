//! Several vCPUs.

use iced_x86::code_asm::*;
use platform::x86::{Activity, gpr};
use vmm::{EngineKind, PolicyOptions, VcpuExit};

use crate::harness::{Access, Config, FINISH, Machine, PORT, at, sel};

crate::stamp! {
    everywhere: waits_for_a_startup_ipi, startup_ipi_starts_a_vcpu, locked_instructions_count_right,
        locked_instructions_count_right_in_64_bit_code, code_written_by_another_vcpu_is_run,
        a_loop_is_left_when_another_vcpu_changes_it;
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

/// Two vCPUs in 64-bit mode; the second one starts at [`ENTRY`] together with the first.
fn two_long(engine: EngineKind, second: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Machine {
    let mut machine = Machine::new(Config { engine, cpus: 2, policy: PolicyOptions::default() });
    machine.enter_long();
    machine.code_of(64, ENTRY, second);
    let mut state = machine.state.clone();
    state.rip = ENTRY;
    state.gpr[gpr::RSP] = at::OTHER_STACK;
    state.activity = Activity::Running;
    machine.vcpus[1].set_state(&state).unwrap();
    machine
}

/// As above, with every kind of locked instruction, and a lock around an addition that is not.
fn locked_instructions_count_right_in_64_bit_code(engine: EngineKind) {
    const MANY: u32 = 40_000;
    let (counters, done) = (at::DATA, at::DATA + 0x800);
    let count = |a: &mut CodeAssembler| {
        a.mov(rbx, counters)?;
        a.mov(ecx, MANY)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.lock().inc(dword_ptr(rbx))?;
        a.mov(eax, 3)?;
        a.lock().xadd(qword_ptr(rbx + 8), rax)?;
        a.lock().sub(word_ptr(rbx + 16), 1)?;
        let (mut retry, mut taken) = (a.create_label(), a.create_label());
        a.mov(rax, qword_ptr(rbx + 24))?;
        a.set_label(&mut retry)?;
        a.lea(rdx, ptr(rax + 5))?;
        a.lock().cmpxchg(qword_ptr(rbx + 24), rdx)?;
        a.jne(retry)?;
        a.set_label(&mut taken)?;
        a.lock().bts(dword_ptr(rbx + 64), 7)?;
        let mut free = a.create_label();
        a.jnc(free)?;
        a.pause()?;
        a.jmp(taken)?;
        a.set_label(&mut free)?;
        a.add(dword_ptr(rbx + 68), 1)?;
        a.lock().and(dword_ptr(rbx + 64), 0)?;
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.mov(edx, 1)?;
        a.xchg(dword_ptr(rbx + 128), edx)?;
        a.test(edx, edx)?;
        a.jnz(spin)?;
        a.inc(dword_ptr(rbx + 132))?;
        a.mov(dword_ptr(rbx + 128), 0)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.lock().inc(dword_ptr(done))
    };
    let mut machine = two_long(engine, |a| {
        count(a)?;
        a.hlt()
    });
    machine.code(|a| {
        count(a)?;
        let mut both = a.create_label();
        a.set_label(&mut both)?;
        a.pause()?;
        a.cmp(dword_ptr(done), 2)?;
        a.jne(both)
    });
    machine.run_to_end();
    let all = 2 * MANY;
    assert_eq!(machine.get32(counters), all, "LOCK INC");
    assert_eq!(machine.get32(counters + 8), 3 * all, "LOCK XADD");
    assert_eq!(machine.get32(counters + 16) & 0xffff, all.wrapping_neg() & 0xffff, "LOCK SUB");
    assert_eq!(machine.get32(counters + 24), 5 * all, "LOCK CMPXCHG");
    assert_eq!(machine.get32(counters + 68), all, "under a lock of LOCK BTS");
    assert_eq!(machine.get32(counters + 132), all, "under a lock of XCHG");
}

/// One vCPU writes a function and says so; the other one serialises and calls it (SDM vol. 3, 9.1.3).
fn code_written_by_another_vcpu_is_run(engine: EngineKind) {
    const WRITES: u32 = 300;
    let (function, said, heard, result) = (at::FREE, at::DATA, at::DATA + 0x40, at::DATA + 0x80);
    let mut machine = two_long(engine, |a| {
        a.xor(esi, esi)?;
        let (mut wait, mut call) = (a.create_label(), a.create_label());
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(said), esi)?;
        a.je(wait)?;
        a.mov(esi, dword_ptr(said))?;
        a.xor(eax, eax)?;
        a.cpuid()?;
        // Often enough to be translated.
        a.mov(ebp, 20)?;
        a.mov(edi, function as u32)?;
        a.set_label(&mut call)?;
        a.call(rdi)?;
        a.mov(dword_ptr(result), eax)?;
        a.dec(ebp)?;
        a.jne(call)?;
        a.mov(dword_ptr(heard), esi)?;
        a.jmp(wait)
    });
    machine.code_at(function, |a| {
        a.mov(eax, 0x1234_5678)?;
        a.ret()
    });
    machine.code(|a| {
        a.xor(ebx, ebx)?;
        a.xor(edx, edx)?;
        let (mut again, mut wait, mut right) = (a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.inc(ebx)?;
        a.mov(dword_ptr(function + 1), ebx)?;
        a.mov(dword_ptr(said), ebx)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(heard), ebx)?;
        a.jne(wait)?;
        a.cmp(dword_ptr(result), ebx)?;
        a.je(right)?;
        a.inc(edx)?;
        a.set_label(&mut right)?;
        a.cmp(ebx, WRITES)?;
        a.jne(again)
    });
    machine.run_to_end();
    assert_eq!((machine.reg(gpr::RBX), machine.reg(gpr::RDX)), (u64::from(WRITES), 0), "rounds, wrong results");
}

/// Nothing but the change itself tells the other vCPU.
fn a_loop_is_left_when_another_vcpu_changes_it(engine: EngineKind) {
    let (looping, left) = (at::DATA, at::DATA + 0x40);
    let mut machine = two_long(engine, |a| {
        a.mov(ebx, looping as u32)?;
        a.mov(edi, at::FREE as u32)?;
        a.jmp(rdi)
    });
    // INC dword [RBX]; JMP to the start, of two bytes; then what follows.
    machine.code_at(at::FREE, |a| {
        a.inc(dword_ptr(rbx))?;
        a.db(&[0xeb, 0xfc])?;
        a.mov(dword_ptr(left), 1)?;
        a.hlt()
    });
    machine.code(|a| {
        let (mut wait, mut until) = (a.create_label(), a.create_label());
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(looping), 10_000)?;
        a.jb(wait)?;
        // The distance of the jump becomes 0.
        a.mov(byte_ptr(at::FREE + 3), 0)?;
        a.set_label(&mut until)?;
        a.pause()?;
        a.cmp(dword_ptr(left), 1)?;
        a.jne(until)
    });
    machine.run_to_end();
}
