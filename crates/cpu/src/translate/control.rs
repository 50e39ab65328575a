//! Branches, and how blocks hang together.
//!
//! A direct branch inside a page jumps to its target's code, bound when it is first taken. Everything else looks up its
//! target's linear address in the jump cache, which is as valid as the TLB. Every cycle has a backward branch or an indirect
//! one: these look first whether events are pending.
//!
//! A call's way back is told to the host's predictor of returns: the call runs a CALL of the host whose return address is a
//! [`Landing`], which leads to the code behind the call. A return finds the landing in the jump cache like any target, and goes
//! there by a RET of the host. Nothing depends on whether the two belong together but how fast it is.

use iced_x86::{Mnemonic, OpKind};

use super::ahead::Body;
use super::asm::{Fixup, Mem, reg::*};
use super::block::{Insn, Landing, Translator};
use super::classify::is_near;
use super::{SiteKind, resident, spilled};
use crate::jit::context::{MODES, QUIET, at, table};

impl Translator<'_> {
    /// Goes on at an offset relative to the page, which may lie outside of it.
    pub(super) fn go_to(&mut self, insn: &Insn, target: i64) {
        // Seen from where the block begins, what a jump back leads to may lie ahead.
        let backward = target <= i64::from(insn.start) || insn.turned;
        if !(0..0x1000).contains(&target) || self.crosses(target as usize) {
            self.asm.load(R15, &Mem::context(at!(page)));
            self.add_word(R15, R15, target as i32);
            let undo = if insn.instruction.mnemonic() == Mnemonic::Call { 8 } else { 0 };
            return self.look_up(insn, undo, backward);
        }
        let target = target as u32;
        if let Some(direct) = self.loops_to(target) {
            if self.body != Body::Only {
                return self.end_iteration(direct);
            }
            let event = self.poll();
            self.asm.jmp(direct);
            self.asm.bind(event);
            return self.leave_here(self.trampolines.event, SiteKind::Event { target });
        }
        let event = backward.then(|| self.poll());
        let jump = self.asm.jmp_forward();
        let patch = self.asm.field(jump);
        self.stub(jump, self.trampolines.link, SiteKind::Link { patch, target, alone: 0 });
        if let Some(event) = event {
            self.asm.bind(event);
            self.leave_here(self.trampolines.event, SiteKind::Event { target });
        }
    }

    /// A jump that is taken while an event is pending.
    pub(super) fn poll(&mut self) -> Fixup {
        self.asm.load32(RCX, &Mem::context(QUIET));
        self.asm.jrcxz()
    }

    /// Goes to the linear address in R15. `undo` is to be added to RSP if the address turns out not to be canonical.
    pub(super) fn look_up(&mut self, insn: &Insn, undo: i32, poll: bool) {
        let entry = self.find_entry(insn, undo, poll);
        self.asm.op_mem(false, &[0xff], 4, &entry);
    }

    /// As [`Translator::look_up`], for a return: the host's predictor of returns is asked.
    fn look_up_return(&mut self, insn: &Insn, undo: i32) {
        let entry = self.find_entry(insn, undo, true);
        // PUSH of the address, RET.
        self.asm.op_mem(false, &[0xff], 6, &entry);
        self.asm.u8(0xc3);
    }

    /// The place in the jump cache where the code for R15 is.
    fn find_entry(&mut self, insn: &Insn, undo: i32, poll: bool) -> Mem {
        let jumps = table::jumps(self.access + if self.legacy { MODES } else { 0 });
        let kind = SiteKind::Branch { start: insn.start, undo };
        let event = poll.then(|| self.poll());
        self.asm.movzx16(R14, R15);
        self.asm.lea(true, R14, &Mem::indexed(R14, R14, 0, 0));
        self.asm.load(RCX, &Mem::indexed(RSP, R14, 3, jumps));
        self.asm.lea(true, RCX, &Mem::indexed(RCX, R15, 0, 0));
        let hit = self.asm.jrcxz();
        if let Some(event) = event {
            self.asm.bind(event);
        }
        self.leave_here(self.trampolines.branch, kind);
        self.asm.bind(hit);
        Mem::indexed(RSP, R14, 3, jumps + 8)
    }

    /// JMP, CALL, RET, Jcc, JRCXZ, LOOP. The block is over afterwards.
    pub(super) fn branch(&mut self, insn: &Insn) {
        let i = &insn.instruction;
        match i.mnemonic() {
            Mnemonic::Jmp if is_near(i) => self.go_to(insn, insn.target()),
            Mnemonic::Jmp => {
                self.indirect_target(insn);
                self.look_up(insn, 0, true);
            }
            Mnemonic::Call if is_near(i) => {
                self.push_return(insn);
                self.expect_return(insn);
                self.go_to(insn, insn.target());
            }
            Mnemonic::Call => {
                self.indirect_target(insn);
                self.asm.store(&Mem::context(at!(scratch)), R15);
                self.push_return(insn);
                self.expect_return(insn);
                self.asm.load(R15, &Mem::context(at!(scratch)));
                self.look_up(insn, 8, true);
            }
            Mnemonic::Ret => {
                let size = self.word() as i32 + (insn.op.imm & 0xffff) as i32;
                let place = self.stack_access(insn, R13, 0, false);
                self.load_word(R15, &place);
                self.stack_moved += size;
                self.settle_stack();
                self.look_up_return(insn, -size);
            }
            Mnemonic::Jrcxz | Mnemonic::Jecxz | Mnemonic::Loop => {
                if i.mnemonic() == Mnemonic::Loop {
                    self.add_word(R12, R12, -1);
                }
                self.asm.mov(RCX, R12);
                let zero = self.asm.jrcxz();
                let other = self.asm.jmp_forward();
                self.asm.bind(zero);
                let (target, next) = (insn.target(), i64::from(insn.next));
                let (zero, other_target) = if i.mnemonic() == Mnemonic::Loop { (next, target) } else { (target, next) };
                self.go_to(insn, zero);
                self.asm.bind(other);
                self.go_to(insn, other_target);
            }
            _ => self.conditional(insn),
        }
    }

    fn conditional(&mut self, insn: &Insn) {
        let condition = insn.instruction.condition_code() as u8;
        // iced numbers the conditions from 1 in the order of their encodings.
        let condition = condition.wrapping_sub(1) & 15;
        let (target, next) = (insn.target(), i64::from(insn.next));
        if insn.again {
            let leaves = self.asm.jcc_forward(condition ^ 1);
            if (0..0x1000).contains(&next) && !self.crosses(next as usize) {
                let patch = self.asm.field(leaves);
                let kind = SiteKind::Link { patch, target: next as u32, alone: 0 };
                return self.stub(leaves, self.trampolines.link, kind);
            }
            return self.exit_later(leaves, next);
        }
        let inside = (0..0x1000).contains(&target) && !self.crosses(target as usize);
        if inside && target > i64::from(insn.start) && !insn.turned {
            let taken = self.asm.jcc_forward(condition);
            let patch = self.asm.field(taken);
            self.stub(taken, self.trampolines.link, SiteKind::Link { patch, target: target as u32, alone: 0 });
        } else if self.is_last() {
            let not_taken = self.asm.jcc_forward(condition ^ 1);
            self.go_to(insn, target);
            self.asm.bind(not_taken);
        } else {
            let taken = self.asm.jcc_forward(condition);
            self.exit_later(taken, target);
        }
        if self.is_last() {
            self.go_to(insn, next);
        }
    }

    /// Target of an indirect JMP or CALL into R15.
    fn indirect_target(&mut self, insn: &Insn) {
        if insn.instruction.op0_kind() == OpKind::Register {
            match resident(insn.op.r1) {
                Some(host) => self.asm.mov(R15, host),
                None => self.asm.load(R15, &spilled(insn.op.r1)),
            }
        } else {
            let place = self.access(insn, self.word(), false, 1);
            self.load_word(R15, &place);
        }
    }

    fn push_return(&mut self, insn: &Insn) {
        let word = self.word() as i32;
        let place = self.stack_access(insn, R13, -word, true);
        self.asm.load(RCX, &Mem::context(at!(page)));
        self.asm.lea(true, RCX, &Mem::base(RCX, insn.next as i32));
        self.store_word(&place, RCX);
        self.stack_moved -= word;
        self.settle_stack();
    }

    /// Tells the host's predictor where the call will return to.
    fn expect_return(&mut self, insn: &Insn) {
        let offset = insn.next;
        if offset >= 0x1000 || self.crosses(offset as usize) {
            return;
        }
        let on = self.asm.call_forward();
        self.landing = Some(Landing { offset, entry: self.asm.here(), access: self.access as u8 });
        self.looked_up_entry(offset);
        let jump = self.asm.jmp_forward();
        let patch = self.asm.field(jump);
        self.stub(jump, self.trampolines.link, SiteKind::Link { patch, target: offset, alone: 0 });
        self.asm.bind(on);
        // What the CALL has pushed is not needed.
        self.asm.lea(true, RSP, &Mem::base(RSP, 8));
    }
}
