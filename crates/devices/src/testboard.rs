//! A board for tests: buses, recording interrupt chips, RAM, and the devices of a configuration made by their factories.

use std::sync::{Arc, Mutex};

use config::{Config, NoWarnings, pci_functions};
use memory::{GuestMemory, MemoryOptions};
use platform::{AccessSize, Bus, BusDevice, Persist};
use testkit::conformance::Subject;
use testkit::irq::{RecordingIrq, RecordingMsi};
use testkit::pci::GuestFunction;
use testkit::virtqueue::VirtioGuest;

use crate::factory::{BuildContext, DeviceError, build};
use crate::pci::{IntxRouter, PciAddress, PciHost, PciHostOptions, Routing};

/// Bytes of RAM of a test board.
pub(crate) const RAM: u64 = 1 << 20;

/// Port 0xCF9 of a test board: remembers what was written.
#[derive(Default)]
pub(crate) struct ResetControl(pub(crate) Mutex<Vec<u64>>);

impl BusDevice for ResetControl {
    fn read(&self, offset: u64, _: AccessSize) -> u64 {
        0x06 + offset
    }

    fn write(&self, offset: u64, _: AccessSize, value: u64) {
        assert_eq!(offset, 0);
        self.0.lock().unwrap().push(value);
    }
}

pub(crate) struct TestBoard {
    pub(crate) ports: Arc<Bus>,
    pub(crate) memory: Arc<Bus>,
    pub(crate) ram: GuestMemory,
    pub(crate) pic: Arc<RecordingIrq>,
    pub(crate) ioapic: Arc<RecordingIrq>,
    pub(crate) msi: Arc<RecordingMsi>,
    pub(crate) reset_control: Arc<ResetControl>,
    pub(crate) pci: Arc<PciHost>,
}

impl TestBoard {
    /// A board without devices.
    pub(crate) fn bare() -> Self {
        Self::with_memory(false)
    }

    /// The same, with memory that other processes can map.
    fn with_memory(shared: bool) -> Self {
        let (ports, memory) = (Arc::new(Bus::new("port")), Arc::new(Bus::new("memory")));
        let ram = GuestMemory::new(MemoryOptions { size: RAM, shared, ..Default::default() }).unwrap();
        let (pic, ioapic) = (Arc::new(RecordingIrq::default()), Arc::new(RecordingIrq::default()));
        let msi = Arc::new(RecordingMsi::default());
        let reset_control = Arc::new(ResetControl::default());
        let pci = PciHost::new(PciHostOptions {
            ports: ports.clone(),
            memory: memory.clone(),
            msi: msi.clone(),
            router: Arc::new(IntxRouter::new(Routing::Fixed, pic.clone(), ioapic.clone())),
            reset_control: reset_control.clone(),
            ram: ram.clone(),
            enable_bars: true,
        });
        Self { ports, memory, ram, pic, ioapic, msi, reset_control, pci }
    }

    /// A board with the devices of a configuration, ready to run.
    pub(crate) fn try_new(keys: &[(&str, &str)]) -> Result<Self, DeviceError> {
        let others = |(key, value): &(&str, &str)| value.starts_with("vhost-user:") || key.ends_with(".socket");
        let board = Self::with_memory(keys.iter().any(others));
        let mut config = Config::new(NoWarnings);
        for (key, value) in keys {
            config.set(key, *value).unwrap();
        }
        for function in pci_functions(&config, config::legacy::DEVICES)? {
            let context = BuildContext {
                address: function.address,
                pci: &board.pci,
                memory: &board.ram,
                config: &config,
                cpus: config.int_or("cpus", 1..=64, 1)?,
            };
            build(&context, &function.device, &function.node)?;
        }
        board.pci.finish()?;
        Ok(board)
    }

    pub(crate) fn new(keys: &[(&str, &str)]) -> Self {
        Self::try_new(keys).unwrap()
    }

    /// The driver's view of a function of bus 0.
    pub(crate) fn guest(&self, slot: u8, func: u8) -> GuestFunction {
        GuestFunction::new(self.ports.clone(), self.memory.clone(), (0, slot, func))
    }

    /// A driver of the virtio function in `slot`.
    pub(crate) fn virtio(&self, slot: u8, modern: bool) -> VirtioGuest {
        let make = if modern { VirtioGuest::modern } else { VirtioGuest::legacy };
        make(self.guest(slot, 0), self.ram.clone())
    }

    /// The function in `slot`, for the conformance suite.
    pub(crate) fn subject(self, slot: u8) -> Subject {
        let state: Arc<dyn Persist> = self.pci.function(PciAddress::new(0, slot, 0).unwrap()).unwrap();
        Subject {
            ports: self.ports.clone(),
            memory: self.memory.clone(),
            ram: self.ram.clone(),
            address: (0, slot, 0),
            state,
            board: Box::new(self),
        }
    }
}
