//! The KVM engine: vCPUs on the host's hardware virtualisation, interrupt chips in the kernel.
//!
//! | module        | what happens there                                                     |
//! |---------------|------------------------------------------------------------------------|
//! | [`host`]      | whether KVM can be used here                                           |
//! | `kernel`      | the VM in the kernel: memory, chips, routes                            |
//! | `chips`       | interrupt lines and messages on their way to the kernel's chips        |
//! | `vcpu`        | runs a vCPU and serves its exits                                       |
//! | `outside`     | where exits go: buses and policy                                       |
//! | `registers`   | between the kernel's register structures and neutral state             |
//! | `vectors`     | the vector registers                                                   |
//! | `fallback`    | executes, with our own CPU, instructions that KVM gives up on          |
//! | `kick`        | stops a vCPU from another thread                                       |
//! | `halt`        | notices that all vCPUs have halted for good                            |

pub mod host;

#[cfg(target_arch = "x86_64")]
mod chips;
#[cfg(target_arch = "x86_64")]
mod cpuid;
#[cfg(target_arch = "x86_64")]
mod fallback;
#[cfg(target_arch = "x86_64")]
mod halt;
#[cfg(target_arch = "x86_64")]
mod kernel;
#[cfg(target_arch = "x86_64")]
mod kick;
#[cfg(target_arch = "x86_64")]
mod outside;
#[cfg(target_arch = "x86_64")]
mod registers;
#[cfg(target_arch = "x86_64")]
mod vcpu;
#[cfg(target_arch = "x86_64")]
mod vectors;

pub use host::{hardware, probe};

use crate::engine::{EngineError, Vm, VmOptions};

/// Makes a VM run by KVM.
///
/// # Errors
/// KVM cannot be used here, or refused something.
#[cfg(target_arch = "x86_64")]
pub fn create(options: &VmOptions) -> Result<Vm, EngineError> {
    use std::sync::Arc;

    use crate::engine::{EngineKind, Vcpu};

    let kvm = host::open().map_err(|why| EngineError::NoKvm { why })?;
    let vm = Arc::new(kernel::KernelVm::new(&kvm, options)?);
    let chips = Arc::new(chips::KvmChips::new(&vm)?);
    let supported = cpuid::Supported::read(&kvm)?;
    let shared = Arc::new(cpu::SharedCpus::default());
    let (watched, vcpus_gone) = std::sync::mpsc::channel();
    let vcpus = (0..options.layout.cpus)
        .map(|index| vcpu::KvmVcpu::new(index, &vm, options, &supported, shared.clone(), watched.clone()));
    let vcpus = vcpus.collect::<Result<Vec<_>, EngineError>>()?;
    halt::watch(vcpus.iter().map(vcpu::KvmVcpu::kick).collect(), vcpus_gone, options.power.clone())?;
    let vcpus = vcpus.into_iter().map(|vcpu| Box::new(vcpu) as Box<dyn Vcpu>).collect();
    Ok(Vm { kind: EngineKind::Kvm, vcpus, chips })
}

/// There is no KVM for x86 guests on this host.
///
/// # Errors
/// Always.
#[cfg(not(target_arch = "x86_64"))]
pub fn create(_: &VmOptions) -> Result<Vm, EngineError> {
    Err(EngineError::NoKvm { why: "the host's processor is not an x86-64 one".into() })
}

/// The error of a refused ioctl.
#[cfg(target_arch = "x86_64")]
fn refused(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> EngineError {
    let what = what.into();
    move |error| EngineError::Host { what, source: std::io::Error::from_raw_os_error(error.errno()) }
}
