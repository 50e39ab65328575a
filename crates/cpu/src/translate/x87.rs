//! x87 instructions on the host's x87 registers.
//!
//! The interpreter leaves the guest's registers in the host's for as long as it can, and so does emitted code: the first x87
//! instruction of a block looks whether they are there and all exceptions are masked, and is the interpreter's if not. Nothing
//! can be raised then, and behind a call of the interpreter the registers are brought back.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpCodeTableKind, OpKind};
use platform::x86::{Segment, seg};

use super::asm::{Mem, reg::*};
use super::block::{Insn, Translator};
use super::classify::{How, uses_memory};
use super::rewrite::writes;
use super::vector::level;
use crate::Vcpu;
use crate::decode::op_flag;
use crate::interp::fpu::FpuState;
use crate::jit::context::at;

/// An x87 instruction that the vCPU is still to be told of (SDM vol. 1, 8.1.8).
#[derive(Clone, Copy)]
pub(crate) struct Last {
    /// Offset in the page.
    start: u32,
    opcode: u16,
    /// Segment of the last memory operand.
    operand: Option<usize>,
}

/// Whether the instruction is one of x87.
pub(super) fn is_x87(i: &Instruction) -> bool {
    let code = i.op_code();
    let first = if code.op_code_len() == 2 { code.op_code() >> 8 } else { code.op_code() };
    i.mnemonic() == Mnemonic::Wait || code.table() == OpCodeTableKind::Normal && matches!(first, 0xd8..=0xdf)
}

/// Whether it runs here, at a level of [`level`]: exactly when SSE instructions do, x87 instructions are not refused either.
pub(super) fn form(i: &Instruction, available: u8, legacy: bool) -> How {
    use Mnemonic as N;
    let own = matches!(
        i.mnemonic(),
        N::Fninit | N::Fnstenv | N::Fldenv | N::Fnsave | N::Frstor | N::Fneni | N::Fndisi | N::Fnsetpm
    );
    let sized = !uses_memory(i) || matches!(i.memory_size().size(), 2 | 4 | 8 | 10);
    use iced_x86::Register as R;
    let segment = i.memory_segment();
    let far = uses_memory(i) && (matches!(segment, R::FS | R::GS) || legacy && !matches!(segment, R::DS | R::SS));
    if available < level::SSE || own || !sized || far { How::Interpret } else { How::X87 }
}

/// Control instructions, which the CPU does not note.
fn is_control(mnemonic: Mnemonic) -> bool {
    use Mnemonic as N;
    matches!(mnemonic, N::Fldcw | N::Fnstcw | N::Fnstsw | N::Fnclex | N::Wait)
}

