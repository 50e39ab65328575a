//! From instruction bytes to operations.
//!
//! An [`Op`] is an instruction ready to run: a handler and the operands in the form the handler wants.
//! Which handler it is, each family of instructions decides itself (`select` in its file); this module
//! only reads bytes, finds the operands, and asks the families in turn.

mod operand;

use iced_x86::{ConstantOffsets, Decoder, DecoderError, DecoderOptions, Instruction};

use crate::interp;
use crate::{Step, Trap, Vcpu};
pub(crate) use operand::{Shape, Slot};

/// How code is decoded: part of a block's identity.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub(crate) struct Mode(u8);

impl Mode {
    const CODE32: u8 = 1 << 0;
    const CODE64: u8 = 1 << 1;
    const STACK32: u8 = 1 << 2;
    const FLAT: u8 = 1 << 3;

    /// 64-bit mode.
    pub(crate) fn long64() -> Self {
        Self(Self::CODE64 | Self::FLAT)
    }
    /// Real, virtual-8086, protected and compatibility mode.
    pub(crate) fn legacy(code32: bool, stack32: bool, flat: bool) -> Self {
        let bit = |set, mask| if set { mask } else { 0 };
        Self(bit(code32, Self::CODE32) | bit(stack32, Self::STACK32) | bit(flat, Self::FLAT))
    }
    #[inline]
    pub(crate) fn is_64(self) -> bool {
        self.0 & Self::CODE64 != 0
    }
    /// 16, 32 or 64.
    #[inline]
    pub(crate) fn code_bits(self) -> u32 {
        match self.0 & (Self::CODE32 | Self::CODE64) {
            0 => 16,
            Self::CODE32 => 32,
            _ => 64,
        }
    }
    /// 32-bit code on a 32-bit stack, all segments but FS and GS flat.
    #[inline]
    pub(crate) fn is_flat32(self) -> bool {
        self.0 == Self::CODE32 | Self::STACK32 | Self::FLAT
    }
    /// Segments ES, CS, SS, DS need no base and no limit check.
    #[inline]
    pub(crate) fn is_flat(self) -> bool {
        self.0 & Self::FLAT != 0
    }
    /// Mask of the stack pointer.
    #[inline]
    pub(crate) fn stack_mask(self) -> u64 {
        if self.is_64() {
            u64::MAX
        } else if self.0 & Self::STACK32 != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }
    /// A small number, different for every mode.
    #[inline]
    pub(crate) fn key(self) -> u8 {
        self.0
    }
}

/// Runs one operation. RIP points behind the instruction.
pub(crate) type Handler = fn(&mut Vcpu, &Op) -> Step;

/// How an effective address becomes a linear one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Ea {
    /// 64-bit mode: base of FS or GS only.
    Long,
    /// Flat 32-bit data segment: the offset is the linear address.
    Flat,
    /// Base added, limit and type checked.
    Checked,
}

/// Properties of an operation.
pub(crate) mod op_flag {
    /// F3 prefix (REP, REPE).
    pub(crate) const REP: u8 = 1 << 0;
    /// F2 prefix (REPNE).
    pub(crate) const REPNE: u8 = 1 << 1;
    /// LOCK prefix, or an implied one (XCHG with memory).
    pub(crate) const LOCK: u8 = 1 << 2;
    /// The memory operand's segment is SS: address errors are #SS.
    pub(crate) const STACK: u8 = 1 << 3;
}

/// An instruction ready to run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    pub(crate) run: Handler,
    /// Immediate operand, sign-extended to 64 bits; for near branches the displacement from the next instruction.
    pub(crate) imm: u64,
    /// Displacement of the memory operand, or the offset of a far pointer's second immediate (selector).
    pub(crate) disp: u64,
    /// First, second, third register operand in instruction order, see [`crate::state::int::Int`] for the numbers.
    pub(crate) r1: u8,
    pub(crate) r2: u8,
    pub(crate) r3: u8,
    /// Memory operand: base, index (register numbers, `ZERO` where absent, `RIP` for RIP-relative), shift of the index.
    pub(crate) base: u8,
    pub(crate) index: u8,
    pub(crate) scale: u8,
    /// Segment index for `seg_base`: in 64-bit mode `NULL_SEG` but for FS and GS.
    pub(crate) seg: u8,
    pub(crate) ea: Ea,
    /// Address size in bytes: 2, 4, 8.
    pub(crate) asize: u8,
    /// 64 minus the address size in bits: shifting left and right by it cuts an offset to the address size.
    pub(crate) ashift: u8,
    /// Operand size in bytes where the handler is not specialised.
    pub(crate) osize: u8,
    /// Length of the instruction in bytes.
    pub(crate) len: u8,
    /// See [`op_flag`].
    pub(crate) flags: u8,
}

/// Whether a block goes on behind an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flow {
    /// Execution normally goes on with the next instruction.
    Next,
    /// The block ends: a branch, or an instruction that changes how code is decoded, fetched or interrupted.
    End,
}

/// What a family chose for an instruction.
pub(crate) struct Choice {
    pub(crate) run: Handler,
    pub(crate) flow: Flow,
}

