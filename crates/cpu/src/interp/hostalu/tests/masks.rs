//! Elements that are masked off are not touched; interrupted gathers and scatters go on where they stopped.

use super::fixture::{Bench, SPARSE};
use crate::trap::vector;
use crate::{Step, Trap};

/// First byte of a page that is not there; the one before is.
const HOLE: u64 = SPARSE + 0x1000;
/// The page behind the hole.
const BEHIND: u64 = SPARSE + 0x2000;

fn is_page_fault(step: Step) -> bool {
    matches!(step, Err(Trap::Fault(exception)) if exception.vector == vector::PF)
}

fn has_avx512(bench: &mut Bench) -> bool {
    use iced_x86::CpuidFeature as F;
    bench.has(&[F::AVX512F, F::AVX512VL, F::AVX512BW, F::AVX512_VBMI2])
}

fn vector(bench: &Bench, r: usize) -> [u32; 16] {
    std::array::from_fn(|i| u32::from_le_bytes(std::array::from_fn(|n| bench.vcpu.fpu.vectors[r][4 * i + n])))
}

fn set_vector(bench: &mut Bench, r: usize, values: &[u32]) {
    for (i, value) in values.iter().enumerate() {
        bench.vcpu.fpu.vectors[r][4 * i..4 * i + 4].copy_from_slice(&value.to_le_bytes());
    }
}

#[test]
fn avx512_loads_and_stores() {
    let mut bench = Bench::paged();
    if !has_avx512(&mut bench) {
        return;
    }
    bench.put(HOLE - 32, &[0x11; 32]);
    bench.vcpu.regs[6] = HOLE - 32;
    bench.vcpu.fpu.opmasks[1] = 0x00ff;
    // VMOVDQU32 zmm0{k1}{z}, [rsi]: the upper eight elements are in the hole.
    let load = [0x62, 0xf1, 0x7e, 0xc9, 0x6f, 0x06];
    assert_eq!(bench.run(&load), Ok(()));
    let expected: [u32; 16] = std::array::from_fn(|i| if i < 8 { 0x1111_1111 } else { 0 });
    assert_eq!(vector(&bench, 0), expected);
    bench.vcpu.fpu.opmasks[1] = 0x01ff;
    assert!(is_page_fault(bench.run(&load)));
    assert_eq!((bench.vcpu.fault_address, vector(&bench, 0)), (HOLE, expected));
    // A store: nothing but the selected elements changes.
    set_vector(&mut bench, 2, &[7; 16]);
    let store = [0x62, 0xf1, 0x7e, 0x49, 0x7f, 0x16];
    assert!(is_page_fault(bench.run(&store)));
    assert_eq!(bench.bytes(HOLE - 32), [0x11; 32]);
    bench.vcpu.fpu.opmasks[1] = 0b10;
    assert_eq!(bench.run(&store), Ok(()));
    assert_eq!(bench.bytes(HOLE - 32), [0x11; 4]);
    assert_eq!(bench.bytes(HOLE - 28), [7, 0, 0, 0]);
    assert_eq!(bench.bytes(HOLE - 24), [0x11; 24]);
    // No element at all: no fault, wherever it is.
    bench.vcpu.fpu.opmasks[1] = 0;
    bench.vcpu.regs[6] = HOLE;
    assert_eq!(bench.run(&store), Ok(()));
    // VADDPS zmm0{k1}, zmm1, dword [rsi]{1to16}.
    let broadcast = [0x62, 0xf1, 0x74, 0x59, 0x58, 0x06];
    assert_eq!(bench.run(&broadcast), Ok(()));
    bench.vcpu.fpu.opmasks[1] = 0x8000;
    assert!(is_page_fault(bench.run(&broadcast)));
    // VPSHUFB is of a class that faults whatever the mask.
    bench.vcpu.fpu.opmasks[1] = 0;
    assert!(is_page_fault(bench.run(&[0x62, 0xf2, 0x75, 0x49, 0x00, 0x06])));
}

