//! Memory-mapped I/O by every form of instruction: each access reaches the device once, in its width.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use platform::x86::{cr4, gpr, rflags};
use vmm::EngineKind;

use crate::harness::{Access, FINISH, Machine, PORT, at};

crate::stamp! {
    everywhere: moves, arithmetic, exchanges, strings;
    software: bits, stacks_and_branches, vectors, wide_vectors, floating_point, system_tables, ports_and_devices,
        code_from_a_device, masked_moves_touch_what_they_move
}

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// What the device's first eight bytes are before each form.
const BEFORE: u64 = 0x8877_6655_4433_2211;
/// RAX before each form.
const RAX: u64 = 0x0102_0304_0506_0708;

/// One form: what it does to the device, and to RAX where that matters.
struct Form {
    name: &'static str,
    write: Write,
    log: Vec<Access>,
    rax: Option<u64>,
}

fn form(name: &'static str, write: Write, log: &[Access]) -> Form {
    Form { name, write, log: log.to_vec(), rax: None }
}

impl Form {
    fn rax(mut self, value: u64) -> Self {
        self.rax = Some(value);
        self
    }
}

use Access::{Read as R, Write as W};

/// Runs forms in 64-bit mode: RDI is the device's address, RSI points into RAM, RCX is 3.
fn check(engine: EngineKind, forms: Vec<Form>) {
    for form in forms {
        let mut machine = Machine::long(engine);
        prepare(&mut machine);
        machine.code(form.write);
        machine.run_to_end();
        assert_eq!(machine.world.log(), form.log, "{}", form.name);
        if let Some(value) = form.rax {
            assert_eq!(machine.reg(gpr::RAX), value, "{}", form.name);
        }
    }
}

fn prepare(machine: &mut Machine) {
    machine.world.set_mmio(0, &BEFORE.to_le_bytes());
    machine.world.set_mmio(8, &0x0f0e_0d0c_0b0a_0908u64.to_le_bytes());
    machine.put64(at::DATA, 0x1111_2222_3333_4444);
    machine.state.gpr[gpr::RAX] = RAX;
    machine.state.gpr[gpr::RCX] = 3;
    machine.state.gpr[gpr::RSI] = at::DATA;
    machine.state.gpr[gpr::RDI] = at::MMIO;
    // Only the tests for the software CPU use it: a KVM without hardware virtualisation may not offer it.
    if std::arch::is_x86_feature_detected!("avx") && machine.engine == EngineKind::Soft {
        machine.state.cr4 |= cr4::OSXSAVE;
        machine.state.xcr0 = 7;
    }
}

