//! Chooses the engine.

use crate::engine::{EngineError, EngineKind, Vm, VmOptions};
use crate::{kvm, soft};

/// What the configuration asks for (`cpu.engine`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EngineChoice {
    /// KVM where the host has hardware virtualisation, else the software CPU.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// The software CPU.
    Soft,
}

impl std::str::FromStr for EngineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "soft" => Ok(Self::Soft),
            _ => Err(format!("cpu.engine must be auto, kvm or soft, not \"{text}\"")),
        }
    }
}

/// The engine that `choice` means on this host, and why in words.
///
/// # Errors
/// KVM was asked for and cannot be used.
pub fn resolve(choice: EngineChoice) -> Result<(EngineKind, String), EngineError> {
    match choice {
        EngineChoice::Soft => Ok((EngineKind::Soft, "as configured".into())),
        EngineChoice::Kvm => {
            kvm::probe().map_err(|why| EngineError::NoKvm { why })?;
            Ok((EngineKind::Kvm, "as configured".into()))
        }
        EngineChoice::Auto => Ok(match kvm::hardware().and_then(|()| kvm::probe()) {
            Ok(()) => (EngineKind::Kvm, "the host has hardware virtualisation".into()),
            Err(why) => (EngineKind::Soft, why),
        }),
    }
}

/// Makes a VM on the engine of `kind`.
///
/// # Errors
/// The engine cannot be set up.
pub fn create(kind: EngineKind, options: &VmOptions) -> Result<Vm, EngineError> {
    match kind {
        EngineKind::Kvm => kvm::create(options),
        EngineKind::Soft => soft::create(options),
    }
}
