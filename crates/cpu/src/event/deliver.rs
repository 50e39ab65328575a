//! Delivery of exceptions and interrupts.

use crate::{Exception, Step, Trap, Vcpu};

/// DR6.BS: single step.
pub(crate) const DR6_BS: u64 = 1 << 14;

impl Vcpu {
    /// Delivers an exception, with double- and triple-fault rules.
    pub(crate) fn deliver_exception(&mut self, _exception: Exception) -> Step {
        Err(Trap::Shutdown)
    }
    /// Delivers the pending debug trap.
    pub(crate) fn deliver_debug_trap(&mut self) -> Step {
        Err(Trap::Shutdown)
    }
    /// Delivers an NMI.
    pub(crate) fn deliver_nmi(&mut self) -> Step {
        Err(Trap::Shutdown)
    }
    /// Delivers an external interrupt.
    pub(crate) fn deliver_interrupt(&mut self, _vector: u8) -> Step {
        Err(Trap::Shutdown)
    }
    /// Whether an instruction breakpoint matches RIP; notes it in `pending_dr6`.
    pub(crate) fn hits_breakpoint(&mut self) -> bool {
        false
    }
    /// INIT: like RESET, but the APIC id, FPU, MSRs and caches stay (SDM vol. 3, table 9-1).
    pub(crate) fn init(&mut self) {}
    /// Start-up IPI.
    pub(crate) fn start_up(&mut self, _vector: u8) {}
}
