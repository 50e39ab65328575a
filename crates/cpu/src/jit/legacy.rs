//! Code outside 64-bit mode: what of it is translated, and what it needs besides.
//!
//! The blocks of all modes live side by side, found by a key that has the decoding mode in it. Emitted code finds the targets of its
//! branches in jump caches without such a key: those of 64-bit code are its own, and the others hold one decoding mode at a time.

use platform::x86::{SEGMENT_UNUSABLE, Segment};

use crate::Vcpu;
use crate::state::RIP;

/// Where the last page below 4 GiB begins. Code in it is the interpreter's, so that nothing in a block wraps around.
const LAST_PAGE: u64 = 0xffff_f000;

/// Added to an address, makes it one that is in no table.
const NO_ADDRESS: u64 = 1 << 62;

/// 0 if the segment is writable data that reaches from its base up to 4 GiB (around the end of the address space, too), else
/// [`NO_ADDRESS`].
pub(super) fn closed(segment: &Segment) -> u64 {
    const CODE: u32 = 1 << 3;
    const EXPAND_DOWN: u32 = 1 << 2;
    const WRITABLE: u32 = 1 << 1;
    const PRESENT: u32 = 1 << 7;
    let wanted = segment.access & (SEGMENT_UNUSABLE | CODE | EXPAND_DOWN | WRITABLE | PRESENT) == WRITABLE | PRESENT;
    if wanted && segment.limit == u32::MAX { 0 } else { NO_ADDRESS }
}

impl Vcpu {
    /// Whether code of the current mode, which is not 64-bit mode, is translated at RIP.
    #[inline]
    pub(super) fn is_translatable_legacy(&self) -> bool {
        self.mode.is_flat32() && self.protected() && self.regs[RIP] < LAST_PAGE
    }

    /// Clears what 64-bit mode has left in the upper halves of registers, which are undefined outside of it (SDM vol. 1, 3.4.1.1).
    /// Emitted code relies on it.
    #[inline]
    pub(super) fn clear_upper_halves(&mut self) {
        if !self.mode.is_64() {
            self.regs[..8].iter_mut().for_each(|r| *r &= 0xffff_ffff);
        }
    }

    /// Makes the jump caches those of the current decoding mode.
    #[inline]
    pub(super) fn follow_decoding(&mut self) {
        let key = self.mode.key();
        if !self.mode.is_64()
            && let Some(jit) = self.jit.as_mut().filter(|jit| jit.decoding != key)
        {
            jit.decoding = key;
            self.tlb.forget_jumps();
        }
    }
}
