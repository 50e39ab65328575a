//! Bits: BT, BTS, BTR, BTC, BSF, BSR, LZCNT, TZCNT, POPCNT, BMI1, BMI2, ADX, CRC32.

use iced_x86::Mnemonic;
use platform::x86::rflags;

use super::operand::{I, M, Place, R1, R2, Source, stack_error};
use crate::decode::{Choice, Decoding, Handler, Op, Slot, next, op_flag};
use crate::state::int::Int;
use crate::{Step, Vcpu};

/// What a bit-test instruction does to the bit.
trait BitChange {
    const WRITES: bool = true;
    fn apply(value: u64, mask: u64) -> u64;
}
struct Test;
impl BitChange for Test {
    const WRITES: bool = false;
    fn apply(value: u64, _: u64) -> u64 {
        value
    }
}
struct Set;
impl BitChange for Set {
    fn apply(value: u64, mask: u64) -> u64 {
        value | mask
    }
}
struct Reset;
impl BitChange for Reset {
    fn apply(value: u64, mask: u64) -> u64 {
        value & !mask
    }
}
struct Complement;
impl BitChange for Complement {
    fn apply(value: u64, mask: u64) -> u64 {
        value ^ mask
    }
}

/// Register or immediate-indexed memory: the index is taken modulo the operand size.
fn bit<T: Int, C: BitChange, D: Place, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let index = S::get::<T>(vcpu, op)?.to_u64() & u64::from(T::BITS - 1);
    if !C::WRITES {
        let value = D::get::<T>(vcpu, op)?;
        vcpu.flags.set_cf(value.to_u64() >> index & 1 != 0);
        return Ok(());
    }
    let (value, location) = D::get_for_put::<T>(vcpu, op)?;
    D::put(vcpu, op, location, T::from_u64(C::apply(value.to_u64(), 1 << index)))?;
    vcpu.flags.set_cf(value.to_u64() >> index & 1 != 0);
    Ok(())
}

/// The memory operand moved by a signed bit index from a register: a bit string of any length.
fn indexed(op: &Op, bytes: u64, index: i64) -> Op {
    let mut moved = *op;
    let units = index >> (bytes * 8).trailing_zeros();
    moved.disp = moved.disp.wrapping_add((units as u64).wrapping_mul(bytes));
    moved
}

/// Memory indexed by a register.
fn bit_string<T: Int, C: BitChange>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let index = T::get(&vcpu.regs, op.r1).sign_extend() as i64;
    let moved = indexed(op, T::BYTES, index);
    bit_at::<T, C>(vcpu, &moved, index as u64 & u64::from(T::BITS - 1))
}

fn bit_at<T: Int, C: BitChange>(vcpu: &mut Vcpu, op: &Op, index: u64) -> Step {
    if !C::WRITES {
        let value: T = vcpu.load_op(op)?;
        vcpu.flags.set_cf(value.to_u64() >> index & 1 != 0);
        return Ok(());
    }
    let linear = vcpu.linear(op, T::BYTES, true)?;
    let change = |value: T| T::from_u64(C::apply(value.to_u64(), 1 << index));
    let old = if op.flags & op_flag::LOCK != 0 {
        vcpu.locked_update::<T>(linear, change)
    } else {
        vcpu.load_for_store::<T>(linear).and_then(|old| vcpu.store(linear, change(old)).map(|()| old))
    };
    let old = old.map_err(|trap| stack_error(op, trap))?;
    vcpu.flags.set_cf(old.to_u64() >> index & 1 != 0);
    Ok(())
}

/// LOCK BTS and friends with an immediate index.
fn bit_locked_imm<T: Int, C: BitChange>(vcpu: &mut Vcpu, op: &Op) -> Step {
    bit_at::<T, C>(vcpu, op, op.imm & u64::from(T::BITS - 1))
}

macro_rules! wide {
    ($size:expr, $handler:ident $(, $param:ty)*) => {
        match $size {
            2 => $handler::<u16 $(, $param)*> as Handler,
            4 => $handler::<u32 $(, $param)*>,
            _ => $handler::<u64 $(, $param)*>,
        }
    };
}

fn bit_form<C: BitChange>(d: &Decoding<'_>) -> Option<Handler> {
    let size = d.op.osize;
    let locked = d.op.flags & op_flag::LOCK != 0;
    Some(match (d.shape[0], d.shape[1]) {
        (Slot::Reg, Slot::Reg) => wide!(size, bit, C, R1, R2),
        (Slot::Reg, Slot::Imm) => wide!(size, bit, C, R1, I),
        (Slot::Mem, Slot::Imm) if locked => wide!(size, bit_locked_imm, C),
        (Slot::Mem, Slot::Imm) => wide!(size, bit, C, M, I),
        (Slot::Mem, Slot::Reg) => wide!(size, bit_string, C),
        _ => return None,
    })
}

