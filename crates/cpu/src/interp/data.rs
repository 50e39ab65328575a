//! Data movement between general-purpose registers and memory: MOV, MOVZX, MOVSX, MOVSXD, LEA, XCHG, BSWAP, CMOVcc, SETcc, conversions.

use iced_x86::Mnemonic;
use platform::x86::gpr::{RAX, RDX};
use platform::x86::rflags;

use super::control::Condition;
use super::operand::{I, M, R1, R2, Source, sized, stack_error};
use crate::decode::{Choice, Decoding, Handler, Op, Slot, next};
use crate::state::int::Int;
use crate::{Step, Vcpu};

fn mov<T: Int, D: Move, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let value = S::get::<T>(vcpu, op)?;
    D::set(vcpu, op, value)
}

/// A destination that is only written.
trait Move {
    fn set<T: Int>(vcpu: &mut Vcpu, op: &Op, value: T) -> Step;
}
impl Move for R1 {
    #[inline(always)]
    fn set<T: Int>(vcpu: &mut Vcpu, op: &Op, value: T) -> Step {
        value.set(&mut vcpu.regs, op.r1);
        Ok(())
    }
}
impl Move for M {
    #[inline(always)]
    fn set<T: Int>(vcpu: &mut Vcpu, op: &Op, value: T) -> Step {
        vcpu.store_op(op, value)
    }
}

fn mov_form(d: &Decoding<'_>) -> Option<Handler> {
    let size = d.op.osize;
    Some(match (d.shape[0], d.shape[1]) {
        (Slot::Reg, Slot::Reg) => sized!(size, mov, R1, R2),
        (Slot::Reg, Slot::Mem) => sized!(size, mov, R1, M),
        (Slot::Mem, Slot::Reg) => sized!(size, mov, M, R1),
        (Slot::Reg, Slot::Imm) => sized!(size, mov, R1, I),
        (Slot::Mem, Slot::Imm) => sized!(size, mov, M, I),
        _ => return None,
    })
}

/// MOVZX, and MOVSX when `SIGNED`.
fn extend<T: Int, F: Int, S: Source, const SIGNED: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let value = S::get::<F>(vcpu, op)?;
    let value = if SIGNED { value.sign_extend() } else { value.to_u64() };
    T::from_u64(value).set(&mut vcpu.regs, op.r1);
    Ok(())
}

fn extend_form<const SIGNED: bool>(d: &Decoding<'_>) -> Option<Handler> {
    macro_rules! from {
        ($from:ty, $source:ty) => {
            match d.op.osize {
                2 => extend::<u16, $from, $source, SIGNED> as Handler,
                4 => extend::<u32, $from, $source, SIGNED>,
                _ => extend::<u64, $from, $source, SIGNED>,
            }
        };
    }
    let source_size = match d.shape[1] {
        // AMD's processors read a doubleword even where only half of it is used.
        Slot::Mem if d.features.amd && d.instruction.mnemonic() == Mnemonic::Movsxd => 4,
        Slot::Mem => d.instruction.memory_size().size(),
        _ => d.instruction.op1_register().size(),
    };
    Some(match (d.shape[1], source_size) {
        (Slot::Reg, 1) => from!(u8, R2),
        (Slot::Reg, 2) => from!(u16, R2),
        (Slot::Reg, _) => from!(u32, R2),
        (Slot::Mem, 1) => from!(u8, M),
        (Slot::Mem, 2) => from!(u16, M),
        (Slot::Mem, _) => from!(u32, M),
        _ => return None,
    })
}

fn lea<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    T::from_u64(vcpu.offset(op)).set(&mut vcpu.regs, op.r1);
    Ok(())
}

fn xchg_registers<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let (a, b) = (T::get(&vcpu.regs, op.r1), T::get(&vcpu.regs, op.r2));
    b.set(&mut vcpu.regs, op.r1);
    a.set(&mut vcpu.regs, op.r2);
    Ok(())
}

