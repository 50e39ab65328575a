//! The KVM engine.

use crate::engine::{EngineError, Vm, VmOptions};

/// Whether the host's processor offers VT-x or SVM to this system.
///
/// # Errors
/// Why not, in words.
pub fn hardware() -> Result<(), String> {
    Err("the host's processor offers neither VT-x nor SVM".into())
}

/// Whether /dev/kvm can be used.
///
/// # Errors
/// Why not, and what to do.
pub fn probe() -> Result<(), String> {
    Err("not available in this build yet".into())
}

/// Makes a VM.
///
/// # Errors
/// KVM refused something.
pub fn create(_options: &VmOptions) -> Result<Vm, EngineError> {
    Err(EngineError::NoKvm { why: "not available in this build yet".into() })
}
