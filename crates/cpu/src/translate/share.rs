//! Which accesses of a block share one check: those whose addresses differ by constants, close together.
//!
//! A block runs from its start to one of its exits without anything that could take a translation away, so that the first
//! access of a group can check the range of all. If that check fails, for the range may cross pages or one access may want
//! more rights than another, the rest of the block runs in a version of its own where every access has its own check.
//!
//! Guest-controlled code decides what is taken for equal here: whatever is not certainly understood makes a new value.

use iced_x86::{Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register};
use platform::x86::{gpr, seg};

use super::block::Insn;
use super::classify::{How, uses_memory};
use super::resident;
use super::rewrite::{number, writes};
use crate::decode::Op;
use crate::state::{RIP, ZERO};

/// Greatest distance between the ends of a group, in bytes.
const SPAN: i64 = 256;
/// Groups of a block whose host address can be kept in the context block.
pub(crate) const SLOTS: usize = 12;
/// Greatest distance in bytes that a group checked ahead moves in one iteration of its loop.
const MAX_STEP: u64 = 512;
/// Displacements of accesses outside 64-bit mode that are not taken for an address themselves.
const NEAR: i64 = 0x1_0000;
/// Offsets beyond this are not followed.
const FAR: i64 = 1 << 40;

/// The part of an access in a group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shared {
    pub(super) group: u16,
    /// It is the group's first: it checks for all.
    pub(super) first: bool,
    /// From its address to the start of the group's range.
    pub(super) start: i32,
    /// Bytes of the group's range.
    pub(super) span: u32,
    /// The range must be writable.
    pub(super) write: bool,
    /// What the start of the range must be aligned to, in bytes; 1 = nothing.
    pub(super) alignment: u32,
    /// It was checked before the iteration of the loop began: see [`super::ahead`].
    pub(super) ahead: bool,
    /// The sum of base register and displacement is the address in 64-bit arithmetic, too.
    pub(super) plain: bool,
    /// Where the distance between host and linear address is kept, if other accesses come between.
    pub(super) slot: Option<u8>,
}

/// A group of accesses whose address moves by the same distance in every iteration of a loop.
pub(super) struct Moving {
    /// The address of its range at the start of an iteration: initial content of a register, or the page of the code.
    pub(super) base: Option<Base>,
    /// Register and binary logarithm of the scale.
    pub(super) index: Option<(u8, u8)>,
    /// FS or GS, whose base is added.
    pub(super) segment: Option<usize>,
    pub(super) disp: i32,
    pub(super) span: u32,
    pub(super) alignment: u32,
    pub(super) write: bool,
    /// Bytes that it moves.
    pub(super) step: i64,
    /// Where the distance between host and linear address is kept.
    pub(super) slot: u8,
}

/// See [`Moving`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Base {
    Register(u8),
    Page,
}

/// A register's content: something unknown plus a constant, in the width of an address.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Value {
    root: u32,
    offset: i64,
}

/// Roots with a meaning; smaller ones are what registers hold at the start.
const PAGE: u32 = 16;
const NOTHING: u32 = 17;

struct Values {
    registers: [Value; 16],
    next: u32,
    /// Sums of a base, a scaled index and a segment's base.
    sums: Vec<((u32, u32, u8, u8), u32)>,
    /// Bytes of an address and of a word of the stack.
    word: u8,
}

