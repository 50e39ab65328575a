//! What rings may do (SDM vol. 3, 5.9; vol. 1, 19.5): privileged instructions, IOPL, the I/O permission bitmap, system calls.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use platform::x86::{cr0, cr4, efer, gpr, rflags};
use vmm::EngineKind;

use crate::harness::{Access, Machine, PORT, at, sel};

crate::stamp! {
    everywhere: privileged_instructions_of_64_bit_mode;
    software: privileged_instructions, ring_3_cannot_change_the_flag, syscall_and_sysret,
        control_registers_check_their_bits, sensitive_instructions_need_iopl, the_io_bitmap_opens_ports,
        the_io_bitmap_has_an_end, sysenter_and_sysexit, umip_hides_tables, tsd_hides_the_counter,
        task_switched_traps_vector_instructions, alignment_is_checked_in_ring_3, alignment_of_repeated_stores_is_checked, syscall_wants_sce
}

const UD: u8 = 6;
const NM: u8 = 7;
const GP: u8 = 13;
const AC: u8 = 17;

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Instructions of ring 0 that exist in 32- and 64-bit mode.
const PRIVILEGED: [(&str, Write); 15] = [
    ("hlt", |a| a.hlt()),
    ("clts", |a| a.clts()),
    ("invd", |a| a.invd()),
    ("wbinvd", |a| a.wbinvd()),
    ("rdmsr", |a| a.rdmsr()),
    ("wrmsr", |a| a.wrmsr()),
    ("lmsw", |a| a.lmsw(ax)),
    ("lldt", |a| a.lldt(ax)),
    ("ltr", |a| a.ltr(ax)),
    ("lgdt", |a| a.db(&[0x0f, 0x01, 0x10])),
    ("lidt", |a| a.db(&[0x0f, 0x01, 0x18])),
    ("invlpg", |a| a.db(&[0x0f, 0x01, 0x38])),
    ("mov to cr3", |a| a.db(&[0x0f, 0x22, 0xd8])),
    ("mov from cr0", |a| a.db(&[0x0f, 0x20, 0xc0])),
    ("mov to dr7", |a| a.db(&[0x0f, 0x23, 0xf8])),
];

fn refuses(mut machine: Machine, name: &str, write: Write) {
    machine.enter_user();
    machine.state.gpr[gpr::RAX] = at::DATA;
    machine.code(write);
    machine.run_to_handler(GP);
    assert_eq!((machine.frame(true).error, machine.frame(true).rip), (0, at::USER_CODE), "{name}");
}

fn privileged_instructions(engine: EngineKind) {
    for (name, write) in PRIVILEGED {
        refuses(Machine::protected(engine), name, write);
    }
}

fn privileged_instructions_of_64_bit_mode(engine: EngineKind) {
    for (name, write) in PRIVILEGED {
        refuses(Machine::long(engine), name, write);
    }
    refuses(Machine::long(engine), "swapgs", |a| a.swapgs());
    refuses(Machine::long(engine), "mov to cr8", |a| a.mov(cr8, rax));
}

/// CLI, STI, IN, OUT and their kin need CPL ≤ IOPL.
fn sensitive_instructions_need_iopl(engine: EngineKind) {
    let instructions: [(&str, Write); 6] = [
        ("cli", |a| a.cli()),
        ("sti", |a| a.sti()),
        ("in", |a| a.in_(al, dx)),
        ("out", |a| a.out(dx, ax)),
        ("ins", |a| a.insb()),
        ("outs", |a| a.outsd()),
    ];
    for (name, write) in instructions {
        for level in [0, 1, 2, 3] {
            let mut machine = Machine::protected(engine);
            machine.open_gate(3);
            machine.enter_user();
            machine.set_flags(level << 12, 0);
            machine.state.gpr[gpr::RDX] = u64::from(PORT);
            (machine.state.gpr[gpr::RSI], machine.state.gpr[gpr::RDI]) = (at::DATA, at::DATA);
            machine.code(|a| {
                write(a)?;
                a.int3()
            });
            machine.run_to_handler(if level == 3 { 3 } else { GP });
            assert_eq!(machine.world.log().is_empty(), level < 3 || name.ends_with('i'), "{name}");
        }
    }
}

