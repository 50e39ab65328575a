//! The floating-point and vector state: random ones to start from, and what two of them have in common.

use crate::layout::{Outcome, XM, XSAVE_LEN};
use crate::random::Random;

/// Offsets in an XSAVE area.
const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;
const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;
const XSTATE_BV: usize = 512;
/// Components: x87, SSE, AVX, opmasks, upper halves of ZMM0–15, ZMM16–31.
const KNOWN: u64 = 0xe7;
/// MXCSR.PE.
const INEXACT: u32 = 0x20;
/// Exception pending.
const FSW_ES: u16 = 0x80;

/// Where the host puts the components 2, 5, 6, 7 in the standard format.
#[derive(Clone, Copy)]
pub(crate) struct Places {
    offsets: [usize; 8],
    features: u64,
}

impl Places {
    pub(crate) fn new(features: u64) -> Self {
        let offset = |n: u32| {
            let leaf = std::arch::x86_64::__cpuid_count(0xd, n);
            leaf.ebx as usize
        };
        Self { offsets: [0, 0, offset(2), 0, 0, offset(5), offset(6), offset(7)], features: features & KNOWN }
    }

    fn has(&self, n: u32) -> bool {
        self.features >> n & 1 != 0
    }

    /// Fills an area with a random state.
    pub(crate) fn randomise(&self, area: &mut [u8; XSAVE_LEN], rng: &mut Random, registers: usize) {
        let control = control_word(rng);
        let status = status_word(rng, control);
        area[FCW..FCW + 2].copy_from_slice(&control.to_le_bytes());
        area[FSW..FSW + 2].copy_from_slice(&status.to_le_bytes());
        area[FTW] = rng.next() as u8 | rng.next() as u8;
        area[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr(rng).to_le_bytes());
        for i in 0..8 {
            area[ST + 16 * i..ST + 16 * i + 10].copy_from_slice(&extended(rng));
        }
        for i in 0..registers.min(16) {
            let vector = vector(rng);
            area[XMM + 16 * i..][..16].copy_from_slice(&vector[..16]);
            if self.has(2) {
                area[self.offsets[2] + 16 * i..][..16].copy_from_slice(&vector[16..32]);
            }
            if self.has(6) {
                area[self.offsets[6] + 32 * i..][..32].copy_from_slice(&vector[32..]);
            }
        }
        if self.has(7) && registers > 16 {
            for i in 0..16 {
                area[self.offsets[7] + 64 * i..][..64].copy_from_slice(&vector(rng));
            }
        }
        if self.has(5) {
            for i in 0..8 {
                area[self.offsets[5] + 8 * i..][..8].copy_from_slice(&rng.value().to_le_bytes());
            }
        }
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&self.features.to_le_bytes());
    }

    fn take(&self, area: &[u8; XSAVE_LEN]) -> State {
        let in_use = u64::from_le_bytes(array(area, XSTATE_BV)) & self.features;
        let used = |n: u32| in_use >> n & 1 != 0;
        let mut state = State { control: 0x37f, mxcsr: u32::from_le_bytes(array(area, MXCSR)), ..State::default() };
        if used(0) {
            state.control = u16::from_le_bytes(array(area, FCW));
            state.status = u16::from_le_bytes(array(area, FSW));
            state.tags = area[FTW];
            if state.status & FSW_ES != 0 {
                state.opcode = u16::from_le_bytes(array(area, FOP));
                state.pointers = [u64::from_le_bytes(array(area, FIP)), u64::from_le_bytes(array(area, FDP))];
            }
            for (i, st) in state.st.iter_mut().enumerate() {
                *st = array(area, ST + 16 * i);
            }
        }
        for (i, vector) in state.vectors.iter_mut().enumerate() {
            let mut part = |n: u32, at: usize, from: usize, len: usize| {
                if used(n) {
                    vector[at..at + len].copy_from_slice(&area[from..from + len]);
                }
            };
            if i < 16 {
                part(1, 0, XMM + 16 * i, 16);
                part(2, 16, self.offsets[2] + 16 * i, 16);
                part(6, 32, self.offsets[6] + 32 * i, 32);
            } else {
                part(7, 0, self.offsets[7] + 64 * (i - 16), 64);
            }
        }
        if used(5) {
            for (i, mask) in state.masks.iter_mut().enumerate() {
                *mask = u64::from_le_bytes(array(area, self.offsets[5] + 8 * i));
            }
        }
        state
    }

    /// Lines that say where two areas differ: the host's value, then ours.
    pub(crate) fn differences(&self, native: &Outcome, ours: &Outcome) -> Vec<String> {
        // Whether the flag of an inexact result comes with an unmasked overflow or underflow depends on the other elements
        // in ways that are the processor's own.
        let vague = if native.vector == XM { INEXACT } else { 0 };
        let (native, ours) = (self.take(&native.xsave), self.take(&ours.xsave));
        let mut lines = Vec::new();
        let mut check = |name: &str, native: u64, ours: u64| {
            if native != ours {
                lines.push(format!("{name:8} host {native:#x}, ours {ours:#x}"));
            }
        };
        check("fcw", native.control.into(), ours.control.into());
        check("fsw", native.status.into(), ours.status.into());
        check("tags", native.tags.into(), ours.tags.into());
        check("fop", native.opcode.into(), ours.opcode.into());
        check("fip", native.pointers[0], ours.pointers[0]);
        check("fdp", native.pointers[1], ours.pointers[1]);
        check("mxcsr", (native.mxcsr & !vague).into(), (ours.mxcsr & !vague).into());
        for i in 0..8 {
            check(&format!("k{i}"), native.masks[i], ours.masks[i]);
        }
        for (i, (a, b)) in native.st.iter().zip(&ours.st).enumerate().filter(|(_, (a, b))| a != b) {
            lines.push(format!("st{i}      host {}, ours {}", hex(a), hex(b)));
        }
        for (i, (a, b)) in native.vectors.iter().zip(&ours.vectors).enumerate().filter(|(_, (a, b))| a != b) {
            lines.push(format!("zmm{i}     host {}\n           ours {}", hex(a), hex(b)));
        }
        lines
    }

    /// A listing of a state.
    pub(crate) fn show(&self, area: &[u8; XSAVE_LEN]) -> String {
        let state = self.take(area);
        let mut text = format!(
            "  fcw {:#x} fsw {:#x} tags {:#x} mxcsr {:#x} k {:x?}\n",
            state.control, state.status, state.tags, state.mxcsr, state.masks
        );
        for (i, st) in state.st.iter().enumerate() {
            text += &format!("  st{i} {}\n", hex(st));
        }
        for (i, vector) in state.vectors.iter().enumerate().filter(|(_, vector)| vector.iter().any(|&byte| byte != 0)) {
            text += &format!("  zmm{i} {}\n", hex(vector));
        }
        text
    }
}

