//! What depends on the processor's mode: image formats, visible registers, the checks of the XSAVE family; and what
//! happens when stubs run out of room.

use platform::x86::cr4;

use super::fixture::Bench;
use crate::{Step, Trap};

const DATA: u64 = 0x20_0000;
const GP: Step = Err(Trap::gp(0));
const UD: Step = Err(Trap::ud());

#[test]
fn environment_formats() {
    // 32-bit protected mode: FADD m32 [esi], FNSTENV [edi].
    let mut bench = Bench::protected();
    (bench.vcpu.regs[6], bench.vcpu.regs[7]) = (DATA, DATA + 0x100);
    bench.vcpu.fpu.finit();
    assert_eq!(bench.run(&[0xd8, 0x06]), Ok(()));
    assert_eq!(bench.run(&[0xd9, 0x37]), Ok(()));
    let words: [u32; 7] = words(&bench, DATA + 0x100);
    assert_eq!(words[0], 0xffff_037f);
    // ST0 was empty: the masked stack fault left a NaN in it.
    assert_eq!(words[2], 0xffff_fffe);
    assert_eq!(words[3..], [0x1000, 0x0006_0008, DATA as u32, 0xffff_0010]);
    assert_eq!(bench.vcpu.fpu.fcw(), 0x37f);

    // Real mode: FLD m32 [si], FNSTENV [di] with 16-bit operands; linear addresses.
    let mut bench = Bench::real();
    (bench.vcpu.regs[6], bench.vcpu.regs[7]) = (0x8000, 0x8100);
    bench.vcpu.fpu.finit();
    assert_eq!(bench.run(&[0xd9, 0x04]), Ok(()));
    assert_eq!(bench.run(&[0xd9, 0x35]), Ok(()));
    let bytes: [u8; 14] = bench.bytes(0x8100);
    let short = |i: usize| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]);
    assert_eq!((short(0), short(2)), (0x37f, 0x7fff));
    // FIP = 0x100 * 16 + 0x1000, FDP = 0x8000.
    assert_eq!((short(3), short(4), short(5), short(6)), (0x2000, 0x104, 0x8000, 0));
}

fn words<const N: usize>(bench: &Bench, at: u64) -> [u32; N] {
    std::array::from_fn(|i| u32::from_le_bytes(bench.bytes(at + 4 * i as u64)))
}

#[test]
fn only_eight_registers_outside_64bit_mode() {
    let mut bench = Bench::protected();
    (bench.vcpu.regs[6], bench.vcpu.regs[0], bench.vcpu.regs[2]) = (DATA, u64::from(u32::MAX), u64::from(u32::MAX));
    for (r, register) in bench.vcpu.fpu.vectors.iter_mut().enumerate() {
        *register = [r as u8 + 1; 64];
    }
    let size = bench.vcpu.xsave_area().len();
    bench.memory.fill(DATA, size as u64, 0).expect("guest memory");
    assert_eq!(bench.run(&[0x0f, 0xae, 0x06]), Ok(())); // FXSAVE
    assert_eq!(bench.bytes(DATA + 160 + 7 * 16), [8; 16]);
    assert_eq!(bench.bytes(DATA + 160 + 8 * 16), [0; 16]);
    assert_eq!(bench.run(&[0x0f, 0xae, 0x26]), Ok(())); // XSAVE
    assert_eq!(bench.bytes(DATA + 576 + 7 * 16), [8; 16]);
    assert_eq!(bench.bytes(DATA + 576 + 8 * 16), [0; 128]);
    // Initialising through XRSTOR leaves registers 8 and up alone.
    bench.put(DATA + 512, &[0; 8]);
    assert_eq!(bench.run(&[0x0f, 0xae, 0x2e]), Ok(()));
    assert_eq!(bench.vcpu.fpu.vectors[7], [0; 64]);
    assert_eq!(bench.vcpu.fpu.vectors[8], [9; 64]);
    // VZEROALL too.
    bench.vcpu.fpu.vectors[7] = [1; 64];
    assert_eq!(bench.run(&[0xc5, 0xfc, 0x77]), Ok(()));
    assert_eq!((bench.vcpu.fpu.vectors[7], bench.vcpu.fpu.vectors[8]), ([0; 64], [9; 64]));
}

