//! What is known of register contents inside a block: unknown values, their sums, and constants added to them.
//!
//! Guest-controlled code decides what is taken for equal here: whatever is not certainly understood makes a new value.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};
use platform::x86::{gpr, seg};

use super::block::Insn;
use super::classify::How;
use super::rewrite::{number, written_registers};
use super::share::{Base, Moving, stays};
use crate::decode::Op;
use crate::state::{RIP, ZERO};

/// Displacements of accesses outside 64-bit mode that are not taken for an address themselves.
const NEAR: i64 = 0x1_0000;
/// Offsets beyond this are not followed.
const FAR: i64 = 1 << 40;

/// A register's content: something unknown plus a constant, in the width of an address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Value {
    pub(super) root: u32,
    pub(super) offset: i64,
}

/// Roots with a meaning; smaller ones are what registers hold at the start.
const PAGE: u32 = 16;
const NOTHING: u32 = 17;

/// What is known of all of them, from the start of a block on.
pub(super) struct Values {
    registers: [Value; 16],
    next: u32,
    /// Sums of a base, a scaled index and a segment's base.
    sums: Vec<((u32, u32, u8, u8), u32)>,
    /// Bytes of an address and of a word of the stack.
    pub(super) word: u8,
}

impl Values {
    pub(super) fn new(word: u8) -> Self {
        let registers = std::array::from_fn(|r| Value { root: r as u32, offset: 0 });
        Self { registers, next: NOTHING + 1, sums: Vec::new(), word }
    }

    fn fresh(&mut self) -> Value {
        self.next += 1;
        Value { root: self.next - 1, offset: 0 }
    }

    fn set(&mut self, r: usize, value: Value) {
        let known = value.offset.abs() < FAR;
        let value = if known { value } else { self.fresh() };
        if let Some(register) = self.registers.get_mut(r) {
            *register = value;
        }
    }

    fn forget(&mut self, r: usize) {
        let value = self.fresh();
        self.set(r, value);
    }

    pub(super) fn get(&self, r: usize) -> Value {
        self.registers.get(r).copied().unwrap_or(Value { root: NOTHING, offset: 0 })
    }

    /// Base plus displacement.
    fn base(&self, op: &Op, next: u32) -> Value {
        let base = match usize::from(op.base) {
            ZERO => Value { root: NOTHING, offset: 0 },
            RIP => Value { root: PAGE, offset: i64::from(next) },
            r => self.get(r),
        };
        Value { root: base.root, offset: base.offset.wrapping_add(self.displacement(op)) }
    }

    fn displacement(&self, op: &Op) -> i64 {
        if self.word == 4 { i64::from(op.disp as i32) } else { op.disp as i64 }
    }

    /// Outside 64-bit mode: the content of the base register, if its sum with the displacement cannot wrap around where it is
    /// an address at all of the group's range.
    pub(super) fn plain_base(&self, op: &Op) -> Option<Value> {
        let simple = usize::from(op.index) == ZERO && !matches!(usize::from(op.base), ZERO | RIP);
        let near = self.displacement(op).abs() < NEAR && !matches!(usize::from(op.seg), seg::FS | seg::GS);
        (self.word == 4 && simple && near).then(|| self.get(usize::from(op.base)))
    }

    /// The linear address of a memory operand.
    pub(super) fn address(&mut self, op: &Op, next: u32) -> Option<Value> {
        let segment = match usize::from(op.seg) {
            s @ (seg::FS | seg::GS) => s as u8 + 1,
            _ => 0,
        };
        (op.asize == self.word).then(|| self.effective(op, next, segment))
    }

    /// The effective address of a memory operand, plus the base of a segment.
    fn effective(&mut self, op: &Op, next: u32, segment: u8) -> Value {
        let base = self.base(op, next);
        let indexed = usize::from(op.index) != ZERO;
        if !indexed && segment == 0 {
            return base;
        }
        let index = if indexed { self.get(usize::from(op.index)) } else { Value { root: NOTHING, offset: 0 } };
        let scale = op.scale & 3;
        let root = self.root((base.root, index.root, scale, segment));
        Value { root, offset: base.offset.wrapping_add(index.offset << scale) }
    }

    /// The root of a sum.
    fn root(&mut self, key: (u32, u32, u8, u8)) -> u32 {
        let key = match key {
            (base, index, 0, 0) if base > index => (index, base, 0, 0),
            _ => key,
        };
        match self.sums.iter().find(|(sum, _)| *sum == key) {
            Some((_, root)) => *root,
            None => {
                let root = self.fresh().root;
                self.sums.push((key, root));
                root
            }
        }
    }