/// BSF (`FORWARD`) and BSR. A zero source leaves the destination as it is (AMD's definition, and what Intel's do).
fn scan<T: Int, S: Source, const FORWARD: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let value = S::get::<T>(vcpu, op)?.to_u64();
    if value != 0 {
        let index = if FORWARD { value.trailing_zeros() } else { 63 - value.leading_zeros() };
        T::from_u64(u64::from(index)).set(&mut vcpu.regs, op.r1);
    }
    vcpu.flags.set_zf(value == 0);
    Ok(())
}

/// LZCNT and TZCNT (`FORWARD`).
fn count_zeros<T: Int, S: Source, const FORWARD: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let value = S::get::<T>(vcpu, op)?.to_u64();
    let count = match (FORWARD, value) {
        (_, 0) => T::BITS,
        (true, _) => value.trailing_zeros(),
        (false, _) => value.leading_zeros() - (64 - T::BITS),
    };
    T::from_u64(u64::from(count)).set(&mut vcpu.regs, op.r1);
    let rest = vcpu.flags.value() & !(rflags::CF | rflags::ZF);
    let cf = if value == 0 { rflags::CF } else { 0 };
    let zf = if count == 0 { rflags::ZF } else { 0 };
    vcpu.flags.set_arithmetic(rest | cf | zf);
    Ok(())
}

fn popcnt<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let count = S::get::<T>(vcpu, op)?.to_u64().count_ones();
    T::from_u64(u64::from(count)).set(&mut vcpu.regs, op.r1);
    // All flags clear but ZF.
    vcpu.flags.set_arithmetic(if count == 0 { rflags::ZF } else { 0 });
    Ok(())
}

/// Flags of ANDN, BEXTR, BZHI, BLSx: SF and ZF from the result, OF clear; CF as given, AF and PF as logic leaves them.
fn bmi_flags<T: Int>(vcpu: &mut Vcpu, result: T, cf: bool) {
    vcpu.flags.set_logic(result);
    vcpu.flags.set_cf_of(cf, false);
}

/// ANDN r1, r2, r/m.
fn andn<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let b = S::get::<T>(vcpu, op)?.to_u64();
    let r = T::from_u64(!T::get(&vcpu.regs, op.r2).to_u64() & b);
    r.set(&mut vcpu.regs, op.r1);
    bmi_flags(vcpu, r, false);
    Ok(())
}

/// BLSR, BLSMSK, BLSI: r1 = f(r/m).
fn lowest<T: Int, S: Source, const KIND: u8>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let a = S::get::<T>(vcpu, op)?.to_u64();
    let (r, cf) = match KIND {
        BLSR => (a & a.wrapping_sub(1), a == 0),
        BLSMSK => (a ^ a.wrapping_sub(1), a == 0),
        _ => (a & a.wrapping_neg(), a != 0),
    };
    let r = T::from_u64(r);
    r.set(&mut vcpu.regs, op.r1);
    bmi_flags(vcpu, r, cf);
    Ok(())
}
const BLSR: u8 = 0;
const BLSMSK: u8 = 1;
const BLSI: u8 = 2;

/// BEXTR r1, r/m, r3: bits [start, start + length) of the source.
fn bextr<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let a = S::get::<T>(vcpu, op)?.to_u64();
    let control = vcpu.regs[usize::from(op.r3 & 31)];
    let (start, length) = (control as u8 as u32, (control >> 8) as u8 as u32);
    let shifted = a.checked_shr(start).unwrap_or(0);
    let r = T::from_u64(if length < 64 { shifted & ((1 << length) - 1) } else { shifted });
    r.set(&mut vcpu.regs, op.r1);
    bmi_flags(vcpu, r, false);
    Ok(())
}

/// BZHI r1, r/m, r3: clears the bits from an index up.
fn bzhi<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let a = S::get::<T>(vcpu, op)?;
    let index = vcpu.regs[usize::from(op.r3 & 31)] as u8 as u32;
    let r = if index < T::BITS { T::from_u64(a.to_u64() & ((1 << index) - 1)) } else { a };
    r.set(&mut vcpu.regs, op.r1);
    bmi_flags(vcpu, r, index >= T::BITS);
    Ok(())
}

/// PDEP (`DEPOSIT`) and PEXT r1, r2, r/m.
fn scatter<T: Int, S: Source, const DEPOSIT: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let mut mask = S::get::<T>(vcpu, op)?.to_u64();
    let source = T::get(&vcpu.regs, op.r2).to_u64();
    let (mut result, mut k) = (0, 0);
    while mask != 0 {
        let bit = mask & mask.wrapping_neg();
        if DEPOSIT {
            result |= if source >> k & 1 != 0 { bit } else { 0 };
        } else {
            result |= u64::from(source & bit != 0) << k;
        }
        mask ^= bit;
        k += 1;
    }
    T::from_u64(result).set(&mut vcpu.regs, op.r1);
    Ok(())
}

