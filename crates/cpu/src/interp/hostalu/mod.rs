//! Runs data instructions on the host CPU: x87, MMX, SSE, AVX, AVX-512 and their kin need no emulation.
//!
//! At decode time an instruction becomes a *stub*: the same instruction with its memory operand replaced by
//! a buffer in [`FpuState`](super::fpu::FpuState) and its general-purpose operand by RAX, between loads of the
//! registers that it reads and stores of those that it writes. Results are bit-exact by construction.
//!
//! | file         | what happens there                                                            |
//! |--------------|-------------------------------------------------------------------------------|
//! | [`features`] | whether the guest's CPUID and the host have an instruction                      |
//! | [`plan`]     | what an instruction reads and writes, and how it is rewritten                   |
//! | [`stub`]     | the stub's machine code                                                         |
//! | [`half`]     | what one instruction needs besides                                              |
//! | [`arena`]    | memory for stubs, writable and executable in two different mappings             |
//! | [`mask`]     | handlers of instructions whose opmask decides what is touched in memory         |
//! | [`x87`]      | guest x87 state in the host's registers from one instruction to the next        |
//! | [`run`]      | all other handlers: checks, memory operand, call, visible effects      |
//!
//! No stub can fault: exceptions are masked in MXCSR and looked for in its flags afterwards, x87 exceptions stay pending
//! in the guest's status word, and memory is always the buffer. On hosts of another architecture there are no stubs, and the
//! instructions are undefined.

pub(super) mod features;

#[cfg(target_arch = "x86_64")]
mod arena;
#[cfg(target_arch = "x86_64")]
mod half;
#[cfg(target_arch = "x86_64")]
mod mask;
#[cfg(target_arch = "x86_64")]
mod plan;
#[cfg(target_arch = "x86_64")]
mod run;
#[cfg(target_arch = "x86_64")]
mod stub;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
#[cfg(target_arch = "x86_64")]
pub(super) mod x87;

use crate::decode::{Choice, Decoding};

/// The stubs of one vCPU.
#[derive(Default)]
pub(crate) struct HostAlu {
    features: features::Known,
    older_forms: Option<u32>,
    #[cfg(target_arch = "x86_64")]
    stubs: stub::Stubs,
}

impl HostAlu {
    /// Whether the guest's CPUID hides an instruction that this CPU runs by itself.
    pub(crate) fn hides(&mut self, instruction: &iced_x86::Instruction, guest: &crate::Features) -> bool {
        self.features.hides(instruction.cpuid_features(), guest)
    }

    /// Decoder options for encodings that mean something older where the guest lacks a feature: TZCNT is BSF, LZCNT is BSR,
    /// and LAHF and SAHF do not exist in 64-bit mode.
    pub(crate) fn older_forms(&mut self, guest: &crate::Features) -> u32 {
        use iced_x86::{CpuidFeature, DecoderOptions};
        if let Some(options) = self.older_forms {
            return options;
        }
        let without = |present: bool, option: u32| if present { 0 } else { option };
        let bmi1 = !self.features.hides(&[CpuidFeature::BMI1], guest);
        let abm = !self.features.hides(&[CpuidFeature::LZCNT], guest);
        let lahf = guest.leaf(0x8000_0001, 0)[2] & 1 != 0;
        let options = without(bmi1, DecoderOptions::NO_MPFX_0FBC)
            | without(abm, DecoderOptions::NO_MPFX_0FBD)
            | without(lahf, DecoderOptions::NO_LAHF_SAHF_64);
        *self.older_forms.insert(options)
    }

    /// Makes sure that a whole block's stubs fit. Returns `true` if all stubs were dropped for it: then no decoded
    /// instruction may be used any more.
    #[must_use]
    pub(crate) fn make_room(&mut self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.stubs.make_room();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }
}

/// Whether the guest has the instruction, and the host too.
pub(super) fn available(d: &mut Decoding<'_>) -> bool {
    d.host_alu.features.all(d.instruction.cpuid_features(), d.features)
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    #[cfg(target_arch = "x86_64")]
    return run::select(d);
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = d;
        None
    }
}
