//! String instructions: MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS, with and without REP.
//!
//! A repeated instruction works in rounds: a round is one element, or for MOVS and STOS as much as
//! lies in one page on both sides. Registers are up to date after every round, so the instruction can
//! be left for an interrupt, a fault or a single-step trap, and goes on where it stopped.

use iced_x86::Mnemonic;
use platform::x86::gpr::{RAX, RCX, RDI, RDX, RSI};
use platform::x86::{rflags, seg};

use super::operand::stack_error;
use crate::decode::{Choice, Decoding, Handler, Op, end, next, op_flag};
use crate::state::attention;
use crate::state::int::Int;
use crate::{Step, Trap, Vcpu};

/// One element of a string instruction.
trait Element {
    /// Whether REPE and REPNE look at ZF.
    const COMPARES: bool = false;
    const USES_SI: bool = false;
    const USES_DI: bool = false;
    /// What is checked once, even if the count is zero.
    fn check<T: Int>(_: &mut Vcpu) -> Step {
        Ok(())
    }
    /// Moves one element; pointers and counter are the caller's.
    fn one<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step;
    /// Moves up to `count` elements at once, forward; 0 where that is not possible.
    fn many<T: Int>(_: &mut Vcpu, _: &Op, _count: u64) -> Step<u64> {
        Ok(0)
    }
}

/// A pointer or counter register cut to the address size.
#[inline(always)]
fn get_cut(vcpu: &Vcpu, op: &Op, r: usize) -> u64 {
    let shift = op.ashift & 63;
    vcpu.regs[r] << shift >> shift
}

#[inline(always)]
fn set_cut(vcpu: &mut Vcpu, op: &Op, r: usize, value: u64) {
    match op.asize {
        2 => (value as u16).set(&mut vcpu.regs, r as u8),
        4 => (value as u32).set(&mut vcpu.regs, r as u8),
        _ => vcpu.regs[r] = value,
    }
}

#[inline(always)]
fn advance(vcpu: &mut Vcpu, op: &Op, r: usize, bytes: u64) {
    let old = get_cut(vcpu, op, r);
    let new = if vcpu.flags.sys & rflags::DF != 0 { old.wrapping_sub(bytes) } else { old.wrapping_add(bytes) };
    set_cut(vcpu, op, r, new);
}

#[inline(always)]
fn source<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step<u64> {
    let offset = get_cut(vcpu, op, RSI);
    vcpu.segment_linear(usize::from(op.seg), offset, T::BYTES, false)
}

#[inline(always)]
fn destination<T: Int>(vcpu: &mut Vcpu, op: &Op, write: bool) -> Step<u64> {
    let offset = get_cut(vcpu, op, RDI);
    vcpu.segment_linear(seg::ES, offset, T::BYTES, write)
}

/// How many elements a bulk round may take: the segment must be flat and offsets must not wrap. A single element finds out
/// whether it may be misaligned.
fn bulk_limit<T: Int>(vcpu: &Vcpu, op: &Op, registers: &[usize], count: u64) -> u64 {
    let misaligned = || registers.iter().any(|&r| get_cut(vcpu, op, r) & (T::BYTES - 1) != 0);
    if vcpu.flags.sys & rflags::DF != 0 || !vcpu.mode.is_flat() || vcpu.checks_alignment() && misaligned() {
        return 0;
    }
    let top = u64::MAX >> (op.ashift & 63);
    let room = registers.iter().map(|&r| (top - get_cut(vcpu, op, r)) / T::BYTES).min().unwrap_or(0);
    count.min(room)
}

struct Movs;
impl Element for Movs {
    const USES_SI: bool = true;
    const USES_DI: bool = true;
    fn one<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
        let from = source::<T>(vcpu, op)?;
        let value: T = vcpu.load(from).map_err(|trap| stack_error(op, trap))?;
        let to = destination::<T>(vcpu, op, true)?;
        vcpu.store(to, value)
    }
    fn many<T: Int>(vcpu: &mut Vcpu, op: &Op, count: u64) -> Step<u64> {
        let count = bulk_limit::<T>(vcpu, op, &[RSI, RDI], count);
        if count < 2 || usize::from(op.seg) == seg::FS || usize::from(op.seg) == seg::GS {
            return Ok(0);
        }
        let (from, to) = (source::<T>(vcpu, op)?, destination::<T>(vcpu, op, true)?);
        Ok(vcpu.copy_in_pages(to, from, count * T::BYTES)? / T::BYTES)
    }
}

struct Stos;
impl Element for Stos {
    const USES_DI: bool = true;
    fn one<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
        let to = destination::<T>(vcpu, op, true)?;
        vcpu.store(to, T::get(&vcpu.regs, RAX as u8))
    }
    fn many<T: Int>(vcpu: &mut Vcpu, op: &Op, count: u64) -> Step<u64> {
        let count = bulk_limit::<T>(vcpu, op, &[RDI], count);
        if count < 2 {
            return Ok(0);
        }
        let to = destination::<T>(vcpu, op, true)?;
        let value = T::get(&vcpu.regs, RAX as u8);
        vcpu.fill_in_page(to, value, count)
    }
}

struct Lods;
impl Element for Lods {
    const USES_SI: bool = true;
    fn one<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
        let from = source::<T>(vcpu, op)?;
        let value: T = vcpu.load(from).map_err(|trap| stack_error(op, trap))?;
        value.set(&mut vcpu.regs, RAX as u8);
        Ok(())
    }
}

