//! Port I/O and memory-mapped I/O.

use iced_x86::code_asm::*;
use platform::PowerEvent;
use platform::x86::{gpr, rflags, seg};
use vmm::{EngineKind, PolicyOptions};

use crate::harness::{Access, Config, Machine, PORT, at};

crate::stamp! {
    everywhere: ports_of_every_width, string_ports, unclaimed_ports_read_as_ones, strict_ports_abort,
        memory_of_every_width, unclaimed_memory_reads_as_ones, string_memory, vector_registers_reach_devices,
        vector_registers_survive, memory_across_pages;
    software:
}

fn ports_of_every_width(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.world.supply(&[0x11, 0x2222, 0x3333_3333]);
    machine.code(|a| {
        a.mov(rax, -1i64)?;
        a.mov(edx, u32::from(PORT) + 2)?;
        a.in_(al, dx)?;
        a.mov(rbx, rax)?;
        a.in_(ax, dx)?;
        a.mov(rcx, rax)?;
        a.in_(eax, dx)?;
        a.mov(rsi, rax)?;
        a.mov(eax, 0x8765_4321u32)?;
        a.add(edx, 1)?;
        a.out(dx, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)
    });
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RBX), 0xffff_ffff_ffff_ff11);
    assert_eq!(machine.reg(gpr::RCX), 0xffff_ffff_ffff_2222);
    assert_eq!(machine.reg(gpr::RSI), 0x3333_3333, "a 32-bit read clears the upper half");
    let expected = [
        Access::In(2, 1),
        Access::In(2, 2),
        Access::In(2, 4),
        Access::Out(3, 1, 0x21),
        Access::Out(3, 2, 0x4321),
        Access::Out(3, 4, 0x8765_4321),
    ];
    assert_eq!(machine.world.log(), expected);
}