/// XCHG with memory is always locked.
fn xchg_memory<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let linear = vcpu.linear(op, T::BYTES, true)?;
    let new = T::get(&vcpu.regs, op.r1);
    let old = vcpu.locked_update::<T>(linear, |_| new).map_err(|trap| stack_error(op, trap))?;
    old.set(&mut vcpu.regs, op.r1);
    Ok(())
}

fn bswap32(vcpu: &mut Vcpu, op: &Op) -> Step {
    u32::get(&vcpu.regs, op.r1).swap_bytes().set(&mut vcpu.regs, op.r1);
    Ok(())
}
fn bswap64(vcpu: &mut Vcpu, op: &Op) -> Step {
    u64::get(&vcpu.regs, op.r1).swap_bytes().set(&mut vcpu.regs, op.r1);
    Ok(())
}
/// BSWAP of a 16-bit register is undefined; processors give zero.
fn bswap16(vcpu: &mut Vcpu, op: &Op) -> Step {
    0u16.set(&mut vcpu.regs, op.r1);
    Ok(())
}

/// MOVBE: MOV with the bytes in reverse order.
fn movbe_load<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let value: T = vcpu.load_op(op)?;
    reverse(value).set(&mut vcpu.regs, op.r1);
    Ok(())
}
fn movbe_store<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let value = reverse(T::get(&vcpu.regs, op.r1));
    vcpu.store_op(op, value)
}
fn reverse<T: Int>(value: T) -> T {
    T::from_u64(value.to_u64().swap_bytes() >> (64 - T::BITS))
}

fn cmov<T: Int, S: Source, C: Condition>(vcpu: &mut Vcpu, op: &Op) -> Step {
    // The source is read, and may fault, whether the condition holds or not; a 32-bit destination is zero-extended either way.
    let source = S::get::<T>(vcpu, op)?;
    let value = if C::holds(&vcpu.flags) { source } else { T::get(&vcpu.regs, op.r1) };
    value.set(&mut vcpu.regs, op.r1);
    Ok(())
}

fn setcc<D: Move, C: Condition>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let value = u8::from(C::holds(&vcpu.flags));
    D::set(vcpu, op, value)
}

fn cmov_form<C: Condition>(d: &Decoding<'_>) -> Option<Handler> {
    let size = d.op.osize;
    Some(match d.shape[1] {
        Slot::Reg => sized!(size, cmov, R2, C),
        Slot::Mem => sized!(size, cmov, M, C),
        _ => return None,
    })
}

fn setcc_form<C: Condition>(d: &Decoding<'_>) -> Option<Handler> {
    Some(match d.shape[0] {
        Slot::Reg => setcc::<R1, C>,
        Slot::Mem => setcc::<M, C>,
        _ => return None,
    })
}

/// CBW, CWDE, CDQE: sign-extends the lower half of the accumulator.
fn extend_accumulator<T: Int, H: Int>(vcpu: &mut Vcpu, _: &Op) -> Step {
    let value = H::get(&vcpu.regs, RAX as u8).sign_extend();
    T::from_u64(value).set(&mut vcpu.regs, RAX as u8);
    Ok(())
}

/// CWD, CDQ, CQO: fills RDX with the accumulator's sign.
fn spread_sign<T: Int>(vcpu: &mut Vcpu, _: &Op) -> Step {
    let sign = T::get(&vcpu.regs, RAX as u8).sign();
    T::from_u64(if sign { u64::MAX } else { 0 }).set(&mut vcpu.regs, RDX as u8);
    Ok(())
}

