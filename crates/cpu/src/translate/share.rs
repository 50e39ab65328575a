//! Which accesses of a block share one check: those whose addresses differ by constants, close together.
//!
//! A block runs from its start to one of its exits without anything that could take a translation away, so that the first
//! access of a group can check the range of all. If that check fails, for the range may cross pages or one access may want
//! more rights than another, the rest of the block runs in a version of its own where every access has its own check.

use iced_x86::{InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpKind};
use platform::x86::{gpr, seg};

use super::block::Insn;
use super::classify::{How, uses_memory};
use super::resident;
use super::rewrite::{number, writes};
use super::values::{Value, Values};
use crate::decode::Op;
use crate::state::ZERO;

/// Greatest distance between the ends of a group, in bytes.
const SPAN: i64 = 256;
/// Groups of a block whose host address can be kept in the context block.
pub(crate) const SLOTS: usize = 12;
/// Greatest distance in bytes that a group checked ahead moves in one iteration of its loop.
const MAX_STEP: u64 = 512;

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
