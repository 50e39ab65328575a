//! Where a check need not keep the flags: something overwrites all of them before anything reads them. If the check fails, a
//! fault's frame may show them all the same, so that they are worked out once more from the registers of the instruction that
//! made them.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpKind, RflagsBits};

use super::asm::reg::*;
use super::block::{Insn, Translator};
use super::classify::{How, is_high, uses_memory};
use super::rewrite::{number, written_registers};
use super::share::touches_registers_only;

/// Instructions that are looked at for what happens to the flags.
const AHEAD: usize = 12;
/// The arithmetic flags.
const ALL: u32 = RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// How flags are worked out again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Operation {
    Compare,
    Test,
    /// The sum is there already: it is undone first.
    Add,
    /// The same of a difference.
    Subtract,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Register(u8),
    Immediate(i32),
}

/// An instruction whose flags can be worked out from the registers as it left them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Recovery {
    operation: Operation,
    /// Operand size in bytes.
    size: usize,
    target: u8,
    source: Source,
}

impl Recovery {
    fn of(i: &Instruction) -> Option<Self> {
        let size = i.op0_register().size();
        if i.op_count() != 2 || i.op0_kind() != OpKind::Register || !matches!(size, 1 | 4 | 8) {
            return None;
        }
        let low = |r: iced_x86::Register| r.is_gpr() && (r.size() != 1 || !is_high(r));
        let source = match i.op1_kind() {
            OpKind::Register if low(i.op1_register()) => Source::Register(number(i.op1_register())),
            OpKind::Immediate8
            | OpKind::Immediate32
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => Source::Immediate(i.immediate(1) as i32),
            _ => return None,
        };
        if !low(i.op0_register()) {
            return None;
        }
        let target = number(i.op0_register());
        let (operation, source) = match i.mnemonic() {
            Mnemonic::Cmp => (Operation::Compare, source),
            Mnemonic::Test => (Operation::Test, source),
            Mnemonic::And | Mnemonic::Or | Mnemonic::Xor => (Operation::Test, Source::Register(target)),
            Mnemonic::Add if source != Source::Register(target) => (Operation::Add, source),
            Mnemonic::Sub if source != Source::Register(target) => (Operation::Subtract, source),
            _ => return None,
        };
        Some(Self { operation, size, target, source })
    }

    fn reads(&self, guest: u8) -> bool {
        self.target == guest || self.source == Source::Register(guest)
    }
}

/// Notes in the instructions of a block which of them may do without the flags during their checks.
pub(super) fn plan(insns: &mut [Insn], info: &mut InstructionInfoFactory) {
    // What the flags in front of each instruction can be worked out from, if anything.
    let mut origins: Vec<Option<Recovery>> = Vec::with_capacity(insns.len());
    let mut origin = None;
    for insn in insns.iter() {
        origins.push(origin);
        origin = follow(origin, insn, info);
    }
    for n in 0..insns.len() {
        if has_checks(&insns[n]) && is_overwritten(&insns[n..], &origins[n..]) {
            insns[n].recovery = origins[n];
        }
    }
}

/// What the flags behind an instruction can be worked out from.
fn follow(origin: Option<Recovery>, insn: &Insn, info: &mut InstructionInfoFactory) -> Option<Recovery> {
    let i = &insn.instruction;
    if !has_checks(insn) && !touches_registers_only(insn) && !is_forward_branch(insn) {
        return None;
    }
    if i.rflags_modified() & ALL != 0 {
        return Recovery::of(i);
    }
    let origin = origin?;
    let keeps = !written_registers(i, info).any(|guest| origin.reads(guest));
    keeps.then_some(origin)
}

/// An instruction that emitted code runs with one check, or none.
fn has_checks(insn: &Insn) -> bool {
    match insn.how {
        How::Rewrite => uses_memory(&insn.instruction),
        How::Push | How::Pop | How::Leave => true,
        _ => false,
    }
}

fn is_forward_branch(insn: &Insn) -> bool {
    insn.how == How::Branch && insn.instruction.is_jcc_short_or_near()
}

/// Whether all flags are overwritten before they are read, and can be recovered wherever the block may be left until then.
fn is_overwritten(insns: &[Insn], origins: &[Option<Recovery>]) -> bool {
    if origins[0].is_none() {
        return false;
    }
    for (insn, origin) in insns.iter().zip(origins).take(AHEAD) {
        let i = &insn.instruction;
        let stays = touches_registers_only(insn) || has_checks(insn) && *origin == origins[0];
        if !stays || i.rflags_read() & ALL != 0 {
            return false;
        }
        let overwrites = matches!(
            i.mnemonic(),
            Mnemonic::Add
                | Mnemonic::Sub
                | Mnemonic::And
                | Mnemonic::Or
                | Mnemonic::Xor
                | Mnemonic::Cmp
                | Mnemonic::Test
        );
        if overwrites {
            return true;
        }
    }
    false
}

