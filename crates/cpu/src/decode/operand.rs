//! Finds the operands of an instruction.

use iced_x86::{Instruction, OpKind, Register};
use platform::x86::seg;

use super::{Ea, Handler, Mode, Op, op_flag};
use crate::state::int::HIGH_BYTE;
use crate::state::{NULL_SEG, RIP, ZERO};

/// Where an operand is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Slot {
    None,
    /// General-purpose register in `r1`, `r2` or `r3`: the n-th register operand.
    Reg,
    /// The memory operand.
    Mem,
    /// The immediate.
    Imm,
    /// Anything else: segment, control, vector register, far pointer, string operand.
    Other,
}

/// Where the first four operands are.
pub(crate) type Shape = [Slot; 4];

/// An operation without operands.
pub(super) fn empty(run: Handler, len: u8) -> Op {
    Op {
        run,
        imm: 0,
        disp: 0,
        r1: 0,
        r2: 0,
        r3: 0,
        base: ZERO as u8,
        index: ZERO as u8,
        scale: 0,
        seg: NULL_SEG as u8,
        ea: Ea::Long,
        asize: 8,
        ashift: 0,
        osize: 0,
        len,
        flags: 0,
    }
}

/// Fills `op` with the operands of `instruction`. Registers of every class go to `r1`–`r3` by their number.
pub(super) fn fill(op: &mut Op, instruction: &Instruction, mode: Mode) -> Shape {
    let mut shape = [Slot::None; 4];
    let mut registers = 0;
    op.asize = (mode.code_bits() / 8) as u8;
    for i in 0..instruction.op_count().min(4) {
        shape[i as usize] = match instruction.op_kind(i) {
            OpKind::Register => {
                let register = instruction.op_register(i);
                let (number, slot) = register_number(register);
                match registers {
                    0 => op.r1 = number,
                    1 => op.r2 = number,
                    _ => op.r3 = number,
                }
                registers += 1;
                if op.osize == 0 && slot == Slot::Reg {
                    op.osize = register.size() as u8;
                }
                slot
            }
            OpKind::Memory => {
                fill_memory(op, instruction, mode);
                Slot::Mem
            }
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                // Decoded at address 0, so the target is the displacement plus the length, in the operand's width.
                op.osize = match instruction.op_kind(i) {
                    OpKind::NearBranch16 => 2,
                    OpKind::NearBranch32 => 4,
                    _ => 8,
                };
                let distance = instruction.near_branch_target().wrapping_sub(instruction.len() as u64);
                op.imm = match op.osize {
                    2 => distance as i16 as u64,
                    4 => distance as i32 as u64,
                    _ => distance,
                };
                Slot::Imm
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 => {
                op.osize = if instruction.op_kind(i) == OpKind::FarBranch16 { 2 } else { 4 };
                op.imm = if op.osize == 2 {
                    u64::from(instruction.far_branch16())
                } else {
                    u64::from(instruction.far_branch32())
                };
                op.disp = u64::from(instruction.far_branch_selector());
                Slot::Other
            }
            OpKind::Immediate8_2nd => {
                op.disp = u64::from(instruction.immediate8_2nd());
                Slot::Imm
            }
            kind if is_immediate(kind) => {
                op.imm = instruction.immediate(i);
                Slot::Imm
            }
            kind => {
                fill_string(op, instruction, mode, kind);
                Slot::Other
            }
        };
    }
    op.ashift = 64 - op.asize * 8;
    if op.osize == 0 {
        op.osize = instruction.memory_size().size().min(255) as u8;
    }
    if instruction.has_rep_prefix() {
        op.flags |= op_flag::REP;
    }
    if instruction.has_repne_prefix() {
        op.flags |= op_flag::REPNE;
    }
    if instruction.has_lock_prefix() {
        op.flags |= op_flag::LOCK;
    }
    shape
}

fn is_immediate(kind: OpKind) -> bool {
    use OpKind::*;
    matches!(
        kind,
        Immediate8
            | Immediate16
            | Immediate32
            | Immediate64
            | Immediate8to16
            | Immediate8to32
            | Immediate8to64
            | Immediate32to64
    )
}

fn register_number(register: Register) -> (u8, Slot) {
    let number = register.number() as u8;
    if register.is_gpr8() {
        let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
        return (if high { (number & 3) | HIGH_BYTE } else { gpr8_number(register) }, Slot::Reg);
    }
    (number, if register.is_gpr() { Slot::Reg } else { Slot::Other })
}

/// Number of a low byte register; independent of how the enumeration orders AH–BH.
fn gpr8_number(register: Register) -> u8 {
    register.full_register().number() as u8
}

fn fill_memory(op: &mut Op, instruction: &Instruction, mode: Mode) {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    op.disp = instruction.memory_displacement64();
    op.asize = address_size(instruction, mode);
    if base.is_ip() {
        op.base = RIP as u8;
        // The displacement came out as an address relative to the instruction at 0.
        op.disp = op.disp.wrapping_sub(instruction.len() as u64);
        op.asize = if base == Register::EIP { 4 } else { 8 };
    } else if base != Register::None {
        op.base = base.number() as u8;
    }
    if index != Register::None && index.is_gpr() {
        op.index = index.number() as u8;
        op.scale = instruction.memory_index_scale().trailing_zeros() as u8;
    }
    set_segment(op, instruction.memory_segment(), mode);
    if mode.is_64() {
        // Overrides by ES, CS, SS, DS are ignored: what counts for #SS is the base register.
        let stack = matches!(base, Register::RSP | Register::RBP | Register::ESP | Register::EBP);
        if stack && op.seg == NULL_SEG as u8 {
            op.flags |= op_flag::STACK;
        }
    }
}

/// Address size of the memory operand in bytes.
fn address_size(instruction: &Instruction, mode: Mode) -> u8 {
    for register in [instruction.memory_base(), instruction.memory_index()] {
        if register.is_gpr() {
            return register.size() as u8;
        }
    }
    match instruction.memory_displ_size() {
        2 => 2,
        // In 64-bit mode only with an address-size prefix.
        4 => 4,
        8 => 8,
        _ => (mode.code_bits() / 8) as u8,
    }
}

/// Chooses how the operand's segment takes part in the address.
pub(super) fn set_segment(op: &mut Op, segment: Register, mode: Mode) {
    let index = match segment {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    };
    if index == seg::SS && !mode.is_64() {
        op.flags |= op_flag::STACK;
    }
    if mode.is_64() {
        op.ea = Ea::Long;
        op.seg = if index == seg::FS || index == seg::GS { index as u8 } else { NULL_SEG as u8 };
    } else {
        op.seg = index as u8;
        // Code is never writable, however flat.
        let flat = mode.is_flat() && matches!(index, seg::DS | seg::ES | seg::SS);
        op.ea = if flat { Ea::Flat } else { Ea::Checked };
    }
}

/// String and XLAT-like operands: the segment of the (overridable) source, and the address size.
fn fill_string(op: &mut Op, instruction: &Instruction, mode: Mode, kind: OpKind) {
    use OpKind::*;
    op.asize = match kind {
        MemorySegSI | MemorySegDI | MemoryESDI => 2,
        MemorySegESI | MemorySegEDI | MemoryESEDI => 4,
        MemorySegRSI | MemorySegRDI | MemoryESRDI => 8,
        _ => return,
    };
    op.osize = instruction.memory_size().size() as u8;
    if matches!(kind, MemorySegSI | MemorySegESI | MemorySegRSI | MemorySegDI | MemorySegEDI | MemorySegRDI) {
        set_segment(op, instruction.memory_segment(), mode);
    }
}
