//! Fast system calls: SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS. The vendors differ in modes and checks
//! (SDM vol. 2; APM vol. 3).

use iced_x86::{Code, Mnemonic};
use platform::x86::gpr::{RCX, RDX, RSP};
use platform::x86::{Segment, efer, rflags, seg};

use crate::decode::{Choice, Decoding, Handler, Op, end, next};
use crate::event::debug::DR6_BS;
use crate::mmu::walk::is_canonical;
use crate::state::attention;
use crate::{Step, Trap, Vcpu};

const R11: usize = 11;

/// Access rights of the flat segments that these instructions load.
const CODE64: u32 = 0xa09b;
const CODE32: u32 = 0xc09b;
const DATA: u32 = 0xc093;
const DPL3: u32 = 3 << 5;

/// A flat segment with rights `access` at privilege level `level` (0 or 3).
#[inline]
fn flat(selector: u16, access: u32, level: u8) -> Segment {
    let (rpl, dpl) = if level == 3 { (3, DPL3) } else { (0, 0) };
    Segment { selector: selector & !3 | rpl, base: 0, limit: u32::MAX, access: access | dpl }
}

/// CS and SS that SYSCALL of 64-bit code loads.
pub(crate) fn call_segments(star: u64) -> (Segment, Segment) {
    let selector = (star >> 32) as u16 & !3;
    (flat(selector, CODE64, 0), flat(selector.wrapping_add(8), DATA, 0))
}

/// CS and SS that SYSRET with 64-bit operand size loads.
pub(crate) fn return_segments(star: u64) -> (Segment, Segment) {
    let selector = (star >> 48) as u16;
    (flat(selector.wrapping_add(16), CODE64, 3), flat(selector.wrapping_add(8), DATA, 3))
}

impl Vcpu {
    /// Loads CS and SS with flat segments at privilege level `level` (0 or 3), CS with rights `code`.
    #[inline]
    fn set_flat(&mut self, cs: u16, ss: u16, code: u32, level: u8) {
        self.put_segment(seg::CS, flat(cs, code, level));
        self.put_segment(seg::SS, flat(ss, DATA, level));
        self.cpl = level;
        self.update_mode();
    }

    fn check_syscall(&self) -> Step {
        let allowed = self.efer & efer::SCE != 0 && (self.in_64bit() || self.features.amd);
        if allowed { Ok(()) } else { Err(Trap::ud()) }
    }
}

fn syscall(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.check_syscall()?;
    let selector = (vcpu.msrs.star >> 32) as u16 & !3;
    let flags = vcpu.rflags() & !rflags::RF;
    vcpu.regs[RCX] = vcpu.rip();
    if vcpu.long_mode() {
        let target = if vcpu.in_64bit() { vcpu.msrs.lstar } else { vcpu.msrs.cstar };
        vcpu.regs[R11] = flags;
        let masked = vcpu.msrs.fmask | rflags::RF;
        vcpu.flags.sys &= !masked | rflags::FIXED;
        if masked & rflags::ARITHMETIC != 0 {
            vcpu.flags.set_arithmetic(flags & !masked);
        }
        vcpu.set_rip(target);
        vcpu.set_flat(selector, selector.wrapping_add(8), CODE64, 0);
    } else {
        vcpu.flags.sys &= !(rflags::VM | rflags::IF | rflags::RF);
        vcpu.set_rip(vcpu.msrs.star & 0xffff_ffff);
        vcpu.set_flat(selector, selector.wrapping_add(8), CODE32, 0);
    }
    // A trap follows only if TF has survived.
    if vcpu.stepping {
        vcpu.stepping = vcpu.flags.sys & rflags::TF != 0;
        vcpu.update_debug_attention();
    }
    Ok(())
}

