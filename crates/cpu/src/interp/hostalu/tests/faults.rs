//! Exceptions of data instructions: alignment, enabling conditions, numeric exceptions.

use platform::x86::{cr0, cr4};

use super::fixture::Bench;
use crate::interp::fpu::mxcsr;
use crate::trap::vector;
use crate::{Step, Trap};

const DATA: u64 = 0x20_0000;
const GP: Step = Err(Trap::gp(0));
const UD: Step = Err(Trap::ud());
const NM: Step = Err(Trap::nm());
const XM: Step = Err(Trap::fault(vector::XM));
const MF: Step = Err(Trap::fault(vector::MF));

const PXOR: &[u8] = &[0x66, 0x0f, 0xef, 0xc1];
const ADDSD: &[u8] = &[0xf2, 0x0f, 0x58, 0xc1];
const MULSD: &[u8] = &[0xf2, 0x0f, 0x59, 0xc1];
const DIVSD: &[u8] = &[0xf2, 0x0f, 0x5e, 0xc1];
const SQRTSD: &[u8] = &[0xf2, 0x0f, 0x51, 0xc1];
const CVTSD2SI: &[u8] = &[0xf2, 0x0f, 0x2d, 0xc1];
const VPXOR: &[u8] = &[0xc5, 0xf5, 0xef, 0xc0];
const VPXORD: &[u8] = &[0x62, 0xf1, 0x7d, 0x48, 0xef, 0xc0];
const KMOVW: &[u8] = &[0xc5, 0xf8, 0x90, 0xc1];
const PADDB_MM: &[u8] = &[0x0f, 0xfc, 0xc1];
const FADD: &[u8] = &[0xd8, 0xc1];
const FLD1: &[u8] = &[0xd9, 0xe8];
const FLDZ: &[u8] = &[0xd9, 0xee];
const FDIVP: &[u8] = &[0xde, 0xf9];
const FWAIT: &[u8] = &[0x9b];
const FNSTSW: &[u8] = &[0xdf, 0xe0];
const FNCLEX: &[u8] = &[0xdb, 0xe2];

#[test]
fn alignment() {
    let mut bench = Bench::new();
    for (bytes, offset, expected) in [
        (&[0x0f, 0x28, 0x06][..], 8, GP),                // MOVAPS load
        (&[0x0f, 0x29, 0x06], 1, GP),                    // MOVAPS store
        (&[0x0f, 0x10, 0x06], 1, Ok(())),                // MOVUPS
        (&[0xf3, 0x0f, 0x7f, 0x06], 3, Ok(())),          // MOVDQU
        (&[0xf2, 0x0f, 0xf0, 0x06], 3, Ok(())),          // LDDQU
        (&[0x66, 0x0f, 0xe7, 0x06], 4, GP),              // MOVNTDQ
        (&[0x66, 0x0f, 0xfc, 0x06], 1, GP),              // PADDB
        (&[0x66, 0x0f, 0xfc, 0x06], 16, Ok(())),         // PADDB
        (&[0xf2, 0x0f, 0x58, 0x06], 1, Ok(())),          // ADDSD
        (&[0x66, 0x0f, 0x3a, 0x63, 0x06, 0], 1, Ok(())), // PCMPISTRI
        (&[0xc5, 0xf5, 0xfc, 0x06], 1, Ok(())),          // VPADDB
        (&[0xc5, 0xfd, 0x6f, 0x06], 16, GP),             // VMOVDQA ymm
        (&[0xc5, 0xfe, 0x6f, 0x06], 1, Ok(())),          // VMOVDQU ymm
        (&[0xc5, 0xfd, 0xe7, 0x06], 16, GP),             // VMOVNTDQ ymm
        (&[0x0f, 0xae, 0x06], 8, GP),                    // FXSAVE
        (&[0x0f, 0xae, 0x26], 32, GP),                   // XSAVE
    ] {
        bench.vcpu.regs[6] = DATA + offset;
        assert_eq!(bench.run(bytes), expected, "{bytes:02x?} at +{offset}");
    }
    // AMD's misaligned-SSE mode spares arithmetic, but not MOVAPS.
    bench.vcpu.fpu.set_mxcsr(mxcsr::RESET | 1 << 17);
    bench.vcpu.regs[6] = DATA + 1;
    assert_eq!(bench.run(&[0x66, 0x0f, 0xfc, 0x06]), Ok(()));
    assert_eq!(bench.run(&[0x0f, 0x28, 0x06]), GP);
}

