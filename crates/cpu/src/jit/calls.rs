//! What SYSCALL and SYSRET of emitted code need, worked out when the interpreter runs one of them.

use iced_x86::Mnemonic;
use platform::x86::{Segment, efer, rflags};

use crate::Vcpu;
use crate::interp::syscall::{call_segments, return_segments};
use crate::mmu::walk::is_canonical;
use crate::translate::system::BUILT_IN;

/// In the context block.
#[repr(C)]
pub(crate) struct FastCalls {
    /// Not zero: SYSCALL is the interpreter's. Zero is for when STAR, LSTAR and FMASK are as below.
    pub(crate) no_call: u64,
    /// The same for SYSRET.
    pub(crate) no_return: u64,
    /// Bits of RFLAGS that SYSCALL keeps.
    pub(crate) keep: u64,
    /// LSTAR.
    pub(crate) target: u64,
    pub(crate) call_cs: Segment,
    pub(crate) call_ss: Segment,
    pub(crate) return_cs: Segment,
    pub(crate) return_ss: Segment,
}

impl Vcpu {
    /// Called when the interpreter has run an instruction for emitted code: prepares the fast way for the next time.
    #[inline]
    pub(super) fn prepare_calls(&mut self, mnemonic: Mnemonic) {
        if matches!(mnemonic, Mnemonic::Syscall | Mnemonic::Sysretq) {
            self.prepare_calls_slow();
        }
    }

    #[cold]
    fn prepare_calls_slow(&mut self) {
        /// Emitted code relies on these being clear in the handler.
        const CLEARED: u64 = rflags::ARITHMETIC | rflags::TF | rflags::IF | rflags::DF | rflags::AC;
        let (star, target, mask) = (self.msrs.star, self.msrs.lstar, self.msrs.fmask);
        let enabled = self.long_mode() && self.efer & efer::SCE != 0;
        let calls = &mut self.context().calls;
        calls.no_call = u64::from(!enabled || mask & CLEARED != CLEARED || !is_canonical(target));
        calls.no_return = u64::from(!enabled);
        calls.keep = !(mask | rflags::RF) | rflags::FIXED;
        calls.target = target;
        (calls.call_cs, calls.call_ss) = call_segments(star);
        (calls.return_cs, calls.return_ss) = return_segments(star);
    }

    /// STAR, LSTAR, FMASK or EFER have changed.
    pub(crate) fn forget_calls(&mut self) {
        if self.jit.is_some() {
            let calls = &mut self.context().calls;
            (calls.no_call, calls.no_return) = (1, 1);
        }
    }

    /// CR4 has changed: drops code that relies on it.
    pub(crate) fn cr4_changed(&mut self, old: u64) {
        if (old ^ self.cr4) & BUILT_IN != 0 {
            self.drop_translations();
        }
    }
}
