//! MUL, IMUL, DIV, IDIV, MULX.

use iced_x86::Mnemonic;
use platform::x86::gpr::{RAX, RDX};

use super::operand::{I, M, R1, R2, Source, sized};
use crate::decode::{Choice, Decoding, Handler, Op, Slot, next};
use crate::state::int::{HIGH_BYTE, Int};
use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

const AX: u8 = RAX as u8;
const DX: u8 = RDX as u8;
const AH: u8 = RAX as u8 | HIGH_BYTE;

/// Stores a double-width value in AX, or DX:AX of the operand size.
#[inline(always)]
fn put_double<T: Int>(vcpu: &mut Vcpu, value: u128) {
    let low = T::from_u64(value as u64);
    let high = T::from_u64((value >> T::BITS) as u64);
    low.set(&mut vcpu.regs, AX);
    high.set(&mut vcpu.regs, if T::BITS == 8 { AH } else { DX });
}

/// Reads AX, or DX:AX of the operand size.
#[inline(always)]
fn get_double<T: Int>(vcpu: &Vcpu) -> u128 {
    let low = T::get(&vcpu.regs, AX).to_u64();
    let high = T::get(&vcpu.regs, if T::BITS == 8 { AH } else { DX }).to_u64();
    u128::from(high) << T::BITS | u128::from(low)
}

#[inline(always)]
fn sign_extend_double<T: Int>(value: u128) -> i128 {
    let shift = 128 - 2 * T::BITS;
    (value << shift) as i128 >> shift
}

fn mul<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let b = S::get::<T>(vcpu, op)?.to_u64();
    let product = u128::from(T::get(&vcpu.regs, AX).to_u64()) * u128::from(b);
    put_double::<T>(vcpu, product);
    let overflow = product >> T::BITS != 0;
    multiply_flags(vcpu, T::from_u64(product as u64), overflow);
    Ok(())
}

/// Flags after a multiplication. SF, ZF, AF, PF are undefined by the manuals; see [`super::operand`]'s users: tests mask them.
#[inline(always)]
fn multiply_flags<T: Int>(vcpu: &mut Vcpu, low: T, overflow: bool) {
    vcpu.flags.set_logic(low);
    vcpu.flags.set_cf_of(overflow, overflow);
}

#[inline(always)]
fn signed_product<T: Int>(a: T, b: T) -> (i128, bool) {
    let product = i128::from(a.sign_extend() as i64) * i128::from(b.sign_extend() as i64);
    let fits = product == i128::from(T::from_u64(product as u64).sign_extend() as i64);
    (product, !fits)
}

/// One-operand IMUL.
fn imul_wide<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let b = S::get::<T>(vcpu, op)?;
    let (product, overflow) = signed_product(T::get(&vcpu.regs, AX), b);
    put_double::<T>(vcpu, product as u128);
    multiply_flags(vcpu, T::from_u64(product as u64), overflow);
    Ok(())
}

/// Two- and three-operand IMUL: `r1 = A * B`.
fn imul<T: Int, A: Source, B: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let a = A::get::<T>(vcpu, op)?;
    let b = B::get::<T>(vcpu, op)?;
    let (product, overflow) = signed_product(a, b);
    let low = T::from_u64(product as u64);
    low.set(&mut vcpu.regs, op.r1);
    multiply_flags(vcpu, low, overflow);
    Ok(())
}

fn div<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let divisor = u128::from(S::get::<T>(vcpu, op)?.to_u64());
    let dividend = get_double::<T>(vcpu);
    if divisor == 0 {
        return Err(Trap::fault(vector::DE));
    }
    // The host divides 128 bits slowly; nearly all dividends fit in 64.
    let (quotient, remainder) = if dividend >> 64 == 0 {
        let (n, d) = (dividend as u64, divisor as u64);
        (u128::from(n / d), n % d)
    } else {
        (dividend / divisor, (dividend % divisor) as u64)
    };
    if quotient >> T::BITS != 0 {
        return Err(Trap::fault(vector::DE));
    }
    put_double::<T>(vcpu, u128::from(remainder) << T::BITS | quotient);
    Ok(())
}

fn idiv<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let divisor = i128::from(S::get::<T>(vcpu, op)?.sign_extend() as i64);
    let dividend = sign_extend_double::<T>(get_double::<T>(vcpu));
    if divisor == 0 {
        return Err(Trap::fault(vector::DE));
    }
    let (quotient, remainder) = match (i64::try_from(dividend), divisor as i64) {
        (Ok(n), d) if d != -1 => (i128::from(n / d), n % d),
        _ => (dividend.wrapping_div(divisor), dividend.wrapping_rem(divisor) as i64),
    };
    if quotient != i128::from(T::from_u64(quotient as u64).sign_extend() as i64) {
        return Err(Trap::fault(vector::DE));
    }
    let quotient = u128::from(T::from_u64(quotient as u64).to_u64());
    put_double::<T>(vcpu, u128::from(T::from_u64(remainder as u64).to_u64()) << T::BITS | quotient);
    Ok(())
}

/// MULX r1, r2, r/m: high half to r1, low half to r2, no flags. If both are the same, it gets the high half.
fn mulx<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let b = S::get::<T>(vcpu, op)?.to_u64();
    let product = u128::from(T::get(&vcpu.regs, DX).to_u64()) * u128::from(b);
    T::from_u64(product as u64).set(&mut vcpu.regs, op.r2);
    T::from_u64((product >> T::BITS) as u64).set(&mut vcpu.regs, op.r1);
    Ok(())
}

struct R3;
impl Source for R3 {
    #[inline(always)]
    fn get<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step<T> {
        Ok(T::get(&vcpu.regs, op.r3))
    }
}

macro_rules! one_operand {
    ($d:ident, $handler:ident) => {
        match $d.shape[0] {
            Slot::Reg => sized!($d.op.osize, $handler, R1),
            _ => sized!($d.op.osize, $handler, M),
        }
    };
}

fn imul_form(d: &Decoding<'_>) -> Option<Handler> {
    let size = d.op.osize;
    Some(match d.shape {
        [_, Slot::None, ..] => one_operand!(d, imul_wide),
        [_, Slot::Reg, Slot::None, _] => sized!(size, imul, R1, R2),
        [_, Slot::Mem, Slot::None, _] => sized!(size, imul, R1, M),
        [_, Slot::Reg, ..] => sized!(size, imul, R2, I),
        [_, Slot::Mem, ..] => sized!(size, imul, M, I),
        _ => return None,
    })
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    let run = match d.instruction.mnemonic() {
        Mnemonic::Mul => one_operand!(d, mul),
        Mnemonic::Imul => imul_form(d)?,
        Mnemonic::Div => one_operand!(d, div),
        Mnemonic::Idiv => one_operand!(d, idiv),
        Mnemonic::Mulx => match (d.shape[2], d.op.osize) {
            (Slot::Reg, 8) => mulx::<u64, R3>,
            (Slot::Reg, _) => mulx::<u32, R3>,
            (_, 8) => mulx::<u64, M>,
            _ => mulx::<u32, M>,
        },
        _ => return None,
    };
    next(run)
}