#[test]
fn avx512_alignment() {
    let mut bench = Bench::new();
    if !bench.has(&[iced_x86::CpuidFeature::AVX512F]) {
        return;
    }
    bench.vcpu.regs[6] = DATA + 32;
    assert_eq!(bench.run(&[0x62, 0xf1, 0x7d, 0x48, 0x6f, 0x06]), GP); // VMOVDQA32 zmm
    bench.vcpu.fpu.opmasks[1] = 1;
    assert_eq!(bench.run(&[0x62, 0xf1, 0x7d, 0x49, 0x6f, 0x06]), GP); // with {k1}
    assert_eq!(bench.run(&[0x62, 0xf1, 0x7e, 0x48, 0x6f, 0x06]), Ok(())); // VMOVDQU32
}

/// Runs each instruction with some control bits changed.
fn gates(change: impl Fn(&mut Bench), expected: &[(&[u8], Step)]) {
    for (bytes, step) in expected {
        let mut bench = Bench::new();
        let (op, _) = bench.decode(bytes);
        if bench.has(iced_x86::Decoder::new(64, bytes, 0).decode().cpuid_features()) || *bytes == FWAIT {
            change(&mut bench);
            assert_eq!((op.run)(&mut bench.vcpu, &op), *step, "{bytes:02x?}");
        }
    }
}

#[test]
fn enabling_conditions() {
    let all = |step: Step| [PXOR, VPXOR, VPXORD, KMOVW, PADDB_MM, FADD].map(|bytes| (bytes, step));
    gates(|_| (), &all(Ok(())));
    gates(|b| b.vcpu.cr0 |= cr0::TS, &all(NM));
    gates(
        |b| b.vcpu.cr0 |= cr0::EM,
        &[(PXOR, UD), (PADDB_MM, UD), (FADD, NM), (VPXOR, Ok(())), (KMOVW, Ok(())), (FWAIT, Ok(()))],
    );
    gates(|b| b.vcpu.cr0 |= cr0::TS, &[(FWAIT, Ok(()))]);
    gates(|b| b.vcpu.cr0 |= cr0::TS | cr0::MP, &[(FWAIT, NM)]);
    gates(|b| b.vcpu.cr4 &= !cr4::OSFXSR, &[(PXOR, UD), (PADDB_MM, Ok(())), (FADD, Ok(())), (VPXOR, Ok(()))]);
    gates(|b| b.vcpu.cr4 &= !cr4::OSXSAVE, &[(PXOR, Ok(())), (VPXOR, UD), (VPXORD, UD), (KMOVW, UD)]);
    gates(|b| b.vcpu.xcr0 = 7, &[(PXOR, Ok(())), (VPXOR, Ok(())), (VPXORD, UD), (KMOVW, UD)]);
    gates(|b| b.vcpu.xcr0 = 3, &[(PXOR, Ok(())), (VPXOR, UD), (VPXORD, UD)]);
    // The undefined opcode goes before the missing device.
    gates(|b| (b.vcpu.xcr0, b.vcpu.cr0) = (3, b.vcpu.cr0 | cr0::TS), &[(VPXOR, UD)]);
}

#[test]
fn vex_does_not_exist_in_real_mode() {
    let mut bench = Bench::real();
    assert_eq!(bench.run(VPXOR), UD);
    assert_eq!(bench.run(PXOR), Ok(()));
    let mut bench = Bench::protected();
    assert_eq!(bench.run(VPXOR), Ok(()));
}

#[test]
fn instructions_outside_the_guests_cpuid_are_undefined() {
    let mut bench = Bench::new();
    let mut features = (*bench.vcpu.features).clone();
    for leaf in features.leaves.iter_mut().filter(|leaf| leaf.function == 1) {
        leaf.regs[2] &= !(1 << 28);
    }
    bench.vcpu.features = features.into();
    assert_eq!(bench.run(&[0xc5, 0xf1, 0xef, 0xc0]), UD); // VPXOR xmm: AVX
    assert_eq!(bench.run(PXOR), Ok(()));
}

/// XMM0 and XMM1.
fn set(bench: &mut Bench, a: f64, b: f64) {
    bench.vcpu.fpu.vectors[0] = [0x55; 64];
    bench.vcpu.fpu.vectors[0][..8].copy_from_slice(&a.to_le_bytes());
    bench.vcpu.fpu.vectors[1][..8].copy_from_slice(&b.to_le_bytes());
}

fn xmm0(bench: &Bench) -> f64 {
    f64::from_le_bytes(std::array::from_fn(|i| bench.vcpu.fpu.vectors[0][i]))
}

