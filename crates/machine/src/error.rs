//! Why a VM could not be built or run, and the exit code that goes with it.

use config::{ConfigError, Exit};
use platform::BusError;

/// Why a VM could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A key is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Something is configured that this build does not have.
    #[error("{0}: not available in this build yet")]
    NotAvailable(String),
    /// More vCPUs than possible.
    #[error("{requested} vCPUs requested but only {available} available")]
    TooManyCpus {
        /// Asked for.
        requested: u32,
        /// Possible.
        available: u32,
    },
    /// RAM.
    #[error("Unable to setup memory ({0} bytes)")]
    Memory(u64, #[source] memory::MemoryError),
    /// Where a memory domain is to come from.
    #[error("domains.{0}.domain_policy: the host does not allow it (in a container, give it CAP_SYS_NICE)")]
    DomainPolicy(usize, #[source] memory::MemoryError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] vmm::EngineError),
    /// The processor that guests are to see.
    #[error(transparent)]
    Model(#[from] cpu::ModelError),
    /// The file for perf(1).
    #[error("cpu.jit.perfmap: cannot make {path} (if another user's file is in the way, remove it)")]
    PerfMap {
        /// The file.
        path: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// Two chipset devices want the same place.
    #[error("cannot put the chipset together")]
    Bus(#[from] BusError),
    /// A device.
    #[error("pci slot {address}: {device}")]
    Device {
        /// Where it was to sit.
        address: String,
        /// Its name in the configuration.
        device: String,
        /// What it says.
        source: Box<devices::DeviceError>,
    },
    /// More than one LPC bridge.
    #[error("Only one LPC bridge is allowed.")]
    SecondLpc,
    /// PCI.
    #[error(transparent)]
    Pci(#[from] devices::pci::PciError),
    /// A serial port's backend.
    #[error("unable to initialize com{port}")]
    Serial {
        /// 1–4.
        port: usize,
        /// What the backend says.
        source: backend::tty::TtyError,
    },
    /// The TPM.
    #[error("Failed to init TPM device")]
    Tpm(#[from] backend::tpm::TpmError),
    /// Neither firmware nor a kernel is configured.
    #[error("virtual machine cannot be booted: give a boot ROM (-l bootrom,FILE) or a kernel (-o kernel.image=FILE)")]
    NothingToBoot,
    /// The boot ROM.
    #[error(transparent)]
    Rom(#[from] crate::firmware::RomError),
    /// The kernel.
    #[error(transparent)]
    Boot(Box<boot::BootError>),
    /// Firmware tables.
    #[error(transparent)]
    Tables(#[from] boot::TableError),
    /// The UUID.
    #[error("-U: \"{0}\" is not a UUID such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8")]
    Uuid(String),
    /// The name cannot be a VM's.
    #[error("\"{name}\" cannot be the name of a VM: {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The host refused something.
    #[error("cannot {what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

impl From<boot::BootError> for MachineError {
    fn from(error: boot::BootError) -> Self {
        Self::Boot(Box::new(error))
    }
}

impl MachineError {
    /// The exit code and message.
    pub(crate) fn into_exit(self) -> Exit {
        match self {
            Self::Config(error) => Exit::from(error),
            other => Exit::from_error(config::exit::ERROR, &other),
        }
    }
}
