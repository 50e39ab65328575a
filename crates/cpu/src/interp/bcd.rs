//! Decimal arithmetic and single flags: DAA, DAS, AAA, AAS, AAM, AAD, LAHF, SAHF, CLC, STC, CMC, CLD, STD, SALC, XLAT, BOUND.

use iced_x86::Mnemonic;
use platform::x86::{gpr::RAX, gpr::RBX, rflags};

use crate::decode::{Choice, Decoding, Handler, Op, next};
use crate::state::int::{HIGH_BYTE, Int};
use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

const AL: u8 = RAX as u8;
const AH: u8 = RAX as u8 | HIGH_BYTE;

/// DAA and DAS (`SUBTRACT`).
fn decimal_adjust<const SUBTRACT: bool>(vcpu: &mut Vcpu, _: &Op) -> Step {
    let al = u8::get(&vcpu.regs, AL);
    let (cf, af) = (vcpu.flags.cf(), vcpu.flags.af());
    let low = al & 15 > 9 || af;
    let high = al > 0x99 || cf;
    let step = if low { 6 } else { 0 } + if high { 0x60u8 } else { 0 };
    let r = if SUBTRACT { al.wrapping_sub(step) } else { al.wrapping_add(step) };
    // DAS: a borrow of the low correction sets CF even where the high one is not applied.
    let borrow = SUBTRACT && low && al < 6;
    r.set(&mut vcpu.regs, AL);
    vcpu.flags.set_logic(r);
    vcpu.flags.set_af(low);
    vcpu.flags.set_cf_of(high || borrow, false);
    Ok(())
}

/// AAA and AAS (`SUBTRACT`).
fn ascii_adjust<const SUBTRACT: bool>(vcpu: &mut Vcpu, _: &Op) -> Step {
    let ax = u16::get(&vcpu.regs, AL);
    let adjust = ax & 15 > 9 || vcpu.flags.af();
    let r = match (adjust, SUBTRACT) {
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
        (false, _) => ax,
    };
    (r & 0xff0f).set(&mut vcpu.regs, AL);
    vcpu.flags.set_logic(r as u8 & 15);
    vcpu.flags.set_af(adjust);
    vcpu.flags.set_cf_of(adjust, false);
    Ok(())
}

fn aam(vcpu: &mut Vcpu, op: &Op) -> Step {
    let base = op.imm as u8;
    let al = u8::get(&vcpu.regs, AL);
    let (Some(quotient), Some(rest)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(Trap::fault(vector::DE));
    };
    quotient.set(&mut vcpu.regs, AH);
    rest.set(&mut vcpu.regs, AL);
    vcpu.flags.set_logic(rest);
    Ok(())
}

fn aad(vcpu: &mut Vcpu, op: &Op) -> Step {
    let high = u8::get(&vcpu.regs, AH).wrapping_mul(op.imm as u8);
    let r = u8::get(&vcpu.regs, AL).wrapping_add(high);
    u16::from(r).set(&mut vcpu.regs, AL);
    vcpu.flags.set_logic(r);
    Ok(())
}

fn lahf(vcpu: &mut Vcpu, _: &Op) -> Step {
    (vcpu.flags.value() as u8).set(&mut vcpu.regs, AH);
    Ok(())
}

fn sahf(vcpu: &mut Vcpu, _: &Op) -> Step {
    let of = if vcpu.flags.of() { rflags::OF } else { 0 };
    let value = u64::from(u8::get(&vcpu.regs, AH));
    vcpu.flags.set_arithmetic(value & 0xff | of);
    Ok(())
}

fn clc(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.flags.set_cf(false);
    Ok(())
}
fn stc(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.flags.set_cf(true);
    Ok(())
}
fn cmc(vcpu: &mut Vcpu, _: &Op) -> Step {
    let cf = vcpu.flags.cf();
    vcpu.flags.set_cf(!cf);
    Ok(())
}
fn cld(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.flags.sys &= !rflags::DF;
    Ok(())
}
fn std(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.flags.sys |= rflags::DF;
    Ok(())
}

/// SALC: AL = CF ? FF : 00, no flags.
fn salc(vcpu: &mut Vcpu, _: &Op) -> Step {
    let value = if vcpu.flags.cf() { 0xffu8 } else { 0 };
    value.set(&mut vcpu.regs, AL);
    Ok(())
}

/// XLAT: AL = [BX + AL].
fn xlat(vcpu: &mut Vcpu, op: &Op) -> Step {
    let mut at = *op;
    at.base = RBX as u8;
    at.index = crate::state::ZERO as u8;
    at.disp = u64::from(u8::get(&vcpu.regs, AL));
    let value: u8 = vcpu.load_op(&at)?;
    value.set(&mut vcpu.regs, AL);
    Ok(())
}

/// BOUND: #BR if the signed index is outside [first, second] at the memory operand.
fn bound<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let lower: T = vcpu.load_op(op)?;
    let second = Op { disp: op.disp.wrapping_add(T::BYTES), ..*op };
    let upper: T = vcpu.load_op(&second)?;
    let index = T::get(&vcpu.regs, op.r1).sign_extend() as i64;
    if index < lower.sign_extend() as i64 || index > upper.sign_extend() as i64 {
        return Err(Trap::fault(vector::BR));
    }
    Ok(())
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    use Mnemonic as N;
    let run: Handler = match d.instruction.mnemonic() {
        N::Daa => decimal_adjust::<false>,
        N::Das => decimal_adjust::<true>,
        N::Aaa => ascii_adjust::<false>,
        N::Aas => ascii_adjust::<true>,
        N::Aam => aam,
        N::Aad => aad,
        N::Lahf => lahf,
        N::Sahf => sahf,
        N::Clc => clc,
        N::Stc => stc,
        N::Cmc => cmc,
        N::Cld => cld,
        N::Std => std,
        N::Salc => salc,
        N::Xlatb => xlat,
        N::Bound if d.op.osize == 2 => bound::<u16>,
        N::Bound => bound::<u32>,
        _ => return None,
    };
    next(run)
}
