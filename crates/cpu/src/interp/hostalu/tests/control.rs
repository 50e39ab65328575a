//! Control and save instructions against the host: what they leave in registers and memory.

use std::ops::Range;

use iced_x86::Instruction;

use super::pair::Pair;

const NONE: &[Range<usize>] = &[];

/// Runs `bytes` on both with random state, many times; `set_up` makes the memory operand sensible.
fn check(seed: u64, bytes: &[u8], ignored: &[Range<usize>], mut set_up: impl FnMut(&mut Pair)) {
    let mut pair = Pair::new(seed);
    for round in 0..200 {
        pair.prepare(&Instruction::default());
        set_up(&mut pair);
        pair.run_ours(bytes).unwrap_or_else(|trap| panic!("{bytes:02x?}: {trap:?}"));
        pair.run_host(bytes);
        pair.compare(ignored).unwrap_or_else(|difference| panic!("{bytes:02x?} round {round}: {difference}"));
    }
}

#[test]
fn x87_words() {
    check(1, &[0xdb, 0xe3], NONE, |_| {}); // FNINIT
    check(2, &[0xdb, 0xe2], NONE, |_| {}); // FNCLEX
    check(3, &[0xd9, 0x3e], NONE, |_| {}); // FNSTCW
    check(4, &[0xdd, 0x3e], NONE, |_| {}); // FNSTSW
    check(5, &[0xdf, 0xe0], NONE, |_| {}); // FNSTSW AX
    check(6, &[0x0f, 0x77], NONE, |_| {}); // EMMS
    check(7, &[0x9b], NONE, |_| {}); // FWAIT
    check(8, &[0xd9, 0x2e], NONE, masked_control); // FLDCW
}

/// Puts a control word with all exceptions masked, so that the frame around the instruction cannot trap.
fn masked_control(pair: &mut Pair) {
    let word = pair.random.next() as u16 | 0x3f;
    pair.put(0, &word.to_le_bytes());
}

#[test]
fn x87_environment() {
    // The pointers are addresses.
    let pointers = |range: Range<usize>| [range];
    let (wide, narrow) = (&pointers(12..28), &pointers(6..14));
    check(11, &[0xd9, 0x36], wide, |_| {});
    check(12, &[0x66, 0xd9, 0x36], narrow, |_| {});
    check(13, &[0xdd, 0x36], wide, |_| {});
    check(14, &[0x66, 0xdd, 0x36], narrow, |_| {});
    check(15, &[0xd9, 0x26], NONE, masked_control);
    check(16, &[0x66, 0xd9, 0x26], NONE, masked_control);
    check(17, &[0xdd, 0x26], NONE, masked_control);
    check(18, &[0x66, 0xdd, 0x26], NONE, masked_control);
}

/// Makes the memory an image that FXRSTOR and XRSTOR take: masked control word, MXCSR without reserved bits, a header that
/// says what is in it.
fn image(pair: &mut Pair) {
    masked_control(pair);
    let mxcsr = pair.random.next() as u32 & 0xffff | 0x1f80;
    pair.put(24, &mxcsr.to_le_bytes());
    let enabled = pair.bench.vcpu.xcr0;
    let in_use = pair.random.next() & enabled;
    let mut header = [0; 64];
    header[..8].copy_from_slice(&in_use.to_le_bytes());
    pair.put(512, &header);
    let wanted = pair.random.pick(&[u64::MAX, pair.bench.vcpu.xcr0, 3, 4, 1, 2, 0, 0xe0]);
    pair.set_gpr(0, wanted);
    pair.set_gpr(2, wanted >> 32);
}

#[test]
fn mxcsr() {
    check(21, &[0x0f, 0xae, 0x16], NONE, |pair| {
        let value = pair.random.next() as u32 & 0xffff | 0x1f80;
        pair.put(0, &value.to_le_bytes());
    });
    check(22, &[0x0f, 0xae, 0x1e], NONE, |_| {});
    check(23, &[0xc5, 0xf8, 0xae, 0x1e], NONE, |_| {});
}

/// What FXSAVE and XSAVE leave to the CPU: pointers, MXCSR_MASK, reserved bytes.
fn not_compared() -> Vec<Range<usize>> {
    let registers = (0..8).map(|st| 42 + 16 * st..48 + 16 * st);
    [5..24, 28..32, 416..512].into_iter().chain(registers).collect()
}

#[test]
fn fxsave() {
    let ignored = &not_compared();
    check(31, &[0x0f, 0xae, 0x06], ignored, |_| {});
    check(32, &[0x48, 0x0f, 0xae, 0x06], ignored, |_| {});
    check(33, &[0x0f, 0xae, 0x0e], NONE, image);
    check(34, &[0x48, 0x0f, 0xae, 0x0e], NONE, image);
}

#[test]
fn xsave() {
    let ignored = &not_compared();
    check(41, &[0x0f, 0xae, 0x26], ignored, image);
    check(42, &[0x48, 0x0f, 0xae, 0x26], ignored, image);
    check(43, &[0x0f, 0xae, 0x2e], NONE, image);
    check(44, &[0x48, 0x0f, 0xae, 0x2e], NONE, image);
}

