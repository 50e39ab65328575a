//! Loops of one block: most of their accesses are checked ahead, for many iterations at once.
//!
//! ```text
//!  entry    LEFT = WARM_UP
//!  first:   the block; LEFT -= 1; JNZ first
//!  check:   events pending? -> leave
//!           for each group of accesses that moves by a constant: is it in the TLB? how many iterations until it leaves its page?
//!           LEFT = the least of these; not in the TLB -> one iteration where every access has its own check
//!  second:  the block without these checks; LEFT -= 1; JNZ second; JMP check
//! ```
//!
//! An iteration is here what the block holds of them: see [`super::block`] for copies. Loops of few iterations never come to the
//! check. The bound on LEFT takes the place of the look for events at the end of each
//! iteration. Nothing in such a loop can take a translation away but an instruction that goes to the interpreter because
//! its own access missed: the iteration is the last one then that relies on the check.

use super::asm::{Asm, Fixup, Mem, cond, reg::*};
use super::block::{Insn, Translator};
use super::classify::{How, is_near};
use super::share::{self, Base, Moving};
use super::{SiteKind, resident, spilled};
use crate::jit::context::{at, table};
use iced_x86::{InstructionInfoFactory, Mnemonic};
use platform::x86::seg;

/// Iterations before the check.
const WARM_UP: u32 = 4;
/// Iterations that one check is for at most.
const MOST: u32 = 256;

/// What the end of an iteration does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Body {
    /// Looks for events and goes on; or it is no loop.
    Only,
    First,
    /// Accesses were checked ahead.
    Second,
}

/// The second version of a block.
pub(super) struct Second {
    insns: Vec<Insn>,
    moving: Vec<Moving>,
}

/// Plans a second version of a block from the offset `start` on, if it is a loop that gains by it.
pub(super) fn plan(insns: &[Insn], start: u32, info: &mut InstructionInfoFactory, legacy: bool) -> Option<Second> {
    let last = insns.last()?;
    let loops = last.how == How::Branch
        && is_near(&last.instruction)
        && last.instruction.mnemonic() != Mnemonic::Call
        && last.target() == i64::from(start);
    // Behind a jump back, a branch in the middle may lead to the start, too.
    if !loops || !insns.iter().all(|insn| share::stays(insn.how) && !insn.turned) {
        return None;
    }
    let mut insns = insns.to_vec();
    let moving = share::plan(&mut insns, info, legacy, true);
    (!moving.is_empty()).then_some(Second { insns, moving })
}

