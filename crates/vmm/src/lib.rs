//! A virtual machine as an object: vCPUs, their registers, interrupt chips; run, stop, wait.
//!
//! Two engines stand behind one pair of traits, [`Vcpu`] and [`InterruptChips`]:
//!
//! * [`kvm`]: the host's hardware virtualisation, with the kernel's interrupt chips
//! * [`soft`]: our own CPU (crate `cpu`) with our own chips (crate `irqchip`)
//!
//! Nothing above this crate knows which of them runs the guest. [`select`] chooses.

pub mod engine;
pub mod kvm;
pub mod policy;
pub mod select;
pub mod soft;
mod sources;
pub mod time;

pub use engine::{EngineError, EngineKind, InterruptChips, Vcpu, VcpuExit, VcpuHandle, Vm, VmOptions};
pub use policy::{AccessPolicy, PolicyOptions};
pub use select::{EngineChoice, create};
pub use time::HostTime;