impl Translator<'_> {
    /// Works the flags out once more. Uses RCX and R14.
    pub(super) fn recover_flags(&mut self, recovery: &Recovery) {
        let target = self.in_register(recovery.target, RCX);
        let source = match recovery.source {
            Source::Register(guest) => Some(self.in_register(guest, R14)),
            Source::Immediate(_) => None,
        };
        // Opcode of the form with two registers, and field of the form with an immediate.
        let (add, sub, cmp, test) = ((0x00, 0), (0x28, 5), (0x38, 7), (0x84, 0));
        let operations = match recovery.operation {
            Operation::Compare => [None, Some(cmp)],
            Operation::Test => [None, Some(test)],
            Operation::Add => [Some(sub), Some(add)],
            Operation::Subtract => [Some(add), Some(sub)],
        };
        for (opcode, field) in operations.into_iter().flatten() {
            let wide = u8::from(recovery.size != 1);
            let rex = |reg: u8, rm: u8| 0x40 | u8::from(recovery.size == 8) << 3 | (reg >> 3 & 1) << 2 | rm >> 3 & 1;
            match (source, recovery.source) {
                (Some(source), _) => {
                    self.asm.put(&[rex(source, target), opcode | wide, 0xc0 | (source & 7) << 3 | target & 7]);
                }
                (None, Source::Immediate(value)) => {
                    let group = if opcode == test.0 { 0xf6 } else { 0x80 };
                    self.asm.put(&[rex(0, target), group | wide, 0xc0 | field << 3 | target & 7]);
                    self.asm.put(&value.to_le_bytes()[..if wide == 1 { 4 } else { 1 }]);
                }
                (None, Source::Register(_)) => {}
            }
        }
    }

    /// Jumps if RCX is not below 4096, or not a multiple of `alignment`; does not keep the flags.
    pub(super) fn jump_if_beyond(&mut self, alignment: u32) -> super::asm::Fixup {
        // TEST RCX, imm32
        self.asm.put(&[0x48, 0xf7, 0xc1]);
        self.asm.u32(0xffff_f000 | (alignment - 1));
        self.asm.jcc_forward(super::asm::cond::NZ)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recovery(bytes: &[u8]) -> Option<Recovery> {
        Recovery::of(&iced_x86::Decoder::new(64, bytes, iced_x86::DecoderOptions::NONE).decode())
    }

    #[test]
    fn only_what_registers_still_tell_is_recovered() {
        let register = |operation, size, target, source| Some(Recovery { operation, size, target, source });
        for (bytes, expected) in [
            // CMP RAX, RBX; CMP R9D, -1; TEST SIL, SIL; XOR EDX, ECX; ADD RAX, 16; SUB R8, R9
            (&[0x48u8, 0x39, 0xd8][..], register(Operation::Compare, 8, 0, Source::Register(3))),
            (&[0x41, 0x83, 0xf9, 0xff], register(Operation::Compare, 4, 9, Source::Immediate(-1))),
            (&[0x40, 0x84, 0xf6], register(Operation::Test, 1, 6, Source::Register(6))),
            (&[0x31, 0xca], register(Operation::Test, 4, 2, Source::Register(2))),
            (&[0x48, 0x83, 0xc0, 0x10], register(Operation::Add, 8, 0, Source::Immediate(16))),
            (&[0x4d, 0x29, 0xc8], register(Operation::Subtract, 8, 8, Source::Register(9))),
            // ADD RAX, RAX; INC RAX; CMP AH, 1; CMP AX, BX; SHL RAX, 1; CMP RAX, [RBX]; ADC RAX, RBX
            (&[0x48, 0x01, 0xc0], None),
            (&[0x48, 0xff, 0xc0], None),
            (&[0x80, 0xfc, 0x01], None),
            (&[0x66, 0x39, 0xd8], None),
            (&[0x48, 0xd1, 0xe0], None),
            (&[0x48, 0x3b, 0x03], None),
            (&[0x48, 0x11, 0xd8], None),
        ] {
            assert_eq!(recovery(bytes), expected, "{bytes:x?}");
        }
    }
}
