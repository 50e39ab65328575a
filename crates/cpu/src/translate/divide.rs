//! DIV and IDIV: divisions that may raise #DE go to the interpreter, the others run as they are.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::asm::{Asm, Fixup, Mem, cond, reg::*};
use super::block::{Insn, Translator};
use super::classify::How;
use crate::jit::context::at;

/// Whether the division runs here.
pub(super) fn form(i: &Instruction) -> How {
    // 8-bit divisions have their dividend in AX, and AH does not go together with the other registers.
    if operand_size(i) == 1 { How::Interpret } else { How::Divide }
}

fn operand_size(i: &Instruction) -> usize {
    if i.op0_kind() == OpKind::Register { i.op0_register().size() } else { i.memory_size().size() }
}

/// Code of an instruction of 16, 32 or 64 bits with a register as its r/m operand.
fn sized(asm: &mut Asm, size: usize, opcode: u8, field: u8, rm: u8) {
    if size == 2 {
        asm.u8(0x66);
    }
    asm.op_reg(size == 8, &[opcode], field, rm);
}

impl Translator<'_> {
    /// Emits DIV or IDIV. All arithmetic flags are undefined afterwards; only where it faults they are as before.
    pub(super) fn divide(&mut self, insn: &Insn) {
        let i = &insn.instruction;
        let size = operand_size(i);
        let divisor = if i.op0_kind() == OpKind::Register {
            self.in_register(insn.op.r1, R15)
        } else {
            self.address(insn);
            self.check(insn, size as u32, false);
            let operand = Self::operand();
            match size {
                8 => self.asm.load(R15, &operand),
                4 => self.asm.load32(R15, &operand),
                // MOVZX r32, m16
                _ => self.asm.op_mem(false, &[0x0f, 0xb7], R15, &operand),
            }
            R15
        };
        self.keep_flags();
        if i.mnemonic() == Mnemonic::Div {
            // The quotient fits if the upper half of the dividend is below the divisor: CMP rDX, divisor.
            sized(&mut self.asm, size, 0x39, divisor, RDX);
            let fits = self.asm.jcc_short(cond::B);
            self.with_flags(insn);
            self.asm.bind(fits);
            return sized(&mut self.asm, size, 0xf7, 6, divisor);
        }
        for check in [Self::small_divisor, Self::wide_dividend] {
            let usual = check(self, size, divisor);
            self.with_flags(insn);
            self.asm.bind(usual);
        }
        sized(&mut self.asm, size, 0xf7, 7, divisor);
    }

    /// Stores the flags in the context block.
    fn keep_flags(&mut self) {
        self.spare_flags();
        self.asm.store(&Mem::context(at!(scratch)), RAX);
        self.asm.load(RAX, &Mem::context(at!(scratch2)));
    }

    /// Restores them and goes to the slow path.
    fn with_flags(&mut self, insn: &Insn) {
        self.asm.store(&Mem::context(at!(scratch2)), RAX);
        self.asm.load(RAX, &Mem::context(at!(scratch)));
        self.recall_flags();
        let slow = self.asm.jmp_forward();
        self.slow_path(insn, slow, false);
    }

    /// Jumps unless the divisor is 0 or -1.
    fn small_divisor(&mut self, size: usize, divisor: u8) -> Fixup {
        if size == 2 {
            // MOVSX ECX, r16
            self.asm.op_reg(false, &[0x0f, 0xbf], RCX, divisor);
        } else {
            self.asm.op_reg(size == 8, &[0x89], divisor, RCX);
        }
        let wide = size == 8;
        // INC rCX; CMP rCX, 1
        self.asm.op_reg(wide, &[0xff], 0, RCX);
        self.asm.op_reg(wide, &[0x83], 7, RCX);
        self.asm.u8(1);
        self.asm.jcc_short(cond::A)
    }

    /// Jumps if the upper half of the dividend is the sign of the lower: other quotients may not fit.
    fn wide_dividend(&mut self, size: usize, _: u8) -> Fixup {
        // MOV rCX, rAX; SAR rCX, bits - 1; CMP rCX, rDX
        sized(&mut self.asm, size, 0x89, RAX, RCX);
        sized(&mut self.asm, size, 0xc1, 7, RCX);
        self.asm.u8(size as u8 * 8 - 1);
        sized(&mut self.asm, size, 0x39, RDX, RCX);
        self.asm.jcc_short(cond::Z)
    }
}