fn moves(engine: EngineKind) {
    check(
        engine,
        vec![
            form("mov r8, m", |a| a.mov(al, byte_ptr(rdi + 1)), &[R(1, 1)]).rax(0x0102_0304_0506_0722),
            form("mov ah, m", |a| a.db(&[0x8a, 0x27]), &[R(0, 1)]).rax(0x0102_0304_0506_1108),
            form("mov r16, m", |a| a.mov(ax, word_ptr(rdi)), &[R(0, 2)]).rax(0x0102_0304_0506_2211),
            form("mov r32, m", |a| a.mov(eax, dword_ptr(rdi + 3)), &[R(3, 4)]).rax(0x7766_5544),
            form("mov r64, m", |a| a.mov(rax, qword_ptr(rdi)), &[R(0, 8)]).rax(BEFORE),
            form("mov m, r8", |a| a.mov(byte_ptr(rdi + 5), al), &[W(5, 1, 8)]),
            form("mov m, r16", |a| a.mov(word_ptr(rdi + 5), ax), &[W(5, 2, 0x0708)]),
            form("mov m, r32", |a| a.mov(dword_ptr(rdi + 4), eax), &[W(4, 4, 0x0506_0708)]),
            form("mov m, r64", |a| a.mov(qword_ptr(rdi + 8), rax), &[W(8, 8, RAX)]),
            form("mov m8, i", |a| a.mov(byte_ptr(rdi), 0x7f), &[W(0, 1, 0x7f)]),
            form("mov m16, i", |a| a.mov(word_ptr(rdi), 0x7fff), &[W(0, 2, 0x7fff)]),
            form("mov m32, i", |a| a.mov(dword_ptr(rdi), -2), &[W(0, 4, 0xffff_fffe)]),
            form("mov m64, i", |a| a.mov(qword_ptr(rdi), -2), &[W(0, 8, u64::MAX - 1)]),
            form("mov moffs", |a| a.db(&[0x67, 0xa1, 8, 0, 0, 0xd0]), &[R(8, 4)]).rax(0x0b0a_0908),
            form("movzx 8", |a| a.movzx(eax, byte_ptr(rdi + 7)), &[R(7, 1)]).rax(0x88),
            form("movzx 16", |a| a.movzx(rax, word_ptr(rdi + 6)), &[R(6, 2)]).rax(0x8877),
            form("movsx 8", |a| a.movsx(ax, byte_ptr(rdi + 7)), &[R(7, 1)]).rax(0x0102_0304_0506_ff88),
            form("movsxd", |a| a.movsxd(rax, dword_ptr(rdi + 4)), &[R(4, 4)]).rax(0xffff_ffff_8877_6655),
            form("cmovz taken", |a| a.cmp(ecx, ecx).and_then(|()| a.cmovz(rax, qword_ptr(rdi))), &[R(0, 8)])
                .rax(BEFORE),
            form("cmovnz not taken", |a| a.cmp(ecx, ecx).and_then(|()| a.cmovnz(eax, dword_ptr(rdi))), &[R(0, 4)])
                .rax(RAX & 0xffff_ffff),
            form("setz", |a| a.cmp(ecx, ecx).and_then(|()| a.setz(byte_ptr(rdi))), &[W(0, 1, 1)]),
            form("lea", |a| a.lea(rax, qword_ptr(rdi + 4)), &[]).rax(at::MMIO + 4),
            form("mov seg, m", |a| a.xor(eax, eax).and_then(|()| a.mov(word_ptr(rdi), ds)), &[W(0, 2, 0x10)]),
        ],
    );
}

fn arithmetic(engine: EngineKind) {
    let sum = 0x4433_2211 + 0x0506_0708;
    check(
        engine,
        vec![
            form("add m, r", |a| a.add(dword_ptr(rdi), eax), &[R(0, 4), W(0, 4, sum)]),
            form("add r, m", |a| a.add(eax, dword_ptr(rdi)), &[R(0, 4)]).rax(sum),
            form("add m, i8", |a| a.add(qword_ptr(rdi), 1), &[R(0, 8), W(0, 8, BEFORE + 1)]),
            form("sub m, i", |a| a.sub(word_ptr(rdi), 0x211), &[R(0, 2), W(0, 2, 0x2000)]),
            form("or m, r", |a| a.or(byte_ptr(rdi), al), &[R(0, 1), W(0, 1, 0x19)]),
            form("and m, i", |a| a.and(dword_ptr(rdi), 0xff), &[R(0, 4), W(0, 4, 0x11)]),
            form("xor r, m", |a| a.xor(al, byte_ptr(rdi)), &[R(0, 1)]).rax(RAX ^ 0x11),
            form("adc m, r", |a| a.stc().and_then(|()| a.adc(byte_ptr(rdi), cl)), &[R(0, 1), W(0, 1, 0x15)]),
            form("sbb r, m", |a| a.stc().and_then(|()| a.sbb(al, byte_ptr(rdi))), &[R(0, 1)]).rax(RAX - 8 + 0xf6),
            form("cmp m, r", |a| a.cmp(dword_ptr(rdi), eax), &[R(0, 4)]).rax(RAX),
            form("test m, i", |a| a.test(word_ptr(rdi), 1), &[R(0, 2)]),
            form("inc", |a| a.inc(dword_ptr(rdi)), &[R(0, 4), W(0, 4, 0x4433_2212)]),
            form("dec", |a| a.dec(byte_ptr(rdi)), &[R(0, 1), W(0, 1, 0x10)]),
            form("not", |a| a.not(word_ptr(rdi)), &[R(0, 2), W(0, 2, 0xddee)]),
            form("neg", |a| a.neg(byte_ptr(rdi)), &[R(0, 1), W(0, 1, 0xef)]),
            form("shl", |a| a.shl(word_ptr(rdi), 4), &[R(0, 2), W(0, 2, 0x2110)]),
            form("sar", |a| a.sar(byte_ptr(rdi + 7), cl), &[R(7, 1), W(7, 1, 0xf1)]),
            form("rol", |a| a.rol(dword_ptr(rdi), 8), &[R(0, 4), W(0, 4, 0x3322_1144)]),
            form("shld", |a| a.shld(dword_ptr(rdi), eax, 8), &[R(0, 4), W(0, 4, 0x3322_1105)]),
            form("mul", |a| a.mul(byte_ptr(rdi)), &[R(0, 1)]).rax(0x0102_0304_0506_0088),
            form("imul r, m", |a| a.imul_2(eax, dword_ptr(rdi + 8)), &[R(8, 4)])
                .rax(u64::from(0x0506_0708u32.wrapping_mul(0x0b0a_0908))),
            form("div", |a| a.xor(edx, edx).and_then(|()| a.div(dword_ptr(rdi + 8))), &[R(8, 4)]).rax(0),
        ],
    );
}