impl Translator<'_> {
    /// Makes sure that emitted code may use the x87 registers; else `insn` is the interpreter's. Uses RCX.
    pub(super) fn want_x87(&mut self, insn: &Insn) {
        if std::mem::replace(&mut self.x87_ready, true) {
            return;
        }
        self.asm.load(RCX, &Mem::context(at!(fpu)));
        // MOVZX ECX, byte [RCX + reserved]
        self.asm.op_mem(false, &[0x0f, 0xb6], RCX, &Mem::base(RCX, FpuState::RESERVED as i32));
        let ready = self.asm.jrcxz();
        let absent = self.asm.jmp_forward();
        self.slow_path(insn, absent, false);
        self.asm.bind(ready);
    }

    /// Emits an x87 instruction.
    pub(super) fn x87(&mut self, insn: &Insn) {
        let i = &insn.instruction;
        self.want_x87(insn);
        let bytes = self.bytes;
        let bytes = &bytes[insn.at..insn.at + usize::from(insn.op.len)];
        let at = bytes.iter().position(|byte| (0xd8..=0xdf).contains(byte));
        let Some(&[opcode, modrm, ..]) = at.and_then(|at| bytes.get(at..)) else {
            // FWAIT: nothing is pending.
            return;
        };
        if uses_memory(i) {
            let operand = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory).unwrap_or(0);
            let write = writes(self.access_of(insn, operand));
            self.address(insn);
            self.check(insn, i.memory_size().size() as u32, write);
            if i.mnemonic() == Mnemonic::Fldcw {
                self.masks_all(insn);
            }
            self.asm.op_mem(false, &[opcode], modrm >> 3 & 7, &Self::operand());
        } else {
            self.asm.put(&[opcode, modrm]);
        }
        if !is_control(i.mnemonic()) {
            self.remember_x87(insn, u16::from(opcode & 7) << 8 | u16::from(modrm));
        }
    }

    /// To the slow path unless the control word that is the operand masks all exceptions. Uses RCX.
    fn masks_all(&mut self, insn: &Insn) {
        // MOVZX ECX, byte [operand]: bits 5:0 are the masks, bit 6 is 1 or 0, bit 7 is 0.
        self.asm.op_mem(false, &[0x0f, 0xb6], RCX, &Self::operand());
        self.asm.lea(true, RCX, &Mem::base(RCX, -0x7f));
        let usual = self.asm.jrcxz();
        self.asm.lea(true, RCX, &Mem::base(RCX, 0x40));
        let other = self.asm.jrcxz();
        let unmasks = self.asm.jmp_forward();
        self.slow_path(insn, unmasks, false);
        self.asm.bind(usual);
        self.asm.bind(other);
    }

    /// Notes the instruction and its operand's address; the linear address in R15 is the offset. Uses RCX.
    fn remember_x87(&mut self, insn: &Insn, opcode: u16) {
        let mut operand = self.x87_last.and_then(|last| last.operand);
        if uses_memory(&insn.instruction) && self.notes_operands {
            let [_, _, _, _, fdp] = FpuState::POINTERS;
            self.asm.load(RCX, &Mem::context(at!(fpu)));
            self.asm.store(&Mem::base(RCX, fdp as i32), R15);
            operand = Some(if insn.op.flags & op_flag::STACK != 0 { seg::SS } else { seg::DS });
        }
        self.x87_last = Some(Last { start: insn.start, opcode, operand });
    }

    /// As [`Translator::note_x87`], keeping R15.
    pub(super) fn note_x87_keeping_address(&mut self) {
        self.asm.store(&Mem::context(at!(scratch)), R15);
        self.note_x87();
        self.asm.load(R15, &Mem::context(at!(scratch)));
    }

    /// Tells the vCPU of the last x87 instruction. Uses RCX, R14, R15; keeps flags.
    pub(super) fn note_x87(&mut self) {
        let Some(last) = self.x87_last.take() else { return };
        self.addend = None;
        let [fop, fip, fcs, fds, _] = FpuState::POINTERS;
        self.asm.load(RCX, &Mem::context(at!(fpu)));
        self.asm.load(R14, &Mem::context(at!(page)));
        self.asm.lea(true, R14, &Mem::base(R14, last.start as i32));
        self.asm.store(&Mem::base(RCX, fip as i32), R14);
        // MOV word [RCX + fop], imm16
        self.asm.u8(0x66);
        self.asm.op_mem(false, &[0xc7], 0, &Mem::base(RCX, fop as i32));
        self.asm.put(&last.opcode.to_le_bytes());
        self.asm.load(R14, &Mem::context(at!(vcpu)));
        for (index, field) in [(Some(seg::CS), fcs), (last.operand, fds)] {
            let Some(index) = index else { continue };
            let selector = offset_of!(Vcpu, segments) + index * size_of::<Segment>() + offset_of!(Segment, selector);
            self.asm.op_mem(false, &[0x0f, 0xb7], R15, &Mem::base(R14, selector as i32));
            self.asm.u8(0x66);
            self.asm.op_mem(false, &[0x89], R15, &Mem::base(RCX, field as i32));
        }
    }
}