/// ADCX (`CARRY`) and ADOX: additions with a private carry flag.
fn add_chain<T: Int, S: Source, const CARRY: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let b = S::get::<T>(vcpu, op)?.to_u64();
    let a = T::get(&vcpu.regs, op.r1).to_u64();
    let carry = if CARRY { vcpu.flags.cf() } else { vcpu.flags.of() };
    let sum = u128::from(a) + u128::from(b) + u128::from(carry);
    T::from_u64(sum as u64).set(&mut vcpu.regs, op.r1);
    let out = sum >> T::BITS != 0;
    if CARRY {
        vcpu.flags.set_cf(out);
    } else {
        vcpu.flags.set_of(out);
    }
    Ok(())
}

/// CRC32 r1, r/m: the Castagnoli polynomial, bit-reflected.
fn crc32<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let value = S::get::<T>(vcpu, op)?.to_u64();
    let mut crc = vcpu.regs[usize::from(op.r1 & 31)] as u32;
    for byte in &value.to_le_bytes()[..T::BYTES as usize] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    u64::from(crc).set(&mut vcpu.regs, op.r1);
    Ok(())
}

fn crc32_form(d: &Decoding<'_>) -> Option<Handler> {
    let source = match d.shape[1] {
        Slot::Mem => d.instruction.memory_size().size(),
        _ => d.instruction.op1_register().size(),
    };
    Some(match (d.shape[1], source) {
        (Slot::Reg, 1) => crc32::<u8, R2>,
        (Slot::Reg, 2) => crc32::<u16, R2>,
        (Slot::Reg, 4) => crc32::<u32, R2>,
        (Slot::Reg, _) => crc32::<u64, R2>,
        (_, 1) => crc32::<u8, M>,
        (_, 2) => crc32::<u16, M>,
        (_, 4) => crc32::<u32, M>,
        _ => crc32::<u64, M>,
    })
}

/// Instructions of the form op r1, r/m, r3 or op r1, r2, r/m in 32 and 64 bits.
struct R3;
impl Source for R3 {
    #[inline(always)]
    fn get<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step<T> {
        Ok(T::get(&vcpu.regs, op.r3))
    }
}

macro_rules! second_operand {
    ($d:ident, $handler:ident $(, $param:tt)*) => {
        match ($d.shape[1], $d.op.osize) {
            (Slot::Reg, 2) => $handler::<u16, R2 $(, $param)*> as Handler,
            (Slot::Reg, 4) => $handler::<u32, R2 $(, $param)*>,
            (Slot::Reg, _) => $handler::<u64, R2 $(, $param)*>,
            (_, 2) => $handler::<u16, M $(, $param)*>,
            (_, 4) => $handler::<u32, M $(, $param)*>,
            _ => $handler::<u64, M $(, $param)*>,
        }
    };
}

macro_rules! third_operand {
    ($d:ident, $handler:ident $(, $param:tt)*) => {
        match ($d.shape[2], $d.op.osize) {
            (Slot::Reg, 4) => $handler::<u32, R3 $(, $param)*> as Handler,
            (Slot::Reg, _) => $handler::<u64, R3 $(, $param)*>,
            (_, 4) => $handler::<u32, M $(, $param)*>,
            _ => $handler::<u64, M $(, $param)*>,
        }
    };
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    use Mnemonic as N;
    let mnemonic = d.instruction.mnemonic();
    if matches!(mnemonic, N::Bextr | N::Bzhi) && d.shape[1] == Slot::Mem {
        d.op.r3 = d.op.r2;
    }
    let run = match mnemonic {
        N::Bt => bit_form::<Test>(d)?,
        N::Bts => bit_form::<Set>(d)?,
        N::Btr => bit_form::<Reset>(d)?,
        N::Btc => bit_form::<Complement>(d)?,
        N::Bsf => second_operand!(d, scan, true),
        N::Bsr => second_operand!(d, scan, false),
        N::Tzcnt => second_operand!(d, count_zeros, true),
        N::Lzcnt => second_operand!(d, count_zeros, false),
        N::Popcnt => second_operand!(d, popcnt),
        N::Andn => third_operand!(d, andn),
        N::Blsr => second_operand!(d, lowest, BLSR),
        N::Blsmsk => second_operand!(d, lowest, BLSMSK),
        N::Blsi => second_operand!(d, lowest, BLSI),
        N::Bextr => second_operand!(d, bextr),
        N::Bzhi => second_operand!(d, bzhi),
        N::Pdep => third_operand!(d, scatter, true),
        N::Pext => third_operand!(d, scatter, false),
        N::Adcx => second_operand!(d, add_chain, true),
        N::Adox => second_operand!(d, add_chain, false),
        N::Crc32 => crc32_form(d)?,
        _ => return None,
    };
    next(run)
}