/// What an area holds, independent of the components' initial-state flags.
struct State {
    control: u16,
    status: u16,
    tags: u8,
    /// Only while an exception is pending: some processors show these only then.
    opcode: u16,
    pointers: [u64; 2],
    mxcsr: u32,
    st: [[u8; 10]; 8],
    vectors: [[u8; 64]; 32],
    masks: [u64; 8],
}

impl Default for State {
    fn default() -> Self {
        Self {
            control: 0,
            status: 0,
            tags: 0,
            opcode: 0,
            pointers: [0; 2],
            mxcsr: 0,
            st: [[0; 10]; 8],
            vectors: [[0; 64]; 32],
            masks: [0; 8],
        }
    }
}

fn array<const N: usize>(area: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| area[at + i])
}

/// Most significant byte first.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect()
}

/// An x87 control word: all exceptions masked, mostly.
pub(crate) fn control_word(rng: &mut Random) -> u16 {
    let precision = rng.pick(&[0x300u16, 0x300, 0x300, 0x200, 0]);
    let rounding = (rng.below(4) as u16) << 10;
    let masks = if rng.permille(80) { rng.next() as u16 & 0x3f } else { 0x3f };
    0x40 | masks | precision | rounding
}

fn status_word(rng: &mut Random, control: u16) -> u16 {
    let top = (rng.below(8) as u16) << 11;
    let conditions = rng.next() as u16 & 0x4700;
    // Flags of masked exceptions may be set; now and then one that is not masked is pending.
    let flags = rng.next() as u16 & if rng.permille(20) { 0x3f } else { control & 0x3f };
    let pending = flags & !control & 0x3f != 0;
    top | conditions | flags | if pending { 0x8080 } else { 0 }
}

