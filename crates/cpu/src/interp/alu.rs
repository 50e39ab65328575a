//! Two-operand and one-operand arithmetic and logic: ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST, INC, DEC, NEG, NOT.

use iced_x86::Mnemonic;

use super::operand::{I, M, Place, R1, R2, Source, sized, stack_error};
use crate::decode::{Choice, Decoding, Handler, Op, Slot, next, op_flag};
use crate::state::flags::Flags;
use crate::state::int::Int;
use crate::{Step, Vcpu};

/// A two-operand operation: computes the result and sets flags.
trait Binary {
    fn apply<T: Int>(flags: &mut Flags, a: T, b: T) -> T;
}

macro_rules! binary {
    ($name:ident, $flags:ident, $a:ident, $b:ident, $T:ident => $body:expr) => {
        struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn apply<$T: Int>($flags: &mut Flags, $a: $T, $b: $T) -> $T {
                $body
            }
        }
    };
}

binary!(Add, flags, a, b, T => {
    let r = T::from_u64(a.to_u64().wrapping_add(b.to_u64()));
    flags.set_add(a, b, r);
    r
});
binary!(Adc, flags, a, b, T => {
    let r = T::from_u64(a.to_u64().wrapping_add(b.to_u64()).wrapping_add(u64::from(flags.cf())));
    flags.set_add(a, b, r);
    r
});
binary!(Sub, flags, a, b, T => {
    let r = T::from_u64(a.to_u64().wrapping_sub(b.to_u64()));
    flags.set_sub(a, b, r);
    r
});
binary!(Sbb, flags, a, b, T => {
    let r = T::from_u64(a.to_u64().wrapping_sub(b.to_u64()).wrapping_sub(u64::from(flags.cf())));
    flags.set_sub(a, b, r);
    r
});
binary!(And, flags, a, b, T => {
    let r = T::from_u64(a.to_u64() & b.to_u64());
    flags.set_logic(r);
    r
});
binary!(Or, flags, a, b, T => {
    let r = T::from_u64(a.to_u64() | b.to_u64());
    flags.set_logic(r);
    r
});
binary!(Xor, flags, a, b, T => {
    let r = T::from_u64(a.to_u64() ^ b.to_u64());
    flags.set_logic(r);
    r
});

/// A one-operand operation.
trait Unary {
    fn apply<T: Int>(flags: &mut Flags, a: T) -> T;
}

struct Inc;
impl Unary for Inc {
    #[inline(always)]
    fn apply<T: Int>(flags: &mut Flags, a: T) -> T {
        let cf = flags.cf();
        let r = T::from_u64(a.to_u64().wrapping_add(1));
        flags.set_add(a, T::from_u64(1), r);
        flags.set_cf(cf);
        r
    }
}
struct Dec;
impl Unary for Dec {
    #[inline(always)]
    fn apply<T: Int>(flags: &mut Flags, a: T) -> T {
        let cf = flags.cf();
        let r = T::from_u64(a.to_u64().wrapping_sub(1));
        flags.set_sub(a, T::from_u64(1), r);
        flags.set_cf(cf);
        r
    }
}
struct Neg;
impl Unary for Neg {
    #[inline(always)]
    fn apply<T: Int>(flags: &mut Flags, a: T) -> T {
        let r = T::from_u64(0u64.wrapping_sub(a.to_u64()));
        flags.set_sub(T::from_u64(0), a, r);
        r
    }
}
struct Not;
impl Unary for Not {
    #[inline(always)]
    fn apply<T: Int>(_: &mut Flags, a: T) -> T {
        T::from_u64(!a.to_u64())
    }
}

fn binary<T: Int, O: Binary, D: Place, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let b = S::get::<T>(vcpu, op)?;
    let (a, location) = D::get_for_put::<T>(vcpu, op)?;
    let mut flags = vcpu.flags;
    let r = O::apply(&mut flags, a, b);
    D::put(vcpu, op, location, r)?;
    vcpu.flags = flags;
    Ok(())
}

/// CMP and TEST: flags only.
fn compare<T: Int, O: Binary, D: Source, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let b = S::get::<T>(vcpu, op)?;
    let a = D::get::<T>(vcpu, op)?;
    O::apply(&mut vcpu.flags, a, b);
    Ok(())
}

