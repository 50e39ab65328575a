//! SSE, AVX and AVX-512 instructions: the guest's vector registers are the host's while emitted code runs, from the first
//! instruction that wants them until Rust is called.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpAccess, OpCodeOperandKind as Kind, OpKind};

use super::asm::{Mem, reg::*};
use super::block::{Insn, Translator};
use super::classify::{How, uses_memory};
use super::rewrite::{add_prefix, fields, number, writes};
use super::{resident, spilled};
use crate::jit::context::at;

/// Which vector instructions can run natively.
pub(crate) mod level {
    /// None: switched off, or exceptions are not masked.
    pub(crate) const NONE: u8 = 0;
    /// Legacy encodings.
    pub(crate) const SSE: u8 = 1;
    /// VEX encodings.
    pub(crate) const AVX: u8 = 2;
    /// EVEX encodings and opmask registers.
    pub(crate) const AVX512: u8 = 3;
}

/// Whether the instruction is a vector instruction that runs natively at `available`.
pub(super) fn form(i: &Instruction, available: u8) -> How {
    use Mnemonic as N;
    if matches!(i.mnemonic(), N::Vzeroupper | N::Vzeroall) {
        return if available >= level::AVX { How::Vector } else { How::Interpret };
    }
    if i.mnemonic() == N::Emms {
        return if available >= level::SSE { How::Mmx } else { How::Interpret };
    }
    let (mut vectors, mut masks, mut mmx, mut fits) = (false, false, false, true);
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register => {
                let r = i.op_register(n);
                vectors |= r.is_vector_register();
                masks |= r.is_k();
                mmx |= r.is_mm();
                fits &= r.is_vector_register() || r.is_mm() || r.is_k() || r.is_gpr32() || r.is_gpr64();
            }
            OpKind::Memory | OpKind::Immediate8 => {}
            _ => fits = false,
        }
    }
    let memory = uses_memory(i);
    // What has operands in both register files depends on the vendor.
    let mixed = mmx && (vectors || masks);
    if !(vectors || masks || mmx) || mixed || !fits || i.is_vsib() || is_odd(i.mnemonic()) {
        return How::Interpret;
    }
    if memory && !matches!(i.memory_size().size(), 1 | 2 | 4 | 8 | 16 | 32 | 64) {
        return How::Interpret;
    }
    let needed = match i.op_code().encoding() {
        EncodingKind::Legacy => level::SSE,
        EncodingKind::VEX if masks => level::AVX512,
        EncodingKind::VEX => level::AVX,
        EncodingKind::EVEX => level::AVX512,
        _ => return How::Interpret,
    };
    match (available >= needed, mmx) {
        (false, _) => How::Interpret,
        (true, false) => How::Vector,
        (true, true) => How::Mmx,
    }
}

/// Instructions with implied operands that are not in place, or that touch x87 state and MXCSR.
fn is_odd(mnemonic: Mnemonic) -> bool {
    use Mnemonic as N;
    matches!(
        mnemonic,
        N::Maskmovq
            | N::Maskmovdqu
            | N::Vmaskmovdqu
            | N::Cvtpi2ps
            | N::Cvtpi2pd
            | N::Cvtps2pi
            | N::Cvttps2pi
            | N::Cvtpd2pi
            | N::Cvttpd2pi
    )
}

/// PCMPxSTRx: compare strings; those that find an index leave it in ECX.
fn compares_strings(mnemonic: Mnemonic) -> bool {
    use Mnemonic as N;
    let finds_mask = matches!(
        mnemonic,
        N::Pcmpestrm | N::Pcmpestrm64 | N::Pcmpistrm | N::Vpcmpestrm | N::Vpcmpestrm64 | N::Vpcmpistrm
    );
    finds_mask || finds_index(mnemonic)
}

fn finds_index(mnemonic: Mnemonic) -> bool {
    use Mnemonic as N;
    matches!(mnemonic, N::Pcmpestri | N::Pcmpestri64 | N::Pcmpistri | N::Vpcmpestri | N::Vpcmpestri64 | N::Vpcmpistri)
}

/// Alignment that the memory operand of an instruction must have, in bytes; 1 = none.
pub(super) fn alignment_of(insn: &Insn) -> u32 {
    if insn.how == How::Vector { alignment(&insn.instruction) } else { 1 }
}