/// An MXCSR: all exceptions masked, mostly.
pub(crate) fn mxcsr(rng: &mut Random) -> u32 {
    let masks = if rng.permille(80) { rng.next() as u32 & 0x1f80 } else { 0x1f80 };
    let rest = rng.next() as u32 & 0x6000;
    let flags = if rng.below(2) == 0 { rng.next() as u32 & 0x3f } else { 0 };
    let zero = if rng.permille(200) { rng.next() as u32 & 0x8040 } else { 0 };
    masks | rest | flags | zero
}

/// An 80-bit number of any class.
fn extended(rng: &mut Random) -> [u8; 10] {
    let (exponent, mantissa) = match rng.below(12) {
        0 => (0, 0),
        1 => (0, rng.next() >> 1),
        2 => (0x7fff, 1 << 63),
        3 => (0x7fff, rng.next() | 1 << 63),
        // Pseudo-denormals, unnormals.
        4 => (0, rng.next() | 1 << 63),
        5 => (rng.next() as u16 & 0x7fff, rng.next() >> 1),
        6 | 7 => (0x3fff + rng.below(64) as u16, (rng.next() | 1 << 63) & !(u64::MAX >> rng.below(40))),
        _ => (0x3fe0 + rng.below(64) as u16, rng.next() | 1 << 63),
    };
    let sign = (rng.below(2) as u16) << 15;
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&u64::to_le_bytes(mantissa));
    bytes[8..].copy_from_slice(&(exponent | sign).to_le_bytes());
    bytes
}

/// Vector elements of one kind.
fn vector(rng: &mut Random) -> [u8; 64] {
    let mut bytes = [0; 64];
    match rng.below(8) {
        0 | 1 => rng.fill(&mut bytes),
        2 => bytes.chunks_mut(8).for_each(|c| c.copy_from_slice(&rng.value().to_le_bytes())),
        3..6 => bytes.chunks_mut(4).for_each(|c| c.copy_from_slice(&single(rng).to_le_bytes())),
        6 => bytes.chunks_mut(8).for_each(|c| c.copy_from_slice(&double(rng).to_le_bytes())),
        _ => bytes.chunks_mut(4).for_each(|c| c.copy_from_slice(&(rng.value() as u32).to_le_bytes())),
    }
    bytes
}

/// Bits of a single-precision number of any class.
fn single(rng: &mut Random) -> u32 {
    let random = rng.next() as u32;
    match rng.below(16) {
        0 => random & 0x8000_0000,
        1 => random & 0x807f_ffff,
        2 => random & 0x8000_0000 | 0x7f80_0000,
        3 => random | 0x7f80_0000,
        4..8 => (rng.below(2000) as f32 - 1000.0).to_bits(),
        _ => random & 0x8fff_ffff | 0x3000_0000,
    }
}

/// Bits of a double-precision number of any class.
fn double(rng: &mut Random) -> u64 {
    let random = rng.next();
    match rng.below(16) {
        0 => random & 1 << 63,
        1 => random & 0x800f_ffff_ffff_ffff,
        2 => random & 1 << 63 | 0x7ff << 52,
        3 => random | 0x7ff << 52,
        4..8 => (rng.below(2000) as f64 - 1000.0).to_bits(),
        _ => random & 0xbfff_ffff_ffff_ffff & !(7 << 59) | 0x3c << 56,
    }
}
