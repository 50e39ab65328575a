//! Fills in the operands that an encoding wants.

use iced_x86::{
    Code, EncodingKind, Instruction, MemorySize, Mnemonic, OpAccess, OpCodeInfo, OpCodeOperandKind, OpKind, Register,
    RoundingControl,
};

use super::Generator;
use super::address::Access;
use crate::layout::*;

impl Generator<'_> {
    /// An instruction of an encoding with random operands. `None` if it has operands that are filled in elsewhere.
    pub(super) fn build(&mut self, code: Code) -> Option<Instruction> {
        let info = code.op_code();
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        let unsized_memory = info.op_kinds().iter().any(|&kind| is_register_or_memory(kind));
        let memory = unsized_memory && self.rng.below(20) < 9;
        let mut memory_operand = None;
        for (i, &kind) in info.op_kinds().iter().enumerate() {
            self.operand(&mut instruction, i as u32, kind, memory, &mut memory_operand)?;
        }
        self.decorations(&mut instruction, memory_operand.is_some());
        if let Some(operand) = memory_operand {
            self.keep_pointers();
            let access = self.access(&mut instruction, operand);
            self.memory(&mut instruction, access)?;
        }
        Some(instruction)
    }

    /// Size and kind of the access to the memory operand.
    fn access(&mut self, instruction: &mut Instruction, operand: u32) -> Access {
        // The kind of access does not depend on the address.
        instruction.set_memory_base(if self.mode == Mode::Segmented16 { Register::BX } else { Register::EBX });
        let access = self.info.info(instruction).op_access(operand);
        let writes = !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess);
        let size = match instruction.memory_size() {
            MemorySize::Unknown => 1,
            size => size.size().max(1) as u64,
        };
        let margin = self.bit_index(instruction);
        Access { size, align: self.alignment(instruction, size), writes, margin }
    }

    /// Makes the bit index of BT and the like with memory and a register a small one, almost always. Returns how far the
    /// bit may lie from the operand, in bytes.
    fn bit_index(&mut self, instruction: &Instruction) -> u64 {
        use Mnemonic as M;
        let tests = matches!(instruction.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
        if !tests || instruction.op1_kind() != OpKind::Register {
            return 0;
        }
        const REACH: u64 = 512;
        let r = instruction.op1_register().full_register().number();
        let near = |value: u64| (value as i64).unsigned_abs() < 8 * REACH;
        if r == 4 || self.state.known[r].is_some_and(near) || self.rng.permille(10) {
            return REACH;
        }
        let index = self.rng.below(8 * REACH - 1);
        let index = if self.rng.below(2) == 0 { index } else { index.wrapping_neg() };
        self.load_constant(r, if self.mode == Mode::Long { index } else { index & 0xffff_ffff });
        REACH
    }

    /// Alignment without which the instruction faults.
    fn alignment(&self, instruction: &Instruction, size: u64) -> u64 {
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Cmpxchg16b => 16,
            M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => 16,
            _ if wants_alignment(instruction) => size.next_power_of_two(),
            // Elsewhere a locked access across cache lines may be slowed down or refused by the host's kernel.
            _ if instruction.has_lock_prefix() || instruction.mnemonic() == M::Xchg => {
                if self.limits.amd {
                    1
                } else {
                    size
                }
            }
            _ => 1,
        }
    }

    /// Prefixes that belong to the instruction.
    fn decorations(&mut self, instruction: &mut Instruction, memory: bool) {
        let info = instruction.op_code();
        if memory && info.can_use_lock_prefix() && self.rng.below(5) < 2 && instruction.op0_kind() == OpKind::Memory {
            instruction.set_has_lock_prefix(true);
        }
        if info.encoding() == EncodingKind::EVEX {
            self.evex_decorations(instruction, memory);
        }
        if instruction.is_string_instruction() {
            match self.rng.below(10) {
                0..4 if info.can_use_rep_prefix() => instruction.set_has_rep_prefix(true),
                4..7 if info.can_use_repne_prefix() => instruction.set_has_repne_prefix(true),
                _ => {}
            }
        }
    }

    /// Opmask, zeroing, broadcast, rounding.
    fn evex_decorations(&mut self, instruction: &mut Instruction, memory: bool) {
        let info = instruction.op_code();
        if info.can_use_op_mask_register() && (info.require_op_mask_register() || self.rng.below(3) != 0) {
            let mask = 1 + self.rng.below(7) as u32;
            instruction.set_op_mask(Register::K0 + mask);
            let stores = instruction.op0_kind() == OpKind::Memory;
            if info.can_use_zeroing_masking() && !stores && self.rng.below(2) == 0 {
                instruction.set_zeroing_masking(true);
            }
        }
        if memory && info.can_broadcast() && self.rng.below(3) == 0 {
            instruction.set_is_broadcast(true);
        }
        if !memory && info.can_use_rounding_control() && self.rng.below(3) == 0 {
            use RoundingControl as R;
            instruction.set_rounding_control(self.rng.pick(&[
                R::RoundToNearest,
                R::RoundDown,
                R::RoundUp,
                R::RoundTowardZero,
            ]));
        } else if !memory && info.can_suppress_all_exceptions() && self.rng.below(3) == 0 {
            instruction.set_suppress_all_exceptions(true);
        }
    }

    fn operand(
        &mut self,
        instruction: &mut Instruction,
        i: u32,
        kind: OpCodeOperandKind,
        memory: bool,
        memory_operand: &mut Option<u32>,
    ) -> Option<()> {
        use OpCodeOperandKind as K;
        let destination = i == 0 && instruction.op_code().op_count() > 1;
        if is_memory(kind) || memory && is_register_or_memory(kind) {
            instruction.set_op_kind(i, OpKind::Memory);
            *memory_operand = Some(i);
            return Some(());
        }
        if let Some(size) = gpr_size(kind) {
            let destination = destination || instruction.op_code().op_count() == 1;
            let register = self.general(size, destination);
            set_register(instruction, i, register);
            return Some(());
        }
        if let Some(register) = fixed_register(kind) {
            set_register(instruction, i, register);
            return Some(());
        }
        if let Some(register) = self.vector_register(instruction.op_code(), kind) {
            set_register(instruction, i, register);
            return Some(());
        }
        match kind {
            K::seg_reg => {
                let register = self.rng.pick(&[Register::ES, Register::SS, Register::DS, Register::FS, Register::GS]);
                set_register(instruction, i, register);
            }
            K::cr_reg => set_register(instruction, i, Register::CR0 + self.rng.pick(&[0u32, 2, 3, 4])),
            K::dr_reg => set_register(instruction, i, Register::DR0 + self.rng.pick(&[0u32, 1, 2, 3, 6, 7])),
            K::mem_offs => return self.absolute(instruction, i),
            K::seg_rDI => self.masked_move_target(instruction, i),
            K::seg_rSI | K::es_rDI | K::seg_rBX_al => return None,
            _ => return self.immediate(instruction, i, kind),
        }
        Some(())
    }

    /// A register of the x87, MMX, vector or opmask file.
    fn vector_register(&mut self, info: &OpCodeInfo, kind: OpCodeOperandKind) -> Option<Register> {
        use OpCodeOperandKind as K;
        let long = self.mode == Mode::Long;
        let evex = info.encoding() == EncodingKind::EVEX;
        let count = if long { if evex { 32 } else { 16 } } else { 8 };
        let (first, count) = match kind {
            K::sti_opcode => (Register::ST0, 8),
            K::mm_or_mem | K::mm_reg | K::mm_rm => (Register::MM0, 8),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => (Register::XMM0, count),
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => (Register::YMM0, count),
            K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => (Register::ZMM0, count),
            K::k_or_mem | K::k_reg | K::k_rm | K::k_vvvv => (Register::K0, 8),
            _ => return None,
        };
        // Few registers, so that results are used again.
        let spread = if self.rng.below(4) == 0 { count } else { count.min(6) };
        Some(first + self.rng.below(spread) as u32)
    }

    fn immediate(&mut self, instruction: &mut Instruction, i: u32, kind: OpCodeOperandKind) -> Option<()> {
        use OpCodeOperandKind as K;
        // Small immediates are counts and controls, of which all values matter.
        let value = if self.rng.below(2) == 0 { self.rng.next() } else { self.rng.value() };
        match kind {
            K::imm8 if i > 0 && matches!(instruction.op_kind(i - 1), OpKind::Immediate8 | OpKind::Immediate16) => {
                instruction.set_op_kind(i, OpKind::Immediate8_2nd);
                instruction.set_immediate8_2nd(value as u8);
            }
            K::imm8 => {
                instruction.set_op_kind(i, OpKind::Immediate8);
                instruction.set_immediate8(value as u8);
            }
            K::imm8_const_1 => {
                instruction.set_op_kind(i, OpKind::Immediate8);
                instruction.set_immediate8(1);
            }
            K::imm8sex16 => {
                instruction.set_op_kind(i, OpKind::Immediate8to16);
                instruction.set_immediate8to16(i16::from(value as i8));
            }
            K::imm8sex32 => {
                instruction.set_op_kind(i, OpKind::Immediate8to32);
                instruction.set_immediate8to32(i32::from(value as i8));
            }
            K::imm8sex64 => {
                instruction.set_op_kind(i, OpKind::Immediate8to64);
                instruction.set_immediate8to64(i64::from(value as i8));
            }
            K::imm16 => {
                instruction.set_op_kind(i, OpKind::Immediate16);
                instruction.set_immediate16(value as u16);
            }
            K::imm32 => {
                instruction.set_op_kind(i, OpKind::Immediate32);
                instruction.set_immediate32(value as u32);
            }
            K::imm32sex64 => {
                instruction.set_op_kind(i, OpKind::Immediate32to64);
                instruction.set_immediate32to64(i64::from(value as i32));
            }
            K::imm64 => {
                instruction.set_op_kind(i, OpKind::Immediate64);
                instruction.set_immediate64(value);
            }
            _ => return None,
        }
        Some(())
    }

    /// The address of MOV between the accumulator and memory.
    fn absolute(&mut self, instruction: &mut Instruction, i: u32) -> Option<()> {
        let over = if self.rng.below(4) == 0 { self.rng.pick(&[Register::FS, Register::GS]) } else { Register::None };
        let segment = if over == Register::None { Register::DS } else { over };
        let size = match self.mode {
            Mode::Long => self.rng.pick(&[8u32, 8, 4]),
            Mode::Flat32 => 4,
            Mode::Segmented16 => self.rng.pick(&[2u32, 2, 4]),
        };
        let bytes = instruction.op_code().memory_size().size().max(1) as u64;
        let offset = self.offset(segment, Access { size: bytes, align: 1, writes: i == 0, margin: 0 });
        if size == 4 && offset >> 32 != 0 || size == 2 && offset >> 16 != 0 {
            return None;
        }
        instruction.set_op_kind(i, OpKind::Memory);
        instruction.set_memory_displ_size(size);
        instruction.set_memory_displacement64(offset);
        instruction.set_segment_prefix(over);
        Some(())
    }

    /// A general-purpose register. As a destination, the stack pointer and registers that hold useful addresses are
    /// taken less often.
    pub(super) fn general(&mut self, size: u32, destination: bool) -> Register {
        let count = if self.mode == Mode::Long { 16 } else { 8 };
        let mut r = self.rng.below(count) as u32;
        for _ in 0..4 {
            let pointer = self.state.known[r as usize].is_some_and(|value| value.wrapping_sub(DATA - PAGE) < 4 * PAGE);
            let avoid = r == 4 && !self.rng.permille(15) || pointer && self.rng.below(3) != 0;
            if !destination || !avoid {
                break;
            }
            r = self.rng.below(count) as u32;
        }
        if destination && r == 4 && !self.rng.permille(100) {
            r = 0;
        }
        match size {
            1 => self.byte_register(r),
            2 => Register::AX + r,
            4 => Register::EAX + r,
            _ => Register::RAX + r,
        }
    }

    fn byte_register(&mut self, r: u32) -> Register {
        if self.mode != Mode::Long {
            return Register::AL + r;
        }
        match r {
            0..4 if self.rng.below(3) == 0 => Register::AH + r,
            0..4 => Register::AL + r,
            4..8 => Register::SPL + (r - 4),
            _ => Register::R8L + (r - 8),
        }
    }
}

