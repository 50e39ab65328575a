//! Model-specific registers.

use crate::Vcpu;

impl Vcpu {
    /// The MSRs that the CPU core owns, for snapshots and engine changes.
    pub(crate) fn save_msrs(&self) -> Vec<(u32, u64)> {
        Vec::new()
    }

    /// Takes MSRs over; unknown indices are ignored.
    pub(crate) fn load_msrs(&mut self, _msrs: &[(u32, u64)]) {}
}