fn nop(_: &mut Vcpu, _: &Op) -> Step {
    Ok(())
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    use Mnemonic as N;
    if d.instruction.is_string_instruction() {
        return None;
    }
    let size = d.op.osize;
    let mnemonic = d.instruction.mnemonic();
    let run = match mnemonic {
        N::Mov => mov_form(d),
        N::Movzx => extend_form::<false>(d),
        N::Movsx | N::Movsxd => extend_form::<true>(d),
        N::Lea => Some(sized!(size, lea)),
        N::Xchg if d.shape[0] == Slot::Reg && d.shape[1] == Slot::Reg => Some(sized!(size, xchg_registers)),
        N::Xchg => Some(sized!(size, xchg_memory)),
        N::Bswap => Some(match size {
            2 => bswap16,
            4 => bswap32,
            _ => bswap64,
        }),
        N::Movbe if d.shape[0] == Slot::Reg => Some(sized!(size, movbe_load)),
        N::Movbe => Some(sized!(size, movbe_store)),
        N::Cbw => Some(extend_accumulator::<u16, u8> as Handler),
        N::Cwde => Some(extend_accumulator::<u32, u16> as Handler),
        N::Cdqe => Some(extend_accumulator::<u64, u32> as Handler),
        N::Cwd => Some(spread_sign::<u16> as Handler),
        N::Cdq => Some(spread_sign::<u32> as Handler),
        N::Cqo => Some(spread_sign::<u64> as Handler),
        // AMD leaves 0F 0D with a register undefined.
        N::Reservednop if d.features.amd && d.shape[0] == Slot::Reg && is_0f0d(d) => return None,
        N::Nop
        | N::Reservednop
        | N::Prefetchw
        | N::Prefetch
        | N::Prefetchnta
        | N::Prefetcht0
        | N::Prefetcht1
        | N::Prefetcht2
        | N::Endbr64
        | N::Endbr32
        | N::Prefetchwt1 => Some(nop as Handler),
        N::Pause => Some(pause as Handler),
        N::Lfence | N::Mfence | N::Sfence => Some(fence as Handler),
        _ => conditional(d),
    };
    next(run?)
}

/// How many PAUSEs make a spin loop.
pub(crate) const SPINNING: u8 = 16;

/// Offers the host CPU to others when the guest spins: where there are fewer host CPUs than vCPUs, the one that it waits for may
/// be among those that do not run. Not with interrupts off, where guests do not expect to be gone for long.
fn pause(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.pauses = vcpu.pauses.saturating_add(1);
    if vcpu.pauses >= SPINNING && vcpu.flags.sys & rflags::IF != 0 {
        vcpu.pauses = 0;
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
    Ok(())
}

/// The host orders memory as the guest expects; the fence keeps the compiler's and the store buffer's order.
fn fence(_: &mut Vcpu, _: &Op) -> Step {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

fn is_0f0d(d: &Decoding<'_>) -> bool {
    use iced_x86::Code as C;
    matches!(
        d.instruction.code(),
        C::Reservednop_rm16_r16_0F0D | C::Reservednop_rm32_r32_0F0D | C::Reservednop_rm64_r64_0F0D
    )
}

fn conditional(d: &Decoding<'_>) -> Option<Handler> {
    use super::control::cc::*;
    use Mnemonic as N;
    macro_rules! choose {
        ($($cmov:ident $setcc:ident $condition:ty;)*) => {
            match d.instruction.mnemonic() {
                $(N::$cmov => cmov_form::<$condition>(d),
                N::$setcc => setcc_form::<$condition>(d),)*
                _ => None,
            }
        };
    }
    choose! {
        Cmovo Seto O; Cmovno Setno Not<O>;
        Cmovb Setb B; Cmovae Setae Not<B>;
        Cmove Sete Z; Cmovne Setne Not<Z>;
        Cmovbe Setbe Be; Cmova Seta Not<Be>;
        Cmovs Sets S; Cmovns Setns Not<S>;
        Cmovp Setp P; Cmovnp Setnp Not<P>;
        Cmovl Setl L; Cmovge Setge Not<L>;
        Cmovle Setle Le; Cmovg Setg Not<Le>;
    }
}