fn exchanges(engine: EngineKind) {
    check(
        engine,
        vec![
            form("xchg", |a| a.xchg(dword_ptr(rdi), eax), &[R(0, 4), W(0, 4, 0x0506_0708)]).rax(0x4433_2211),
            form("xadd", |a| a.xadd(byte_ptr(rdi), al), &[R(0, 1), W(0, 1, 0x19)]).rax(RAX + 9),
            form("lock add", |a| a.lock().add(dword_ptr(rdi), 1), &[R(0, 4), W(0, 4, 0x4433_2212)]),
            form(
                "cmpxchg equal",
                |a| a.mov(eax, 0x4433_2211).and_then(|()| a.cmpxchg(dword_ptr(rdi), ecx)),
                &[R(0, 4), W(0, 4, 3)],
            ),
        ],
    );
    // One that compares unequal may write the old value back, or nothing; but it never writes another.
    let mut machine = Machine::long(engine);
    prepare(&mut machine);
    machine.code(|a| a.cmpxchg(dword_ptr(rdi), ecx));
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RAX), 0x4433_2211);
    assert_eq!(machine.world.mmio(0, 4), 0x4433_2211u32.to_le_bytes());
}

fn strings(engine: EngineKind) {
    check(
        engine,
        vec![
            form("movsb", |a| a.movsb(), &[W(0, 1, 0x44)]),
            form("movsq", |a| a.movsq(), &[W(0, 8, 0x1111_2222_3333_4444)]),
            form("movs from", |a| a.xchg(rsi, rdi).and_then(|()| a.movsd()), &[R(0, 4)]),
            form("movs within", |a| a.mov(rsi, rdi).and_then(|()| a.movsw()), &[R(0, 2), W(0, 2, 0x2211)]),
            form("rep stosb", |a| a.rep().stosb(), &[W(0, 1, 8), W(1, 1, 8), W(2, 1, 8)]),
            form("rep stosd", |a| a.rep().stosd(), &[0, 4, 8].map(|at| W(at, 4, 0x0506_0708))),
            form("lodsd", |a| a.mov(rsi, rdi).and_then(|()| a.lodsd()), &[R(0, 4)]).rax(0x4433_2211),
            form("scasb", |a| a.scasb(), &[R(0, 1)]),
            form("cmpsw", |a| a.cmpsw(), &[R(0, 2)]),
        ],
    );
}

