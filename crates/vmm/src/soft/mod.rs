//! The software engine: crate `cpu` for vCPUs, crate `irqchip` for interrupt chips, one host thread per vCPU.

mod environment;
mod halt;
mod tsc;

use std::sync::Arc;

use cpu::features::Timing;
use cpu::{Events, Exit, Features, SharedCpus};
use irqchip::{ChipOptions, CpuPins, CpuWiring, SoftIrqChip, TscSource};
use platform::x86::{Activity, VcpuState};
use platform::{IrqLine, IrqSink, MsiSink, Persist};

use crate::engine::{EngineError, EngineKind, InterruptChips, Vcpu, VcpuExit, VcpuHandle, Vm, VmOptions};
use crate::sources::Sources;
use environment::CpuEnvironment;
use halt::HaltWatch;
use tsc::HostTsc;

use cpu::event_bits as bit;

/// Everything that ends a vCPU's sleep.
const WAKE: u32 = bit::INTERRUPT | bit::NMI | bit::INIT | bit::STARTUP | bit::STOP;

/// bhyve's number of I/O APIC inputs.
const IOAPIC_PINS: u32 = 32;

/// Makes a VM run by the software CPU.
///
/// # Errors
/// The chips' places on the buses are taken.
pub fn create(options: &VmOptions) -> Result<Vm, EngineError> {
    let cpus = options.layout.cpus;
    options.memory.pages().all_writes_are_noted();
    let events: Vec<Arc<Events>> = (0..cpus).map(|_| Arc::default()).collect();
    let tsc = Arc::new(HostTsc::start());
    let wiring = events.iter().enumerate().map(|(i, events)| CpuWiring {
        apic_id: options.layout.apic_id(i as u32),
        pins: Arc::new(Pins(events.clone())),
        tsc: tsc.clone(),
    });
    let chip_options = ChipOptions { ioapic_pins: IOAPIC_PINS, ..ChipOptions::default() };
    let khz = |hz: u64| u32::try_from(hz / 1000).unwrap_or(u32::MAX);
    let timing = Timing { tsc_khz: khz(tsc.hz()), apic_khz: khz(chip_options.apic_bus_hz) };
    let features = |index| {
        let place = options.layout.placement(index);
        Ok::<_, EngineError>(Features::modelled(place, &options.model)?.with_timing(timing))
    };
    let chip_options = ChipOptions { physical_bits: features(0)?.physical_bits, ..chip_options };
    let chip = SoftIrqChip::new(wiring.collect(), chip_options, options.time.clone());
    chip.map(&options.ports, &options.mmio)?;
    let chips = Arc::new(SoftChips::new(chip));

    let shared = Arc::new(SharedCpus::default());
    let halt = Arc::new(HaltWatch::new(cpus, options.power.clone()));
    let vcpus = (0..cpus).zip(&events).map(|(index, events)| {
        let features = Arc::new(features(index)?);
        let apic = chips.chip.local_apics()[index as usize].clone();
        let env = Arc::new(CpuEnvironment::new(index, apic, options, tsc.clone()));
        let mut vcpu = cpu::Vcpu::new(options.memory.clone(), env.clone(), events.clone(), shared.clone(), features);
        // Where code cannot be translated, the interpreter alone serves.
        let _ = vcpu.set_translator(options.translator);
        vcpu.set_perf_map(options.perf_map.clone());
        if index > 0 {
            vcpu.set_state(&VcpuState { activity: Activity::WaitForSipi, ..VcpuState::reset() });
        }
        let vcpu = SoftVcpu { index, vcpu, env, events: events.clone(), halt: halt.clone() };
        Ok(Box::new(vcpu) as Box<dyn Vcpu>)
    });
    let vcpus = vcpus.collect::<Result<_, EngineError>>()?;
    Ok(Vm { kind: EngineKind::Soft, vcpus, chips: chips.clone() })
}

struct SoftVcpu {
    index: u32,
    vcpu: cpu::Vcpu,
    env: Arc<CpuEnvironment>,
    events: Arc<Events>,
    halt: Arc<HaltWatch>,
}

impl Vcpu for SoftVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    fn run(&mut self) -> Result<VcpuExit, EngineError> {
        loop {
            match self.vcpu.run() {
                Exit::Stop => return Ok(VcpuExit::Stopped),
                Exit::Shutdown => return Ok(VcpuExit::Shutdown),
                Exit::Halt { interruptible: true } => self.events.wait(WAKE),
                Exit::Halt { interruptible: false } | Exit::WaitForSipi => {
                    let _dead = self.halt.enter();
                    self.events.wait(WAKE);
                }
            }
        }
    }

    fn state(&mut self) -> Result<VcpuState, EngineError> {
        Ok(self.vcpu.state())
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.vcpu.set_state(state);
        Ok(())
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        let mut list = self.vcpu.statistics();
        list.extend(self.env.statistics());
        list
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        Arc::new(Pins(self.events.clone()))
    }
}

/// A vCPU's events, as its local APIC and other threads raise them.
struct Pins(Arc<Events>);

impl CpuPins for Pins {
    fn interrupt(&self) {
        self.0.raise(bit::INTERRUPT);
    }
    fn nmi(&self) {
        self.0.raise(bit::NMI);
    }
    fn init(&self) {
        self.0.raise(bit::INIT);
    }
    fn startup(&self, vector: u8) {
        self.0.raise_startup(vector);
    }
}

impl VcpuHandle for Pins {
    fn stop(&self) {
        self.0.raise(bit::STOP);
    }
}

/// The chips, with the sources that the PIRQ router drives.
struct SoftChips {
    chip: SoftIrqChip,
    pic: Arc<Sources>,
    ioapic: Arc<Sources>,
}

impl SoftChips {
    fn new(chip: SoftIrqChip) -> Self {
        let router = chip.router();
        let (pic, ioapic) = (Sources::pic(router), Sources::ioapic(router, chip.ioapic().pins()));
        let (pic, ioapic) = (Arc::new(pic), Arc::new(ioapic));
        Self { chip, pic, ioapic }
    }
}

impl InterruptChips for SoftChips {
    fn line(&self, gsi: u32) -> Option<IrqLine> {
        self.chip.router().source(gsi)
    }
    fn pic(&self) -> Arc<dyn IrqSink> {
        self.pic.clone()
    }
    fn ioapic(&self) -> Arc<dyn IrqSink> {
        self.ioapic.clone()
    }
    fn msi(&self) -> Arc<dyn MsiSink> {
        self.chip.msi()
    }
    fn pins(&self) -> u32 {
        self.chip.ioapic().pins()
    }
    fn persistent(&self) -> Vec<(String, Arc<dyn Persist>)> {
        self.chip.persistent()
    }
}
