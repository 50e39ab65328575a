//! Which arithmetic flags are undefined.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

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
const ARITHMETIC: u32 = 0x8d5;

/// Flags whose value matters to an instruction.
pub(crate) fn read(instruction: &Instruction) -> u32 {
    match instruction.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => ARITHMETIC,
        Mnemonic::Lahf => 0xd5,
        // Also where the rotation comes full circle, for which iced-x86 says nothing: OF follows from CF.
        Mnemonic::Rcl | Mnemonic::Rcr => eflags(RflagsBits::CF),
        _ => eflags(instruction.rflags_read()),
    }
}

/// Whether it depends on a register's value if the instruction writes flags at all.
fn may_leave_flags(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let repeated =
        instruction.is_string_instruction() && (instruction.has_rep_prefix() || instruction.has_repne_prefix());
    let shift = matches!(
        instruction.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    let last = instruction.op_count().saturating_sub(1);
    repeated || shift && instruction.op_kind(last) == OpKind::Register
}

/// The flags that are undefined after an instruction, given those before it.
pub(crate) fn undefined_after(before: u32, instruction: &Instruction) -> u32 {
    use Mnemonic as M;
    if matches!(instruction.mnemonic(), M::Popf | M::Popfd | M::Popfq | M::Iret | M::Iretd | M::Iretq) {
        return 0;
    }
    let written = instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set();
    let kept = if may_leave_flags(instruction) { before } else { before & !eflags(written) };
    kept | eflags(instruction.rflags_undefined())
}