#[test]
fn xrstor_refuses_bad_headers() {
    let mut bench = Bench::new();
    bench.vcpu.regs[6] = DATA;
    (bench.vcpu.regs[0], bench.vcpu.regs[2]) = (u64::from(u32::MAX), u64::from(u32::MAX));
    let mut check = |offset: u64, value: u64, cpl: u8, bytes: &[u8], expected: Step| {
        bench.memory.fill(DATA, 4096, 0).expect("guest memory");
        bench.put(DATA + 24, &0x1f80u32.to_le_bytes());
        bench.put(DATA + offset, &value.to_le_bytes());
        bench.vcpu.cpl = cpl;
        assert_eq!(bench.run(bytes), expected, "{bytes:02x?} with {value:#x} at {offset}");
    };
    const XRSTOR: &[u8] = &[0x0f, 0xae, 0x2e];
    const XRSTORS: &[u8] = &[0x0f, 0xc7, 0x1e];
    const XSAVES: &[u8] = &[0x0f, 0xc7, 0x2e];
    check(512, 7, 0, XRSTOR, Ok(()));
    check(512, 1 << 9, 0, XRSTOR, GP); // a component that XCR0 does not enable
    check(520, 1, 0, XRSTOR, GP); // XCOMP_BV without the compaction bit
    check(528, 1, 0, XRSTOR, GP); // reserved
    check(536, 1, 0, XRSTOR, Ok(())); // not checked in the standard format
    check(520, 1 << 63 | 7, 0, XRSTOR, Ok(()));
    check(520, 1 << 63 | 1 << 9, 0, XRSTOR, GP);
    check(24, 0x1_0000, 0, XRSTOR, GP); // MXCSR
    check(512, 0, 0, XRSTORS, GP); // XRSTORS takes compacted images only
    check(520, 1 << 63 | 7, 0, XRSTORS, Ok(()));
    check(520, 1 << 63 | 7, 3, XRSTORS, GP);
    check(520, 0, 3, XSAVES, GP);
    check(520, 0, 0, XSAVES, Ok(()));
}

#[test]
fn a_compacted_header_vouches_for_every_component() {
    let mut bench = Bench::new();
    bench.vcpu.regs[6] = DATA;
    (bench.vcpu.regs[0], bench.vcpu.regs[2]) = (7, 0);
    bench.memory.fill(DATA, 4096, 0).expect("guest memory");
    bench.put(DATA + 512, &4u64.to_le_bytes());
    bench.put(DATA + 520, &(1u64 << 63 | 3).to_le_bytes());
    assert_eq!(bench.run(&[0x0f, 0xae, 0x2e]), GP);
    bench.put(DATA + 520, &(1u64 << 63 | 7).to_le_bytes());
    assert_eq!(bench.run(&[0x0f, 0xae, 0x2e]), Ok(()));
    bench.put(DATA + 528, &[1]);
    assert_eq!(bench.run(&[0x0f, 0xae, 0x2e]), GP);
}

