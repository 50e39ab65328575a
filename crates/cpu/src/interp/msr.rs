//! RDMSR and WRMSR: the model-specific registers that the CPU core owns. All others are the environment's
//! (local APIC, and the machine's policy for unknown ones).

use iced_x86::Mnemonic;
use platform::x86::gpr::{RAX, RCX, RDX};
use platform::x86::{efer, seg};

use crate::decode::{Choice, Decoding, Op, end};
use crate::mmu::walk::is_canonical;
use crate::{Step, Trap, Vcpu};

/// MSR indices (SDM vol. 4; APM vol. 2, appendix A).
pub(crate) mod index {
    #![allow(missing_docs)]
    pub(crate) const TSC: u32 = 0x10;
    pub(crate) const TSC_ADJUST: u32 = 0x3b;
    pub(crate) const MTRR_CAP: u32 = 0xfe;
    pub(crate) const SYSENTER_CS: u32 = 0x174;
    pub(crate) const SYSENTER_ESP: u32 = 0x175;
    pub(crate) const SYSENTER_EIP: u32 = 0x176;
    pub(crate) const MCG_CAP: u32 = 0x179;
    pub(crate) const MCG_STATUS: u32 = 0x17a;
    pub(crate) const MISC_ENABLE: u32 = 0x1a0;
    pub(crate) const DEBUGCTL: u32 = 0x1d9;
    pub(crate) const MTRR_VAR: u32 = 0x200;
    pub(crate) const MTRR_VAR_END: u32 = 0x20f;
    pub(crate) const PAT: u32 = 0x277;
    pub(crate) const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub(crate) const XSS: u32 = 0xda0;
    pub(crate) const EFER: u32 = 0xc000_0080;
    pub(crate) const STAR: u32 = 0xc000_0081;
    pub(crate) const LSTAR: u32 = 0xc000_0082;
    pub(crate) const CSTAR: u32 = 0xc000_0083;
    pub(crate) const FMASK: u32 = 0xc000_0084;
    pub(crate) const FS_BASE: u32 = 0xc000_0100;
    pub(crate) const GS_BASE: u32 = 0xc000_0101;
    pub(crate) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(crate) const TSC_AUX: u32 = 0xc000_0103;
}

/// The fixed-range MTRRs in the order of `Msrs::mtrr_fixed`.
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

/// MSRs that a snapshot keeps.
const SAVED: [u32; 18] = [
    index::TSC_ADJUST,
    index::SYSENTER_CS,
    index::SYSENTER_ESP,
    index::SYSENTER_EIP,
    index::MISC_ENABLE,
    index::DEBUGCTL,
    index::PAT,
    index::MTRR_DEF_TYPE,
    index::XSS,
    index::STAR,
    index::LSTAR,
    index::CSTAR,
    index::FMASK,
    index::FS_BASE,
    index::GS_BASE,
    index::KERNEL_GS_BASE,
    index::TSC_AUX,
    index::TSC,
];

impl Vcpu {
    /// The MSRs that the CPU core owns, for snapshots and engine changes.
    pub(crate) fn save_msrs(&self) -> Vec<(u32, u64)> {
        let variable = index::MTRR_VAR..=index::MTRR_VAR_END;
        let all = SAVED.into_iter().chain(MTRR_FIXED).chain(variable);
        all.filter_map(|index| Some((index, self.read_own_msr(index)?))).collect()
    }

    /// Takes MSRs over; values that the guest could not have written are ignored.
    pub(crate) fn load_msrs(&mut self, msrs: &[(u32, u64)]) {
        for &(index, value) in msrs {
            let _ = self.write_own_msr(index, value);
        }
    }

    /// The value of an MSR of the CPU core, or `None` if it is not one.
    fn read_own_msr(&self, index: u32) -> Option<u64> {
        let msrs = &self.msrs;
        Some(match index {
            index::TSC => self.tsc(),
            index::TSC_ADJUST => msrs.tsc_adjust,
            // Eight variable ranges, fixed ranges, write-combining.
            index::MTRR_CAP => 0x508,
            index::SYSENTER_CS => msrs.sysenter_cs,
            index::SYSENTER_ESP => msrs.sysenter_esp,
            index::SYSENTER_EIP => msrs.sysenter_eip,
            // No machine-check banks.
            index::MCG_CAP | index::MCG_STATUS => 0,
            index::MISC_ENABLE if !self.features.amd => msrs.misc_enable,
            index::DEBUGCTL => msrs.debugctl,
            index::PAT => msrs.pat,
            index::MTRR_DEF_TYPE => msrs.mtrr_def_type,
            index::MTRR_VAR..=index::MTRR_VAR_END => {
                let (base, mask) = msrs.mtrr_var[(index - index::MTRR_VAR) as usize / 2];
                if index & 1 == 0 { base } else { mask }
            }
            index::XSS => msrs.xss,
            index::EFER => self.efer,
            index::STAR => msrs.star,
            index::LSTAR => msrs.lstar,
            index::CSTAR => msrs.cstar,
            index::FMASK => msrs.fmask,
            index::FS_BASE => self.seg_base[seg::FS],
            index::GS_BASE => self.seg_base[seg::GS],
            index::KERNEL_GS_BASE => msrs.kernel_gs_base,
            index::TSC_AUX => msrs.tsc_aux,
            _ => {
                let fixed = MTRR_FIXED.iter().position(|&fixed| fixed == index)?;
                msrs.mtrr_fixed[fixed]
            }
        })
    }