fn compare<T: Int>(vcpu: &mut Vcpu, a: T, b: T) {
    vcpu.flags.set_sub(a, b, T::from_u64(a.to_u64().wrapping_sub(b.to_u64())));
}

struct Cmps;
impl Element for Cmps {
    const COMPARES: bool = true;
    const USES_SI: bool = true;
    const USES_DI: bool = true;
    fn one<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
        let from = source::<T>(vcpu, op)?;
        let a: T = vcpu.load(from).map_err(|trap| stack_error(op, trap))?;
        let to = destination::<T>(vcpu, op, false)?;
        let b: T = vcpu.load(to)?;
        compare(vcpu, a, b);
        Ok(())
    }
}

struct Scas;
impl Element for Scas {
    const COMPARES: bool = true;
    const USES_DI: bool = true;
    fn one<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
        let to = destination::<T>(vcpu, op, false)?;
        let b: T = vcpu.load(to)?;
        compare(vcpu, T::get(&vcpu.regs, RAX as u8), b);
        Ok(())
    }
}

struct Ins;
impl Element for Ins {
    const USES_DI: bool = true;
    fn check<T: Int>(vcpu: &mut Vcpu) -> Step {
        vcpu.check_io(vcpu.regs[RDX] as u16, T::BYTES as u8)
    }
    fn one<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
        let port = vcpu.regs[RDX] as u16;
        let to = destination::<T>(vcpu, op, true)?;
        // The port is read only once it is sure that the value can be stored.
        vcpu.check_write(to, T::BYTES)?;
        let value = vcpu.port_in(op, port, T::BYTES as u8);
        vcpu.store(to, T::from_u64(u64::from(value)))
    }
}

struct Outs;
impl Element for Outs {
    const USES_SI: bool = true;
    fn check<T: Int>(vcpu: &mut Vcpu) -> Step {
        vcpu.check_io(vcpu.regs[RDX] as u16, T::BYTES as u8)
    }
    fn one<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
        let port = vcpu.regs[RDX] as u16;
        let from = source::<T>(vcpu, op)?;
        let value: T = vcpu.load(from).map_err(|trap| stack_error(op, trap))?;
        vcpu.port_out(op, port, T::BYTES as u8, value.to_u64() as u32);
        Ok(())
    }
}

fn single<T: Int, E: Element>(vcpu: &mut Vcpu, op: &Op) -> Step {
    E::check::<T>(vcpu)?;
    E::one::<T>(vcpu, op)?;
    step_pointers::<E>(vcpu, op, T::BYTES);
    Ok(())
}

#[inline(always)]
fn step_pointers<E: Element>(vcpu: &mut Vcpu, op: &Op, bytes: u64) {
    if E::USES_SI {
        advance(vcpu, op, RSI, bytes);
    }
    if E::USES_DI {
        advance(vcpu, op, RDI, bytes);
    }
}

fn repeated<T: Int, E: Element>(vcpu: &mut Vcpu, op: &Op) -> Step {
    E::check::<T>(vcpu)?;
    loop {
        let count = get_cut(vcpu, op, RCX);
        if count == 0 {
            return Ok(());
        }
        // A single-step trap follows every element.
        let stepped = vcpu.attention & attention::SINGLE_STEP != 0;
        let mut done = if stepped { 0 } else { E::many::<T>(vcpu, op, count)? };
        if done == 0 {
            E::one::<T>(vcpu, op)?;
            done = 1;
        }
        step_pointers::<E>(vcpu, op, done * T::BYTES);
        set_cut(vcpu, op, RCX, count - done);
        if E::COMPARES && vcpu.flags.zf() != (op.flags & op_flag::REP != 0) {
            return Ok(());
        }
        if count != done && (vcpu.events.pending() != 0 || stepped || vcpu.attention & attention::DEBUG_TRAP != 0) {
            // Pause here; the instruction runs again for the rest, without another instruction breakpoint. That it may have
            // overwritten itself is no reason: processors notice that behind it.
            vcpu.flags.sys |= rflags::RF;
            vcpu.attention |= attention::RESUME;
            let start = vcpu.rip().wrapping_sub(u64::from(op.len));
            vcpu.set_rip(start);
            return Err(Trap::Leave);
        }
    }
}

fn form<E: Element>(d: &Decoding<'_>) -> Handler {
    let repeats = d.op.flags & (op_flag::REP | op_flag::REPNE) != 0;
    macro_rules! pick {
        ($handler:ident) => {
            match d.op.osize {
                1 => $handler::<u8, E> as Handler,
                2 => $handler::<u16, E>,
                4 => $handler::<u32, E>,
                _ => $handler::<u64, E>,
            }
        };
    }
    if repeats { pick!(repeated) } else { pick!(single) }
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    use Mnemonic as N;
    if !d.instruction.is_string_instruction() {
        return None;
    }
    let run = match d.instruction.mnemonic() {
        N::Movsb | N::Movsw | N::Movsd | N::Movsq => form::<Movs>(d),
        N::Stosb | N::Stosw | N::Stosd | N::Stosq => form::<Stos>(d),
        N::Lodsb | N::Lodsw | N::Lodsd | N::Lodsq => form::<Lods>(d),
        N::Cmpsb | N::Cmpsw | N::Cmpsd | N::Cmpsq => form::<Cmps>(d),
        N::Scasb | N::Scasw | N::Scasd | N::Scasq => form::<Scas>(d),
        N::Insb | N::Insw | N::Insd => return end(form::<Ins>(d)),
        N::Outsb | N::Outsw | N::Outsd => return end(form::<Outs>(d)),
        _ => return None,
    };
    next(run)
}