#[test]
fn unmasked_sse_exceptions() {
    const TINY: f64 = f64::MIN_POSITIVE;
    let signalling = f64::from_bits(0x7ff0_0000_0000_0001);
    let denormal = f64::from_bits(1);
    // Instruction, operands, the flag.
    let cases = [
        (ADDSD, signalling, 1.0, 0),
        (ADDSD, denormal, 1.0, 1),
        (DIVSD, 1.0, 0.0, 2),
        (MULSD, f64::MAX, 2.0, 3),
        (MULSD, TINY, 1.1e-10, 4),
        // Exact, but tiny: only raised when unmasked.
        (MULSD, TINY, 0.5, 4),
        (DIVSD, 1.0, 3.0, 5),
        (SQRTSD, 0.0, -1.0, 0),
        (CVTSD2SI, 0.0, 1e300, 0),
    ];
    for (bytes, a, b, flag) in cases {
        let mut bench = Bench::new();
        set(&mut bench, a, b);
        bench.vcpu.regs[0] = 0x1234;
        bench.vcpu.fpu.set_mxcsr(mxcsr::RESET & !(0x80 << flag));
        let before = bench.vcpu.fpu.vectors;
        assert_eq!(bench.run(bytes), XM, "{bytes:02x?} {a:e} {b:e}");
        assert_eq!(bench.vcpu.fpu.vectors, before);
        assert_eq!(bench.vcpu.regs[0], 0x1234);
        assert_ne!(bench.vcpu.fpu.mxcsr() & 1 << flag, 0);

        bench.vcpu.cr4 &= !cr4::OSXMMEXCPT;
        assert_eq!(bench.run(bytes), UD);
        // Masked, it completes.
        bench.vcpu.fpu.set_mxcsr(mxcsr::RESET);
        assert_eq!(bench.run(bytes), Ok(()));
    }
}

#[test]
fn flags_are_sticky_and_old_ones_do_not_trap() {
    let mut bench = Bench::new();
    set(&mut bench, 1.0, 2.0);
    // Divide-by-zero is unmasked and its flag is set already: no exception without a new one.
    bench.vcpu.fpu.set_mxcsr(mxcsr::RESET & !0x200 | 4);
    assert_eq!(bench.run(ADDSD), Ok(()));
    assert_eq!((xmm0(&bench), bench.vcpu.fpu.mxcsr() & 0x3f), (3.0, 4));
    set(&mut bench, 1.0, 3.0);
    assert_eq!(bench.run(DIVSD), Ok(()));
    assert_eq!(bench.vcpu.fpu.mxcsr() & 0x3f, 0x24);
    // The host's MXCSR is as before.
    assert_eq!(std::hint::black_box(1.0f64) / std::hint::black_box(3.0), 1.0 / 3.0);
}

#[test]
fn underflow_unmasked_does_not_flush() {
    let mut bench = Bench::new();
    set(&mut bench, 1.5, 2.5);
    bench.vcpu.fpu.set_mxcsr(mxcsr::RESET & !0x800);
    assert_eq!(bench.run(MULSD), Ok(()));
    assert_eq!((xmm0(&bench), bench.vcpu.fpu.mxcsr() & 0x3f), (3.75, 0));
}

/// Half precision knows no flushing to zero that could tell tiny results.
#[test]
fn exact_tiny_halves_underflow_only_where_that_is_unmasked() {
    const VCVTPS2PH: &[u8] = &[0xc4, 0xe3, 0x79, 0x1d, 0xc0, 0x00]; // XMM0, XMM0, nearest
    if !std::arch::is_x86_feature_detected!("f16c") {
        return;
    }
    let smallest_normal = 2f32.powi(-14);
    let cases = [(0.0, false), (smallest_normal, false), (smallest_normal / 2.0, true), (-3.0 * 2f32.powi(-24), true)];
    for (value, tiny) in cases {
        for unmasked in [false, true] {
            let mut bench = Bench::new();
            bench.vcpu.fpu.vectors[0] = [0; 64];
            bench.vcpu.fpu.vectors[0][4..8].copy_from_slice(&value.to_le_bytes());
            bench.vcpu.fpu.set_mxcsr(mxcsr::RESET & !if unmasked { 0x800 } else { 0 });
            let (expected, flags) = if tiny && unmasked { (XM, 0x10) } else { (Ok(()), 0) };
            assert_eq!(bench.run(VCVTPS2PH), expected, "{value:e} {unmasked}");
            assert_eq!(bench.vcpu.fpu.mxcsr() & 0x3f, flags, "{value:e} {unmasked}");
        }
    }
}