/// As [`alignment_of`], of a vector instruction.
fn alignment(i: &Instruction) -> u32 {
    use Mnemonic as N;
    let size = i.memory_size().size() as u32;
    match i.op_code().encoding() {
        EncodingKind::Legacy => {
            let free =
                matches!(i.mnemonic(), N::Movups | N::Movupd | N::Movdqu | N::Lddqu) || compares_strings(i.mnemonic());
            if size == 16 && !free { 16 } else { 1 }
        }
        _ => match i.mnemonic() {
            N::Vmovaps | N::Vmovapd | N::Vmovdqa | N::Vmovdqa32 | N::Vmovdqa64 => size,
            N::Vmovntps | N::Vmovntpd | N::Vmovntdq | N::Vmovntdqa => size,
            _ => 1,
        },
    }
}

/// The pieces of an encoded instruction.
struct Pieces<'a> {
    prefixes: Vec<u8>,
    prefix: Prefix,
    opcode: &'a [u8],
    modrm: u8,
    immediate: &'a [u8],
}

/// The prefix that carries the upper bits of register numbers.
#[derive(Clone, Copy)]
enum Prefix {
    Rex(u8),
    /// Second and third byte of the long form.
    Vex(u8, u8),
    Evex(u8, u8, u8),
}

impl Prefix {
    /// The prefix of an instruction outside 64-bit mode, for 64-bit mode: without bits that mean nothing there.
    fn widened(self, ignores_w: bool) -> Self {
        let w = if ignores_w { 0x80 } else { 0 };
        match self {
            // R and X are set, or it would be another instruction; B and the upper bit of vvvv are ignored.
            Prefix::Vex(first, second) => Prefix::Vex(first | 0xe0, (second | 0x40) & !w),
            Prefix::Evex(first, second, third) => Prefix::Evex(first | 0xf0, (second | 0x40) & !w, third | 8),
            Prefix::Rex(bits) => Prefix::Rex(bits),
        }
    }
}

fn take_apart(bytes: &[u8]) -> Pieces<'_> {
    let mut prefixes = Vec::new();
    let mut rex = 0;
    let mut at = 0;
    loop {
        match bytes[at] {
            byte @ (0x66 | 0xf2 | 0xf3) => {
                add_prefix(&mut prefixes, byte);
                rex = 0;
            }
            0x67 | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => rex = 0,
            byte @ 0x40..=0x4f => rex = byte,
            _ => break,
        }
        at += 1;
    }
    let (prefix, start) = match bytes[at] {
        0xc4 => (Prefix::Vex(bytes[at + 1], bytes[at + 2]), at + 3),
        0xc5 => (Prefix::Vex(bytes[at + 1] & 0x80 | 0x61, bytes[at + 1] & 0x7f), at + 2),
        0x62 => (Prefix::Evex(bytes[at + 1], bytes[at + 2], bytes[at + 3]), at + 4),
        _ => (Prefix::Rex(rex), at),
    };
    let length = match (prefix, bytes[start], bytes.get(start + 1)) {
        (Prefix::Rex(_), 0x0f, Some(0x38 | 0x3a)) => 3,
        (Prefix::Rex(_), 0x0f, _) => 2,
        _ => 1,
    };
    // The fourth operand of some VEX encodings is in an immediate byte that iced does not count as one.
    let end_of_address = address_end(bytes, start + length);
    Pieces {
        prefixes,
        prefix,
        opcode: &bytes[start..start + length],
        modrm: bytes[start + length],
        immediate: &bytes[end_of_address..],
    }
}

/// Where ModRM, SIB and displacement end.
fn address_end(bytes: &[u8], modrm_at: usize) -> usize {
    let modrm = bytes[modrm_at];
    let (mode, rm) = (modrm >> 6, modrm & 7);
    if mode == 3 {
        return modrm_at + 1;
    }
    let sib = usize::from(rm == 4);
    let no_base = if rm == 4 { bytes[modrm_at + 1] & 7 == 5 } else { rm == 5 };
    let displacement = match mode {
        1 => 1,
        2 => 4,
        _ if no_base => 4,
        _ => 0,
    };
    modrm_at + 1 + sib + displacement
}

/// What replaces ModRM.rm.
enum Rm {
    Kept,
    Register(u8),
    Memory(Mem),
}