fn bits(engine: EngineKind) {
    check(
        engine,
        vec![
            form("bt m, i", |a| a.bt(dword_ptr(rdi), 5), &[R(0, 4)]),
            form("bts m, i", |a| a.bts(dword_ptr(rdi), 1), &[R(0, 4), W(0, 4, 0x4433_2213)]),
            form(
                "btr m, r",
                |a| a.add(ecx, 32).and_then(|()| a.btr(dword_ptr(rdi), ecx)),
                &[R(4, 4), W(4, 4, 0x8877_6655)],
            ),
            form("btc lock", |a| a.lock().btc(word_ptr(rdi), 0), &[R(0, 2), W(0, 2, 0x2210)]),
            form("bsf", |a| a.bsf(eax, dword_ptr(rdi + 8)), &[R(8, 4)]).rax(3),
            form("bsr", |a| a.bsr(rax, qword_ptr(rdi)), &[R(0, 8)]).rax(63),
            form("popcnt", |a| a.popcnt(eax, dword_ptr(rdi)), &[R(0, 4)]).rax(10),
            form("movbe load", |a| a.movbe(eax, dword_ptr(rdi)), &[R(0, 4)]).rax(0x1122_3344),
            form("movbe store", |a| a.movbe(word_ptr(rdi), ax), &[W(0, 2, 0x0807)]),
            form("crc32", |a| a.xor(eax, eax).and_then(|()| a.crc32(eax, byte_ptr(rdi))), &[R(0, 1)]),
            form("xlatb", |a| a.mov(rbx, rdi).and_then(|()| a.xlatb()), &[R(8, 1)]).rax(0x0102_0304_0506_0708),
        ],
    );
    let mut machine = Machine::long(engine);
    prepare(&mut machine);
    (machine.state.gpr[gpr::RAX], machine.state.gpr[gpr::RDX]) = (BEFORE, 0x0f0e_0d0c_0b0a_0908);
    (machine.state.gpr[gpr::RBX], machine.state.gpr[gpr::RCX]) = (1, 2);
    machine.code(|a| a.lock().cmpxchg16b(xmmword_ptr(rdi)));
    machine.run_to_end();
    assert_ne!(machine.state.rflags & rflags::ZF, 0);
    assert_eq!(machine.world.mmio(0, 16), [1u64.to_le_bytes(), 2u64.to_le_bytes()].concat());
}

fn stacks_and_branches(engine: EngineKind) {
    check(
        engine,
        vec![
            form("push m", |a| a.push(qword_ptr(rdi)).and_then(|()| a.pop(rax)), &[R(0, 8)]).rax(BEFORE),
            form("pop m", |a| a.push(rax).and_then(|()| a.pop(qword_ptr(rdi))), &[W(0, 8, RAX)]),
            form("push", |a| a.lea(rsp, ptr(rdi + 8)).and_then(|()| a.push(rcx)), &[W(0, 8, 3)]),
            form("pop", |a| a.mov(rsp, rdi).and_then(|()| a.pop(ax)), &[R(0, 2)]).rax(0x0102_0304_0506_2211),
            form("leave", |a| a.mov(rbp, rdi).and_then(|()| a.leave()), &[R(0, 8)]),
            form(
                "enter",
                |a| a.lea(rsp, ptr(rdi + 0x18)).and_then(|()| a.mov(rbp, rcx)).and_then(|()| a.enter(8, 0)),
                &[W(0x10, 8, 3)],
            ),
        ],
    );
    // The pointer of a jump or call lies in the device.
    for (call, far) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut machine = Machine::long(engine);
        prepare(&mut machine);
        let target = at::CODE + 0x200;
        machine.world.set_mmio(0, &target.to_le_bytes());
        if far {
            machine.world.set_mmio(4, &crate::harness::sel::CODE64.to_le_bytes());
        }
        machine.code_at(target, |a| {
            a.mov(ebx, 9)?;
            a.out(u32::from(FINISH), al)
        });
        machine.code(|a| match (call, far) {
            (false, false) => a.jmp(qword_ptr(rdi)),
            (true, false) => a.call(qword_ptr(rdi)),
            (false, true) => a.jmp(fword_ptr(rdi)),
            (true, true) => a.call(fword_ptr(rdi)),
        });
        machine.run_to_end();
        assert_eq!(machine.reg(gpr::RBX), 9, "{call} {far}");
        let read: u64 = machine.world.log().iter().map(|access| if let R(_, size) = access { *size } else { 0 }).sum();
        assert_eq!(read, if far { 6 } else { 8 }, "each byte once");
    }
}

