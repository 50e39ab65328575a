//! CPUID: looks the leaf up in the vCPU's model and fills in what depends on its current state.

use iced_x86::Mnemonic;
use platform::x86::cr4;
use platform::x86::gpr::{RAX, RBX, RCX, RDX};

use crate::decode::{Choice, Decoding, Op, next};
use crate::{Step, Vcpu};

const OSXSAVE: u32 = 1 << 27;

fn cpuid(vcpu: &mut Vcpu, _: &Op) -> Step {
    let (function, index) = (vcpu.regs[RAX] as u32, vcpu.regs[RCX] as u32);
    let mut regs = vcpu.features.leaf(function, index);
    match (function, index) {
        (1, _) => {
            regs[2] &= !OSXSAVE;
            if vcpu.cr4 & cr4::OSXSAVE != 0 {
                regs[2] |= OSXSAVE;
            }
        }
        (0xd, 0) => regs[1] = vcpu.features.xsave_size(vcpu.xcr0, false),
        (0xd, 1) => regs[1] = vcpu.features.xsave_size(vcpu.xcr0 | vcpu.msrs.xss, true),
        _ => {}
    }
    for (register, value) in [RAX, RBX, RCX, RDX].into_iter().zip(regs) {
        vcpu.regs[register] = u64::from(value);
    }
    Ok(())
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    if d.instruction.mnemonic() == Mnemonic::Cpuid { next(cpuid) } else { None }
}