impl Values {
    fn new(word: u8) -> Self {
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

    fn get(&self, r: usize) -> Value {
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
    fn plain_base(&self, op: &Op) -> Option<Value> {
        let simple = usize::from(op.index) == ZERO && !matches!(usize::from(op.base), ZERO | RIP);
        let near = self.displacement(op).abs() < NEAR && !matches!(usize::from(op.seg), seg::FS | seg::GS);
        (self.word == 4 && simple && near).then(|| self.get(usize::from(op.base)))
    }

    /// The linear address of a memory operand.
    fn address(&mut self, op: &Op, next: u32) -> Option<Value> {
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
    fn origin(&self, root: u32) -> Option<Moving> {
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
    fn follow(&mut self, insn: &Insn, info: &mut InstructionInfoFactory) {
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
        let used = info.info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE);
        let written: Vec<usize> = used
            .used_registers()
            .iter()
            .filter(|used| used.register().is_gpr() && used.access() != OpAccess::Read)
            .map(|used| usize::from(number(used.register())))
            .collect();
        written.into_iter().for_each(|r| self.forget(r));
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

/// Whether an instruction of that kind runs in emitted code alone, but for a miss of its own access: nothing in it takes
/// translations away.
pub(super) fn stays(how: How) -> bool {
    matches!(
        how,
        How::Branch
            | How::Push
            | How::Pop
            | How::Leave
            | How::Nothing
            | How::Copy
            | How::CopyWithCount
            | How::Swap
            | How::Lea
            | How::MovImmediate
            | How::Bswap
            | How::Short
            | How::Vector
            | How::Rewrite
    )
}

/// Whether an instruction runs without any access and cannot leave its block.
pub(super) fn touches_registers_only(insn: &Insn) -> bool {
    match insn.how {
        How::Nothing | How::Copy | How::CopyWithCount | How::Swap => true,
        How::Lea | How::MovImmediate | How::Bswap | How::Short => true,
        How::Rewrite => !uses_memory(&insn.instruction),
        _ => false,
    }
}

/// An access in the order of execution.
struct Access {
    insn: usize,
    /// It is the implied one of the stack.
    stack: bool,
    root: u32,
    offset: i64,
    size: i64,
    write: bool,
    alignment: u32,
    /// See [`Values::plain_base`].
    base: Option<Value>,
}

struct Group {
    root: u32,
    low: i64,
    high: i64,
    write: bool,
    alignment: u32,
    /// Where the access was that has to be aligned like that.
    anchor: i64,
    members: Vec<Access>,
}

impl Group {
    fn new(access: Access) -> Self {
        let (low, high) = (access.offset, access.offset.wrapping_add(access.size));
        let (root, write, alignment, anchor) = (access.root, access.write, access.alignment, access.offset);
        Self { root, low, high, write, alignment, anchor, members: vec![access] }
    }

    /// The range and its alignment with another access in it; `None` if it does not fit in.
    fn with(&self, access: &Access) -> Option<(i64, i64, u32, i64)> {
        let between = access.offset.checked_sub(self.anchor)?;
        if access.root != self.root || between % i64::from(self.alignment.min(access.alignment)) != 0 {
            return None;
        }
        let (alignment, anchor) = if access.alignment > self.alignment {
            (access.alignment, access.offset)
        } else {
            (self.alignment, self.anchor)
        };
        let low = self.low.min(access.offset);
        let high = self.high.max(access.offset.checked_add(access.size)?);
        let low = low.checked_sub(low.checked_sub(anchor)?.rem_euclid(i64::from(alignment)))?;
        let span = high.checked_sub(low)?;
        (0..=SPAN).contains(&span).then_some((low, high, alignment, anchor))
    }

    /// What is to be checked ahead, if the block is a loop at whose end the registers hold `values`.
    fn moving(&self, values: &Values, slot: usize) -> Option<Moving> {
        let slot = u8::try_from(slot).ok().filter(|slot| usize::from(*slot) < SLOTS)?;
        let moving = values.origin(self.root)?;
        let plain = values.word == 8 || moving.segment.is_none();
        if !plain || moving.step.unsigned_abs() > MAX_STEP || moving.step % i64::from(self.alignment) != 0 {
            return None;
        }
        let (disp, span) = (i32::try_from(self.low).ok()?, u32::try_from(self.high - self.low).ok()?);
        Some(Moving { disp, span, alignment: self.alignment, write: self.write, slot, ..moving })
    }
}

/// Finds the groups of a block and notes them in its instructions. If the block is a loop (`ahead`), those that can be checked
/// ahead are returned.
pub(super) fn plan(insns: &mut [Insn], info: &mut InstructionInfoFactory, legacy: bool, ahead: bool) -> Vec<Moving> {
    let mut values = Values::new(if legacy { 4 } else { 8 });
    let mut groups: Vec<Group> = Vec::new();
    let mut open = 0;
    for (n, insn) in insns.iter().enumerate() {
        if !stays(insn.how) {
            open = groups.len();
        }
        for access in accesses(n, insn, &mut values, info).into_iter().flatten() {
            join(&mut groups, open, access);
        }
        values.follow(insn, info);
    }
    for insn in insns.iter_mut() {
        (insn.operand, insn.stack) = (None, None);
    }
    let mut all_moving: Vec<Moving> = Vec::new();
    let mut slots = 0;
    for (number, group) in groups.iter().enumerate() {
        let moving = if ahead { group.moving(&values, slots) } else { None };
        if moving.is_none() && group.members.len() == 1 {
            continue;
        }
        let mut slot = None;
        if moving.is_some() || needs_slot(group, insns) {
            if slots == SLOTS {
                continue;
            }
            slot = Some(slots as u8);
            slots += 1;
        }
        let ahead = moving.is_some();
        all_moving.extend(moving);
        for (n, member) in group.members.iter().enumerate() {
            let shared = Shared {
                group: number as u16,
                first: n == 0,
                start: (group.low - member.offset) as i32,
                span: (group.high - group.low) as u32,
                write: group.write,
                alignment: group.alignment,
                ahead,
                plain: !legacy || !ahead && member.base.is_some() && member.base == group.members[0].base,
                slot,
            };
            let insn = &mut insns[member.insn];
            if member.stack {
                insn.stack = Some(shared);
            } else {
                insn.operand = Some(shared);
            }
        }
    }
    all_moving
}

fn join(groups: &mut Vec<Group>, open: usize, access: Access) {
    let found = groups.iter_mut().skip(open).find_map(|group| Some((group.with(&access)?, group)));
    match found {
        Some(((low, high, alignment, anchor), group)) => {
            (group.low, group.high, group.alignment, group.anchor) = (low, high, alignment, anchor);
            group.write |= access.write;
            group.members.push(access);
        }
        None => groups.push(Group::new(access)),
    }
}

/// The accesses of an instruction that can be in a group: its memory operand and its place on the stack.
fn accesses(n: usize, insn: &Insn, values: &mut Values, info: &mut InstructionInfoFactory) -> [Option<Access>; 2] {
    let i = &insn.instruction;
    let word = i64::from(values.word);
    let rsp = values.get(gpr::RSP);
    let stack = |value: Value, by: i64, write: bool| {
        let offset = value.offset.wrapping_add(by);
        let base = (word == 4).then_some(value);
        Some(Access { insn: n, stack: true, root: value.root, offset, size: word, write, alignment: 1, base })
    };
    let on_stack = match (insn.how, i.mnemonic()) {
        (How::Push, _) | (How::Branch, Mnemonic::Call) => stack(rsp, -word, true),
        (How::Pop, _) | (How::Branch, Mnemonic::Ret) => stack(rsp, 0, false),
        (How::Leave, _) => stack(values.get(gpr::RBP), 0, false),
        _ => None,
    };
    let operand = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory);
    let operand = match (insn.how, operand) {
        (How::Branch, Some(_)) => Some((word, false)),
        (How::Rewrite | How::Vector, Some(operand)) => {
            let options = InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
            let access = info.info_options(i, options).op_access(operand);
            Some((i.memory_size().size() as i64, writes(access)))
        }
        _ => None,
    };
    let operand = operand.and_then(|(size, write)| {
        let value = values.address(&insn.op, insn.next)?;
        let base = values.plain_base(&insn.op);
        let alignment = super::vector::alignment_of(insn);
        let (root, offset) = (value.root, value.offset);
        Some(Access { insn: n, stack: false, root, offset, size, write, alignment, base })
    });
    [operand, on_stack]
}

/// Whether something between the members of a group takes R14, where the distance to the host address is.
fn needs_slot(group: &Group, insns: &[Insn]) -> bool {
    group.members.windows(2).any(|pair| {
        let (a, b) = (pair[0].insn, pair[1].insn);
        let kept = a < b && keeps(&insns[a], true) && insns[a + 1..b].iter().all(|insn| keeps(insn, false));
        !kept || !pair[1].stack && takes_r14(&insns[b].op)
    })
}

/// Whether R14 is behind the instruction what it was before (or has become, if it is in the group).
fn keeps(insn: &Insn, member: bool) -> bool {
    let i = &insn.instruction;
    let memory = uses_memory(i);
    let spilled = (0..i.op_count())
        .filter(|&n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr())
        .filter(|&n| resident(number(i.op_register(n))).is_none())
        .count();
    match insn.how {
        How::Nothing | How::Copy | How::CopyWithCount | How::Swap => true,
        How::MovImmediate | How::Bswap | How::Short => true,
        How::Lea => !takes_r14(&insn.op),
        How::Rewrite | How::Vector => spilled == 0 && memory == member,
        How::Push | How::Pop | How::Leave => member,
        How::Branch => i.is_jcc_short_or_near(),
        _ => false,
    }
}

/// Whether the address's computation needs R14.
fn takes_r14(op: &Op) -> bool {
    let index = usize::from(op.index);
    index != ZERO && resident(op.index).is_none() || matches!(usize::from(op.seg), seg::FS | seg::GS)
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