#[test]
fn x87_exceptions_wait_for_the_next_instruction() {
    let mut bench = Bench::new();
    bench.vcpu.fpu.finit();
    bench.vcpu.fpu.set_fcw(0x37b); // divide by zero unmasked
    for bytes in [FLD1, FLDZ, FDIVP] {
        assert_eq!(bench.run(bytes), Ok(()));
    }
    let status = bench.vcpu.fpu.fsw();
    assert_eq!(status & 0x8084, 0x8084);
    bench.vcpu.regs[6] = DATA;
    for bytes in [FADD, FWAIT, PADDB_MM, &[0xd9, 0x2e], &[0xd9, 0x26], &[0xdd, 0x26], &[0x0f, 0x77]] {
        assert_eq!(bench.run(bytes), MF, "{bytes:02x?}");
        assert_eq!(bench.vcpu.fpu.fsw(), status);
    }
    assert_eq!(bench.run(FNSTSW), Ok(()));
    assert_eq!(bench.vcpu.regs[0] as u16, status);
    assert_eq!(bench.run(FNCLEX), Ok(()));
    assert_eq!(bench.run(FADD), Ok(()));
}

#[test]
fn an_unmasked_x87_overflow_stores_nothing() {
    let mut bench = Bench::new();
    bench.vcpu.fpu.finit();
    bench.vcpu.fpu.set_fcw(0x377); // overflow unmasked
    bench.put(DATA, &f64::MAX.to_le_bytes());
    bench.put(DATA + 8, &[0x77; 4]);
    bench.vcpu.regs[6] = DATA;
    assert_eq!(bench.run(&[0xdd, 0x06]), Ok(())); // FLD m64
    assert_eq!(bench.run(&[0xd9, 0x5e, 8]), Ok(())); // FSTP m32
    assert_eq!(bench.bytes(DATA + 8), [0x77; 4]);
    assert_eq!(bench.vcpu.fpu.ftw(), 0x80, "nothing was popped");
    assert_eq!(bench.run(FWAIT), MF);
    // Precision only: the rounded value is stored, and the exception is pending all the same.
    bench.vcpu.fpu.finit();
    bench.vcpu.fpu.set_fcw(0x35f);
    bench.put(DATA, &0.1f64.to_le_bytes());
    assert_eq!(bench.run(&[0xdd, 0x06]), Ok(()));
    assert_eq!(bench.run(&[0xd9, 0x5e, 8]), Ok(()));
    assert_eq!(bench.bytes(DATA + 8), 0.1f32.to_le_bytes());
    assert_eq!(bench.vcpu.fpu.ftw(), 0);
    assert_eq!(bench.run(FWAIT), MF);
}

#[test]
fn a_page_fault_keeps_the_x87_stack() {
    let mut bench = Bench::paged();
    bench.vcpu.fpu.finit();
    assert_eq!(bench.run(FLD1), Ok(()));
    bench.vcpu.regs[6] = super::fixture::SPARSE + 0x1000 - 4;
    let result = bench.run(&[0xdd, 0x1e]); // FSTP m64 over the end of a page
    assert!(matches!(result, Err(Trap::Fault(e)) if e.vector == vector::PF), "{result:?}");
    assert_eq!((bench.vcpu.fpu.ftw(), bench.vcpu.fault_address), (0x80, super::fixture::SPARSE + 0x1000));
    assert_eq!(bench.bytes(super::fixture::SPARSE + 0x1000 - 4), [0; 4]);
}

#[test]
fn pointers_are_the_guests() {
    let mut bench = Bench::new();
    bench.vcpu.fpu.finit();
    bench.vcpu.regs[6] = DATA;
    bench.vcpu.regs[crate::state::RIP] = 0x1234_5678;
    assert_eq!(bench.run(&[0xd8, 0x46, 0x10]), Ok(())); // FADD m32
    let fpu = &bench.vcpu.fpu;
    assert_eq!((fpu.fip, fpu.fdp, fpu.fop), (0x1234_5678, DATA + 0x10, 0x046));
    let area = bench.vcpu.xsave_area();
    assert_eq!(area[8..16], 0x1234_5678u64.to_le_bytes());
    assert_eq!(bench.run(FNCLEX), Ok(()));
    assert_eq!(bench.vcpu.fpu.fip, 0x1234_5678);
}

#[test]
fn reset_and_init_values() {
    let bench = Bench::new();
    let fpu = &bench.vcpu.fpu;
    assert_eq!((fpu.fcw(), fpu.fsw(), fpu.full_tags(), fpu.mxcsr()), (0x40, 0, 0x5555, 0x1f80));
}
