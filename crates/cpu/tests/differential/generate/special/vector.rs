//! Vector and x87 instructions whose memory holds something special, or whose addresses come from a vector.

use iced_x86::{Code, Instruction, OpCodeOperandKind, OpKind, Register};

use super::{Generator, Word};
use crate::generate::address::Access;
use crate::layout::*;
use crate::program::{Item, Target};
use crate::vector::{control_word, mxcsr};

impl Generator<'_> {
    /// The implicit destination of MASKMOVQ and MASKMOVDQU: DS:rDI, or another segment.
    pub(in crate::generate) fn masked_move_target(&mut self, instruction: &mut Instruction, i: u32) {
        let size = self.address_size_of_strings();
        let over = self.string_override();
        let segment = if over == Register::None { Register::DS } else { over };
        self.point(7, segment, Access { size: 16, align: 1, writes: true, margin: 0 });
        instruction.set_op_kind(
            i,
            match size {
                8 => OpKind::MemorySegRDI,
                4 => OpKind::MemorySegEDI,
                _ => OpKind::MemorySegDI,
            },
        );
        instruction.set_segment_prefix(over);
    }

    /// An MXCSR without reserved bits, mostly.
    pub(super) fn load_mxcsr(&mut self, code: Code) {
        let Some(instruction) = self.build(code) else { return };
        if self.rng.permille(900) {
            let value = mxcsr(&mut self.rng);
            self.store_word(&instruction, 0, 4, Word::Value(u64::from(value)));
        }
        self.emit(instruction, Target::None);
    }

    pub(super) fn load_control_word(&mut self, code: Code) {
        let Some(instruction) = self.build(code) else { return };
        if self.rng.permille(900) {
            let value = control_word(&mut self.rng);
            self.store_word(&instruction, 0, 2, Word::Value(u64::from(value)));
        }
        self.emit(instruction, Target::None);
    }

    /// FXRSTOR of an image that FXSAVE made, with a few changes.
    pub(super) fn restore_image(&mut self, code: Code) {
        let Some(instruction) = self.build(code) else { return };
        self.note_pointers();
        let mut save = instruction;
        save.set_code(match code {
            Code::Fxrstor64_m512byte => Code::Fxsave64_m512byte,
            _ => Code::Fxsave_m512byte,
        });
        self.push(Item::new(save, Target::None));
        for _ in 0..self.rng.below(4) {
            let at = 32 + 4 * self.rng.below(100);
            let value = self.rng.value();
            self.store_word(&instruction, at, 4, Word::Value(value));
        }
        let value = mxcsr(&mut self.rng);
        self.store_word(&instruction, 24, 4, Word::Value(u64::from(value)));
        self.push(Item::new(instruction, Target::None));
    }

    /// What FNSTENV and its kin store includes the last instruction and operand: of this program, not of the host.
    pub(super) fn save_environment(&mut self, code: Code) {
        self.note_pointers();
        self.plain(code);
    }

    /// An x87 instruction with a memory operand.
    fn note_pointers(&mut self) {
        self.plain(Code::Fild_m16int);
    }

    /// Gathers and scatters: the index vector mostly has small numbers.
    pub(super) fn gather(&mut self, code: Code) {
        let info = code.op_code();
        let mut numbers: Vec<u32> = (0..8).collect();
        let mut take = |g: &mut Self| numbers.swap_remove(g.rng.below(numbers.len() as u64) as usize);
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        let index = take(self);
        let mut wide = false;
        let mut first = Register::XMM0;
        for (i, &kind) in info.op_kinds().iter().enumerate() {
            let i = i as u32;
            use OpCodeOperandKind as K;
            match kind {
                K::mem_vsib32x | K::mem_vsib32y | K::mem_vsib32z | K::mem_vsib64x | K::mem_vsib64y | K::mem_vsib64z => {
                    instruction.set_op_kind(i, OpKind::Memory);
                    wide = matches!(kind, K::mem_vsib64x | K::mem_vsib64y | K::mem_vsib64z);
                    first = match kind {
                        K::mem_vsib32x | K::mem_vsib64x => Register::XMM0,
                        K::mem_vsib32y | K::mem_vsib64y => Register::YMM0,
                        _ => Register::ZMM0,
                    };
                }
                K::xmm_reg | K::xmm_vvvv => set(&mut instruction, i, Register::XMM0 + take(self)),
                K::ymm_reg | K::ymm_vvvv => set(&mut instruction, i, Register::YMM0 + take(self)),
                K::zmm_reg | K::zmm_vvvv => set(&mut instruction, i, Register::ZMM0 + take(self)),
                _ => return,
            }
        }
        if info.can_use_op_mask_register() {
            instruction.set_op_mask(Register::K1 + self.rng.below(7) as u32);
        }
        if !self.rng.permille(50) {
            self.load_index(first + index, wide);
        }
        self.vector_address(&mut instruction, first + index);
        self.push(Item::new(instruction, Target::None));
    }

    /// Small numbers for an index vector: bytes of the constants, extended.
    fn load_index(&mut self, register: Register, wide: bool) {
        let code = match (register.size(), wide) {
            (16, false) => Code::VEX_Vpmovzxbd_xmm_xmmm32,
            (16, true) => Code::VEX_Vpmovzxbq_xmm_xmmm16,
            (32, false) => Code::VEX_Vpmovzxbd_ymm_xmmm64,
            (32, true) => Code::VEX_Vpmovzxbq_ymm_xmmm32,
            (_, false) => Code::EVEX_Vpmovzxbd_zmm_k1z_xmmm128,
            (_, true) => Code::EVEX_Vpmovzxbq_zmm_k1z_xmmm64,
        };
        let mut load = Instruction::default();
        load.set_code(code);
        set(&mut load, 0, register);
        load.set_op_kind(1, OpKind::Memory);
        load.set_memory_displ_size(if self.mode == Mode::Long { 8 } else { 4 });
        load.set_memory_displacement64(CONSTANTS + self.rng.below(PAGE - 16));
        self.push(Item::new(load, Target::None));
    }

    /// The address of a gather: a base in the data area, mostly far enough from its end.
    fn vector_address(&mut self, instruction: &mut Instruction, index: Register) {
        let base = self.rng.pick(&[0usize, 1, 2, 3, 6, 7]);
        let scale = 1u64 << self.rng.below(4);
        let room = if self.rng.permille(60) { DATA_LEN as u64 } else { DATA_LEN as u64 - 256 * scale - 8 };
        let at = DATA + self.rng.below(room);
        let displacement = self.rng.pick(&[0i64, 4, -8, 100, -200, 4096]);
        self.load_constant(base, at.wrapping_sub(displacement as u64));
        let first = if self.mode == Mode::Long { Register::RAX } else { Register::EAX };
        instruction.set_memory_base(first + base as u32);
        instruction.set_memory_index(index);
        instruction.set_memory_index_scale(scale as u32);
        instruction.set_memory_displacement64(displacement as u64);
        instruction.set_memory_displ_size(1);
    }
}

fn set(instruction: &mut Instruction, i: u32, register: Register) {
    instruction.set_op_kind(i, OpKind::Register);
    instruction.set_op_register(i, register);
}

/// A memory operand whose addresses come from a vector.
pub(super) fn is_gathered(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(kind, K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y | K::mem_vsib32z | K::mem_vsib64z)
}