impl Translator<'_> {
    /// Makes sure that the guest's vector registers are in the host's.
    pub(super) fn want_vectors(&mut self) {
        if std::mem::replace(&mut self.vectors_ready, true) {
            return;
        }
        self.asm.load(RCX, &Mem::context(at!(unloaded)));
        let ready = self.asm.jrcxz();
        self.asm.op_mem(false, &[0xff], 2, &Mem::context(at!(load)));
        self.asm.bind(ready);
    }

    /// Emits a vector instruction.
    pub(super) fn vector(&mut self, insn: &Insn) {
        if insn.how == How::Vector {
            self.want_vectors();
        }
        let bytes = self.bytes;
        let bytes = &bytes[insn.at..insn.at + usize::from(insn.op.len)];
        let i = &insn.instruction;
        if i.op_count() == 0 {
            return self.asm.put(bytes);
        }
        let mut low = [0];
        let mut pieces = take_apart(bytes);
        if self.legacy {
            pieces.prefix = pieces.prefix.widened(i.op_code().is_wig32());
            let register = (0..i.op_count()).any(|n| {
                matches!(i.op_code().op_kind(n), Kind::xmm_is4 | Kind::ymm_is4 | Kind::xmm_is5 | Kind::ymm_is5)
            });
            if let (true, [last]) = (register, pieces.immediate) {
                // The upper bit of the fourth register's number means nothing there.
                low[0] = last & 0x7f;
                pieces.immediate = &low;
            }
        }
        let fields = fields(insn);
        let memory = uses_memory(i);
        let mut rm = Rm::Kept;
        if memory {
            let operand = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory).unwrap_or(0);
            let write = writes(self.access_of(insn, operand));
            // Where a mask decides which bytes are accessed, all of them may be: a miss that the mask does not touch is the
            // interpreter's to notice.
            rm = Rm::Memory(self.access(insn, i.memory_size().size() as u32, write, alignment(i)));
        }
        let mut stores = Vec::new();
        let mut reg = None;
        for (n, scratch) in [(fields.reg, RCX), (fields.rm.filter(|_| !memory), R14)] {
            let Some(n) = n else { continue };
            let guest = number(i.op_register(n));
            let host = resident(guest).unwrap_or(scratch);
            if host == R14 {
                self.addend = None;
            }
            let access = self.access_of(insn, n);
            if resident(guest).is_none() {
                if access != OpAccess::Write {
                    self.asm.load(host, &spilled(guest));
                }
                if writes(access) {
                    stores.push((guest, host));
                }
            }
            if Some(n) == fields.reg {
                reg = Some(host);
            } else {
                rm = Rm::Register(host);
            }
        }
        self.encode_vector(&pieces, reg, &rm);
        if finds_index(i.mnemonic()) {
            self.asm.mov32(R12, RCX);
        }
        for (guest, host) in stores {
            self.asm.store(&spilled(guest), host);
        }
    }

    fn encode_vector(&mut self, pieces: &Pieces<'_>, reg: Option<u8>, rm: &Rm) {
        self.asm.put(&pieces.prefixes);
        // Bits R, X, B to be set; `None` = as they are.
        let r = reg.map(|reg| reg >> 3);
        let (x, b) = match rm {
            Rm::Kept => (None, None),
            Rm::Register(r) => (Some(0), Some(r >> 3)),
            Rm::Memory(mem) => (Some(mem.index.map_or(0, |(r, _)| r >> 3)), Some(mem.base.map_or(0, |r| r >> 3))),
        };
        let inverted = |byte: u8, bit: u8, value: Option<u8>| match value {
            Some(value) => byte & !(1 << bit) | (!value & 1) << bit,
            None => byte,
        };
        match pieces.prefix {
            Prefix::Rex(rex) => {
                let plain = |byte: u8, bit: u8, value: Option<u8>| match value {
                    Some(value) => byte & !(1 << bit) | (value & 1) << bit,
                    None => byte,
                };
                let bits = plain(plain(plain(rex & 15, 2, r), 1, x), 0, b);
                if bits != 0 {
                    self.asm.u8(0x40 | bits);
                }
            }
            Prefix::Vex(first, second) => {
                let first = inverted(inverted(inverted(first, 7, r), 6, x), 5, b);
                self.asm.put(&[0xc4, first, second]);
            }
            Prefix::Evex(first, second, third) => {
                let first = inverted(inverted(inverted(first, 7, r), 6, x), 5, b);
                let first = inverted(first, 4, r.map(|_| 0));
                self.asm.put(&[0x62, first, second, third]);
            }
        }
        self.asm.put(pieces.opcode);
        let field = reg.unwrap_or(pieces.modrm >> 3) & 7;
        match rm {
            Rm::Kept => self.asm.u8(0xc0 | field << 3 | pieces.modrm & 7),
            Rm::Register(r) => self.asm.u8(0xc0 | field << 3 | r & 7),
            // EVEX scales short displacements.
            Rm::Memory(mem) => self.asm.modrm_sized(field, mem, !matches!(pieces.prefix, Prefix::Evex(..))),
        }
        self.asm.put(pieces.immediate);
    }
}