/// The host stores a compacted image; both restore it.
#[test]
fn compacted_images() {
    let mut pair = Pair::new(51);
    for _ in 0..200 {
        pair.prepare(&Instruction::default());
        image(&mut pair);
        let some = pair.random.pick(&[0, 0xff, 0x24, 0xe7]);
        // A few components in their initial state.
        let enabled = pair.bench.vcpu.xcr0;
        pair.area()[512..520].copy_from_slice(&(enabled & !some).to_le_bytes());
        pair.take_state();
        pair.run_host(&[0x0f, 0xc7, 0x26]);
        pair.share_memory();
        pair.run_host(&[0x0f, 0xae, 0x2e]);
        pair.run_ours(&[0x0f, 0xae, 0x2e]).expect("XRSTOR");
        pair.compare(NONE).expect("the same state from a compacted image");
    }
}

/// Ours stores a compacted image; both restore it.
#[test]
fn our_compacted_images() {
    let mut pair = Pair::new(52);
    for bytes in [[0x0f, 0xc7, 0x26], [0x0f, 0xae, 0x36]] {
        for _ in 0..100 {
            pair.prepare(&Instruction::default());
            image(&mut pair);
            let some = pair.random.pick(&[0, 0xff, 0x24, 0xe7]);
            let enabled = pair.bench.vcpu.xcr0;
            pair.area()[512..520].copy_from_slice(&(enabled & !some).to_le_bytes());
            pair.take_state();
            pair.run_ours(&bytes).expect("XSAVEC, XSAVEOPT");
            pair.share_our_memory();
            pair.run_host(&[0x0f, 0xae, 0x2e]);
            pair.run_ours(&[0x0f, 0xae, 0x2e]).expect("XRSTOR");
            pair.compare(NONE).expect("the same state from our image");
        }
    }
}

/// Sequences, with the x87 registers left in the host's in between.
#[test]
fn x87_sequences() {
    const CODE: &[&[u8]] = &[
        &[0xd9, 0xe8],                               // FLD1
        &[0xdd, 0x46, 0x40],                         // FLD m64
        &[0xdb, 0x46, 0x44],                         // FILD m32
        &[0xd8, 0xc1],                               // FADD ST1
        &[0xde, 0xc9],                               // FMULP
        &[0xd9, 0xfa],                               // FSQRT
        &[0xd9, 0xc9],                               // FXCH
        &[0xdd, 0x5e, 0x50],                         // FSTP m64
        &[0xdb, 0x5e, 0x58],                         // FISTP m32
        &[0xdf, 0xe9],                               // FUCOMIP
        &[0xd8, 0xd1],                               // FCOM
        &[0xda, 0xc1],                               // FCMOVB
        &[0xdf, 0xe0],                               // FNSTSW AX
        &[0xd9, 0x7e, 0x02],                         // FNSTCW
        &[0xd9, 0x6e, 0x60],                         // FLDCW
        &[0xdb, 0xe3],                               // FNINIT
        &[0xdb, 0xe2],                               // FNCLEX
        &[0x9b],                                     // FWAIT
        &[0x0f, 0x77],                               // EMMS
        &[0x0f, 0xfc, 0xc1],                         // PADDB mm
        &[0x0f, 0x6f, 0x46, 0x40],                   // MOVQ mm, m64
        &[0x0f, 0xf7, 0xc1],                         // MASKMOVQ
        &[0x0f, 0x2a, 0xc1],                         // CVTPI2PS
        &[0xf2, 0x0f, 0xd6, 0xc1],                   // MOVDQ2Q
        &[0x48, 0x0f, 0xae, 0x8e, 0x00, 0x08, 0, 0], // FXRSTOR64
        &[0xdd, 0xb6, 0x00, 0x04, 0, 0],             // FNSAVE
    ];
    let mut pair = Pair::new(61);
    pair.bench.resident = true;
    for round in 0..400 {
        pair.prepare(&Instruction::default());
        let control = pair.random.next() as u16 | 0x3f;
        pair.put(0x60, &control.to_le_bytes());
        pair.put(0x800, &[0x7f, 3]);
        pair.put(0x818, &[0x80, 0x1f, 0, 0]);
        let sequence: [_; 12] = std::array::from_fn(|_| pair.random.pick(CODE));
        for bytes in sequence {
            pair.run_ours(bytes).unwrap_or_else(|trap| panic!("{bytes:02x?}: {trap:?}"));
        }
        // The host's turn only now: it is the same registers.
        pair.bench.vcpu.fpu.park();
        for bytes in sequence {
            pair.run_host(bytes);
        }
        // The pointers in FNSAVE's image.
        let ignored = &[0x40c..0x41c, 0..0];
        pair.compare(ignored).unwrap_or_else(|difference| panic!("round {round}, {sequence:02x?}: {difference}"));
    }
}
