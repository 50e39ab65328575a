//! Which arithmetic flags somebody may still read.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

/// All arithmetic flags, as iced numbers them.
pub(crate) const ALL: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Flags live before an instruction that has `after` live behind it.
pub(crate) fn before(instruction: &Instruction, after: u32) -> u32 {
    after & !overwritten(instruction) | instruction.rflags_read() & ALL
}

/// Flags that the instruction changes whatever its operands are.
pub(crate) fn overwritten(instruction: &Instruction) -> u32 {
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

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::new(64, bytes, DecoderOptions::NONE).decode()
    }

    #[test]
    fn follows_the_manual() {
        // ADD kills all, ADC reads CF, INC keeps CF, MOV keeps all, SHL by CL kills none.
        assert_eq!(before(&decode(&[0x01, 0xd8]), ALL), 0);
        assert_eq!(before(&decode(&[0x11, 0xd8]), 0), RflagsBits::CF);
        assert_eq!(before(&decode(&[0xff, 0xc0]), ALL), RflagsBits::CF);
        assert_eq!(before(&decode(&[0x89, 0xd8]), ALL), ALL);
        assert_eq!(before(&decode(&[0xd3, 0xe0]), ALL), ALL);
        assert_eq!(before(&decode(&[0xc1, 0xe0, 3]), ALL), 0);
        assert_eq!(before(&decode(&[0xc1, 0xe0, 0x20]), ALL), ALL, "a count of 32 is 0");
    }
}
