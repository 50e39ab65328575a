//! PUSH, POP and LEAVE in 64-bit mode with 64-bit operands.

use iced_x86::OpKind;

use super::asm::{Mem, reg::*};
use super::block::{Insn, Translator};
use super::{resident, spilled};
use crate::jit::context::at;

impl Translator<'_> {
    /// PUSH of a register or an immediate.
    pub(super) fn push(&mut self, insn: &Insn) {
        let place = self.stack_access(insn, R13, -8, true);
        if insn.instruction.op0_kind() == OpKind::Register {
            let source = self.in_register(insn.op.r1, RCX);
            self.asm.store(&place, source);
        } else {
            // MOV m64, imm32
            self.asm.op_mem(true, &[0xc7], 0, &place);
            self.asm.u32(insn.op.imm as u32);
        }
        self.asm.lea(true, R13, &Mem::base(R13, -8));
    }

    /// PUSH of a memory operand. Nothing is changed before both accesses are known to succeed.
    pub(super) fn push_memory(&mut self, insn: &Insn) {
        self.address(insn);
        self.check(insn, 8, false);
        self.asm.load(RCX, &Self::operand());
        self.asm.store(&Mem::context(at!(scratch)), RCX);
        self.asm.lea(true, R15, &Mem::base(R13, -8));
        self.check(insn, 8, true);
        self.asm.load(RCX, &Mem::context(at!(scratch)));
        self.asm.store(&Self::operand(), RCX);
        self.asm.mov(R13, R15);
    }

    /// POP of a register.
    pub(super) fn pop(&mut self, insn: &Insn) {
        let place = self.stack_access(insn, R13, 0, false);
        match resident(insn.op.r1) {
            // POP RSP: the value popped wins.
            Some(R13) => return self.asm.load(R13, &place),
            Some(host) => self.asm.load(host, &place),
            None => {
                self.asm.load(RCX, &place);
                self.asm.store(&spilled(insn.op.r1), RCX);
            }
        }
        self.asm.lea(true, R13, &Mem::base(R13, 8));
    }

    /// LEAVE.
    pub(super) fn leave(&mut self, insn: &Insn) {
        let place = self.stack_access(insn, RBP, 0, false);
        self.asm.load(RCX, &place);
        self.asm.lea(true, R13, &Mem::base(RBP, 8));
        self.asm.mov(RBP, RCX);
    }
}
