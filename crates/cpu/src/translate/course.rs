//! Which guest instructions a block has, and in what order they run.

use iced_x86::Instruction;

use super::block::{Insn, Request};
use super::classify::{How, classify, uses_memory};
use super::memory::addressable;
use super::{share, system};
use crate::decode::{self, Flow};

/// Longest block, in instructions.
const MAX_INSTRUCTIONS: usize = 128;
/// Copies of a loop's body that a block holds at most, and their instructions.
const MAX_COPIES: usize = 4;
const MAX_UNROLLED: usize = 128;
/// Conditional branches that a block goes on behind, and direct jumps that it follows.
const MAX_BRANCHES: usize = 4;
const MAX_JUMPS: usize = 2;

/// The order of the guest instructions of a block.
#[derive(Clone, Default, Debug)]
pub(crate) struct Course {
    /// How many they are.
    pub(crate) count: u32,
    /// How many are one copy of the loop that the block is, or all.
    pub(crate) period: u32,
    /// Jumps that are followed: how many instructions are up to there with the jump, and the offset in the page of the next.
    pub(crate) jumps: Vec<(u32, u32)>,
}

impl Course {
    pub(super) fn new(insns: &[Insn], period: usize) -> Self {
        let jumps = insns.iter().zip(1..).filter(|(insn, _)| insn.leads_to != insn.next);
        let jumps = jumps.map(|(insn, n)| (n, insn.leads_to)).collect();
        Self { count: insns.len() as u32, period: period as u32, jumps }
    }

    /// The next followed jump at or behind an instruction.
    pub(crate) fn jump_after(&self, done: u32) -> Option<(u32, u32)> {
        self.jumps.iter().copied().find(|(n, _)| *n > done)
    }
}

/// Repeats a block that branches back to its start: accesses of several rounds that lie close together share one check then, and
/// events are looked for once in so many rounds.
pub(super) fn unroll(insns: &mut Vec<Insn>) {
    let (Some(first), Some(last), period) = (insns.first(), insns.last(), insns.len()) else { return };
    let straight = insns.iter().all(|insn| insn.leads_to == insn.next);
    let loops = straight
        && last.how == How::Branch
        && last.instruction.is_jcc_short_or_near()
        && last.target() == i64::from(first.start)
        && insns.iter().all(|insn| share::stays(insn.how));
    let copies = MAX_COPIES.min(MAX_UNROLLED / period);
    if !loops || copies < 2 {
        return;
    }
    let body = insns.clone();
    for _ in 1..copies {
        if let Some(last) = insns.last_mut() {
            last.again = true;
        }
        insns.extend(body.iter().cloned());
    }
}

/// Decodes up to the end of the block; whether its last instruction ends it by itself.
pub(super) fn decode_block(request: &Request<'_>, host_alu: &mut crate::interp::hostalu::HostAlu) -> (Vec<Insn>, bool) {
    let mut insns: Vec<Insn> = Vec::new();
    let bytes = request.bytes();
    let mut at = if request.joined.is_some() { 0 } else { request.start as usize };
    // Versions for single accesses are entered in the middle of others.
    let (mut branches, mut jumps, mut turned) = (0, 0, request.alone != 0);
    let limit = match (request.joined.is_some(), request.alone) {
        (true, _) => 1,
        (false, 0) => MAX_INSTRUCTIONS,
        (false, count) => usize::from(count),
    };
    while at < bytes.len() && insns.len() < limit {
        let window = &bytes[at..bytes.len().min(at + 15)];
        let Some(decoded) = decode::decode_full(window, request.mode, request.features, host_alu) else { break };
        let (instruction, offsets, op, flow) = decoded;
        let start = if request.joined.is_some() { request.start } else { at as u32 };
        let next = start + u32::from(op.len);
        let legacy = !request.mode.is_64();
        let how = match system::form(&instruction, flow, request) {
            Some(_) if uses_memory(&instruction) && !addressable(&op, next, legacy) => How::Interpret,
            Some(how) => how,
            None => classify(&instruction, &op, flow, next, request),
        };
        if request.checking && how == How::Interpret {
            break;
        }
        let ends = match how {
            How::System => system::ends(&instruction),
            _ => flow == Flow::End || changes_access(&instruction),
        };
        let mut insn = Insn {
            instruction,
            offsets,
            at,
            start,
            next,
            leads_to: next,
            op,
            how,
            ends,
            turned,
            again: false,
            operand: None,
            stack: None,
            recovery: None,
        };
        at += usize::from(insn.op.len);
        let target = if jumps < MAX_JUMPS && insns.len() + 1 < limit { followed(&insn, &insns, request) } else { None };
        if let Some(target) = target {
            (insn.how, insn.leads_to, insn.ends) = (How::Nothing, target, false);
            turned |= target <= start;
            jumps += 1;
            at = target as usize;
        }
        let goes_on = !insn.ends || branches < MAX_BRANCHES && skips_forward(&insn);
        branches += usize::from(insn.ends);
        insns.push(insn);
        if !goes_on {
            break;
        }
    }
    let complete = insns.last().is_some_and(|insn| insn.ends);
    (insns, complete)
}

/// Where the block goes on behind a direct jump: at its target, unless that is in the block already.
fn followed(insn: &Insn, before: &[Insn], request: &Request<'_>) -> Option<u32> {
    if insn.how != How::Branch || !insn.instruction.is_jmp_short_or_near() || request.joined.is_some() {
        return None;
    }
    let target = insn.target();
    // Not so close to the end that the instruction there may cross it.
    let inside = (0..0x1000 - 15).contains(&target) && target != i64::from(insn.start);
    let target = target as u32;
    (inside && before.iter().all(|other| other.start != target)).then_some(target)
}

/// A conditional branch that is rather not taken: not the end of a loop.
fn skips_forward(insn: &Insn) -> bool {
    let distance = insn.op.imm as i64;
    let loops = distance <= 0 && i64::from(insn.next) + distance >= 0;
    insn.how == How::Branch && insn.instruction.is_jcc_short_or_near() && !loops
}

/// Instructions that go on in the same block of the interpreter, but under another access mode.
fn changes_access(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), iced_x86::Mnemonic::Stac | iced_x86::Mnemonic::Clac)
}