/// POPF and IRET silently keep what the ring may not change.
fn ring_3_cannot_change_the_flag(engine: EngineKind) {
    for level in [0u64, 3] {
        let mut machine = Machine::long(engine);
        machine.open_gate(3);
        machine.enter_user();
        machine.set_flags(level << 12 | rflags::IF, 0);
        machine.code(|a| {
            a.push(rflags::CF as i32)?;
            a.popfq()?;
            a.int3()
        });
        machine.run_to_handler(3);
        let kept = level << 12 | if level == 3 { 0 } else { rflags::IF };
        assert_eq!(machine.frame(false).flags, kept | rflags::CF | rflags::FIXED, "IOPL {level}");
    }
}

/// Opens `ports` in the I/O permission bitmap.
fn open_ports(machine: &Machine, ports: std::ops::Range<u16>) {
    for port in ports {
        let byte = at::TSS + 0x68 + u64::from(port / 8);
        machine.put8(byte, machine.get8(byte) & !(1 << (port % 8)));
    }
}

fn the_io_bitmap_opens_ports(engine: EngineKind) {
    for long in [false, true] {
        for (offset, size, allowed) in
            [(0, 1, true), (0, 4, true), (3, 1, true), (4, 1, false), (3, 2, false), (2, 4, false)]
        {
            let mut machine = if long { Machine::long(engine) } else { Machine::protected(engine) };
            open_ports(&machine, PORT..PORT + 4);
            machine.open_gate(3);
            machine.enter_user();
            machine.code(|a| {
                a.mov(edx, u32::from(PORT) + offset)?;
                match size {
                    1 => a.out(dx, al)?,
                    2 => a.out(dx, ax)?,
                    _ => a.out(dx, eax)?,
                }
                a.int3()
            });
            machine.run_to_handler(if allowed { 3 } else { GP });
            let expected = if allowed { vec![Access::Out(u64::from(offset), size, 0)] } else { vec![] };
            assert_eq!(machine.world.log(), expected, "{offset} {size}");
        }
    }
}

/// Bits beyond the limit of the task state segment count as set. The two bytes that hold the bits are always both read.
fn the_io_bitmap_has_an_end(engine: EngineKind) {
    for (limit, allowed) in [(0xfff, true), (0x68 + 0x21, true), (0x68 + 0x20, false), (0x68, false), (0x60, false)] {
        let mut machine = Machine::protected(engine);
        open_ports(&machine, PORT..PORT + 8);
        machine.state.tr.limit = limit;
        machine.open_gate(3);
        machine.enter_user();
        machine.code(|a| {
            a.mov(edx, u32::from(PORT))?;
            a.in_(al, dx)?;
            a.int3()
        });
        machine.run_to_handler(if allowed { 3 } else { GP });
    }
}

fn syscall_machine(engine: EngineKind) -> Machine {
    let mut machine = Machine::long(engine);
    // STAR: SYSCALL loads CODE64 and the entry behind it; SYSRET loads entries from USER_CODE32 on.
    let star = u64::from(sel::USER_CODE32 & !3 | 3) << 48 | u64::from(sel::CODE64) << 32;
    let inner = at::CODE + 0x400;
    machine.state.msrs = vec![(0xc000_0081, star), (0xc000_0082, inner), (0xc000_0084, rflags::IF | rflags::DF)];
    machine.open_gate(3);
    machine.code_at(inner, |a| {
        a.mov(rsi, rcx)?;
        a.mov(rdi, r11)?;
        a.pushfq()?;
        a.pop(rdx)?;
        a.mov(ebp, cs)?;
        a.mov(ebx, ss)?;
        a.sysretq()
    });
    machine
}

fn syscall_and_sysret(engine: EngineKind) {
    let mut machine = syscall_machine(engine);
    machine.enter_user();
    machine.set_flags(rflags::IF | rflags::DF | rflags::CF, 0);
    let start = machine.state.rip;
    machine.code(|a| {
        a.syscall()?;
        a.mov(eax, cs)?;
        a.mov(ecx, ss)?;
        a.int3()
    });
    machine.run_to_handler(3);
    let user = rflags::IF | rflags::DF | rflags::CF | rflags::FIXED;
    assert_eq!((machine.reg(gpr::RSI), machine.reg(gpr::RDI)), (start + 2, user));
    assert_eq!(machine.reg(gpr::RDX), rflags::CF | rflags::FIXED, "what the mask says is cleared");
    assert_eq!((machine.reg(gpr::RBP), machine.reg(gpr::RBX)), (u64::from(sel::CODE64), u64::from(sel::CODE64 + 8)));
    assert_eq!(
        (machine.reg(gpr::RAX), machine.reg(gpr::RCX)),
        (u64::from(sel::USER_CODE64), u64::from(sel::USER_DATA))
    );
    assert_eq!(machine.frame(false).flags, user);
    assert_eq!(machine.frame(false).rsp, at::USER_STACK, "the stack pointer is nobody's business");
}

