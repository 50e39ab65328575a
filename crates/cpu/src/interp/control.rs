//! Near control transfer: JMP, Jcc, CALL, RET, LOOP, JCXZ.

use iced_x86::Mnemonic;
use platform::x86::{gpr::RCX, seg};

use super::operand::{M, R1, Source};
use crate::decode::{Choice, Decoding, Handler, Op, Slot, end, op_flag};
use crate::mmu::walk::is_canonical;
use crate::state::flags::Flags;
use crate::state::int::Int;
use crate::{Step, Trap, Vcpu};
use cc::*;

/// One of the sixteen conditions.
pub(crate) trait Condition {
    fn holds(flags: &Flags) -> bool;
}

/// The conditions (SDM vol. 1, appendix B).
pub(crate) mod cc {
    use super::{Condition, Flags};
    use std::marker::PhantomData;

    macro_rules! conditions {
        ($($name:ident $flags:ident => $test:expr;)*) => {$(
            pub(crate) struct $name;
            impl Condition for $name {
                #[inline(always)]
                fn holds($flags: &Flags) -> bool {
                    $test
                }
            }
        )*};
    }
    conditions! {
        O f => f.of();
        B f => f.cf();
        Z f => f.zf();
        Be f => f.cf() || f.zf();
        S f => f.sf();
        P f => f.pf();
        L f => f.sf() != f.of();
        Le f => f.zf() || f.sf() != f.of();
    }
    pub(crate) struct Not<C>(PhantomData<C>);
    impl<C: Condition> Condition for Not<C> {
        #[inline(always)]
        fn holds(flags: &Flags) -> bool {
            !C::holds(flags)
        }
    }
}

impl Vcpu {
    /// Checks a near branch target: canonical in 64-bit mode, inside the code segment otherwise.
    #[inline(always)]
    pub(crate) fn check_target(&self, target: u64) -> Step {
        let good =
            if self.mode.is_64() { is_canonical(target) } else { target <= u64::from(self.segments[seg::CS].limit) };
        if good { Ok(()) } else { Err(Trap::gp(0)) }
    }

    /// `next instruction + displacement`, cut to the operand size.
    #[inline(always)]
    fn branch_target<T: Int>(&self, op: &Op) -> u64 {
        T::from_u64(self.rip().wrapping_add(op.imm)).to_u64()
    }
}

fn jmp<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let target = vcpu.branch_target::<T>(op);
    vcpu.check_target(target)?;
    vcpu.set_rip(target);
    Ok(())
}

fn jmp_indirect<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let target = S::get::<T>(vcpu, op)?.to_u64();
    vcpu.check_target(target)?;
    vcpu.set_rip(target);
    Ok(())
}

fn jcc<T: Int, C: Condition>(vcpu: &mut Vcpu, op: &Op) -> Step {
    if C::holds(&vcpu.flags) { jmp::<T>(vcpu, op) } else { Ok(()) }
}

fn call<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let target = vcpu.branch_target::<T>(op);
    vcpu.check_target(target)?;
    let back = T::from_u64(vcpu.rip());
    vcpu.push(back)?;
    vcpu.set_rip(target);
    Ok(())
}

fn call_indirect<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let target = S::get::<T>(vcpu, op)?.to_u64();
    vcpu.check_target(target)?;
    let back = T::from_u64(vcpu.rip());
    vcpu.push(back)?;
    vcpu.set_rip(target);
    Ok(())
}

/// RET and RET imm16.
fn ret<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let target = vcpu.peek::<T>(0)?.to_u64();
    vcpu.check_target(target)?;
    vcpu.set_sp(vcpu.sp().wrapping_add(T::BYTES + (op.imm & 0xffff)));
    vcpu.set_rip(target);
    Ok(())
}

/// The counter of LOOP and JCXZ has the address size.
fn counter(vcpu: &Vcpu, op: &Op) -> u64 {
    let shift = op.ashift & 63;
    vcpu.regs[RCX] << shift >> shift
}

