//! Control flow: near and far branches, returns, loops, software interrupts.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register};

use super::{Generator, Word};
use crate::layout::*;
use crate::program::{Item, Target};

impl Generator<'_> {
    /// A conditional or unconditional branch, or call, a few groups ahead.
    pub(super) fn near_branch(&mut self, code: Code) {
        use OpCodeOperandKind as K;
        let kind = match code.op_code().op0_kind() {
            K::br16_1 | K::br16_2 => OpKind::NearBranch16,
            K::br32_1 | K::br32_4 => OpKind::NearBranch32,
            _ => OpKind::NearBranch64,
        };
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        instruction.set_op_kind(0, kind);
        match code.mnemonic() {
            Mnemonic::Call => self.ensure_stack(),
            Mnemonic::Loop
            | Mnemonic::Loope
            | Mnemonic::Loopne
            | Mnemonic::Jcxz
            | Mnemonic::Jecxz
            | Mnemonic::Jrcxz
                if self.rng.below(2) == 0 =>
            {
                let count = self.rng.below(3);
                self.load_constant(1, count);
            }
            _ => {}
        }
        let cut = kind == OpKind::NearBranch16 && self.mode != Mode::Segmented16;
        self.emit(instruction, if cut { Target::Branch16(0) } else { Target::Branch(0) });
        self.join_ahead(self.items.len() - 1);
        if cut && matches!(code.mnemonic(), Mnemonic::Call | Mnemonic::Jmp) {
            self.ended = true;
        }
    }

    /// Whether an instruction pointer of this operand size reaches the code.
    fn reaches(&self, size: u64) -> bool {
        size > 2 || self.mode == Mode::Segmented16
    }

    fn operand_bytes(code: Code) -> u64 {
        match code.op_code().op0_kind() {
            OpCodeOperandKind::r16_or_mem => 2,
            OpCodeOperandKind::r32_or_mem => 4,
            _ => 8,
        }
    }

    /// JMP and CALL through a register or memory.
    pub(super) fn near_indirect(&mut self, code: Code) {
        let size = Self::operand_bytes(code);
        if code.mnemonic() == Mnemonic::Call {
            self.ensure_stack();
        }
        let (instruction, label) = if self.rng.below(2) == 0 {
            let Some(instruction) = self.memory_only(code, size, true) else { return };
            let label = self.store_word(&instruction, 0, size, Word::Label);
            (instruction, label)
        } else {
            let r = self.rng.pick(&[0u32, 1, 2, 3, 6, 7]);
            let label = self.load_label(r);
            let register = match size {
                2 => Register::AX,
                4 => Register::EAX,
                _ => Register::RAX,
            } + r;
            let Ok(instruction) = Instruction::with1(code, register) else { return };
            (instruction, label)
        };
        self.push(Item::new(instruction, Target::None));
        self.join_ahead(label);
        self.ended |= !self.reaches(size);
    }

    /// Loads the address of an instruction to come. Returns the item that holds it.
    fn load_label(&mut self, r: u32) -> usize {
        if self.mode == Mode::Long && self.rng.below(2) == 0 {
            let mut lea = Instruction::default();
            lea.set_code(Code::Lea_r64_m);
            lea.set_op_kind(0, OpKind::Register);
            lea.set_op_register(0, Register::RAX + r);
            lea.set_op_kind(1, OpKind::Memory);
            lea.set_memory_base(Register::RIP);
            lea.set_memory_displ_size(8);
            self.push(Item::new(lea, Target::Memory(0)));
        } else {
            let mov = Instruction::with2(Code::Mov_r32_imm32, Register::EAX + r, 0u32);
            self.push(Item::new(mov.expect("MOV takes a register and an immediate"), Target::Immediate(1, 0)));
        }
        self.state.known[r as usize] = None;
        self.items.len() - 1
    }

    /// RET to a label on the stack.
    pub(super) fn near_return(&mut self, code: Code) {
        let size = match code {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            _ => 8,
        };
        let Some(label) = self.stack_frame(size, &[Word::Label]) else { return };
        let release = match self.rng.below(8) {
            0 => self.rng.value() as u32 & 0xffff,
            _ => self.rng.below(64) as u32,
        };
        self.emit_return(code, release);
        self.join_ahead(label);
        self.ended |= !self.reaches(size);
    }

    fn emit_return(&mut self, code: Code, release: u32) {
        let instruction = match code.op_code().op_count() {
            0 => Ok(Instruction::with(code)),
            _ => Instruction::with1(code, release),
        };
        if let Ok(instruction) = instruction {
            self.push(Item::new(instruction, Target::None));
        }
    }

    // ------------------------------------------------------------ far

    /// A code selector: mostly that of the program itself.
    fn code_selector(&mut self) -> u16 {
        use selector as s;
        let own = self.state.selectors[1].unwrap_or(s::CODE64);
        match self.rng.below(16) {
            0 => {
                self.rng.pick(&[0, 3, s::KERNEL_CODE, s::KERNEL_CODE | 3, s::DATA, s::LDT_DATA, s::LDT_ABSENT, 0xfff8])
            }
            1 => own & !3,
            _ => own,
        }
    }

    /// Operand size of a far branch in bytes.
    fn far_size(code: Code) -> u64 {
        match code {
            Code::Jmp_m1616 | Code::Call_m1616 | Code::Jmp_ptr1616 | Code::Call_ptr1616 => 2,
            Code::Jmp_m1664 | Code::Call_m1664 => 8,
            _ => 4,
        }
    }

    pub(super) fn far_indirect(&mut self, code: Code) {
        let size = Self::far_size(code);
        let selector = self.code_selector();
        if code.mnemonic() == Mnemonic::Call {
            self.ensure_stack();
        }
        let Some(instruction) = self.memory_only(code, size + 2, true) else { return };
        let label = self.store_word(&instruction, 0, size, Word::Label);
        self.store_word(&instruction, size, 2, Word::Value(u64::from(selector)));
        self.push(Item::new(instruction, Target::None));
        self.join_ahead(label);
        self.ended |= !self.reaches(size);
    }

    pub(super) fn far_direct(&mut self, code: Code) {
        let size = Self::far_size(code);
        let selector = self.code_selector();
        if code.mnemonic() == Mnemonic::Call {
            self.ensure_stack();
        }
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        instruction.set_op_kind(0, if size == 2 { OpKind::FarBranch16 } else { OpKind::FarBranch32 });
        instruction.set_far_branch_selector(selector);
        self.push(Item::new(instruction, Target::Far(0)));
        self.join_ahead(self.items.len() - 1);
        self.ended |= !self.reaches(size);
    }

    pub(super) fn far_return(&mut self, code: Code) {
        let size = match code {
            Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Retfd | Code::Retfd_imm16 => 4,
            _ => 8,
        };
        let selector = u64::from(self.code_selector());
        let Some(label) = self.stack_frame(size, &[Word::Label, Word::Value(selector)]) else { return };
        // Not far, and aligned: processors read an outer stack pointer before or after they look at the selector.
        let release = 8 * self.rng.below(8) as u32;
        self.emit_return(code, release);
        self.join_ahead(label);
        self.ended |= !self.reaches(size);
    }

    pub(super) fn interrupt_return(&mut self, code: Code) {
        let size = match code.mnemonic() {
            Mnemonic::Iret => 2,
            Mnemonic::Iretd => 4,
            _ => 8,
        };
        let selector = u64::from(self.code_selector());
        let flags = self.flags_value();
        let stack = self.stack_value();
        let data = u64::from(self.state.selectors[2].unwrap_or(selector::DATA));
        let words = [
            Word::Label,
            Word::Value(selector),
            Word::Value(flags),
            Word::Value(stack),
            Word::Value(if self.rng.below(16) == 0 { u64::from(selector::KERNEL_DATA) } else { data }),
        ];
        // Only 64-bit mode pops the stack pointer without a change of privilege.
        let count = if self.mode == Mode::Long { 5 } else { 3 };
        let Some(label) = self.stack_frame(size, &words[..count]) else { return };
        self.push(Item::new(Instruction::with(code), Target::None));
        self.state.known[4] = None;
        self.join_ahead(label);
        self.ended |= !self.reaches(size);
    }

    // ------------------------------------------------------------ loops

    /// A short loop that runs a few times.
    pub(super) fn backward_loop(&mut self) {
        let loops: Vec<Code> = self
            .codes
            .complete
            .iter()
            .copied()
            .filter(|code| {
                let full = match self.mode {
                    Mode::Long => OpCodeOperandKind::br64_1,
                    Mode::Flat32 => OpCodeOperandKind::br32_1,
                    Mode::Segmented16 => OpCodeOperandKind::br16_1,
                };
                matches!(code.mnemonic(), Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne)
                    && code.op_code().op0_kind() == full
            })
            .collect();
        if loops.is_empty() || self.ended {
            return;
        }
        let code = self.rng.pick(&loops);
        let count = 1 + self.rng.below(6);
        self.load_constant(1, count);
        let top = self.items.len();
        const BODY: [Code; 8] = [
            Code::Add_r32_rm32,
            Code::Sub_rm32_r32,
            Code::Xor_r32_rm32,
            Code::Imul_r32_rm32,
            Code::Mov_r8_rm8,
            Code::Xchg_rm16_r16,
            Code::Sbb_r32_rm32,
            Code::Bts_rm32_r32,
        ];
        const USED: [usize; 4] = [0, 2, 3, 6];
        self.define_flags();
        for _ in 0..1 + self.rng.below(3) {
            let body = self.rng.pick(&BODY);
            let first = match body.op_code().op0_kind() {
                OpCodeOperandKind::r8_reg => Register::AL,
                OpCodeOperandKind::r16_or_mem => Register::AX,
                _ => Register::EAX,
            };
            let pick = |g: &mut Self| first + g.rng.pick(&[0u32, 2, 3]);
            let (a, b) = (pick(self), pick(self));
            if let Ok(instruction) = Instruction::with2(body, a, b) {
                self.emit(instruction, Target::None);
            }
        }
        self.define_flags();
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        instruction.set_op_kind(
            0,
            match self.mode {
                Mode::Long => OpKind::NearBranch64,
                Mode::Flat32 => OpKind::NearBranch32,
                Mode::Segmented16 => OpKind::NearBranch16,
            },
        );
        self.emit(instruction, Target::Branch(top));
        // On later rounds the registers hold other values than on the first.
        for r in USED {
            self.state.known[r] = None;
        }
        self.branches = true;
    }

    pub(super) fn interrupt(&mut self, code: Code) {
        // 0x80 enters the host's kernel.
        let vector = match self.rng.below(4) {
            0 => 3,
            1 => 4,
            _ => self.rng.below(0x80) as u32 + if self.rng.below(2) == 0 { 0x81 } else { 0 },
        };
        if let Ok(instruction) = Instruction::with1(code, vector & 0xff)
            && vector < 0x100
        {
            self.emit(instruction, Target::None);
        }
    }
}
