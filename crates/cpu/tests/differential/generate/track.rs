//! What the generator knows about the state before the next instruction.

use iced_x86::{
    Code, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register,
};

use crate::flags;
use crate::layout::*;

/// Known parts of the state.
#[derive(Clone)]
pub(super) struct State {
    /// Registers whose value is known.
    pub(super) known: [Option<u64>; 16],
    /// Arithmetic flags whose value is undefined, as in EFLAGS.
    pub(super) undefined: u32,
    pub(super) selectors: [Option<u16>; 6],
    pub(super) fs_base: Option<u64>,
    pub(super) gs_base: Option<u64>,
    /// RFLAGS.DF.
    pub(super) direction: Option<bool>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            known: [None; 16],
            undefined: 0,
            selectors: [None; 6],
            fs_base: None,
            gs_base: None,
            direction: Some(false),
        }
    }
}

/// Whether redundant prefixes left an instruction what it is.
pub(super) fn same_meaning(a: &Instruction, b: &Instruction, mode: Mode) -> bool {
    let operands = (0..a.op_count()).all(|i| {
        a.op_kind(i) == b.op_kind(i) && (a.op_kind(i) != OpKind::Register || a.op_register(i) == b.op_register(i))
    });
    let flat =
        |register| mode == Mode::Long && matches!(register, Register::ES | Register::CS | Register::SS | Register::DS);
    let (sa, sb) = (a.memory_segment(), b.memory_segment());
    let has_memory = (0..a.op_count()).any(|i| !matches!(a.op_kind(i), OpKind::Register)) || a.is_string_instruction();
    let segment = !has_memory || sa == sb || flat(sa) && flat(sb) && (sa == Register::SS) == (sb == Register::SS);
    let memory = a.memory_base() == b.memory_base()
        && a.memory_index() == b.memory_index()
        && (a.is_ip_rel_memory_operand() || a.memory_displacement64() == b.memory_displacement64());
    let repeats = !a.is_string_instruction()
        || a.has_rep_prefix() == b.has_rep_prefix() && a.has_repne_prefix() == b.has_repne_prefix();
    !b.is_invalid() && a.code() == b.code() && operands && segment && memory && repeats
}

impl State {
    /// What is known after two paths meet.
    pub(super) fn merge(&mut self, other: &Self) {
        fn meet<T: PartialEq + Copy>(a: &mut Option<T>, b: Option<T>) {
            if *a != b {
                *a = None;
            }
        }
        for (a, b) in self.known.iter_mut().zip(other.known) {
            meet(a, b);
        }
        for (a, b) in self.selectors.iter_mut().zip(other.selectors) {
            meet(a, b);
        }
        meet(&mut self.fs_base, other.fs_base);
        meet(&mut self.gs_base, other.gs_base);
        meet(&mut self.direction, other.direction);
        self.undefined |= other.undefined;
    }

    /// Follows an instruction.
    pub(super) fn after(&mut self, instruction: &Instruction, mode: Mode, info: &mut InstructionInfoFactory) {
        self.undefined = flags::undefined_after(self.undefined, instruction);
        match instruction.mnemonic() {
            Mnemonic::Cld => self.direction = Some(false),
            Mnemonic::Std => self.direction = Some(true),
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => {
                self.direction = None;
            }
            _ => {}
        }
        let stack = self.known[4];
        for used in info.info_options(instruction, InstructionInfoOptions::NO_MEMORY_USAGE).used_registers() {
            let writes = matches!(
                used.access(),
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            );
            if writes {
                self.forget(used.register());
            }
        }
        self.learn(instruction, stack, mode);
    }

    fn forget(&mut self, register: Register) {
        if register.is_gpr() {
            self.known[register.full_register().number()] = None;
        } else if register.is_segment_register() {
            self.selectors[register.number()] = None;
            match register {
                Register::FS => self.fs_base = None,
                Register::GS => self.gs_base = None,
                _ => {}
            }
        }
    }

    /// Values that follow from the instruction alone, or from it and what was known.
    fn learn(&mut self, instruction: &Instruction, stack: Option<u64>, mode: Mode) {
        match instruction.code() {
            Code::Mov_r64_imm64 | Code::Mov_r32_imm32 | Code::Mov_rm64_imm32
                if instruction.op0_kind() == OpKind::Register =>
            {
                let r = instruction.op0_register().full_register().number();
                self.known[r] = Some(instruction.immediate(1));
            }
            Code::Wrfsbase_r32 | Code::Wrfsbase_r64 => self.fs_base = None,
            Code::Wrgsbase_r32 | Code::Wrgsbase_r64 => self.gs_base = None,
            _ => {}
        }
        let moved = instruction.stack_pointer_increment();
        let explicit = (0..instruction.op_count()).any(|i| {
            instruction.op_kind(i) == OpKind::Register && instruction.op_register(i).full_register() == Register::RSP
        });
        let keeps = !matches!(instruction.mnemonic(), Mnemonic::Pop | Mnemonic::Leave) || !explicit;
        if moved != 0 && keeps {
            self.known[4] = stack.map(|sp| {
                let new = sp.wrapping_add(i64::from(moved) as u64);
                match mode {
                    Mode::Long => new,
                    Mode::Flat32 => new & 0xffff_ffff,
                    Mode::Segmented16 => sp & !0xffff | new & 0xffff,
                }
            });
        }
    }
}