fn syscall_wants_sce(engine: EngineKind) {
    let mut machine = syscall_machine(engine);
    machine.state.efer &= !efer::SCE;
    machine.enter_user();
    machine.code(|a| a.syscall());
    machine.run_to_handler(UD);
    assert_eq!(machine.frame(false).rip, at::USER_CODE);
    // SYSRET is for ring 0.
    let mut machine = syscall_machine(engine);
    machine.enter_user();
    machine.code(|a| a.sysretq());
    machine.run_to_handler(GP);
}

fn sysenter_and_sysexit(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    let inner = at::CODE + 0x400;
    // SYSENTER wants four flat segments in a row: ring 0 code and data, ring 3 code and data.
    for (n, from) in (0..).zip([sel::CODE32, sel::DATA, sel::USER_CODE32, sel::USER_DATA]) {
        machine.set_descriptor(sel::FREE + 8 * n, machine.get64(at::GDT + u64::from(from & !7)));
    }
    machine.state.msrs = vec![(0x174, u64::from(sel::FREE)), (0x175, at::STACK), (0x176, inner)];
    machine.open_gate(3);
    machine.code_at(inner, |a| {
        a.mov(esi, esp)?;
        a.pushfd()?;
        a.pop(edi)?;
        a.mov(ebp, cs)?;
        a.mov(ebx, ss)?;
        a.sysexit()
    });
    machine.enter_user();
    machine.set_flags(rflags::IF | rflags::CF, 0);
    let back = at::USER_CODE + 0x100;
    machine.code(|a| {
        a.mov(ecx, at::USER_STACK as u32 - 0x20)?;
        a.mov(edx, back as u32)?;
        a.sysenter()
    });
    machine.code_at(back, |a| {
        a.mov(eax, cs)?;
        a.int3()
    });
    machine.run_to_handler(3);
    assert_eq!((machine.reg(gpr::RSI), machine.reg(gpr::RDI)), (at::STACK, rflags::CF | rflags::FIXED));
    assert_eq!((machine.reg(gpr::RBP), machine.reg(gpr::RBX)), (u64::from(sel::FREE), u64::from(sel::FREE + 8)));
    assert_eq!(machine.reg(gpr::RAX), u64::from((sel::FREE + 16) | 3));
    let frame = machine.frame(false);
    assert_eq!((frame.rsp, frame.ss), (at::USER_STACK - 0x20, (sel::FREE + 24) | 3));
    // Without a code segment there is no way in.
    let mut fresh = Machine::protected(engine);
    fresh.state.msrs = vec![(0x174, 0)];
    fresh.enter_user();
    fresh.code(|a| a.sysenter());
    fresh.run_to_handler(GP);
    assert_eq!(fresh.frame(true).error, 0);
}

fn control_registers_check_their_bits(engine: EngineKind) {
    let tries: [(&str, Write); 6] = [
        ("PG without PE", |a| {
            a.mov(rax, cr0)?;
            a.and(eax, !1)?;
            a.mov(cr0, rax)
        }),
        ("NW without CD", |a| {
            a.mov(rax, cr0)?;
            a.or(eax, cr0::NW as i32)?;
            a.mov(cr0, rax)
        }),
        ("PAE off in long mode", |a| {
            a.mov(rax, cr4)?;
            a.and(eax, !(cr4::PAE as i32))?;
            a.mov(cr4, rax)
        }),
        ("a reserved bit of CR4", |a| {
            a.mov(rax, cr4)?;
            a.or(eax, 1 << 15)?;
            a.mov(cr4, rax)
        }),
        ("LME off while paging", |a| {
            a.mov(ecx, 0xc000_0080u32)?;
            a.rdmsr()?;
            a.and(eax, !(efer::LME as i32))?;
            a.wrmsr()
        }),
        ("upper half of CR0", |a| {
            a.mov(rax, cr0)?;
            a.bts(rax, 40)?;
            a.mov(cr0, rax)
        }),
    ];
    for (name, write) in tries {
        let mut machine = Machine::long(engine);
        let before = machine.state.clone();
        machine.code(write);
        machine.run_to_handler(GP);
        assert_eq!(machine.frame(true).error, 0, "{name}");
        let after = &machine.state;
        assert_eq!((after.cr0, after.cr4, after.efer), (before.cr0, before.cr4, before.efer), "{name}");
    }
    // Control registers that do not exist.
    let mut machine = Machine::long(engine);
    machine.bytes(&[0x0f, 0x20, 0xc8]);
    machine.run_to_handler(UD);
}