fn vectors(engine: EngineKind) {
    check(
        engine,
        vec![
            form("movd load", |a| a.movd(xmm1, dword_ptr(rdi)).and_then(|()| a.movd(eax, xmm1)), &[R(0, 4)])
                .rax(0x4433_2211),
            form("movd store", |a| a.movd(xmm1, ecx).and_then(|()| a.movd(dword_ptr(rdi), xmm1)), &[W(0, 4, 3)]),
            form("movq store", |a| a.movq(xmm1, rax).and_then(|()| a.movq(qword_ptr(rdi), xmm1)), &[W(0, 8, RAX)]),
            form("movss", |a| a.movss(xmm1, dword_ptr(rdi + 4)), &[R(4, 4)]),
            form("movsd", |a| a.movsd_2(xmm1, qword_ptr(rdi)).and_then(|()| a.movq(rax, xmm1)), &[R(0, 8)]).rax(BEFORE),
            form("movups", |a| a.movups(xmm2, xmmword_ptr(rdi)).and_then(|()| a.movq(rax, xmm2)), &[R(0, 8), R(8, 8)])
                .rax(BEFORE),
            form("movhps", |a| a.movhps(qword_ptr(rdi + 8), xmm2), &[W(8, 8, 0)]),
            form("paddd", |a| a.paddd(xmm0, xmmword_ptr(rdi)).and_then(|()| a.movq(rax, xmm0)), &[R(0, 8), R(8, 8)])
                .rax(BEFORE),
            form("movdqa", |a| a.movdqa(xmmword_ptr(rdi), xmm7), &[W(0, 8, 0), W(8, 8, 0)]),
            form("movntdq", |a| a.movntdq(xmmword_ptr(rdi), xmm7), &[W(0, 8, 0), W(8, 8, 0)]),
            form("movnti", |a| a.movnti(dword_ptr(rdi), ecx), &[W(0, 4, 3)]),
            form("cvtsi2sd", |a| a.cvtsi2sd(xmm0, dword_ptr(rdi)), &[R(0, 4)]),
            form("pextrb", |a| a.movd(xmm1, ecx).and_then(|()| a.pextrb(byte_ptr(rdi), xmm1, 0)), &[W(0, 1, 3)]),
            form("pinsrw", |a| a.pinsrw(xmm1, word_ptr(rdi), 0), &[R(0, 2)]),
            form("movq mmx", |a| a.movq(mm0, qword_ptr(rdi)).and_then(|()| a.movq(rax, mm0)), &[R(0, 8)]).rax(BEFORE),
            form("stmxcsr", |a| a.stmxcsr(dword_ptr(rdi)), &[W(0, 4, 0x1f80)]),
        ],
    );
}

fn wide_vectors(engine: EngineKind) {
    if !std::arch::is_x86_feature_detected!("avx2") {
        return;
    }
    check(
        engine,
        vec![
            form("vmovdqu load", |a| a.vmovdqu(ymm1, ymmword_ptr(rdi)), &[0, 8, 16, 24].map(|at| R(at, 8))),
            form("vmovdqu store", |a| a.vmovdqu(ymmword_ptr(rdi), ymm9), &[0, 8, 16, 24].map(|at| W(at, 8, 0))),
            form("vpaddd", |a| a.vpaddd(ymm1, ymm2, ymmword_ptr(rdi)), &[0, 8, 16, 24].map(|at| R(at, 8))),
            form("vpbroadcastd", |a| a.vpbroadcastd(ymm1, dword_ptr(rdi)), &[R(0, 4)]),
            form("andn", |a| a.andn(eax, ecx, dword_ptr(rdi)), &[R(0, 4)]).rax(0x4433_2210),
            form("rorx", |a| a.rorx(eax, dword_ptr(rdi), 4), &[R(0, 4)]).rax(0x1443_3221),
        ],
    );
}

/// Elements that are masked out are not touched.
fn masked_moves_touch_what_they_move(engine: EngineKind) {
    if !std::arch::is_x86_feature_detected!("avx2") {
        return;
    }
    let mut machine = Machine::long(engine);
    prepare(&mut machine);
    let mask: Vec<u8> = [0u32, 0x8000_0000, 0, 0xffff_ffff].iter().flat_map(|word| word.to_le_bytes()).collect();
    machine.memory.write(at::DATA, &mask).unwrap();
    machine.code(|a| {
        a.vmovdqu(xmm1, xmmword_ptr(rsi))?;
        a.vpmaskmovd(xmmword_ptr(rdi), xmm1, xmm1)
    });
    machine.run_to_end();
    assert_eq!(machine.world.mmio(0, 4), 0x4433_2211u32.to_le_bytes());
    assert_eq!(machine.world.mmio(4, 4), 0x8000_0000u32.to_le_bytes());
    assert_eq!(machine.world.mmio(8, 4), 0x0b0a_0908u32.to_le_bytes());
    assert_eq!(machine.world.mmio(12, 4), u32::MAX.to_le_bytes());
}

/// After RESET all exceptions are unmasked, and some of the bytes here are no numbers.
fn masked(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.fninit()
}

