//! What differs outside 64-bit mode: registers, addresses and stack words of 32 bits, segments with a base, short forms.
//!
//! The upper halves of the guest's registers are zero while such code runs, so that a register is an address of the flat
//! segments as it is, and sums are cut to 32 bits by a 32-bit LEA.

use iced_x86::Mnemonic;
use platform::x86::seg;

use super::asm::{Mem, reg::*};
use super::block::{Insn, Translator};
use super::resident;
use crate::jit::context::at;
use crate::state::ZERO;

impl Translator<'_> {
    /// Bytes of a word of the stack.
    pub(super) fn word(&self) -> u32 {
        if self.legacy { 4 } else { 8 }
    }

    /// Loads a word of the stack, or what is as wide.
    pub(super) fn load_word(&mut self, r: u8, mem: &Mem) {
        self.asm.op_mem(!self.legacy, &[0x8b], r, mem);
    }

    /// Stores one.
    pub(super) fn store_word(&mut self, mem: &Mem, r: u8) {
        self.asm.op_mem(!self.legacy, &[0x89], r, mem);
    }

    /// Makes one register another plus a constant, in the width of an address.
    pub(super) fn add_word(&mut self, to: u8, from: u8, disp: i32) {
        self.asm.lea(!self.legacy, to, &Mem::base(from, disp));
    }

    /// Linear address of the memory operand into R15: in a flat segment, or in FS or GS. Uses R14.
    pub(super) fn legacy_address(&mut self, insn: &Insn) {
        let op = &insn.op;
        if usize::from(op.base) == ZERO && usize::from(op.index) == ZERO {
            self.asm.mov_imm(R15, op.disp & 0xffff_ffff);
        } else {
            let terms = self.terms(op, insn.next);
            self.asm.lea(false, R15, &Mem { base: terms.base, index: terms.index, disp: terms.disp });
        }
        let (base, closed) = match usize::from(op.seg) {
            seg::FS => (at!(fs_base), at!(fs_closed)),
            seg::GS => (at!(gs_base), at!(gs_closed)),
            _ => return,
        };
        self.addend = None;
        self.asm.load(R14, &Mem::context(base));
        self.asm.lea(false, R15, &Mem::indexed(R15, R14, 0, 0));
        self.asm.load(R14, &Mem::context(closed));
        self.asm.lea(true, R15, &Mem::indexed(R15, R14, 0, 0));
    }

    /// INC or DEC by the opcodes that are prefixes in 64-bit mode.
    pub(super) fn short_form(&mut self, insn: &Insn) {
        let field = u8::from(insn.instruction.mnemonic() == Mnemonic::Dec);
        if insn.instruction.op0_register().size() == 2 {
            self.asm.u8(0x66);
        }
        self.asm.op_reg(false, &[0xff], field, resident(insn.op.r1).unwrap_or(R15));
    }
}