fn umip_hides_tables(engine: EngineKind) {
    let instructions: [Write; 5] =
        [|a| a.sldt(eax), |a| a.str(eax), |a| a.smsw(eax), |a| a.sgdt(ptr(at::DATA)), |a| a.sidt(ptr(at::DATA))];
    for write in instructions {
        for umip in [false, true] {
            let mut machine = Machine::protected(engine);
            machine.state.cr4 |= if umip { cr4::UMIP } else { 0 };
            machine.open_gate(3);
            machine.enter_user();
            machine.code(|a| {
                write(a)?;
                a.int3()
            });
            machine.run_to_handler(if umip { GP } else { 3 });
        }
    }
}

fn tsd_hides_the_counter(engine: EngineKind) {
    for (tsd, user, allowed) in [(false, true, true), (true, true, false), (true, false, true)] {
        let mut machine = Machine::protected(engine);
        machine.state.cr4 |= if tsd { cr4::TSD } else { 0 };
        machine.open_gate(3);
        if user {
            machine.enter_user();
        }
        machine.code(|a| {
            a.rdtsc()?;
            a.int3()
        });
        machine.run_to_handler(if allowed { 3 } else { GP });
    }
}

/// CR0.EM, TS and MP decide about x87 and vector instructions.
fn task_switched_traps_vector_instructions(engine: EngineKind) {
    let x87: Write = |a| a.fld1();
    let wait: Write = |a| a.wait();
    let sse: Write = |a| a.movaps(xmm0, xmm1);
    for (set, write, outcome) in [
        (0, x87, None),
        (cr0::TS, x87, Some(NM)),
        (cr0::EM, x87, Some(NM)),
        (cr0::MP, wait, None),
        (cr0::TS, wait, None),
        (cr0::TS | cr0::MP, wait, Some(NM)),
        (cr0::TS, sse, Some(NM)),
        (cr0::EM, sse, Some(UD)),
        (0, sse, None),
    ] {
        let mut machine = Machine::protected(engine);
        machine.state.cr0 |= set;
        machine.state.cr4 |= cr4::OSFXSR;
        machine.code(write);
        match outcome {
            None => machine.run_to_end(),
            Some(vector) => {
                machine.run_to_handler(vector);
                assert_eq!(machine.frame(false).rip, at::CODE);
            }
        }
    }
    let mut machine = Machine::protected(engine);
    machine.code(sse);
    machine.run_to_handler(UD);
}

fn alignment_is_checked_in_ring_3(engine: EngineKind) {
    for (am, ac, user, faults) in
        [(true, true, true, true), (false, true, true, false), (true, false, true, false), (true, true, false, false)]
    {
        let mut machine = Machine::protected(engine);
        machine.state.cr0 |= if am { cr0::AM } else { 0 };
        machine.open_gate(3);
        if user {
            machine.enter_user();
        }
        machine.set_flags(if ac { rflags::AC } else { 0 }, 0);
        machine.code(|a| {
            a.mov(eax, dword_ptr(at::DATA))?;
            a.mov(al, byte_ptr(at::DATA + 1))?;
            a.mov(eax, dword_ptr(at::DATA + 2))?;
            a.int3()
        });
        machine.run_to_handler(if faults { AC } else { 3 });
        if faults {
            assert_eq!((machine.frame(true).error, machine.frame(true).rip), (0, at::USER_CODE + 10));
        }
    }
}

fn alignment_of_repeated_stores_is_checked(engine: EngineKind) {
    let mut machine = Machine::protected(engine);
    machine.state.cr0 |= cr0::AM;
    machine.enter_user();
    machine.set_flags(rflags::AC, 0);
    machine.code(|a| {
        a.mov(edi, at::DATA as u32 + 1)?;
        a.mov(ecx, 8)?;
        a.rep().stosw()
    });
    machine.run_to_handler(AC);
    assert_eq!(machine.reg(gpr::RCX), 8, "nothing is stored before");
}