#[test]
fn avx512_compress_and_expand() {
    let mut bench = Bench::paged();
    if !has_avx512(&mut bench) {
        return;
    }
    bench.put(HOLE - 8, &[1, 0, 0, 0, 2, 0, 0, 0]);
    bench.vcpu.regs[6] = HOLE - 8;
    bench.vcpu.fpu.opmasks[1] = 0x8001;
    // VPEXPANDD zmm0{k1}{z}, [rsi]: two elements.
    assert_eq!(bench.run(&[0x62, 0xf2, 0x7d, 0xc9, 0x89, 0x06]), Ok(()));
    let mut expected = [0; 16];
    (expected[0], expected[15]) = (1, 2);
    assert_eq!(vector(&bench, 0), expected);
    // VPCOMPRESSD [rsi]{k1}, zmm0.
    bench.put(HOLE - 8, &[0xee; 8]);
    let compress = [0x62, 0xf2, 0x7d, 0x49, 0x8b, 0x06];
    bench.vcpu.fpu.opmasks[1] = 0x8011;
    assert!(is_page_fault(bench.run(&compress)));
    assert_eq!(bench.bytes(HOLE - 8), [0xee; 8]);
    bench.vcpu.fpu.opmasks[1] = 0x8001;
    assert_eq!(bench.run(&compress), Ok(()));
    assert_eq!(bench.bytes(HOLE - 8), [1, 0, 0, 0, 2, 0, 0, 0]);
}

#[test]
fn avx_masked_moves() {
    let mut bench = Bench::paged();
    bench.put(HOLE - 8, &[9, 0, 0, 0, 8, 0, 0, 0]);
    bench.vcpu.regs[6] = HOLE - 8;
    set_vector(&mut bench, 1, &[1 << 31, 1 << 31, 0, 0x7fff_ffff, 0, 0, 0, 0]);
    // VPMASKMOVD ymm0, ymm1, [rsi].
    let load = [0xc4, 0xe2, 0x75, 0x8c, 0x06];
    assert_eq!(bench.run(&load), Ok(()));
    assert_eq!(vector(&bench, 0)[..8], [9, 8, 0, 0, 0, 0, 0, 0]);
    // VPMASKMOVD [rsi], ymm1, ymm2.
    set_vector(&mut bench, 2, &[5; 8]);
    let store = [0xc4, 0xe2, 0x75, 0x8e, 0x16];
    assert_eq!(bench.run(&store), Ok(()));
    assert_eq!(bench.bytes(HOLE - 8), [5, 0, 0, 0, 5, 0, 0, 0]);
    set_vector(&mut bench, 1, &[1 << 31, 0, 1 << 31]);
    set_vector(&mut bench, 2, &[6; 8]);
    assert!(is_page_fault(bench.run(&load)));
    assert!(is_page_fault(bench.run(&store)));
    assert_eq!(bench.bytes(HOLE - 8), [5, 0, 0, 0, 5, 0, 0, 0]);
}

#[test]
fn byte_masked_stores() {
    let mut bench = Bench::paged();
    bench.put(HOLE - 8, &[0; 8]);
    bench.vcpu.regs[7] = HOLE - 8;
    bench.vcpu.fpu.vectors[0] = [0xab; 64];
    bench.vcpu.fpu.vectors[1] = [0; 64];
    bench.vcpu.fpu.vectors[1][3] = 0x80;
    let store = [0x66, 0x0f, 0xf7, 0xc1];
    // All sixteen bytes must be writable, whatever the mask.
    assert!(is_page_fault(bench.run(&store)));
    assert_eq!(bench.bytes(HOLE - 8), [0; 8]);
    bench.put(HOLE - 16, &[0; 16]);
    bench.vcpu.regs[7] = HOLE - 16;
    assert_eq!(bench.run(&store), Ok(()));
    assert_eq!(bench.bytes(HOLE - 16), [0, 0, 0, 0xab, 0, 0, 0, 0]);
}

