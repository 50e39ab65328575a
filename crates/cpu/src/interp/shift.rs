//! Shifts and rotates: SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD and the flag-free SHLX, SHRX, SARX, RORX.
//!
//! A count of zero (after masking) changes no flag. Where the manuals leave a flag undefined, it gets the value that
//! processors in fact give it, so that the host and this CPU agree.

use iced_x86::Mnemonic;
use platform::x86::gpr::RCX;

use super::operand::{M, Place, R1, R2, Source, sized};
use crate::decode::{Choice, Decoding, Handler, Op, Slot, next};
use crate::state::flags::Flags;
use crate::state::int::Int;
use crate::{Step, Vcpu};

/// A shift or rotate by a masked, non-zero count.
trait Shift {
    fn apply<T: Int>(flags: &mut Flags, a: T, count: u32) -> T;
}

/// Where the count comes from.
trait Count {
    fn get(vcpu: &Vcpu, op: &Op) -> u64;
}
struct ByCl;
impl Count for ByCl {
    #[inline(always)]
    fn get(vcpu: &Vcpu, _: &Op) -> u64 {
        vcpu.regs[RCX] & 0xff
    }
}
struct ByImm;
impl Count for ByImm {
    #[inline(always)]
    fn get(_: &Vcpu, op: &Op) -> u64 {
        op.imm
    }
}

#[inline(always)]
fn mask_of<T: Int>() -> u64 {
    if T::BITS == 64 { 63 } else { 31 }
}

struct Shl;
impl Shift for Shl {
    #[inline(always)]
    fn apply<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let wide = u128::from(a.to_u64()) << count;
        let r = T::from_u64(wide as u64);
        let cf = wide >> T::BITS & 1 != 0;
        flags.set_logic(r);
        flags.set_cf_of(cf, r.sign() != cf);
        r
    }
}

struct Shr;
impl Shift for Shr {
    #[inline(always)]
    fn apply<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let wide = u128::from(a.to_u64());
        let r = T::from_u64((wide >> count) as u64);
        let cf = wide >> (count - 1) & 1 != 0;
        flags.set_logic(r);
        // OF is the difference of the result's two top bits: the operand's sign for a count of one.
        flags.set_cf_of(cf, count == 1 && a.sign());
        r
    }
}

struct Sar;
impl Shift for Sar {
    #[inline(always)]
    fn apply<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let wide = a.sign_extend() as i64;
        let r = T::from_u64((wide >> count.min(63)) as u64);
        let cf = wide >> (count - 1).min(63) & 1 != 0;
        flags.set_logic(r);
        flags.set_cf_of(cf, false);
        r
    }
}

struct Rol;
impl Shift for Rol {
    #[inline(always)]
    fn apply<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let r = rotate_left(a, count % T::BITS);
        let cf = r.to_u64() & 1 != 0;
        flags.set_cf_of(cf, r.sign() != cf);
        r
    }
}

struct Ror;
impl Shift for Ror {
    #[inline(always)]
    fn apply<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let r = rotate_left(a, (T::BITS - count % T::BITS) % T::BITS);
        let cf = r.sign();
        let next = r.to_u64() >> (T::BITS - 2) & 1 != 0;
        flags.set_cf_of(cf, cf != next);
        r
    }
}

fn rotate_left<T: Int>(a: T, count: u32) -> T {
    let a = a.to_u64();
    if count == 0 { T::from_u64(a) } else { T::from_u64(a << count | a >> (T::BITS - count)) }
}

struct Rcl;
impl Shift for Rcl {
    #[inline(always)]
    fn apply<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        // A ring of BITS + 1 bits with CF on top.
        let count = count % (T::BITS + 1);
        let ring = u128::from(a.to_u64()) | u128::from(flags.cf()) << T::BITS;
        let rotated = if count == 0 { ring } else { ring << count | ring >> (T::BITS + 1 - count) };
        let r = T::from_u64(rotated as u64);
        let cf = rotated >> T::BITS & 1 != 0;
        flags.set_cf_of(cf, r.sign() != cf);
        r
    }
}

struct Rcr;
impl Shift for Rcr {
    #[inline(always)]
    fn apply<T: Int>(flags: &mut Flags, a: T, count: u32) -> T {
        let count = count % (T::BITS + 1);
        let ring = u128::from(a.to_u64()) | u128::from(flags.cf()) << T::BITS;
        let rotated = if count == 0 { ring } else { ring >> count | ring << (T::BITS + 1 - count) };
        let r = T::from_u64(rotated as u64);
        let cf = rotated >> T::BITS & 1 != 0;
        let next = r.to_u64() >> (T::BITS - 2) & 1 != 0;
        flags.set_cf_of(cf, r.sign() != next);
        r
    }
}

fn shift<T: Int, O: Shift, D: Place, C: Count>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let count = (C::get(vcpu, op) & mask_of::<T>()) as u32;
    let (a, location) = D::get_for_put::<T>(vcpu, op)?;
    if count == 0 {
        // The operand is written back all the same: a 32-bit register loses its upper half, and memory must be writable.
        return D::put(vcpu, op, location, a);
    }
    let mut flags = vcpu.flags;
    let r = O::apply(&mut flags, a, count);
    D::put(vcpu, op, location, r)?;
    vcpu.flags = flags;
    Ok(())
}