fn unary<T: Int, O: Unary, D: Place>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let (a, location) = D::get_for_put::<T>(vcpu, op)?;
    let mut flags = vcpu.flags;
    let r = O::apply(&mut flags, a);
    D::put(vcpu, op, location, r)?;
    vcpu.flags = flags;
    Ok(())
}

fn locked_binary<T: Int, O: Binary, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let b = S::get::<T>(vcpu, op)?;
    let linear = vcpu.linear(op, T::BYTES, true)?;
    let before = vcpu.flags;
    let mut flags = before;
    vcpu.locked_update::<T>(linear, |a| {
        flags = before;
        O::apply(&mut flags, a, b)
    })
    .map_err(|trap| stack_error(op, trap))?;
    vcpu.flags = flags;
    Ok(())
}

fn locked_unary<T: Int, O: Unary>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let linear = vcpu.linear(op, T::BYTES, true)?;
    let before = vcpu.flags;
    let mut flags = before;
    vcpu.locked_update::<T>(linear, |a| {
        flags = before;
        O::apply(&mut flags, a)
    })
    .map_err(|trap| stack_error(op, trap))?;
    vcpu.flags = flags;
    Ok(())
}

fn binary_form<O: Binary>(d: &Decoding<'_>) -> Option<Handler> {
    let size = d.op.osize;
    if d.op.flags & op_flag::LOCK != 0 {
        return Some(match (d.shape[0], d.shape[1]) {
            (Slot::Mem, Slot::Reg) => sized!(size, locked_binary, O, R1),
            (Slot::Mem, Slot::Imm) => sized!(size, locked_binary, O, I),
            _ => return None,
        });
    }
    Some(match (d.shape[0], d.shape[1]) {
        (Slot::Reg, Slot::Reg) => sized!(size, binary, O, R1, R2),
        (Slot::Reg, Slot::Mem) => sized!(size, binary, O, R1, M),
        (Slot::Mem, Slot::Reg) => sized!(size, binary, O, M, R1),
        (Slot::Reg, Slot::Imm) => sized!(size, binary, O, R1, I),
        (Slot::Mem, Slot::Imm) => sized!(size, binary, O, M, I),
        _ => return None,
    })
}

fn compare_form<O: Binary>(d: &Decoding<'_>) -> Option<Handler> {
    let size = d.op.osize;
    Some(match (d.shape[0], d.shape[1]) {
        (Slot::Reg, Slot::Reg) => sized!(size, compare, O, R1, R2),
        (Slot::Reg, Slot::Mem) => sized!(size, compare, O, R1, M),
        (Slot::Mem, Slot::Reg) => sized!(size, compare, O, M, R1),
        (Slot::Reg, Slot::Imm) => sized!(size, compare, O, R1, I),
        (Slot::Mem, Slot::Imm) => sized!(size, compare, O, M, I),
        _ => return None,
    })
}

fn unary_form<O: Unary>(d: &Decoding<'_>) -> Option<Handler> {
    let size = d.op.osize;
    Some(match d.shape[0] {
        Slot::Mem if d.op.flags & op_flag::LOCK != 0 => sized!(size, locked_unary, O),
        Slot::Reg => sized!(size, unary, O, R1),
        Slot::Mem => sized!(size, unary, O, M),
        _ => return None,
    })
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    let run = match d.instruction.mnemonic() {
        Mnemonic::Add => binary_form::<Add>(d),
        Mnemonic::Or => binary_form::<Or>(d),
        Mnemonic::Adc => binary_form::<Adc>(d),
        Mnemonic::Sbb => binary_form::<Sbb>(d),
        Mnemonic::And => binary_form::<And>(d),
        Mnemonic::Sub => binary_form::<Sub>(d),
        Mnemonic::Xor => binary_form::<Xor>(d),
        Mnemonic::Cmp => compare_form::<Sub>(d),
        Mnemonic::Test => compare_form::<And>(d),
        Mnemonic::Inc => unary_form::<Inc>(d),
        Mnemonic::Dec => unary_form::<Dec>(d),
        Mnemonic::Neg => unary_form::<Neg>(d),
        Mnemonic::Not => unary_form::<Not>(d),
        _ => return None,
    };
    next(run?)
}
