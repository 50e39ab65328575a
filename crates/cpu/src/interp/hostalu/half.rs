//! VCVTPS2PH where underflow is unmasked.
//!
//! An unmasked underflow is raised by every tiny result, a masked one only by those that are inexact too. For other
//! instructions stubs flush tiny results to zero, which is inexact; this one ignores MXCSR.FZ. So its stub runs it on other
//! operands first, with the lowest bit of all but zeroes set: then no tiny result is exact, and none becomes tiny, because
//! magnitudes only grow.

use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Mnemonic, OpKind, Register};

use super::plan::Plan;

/// MXCSR.UE.
const UNDERFLOW: i32 = 1 << 4;

/// Whether the stub of `plan` needs [`first_run`] and [`merge`].
pub(super) fn is_needed(plan: &Plan) -> bool {
    plan.instruction.mnemonic() == Mnemonic::Vcvtps2ph && !plan.silent
}

/// Behind both runs: adds UE of the first, whose flags are at `first`, to the flags at `raised`, if `unmasked` has that bit.
/// Uses RCX.
pub(super) fn merge(
    first: MemoryOperand,
    raised: MemoryOperand,
    unmasked: MemoryOperand,
) -> Result<[Instruction; 4], IcedError> {
    Ok([
        Instruction::with2(Code::Mov_r32_rm32, Register::ECX, first)?,
        Instruction::with2(Code::And_r32_rm32, Register::ECX, unmasked)?,
        Instruction::with2(Code::And_rm32_imm8, Register::ECX, UNDERFLOW)?,
        Instruction::with2(Code::Or_rm32_r32, raised, Register::ECX)?,
    ])
}

/// The run on other operands; leaves its flags at `flags` and in MXCSR. Uses vector registers that the instruction does not.
pub(super) fn first_run(plan: &Plan, flags: MemoryOperand) -> Result<Vec<Instruction>, IcedError> {
    use Code as C;
    let source = plan.instruction.op1_register();
    let mut spare = (0..8).filter(|number| plan.vectors.iter().all(|used| u32::from(used.number) != *number));
    let (Some(first), Some(second)) = (spare.next(), spare.next()) else { return Ok(Vec::new()) };
    let bank = |register: Register, number: u32| match register {
        _ if register.is_xmm() => Register::XMM0 + number,
        _ if register.is_ymm() => Register::YMM0 + number,
        _ => Register::ZMM0 + number,
    };
    let (operands, ones) = (bank(source, first), bank(source, second));
    let evex = plan.instruction.code().encoding() == iced_x86::EncodingKind::EVEX;
    let [shift_left, shift_right, minimum, or] = match (evex, source.size()) {
        (false, 16) => [
            C::VEX_Vpslld_xmm_xmm_imm8,
            C::VEX_Vpsrld_xmm_xmm_imm8,
            C::VEX_Vpminud_xmm_xmm_xmmm128,
            C::VEX_Vpor_xmm_xmm_xmmm128,
        ],
        (false, _) => [
            C::VEX_Vpslld_ymm_ymm_imm8,
            C::VEX_Vpsrld_ymm_ymm_imm8,
            C::VEX_Vpminud_ymm_ymm_ymmm256,
            C::VEX_Vpor_ymm_ymm_ymmm256,
        ],
        (true, 16) => [
            C::EVEX_Vpslld_xmm_k1z_xmmm128b32_imm8,
            C::EVEX_Vpsrld_xmm_k1z_xmmm128b32_imm8,
            C::EVEX_Vpminud_xmm_k1z_xmm_xmmm128b32,
            C::EVEX_Vpord_xmm_k1z_xmm_xmmm128b32,
        ],
        (true, 32) => [
            C::EVEX_Vpslld_ymm_k1z_ymmm256b32_imm8,
            C::EVEX_Vpsrld_ymm_k1z_ymmm256b32_imm8,
            C::EVEX_Vpminud_ymm_k1z_ymm_ymmm256b32,
            C::EVEX_Vpord_ymm_k1z_ymm_ymmm256b32,
        ],
        (true, _) => [
            C::EVEX_Vpslld_zmm_k1z_zmmm512b32_imm8,
            C::EVEX_Vpsrld_zmm_k1z_zmmm512b32_imm8,
            C::EVEX_Vpminud_zmm_k1z_zmm_zmmm512b32,
            C::EVEX_Vpord_zmm_k1z_zmm_zmmm512b32,
        ],
    };
    let all_ones = match source.size() {
        16 => Instruction::with3(C::VEX_Vpcmpeqd_xmm_xmm_xmmm128, ones, ones, ones)?,
        32 => Instruction::with3(C::VEX_Vpcmpeqd_ymm_ymm_ymmm256, ones, ones, ones)?,
        _ => Instruction::with4(C::EVEX_Vpternlogd_zmm_k1z_zmm_zmmm512b32_imm8, ones, ones, ones, 0xff)?,
    };
    let mut again = plan.instruction;
    let narrow = if source.size() == 64 { Register::YMM0 } else { Register::XMM0 };
    again.set_op0_kind(OpKind::Register);
    again.set_op0_register(narrow + second);
    again.set_op1_register(operands);
    Ok(vec![
        Instruction::with3(shift_left, operands, source, 1)?,
        all_ones,
        Instruction::with3(shift_right, ones, ones, 31)?,
        // 0 for zeroes, else 1.
        Instruction::with3(minimum, operands, operands, ones)?,
        Instruction::with3(or, operands, operands, source)?,
        again,
        Instruction::with1(C::Stmxcsr_m32, flags)?,
    ])
}
