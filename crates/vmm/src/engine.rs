//! What every engine offers.

use std::sync::Arc;

use cpu::features::{CpuModel, ModelError, Placement};
use memory::GuestMemory;
use platform::time::SharedTime;
use platform::x86::VcpuState;
use platform::{Bus, IrqLine, IrqSink, MsiSink, Persist, PowerSink};

use crate::policy::AccessPolicy;

/// The engines.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EngineKind {
    /// Hardware virtualisation through /dev/kvm.
    Kvm,
    /// The software CPU.
    Soft,
}

/// How vCPUs are arranged and what they are like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuLayout {
    /// Number of vCPUs; equals sockets × cores × threads.
    pub cpus: u32,
    /// Sockets.
    pub sockets: u32,
    /// Cores per socket.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
    /// x2APIC is offered (`-x`).
    pub x2apic: bool,
}

impl CpuLayout {
    /// APIC id of vCPU `index`: each level has a bit field of its own, as the topology leaves of CPUID say.
    pub fn apic_id(&self, index: u32) -> u32 {
        let bits = |n: u32| n.next_power_of_two().trailing_zeros();
        let (thread, rest) = (index % self.threads, index / self.threads);
        let (core, socket) = (rest % self.cores, rest / self.cores);
        thread | core << bits(self.threads) | socket << (bits(self.threads) + bits(self.cores))
    }

    /// Where vCPU `index` sits, for its CPUID.
    pub(crate) fn placement(&self, index: u32) -> Placement {
        let Self { sockets, cores, threads, x2apic, .. } = *self;
        Placement { apic_id: self.apic_id(index), sockets, cores, threads, x2apic }
    }
}

/// What a VM is made of before it has vCPUs.
#[derive(Clone)]
pub struct VmOptions {
    /// vCPUs.
    pub layout: CpuLayout,
    /// RAM.
    pub memory: GuestMemory,
    /// Port I/O. The engine adds the chips that it keeps itself (8259, 8254).
    pub ports: Arc<Bus>,
    /// Memory-mapped I/O. The engine adds the I/O APIC if it keeps it itself.
    pub mmio: Arc<Bus>,
    /// Clock and timers.
    pub time: SharedTime,
    /// What happens on accesses that nobody answers.
    pub policy: Arc<AccessPolicy>,
    /// The processor that guests see.
    pub model: CpuModel,
    /// The software CPU's translator; `None` leaves it to the interpreter.
    pub translator: Option<cpu::TranslatorOptions>,
    /// Whom translated code is named to for profiles, if anybody.
    pub perf_map: Option<Arc<cpu::PerfMap>>,
    /// Whom to tell when all vCPUs have halted for good.
    pub power: Arc<dyn PowerSink>,
}

/// A VM, ready to run.
pub struct Vm {
    /// Which engine runs it.
    pub kind: EngineKind,
    /// The vCPUs; the first is the boot vCPU, the others wait for a start-up IPI. Each is moved to the thread that runs it.
    pub vcpus: Vec<Box<dyn Vcpu>>,
    /// Where interrupts go in.
    pub chips: Arc<dyn InterruptChips>,
}

/// Why [`Vcpu::run`] came back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VcpuExit {
    /// [`VcpuHandle::stop`] was called.
    Stopped,
    /// Triple fault.
    Shutdown,
    /// An access ended the VM by policy (`-e`); the message is out already.
    Refused,
}

/// One vCPU. Lives on the thread that runs it.
pub trait Vcpu: Send {
    /// Index, 0 for the boot vCPU.
    fn index(&self) -> u32;
    /// Runs the guest until something ends that. Waits, without using the host's CPU, while the guest has halted.
    ///
    /// # Errors
    /// The engine cannot go on.
    fn run(&mut self) -> Result<VcpuExit, EngineError>;
    /// The architectural state.
    ///
    /// # Errors
    /// The engine refused to tell.
    fn state(&mut self) -> Result<VcpuState, EngineError>;
    /// Replaces the architectural state.
    ///
    /// # Errors
    /// The engine refused the state.
    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError>;
    /// What it has done so far: names for people, and counts.
    fn statistics(&self) -> Vec<(String, u64)>;
    /// The handle by which other threads reach it.
    fn handle(&self) -> Arc<dyn VcpuHandle>;
}

/// Reaches a vCPU from another thread.
pub trait VcpuHandle: Send + Sync {
    /// Makes [`Vcpu::run`] return soon, also if it has not been called yet.
    fn stop(&self);
}

/// The interrupt chips of a VM, whoever keeps them.
pub trait InterruptChips: Send + Sync {
    /// A new source on global system interrupt `gsi`: 0–15 reach the 8259 pair and the I/O APIC, others the I/O APIC. Sources of
    /// one line are wired-OR.
    fn line(&self, gsi: u32) -> Option<IrqLine>;
    /// Inputs of the 8259 pair alone, by IRQ number, as one more source each (for the PIRQ router).
    fn pic(&self) -> Arc<dyn IrqSink>;
    /// Inputs of the I/O APIC alone, by pin, as one more source each (for the PIRQ router).
    fn ioapic(&self) -> Arc<dyn IrqSink>;
    /// Message-signalled interrupts.
    fn msi(&self) -> Arc<dyn MsiSink>;
    /// Number of I/O APIC pins.
    fn pins(&self) -> u32;
    /// Everything with state, under names unique among the chips.
    fn persistent(&self) -> Vec<(String, Arc<dyn Persist>)>;
}

/// Why an engine failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// KVM was asked for and cannot be used.
    #[error("KVM cannot be used: {why}")]
    NoKvm {
        /// Why not, and what to do.
        why: String,
    },
    /// The host cannot be the processor that guests are to see.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The engine's kernel part refused something.
    #[error("vm engine: cannot {what}")]
    Host {
        /// What was being done.
        what: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The chips' addresses are taken.
    #[error("vm engine: cannot map the interrupt chips")]
    Bus(#[from] platform::BusError),
    /// The guest did something the engine cannot run.
    #[error("{0}")]
    Unsupported(String),
}
