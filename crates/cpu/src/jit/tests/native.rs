//! Instructions beyond plain integer code that run without leaving emitted code.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use platform::x86::{cr4, gpr, rflags};

use super::{DATA, TranslatorOptions, counters, run, translated};
use crate::Features;
use crate::features::Placement;
use crate::testing::{Machine, at, sel};

type Write = dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Where SYSCALL leads to.
const KERNEL: u64 = 0x9000;
const KERNEL_DATA: u64 = 0x40_0000;

/// Runs code under both tiers and compares registers, flags and data; returns how many instructions the interpreter ran for
/// emitted code.
#[track_caller]
fn same(prepare: impl Fn() -> Machine, write: &Write) -> u64 {
    let start = |mut machine: Machine| {
        for i in 0..0x600 {
            machine.put(DATA + 8 * i, i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        machine.code(write);
        run(&mut machine);
        machine
    };
    let (expected, machine) = (start(prepare()), start(translated(prepare())));
    for r in 0..16 {
        assert_eq!(expected.reg(r), machine.reg(r), "register {r}");
    }
    assert_eq!(expected.vcpu.rflags(), machine.vcpu.rflags());
    assert_eq!(expected.vcpu.segments, machine.vcpu.segments);
    assert_eq!(expected.vcpu.seg_base, machine.vcpu.seg_base);
    assert_eq!(expected.vcpu.msrs.kernel_gs_base, machine.vcpu.msrs.kernel_gs_base);
    for i in 0..0x600u64 {
        let (want, got) = (expected.get::<u64>(DATA + 8 * i), machine.get::<u64>(DATA + 8 * i));
        assert_eq!(want, got, "memory at {:#x}", DATA + 8 * i);
    }
    counters(&machine).interpreted
}

/// A machine with FS/GS base instructions and SMAP if `smap`.
fn machine(smap: bool) -> Machine {
    let mut machine = Machine::long();
    machine.vcpu.features = Arc::new(Features::host(Placement::single()));
    let mut state = machine.vcpu.state();
    state.cr4 |= cr4::FSGSBASE | cr4::OSFXSR | cr4::OSXMMEXCPT | if smap { cr4::SMAP } else { 0 };
    machine.vcpu.set_state(&state);
    machine
}

#[test]
fn system_calls() {
    for smap in [false, true] {
        let prepare = || {
            let mut machine = machine(smap).into_user();
            machine.vcpu.msrs.star = 0x33 << 48 | u64::from(sel::CODE64) << 32;
            machine.vcpu.msrs.lstar = KERNEL;
            machine.vcpu.msrs.fmask = 0x4_7fd5;
            machine.vcpu.msrs.kernel_gs_base = KERNEL_DATA + 0x800;
            // A page of the supervisor's.
            machine.put(at::PAGES + 0x2000 + 16, KERNEL_DATA | 0xe3);
            machine.set_flags(rflags::IF, 0);
            machine.code_at(KERNEL, |a| {
                let mut back = a.create_label();
                a.swapgs()?;
                a.mov(qword_ptr(8).gs(), rsp)?;
                a.mov(rsp, KERNEL_DATA + 0x2000)?;
                a.push(qword_ptr(8).gs())?;
                a.push(r11)?;
                a.pushfq()?;
                a.pop(rdx)?;
                a.add(rax, rdx)?;
                a.stac()?;
                a.mov(rdx, qword_ptr(DATA))?;
                a.clac()?;
                a.sti()?;
                a.pushfq()?;
                a.cli()?;
                a.add(rdx, 1)?;
                a.popfq()?;
                a.rdgsbase(r8)?;
                a.wrfsbase(r8)?;
                a.xor(rax, r8)?;
                a.mov(rdx, cr3)?;
                a.mov(r9w, cs)?;
                a.mov(r13w, ss)?;
                a.mov(r14d, es)?;
                a.push(fs)?;
                a.push(gs)?;
                a.pop(r12)?;
                a.pop(rdx)?;
                a.mov(word_ptr(rbx * 2 + 0x100).gs(), ss)?;
                a.add(rax, qword_ptr(0x200).gs())?;
                a.cld()?;
                a.cli()?;
                a.dec(rbx)?;
                a.jnz(back)?;
                a.hlt()?;
                a.set_label(&mut back)?;
                a.pop(r11)?;
                a.pop(rsp)?;
                a.swapgs()?;
                a.sysretq()
            });
            machine
        };
        let interpreted = same(prepare, &|a| {
            let mut again = a.create_label();
            a.mov(ebx, 200)?;
            a.xor(eax, eax)?;
            a.set_label(&mut again)?;
            a.add(rax, rbx)?;
            a.syscall()?;
            a.adc(rax, 3)?;
            a.jmp(again)
        });
        assert!(interpreted < 60, "system calls stay in emitted code: {interpreted}");
    }
}

#[test]
fn the_counter_is_read_here() {
    const HIGHEST: u64 = 1 << 62;
    // Another CPU has read more than the host's counter will be: that is what is read, plus the CPU's own offset.
    let prepare = || {
        let mut machine = machine(false);
        machine.world.highest.store(HIGHEST, Ordering::Relaxed);
        machine.vcpu.msrs.tsc_offset = 0x1_2345_6789;
        machine.vcpu.msrs.tsc_aux = 0x42;
        machine
    };
    let interpreted = same(prepare, &|a| {
        let mut again = a.create_label();
        a.mov(ebp, 100)?;
        a.set_label(&mut again)?;
        a.cmp(ebp, 77)?;
        a.rdtsc()?;
        a.adc(rbx, rax)?;
        a.adc(rsi, rdx)?;
        a.mov(rcx, u64::MAX)?;
        a.rdtscp()?;
        a.adc(rbx, rcx)?;
        a.dec(ebp)?;
        a.jnz(again)?;
        a.hlt()
    });
    assert!(interpreted < 20, "it is read in emitted code: {interpreted}");
}

#[test]
fn the_counter_does_not_go_back() {
    let machine = machine(false);
    machine.world.highest.store(1, Ordering::Relaxed);
    let mut machine = translated(machine);
    machine.code(|a| {
        let (mut again, mut back) = (a.create_label(), a.create_label());
        a.mov(ebp, 1000)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.cmp(rax, rbx)?;
        a.jb(back)?;
        a.mov(rbx, rax)?;
        a.dec(ebp)?;
        a.jnz(again)?;
        a.set_label(&mut back)?;
        a.hlt()
    });
    run(&mut machine);
    assert_eq!(machine.reg(gpr::RBP), 0, "no value is less than the one before");
    assert!(machine.reg(gpr::RBX) > 1_000_000, "it counts");
    let last = machine.reg(gpr::RBX).wrapping_sub(machine.vcpu.msrs.tsc_offset);
    assert_eq!(machine.world.highest.load(Ordering::Relaxed), last, "others see it");
}

#[test]
fn the_counter_may_be_the_kernels_alone() {
    for forbidden in [false, true] {
        let prepare = || {
            let mut machine = machine(false).into_user();
            machine.world.highest.store(1 << 62, Ordering::Relaxed);
            let mut state = machine.vcpu.state();
            state.cr4 |= if forbidden { cr4::TSD } else { 0 };
            machine.vcpu.set_state(&state);
            // #GP: counts, and skips the instruction.
            machine.code_at(Machine::handler(13), |a| {
                a.add(rsp, 8)?;
                a.add(qword_ptr(rsp), 2)?;
                a.inc(r15)?;
                a.iretq()
            });
            machine.code_at(Machine::handler(6), |a| a.hlt());
            machine
        };
        same(prepare, &|a| {
            let mut again = a.create_label();
            a.mov(ebp, 50)?;
            a.set_label(&mut again)?;
            a.cmp(ebp, 20)?;
            a.rdtsc()?;
            a.adc(rbx, rax)?;
            a.xor(rsi, rdx)?;
            a.dec(ebp)?;
            a.jnz(again)?;
            a.ud2()
        });
    }
}

#[test]
fn divisions_that_fault_and_that_do_not() {
    const VALUES: [u64; 9] = [0, 1, 7, u64::MAX, 1 << 31, 1 << 63, 0xffff_ffff, 0x7fff, 0x8000_0000_0000_0001];
    let prepare = || {
        let mut machine = machine(false);
        machine.vcpu.set_rip(0x60_0000);
        // #DE: counts, and skips the instruction, which is three bytes long.
        machine.code_at(Machine::handler(0), |a| {
            a.add(qword_ptr(rsp), 3)?;
            a.inc(r15)?;
            a.iretq()
        });
        machine
    };
    same(prepare, &|a| {
        let mut again = a.create_label();
        a.mov(r14, 3u64)?;
        a.set_label(&mut again)?;
        for high in VALUES {
            for divisor in VALUES {
                a.mov(rax, 0x1234_5678_9abc_def0u64)?;
                a.mov(rbx, divisor)?;
                a.mov(r9, divisor)?;
                a.mov(rdx, high)?;
                a.div(rbx)?;
                a.add(r13, rax)?;
                a.xor(r13, rdx)?;
                a.mov(rdx, high)?;
                a.idiv(rbx)?;
                a.add(r13, rax)?;
                a.cqo()?;
                a.idiv(r9)?;
                a.xor(r13, rdx)?;
                a.mov(rdx, high)?;
                a.idiv(r9d)?;
                a.add(r13, rax)?;
                a.cdq()?;
                a.idiv(r9d)?;
                a.cwd()?;
                a.idiv(bx)?;
                a.add(r13, rax)?;
                a.mov(rdx, high)?;
                a.div(bx)?;
                a.add(r13, rdx)?;
            }
        }
        a.dec(r14)?;
        a.jnz(again)?;
        // What divisions leave in the flags is undefined.
        a.xor(eax, eax)?;
        a.hlt()
    });
}

#[test]
fn string_operations() {
    let interpreted = same(|| machine(false), &|a| {
        let mut again = a.create_label();
        a.mov(ebp, 300)?;
        a.set_label(&mut again)?;
        a.cmp(ebp, 77)?;
        a.mov(rsi, DATA)?;
        a.mov(rdi, DATA + 0x103)?;
        a.mov(ecx, ebp)?;
        a.rep().movsb()?;
        a.mov(ecx, 17)?;
        a.rep().movsd()?;
        a.movsw()?;
        a.lodsd()?;
        a.stosq()?;
        a.mov(ecx, ebp)?;
        a.lea(rdi, qword_ptr(DATA + 0x1000))?;
        a.rep().stosw()?;
        a.mov(ecx, 5)?;
        a.rep().stosq()?;
        // Across pages, and nothing at all.
        a.mov(rdi, DATA + 0xff8)?;
        a.mov(ecx, 9)?;
        a.rep().movsw()?;
        a.rep().stosb()?;
        a.adc(r8, rax)?;
        a.dec(ebp)?;
        a.jnz(again)?;
        a.mov(rdi, DATA + 0x900)?;
        a.std()?;
        a.mov(ecx, 20)?;
        a.rep().stosb()?;
        a.cld()?;
        a.hlt()
    });
    assert!(interpreted < 40, "they stay in emitted code: {interpreted}");
}

#[test]
fn strings_are_compared_and_searched() {
    let interpreted = same(|| machine(false), &|a| {
        let mut again = a.create_label();
        // Two texts of zeros that differ far behind the end of a page.
        a.mov(rdi, DATA + 0x200)?;
        a.mov(ecx, 0x2800)?;
        a.xor(eax, eax)?;
        a.rep().stosb()?;
        a.mov(byte_ptr(DATA + 0x1234), 1)?;
        a.mov(ebp, 300)?;
        a.set_label(&mut again)?;
        // STRLEN, and the end of the count.
        for (count, start) in [(-1, 0x204), (0x1100, 0x234), (0x200, 0x900), (1, 0x1233), (1, 0x1234), (0, 0x1234)] {
            a.mov(rcx, i64::from(count) as u64)?;
            a.mov(rdi, DATA + start)?;
            a.cmp(ebp, 20)?;
            a.repe().scasb()?;
            a.adc(r8, rcx)?;
            a.setz(r9b)?;
            a.add(r8, rdi)?;
            a.rol(r8, 3)?;
            a.add(r8, r9)?;
        }
        a.mov(eax, 1)?;
        a.mov(ecx, 0x1800)?;
        a.lea(rdi, qword_ptr(rbp + (DATA as i32 + 0x300)))?;
        a.repne().scasb()?;
        a.adc(r8, rcx)?;
        // Pages end at different counts on both sides.
        a.mov(ecx, 0x1300)?;
        a.lea(rdi, qword_ptr(rbp + (DATA as i32 + 0x300)))?;
        a.mov(rsi, DATA + 0x1235)?;
        a.repe().cmpsb()?;
        a.adc(r8, rcx)?;
        a.sub(r8, rsi)?;
        a.xor(r8, rdi)?;
        a.mov(ecx, 40)?;
        a.repne().cmpsb()?;
        a.adc(r8, rcx)?;
        a.scasb()?;
        a.adc(r8, 3)?;
        a.scasw()?;
        a.adc(r8, 5)?;
        a.scasd()?;
        a.scasq()?;
        a.adc(r8, rdi)?;
        a.mov(rsi, DATA + 0x20)?;
        a.cmpsb()?;
        a.adc(r8, 7)?;
        a.cmpsw()?;
        a.adc(r8, 9)?;
        a.cmpsd()?;
        a.adc(r8, rsi)?;
        a.cmpsq()?;
        a.adc(r8, rdi)?;
        a.pause()?;
        a.dec(ebp)?;
        a.jnz(again)?;
        // Backward, and a fault in the page behind.
        a.std()?;
        a.mov(ecx, 0x400)?;
        a.mov(rdi, DATA + 0x1400)?;
        a.repne().scasb()?;
        a.cld()?;
        a.hlt()
    });
    assert!(interpreted < 60, "they stay in emitted code: {interpreted}");
}

#[test]
fn high_bytes_and_exchanged_registers() {
    let interpreted = same(|| machine(false), &|a| {
        let mut again = a.create_label();
        a.mov(ebp, 3000)?;
        a.mov(rsi, DATA + 0x40)?;
        a.mov(r12, 8u64)?;
        a.set_label(&mut again)?;
        a.lea(r12, qword_ptr(r12 + 1))?;
        a.mov(ah, byte_ptr(rsi + rbp))?;
        a.xor(byte_ptr(rsi), ah)?;
        a.adc(bh, byte_ptr(rsi + 9))?;
        a.mov(byte_ptr(rsi + rbp * 2 + 64), bh)?;
        a.lock().xadd(byte_ptr(DATA + 0x30), dh)?;
        a.adc(r8, 0)?;
        a.mov(ch, ah)?;
        a.mov(cl, bh)?;
        a.add(dh, ch)?;
        a.adc(ch, 77)?;
        a.cmp(ch, dl)?;
        a.adc(r8, rcx)?;
        a.movzx(edi, ch)?;
        a.xchg(edi, eax)?;
        a.xchg(r9, rax)?;
        a.xchg(ax, dx)?;
        a.xchg(rcx, rax)?;
        a.xchg(r11d, eax)?;
        a.and(r12, 63)?;
        a.dec(ebp)?;
        a.jnz(again)?;
        a.hlt()
    });
    assert!(interpreted < 40, "they stay in emitted code: {interpreted}");
}

#[test]
fn bit_strings_and_wide_exchanges() {
    let interpreted = same(|| machine(false), &|a| {
        let mut again = a.create_label();
        a.mov(rdi, DATA + 0x800)?;
        a.mov(rax, (-5000i64) as u64)?;
        a.mov(r12, 3000u64)?;
        a.set_label(&mut again)?;
        a.cmp(rax, r12)?;
        a.bts(qword_ptr(rdi), rax)?;
        a.adc(r8, 1)?;
        a.cmp(rax, r12)?;
        a.btr(dword_ptr(rdi + 4), eax)?;
        a.setc(r9b)?;
        a.setz(r10b)?;
        a.lock().btc(qword_ptr(rdi + 16), r12)?;
        a.adc(r8, 0)?;
        a.bt(qword_ptr(rdi), r12)?;
        a.adc(r8, 0)?;
        a.push(rax)?;
        a.mov(rax, qword_ptr(DATA + 0x40))?;
        a.mov(rdx, qword_ptr(DATA + 0x48))?;
        a.mov(rbx, r8)?;
        a.mov(rcx, r12)?;
        a.lock().cmpxchg16b(xmmword_ptr(DATA + 0x40))?;
        a.setz(r11b)?;
        a.cmpxchg8b(qword_ptr(DATA + 0x44))?;
        a.push(qword_ptr(DATA + 0x40))?;
        a.pop(r13)?;
        a.pop(rax)?;
        a.add(rax, 97)?;
        a.sub(r12, 61)?;
        a.jns(again)?;
        a.hlt()
    });
    assert!(interpreted < 40, "they stay in emitted code: {interpreted}");
}

#[test]
fn x87_and_mmx() {
    let interpreted = same(|| machine(false), &|a| {
        let mut again = a.create_label();
        a.mov(rdi, DATA)?;
        a.mov(ebx, 100)?;
        a.fninit()?;
        a.set_label(&mut again)?;
        a.fld1()?;
        a.fild(qword_ptr(rdi + 8))?;
        a.fadd_2(st0, st1)?;
        a.fmul_2(st0, st0)?;
        a.fstp(tword_ptr(rdi + 0x40))?;
        a.fst(dword_ptr(rdi + 0x50))?;
        a.fistp(word_ptr(rdi + 0x54))?;
        a.fnstcw(word_ptr(rdi + 0x60))?;
        a.mov(word_ptr(rdi + 0x62), 0xc7f)?;
        a.fldcw(word_ptr(rdi + 0x62))?;
        a.fld(tword_ptr(rdi + 0x40))?;
        a.frndint()?;
        a.fldz()?;
        a.fcomip(st0, st1)?;
        a.adc(r8, 1)?;
        a.fnstsw(ax)?;
        a.add(r9, rax)?;
        a.fldcw(word_ptr(rdi + 0x60))?;
        a.fdivr(qword_ptr(rdi + 0x70))?;
        a.fstp(qword_ptr(rdi + 0x78))?;
        a.fnstenv(ptr(rdi + 0x100))?;
        a.fnclex()?;
        a.movq(mm3, qword_ptr(rdi + 0x78))?;
        a.paddb(mm3, qword_ptr(rdi + 0x40))?;
        a.movd(mm4, ebx)?;
        a.pxor(mm3, mm4)?;
        a.movq(qword_ptr(rdi + 0x80), mm3)?;
        a.emms()?;
        a.dec(ebx)?;
        a.jnz(again)?;
        a.fnstenv(ptr(rdi + 0x140))?;
        a.hlt()
    });
    // FNSTENV is the interpreter's, and what follows it as long as the registers are parked.
    assert!(interpreted < 400, "they stay in emitted code: {interpreted}");
}

/// With AVX-512 switched on; `None` if the host lacks it.
fn wide_machine() -> Option<Machine> {
    let mut machine = machine(false);
    if crate::jit::run::vector_width() < 64 {
        return None;
    }
    let mut state = machine.vcpu.state();
    state.cr4 |= cr4::OSXSAVE;
    state.xcr0 = 0xe7;
    machine.vcpu.set_state(&state);
    // Nothing behind the second 2 MiB of addresses.
    machine.put(at::PAGES + 0x2000 + 16, 0u64);
    Some(machine)
}

#[test]
fn masks_decide_what_is_accessed() {
    if wide_machine().is_none() {
        return;
    }
    let prepare = || wide_machine().expect("as just before");
    let interpreted = same(prepare, &|a| {
        let mut again = a.create_label();
        a.mov(rdi, DATA)?;
        a.mov(rsi, DATA + 0x20_0000 - 0x20)?;
        a.mov(ebp, 120)?;
        a.set_label(&mut again)?;
        a.mov(rax, 0x0123_4567_89ab_cdefu64)?;
        a.imul_3(rax, rax, 7)?;
        a.add(rax, rbp)?;
        a.kmovq(k1, rax)?;
        a.vmovdqu8(zmm1.k1().z(), zmmword_ptr(rdi + 8))?;
        a.vpcmpb(k2.k1(), zmm1, zmmword_ptr(rdi + 0x100), 1)?;
        a.kmovq(rbx, k2)?;
        a.add(r8, rbx)?;
        a.vmovdqu8(zmmword_ptr(rdi + 0x400).k1(), zmm1)?;
        a.vpcompressd(zmmword_ptr(rdi + 0x500).k1(), zmm1)?;
        a.vpmaskmovd(ymm2, ymm1, ymmword_ptr(rdi + 0x40))?;
        a.vpmaskmovd(ymmword_ptr(rdi + 0x600), ymm2, ymm1)?;
        a.movdqu(xmm4, xmmword_ptr(rdi + 0x11))?;
        a.mov(rcx, u64::MAX)?;
        a.pcmpistri(xmm4, xmmword_ptr(rdi + 0x13), 0x18)?;
        a.adc(r9, rcx)?;
        a.mov(edx, 7)?;
        a.vpcmpestri(xmm4, xmm1, 0x40)?;
        a.adc(r9, rcx)?;
        a.pcmpistrm(xmm4, xmm1, 0x40)?;
        a.movq(r10, xmm0)?;
        a.add(r9, r10)?;
        a.dec(ebp)?;
        a.jnz(again)?;
        // The rest of the vector has no memory behind it, and is not touched.
        a.mov(eax, 0xff)?;
        a.kmovq(k1, rax)?;
        a.mov(ebp, 4)?;
        let mut edge = a.create_label();
        a.set_label(&mut edge)?;
        a.vmovdqu8(zmm1.k1().z(), zmmword_ptr(rsi))?;
        a.vmovdqu8(zmmword_ptr(rsi + 8).k1(), zmm1)?;
        a.vmovq(r10, xmm1)?;
        a.add(r9, r10)?;
        a.dec(ebp)?;
        a.jnz(edge)?;
        a.hlt()
    });
    assert!(interpreted < 40, "they stay in emitted code: {interpreted}");
}

#[test]
fn loops_whose_rounds_share_checks() {
    let prepare = || {
        let mut machine = machine(false);
        machine.vcpu.set_rip(0x60_0000);
        // Nothing behind the data.
        machine.put(at::PAGES + 0x2000 + 16, 0u64);
        // #PF: notes the flags, and goes back some bytes.
        machine.code_at(Machine::handler(14), |a| {
            a.pop(r13)?;
            a.add(r14, qword_ptr(rsp + 16))?;
            a.sub(rsi, 0x40)?;
            a.iretq()
        });
        machine
    };
    let write: &Write = &|a| {
        let mut outer = a.create_label();
        a.mov(r11d, 5)?;
        a.set_label(&mut outer)?;
        // From the end of what is mapped, to the end of a page.
        let (mut copy, mut skip) = (a.create_label(), a.create_label());
        a.lea(rsi, qword_ptr(r11 + (DATA + 0x20_0000 - 0x33) as i32))?;
        a.lea(rdi, qword_ptr(r11 * 4 + (DATA + 0xfc1) as i32))?;
        a.mov(ebp, 200)?;
        a.cmp(ebp, 300)?;
        a.set_label(&mut copy)?;
        a.movzx(eax, byte_ptr(rsi))?;
        a.adc(rbx, rax)?;
        a.mov(byte_ptr(rdi), al)?;
        a.add(rsi, 1)?;
        a.inc(rdi)?;
        a.cmp(al, 0x80)?;
        a.jb(skip)?;
        a.add(rbx, qword_ptr(rdi - 8))?;
        a.set_label(&mut skip)?;
        a.dec(ebp)?;
        a.jnz(copy)?;
        // Nothing but memory tells the rounds apart.
        let mut count = a.create_label();
        a.mov(dword_ptr(DATA + 0x100), 103)?;
        a.set_label(&mut count)?;
        a.dec(dword_ptr(DATA + 0x100))?;
        a.jnz(count)?;
        // Out of the middle.
        let mut find = a.create_label();
        a.lea(rdx, qword_ptr(r11 * 8 + (DATA + 0x1ff0) as i32))?;
        a.set_label(&mut find)?;
        a.inc(rdx)?;
        a.add(r8, 3)?;
        a.cmp(byte_ptr(rdx), 0x40)?;
        a.jae(find)?;
        a.adc(r8, rdx)?;
        a.dec(r11d)?;
        a.jnz(outer)?;
        a.hlt()
    };
    same(prepare, write);
    // In step with the interpreter.
    let mut machine = prepare();
    for i in 0..0x600 {
        machine.put(DATA + 8 * i, i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    let options = TranslatorOptions { cache_bytes: 4 << 20, threshold: 1, check: 1 };
    machine.vcpu.set_translator(Some(options)).expect("this host runs translated code");
    machine.code(write);
    run(&mut machine);
    assert!(counters(&machine).checked > 100);
}