fn shift_form<O: Shift>(d: &Decoding<'_>) -> Option<Handler> {
    // Not the size of CL.
    let size = if d.shape[0] == Slot::Mem { d.instruction.memory_size().size() as u8 } else { d.op.osize };
    Some(match (d.shape[0], d.shape[1]) {
        (Slot::Reg, Slot::Imm) => sized!(size, shift, O, R1, ByImm),
        (Slot::Mem, Slot::Imm) => sized!(size, shift, O, M, ByImm),
        (Slot::Reg, Slot::Reg) => sized!(size, shift, O, R1, ByCl),
        (Slot::Mem, Slot::Reg) => sized!(size, shift, O, M, ByCl),
        _ => return None,
    })
}

/// SHLD (`LEFT`) and SHRD. `r1` is the register that is shifted in when the destination is memory, else `r2`.
fn double<T: Int, D: Place, S: Source, C: Count, const LEFT: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let count = (C::get(vcpu, op) & mask_of::<T>()) as u32;
    let fill = S::get::<T>(vcpu, op)?.to_u64();
    let (a, location) = D::get_for_put::<T>(vcpu, op)?;
    if count == 0 {
        return D::put(vcpu, op, location, a);
    }
    let mut flags = vcpu.flags;
    let bits = T::BITS;
    let a64 = a.to_u64();
    let (r, cf) = if LEFT {
        // Operand, then the register, then the operand again: 16-bit counts above 16 come round to it.
        let chain = (u128::from(a64) << bits | u128::from(fill)) << if bits == 16 { 16 } else { 0 }
            | if bits == 16 { u128::from(a64) } else { 0 };
        let width = if bits == 16 { 48 } else { 2 * bits };
        (chain >> (width - bits - count), chain >> (width - count) & 1 != 0)
    } else {
        let chain = u128::from(fill) << bits | u128::from(a64) | if bits == 16 { u128::from(a64) << 32 } else { 0 };
        (chain >> count, chain >> (count - 1) & 1 != 0)
    };
    let r = T::from_u64(r as u64);
    flags.set_logic(r);
    flags.set_cf_of(cf, r.sign() != a.sign());
    D::put(vcpu, op, location, r)?;
    vcpu.flags = flags;
    Ok(())
}

fn double_form<const LEFT: bool>(d: &Decoding<'_>) -> Option<Handler> {
    macro_rules! wide {
        ($($param:ty),*) => {
            match d.op.osize {
                2 => double::<u16, $($param),*, LEFT> as Handler,
                4 => double::<u32, $($param),*, LEFT>,
                _ => double::<u64, $($param),*, LEFT>,
            }
        };
    }
    Some(match (d.shape[0], d.shape[2]) {
        (Slot::Reg, Slot::Imm) => wide!(R1, R2, ByImm),
        (Slot::Mem, Slot::Imm) => wide!(M, R1, ByImm),
        (Slot::Reg, _) => wide!(R1, R2, ByCl),
        (Slot::Mem, _) => wide!(M, R1, ByCl),
        _ => return None,
    })
}

/// The BMI2 shifts: three operands, no flags. The count register is the last register operand.
fn flagless<T: Int, S: Source, const KIND: u8>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let a = S::get::<T>(vcpu, op)?;
    let count = match KIND {
        ROTATE => op.imm,
        _ => vcpu.regs[usize::from(op.r3 & 31)],
    };
    let count = (count & mask_of::<T>()) as u32;
    let r = match KIND {
        LEFT => T::from_u64(a.to_u64() << count),
        RIGHT => T::from_u64(a.to_u64() >> count),
        ARITHMETIC => T::from_u64(((a.sign_extend() as i64) >> count) as u64),
        _ => rotate_left(a, (T::BITS - count % T::BITS) % T::BITS),
    };
    r.set(&mut vcpu.regs, op.r1);
    Ok(())
}
const LEFT: u8 = 0;
const RIGHT: u8 = 1;
const ARITHMETIC: u8 = 2;
const ROTATE: u8 = 3;

fn flagless_form<const KIND: u8>(d: &mut Decoding<'_>) -> Option<Handler> {
    if d.shape[1] == Slot::Mem && KIND != ROTATE {
        // Two register operands: the second is the count.
        d.op.r3 = d.op.r2;
    }
    let wide = d.op.osize == 8;
    Some(match (d.shape[1], wide) {
        (Slot::Reg, false) => flagless::<u32, R2, KIND>,
        (Slot::Reg, true) => flagless::<u64, R2, KIND>,
        (Slot::Mem, false) => flagless::<u32, M, KIND>,
        (Slot::Mem, true) => flagless::<u64, M, KIND>,
        _ => return None,
    })
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    let run = match d.instruction.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => shift_form::<Shl>(d),
        Mnemonic::Shr => shift_form::<Shr>(d),
        Mnemonic::Sar => shift_form::<Sar>(d),
        Mnemonic::Rol => shift_form::<Rol>(d),
        Mnemonic::Ror => shift_form::<Ror>(d),
        Mnemonic::Rcl => shift_form::<Rcl>(d),
        Mnemonic::Rcr => shift_form::<Rcr>(d),
        Mnemonic::Shld => double_form::<true>(d),
        Mnemonic::Shrd => double_form::<false>(d),
        Mnemonic::Shlx => flagless_form::<LEFT>(d),
        Mnemonic::Shrx => flagless_form::<RIGHT>(d),
        Mnemonic::Sarx => flagless_form::<ARITHMETIC>(d),
        Mnemonic::Rorx => flagless_form::<ROTATE>(d),
        _ => return None,
    };
    next(run?)
}
