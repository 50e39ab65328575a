//! What the generator knows about the state before the next instruction.

use iced_x86::{
    Code, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};

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

/// `iced-x86`'s flag bits as in EFLAGS.
fn eflags(bits: u32) -> u32 {
    const TABLE: [(u32, u32); 6] = [
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 4),
        (RflagsBits::AF, 0x10),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::SF, 0x80),
        (RflagsBits::OF, 0x800),
    ];
    TABLE.iter().filter(|(from, _)| bits & from != 0).fold(0, |all, (_, to)| all | to)
}

/// The six arithmetic flags.
pub(crate) const ARITHMETIC: u32 = 0x8d5;

/// Flags whose value matters to an instruction.
pub(super) fn flags_read(instruction: &Instruction) -> u32 {
    match instruction.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => ARITHMETIC,
        Mnemonic::Lahf => 0xd5,
        _ => eflags(instruction.rflags_read()),
    }
}

/// Whether it depends on a register's value if the instruction writes flags at all.
fn may_leave_flags(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let repeated = instruction.is_string_instruction() && (instruction.has_rep_prefix() || instruction.has_repne_prefix());
    let shift = matches!(
        instruction.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    let last = instruction.op_count().saturating_sub(1);
    repeated || shift && instruction.op_kind(last) == OpKind::Register
}

/// Whether redundant prefixes left an instruction what it is.
pub(super) fn same_meaning(a: &Instruction, b: &Instruction, mode: Mode) -> bool {
    let operands = (0..a.op_count()).all(|i| {
        a.op_kind(i) == b.op_kind(i) && (a.op_kind(i) != OpKind::Register || a.op_register(i) == b.op_register(i))
    });
    let flat = |register| {
        mode == Mode::Long && matches!(register, Register::ES | Register::CS | Register::SS | Register::DS)
    };
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
        if !may_leave_flags(instruction) {
            let written = instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set();
            self.undefined &= !eflags(written);
        }
        self.undefined |= eflags(instruction.rflags_undefined());
        match instruction.mnemonic() {
            Mnemonic::Cld => self.direction = Some(false),
            Mnemonic::Std => self.direction = Some(true),
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => {
                self.direction = None;
                self.undefined = 0;
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
