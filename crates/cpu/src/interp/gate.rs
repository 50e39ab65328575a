//! What must be enabled before an x87 or SIMD instruction may run (SDM vol. 2, exception classes 1–14; AMD APM vol. 3, 4.1).
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

use platform::x86::{cr0, cr4, rflags};

use super::fpu::{FpuState, component};
use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

const AVX_STATE: u64 = 1 << component::SSE | 1 << component::AVX;
const AVX512_STATE: u64 = AVX_STATE | 1 << component::OPMASK | 1 << component::ZMM_HI256 | 1 << component::HI16_ZMM;

/// One kind of enabling conditions.
pub(crate) trait Gate {
    /// A write to an XMM register zeroes the vector register from there up to this byte: legacy encodings leave the part
    /// above 16 bytes alone.
    const ZERO_TO: usize;
    /// # Errors
    /// #UD, #NM or #MF.
    fn check(vcpu: &Vcpu) -> Step;
    /// Brings the x87 registers to where the stub wants them.
    #[inline(always)]
    fn place(_: &mut FpuState) {}
    /// What an unmasked exception changes all the same.
    fn faulted(_: &mut FpuState) {}
}

/// Legacy-encoded SSE.
pub(crate) struct Sse;
/// VEX and XOP.
pub(crate) struct Avx;
/// EVEX, and VEX on opmask registers.
pub(crate) struct Avx512;
/// MMX, 3DNow!, and SSE instructions with an MMX operand that touch x87 state.
pub(crate) struct Mmx;
/// SSE instructions that also touch the MMX registers.
pub(crate) struct SseMmx;
/// x87, waiting: a pending exception is raised first.
pub(crate) struct X87;
/// x87 control instructions that do not look at pending exceptions.
pub(crate) struct X87NoWait;
/// XSAVE and its kin.
pub(crate) struct Xsave;

impl Gate for Sse {
    const ZERO_TO: usize = 16;
    #[inline(always)]
    fn check(vcpu: &Vcpu) -> Step {
        if vcpu.cr0 & (cr0::EM | cr0::TS) | (!vcpu.cr4 & cr4::OSFXSR) == 0 {
            return Ok(());
        }
        refuse(vcpu, vcpu.cr0 & cr0::EM != 0 || vcpu.cr4 & cr4::OSFXSR == 0)
    }
}

#[inline(always)]
fn check_vex(vcpu: &Vcpu, state: u64) -> Step {
    let off = (vcpu.cr0 & cr0::TS)
        | (!vcpu.cr0 & cr0::PE)
        | (vcpu.flags.sys & rflags::VM)
        | (!vcpu.cr4 & cr4::OSXSAVE)
        | (!vcpu.xcr0 & state);
    if off == 0 {
        return Ok(());
    }
    let undefined = !vcpu.protected() || vcpu.v8086() || vcpu.cr4 & cr4::OSXSAVE == 0 || vcpu.xcr0 & state != state;
    refuse(vcpu, undefined)
}

impl Gate for Avx {
    const ZERO_TO: usize = 64;
    #[inline(always)]
    fn check(vcpu: &Vcpu) -> Step {
        check_vex(vcpu, AVX_STATE)
    }
}

impl Gate for Avx512 {
    const ZERO_TO: usize = 64;
    #[inline(always)]
    fn check(vcpu: &Vcpu) -> Step {
        check_vex(vcpu, AVX512_STATE)
    }
}

impl Gate for Mmx {
    const ZERO_TO: usize = 16;
    #[inline(always)]
    fn check(vcpu: &Vcpu) -> Step {
        if vcpu.cr0 & (cr0::EM | cr0::TS) != 0 {
            return refuse(vcpu, vcpu.cr0 & cr0::EM != 0);
        }
        pending(vcpu)
    }
    #[inline(always)]
    fn place(fpu: &mut FpuState) {
        fpu.unpark();
    }
}

impl Gate for SseMmx {
    const ZERO_TO: usize = 16;
    #[inline(always)]
    fn check(vcpu: &Vcpu) -> Step {
        Sse::check(vcpu)?;
        pending(vcpu)
    }
    /// The stub may find an unmasked exception, and must then leave no trace.
    #[inline(always)]
    fn place(fpu: &mut FpuState) {
        fpu.park_whole();
    }
    /// The switch to MMX registers comes first.
    fn faulted(fpu: &mut FpuState) {
        fpu.enter_mmx();
    }
}

impl Gate for X87 {
    const ZERO_TO: usize = 16;
    #[inline(always)]
    fn check(vcpu: &Vcpu) -> Step {
        X87NoWait::check(vcpu)?;
        pending(vcpu)
    }
}

impl Gate for X87NoWait {
    const ZERO_TO: usize = 16;
    #[inline(always)]
    fn check(vcpu: &Vcpu) -> Step {
        if vcpu.cr0 & (cr0::EM | cr0::TS) == 0 { Ok(()) } else { Err(Trap::nm()) }
    }
}

impl Gate for Xsave {
    const ZERO_TO: usize = 16;
    #[inline(always)]
    fn check(vcpu: &Vcpu) -> Step {
        if vcpu.cr4 & cr4::OSXSAVE == 0 {
            return Err(Trap::ud());
        }
        if vcpu.cr0 & cr0::TS == 0 { Ok(()) } else { Err(Trap::nm()) }
    }
}

#[cold]
fn refuse(_: &Vcpu, undefined: bool) -> Step {
    Err(if undefined { Trap::ud() } else { Trap::nm() })
}

/// #MF if an unmasked x87 exception waits. With CR0.NE clear a PC's FERR# line would raise IRQ 13 instead; no system that
/// this machine runs depends on it, so both cases are #MF.
#[inline(always)]
pub(super) fn pending(vcpu: &Vcpu) -> Step {
    if vcpu.fpu.x87_pending() { Err(Trap::fault(vector::MF)) } else { Ok(()) }
}