/// A handler after which the block goes on.
pub(crate) fn next(run: Handler) -> Option<Choice> {
    Some(Choice { run, flow: Flow::Next })
}

/// A handler that ends its block.
pub(crate) fn end(run: Handler) -> Option<Choice> {
    Some(Choice { run, flow: Flow::End })
}

/// What a family's `select` may look at, and where it may refine the operation.
pub(crate) struct Decoding<'a> {
    pub(crate) instruction: &'a Instruction,
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) bytes: &'a [u8],
    pub(crate) features: &'a crate::Features,
    pub(crate) host_alu: &'a mut interp::hostalu::HostAlu,
    pub(crate) op: &'a mut Op,
    /// Where each operand is.
    pub(crate) shape: Shape,
}

/// The families, in the order in which they are asked.
const FAMILIES: &[fn(&mut Decoding<'_>) -> Option<Choice>] = &[
    interp::data::select,
    interp::alu::select,
    interp::control::select,
    interp::stack::select,
    interp::shift::select,
    interp::bit::select,
    interp::string::select,
    interp::simd_move::select,
    interp::muldiv::select,
    interp::exchange::select,
    interp::segment::select,
    interp::syscall::select,
    interp::iret::select,
    interp::simd_mask::select,
    interp::x87::select,
    interp::xsave::select,
    interp::hostalu::select,
    interp::system::select,
    interp::io::select,
    interp::msr::select,
    interp::cpuid::select,
    interp::far::select,
    interp::table::select,
    interp::bcd::select,
];

/// Longest instruction, in bytes.
const MAX_LENGTH: usize = 15;

/// Decodes the instruction at the start of `bytes` (1–15 bytes, as many as are mapped) in `mode`.
///
/// # Errors
/// `None`: the instruction is longer than `bytes`.
pub(crate) fn decode_one(
    bytes: &[u8],
    mode: Mode,
    features: &crate::Features,
    host_alu: &mut interp::hostalu::HostAlu,
) -> Option<(Op, Flow)> {
    decode_full(bytes, mode, features, host_alu).map(|(_, _, op, flow)| (op, flow))
}

/// As [`decode_one`], with the instruction as iced sees it and where its constants are.
#[allow(clippy::type_complexity)]
pub(crate) fn decode_full(
    bytes: &[u8],
    mode: Mode,
    features: &crate::Features,
    host_alu: &mut interp::hostalu::HostAlu,
) -> Option<(Instruction, ConstantOffsets, Op, Flow)> {
    // The vendors differ in operand sizes of branches and far pointers in 64-bit mode, and in LOCK MOV CR0.
    let vendor = if features.amd { DecoderOptions::AMD } else { DecoderOptions::NONE };
    // The hint space 0F 18-1F and what is not assigned in 0F 0D do nothing on every processor. All that is assigned
    // there does nothing here either.
    let options = vendor | DecoderOptions::FORCE_RESERVED_NOP | host_alu.older_forms(features);
    // The instruction pointer is 0, so that operands relative to it come out relative.
    let mut decoder = Decoder::with_ip(mode.code_bits(), bytes, 0, options);
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        if decoder.last_error() == DecoderError::NoMoreBytes && bytes.len() < MAX_LENGTH {
            return None;
        }
        let run = if is_too_long(bytes, mode) { too_long } else { undefined };
        return Some((instruction, ConstantOffsets::default(), operand::empty(run, 1), Flow::End));
    }
    let offsets = decoder.get_constant_offsets(&instruction);
    let bytes = &bytes[..instruction.len()];
    let mut op = operand::empty(undefined, instruction.len() as u8);
    let shape = operand::fill(&mut op, &instruction, mode);
    let mut decoding = Decoding { instruction: &instruction, bytes, features, host_alu, op: &mut op, shape };
    let hidden = decoding.host_alu.hides(&instruction, features);
    let choice = if hidden { None } else { FAMILIES.iter().find_map(|select| select(&mut decoding)) };
    let choice = choice.unwrap_or(Choice { run: undefined, flow: Flow::End });
    op.run = choice.run;
    Some((instruction, offsets, op, choice.flow))
}

/// Whether what is no instruction would be one but for its length of more than 15 bytes. (With 15 bytes to look at, the
/// decoder tells one that is too long from one that does not exist no more.)
fn is_too_long(bytes: &[u8], mode: Mode) -> bool {
    // A LOCK prefix where it is not allowed shall not count here.
    let decode = |bytes: &[u8]| {
        let mut decoder = Decoder::with_ip(mode.code_bits(), bytes, 0, DecoderOptions::NO_INVALID_CHECK);
        (decoder.decode().is_invalid(), decoder.last_error() == DecoderError::NoMoreBytes)
    };
    bytes.get(..MAX_LENGTH - 1).is_some_and(|most| decode(most) == (true, true)) && decode(bytes).0
}

/// #UD: not an instruction, or not one of this CPU's.
pub(crate) fn undefined(_: &mut Vcpu, _: &Op) -> Step {
    Err(Trap::ud())
}

/// #GP(0): longer than 15 bytes.
fn too_long(_: &mut Vcpu, _: &Op) -> Step {
    Err(Trap::gp(0))
}