fn string_ports(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.memory.write(at::DATA, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    machine.world.supply(&[0xa1a2, 0xb1b2, 0xc1c2, 0xd1]);
    machine.code(|a| {
        a.mov(edx, u32::from(PORT))?;
        a.mov(esi, at::DATA as u32)?;
        a.mov(ecx, 2)?;
        a.rep().outsd()?;
        a.mov(ecx, 3)?;
        a.mov(esi, at::DATA as u32)?;
        a.rep().outsb()?;
        a.mov(edi, at::DATA as u32 + 0x100)?;
        a.mov(ecx, 3)?;
        a.rep().insw()?;
        a.mov(rbx, rdi)?;
        a.std()?;
        a.insb()?;
        a.cld()
    });
    machine.run_to_end();
    let out = |size, value| Access::Out(0, size, value);
    let expected = [
        out(4, 0x0403_0201),
        out(4, 0x0807_0605),
        out(1, 1),
        out(1, 2),
        out(1, 3),
        Access::In(0, 2),
        Access::In(0, 2),
        Access::In(0, 2),
        Access::In(0, 1),
    ];
    assert_eq!(machine.world.log(), expected);
    assert_eq!(machine.get64(at::DATA + 0x100), 0xd1_c1c2_b1b2_a1a2);
    assert_eq!(machine.reg(gpr::RBX), at::DATA + 0x106);
    assert_eq!(machine.reg(gpr::RDI), at::DATA + 0x105);
    assert_eq!(machine.reg(gpr::RCX), 0);
}

fn unclaimed_ports_read_as_ones(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.code(|a| {
        a.mov(eax, 0)?;
        a.mov(edx, 0x5555)?;
        a.in_(ax, dx)?;
        a.mov(ebx, eax)?;
        a.out(dx, eax)?;
        a.in_(eax, dx)
    });
    machine.run_to_end();
    assert_eq!((machine.reg(gpr::RBX), machine.reg(gpr::RAX)), (0xffff, 0xffff_ffff));
}

fn strict_ports_abort(engine: EngineKind) {
    let policy = PolicyOptions { strict_io: true, ..Default::default() };
    let mut machine = Machine::new(Config { engine, cpus: 1, policy });
    machine.code(|a| a.in_(al, 0x99));
    machine.run();
    assert_eq!(machine.world.power(), [PowerEvent::Abort]);
    assert!(machine.world.finishes().is_empty(), "it ends there");
}

fn memory_of_every_width(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.world.set_mmio(0x20, &0x8877_6655_4433_2211u64.to_le_bytes());
    machine.code(|a| {
        a.mov(rdi, at::MMIO)?;
        a.mov(rax, 0x0123_4567_89ab_cdefu64)?;
        a.mov(byte_ptr(rdi), al)?;
        a.mov(word_ptr(rdi + 2), ax)?;
        a.mov(dword_ptr(rdi + 4), eax)?;
        a.mov(qword_ptr(rdi + 8), rax)?;
        a.mov(bl, byte_ptr(rdi + 0x20))?;
        a.mov(cx, word_ptr(rdi + 0x20))?;
        a.mov(esi, dword_ptr(rdi + 0x20))?;
        a.mov(r8, qword_ptr(rdi + 0x20))?;
        a.movzx(r9d, byte_ptr(rdi + 0x27))?;
        a.movsx(r10, word_ptr(rdi + 0x26))
    });
    machine.run_to_end();
    let expected = [
        Access::Write(0, 1, 0xef),
        Access::Write(2, 2, 0xcdef),
        Access::Write(4, 4, 0x89ab_cdef),
        Access::Write(8, 8, 0x0123_4567_89ab_cdef),
        Access::Read(0x20, 1),
        Access::Read(0x20, 2),
        Access::Read(0x20, 4),
        Access::Read(0x20, 8),
        Access::Read(0x27, 1),
        Access::Read(0x26, 2),
    ];
    assert_eq!(machine.world.log(), expected);
    assert_eq!(machine.reg(gpr::RBX), 0x11);
    assert_eq!(machine.reg(gpr::RCX), 0x2211);
    assert_eq!(machine.reg(gpr::RSI), 0x4433_2211);
    assert_eq!(machine.reg(8), 0x8877_6655_4433_2211);
    assert_eq!((machine.reg(9), machine.reg(10)), (0x88, 0xffff_ffff_ffff_8877));
}

fn unclaimed_memory_reads_as_ones(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.code(|a| {
        a.mov(edi, 0xd800_0000u32)?;
        a.mov(qword_ptr(rdi), rdi)?;
        a.mov(rax, qword_ptr(rdi))?;
        a.movzx(ebx, word_ptr(rdi + 1))
    });
    machine.run_to_end();
    assert_eq!((machine.reg(gpr::RAX), machine.reg(gpr::RBX)), (u64::MAX, 0xffff));
}

fn string_memory(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.memory.write(at::DATA, b"sixteen bytes...").unwrap();
    machine.code(|a| {
        a.mov(esi, at::DATA as u32)?;
        a.mov(rdi, at::MMIO)?;
        a.mov(ecx, 4)?;
        a.rep().movsd()?;
        a.mov(rsi, at::MMIO)?;
        a.mov(edi, at::DATA as u32 + 0x40)?;
        a.mov(ecx, 16)?;
        a.rep().movsb()?;
        a.mov(rdi, at::MMIO + 0x40)?;
        a.mov(eax, 0x2a)?;
        a.mov(ecx, 3)?;
        a.rep().stosw()
    });
    machine.run_to_end();
    assert_eq!(machine.world.mmio(0, 16), b"sixteen bytes...");
    assert_eq!(machine.world.mmio(0x40, 8), [0x2a, 0, 0x2a, 0, 0x2a, 0, 0, 0]);
    let mut copy = [0; 16];
    machine.memory.read(at::DATA + 0x40, &mut copy).unwrap();
    assert_eq!(&copy, b"sixteen bytes...");
    let reads = machine.world.log().iter().filter(|access| matches!(access, Access::Read(_, 1))).count();
    assert_eq!(reads, 16, "each byte is read once");
}

/// Where KVM has no emulation for an instruction, the interpreter runs it, and the guest goes on.
fn vector_registers_reach_devices(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    let bytes: Vec<u8> = (1..=16).collect();
    machine.memory.write(at::DATA, &bytes).unwrap();
    machine.world.set_mmio(0x100, &[0xaa; 16]);
    machine.code(|a| {
        a.mov(rdi, at::MMIO)?;
        a.mov(esi, at::DATA as u32)?;
        a.movdqa(xmm3, xmmword_ptr(rsi))?;
        a.movdqa(xmmword_ptr(rdi), xmm3)?;
        a.movups(xmm4, xmmword_ptr(rdi + 0x100))?;
        a.paddb(xmm4, xmm3)?;
        a.movups(xmmword_ptr(rsi + 0x20), xmm4)?;
        a.movq(xmm5, qword_ptr(rdi + 8))?;
        a.movq(rax, xmm5)?;
        a.mov(ebx, 77)
    });
    machine.run_to_end();
    assert_eq!(machine.world.mmio(0, 16), bytes);
    let mut sum = [0; 16];
    machine.memory.read(at::DATA + 0x20, &mut sum).unwrap();
    assert_eq!(sum.to_vec(), bytes.iter().map(|byte| byte + 0xaa).collect::<Vec<_>>());
    assert_eq!(machine.reg(gpr::RAX), 0x100f_0e0d_0c0b_0a09);
    assert_eq!(machine.reg(gpr::RBX), 77);
}

/// Registers and flags that an instruction does not name stay as they are, whoever executes it.
fn vector_registers_survive(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.set_flags(rflags::CF | rflags::OF, 0);
    machine.state.gpr = std::array::from_fn(|i| 0x1111 * i as u64);
    machine.state.gpr[gpr::RSP] = at::STACK;
    let before = machine.state.clone();
    machine.code(|a| {
        a.movq(xmm0, rcx)?;
        a.movq(xmm15, rdx)?;
        a.push(rsi)?;
        a.mov(rsi, at::MMIO)?;
        a.movq(qword_ptr(rsi + 8), xmm0)?;
        a.movq(qword_ptr(rsi), xmm15)?;
        a.pop(rsi)
    });
    machine.run_to_end();
    assert_eq!(machine.world.mmio(0, 16), [0x2222u64.to_le_bytes(), 0x1111u64.to_le_bytes()].concat());
    assert_eq!(machine.state.gpr, before.gpr);
    assert_eq!(machine.state.rflags, before.rflags);
    assert_eq!(machine.state.segments[seg::CS], before.segments[seg::CS]);
}

/// An access that begins in RAM and ends in a device, and the other way round.
fn memory_across_pages(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    // 64 KiB behind the end of RAM is nothing; the last page of RAM and the device meet in linear space.
    let pages = at::PAGES + 0x2000;
    machine.put64(pages + 8 * 8, at::PAGES + 0x8000 + 7);
    for i in 0..512u64 {
        let frame = if i == 1 { at::MMIO } else { at::FREE + (i << 12) };
        machine.put64(at::PAGES + 0x8000 + 8 * i, frame | 7);
    }
    let linear = 0x100_0000u64;
    machine.code(|a| {
        a.mov(rdi, linear + 0xffd)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(qword_ptr(rdi), rax)?;
        a.mov(rbx, qword_ptr(rdi))
    });
    machine.run_to_end();
    assert_eq!(machine.get32(at::FREE + 0xffc), 0x6677_8800);
    assert_eq!(machine.world.mmio(0, 8), [0x55, 0x44, 0x33, 0x22, 0x11, 0, 0, 0]);
    assert_eq!(machine.reg(gpr::RBX), 0x1122_3344_5566_7788);
}