#[test]
fn xcr0() {
    const XGETBV: &[u8] = &[0x0f, 0x01, 0xd0];
    const XSETBV: &[u8] = &[0x0f, 0x01, 0xd1];
    let mut bench = Bench::new();
    let mut set = |value: u64, index: u64, cpl: u8| {
        (bench.vcpu.regs[0], bench.vcpu.regs[2], bench.vcpu.regs[1]) = (value & 0xffff_ffff, value >> 32, index);
        bench.vcpu.cpl = cpl;
        let step = bench.run(XSETBV);
        bench.vcpu.regs[1] = 0;
        assert_eq!(bench.run(XGETBV), Ok(()));
        (step, bench.vcpu.regs[0] | bench.vcpu.regs[2] << 32)
    };
    assert_eq!(set(7, 0, 0), (Ok(()), 7));
    assert_eq!(set(1, 0, 0), (Ok(()), 1));
    assert_eq!(set(3, 0, 3), (GP, 1));
    assert_eq!(set(3, 1, 0), (GP, 1));
    assert_eq!(set(2, 0, 0), (GP, 1)); // x87 is not optional
    assert_eq!(set(5, 0, 0), (GP, 1)); // AVX without SSE
    assert_eq!(set(0x27, 0, 0), (GP, 1)); // a part of AVX-512
    assert_eq!(set(0xe3, 0, 0), (GP, 1)); // AVX-512 without AVX
    assert_eq!(set(1 << 62 | 7, 0, 0), (GP, 1));
    bench.vcpu.regs[1] = 2;
    assert_eq!(bench.run(XGETBV), GP);
    bench.vcpu.cr4 &= !cr4::OSXSAVE;
    assert_eq!(bench.run(XGETBV), UD);
    assert_eq!(bench.run(XSETBV), UD);
    assert_eq!(bench.run(&[0x0f, 0xae, 0x26]), UD);
}

#[test]
fn snapshots_are_whole() {
    let mut bench = Bench::new();
    bench.vcpu.fpu.finit();
    bench.vcpu.regs[6] = DATA;
    for bytes in [&[0xd9, 0xe8][..], &[0xd9, 0xeb], &[0xd8, 0x06]] {
        assert_eq!(bench.run(bytes), Ok(()));
    }
    for (r, register) in bench.vcpu.fpu.vectors.iter_mut().enumerate() {
        *register = [r as u8 + 1; 64];
    }
    bench.vcpu.fpu.opmasks = [1, 2, 3, 4, 5, 6, 7, 8];
    let area = bench.vcpu.xsave_area();
    let mut other = Bench::new();
    other.vcpu.set_xsave_area(&area);
    assert_eq!(other.vcpu.xsave_area(), area);
    assert_eq!(other.vcpu.fpu.vectors, bench.vcpu.fpu.vectors);
    assert_eq!(other.vcpu.fpu.opmasks, bench.vcpu.fpu.opmasks);
    assert_eq!(other.vcpu.fpu.fip, bench.vcpu.fpu.fip);
    // Garbage is taken without harm.
    other.vcpu.set_xsave_area(&[0xff; 700]);
    other.vcpu.set_xsave_area(&[]);
    assert_eq!(other.run(&[0xd8, 0x06]), Ok(()));
}

/// More distinct instructions than fit: everything is dropped and made again.
#[test]
fn stubs_outgrow_their_room() {
    let mut bench = Bench::new();
    let mut resets = 0;
    'filled: for opcode in [0xfcu8, 0xfd, 0xfe, 0xd4, 0xdb, 0xeb, 0xef] {
        for registers in 0..16 * 16 * 16u16 {
            let (d, a, b) = (registers as u8 & 15, registers as u8 >> 4, (registers >> 8) as u8);
            let rex = 0xe1 & !((d & 8) << 4) & !((b & 8) << 2);
            for length in [1, 5] {
                let bytes = [0xc4, rex, (!a & 15) << 3 | length, opcode, 0xc0 | (d & 7) << 3 | b & 7];
                if bench.vcpu.host_alu.make_room() {
                    resets += 1;
                    break 'filled;
                }
                bench.decode(&bytes);
            }
        }
    }
    assert_eq!(resets, 1);
    bench.vcpu.fpu.vectors[1] = [3; 64];
    bench.vcpu.fpu.vectors[2] = [4; 64];
    assert_eq!(bench.run(&[0xc5, 0xf1, 0xfc, 0xc2]), Ok(())); // VPADDB xmm0, xmm1, xmm2
    assert_eq!(bench.vcpu.fpu.vectors[0][..17], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
}
