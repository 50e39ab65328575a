//! What was executed, and whether that was everything.

use std::collections::BTreeMap;

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind, OpKind};

use crate::codes::{Codes, Family};
use crate::generate::operand::is_register_or_memory;
use crate::layout::*;
use crate::program::Program;

/// Ways in which an encoding can be used.
mod form {
    pub(super) const REGISTER: u8 = 1 << 0;
    pub(super) const MEMORY: u8 = 1 << 1;
    pub(super) const LOCK: u8 = 1 << 2;
    pub(super) const REP: u8 = 1 << 3;
    pub(super) const REPNE: u8 = 1 << 4;
    pub(super) const NAMES: [&str; 5] = ["registers", "memory", "LOCK", "REP", "REPNE"];
}

/// How often each encoding was executed, and how.
#[derive(Default)]
pub(crate) struct Coverage {
    complete: BTreeMap<u16, Use>,
    fault: BTreeMap<u16, u64>,
    /// Immediate counts of shifts and rotates, by mnemonic: bit n for count n.
    counts: BTreeMap<u16, u64>,
    pub(crate) instructions: u64,
    pub(crate) programs: u64,
    /// Programs by the vector that ended them.
    pub(crate) vectors: BTreeMap<u64, u64>,
}

#[derive(Default)]
struct Use {
    times: u64,
    forms: u8,
}

impl Coverage {
    /// Encodings that completed at least once.
    pub(crate) fn encodings(&self) -> usize {
        self.complete.len()
    }

    /// Notes the instructions of a run that ended in `outcome`. `trace` has the instruction pointers of a program with
    /// branches.
    pub(crate) fn note(&mut self, program: &Program, outcome: &Outcome, trace: &[u64]) {
        self.programs += 1;
        *self.vectors.entry(outcome.vector).or_default() += 1;
        let (done, stopped) = if program.branches { traced(program, trace) } else { straight(program, outcome) };
        for i in done {
            self.count(&program.items[i].instruction, true);
        }
        let fetch = outcome.vector == PF && outcome.error & 0x10 != 0;
        if let Some(item) = stopped.and_then(|i| program.items.get(i)).filter(|_| !fetch) {
            self.count(&item.instruction, false);
        }
    }

    fn count(&mut self, instruction: &Instruction, completed: bool) {
        self.instructions += 1;
        let code = instruction.code() as u16;
        if !completed {
            *self.fault.entry(code).or_default() += 1;
            return;
        }
        let entry = self.complete.entry(code).or_default();
        entry.times += 1;
        entry.forms |= forms_of(instruction);
        if let Some(count) = shift_count(instruction) {
            *self.counts.entry(instruction.mnemonic() as u16).or_default() |= 1 << count;
        }
    }

    /// Lines that say what of `codes` was not executed.
    pub(crate) fn gaps(&self, codes: &Codes, which: Family, mode: Mode) -> Vec<String> {
        let mut lines = Vec::new();
        for &code in &codes.complete {
            match self.complete.get(&(code as u16)) {
                None => lines.push(format!("{code:?} never completed")),
                Some(entry) => {
                    let missing = wanted_forms(code) & !entry.forms;
                    let names = form::NAMES.iter().enumerate().filter(|(i, _)| missing >> i & 1 != 0);
                    lines.extend(names.map(|(_, name)| format!("{code:?} never completed with {name}")));
                }
            }
        }
        let silent = codes.fault.iter().filter(|&&code| !self.fault.contains_key(&(code as u16)));
        lines.extend(silent.map(|code| format!("{code:?} never raised its exception")));
        if which == Family::Integer {
            lines.extend(self.count_gaps(mode));
        }
        lines
    }

    /// Shifts and rotates must have been executed with every count.
    fn count_gaps(&self, mode: Mode) -> Vec<String> {
        use Mnemonic as M;
        let all = if mode == Mode::Long { u64::MAX } else { 0xffff_ffff };
        let single = [M::Rol, M::Ror, M::Rcl, M::Rcr, M::Shl, M::Shr, M::Sar];
        // The counts of 16-bit double shifts are limited, and only 64-bit mode has enough other ones.
        let double: &[M] = if mode == Mode::Long { &[M::Shld, M::Shrd] } else { &[] };
        let missing = |mnemonic: &M| {
            let missing = all & !self.counts.get(&(*mnemonic as u16)).copied().unwrap_or(0);
            (missing != 0).then(|| format!("{mnemonic:?} never completed with counts {missing:#x} (a bit each)"))
        };
        single.iter().chain(double).filter_map(missing).collect()
    }
}

/// The items that completed, and the one that did not, of a program without branches.
fn straight(program: &Program, outcome: &Outcome) -> (Vec<usize>, Option<usize>) {
    let end = program.items.len();
    let at_int3 = outcome.vector == BP && program.item_at(outcome.rip.wrapping_sub(1)) == Some(end);
    let stop = if at_int3 { Some(end) } else { program.item_at(outcome.rip) };
    (stop.map_or(Vec::new(), |stop| (0..stop).collect()), stop)
}

/// The same from the instruction pointers of a run.
fn traced(program: &Program, trace: &[u64]) -> (Vec<usize>, Option<usize>) {
    let items = |rips: &[u64]| -> Vec<usize> {
        let known = rips.iter().filter_map(|&rip| program.item_at(rip));
        known.filter(|&i| i < program.items.len()).collect()
    };
    match trace.split_last() {
        Some((last, before)) => (items(before), program.item_at(*last)),
        None => (Vec::new(), None),
    }
}

fn forms_of(instruction: &Instruction) -> u8 {
    let bit = |set: bool, mask: u8| if set { mask } else { 0 };
    let memory = instruction.op_kinds().any(|kind| kind == OpKind::Memory);
    bit(memory, form::MEMORY)
        | bit(!memory, form::REGISTER)
        | bit(instruction.has_lock_prefix(), form::LOCK)
        | bit(instruction.has_rep_prefix(), form::REP)
        | bit(instruction.has_repne_prefix(), form::REPNE)
}

/// The forms that must be seen of an encoding.
fn wanted_forms(code: Code) -> u8 {
    use OpCodeOperandKind as K;
    let info = code.op_code();
    let either = info.op_kinds().iter().any(|&kind| is_register_or_memory(kind));
    // PREFETCHW's neighbours with a register are undefined on AMD's processors.
    let hint = matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    );
    let string = info.op_kinds().iter().any(|kind| matches!(kind, K::seg_rSI | K::es_rDI));
    let bit = |set: bool, mask: u8| if set { mask } else { 0 };
    bit(either, form::MEMORY)
        | bit(either && !hint, form::REGISTER)
        | bit(info.can_use_lock_prefix(), form::LOCK)
        | bit(string && info.can_use_rep_prefix(), form::REP)
        | bit(string && info.can_use_repne_prefix(), form::REPNE)
}

/// The immediate count of a shift or rotate, below 64.
fn shift_count(instruction: &Instruction) -> Option<u32> {
    use Mnemonic as M;
    let shifts = matches!(
        instruction.mnemonic(),
        M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd
    );
    let last = instruction.op_count().checked_sub(1)?;
    (shifts && instruction.op_kind(last) == OpKind::Immediate8).then(|| u32::from(instruction.immediate8() & 63))
}