#[test]
fn gathers_go_on_after_a_fault() {
    let mut bench = Bench::paged();
    bench.put(BEHIND, &[3, 0, 0, 0]);
    bench.put(HOLE - 4, &[4, 0, 0, 0]);
    bench.vcpu.regs[6] = BEHIND;
    // Elements 0 and 2 are there, 1 is in the hole.
    set_vector(&mut bench, 2, &[0, (-4i32) as u32, (-4100i32) as u32, 0]);
    set_vector(&mut bench, 1, &[1 << 31, 1 << 31, 1 << 31, 0]);
    bench.vcpu.fpu.vectors[0] = [0xcc; 64];
    // VPGATHERDD xmm0, [rsi + xmm2], xmm1.
    let gather = [0xc4, 0xe2, 0x71, 0x90, 0x04, 0x16];
    assert!(is_page_fault(bench.run(&gather)));
    assert_eq!(bench.vcpu.fault_address, BEHIND - 4);
    assert_eq!(vector(&bench, 0)[..3], [3, 0xcccc_cccc, 0xcccc_cccc]);
    assert_eq!(vector(&bench, 1)[..4], [0, 1 << 31, 1 << 31, 0]);
    // The page comes in; what is done is not read again.
    bench.put(0x13000 + 8, &((SPARSE + 0x1000) | 0x67).to_le_bytes());
    bench.put(BEHIND - 4, &[5, 0, 0, 0]);
    bench.put(BEHIND, &[99, 0, 0, 0]);
    assert_eq!(bench.run(&gather), Ok(()));
    assert_eq!(vector(&bench, 0)[..5], [3, 5, 4, 0xcccc_cccc, 0]);
    assert_eq!(vector(&bench, 1), [0; 16]);
}

#[test]
fn scatters_go_on_after_a_fault() {
    let mut bench = Bench::paged();
    if !has_avx512(&mut bench) {
        return;
    }
    bench.vcpu.regs[6] = BEHIND;
    set_vector(&mut bench, 2, &[0, (-4i32) as u32, 8, 0]);
    set_vector(&mut bench, 0, &[1, 2, 3, 4]);
    bench.vcpu.fpu.opmasks[1] = 0b0111;
    // VPSCATTERDD [rsi + xmm2]{k1}, xmm0.
    let scatter = [0x62, 0xf2, 0x7d, 0x09, 0xa0, 0x04, 0x16];
    assert!(is_page_fault(bench.run(&scatter)));
    assert_eq!(bench.vcpu.fpu.opmasks[1], 0b0110);
    assert_eq!(bench.bytes(BEHIND), [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bench.put(0x13000 + 8, &((SPARSE + 0x1000) | 0x67).to_le_bytes());
    assert_eq!(bench.run(&scatter), Ok(()));
    assert_eq!(bench.vcpu.fpu.opmasks[1], 0);
    assert_eq!(bench.bytes(BEHIND - 4), [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0]);
}

#[test]
fn segment_limits_count_for_wanted_elements_only() {
    let mut bench = Bench::protected();
    if !has_avx512(&mut bench) {
        return;
    }
    bench.limit_data(0x20_001f);
    bench.vcpu.regs[6] = 0x20_0000;
    bench.put(0x20_0000, &[1; 64]);
    let (load, store) = ([0x62, 0xf1, 0x7e, 0xc9, 0x6f, 0x06], [0x62, 0xf1, 0x7e, 0x49, 0x7f, 0x06]);
    bench.vcpu.fpu.opmasks[1] = 0xff;
    assert_eq!(bench.run(&load), Ok(()));
    assert_eq!(vector(&bench, 0)[7..9], [0x0101_0101, 0]);
    assert_eq!(bench.run(&store), Ok(()));
    bench.vcpu.fpu.opmasks[1] = 0x1ff;
    assert_eq!(bench.run(&load), Err(Trap::gp(0)));
    assert_eq!(bench.run(&store), Err(Trap::gp(0)));
}