    /// Writes an MSR of the CPU core. `None` if it is not one.
    fn write_own_msr(&mut self, index: u32, value: u64) -> Option<Step> {
        let canonical = if is_canonical(value) { Ok(()) } else { Err(Trap::gp(0)) };
        let msrs = &mut self.msrs;
        let slot = match index {
            index::EFER => return Some(self.write_efer(value)),
            index::FS_BASE | index::GS_BASE => {
                if canonical.is_ok() {
                    let index = if index == index::FS_BASE { seg::FS } else { seg::GS };
                    self.segments[index].base = value;
                    self.seg_base[index] = value;
                }
                return Some(canonical);
            }
            index::TSC => {
                let change = value.wrapping_sub(self.tsc());
                self.msrs.tsc_offset = self.msrs.tsc_offset.wrapping_add(change);
                self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(change);
                return Some(Ok(()));
            }
            index::TSC_ADJUST => {
                msrs.tsc_offset = msrs.tsc_offset.wrapping_add(value.wrapping_sub(msrs.tsc_adjust));
                &mut msrs.tsc_adjust
            }
            index::MTRR_CAP => return Some(Err(Trap::gp(0))),
            index::MCG_CAP => return Some(Err(Trap::gp(0))),
            index::MCG_STATUS => return Some(if value == 0 { Ok(()) } else { Err(Trap::gp(0)) }),
            index::SYSENTER_CS => &mut msrs.sysenter_cs,
            index::LSTAR | index::CSTAR | index::KERNEL_GS_BASE | index::SYSENTER_ESP | index::SYSENTER_EIP
                if canonical.is_err() =>
            {
                return Some(canonical);
            }
            index::SYSENTER_ESP => &mut msrs.sysenter_esp,
            index::SYSENTER_EIP => &mut msrs.sysenter_eip,
            index::MISC_ENABLE if !self.features.amd => &mut msrs.misc_enable,
            index::DEBUGCTL => &mut msrs.debugctl,
            index::PAT if !value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)) => {
                return Some(Err(Trap::gp(0)));
            }
            index::PAT => &mut msrs.pat,
            index::MTRR_DEF_TYPE => &mut msrs.mtrr_def_type,
            index::MTRR_VAR..=index::MTRR_VAR_END => {
                let pair = &mut msrs.mtrr_var[(index - index::MTRR_VAR) as usize / 2];
                if index & 1 == 0 { &mut pair.0 } else { &mut pair.1 }
            }
            index::XSS if value != 0 => return Some(Err(Trap::gp(0))),
            index::XSS => &mut msrs.xss,
            index::STAR => &mut msrs.star,
            index::LSTAR => &mut msrs.lstar,
            index::CSTAR => &mut msrs.cstar,
            index::FMASK if value >> 32 != 0 => return Some(Err(Trap::gp(0))),
            index::FMASK => &mut msrs.fmask,
            index::KERNEL_GS_BASE => &mut msrs.kernel_gs_base,
            index::TSC_AUX if value >> 32 != 0 => return Some(Err(Trap::gp(0))),
            index::TSC_AUX => &mut msrs.tsc_aux,
            _ => {
                let fixed = MTRR_FIXED.iter().position(|&fixed| fixed == index)?;
                &mut msrs.mtrr_fixed[fixed]
            }
        };
        *slot = value;
        if matches!(index, index::STAR | index::LSTAR | index::FMASK) {
            self.forget_calls();
        }
        Some(Ok(()))
    }

    /// EFER: LMA is read-only; LME must not change while paging is on.
    fn write_efer(&mut self, value: u64) -> Step {
        const COMMON: u64 = efer::SCE | efer::LME | efer::NXE;
        // Automatic IBRS: AMD's, and without an effect here.
        let writable = COMMON | if self.features.amd { efer::AIBRSE } else { 0 };
        if value & !(writable | efer::LMA) != 0 || (self.paging() && (value ^ self.efer) & efer::LME != 0) {
            return Err(Trap::gp(0));
        }
        if (value ^ self.efer) & efer::NXE != 0 {
            self.tlb.flush_all();
        }
        self.efer = value & writable | self.efer & efer::LMA;
        self.forget_calls();
        Ok(())
    }
}

fn rdmsr(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.require_cpl0()?;
    let index = vcpu.regs[RCX] as u32;
    vcpu.fpu.park();
    let value = vcpu.read_own_msr(index).or_else(|| vcpu.env.read_msr(index)).ok_or(Trap::gp(0))?;
    vcpu.regs[RAX] = value & 0xffff_ffff;
    vcpu.regs[RDX] = value >> 32;
    Ok(())
}

fn wrmsr(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.require_cpl0()?;
    let index = vcpu.regs[RCX] as u32;
    let value = vcpu.regs[RDX] << 32 | vcpu.regs[RAX] & 0xffff_ffff;
    vcpu.fpu.park();
    match vcpu.write_own_msr(index, value) {
        Some(done) => done,
        None if vcpu.env.write_msr(index, value) => Ok(()),
        None => Err(Trap::gp(0)),
    }
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    match d.instruction.mnemonic() {
        Mnemonic::Rdmsr => end(rdmsr),
        Mnemonic::Wrmsr => end(wrmsr),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Machine;

    #[test]
    fn memory_types_after_power_up_are_those_that_software_relies_on() {
        let mut m = Machine::long();
        m.set_reg(RCX, index::PAT.into());
        m.code(|a| a.rdmsr());
        m.step(1);
        assert_eq!((m.reg(RDX), m.reg(RAX)), (0x0007_0406, 0x0007_0406));
    }
}
