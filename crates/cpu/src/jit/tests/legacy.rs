//! Code outside 64-bit mode.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use platform::x86::gpr;

use super::{DATA, counters, run, translated};
use crate::testing::{Machine, at, descriptor, sel};

type Write = dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A segment with a base: its selector, and where it begins.
const BASED: u16 = sel::FREE;
const BASE: u64 = DATA + 0x100;
/// One that ends soon.
const SHORT: u16 = sel::FREE + 8;
/// Addresses as the assembler takes them.
const DATA32: i64 = DATA as i64;
const BASE32: i64 = BASE as i64;

fn segments(mut machine: Machine) -> Machine {
    machine.set_descriptor(BASED, descriptor(BASE as u32, 0xfffff, 0x93, 0xc));
    machine.set_descriptor(SHORT, descriptor(BASE as u32, 0x7ff, 0x93, 4));
    for i in 0..0x400 {
        machine.put(DATA + 4 * i, (i as u32).wrapping_mul(0x9e37_79b9));
    }
    for vector in [11, 12, 13, 14] {
        machine.put(Machine::handler(vector), 0xf4u8);
    }
    machine
}

/// Runs code under both tiers and compares what they leave; returns the translated machine.
#[track_caller]
fn same(prepare: impl Fn() -> Machine, write: &Write) -> Machine {
    let start = |mut machine: Machine| {
        machine.code(write);
        run(&mut machine);
        machine
    };
    let (expected, machine) = (start(segments(prepare())), start(translated(segments(prepare()))));
    for r in 0..16 {
        assert_eq!(expected.reg(r), machine.reg(r), "register {r}");
    }
    assert_eq!(expected.vcpu.rip(), machine.vcpu.rip());
    assert_eq!(expected.vcpu.rflags(), machine.vcpu.rflags());
    assert_eq!(expected.vcpu.segments, machine.vcpu.segments);
    for place in (DATA..DATA + 0x1000).chain(0..0x20).chain(at::STACK - 0x100..at::STACK + 0x20) {
        assert_eq!(expected.get::<u8>(place), machine.get::<u8>(place), "memory at {place:#x}");
    }
    assert!(counters(&machine).blocks > 0);
    machine
}

#[test]
fn loops_calls_and_the_stack() {
    let machine = same(Machine::protected, &|a| {
        let (mut again, mut function, mut done) = (a.create_label(), a.create_label(), a.create_label());
        let mut entry = a.create_label();
        a.mov(ecx, 1000)?;
        a.xor(eax, eax)?;
        a.mov(dword_ptr(DATA32 + 0x800), 0)?;
        a.set_label(&mut again)?;
        a.push(fs)?;
        a.push(cs)?;
        a.push(ds)?;
        a.pop(ebx)?;
        a.pop(edx)?;
        a.add(eax, ebx)?;
        a.pop(ebx)?;
        a.add(eax, edx)?;
        a.add(eax, ebx)?;
        a.push(ecx)?;
        a.push(dword_ptr(DATA32 + 0x800))?;
        a.push(0x1234)?;
        a.call(function)?;
        a.pop(dword_ptr(DATA32 + 0x804))?;
        a.pop(ecx)?;
        a.dec(ecx)?;
        a.inc(dword_ptr(DATA32 + 0x800))?;
        a.jecxz(done)?;
        a.jmp(again)?;
        a.set_label(&mut function)?;
        a.push(ebp)?;
        a.mov(ebp, esp)?;
        a.sub(esp, 0x20)?;
        a.mov(edx, dword_ptr(ebp + 8))?;
        a.mov(dword_ptr(ebp - 8), edx)?;
        a.mov(ebx, dword_ptr(ebp + 12))?;
        a.add(eax, dword_ptr(ebp - 8))?;
        a.add(eax, dword_ptr(esp + 0x18))?;
        a.inc(bx)?;
        a.add(eax, ebx)?;
        a.leave()?;
        a.ret_1(4)?;
        a.set_label(&mut done)?;
        a.mov(ecx, 3)?;
        a.set_label(&mut entry)?;
        a.add(eax, ecx)?;
        a.pushfd()?;
        a.popfd()?;
        a.loop_(entry)?;
        a.hlt()
    });
    let counters = counters(&machine);
    assert!(counters.entries < 60 && counters.interpreted < 2100, "POP to memory only: {counters:?}");
}

