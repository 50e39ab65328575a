//! PUSH, POP and LEAVE in 64-bit mode with 64-bit operands.

use iced_x86::OpKind;

use super::asm::{Mem, reg::*};
use super::block::{Insn, Translator};
use super::{resident, spilled};

impl Translator<'_> {
    /// PUSH of a register or an immediate.
    pub(super) fn push(&mut self, insn: &Insn) {
        self.asm.lea(true, R15, &Mem::base(R13, -8));
        self.check(insn, 8, true);
        if insn.instruction.op0_kind() == OpKind::Register {
            let source = self.in_register(insn.op.r1, RCX);
            self.asm.store(&Self::operand(), source);
        } else {
            // MOV m64, imm32
            self.asm.op_mem(true, &[0xc7], 0, &Self::operand());
            self.asm.u32(insn.op.imm as u32);
        }
        self.asm.mov(R13, R15);
    }

    /// POP of a register.
    pub(super) fn pop(&mut self, insn: &Insn) {
        self.asm.mov(R15, R13);
        self.check(insn, 8, false);
        match resident(insn.op.r1) {
            // POP RSP: the value popped wins.
            Some(R13) => self.asm.load(R13, &Self::operand()),
            Some(host) => {
                self.asm.load(host, &Self::operand());
                self.asm.lea(true, R13, &Mem::base(R15, 8));
            }
            None => {
                self.asm.load(RCX, &Self::operand());
                self.asm.store(&spilled(insn.op.r1), RCX);
                self.asm.lea(true, R13, &Mem::base(R15, 8));
            }
        }
    }

    /// LEAVE.
    pub(super) fn leave(&mut self, insn: &Insn) {
        self.asm.mov(R15, RBP);
        self.check(insn, 8, false);
        self.asm.load(RBP, &Self::operand());
        self.asm.lea(true, R13, &Mem::base(R15, 8));
    }
}