fn loop_if<T: Int, const WANT: u8>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let count = counter(vcpu, op).wrapping_sub(1) << op.ashift >> op.ashift;
    let go = count != 0
        && match WANT {
            0 => !vcpu.flags.zf(),
            1 => vcpu.flags.zf(),
            _ => true,
        };
    if go {
        jmp::<T>(vcpu, op)?;
    }
    match op.asize {
        2 => (count as u16).set(&mut vcpu.regs, RCX as u8),
        4 => (count as u32).set(&mut vcpu.regs, RCX as u8),
        _ => count.set(&mut vcpu.regs, RCX as u8),
    }
    Ok(())
}

fn jcxz<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    if counter(vcpu, op) == 0 { jmp::<T>(vcpu, op) } else { Ok(()) }
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

/// The counter's size of LOOP and JCXZ comes from the mnemonic's encoding (67h prefix).
fn set_counter_size(d: &mut Decoding<'_>) {
    use iced_x86::Code as C;
    let size = match d.instruction.code() {
        C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Jcxz_rel8_16
        | C::Jcxz_rel8_32 => 2,
        C::Loopne_rel8_16_RCX
        | C::Loopne_rel8_64_RCX
        | C::Loope_rel8_16_RCX
        | C::Loope_rel8_64_RCX
        | C::Loop_rel8_16_RCX
        | C::Loop_rel8_64_RCX
        | C::Jrcxz_rel8_16
        | C::Jrcxz_rel8_64 => 8,
        _ => 4,
    };
    d.op.asize = size;
    d.op.ashift = 64 - size * 8;
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    use Mnemonic as N;
    let mnemonic = d.instruction.mnemonic();
    if matches!(mnemonic, N::Loop | N::Loope | N::Loopne | N::Jcxz | N::Jecxz | N::Jrcxz) {
        set_counter_size(d);
    }
    let size = d.op.osize;
    macro_rules! conditional {
        ($($name:ident $condition:ty;)*) => {
            match mnemonic {
                $(N::$name => wide!(size, jcc, $condition),)*
                _ => return None,
            }
        };
    }
    let run: Handler = match (mnemonic, d.shape[0]) {
        (N::Jmp, Slot::Imm) => wide!(size, jmp),
        (N::Jmp, Slot::Reg) => wide!(size, jmp_indirect, R1),
        (N::Jmp, Slot::Mem) if d.instruction.is_jmp_near_indirect() => wide!(size, jmp_indirect, M),
        (N::Call, Slot::Imm) => wide!(size, call),
        (N::Call, Slot::Reg) => wide!(size, call_indirect, R1),
        (N::Call, Slot::Mem) if d.instruction.is_call_near_indirect() => wide!(size, call_indirect, M),
        (N::Ret, _) => {
            use iced_x86::Code as C;
            match d.instruction.code() {
                C::Retnw | C::Retnw_imm16 => ret::<u16>,
                C::Retnd | C::Retnd_imm16 => ret::<u32>,
                _ => ret::<u64>,
            }
        }
        (N::Loopne, _) => match size {
            2 => loop_if::<u16, 0>,
            4 => loop_if::<u32, 0>,
            _ => loop_if::<u64, 0>,
        },
        (N::Loope, _) => match size {
            2 => loop_if::<u16, 1>,
            4 => loop_if::<u32, 1>,
            _ => loop_if::<u64, 1>,
        },
        (N::Loop, _) => match size {
            2 => loop_if::<u16, 2>,
            4 => loop_if::<u32, 2>,
            _ => loop_if::<u64, 2>,
        },
        (N::Jcxz | N::Jecxz | N::Jrcxz, _) => wide!(size, jcxz),
        _ => conditional! {
            Jo O; Jno Not<O>; Jb B; Jae Not<B>; Je Z; Jne Not<Z>; Jbe Be; Ja Not<Be>;
            Js S; Jns Not<S>; Jp P; Jnp Not<P>; Jl L; Jge Not<L>; Jle Le; Jg Not<Le>;
        },
    };
    debug_assert!(d.op.flags & op_flag::LOCK == 0, "LOCK on a branch does not decode");
    end(run)
}
