//! CMPXCHG8B and CMPXCHG16B, and bit strings: BT, BTS, BTR, BTC with a bit offset in a register and a memory operand.

use iced_x86::Mnemonic;

use super::asm::{Mem, reg::*};
use super::block::{Insn, Translator};

impl Translator<'_> {
    /// CMPXCHG8B, CMPXCHG16B. All implied registers are in place but RCX.
    pub(super) fn exchange_wide(&mut self, insn: &Insn) {
        let wide = insn.instruction.mnemonic() == Mnemonic::Cmpxchg16b;
        self.address(insn);
        if wide {
            self.check_aligned(insn, 16, true, 16);
        } else {
            self.check(insn, 8, true);
        }
        self.asm.mov(RCX, R12);
        if insn.instruction.has_lock_prefix() {
            self.asm.u8(0xf0);
        }
        self.asm.op_mem(wide, &[0x0f, 0xc7], 1, &Self::operand());
    }

    /// BT and its kin. Of the flags only CF changes, so that nothing here may touch the others.
    pub(super) fn bit_string(&mut self, insn: &Insn) {
        let i = &insn.instruction;
        let wide = i.op1_register().size() == 8;
        let (shift, scale) = if wide { (6, 3) } else { (5, 2) };
        let (opcode, writes) = match i.mnemonic() {
            Mnemonic::Bt => (0xa3, false),
            Mnemonic::Bts => (0xab, true),
            Mnemonic::Btr => (0xb3, true),
            _ => (0xbb, true),
        };
        self.address(insn);
        let offset = self.in_register(insn.op.r1, RCX);
        if wide {
            self.asm.mov(RCX, offset);
        } else {
            // MOVSXD RCX, r32
            self.asm.op_reg(true, &[0x63], RCX, offset);
        }
        self.asm.mov_imm(R14, shift);
        self.asm.shift_right(true, true, RCX, RCX, R14);
        self.asm.lea(!self.legacy, R15, &Mem::indexed(R15, RCX, scale, 0));
        self.check(insn, if wide { 8 } else { 4 }, writes);
        self.asm.lea(true, R15, &Self::operand());
        // The offset inside the operand: its low bits, moved up by a rotation and down by a shift.
        let offset = self.in_register(insn.op.r1, RCX);
        self.asm.mov_imm(R14, 64 - shift);
        self.asm.rorx(RCX, offset, shift as u8);
        self.asm.shift_right(true, false, RCX, RCX, R14);
        if i.has_lock_prefix() {
            self.asm.u8(0xf0);
            return self.asm.op_mem(wide, &[0x0f, opcode], RCX, &Mem::base(R15, 0));
        }
        let operand = Mem::base(R15, 0);
        if wide {
            self.asm.load(R14, &operand)
        } else {
            self.asm.load32(R14, &operand)
        }
        self.asm.op_reg(wide, &[0x0f, opcode], RCX, R14);
        if writes {
            self.asm.op_mem(wide, &[0x89], R14, &operand);
        }
    }
}
