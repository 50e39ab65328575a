//! Instructions that load segment registers or look at descriptors.

use iced_x86::{Code, Instruction, OpCodeOperandKind, OpKind, Register};

use super::{Generator, Word};
use crate::layout::*;
use crate::program::{Item, Target};

impl Generator<'_> {
    /// A selector that may be loaded into `register`, almost always.
    fn loadable(&mut self, register: Register) -> u16 {
        use selector as s;
        if self.rng.permille(40) {
            return self.any_selector();
        }
        let stack = register == Register::SS;
        let list: &[u16] = match (self.mode, stack, self.limits.ldt) {
            (Mode::Segmented16, true, _) => &[s::LDT_STACK16],
            (_, true, false) => &[s::DATA],
            (_, true, true) => &[s::DATA, s::DATA, s::DATA, s::LDT_DATA],
            (Mode::Long, false, false) => &[s::DATA, s::CODE64, s::CODE32, 0, 3],
            (Mode::Long, false, true) => {
                &[s::DATA, s::CODE64, s::CODE32, 0, 2, s::LDT_DATA, s::LDT_READ_ONLY, s::LDT_CODE16]
            }
            (Mode::Flat32, false, false) => &[s::DATA, s::CODE32],
            (Mode::Flat32, false, true) => &[s::DATA, s::DATA, s::CODE32, s::LDT_DATA, s::LDT_EXPAND_DOWN],
            (Mode::Segmented16, false, _) => {
                &[s::LDT_DATA, s::LDT_DATA, s::LDT_SHORT, s::LDT_READ_ONLY, s::LDT_EXPAND_DOWN]
            }
        };
        // Null leaves the base of FS and GS to the vendor.
        let based = matches!(register, Register::FS | Register::GS) && self.mode == Mode::Long;
        let selector = self.rng.pick(list);
        if based && selector < 4 { s::DATA } else { selector }
    }

    /// Any selector, good or bad.
    fn any_selector(&mut self) -> u16 {
        use selector as s;
        let all = [
            0,
            s::CODE32,
            s::DATA,
            s::CODE64,
            s::KERNEL_CODE,
            s::KERNEL_DATA,
            s::DATA & !3,
            0x48,
            0x63,
            0xfff8,
            0xffff,
            s::LDT_CODE16,
            s::LDT_DATA,
            s::LDT_STACK16,
            s::LDT_SHORT,
            s::LDT_READ_ONLY,
            s::LDT_EXPAND_DOWN,
            s::LDT_ABSENT,
            s::LDT_CODE32,
        ];
        let count = if self.limits.ldt { all.len() } else { 11 };
        all[self.rng.below(count as u64) as usize]
    }

    /// LAR, LSL, VERR, VERW: the selector in a register or in memory.
    pub(super) fn selector_operand(&mut self, code: Code) {
        let selector = self.any_selector();
        let operand = code.op_code().op_count() - 1;
        let Some(mut instruction) = self.build(code) else { return };
        if instruction.op_kind(operand) == OpKind::Memory {
            self.store_word(&instruction, 0, 2, Word::Value(u64::from(selector)));
        } else {
            let r = instruction.op_register(operand).full_register().number();
            if r == 4 {
                return;
            }
            self.load_constant(r, u64::from(selector));
        }
        instruction.set_code(code);
        self.emit(instruction, Target::None);
    }

    /// MOV to a segment register.
    pub(super) fn load_segment(&mut self, code: Code) {
        let register = self.rng.pick(&[Register::ES, Register::SS, Register::DS, Register::FS, Register::GS]);
        if self.bars(register) {
            return;
        }
        let selector = self.loadable(register);
        let in_memory = self.rng.below(2) == 0;
        let mut instruction = Instruction::default();
        if in_memory {
            let Some(store) = self.memory_only(Code::Mov_rm16_imm16, 2, true) else { return };
            self.store_word(&store, 0, 2, Word::Value(u64::from(selector)));
            self.copy_memory(&mut instruction, &store, 0);
            instruction.set_op_kind(1, OpKind::Memory);
        } else {
            let r = self.rng.pick(&[0usize, 1, 2, 3, 6, 7]);
            let upper = self.rng.next() & 0xffff_0000;
            self.load_constant(r, u64::from(selector) | upper);
            let first = match code.op_code().op1_kind() {
                OpCodeOperandKind::r16_or_mem => Register::AX,
                OpCodeOperandKind::r32_or_mem => Register::EAX,
                _ => Register::RAX,
            };
            instruction.set_op_kind(1, OpKind::Register);
            instruction.set_op_register(1, first + r as u32);
        }
        instruction.set_code(code);
        instruction.set_op_kind(0, OpKind::Register);
        instruction.set_op_register(0, register);
        self.emit(instruction, Target::None);
        self.loaded(register, selector);
    }

    /// Without FSGSBASE the bases cannot be put back after a program.
    fn bars(&self, register: Register) -> bool {
        matches!(register, Register::FS | Register::GS) && !self.limits.fsgsbase
    }

    /// Notes what a segment register holds now.
    fn loaded(&mut self, register: Register, selector: u16) {
        self.state.selectors[register.number()] = Some(selector);
        let base = match selector {
            0..4 => None,
            _ if selector & 4 != 0 => LDT.get(usize::from(selector >> 3)).map(|entry| u64::from(entry.base)),
            _ => Some(0),
        };
        match register {
            Register::FS => self.state.fs_base = base,
            Register::GS => self.state.gs_base = base,
            Register::SS => self.state.known[4] = None,
            _ => {}
        }
    }

    pub(super) fn pop_segment(&mut self, code: Code) {
        let Some(register) = super::super::operand::fixed_register(code.op_code().op0_kind()) else { return };
        if self.bars(register) {
            return;
        }
        let selector = self.loadable(register);
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        instruction.set_op_kind(0, OpKind::Register);
        instruction.set_op_register(0, register);
        let size = u64::from(instruction.stack_pointer_increment().unsigned_abs());
        self.stack_frame(size, &[Word::Value(u64::from(selector))]);
        self.emit(instruction, Target::None);
        self.loaded(register, selector);
    }

    /// LDS, LES, LFS, LGS, LSS.
    pub(super) fn load_far_pointer(&mut self, code: Code) {
        use iced_x86::Mnemonic as M;
        let register = match code.mnemonic() {
            M::Lds => Register::DS,
            M::Les => Register::ES,
            M::Lfs => Register::FS,
            M::Lgs => Register::GS,
            _ => Register::SS,
        };
        if self.bars(register) {
            return;
        }
        let selector = self.loadable(register);
        let Some(mut instruction) = self.build(code) else { return };
        let size = match code.op_code().op0_kind() {
            OpCodeOperandKind::r16_reg => 2,
            OpCodeOperandKind::r32_reg => 4,
            _ => 8,
        };
        self.store_word(&instruction, size, 2, Word::Value(u64::from(selector)));
        instruction.set_code(code);
        self.push(Item::new(instruction, Target::None));
        self.loaded(register, selector);
    }

    /// WRFSBASE, WRGSBASE with a base that helps later instructions, mostly.
    pub(super) fn write_base(&mut self, code: Code) {
        let r = self.rng.pick(&[0usize, 1, 2, 3, 6, 7, 9, 15]);
        let base = if self.rng.permille(900) { DATA + self.rng.below(0x800) } else { self.rng.value() };
        self.load_constant(r, base);
        let wide = code.op_code().op0_kind() == OpCodeOperandKind::r64_rm;
        let register = if wide { Register::RAX } else { Register::EAX } + r as u32;
        let Ok(instruction) = Instruction::with1(code, register) else { return };
        self.emit(instruction, Target::None);
        let base = Some(if wide { base } else { base & 0xffff_ffff });
        match code {
            Code::Wrfsbase_r32 | Code::Wrfsbase_r64 => self.state.fs_base = base,
            _ => self.state.gs_base = base,
        }
    }
}