    /// What was added up to make a root, if that was all there when the block began, and how far a pass through the block
    /// has moved it: base, index, segment.
    pub(super) fn origin(&self, root: u32) -> Option<Moving> {
        let sum = self.sums.iter().find(|(_, sum)| *sum == root).map(|(parts, _)| *parts);
        let (base, index, scale, segment) = sum.unwrap_or((root, NOTHING, 0, 0));
        let mut step = 0i64;
        let mut moved = |root: u32, scale: u8| {
            let register = u8::try_from(root).ok().filter(|&r| r < 16)?;
            let now = self.get(usize::from(register));
            step = step.checked_add(now.offset << scale)?;
            (now.root == root).then_some(register)
        };
        let base = match base {
            NOTHING => None,
            PAGE => Some(Base::Page),
            _ => Some(Base::Register(moved(base, 0)?)),
        };
        let index = match index {
            NOTHING => None,
            _ => Some((moved(index, scale)?, scale)),
        };
        let segment = usize::from(segment).checked_sub(1);
        Some(Moving { base, index, segment, disp: 0, span: 0, alignment: 1, write: false, step, slot: 0 })
    }

    /// Follows an instruction.
    pub(super) fn follow(&mut self, insn: &Insn, info: &mut InstructionInfoFactory) {
        let i = &insn.instruction;
        let (rsp, rbp) = (self.get(gpr::RSP), self.get(gpr::RBP));
        let moved = |value: Value, by: i64| Value { offset: value.offset.wrapping_add(by), ..value };
        let word = i64::from(self.word);
        match insn.how {
            How::Nothing => return,
            How::Push => return self.set(gpr::RSP, moved(rsp, -word)),
            How::Pop => {
                self.set(gpr::RSP, moved(rsp, word));
                return self.forget(usize::from(insn.op.r1));
            }
            How::Leave => {
                self.set(gpr::RSP, moved(rbp, word));
                return self.forget(gpr::RBP);
            }
            How::Lea if insn.op.asize == self.word && i.op0_register().size() == usize::from(self.word) => {
                let value = self.effective(&insn.op, insn.next, 0);
                return self.set(usize::from(insn.op.r1), value);
            }
            How::Rewrite | How::Copy | How::Short => {
                if let Some((r, value)) = self.sum(i) {
                    return self.set(r, value);
                }
            }
            _ => {}
        }
        if !stays(insn.how) {
            return (0..16).for_each(|r| self.forget(r));
        }
        written_registers(i, info).for_each(|r| self.forget(usize::from(r)));
    }

    /// The register and its new content, after an instruction that copies a register, or adds a constant or another to it.
    fn sum(&mut self, i: &Instruction) -> Option<(usize, Value)> {
        let whole = |r: Register| r.is_gpr() && r.size() == usize::from(self.word);
        if i.op0_kind() != OpKind::Register || !whole(i.op0_register()) {
            return None;
        }
        let target = usize::from(number(i.op0_register()));
        let value = self.get(target);
        let by = match (i.mnemonic(), i.op_count()) {
            (Mnemonic::Mov, 2) if i.op1_kind() == OpKind::Register && whole(i.op1_register()) => {
                return Some((target, self.get(usize::from(number(i.op1_register())))));
            }
            (Mnemonic::Add, 2) if i.op1_kind() == OpKind::Register && whole(i.op1_register()) => {
                let other = self.get(usize::from(number(i.op1_register())));
                let root = self.root((value.root, other.root, 0, 0));
                return Some((target, Value { root, offset: value.offset.wrapping_add(other.offset) }));
            }
            (Mnemonic::Add, 2) => constant(i)?,
            (Mnemonic::Sub, 2) => constant(i)?.wrapping_neg(),
            (Mnemonic::Inc, 1) => 1,
            (Mnemonic::Dec, 1) => -1,
            _ => return None,
        };
        Some((target, Value { offset: value.offset.wrapping_add(by), ..value }))
    }
}

/// The second operand, if it is an immediate.
fn constant(i: &Instruction) -> Option<i64> {
    match i.op1_kind() {
        OpKind::Immediate8to64 | OpKind::Immediate32to64 | OpKind::Immediate8to32 => Some(i.immediate(1) as i64),
        OpKind::Immediate32 => Some(i64::from(i.immediate32() as i32)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_sums_of_whole_registers() {
        let mut values = Values::new(8);
        let decode = |bytes: &[u8]| iced_x86::Decoder::new(64, bytes, iced_x86::DecoderOptions::NONE).decode();
        // ADD RAX, 16; SUB RAX, -8; INC RAX; MOV RBX, RAX; ADD EAX, 1; ADD RAX, RBX; MOV EBX, EAX
        for (bytes, expected) in [
            (&[0x48u8, 0x83, 0xc0, 0x10][..], Some((0, 0, 16))),
            (&[0x48, 0x83, 0xe8, 0xf8], Some((0, 0, 24))),
            (&[0x48, 0xff, 0xc0], Some((0, 0, 25))),
            (&[0x48, 0x89, 0xc3], Some((3, 0, 25))),
            (&[0x83, 0xc0, 1], None),
            (&[0x48, 0x01, 0xd8], Some((0, NOTHING + 1, 50))),
            (&[0x89, 0xc3], None),
        ] {
            let found = values.sum(&decode(bytes));
            assert_eq!(found.map(|(r, value)| (r, value.root, value.offset)), expected, "{bytes:x?}");
            if let Some((r, value)) = found {
                values.set(r, value);
            }
        }
    }
}