fn floating_point(engine: EngineKind) {
    check(
        engine,
        vec![
            form("fld m32", |a| masked(a).and_then(|()| a.fld(dword_ptr(rdi))), &[R(0, 4)]),
            form("fld m64", |a| masked(a).and_then(|()| a.fld(qword_ptr(rdi))), &[R(0, 8)]),
            form("fld m80", |a| masked(a).and_then(|()| a.fld(tword_ptr(rdi))), &[R(0, 8), R(8, 2)]),
            form(
                "fld1 fst m32",
                |a| masked(a).and_then(|()| a.fld1()).and_then(|()| a.fstp(dword_ptr(rdi))),
                &[W(0, 4, 0x3f80_0000)],
            ),
            form(
                "fld1 fst m64",
                |a| masked(a).and_then(|()| a.fld1()).and_then(|()| a.fstp(qword_ptr(rdi))),
                &[W(0, 8, 0x3ff0 << 48)],
            ),
            form(
                "fld1 fst m80",
                |a| masked(a).and_then(|()| a.fld1()).and_then(|()| a.fstp(tword_ptr(rdi))),
                &[W(0, 8, 1 << 63), W(8, 2, 0x3fff)],
            ),
            form("fild m16", |a| masked(a).and_then(|()| a.fild(word_ptr(rdi))), &[R(0, 2)]),
            form(
                "fistp m64",
                |a| masked(a).and_then(|()| a.fld1()).and_then(|()| a.fistp(qword_ptr(rdi))),
                &[W(0, 8, 1)],
            ),
            form("fadd m64", |a| masked(a).and_then(|()| a.fld1()).and_then(|()| a.fadd(qword_ptr(rdi))), &[R(0, 8)]),
            form("fnstcw", |a| masked(a).and_then(|()| a.fnstcw(word_ptr(rdi))), &[W(0, 2, 0x37f)]),
        ],
    );
}

fn system_tables(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    prepare(&mut machine);
    machine.code(|a| {
        a.sgdt(ptr(rdi))?;
        a.sidt(ptr(rdi + 0x10))?;
        a.lidt(ptr(rdi))?;
        a.sidt(ptr(rdi + 0x20))
    });
    machine.run_to_end();
    let table = |base: u64, limit: u16| [limit.to_le_bytes().to_vec(), base.to_le_bytes().to_vec()].concat();
    assert_eq!(machine.world.mmio(0, 10), table(at::GDT, 0xff));
    assert_eq!(machine.world.mmio(0x10, 10), table(at::IDT, 0xfff));
    assert_eq!(machine.world.mmio(0x20, 10), table(at::GDT, 0xff));
    assert_eq!(machine.state.idtr.base, at::GDT);
}

/// From a device to a port and back.
fn ports_and_devices(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    prepare(&mut machine);
    machine.world.supply(&[0x99, 0x7766]);
    machine.code(|a| {
        a.mov(edx, u32::from(PORT))?;
        a.mov(rsi, rdi)?;
        a.outsd()?;
        a.insb()?;
        a.insw()
    });
    machine.run_to_end();
    let expected =
        [R(0, 4), Access::Out(0, 4, 0x4433_2211), Access::In(0, 1), W(0, 1, 0x99), Access::In(0, 2), W(1, 2, 0x7766)];
    assert_eq!(machine.world.log(), expected);
}

/// A device's bytes as code, a loop among them.
fn code_from_a_device(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    prepare(&mut machine);
    let mut assembler = CodeAssembler::new(64).unwrap();
    let mut again = assembler.create_label();
    assembler.xor(eax, eax).unwrap();
    assembler.set_label(&mut again).unwrap();
    assembler.add(eax, ecx).unwrap();
    assembler.dec(ecx).unwrap();
    assembler.jne(again).unwrap();
    assembler.mov(rbx, 0x1122_3344_5566_7788u64).unwrap();
    assembler.out(u32::from(FINISH), al).unwrap();
    // Across two of the device's pages.
    let start = at::MMIO + 0xff5;
    machine.world.set_mmio(0xff5, &assembler.assemble(start).unwrap());
    machine.state.rip = start;
    machine.run_to_end();
    assert_eq!((machine.reg(gpr::RAX), machine.reg(gpr::RBX)), (6, 0x1122_3344_5566_7788));
}