/// Whether a vector access must be aligned.
fn wants_alignment(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let unaligned = matches!(instruction.mnemonic(), M::Movups | M::Movupd | M::Movdqu | M::Lddqu);
    match instruction.encoding() {
        EncodingKind::Legacy => instruction.memory_size().size() == 16 && !unaligned,
        _ => matches!(
            instruction.mnemonic(),
            M::Vmovaps
                | M::Vmovapd
                | M::Vmovdqa
                | M::Vmovdqa32
                | M::Vmovdqa64
                | M::Vmovntps
                | M::Vmovntpd
                | M::Vmovntdq
                | M::Vmovntdqa
        ),
    }
}

fn set_register(instruction: &mut Instruction, i: u32, register: Register) {
    instruction.set_op_kind(i, OpKind::Register);
    instruction.set_op_register(i, register);
}

/// Size of a general-purpose register operand in bytes.
fn gpr_size(kind: OpCodeOperandKind) -> Option<u32> {
    use OpCodeOperandKind as K;
    Some(match kind {
        K::r8_or_mem | K::r8_reg | K::r8_opcode => 1,
        K::r16_or_mem | K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => 2,
        K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv => 4,
        K::r64_or_mem | K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv => 8,
        _ => return None,
    })
}

pub(super) fn fixed_register(kind: OpCodeOperandKind) -> Option<Register> {
    use OpCodeOperandKind as K;
    Some(match kind {
        K::es => Register::ES,
        K::cs => Register::CS,
        K::ss => Register::SS,
        K::ds => Register::DS,
        K::fs => Register::FS,
        K::gs => Register::GS,
        K::al => Register::AL,
        K::cl => Register::CL,
        K::ax => Register::AX,
        K::dx => Register::DX,
        K::eax => Register::EAX,
        K::rax => Register::RAX,
        K::st0 => Register::ST0,
        _ => return None,
    })
}

fn is_memory(kind: OpCodeOperandKind) -> bool {
    kind == OpCodeOperandKind::mem
}

pub(crate) fn is_register_or_memory(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(
        kind,
        K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::zmm_or_mem
            | K::k_or_mem
    )
}