#[test]
fn addresses_wrap_at_4_gib() {
    same(Machine::protected, &|a| {
        a.mov(ebx, 0xffff_fff0u32)?;
        a.mov(eax, dword_ptr(ebx + DATA32 + 0x20))?;
        // One group, whose members' base is once below zero.
        a.mov(ebx, 8)?;
        a.mov(edx, dword_ptr(ebx))?;
        a.sub(ebx, 0x10)?;
        a.mov(dword_ptr(ebx + 0x10), eax)?;
        a.mov(dword_ptr(ebx + 0x14), 7)?;
        a.add(ebx, 0x10)?;
        a.add(dword_ptr(ebx + 4), 5)?;
        a.mov(esi, DATA32 as u32)?;
        a.mov(ecx, 0x4000_0000)?;
        a.lea(edi, ptr(esi + ecx * 4 + 0x40))?;
        a.add(eax, dword_ptr(esi + ecx * 4 + 0x10))?;
        a.bts(dword_ptr(esi + 0x100), ecx)?;
        a.hlt()
    });
    // The stack around zero: a push reaches the last bytes of the address space, where there is no memory.
    same(Machine::protected, &|a| {
        a.mov(esp, 4)?;
        a.push(0x77)?;
        a.mov(ebx, dword_ptr(esp))?;
        a.mov(dword_ptr(esp + 8), ebx)?;
        a.push(0x78)?;
        a.mov(eax, dword_ptr(esp + 4))?;
        a.mov(ecx, esp)?;
        a.mov(esp, at::STACK as u32)?;
        a.hlt()
    });
}

#[test]
fn segments_with_a_base_and_with_a_limit() {
    let machine = same(Machine::protected, &|a| {
        let mut again = a.create_label();
        a.mov(eax, u32::from(BASED))?;
        a.mov(fs, eax)?;
        a.mov(gs, eax)?;
        a.mov(edx, 50)?;
        a.set_label(&mut again)?;
        a.mov(ecx, edx)?;
        a.mov(ebx, dword_ptr(0x10).fs())?;
        a.add(ebx, dword_ptr(ecx * 4 + 0x20).gs())?;
        a.mov(dword_ptr(ecx * 4 - 0x40).fs(), ebx)?;
        a.mov(esi, 0xffff_fff0u32)?;
        a.add(dword_ptr(esi).gs(), ebx)?;
        a.mov(edi, BASE32 as u32)?;
        a.mov(esi, DATA32 as u32 + 0x800)?;
        a.rep().movsd()?;
        a.dec(edx)?;
        a.jnz(again)?;
        a.hlt()
    });
    assert!(counters(&machine).misses < 100, "{:?}", counters(&machine));
    // Beyond the limit: #GP, with the frame of the instruction.
    same(Machine::protected, &|a| {
        a.mov(eax, u32::from(SHORT))?;
        a.mov(fs, eax)?;
        a.mov(ebx, dword_ptr(0x7fc).fs())?;
        a.cmp(ebx, 5)?;
        a.mov(ebx, dword_ptr(0x7fd).fs())?;
        a.mov(ecx, 1)?;
        a.hlt()
    });
    // No segment at all.
    same(Machine::protected, &|a| {
        a.xor(eax, eax)?;
        a.mov(gs, eax)?;
        a.mov(ebx, dword_ptr(DATA32).gs())?;
        a.hlt()
    });
}

#[test]
fn a_data_segment_that_comes_and_goes() {
    same(Machine::protected, &|a| {
        let mut again = a.create_label();
        a.mov(ecx, 50)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.mov(eax, u32::from(SHORT))?;
        a.mov(ds, eax)?;
        a.add(ebx, dword_ptr(0x10))?;
        a.add(ebx, dword_ptr(ecx * 4))?;
        a.mov(eax, u32::from(sel::DATA))?;
        a.mov(ds, eax)?;
        a.add(dword_ptr(DATA32 + 0x300), ebx)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.hlt()
    });
}

#[test]
fn the_same_bytes_mean_two_things_in_two_modes() {
    const SHARED: u64 = 0x9000;
    let prepare = || {
        let mut machine = Machine::long();
        // DEC EAX; ADD EAX, EBX; RETF. With a REX prefix: ADD RAX, RBX; RETF.
        machine.memory.write(SHARED, &[0x48, 0x01, 0xd8, 0xcb]).expect("in RAM");
        machine.set_reg(gpr::RBX, 0x1_0000_0003);
        machine
    };
    let machine = same(prepare, &|a| {
        let mut again = a.create_label();
        for (place, selector) in [(0x900, sel::CODE32), (0x910, sel::CODE64)] {
            a.mov(dword_ptr(DATA + place), SHARED as i32)?;
            a.mov(word_ptr(DATA + place + 4), u32::from(selector))?;
        }
        a.mov(ecx, 100)?;
        a.xor(eax, eax)?;
        a.xor(r8d, r8d)?;
        a.mov(edi, DATA as u32)?;
        a.set_label(&mut again)?;
        // CALL FAR [RDI + 0x900]
        a.db(&[0xff, 0x9f, 0, 9, 0, 0])?;
        a.add(r8, rax)?;
        a.mov(rbx, 0x1_0000_0003u64)?;
        a.db(&[0xff, 0x9f, 0x10, 9, 0, 0])?;
        a.add(r8, rax)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.hlt()
    });
    assert_eq!(machine.reg(gpr::RAX) & 0xffff_ffff, 100 * 5);
}