/// SYSRET; `WIDE` with 64-bit operand size. Real AMD CPUs leave the hidden part of SS alone, which only shows if it was
/// unusable before; the flat segment is what every kernel wants.
fn sysret<const WIDE: bool>(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.check_syscall()?;
    if vcpu.cpl != 0 || !vcpu.protected() {
        return Err(Trap::gp(0));
    }
    let selector = (vcpu.msrs.star >> 48) as u16;
    let target = if WIDE { vcpu.regs[RCX] } else { vcpu.regs[RCX] & 0xffff_ffff };
    // An AMD CPU takes the fault at the target.
    if WIDE && !vcpu.features.amd && !is_canonical(target) {
        return Err(Trap::gp(0));
    }
    if vcpu.in_64bit() {
        const RESTORED: u64 = 0x3c_7fd7;
        let image = vcpu.regs[R11] & RESTORED;
        vcpu.merge_flags(image, RESTORED | rflags::RF);
    } else {
        vcpu.merge_flags(vcpu.rflags() | rflags::IF, rflags::ARITHMETIC | rflags::IF);
    }
    vcpu.set_rip(target);
    if WIDE {
        vcpu.set_flat(selector.wrapping_add(16), selector.wrapping_add(8), CODE64, 3);
    } else {
        vcpu.set_flat(selector, selector.wrapping_add(8), CODE32, 3);
    }
    // Unlike IRET, the trap comes before the first instruction of the program.
    let traps = vcpu.flags.sys & rflags::TF != 0;
    if vcpu.stepping {
        vcpu.stepping = traps;
    } else if traps {
        vcpu.pending_dr6 |= DR6_BS;
        vcpu.attention |= attention::DEBUG_TRAP;
    }
    Ok(())
}

impl Vcpu {
    /// The selector base in IA32_SYSENTER_CS, after the checks that SYSENTER and SYSEXIT share.
    fn sysenter_selector(&self) -> Step<u16> {
        if self.long_mode() && self.features.amd {
            return Err(Trap::ud());
        }
        let selector = self.msrs.sysenter_cs as u16;
        if !self.protected() || selector & !3 == 0 { Err(Trap::gp(0)) } else { Ok(selector & !3) }
    }
}

fn sysenter(vcpu: &mut Vcpu, _: &Op) -> Step {
    let selector = vcpu.sysenter_selector()?;
    let (mask, code) = if vcpu.long_mode() { (u64::MAX, CODE64) } else { (0xffff_ffff, CODE32) };
    vcpu.flags.sys &= !(rflags::VM | rflags::IF | rflags::RF);
    vcpu.regs[RSP] = vcpu.msrs.sysenter_esp & mask;
    vcpu.set_rip(vcpu.msrs.sysenter_eip & mask);
    vcpu.set_flat(selector, selector.wrapping_add(8), code, 0);
    Ok(())
}

/// SYSEXIT; `WIDE` with 64-bit operand size.
fn sysexit<const WIDE: bool>(vcpu: &mut Vcpu, _: &Op) -> Step {
    let selector = vcpu.sysenter_selector()?;
    if vcpu.cpl != 0 {
        return Err(Trap::gp(0));
    }
    let (rsp, rip) = (vcpu.regs[RCX], vcpu.regs[RDX]);
    if WIDE {
        if !is_canonical(rsp) || !is_canonical(rip) {
            return Err(Trap::gp(0));
        }
        vcpu.regs[RSP] = rsp;
        vcpu.set_rip(rip);
        vcpu.set_flat(selector.wrapping_add(32), selector.wrapping_add(40), CODE64, 3);
    } else {
        vcpu.regs[RSP] = rsp & 0xffff_ffff;
        vcpu.set_rip(rip & 0xffff_ffff);
        vcpu.set_flat(selector.wrapping_add(16), selector.wrapping_add(24), CODE32, 3);
    }
    Ok(())
}

fn swapgs(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.require_cpl0()?;
    let base = vcpu.seg_base[seg::GS];
    vcpu.seg_base[seg::GS] = vcpu.msrs.kernel_gs_base;
    vcpu.segments[seg::GS].base = vcpu.msrs.kernel_gs_base;
    vcpu.msrs.kernel_gs_base = base;
    Ok(())
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    let run: Handler = match d.instruction.mnemonic() {
        Mnemonic::Swapgs => return next(swapgs),
        Mnemonic::Syscall => syscall,
        Mnemonic::Sysenter => sysenter,
        Mnemonic::Sysret | Mnemonic::Sysretq => {
            if d.instruction.code() == Code::Sysretq {
                sysret::<true>
            } else {
                sysret::<false>
            }
        }
        Mnemonic::Sysexit | Mnemonic::Sysexitq => {
            if d.instruction.code() == Code::Sysexitq {
                sysexit::<true>
            } else {
                sysexit::<false>
            }
        }
        _ => return None,
    };
    end(run)
}

#[cfg(test)]
mod tests;
