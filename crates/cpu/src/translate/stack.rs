//! PUSH, POP and LEAVE of whole words of the stack: 64 bits in 64-bit mode, else 32.

use iced_x86::{Mnemonic, OpKind, Register};

use super::asm::{Mem, reg::*};
use super::block::{Insn, Translator};
use super::classify::{How, is_near};
use super::rewrite::named_registers;
use super::{resident, spilled};
use crate::jit::context::at;

/// How far RSP may be from R13, in bytes.
const FAR: i32 = 0x1000;

/// Whether R13 need not be RSP while an instruction runs.
pub(super) fn keeps_moved(insn: &Insn) -> bool {
    let i = &insn.instruction;
    let mut named = named_registers(i);
    match insn.how {
        How::Push | How::Pop => true,
        How::Branch => i.mnemonic() == Mnemonic::Ret || i.mnemonic() == Mnemonic::Call && is_near(i),
        _ => super::share::touches_registers_only(insn) && named.all(|r| r.full_register() != Register::RSP),
    }
}

impl Translator<'_> {
    /// PUSH of a register, a segment register or an immediate.
    pub(super) fn push(&mut self, insn: &Insn) {
        let word = self.word() as i32;
        let register = insn.instruction.op0_kind() == OpKind::Register;
        let selector = register && insn.instruction.op0_register().is_segment_register();
        if register && !selector && resident(insn.op.r1) == Some(R13) {
            self.settle_stack();
        }
        let place = self.stack_access(insn, R13, -word, true);
        if selector {
            self.load_selector(insn.op.r1);
            self.store_word(&place, RCX);
        } else if register {
            let source = self.in_register(insn.op.r1, RCX);
            self.store_word(&place, source);
        } else {
            // MOV m64, imm32 or MOV m32, imm32
            self.asm.op_mem(!self.legacy, &[0xc7], 0, &place);
            self.asm.u32(insn.op.imm as u32);
        }
        self.move_stack(insn, -word);
    }

    /// Moves RSP, or notes that it is to be moved if nothing can see it before the next instruction.
    fn move_stack(&mut self, insn: &Insn, by: i32) {
        self.stack_moved += by;
        if insn.stack.is_none() || self.stack_moved.abs() > FAR {
            self.settle_stack();
        }
    }

    /// Brings R13 up to date.
    pub(super) fn settle_stack(&mut self) {
        if self.stack_moved != 0 {
            self.add_word(R13, R13, self.stack_moved);
            self.stack_moved = 0;
        }
    }

    /// PUSH of a memory operand. Nothing is changed before both accesses are known to succeed.
    pub(super) fn push_memory(&mut self, insn: &Insn) {
        let word = self.word();
        self.address(insn);
        self.check(insn, word, false);
        self.load_word(RCX, &Self::operand());
        self.asm.store(&Mem::context(at!(scratch)), RCX);
        self.add_word(R15, R13, -(word as i32));
        self.check(insn, word, true);
        self.asm.load(RCX, &Mem::context(at!(scratch)));
        self.store_word(&Self::operand(), RCX);
        self.asm.mov(R13, R15);
    }

    /// POP of a register.
    pub(super) fn pop(&mut self, insn: &Insn) {
        let place = self.stack_access(insn, R13, 0, false);
        match resident(insn.op.r1) {
            // POP RSP: the value popped wins.
            Some(R13) => {
                self.stack_moved = 0;
                return self.load_word(R13, &place);
            }
            Some(host) => self.load_word(host, &place),
            None => {
                self.asm.load(RCX, &place);
                self.asm.store(&spilled(insn.op.r1), RCX);
            }
        }
        self.move_stack(insn, self.word() as i32);
    }

    /// LEAVE.
    pub(super) fn leave(&mut self, insn: &Insn) {
        let place = self.stack_access(insn, RBP, 0, false);
        self.load_word(RCX, &place);
        self.add_word(R13, RBP, self.word() as i32);
        self.asm.mov(RBP, RCX);
    }
}