impl Translator<'_> {
    /// Before the first iteration.
    pub(super) fn begin_warm_up(&mut self) {
        set_left(&mut self.asm, WARM_UP);
    }

    /// The end of an iteration of a loop to the block's start.
    pub(super) fn end_iteration(&mut self, again: u32) {
        self.asm.load(RCX, &Mem::context(at!(left)));
        self.asm.lea(true, RCX, &Mem::base(RCX, -1));
        self.asm.store(&Mem::context(at!(left)), RCX);
        let done = self.asm.jrcxz();
        self.asm.jmp(again);
        self.asm.bind(done);
        match self.body {
            Body::Second => self.asm.jmp(self.checks_at),
            _ => {
                let jump = self.asm.jmp_forward();
                self.to_check.push(jump);
            }
        }
    }

    /// The check and the second version.
    pub(super) fn second_body(&mut self, second: &Second, start: u32) {
        (self.body, self.current) = (Body::Second, 0);
        (self.addend, self.x87_ready, self.vectors_ready) = (None, false, false);
        self.checks_at = self.asm.here();
        for jump in std::mem::take(&mut self.to_check) {
            self.asm.bind(jump);
        }
        let event = self.poll();
        let on = self.asm.jmp_forward();
        self.asm.bind(event);
        self.leave_here(self.trampolines.event, SiteKind::Event { target: start });
        self.asm.bind(on);
        self.set_flags_aside();
        set_left(&mut self.asm, MOST);
        let mut misses = Vec::new();
        for moving in &second.moving {
            self.check_ahead(moving, &mut misses);
        }
        self.restore_flags_and_rax();
        if second.insns.iter().any(|insn| insn.how == How::Vector) {
            self.want_vectors();
            self.last_vector = usize::MAX;
        }
        self.first_resume = self.resumes.len();
        self.direct_again = self.asm.here();
        self.run_through(&second.insns);
        self.emit_exits(&second.insns);
        for jump in misses {
            self.asm.bind(jump);
        }
        self.restore_flags_and_rax();
        let alone = self.asm.jmp_forward();
        if let Some(first) = second.insns.first() {
            self.current = 0;
            self.go_alone(first, alone);
        }
    }

    /// Keeps the flags while RAX is what it was.
    fn set_flags_aside(&mut self) {
        self.spare_flags();
        self.asm.store(&Mem::context(at!(scratch)), RAX);
        self.asm.load(RAX, &Mem::context(at!(scratch2)));
    }

    fn restore_flags_and_rax(&mut self) {
        self.asm.load(RAX, &Mem::context(at!(scratch)));
        self.recall_flags();
    }

    /// Checks one group and lowers LEFT to its iterations. Uses RCX, R14, R15 and flags.
    fn check_ahead(&mut self, moving: &Moving, misses: &mut Vec<Fixup>) {
        self.moving_address(moving);
        let room = 0x1000 - moving.span;
        // ECX: offset in the page.
        self.asm.mov32(RCX, R15);
        self.immediate(4, RCX, 0xfff);
        if moving.step > 0 {
            // NEG ECX; ADD: bytes between the range and the page's end.
            self.asm.op_reg(false, &[0xf7], 3, RCX);
            self.immediate(0, RCX, room);
            misses.push(self.asm.jcc_forward(cond::S));
        } else {
            self.immediate(7, RCX, room);
            misses.push(self.asm.jcc_forward(cond::A));
        }
        let step = moving.step.unsigned_abs() as u32;
        if step != 0 {
            if step.is_power_of_two() {
                // SHR ECX
                self.asm.op_reg(false, &[0xc1], 5, RCX);
                self.asm.u8(step.trailing_zeros() as u8);
            } else {
                // IMUL ECX, ECX, 65536 / step; SHR ECX, 16: never more than the quotient.
                self.asm.op_reg(false, &[0x69], RCX, RCX);
                self.asm.u32(0x1_0000 / step);
                self.asm.op_reg(false, &[0xc1], 5, RCX);
                self.asm.u8(16);
            }
            self.immediate(0, RCX, 1);
            // CMP RCX, [LEFT]; the lesser one stays.
            self.asm.op_mem(true, &[0x3b], RCX, &Mem::context(at!(left)));
            let more = self.asm.jcc_short(cond::AE);
            self.asm.store(&Mem::context(at!(left)), RCX);
            self.asm.bind(more);
        }
        let tags = if moving.write { table::write(self.access) } else { table::read(self.access) };
        self.asm.rorx(R14, R15, 12);
        self.asm.movzx16(R14, R14);
        // ADD R15, [tag]; TEST R15, mask
        self.asm.op_mem(true, &[0x03], R15, &Mem::indexed(RSP, R14, 3, tags));
        self.asm.op_reg(true, &[0xf7], 0, R15);
        self.asm.u32(0xffff_f000 | (moving.alignment - 1));
        misses.push(self.asm.jcc_forward(cond::NZ));
        self.asm.load(R14, &Mem::indexed(RSP, R14, 3, table::addend(self.access)));
        self.asm.store(&Mem::context(at!(addends) + 8 * i32::from(moving.slot)), R14);
    }

    /// An instruction on a 32-bit register and an immediate, by its number in the group of opcode 81.
    fn immediate(&mut self, operation: u8, r: u8, value: u32) {
        self.asm.op_reg(false, &[0x81], operation, r);
        self.asm.u32(value);
    }

    /// The start of a group's range into R15. Uses R14.
    fn moving_address(&mut self, moving: &Moving) {
        let base = match moving.base {
            Some(Base::Register(r)) => Some(self.in_register(r, R15)),
            Some(Base::Page) => {
                self.asm.load(R15, &Mem::context(at!(page)));
                Some(R15)
            }
            None => None,
        };
        let index = moving.index.map(|(r, scale)| {
            let host = resident(r).unwrap_or(R14);
            if host == R14 {
                self.asm.load(R14, &spilled(r));
            }
            (host, scale)
        });
        self.asm.lea(!self.legacy, R15, &Mem { base, index, disp: moving.disp });
        if let Some(segment) = moving.segment {
            let field = if segment == seg::FS { at!(fs_base) } else { at!(gs_base) };
            self.asm.load(R14, &Mem::context(field));
            self.asm.lea(true, R15, &Mem::indexed(R15, R14, 0, 0));
        }
    }
}

/// MOV qword [LEFT], value
pub(super) fn set_left(asm: &mut Asm, value: u32) {
    asm.op_mem(true, &[0xc7], 0, &Mem::context(at!(left)));
    asm.u32(value);
}
