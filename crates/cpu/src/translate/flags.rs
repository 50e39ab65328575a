//! Arithmetic flags that the manuals leave undefined: the tiers need not agree on them.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

/// All arithmetic flags, as iced numbers them.
pub(crate) const ALL: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Flags undefined behind an instruction that has `before` undefined before it.
pub(crate) fn undefined(instruction: &Instruction, before: u32) -> u32 {
    before & !overwritten(instruction) | instruction.rflags_undefined() & ALL
}

/// Flags that the instruction changes whatever its operands are.
fn overwritten(instruction: &Instruction) -> u32 {
    use Mnemonic as N;
    match instruction.mnemonic() {
        N::Shl | N::Sal | N::Shr | N::Sar | N::Rol | N::Ror | N::Rcl | N::Rcr | N::Shld | N::Shrd => {
            // A count of zero leaves all flags.
            let last = instruction.op_count() - 1;
            let constant = instruction.op_kind(last) == OpKind::Immediate8;
            let mask = if instruction.op0_kind() == OpKind::Register && instruction.op0_register().size() == 8 {
                63
            } else {
                31
            };
            if constant && instruction.immediate8() & mask != 0 { instruction.rflags_modified() & ALL } else { 0 }
        }
        _ if instruction.has_rep_prefix() || instruction.has_repne_prefix() => 0,
        _ => instruction.rflags_modified() & ALL,
    }
}

/// iced's flag bits as bits of RFLAGS.
pub(crate) fn to_rflags(bits: u32) -> u64 {
    use RflagsBits as B;
    use platform::x86::rflags as R;
    [(B::OF, R::OF), (B::SF, R::SF), (B::ZF, R::ZF), (B::AF, R::AF), (B::CF, R::CF), (B::PF, R::PF)]
        .into_iter()
        .filter(|(bit, _)| bits & bit != 0)
        .fold(0, |all, (_, bit)| all | bit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::new(64, bytes, DecoderOptions::NONE).decode()
    }

    #[test]
    fn follows_the_manual() {
        // ADD defines all, INC leaves CF, MOV leaves all, SHL by CL may leave all, AND leaves AF undefined.
        assert_eq!(undefined(&decode(&[0x01, 0xd8]), ALL), 0);
        assert_eq!(undefined(&decode(&[0xff, 0xc0]), ALL), RflagsBits::CF);
        assert_eq!(undefined(&decode(&[0x89, 0xd8]), ALL), ALL);
        assert_eq!(undefined(&decode(&[0xd3, 0xe0]), ALL), ALL);
        assert_eq!(undefined(&decode(&[0x21, 0xd8]), 0), RflagsBits::AF);
        assert_eq!(undefined(&decode(&[0xc1, 0xe0, 0x20]), ALL), ALL, "a count of 32 is 0");
    }
}
