//! XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B.

use iced_x86::Mnemonic;
use platform::x86::gpr::{RAX, RBX, RCX, RDX};

use super::operand::{sized, stack_error};
use crate::decode::{Choice, Decoding, Op, Slot, next, op_flag};
use crate::state::int::Int;
use crate::{Step, Trap, Vcpu};

impl Vcpu {
    /// Read-modify-write of the memory operand, atomic if the instruction is locked. Returns the old value.
    fn update_memory<T: Int>(&mut self, op: &Op, update: impl Fn(T) -> T) -> Step<T> {
        let linear = self.linear(op, T::BYTES, true)?;
        let old = if op.flags & op_flag::LOCK != 0 {
            self.locked_update(linear, update)
        } else {
            self.load_for_store(linear).and_then(|old| self.store(linear, update(old)).map(|()| old))
        };
        old.map_err(|trap| stack_error(op, trap))
    }
}

fn sum<T: Int>(a: T, b: T) -> T {
    T::from_u64(a.to_u64().wrapping_add(b.to_u64()))
}

fn xadd_registers<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let (a, b) = (T::get(&vcpu.regs, op.r1), T::get(&vcpu.regs, op.r2));
    let r = sum(a, b);
    vcpu.flags.set_add(a, b, r);
    a.set(&mut vcpu.regs, op.r2);
    r.set(&mut vcpu.regs, op.r1);
    Ok(())
}

fn xadd_memory<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let b = T::get(&vcpu.regs, op.r1);
    let a = vcpu.update_memory::<T>(op, |a| sum(a, b))?;
    vcpu.flags.set_add(a, b, sum(a, b));
    a.set(&mut vcpu.regs, op.r1);
    Ok(())
}

/// Flags of the comparison, and the accumulator where it failed.
fn compare_result<T: Int>(vcpu: &mut Vcpu, accumulator: T, found: T) -> bool {
    vcpu.flags.set_sub(accumulator, found, T::from_u64(accumulator.to_u64().wrapping_sub(found.to_u64())));
    if accumulator != found {
        found.set(&mut vcpu.regs, RAX as u8);
    }
    accumulator == found
}

fn cmpxchg_registers<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let accumulator = T::get(&vcpu.regs, RAX as u8);
    let found = T::get(&vcpu.regs, op.r1);
    let source = T::get(&vcpu.regs, op.r2);
    // Only one of the two is written: the other keeps its upper half.
    if compare_result(vcpu, accumulator, found) {
        source.set(&mut vcpu.regs, op.r1);
    }
    Ok(())
}

fn cmpxchg_memory<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let accumulator = T::get(&vcpu.regs, RAX as u8);
    let new = T::get(&vcpu.regs, op.r1);
    let found = vcpu.update_memory::<T>(op, |old| if old == accumulator { new } else { old })?;
    compare_result(vcpu, accumulator, found);
    Ok(())
}

fn pair(vcpu: &Vcpu, high: usize, low: usize) -> u64 {
    vcpu.regs[high] << 32 | vcpu.regs[low] & 0xffff_ffff
}

fn cmpxchg8b(vcpu: &mut Vcpu, op: &Op) -> Step {
    let expected = pair(vcpu, RDX, RAX);
    let new = pair(vcpu, RCX, RBX);
    let found = vcpu.update_memory::<u64>(op, |old| if old == expected { new } else { old })?;
    if found != expected {
        vcpu.regs[RAX] = found & 0xffff_ffff;
        vcpu.regs[RDX] = found >> 32;
    }
    vcpu.flags.set_zf(found == expected);
    Ok(())
}

fn cmpxchg16b(vcpu: &mut Vcpu, op: &Op) -> Step {
    let wide = |high, low| u128::from(vcpu.regs[high]) << 64 | u128::from(vcpu.regs[low]);
    let (expected, new): (u128, u128) = (wide(RDX, RAX), wide(RCX, RBX));
    let linear = vcpu.linear(op, 16, true)?;
    if linear & 15 != 0 {
        return Err(Trap::gp(0));
    }
    let found = vcpu.locked_exchange_16(linear, expected, new).map_err(|trap| stack_error(op, trap))?;
    if found != expected {
        vcpu.regs[RAX] = found as u64;
        vcpu.regs[RDX] = (found >> 64) as u64;
    }
    vcpu.flags.set_zf(found == expected);
    Ok(())
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    let size = d.op.osize;
    let memory = d.shape[0] == Slot::Mem;
    next(match d.instruction.mnemonic() {
        Mnemonic::Xadd if memory => sized!(size, xadd_memory),
        Mnemonic::Xadd => sized!(size, xadd_registers),
        Mnemonic::Cmpxchg if memory => sized!(size, cmpxchg_memory),
        Mnemonic::Cmpxchg => sized!(size, cmpxchg_registers),
        Mnemonic::Cmpxchg8b => cmpxchg8b,
        Mnemonic::Cmpxchg16b => cmpxchg16b,
        _ => return None,
    })
}
