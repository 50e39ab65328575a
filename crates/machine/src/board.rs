//! The board: memory, engine, chipset, PCI devices, built from the configuration tree.

use std::sync::Arc;
use std::time::Duration;

use backend::tpm::TpmError;
use backend::tty::{SerialBackend, Tty, TtySpec};
use boot::Flavour;
use config::numa::NumaDomain;
use config::pci::PciAddress;
use config::{Config, ConfigError, Topology, legacy};
use devices::chipset::isa::{self, Isa};
use devices::chipset::pm::Pm;
use devices::chipset::rtc::RtcConfig;
use devices::chipset::tpm::{self, Presence, TpmCrb};
use devices::firmware::Flash;
use devices::pci::{Chipset, IntxRouter, PciHost, PciHostOptions, Routing};
use devices::{BuildContext, factory};
use memory::{GuestMemory, MemoryOptions};
use platform::time::SharedTime;
use platform::{AccessSize, Bus, BusDevice, PowerSink};
use vmm::engine::CpuLayout;
use vmm::{AccessPolicy, EngineChoice, HostTime, InterruptChips, PolicyOptions, Vcpu, VmOptions, select};

use crate::MachineError;
use crate::firmware::{BootRom, physical_bits};
use crate::nodes;
use crate::power::PowerLatch;
use crate::process::PowerButton;
use crate::start;

/// Most vCPUs: local APIC ids of 8 bits, less the broadcast id.
const MAX_CPUS: u32 = 254;
/// Longest name of a VM, in bytes.
const MAX_NAME: usize = 229;
/// I/O APIC inputs, from the last one down, that HPET timers can be routed to and PCI cannot.
const HPET_PINS: u32 = 4;
/// Edge/level control of the 8259 pair.
const ELCR_PORTS: [u64; 2] = [0x4d0, 0x4d1];
/// How long output to the terminal may take to drain at the end.
const DRAIN: Duration = Duration::from_secs(2);

/// A VM, built but not started.
pub(crate) struct Board {
    pub(crate) name: String,
    /// Which engine was chosen, and why, unless the configuration says which.
    pub(crate) engine: Option<String>,
    pub(crate) layout: CpuLayout,
    pub(crate) memory: GuestMemory,
    pub(crate) vcpus: Vec<Box<dyn Vcpu>>,
    /// Memory domains (`-n`); empty if there is but one.
    pub(crate) numa: Vec<NumaDomain>,
    /// There is a TPM.
    pub(crate) has_tpm: bool,
    /// The processor that guests see, where the boot vCPU sits.
    pub(crate) features: cpu::Features,
    pub(crate) pci: Arc<PciHost>,
    /// Where the LPC bridge sits, if there is one.
    pub(crate) lpc: Option<PciAddress>,
    /// What the boot ROM was built for, if there is one.
    pub(crate) firmware: Option<Flavour>,
    /// What the user is to know before the VM runs.
    pub(crate) notes: Vec<String>,
    pub(crate) ports: Arc<Bus>,
    pub(crate) isa: Isa,
    serial: Vec<Arc<Tty>>,
    /// Kept alive: the timers end with it.
    _time: Arc<HostTime>,
    _chips: Arc<dyn InterruptChips>,
    _flash: Option<Arc<Flash>>,
}

impl Board {
    /// Builds everything that `config` asks for, in the order in which parts depend on each other. Creates nothing outside
    /// the process, so a failure leaves nothing behind.
    ///
    /// # Errors
    /// A key makes no sense, a device or backend is not to be had, the host refuses something.
    pub(crate) fn build(config: &Config, power: &Arc<PowerLatch>) -> Result<Self, MachineError> {
        let name = name(config)?;
        let layout = layout(config)?;
        let functions = config::pci_functions(config, legacy::DEVICES)?;
        start::reject_unavailable(config)?;
        for function in &functions {
            // Says at once what this build does not have, before anything is opened.
            factory::find(&function.device)
                .map_err(|source| device_error(function.address, &function.device, source))?;
        }
        let choice = match config.get_word("cpu.engine", &["auto", "kvm", "soft"])? {
            Some(1) => EngineChoice::Kvm,
            Some(2) => EngineChoice::Soft,
            _ => EngineChoice::Auto,
        };
        let (kind, why) = select::resolve(choice)?;
        let engine = (choice == EngineChoice::Auto)
            .then(|| format!("{} ({why})", if kind == vmm::EngineKind::Kvm { "KVM" } else { "software CPU" }));

        let mut rom = BootRom::from_config(config)?;
        let firmware = rom.as_ref().map(BootRom::flavour);
        let notes = rom.as_mut().map(|rom| std::mem::take(&mut rom.notes)).unwrap_or_default();
        let mut chipset = rom.as_ref().map(BootRom::chipset).unwrap_or_default();
        for function in functions.iter().filter(|function| function.device == "hostbridge") {
            chipset = Chipset::from_node(&function.node)?.unwrap_or(chipset);
        }
        let numa = numa(config, layout.cpus)?;
        let memory = memory(config, &numa, is_shared(config, &functions)?, chipset)?;
        let mut model = model(config)?;
        if firmware == Some(Flavour::Qemu) {
            model = model.with_physical_bits(physical_bits(memory.high_size()));
        }
        let features = cpu::Features::modelled(placement(&layout), &model)?;
        let time = HostTime::start().map_err(|source| MachineError::Host { what: "start the timer thread", source })?;
        let (ports, mmio) = (Arc::new(Bus::new("port")), Arc::new(Bus::new("memory")));
        let flash = rom.map(|rom| rom.install(&memory, &mmio)).transpose()?.flatten();
        let options = VmOptions {
            layout,
            memory: memory.clone(),
            ports: ports.clone(),
            mmio: mmio.clone(),
            time: time.clone(),
            policy: Arc::new(AccessPolicy::new(policy(config)?, power.clone())),
            model,
            translator: translator(config)?,
            perf_map: perf_map(config, kind)?,
            power: power.clone(),
        };
        let vm = vmm::create(kind, &options)?;

        let (isa, serial) = build_isa(config, &options, vm.chips.as_ref(), time.clone(), power)?;
        let has_tpm = build_tpm(config, &mmio)?;
        // Firmware's own tables rely on the fixed routing.
        let routing =
            if firmware.is_some() { Routing::Fixed } else { Routing::RoundRobin { gsis: vm.chips.pins() - HPET_PINS } };
        let router = Arc::new(IntxRouter::new(routing, vm.chips.pic(), vm.chips.ioapic()));
        let pci = PciHost::new(PciHostOptions {
            ports: ports.clone(),
            memory: mmio,
            msi: vm.chips.msi(),
            router,
            reset_control: isa.reset_control.clone(),
            ram: memory.clone(),
            // QEMU's firmware places and enables them itself; bhyve's takes those that it finds enabled.
            enable_bars: firmware != Some(Flavour::Qemu),
        });
        pci.set_chipset(chipset);
        let mut lpc = None;
        for function in &functions {
            if function.device == "lpc" && lpc.replace(function.address).is_some() {
                return Err(MachineError::SecondLpc);
            }
            let context =
                BuildContext { address: function.address, pci: &pci, memory: &memory, config, cpus: layout.cpus };
            factory::build(&context, &function.device, &function.node)
                .map_err(|source| device_error(function.address, &function.device, source))?;
        }
        pci.finish()?;
        set_level_triggered(&options.ports, pci.router().level_triggered_irqs() | 1 << isa::SCI_IRQ);
        Ok(Self {
            name,
            engine,
            layout,
            memory,
            numa,
            has_tpm,
            features,
            vcpus: vm.vcpus,
            pci,
            lpc,
            firmware,
            notes,
            ports,
            isa,
            serial,
            _time: time,
            _chips: vm.chips,
            _flash: flash,
        })
    }

    /// What SIGTERM presses.
    pub(crate) fn power_button(&self) -> Arc<dyn PowerButton> {
        Arc::new(Button(self.isa.pm.clone()))
    }

    /// The low half of the HPET's capabilities register, which its ACPI table repeats.
    pub(crate) fn hpet_id(&self) -> u32 {
        BusDevice::read(&*self.isa.hpet, 0, AccessSize::Dword) as u32
    }

    /// After the last vCPU has stopped: lets output reach the terminal.
    pub(crate) fn finish(&self) {
        for line in &self.serial {
            line.drain(DRAIN);
        }
    }
}

struct Button(Arc<Pm>);

impl PowerButton for Button {
    fn is_connected(&self) -> bool {
        self.0.acpi_enabled()
    }
    fn press(&self) {
        self.0.press_power_button();
    }
}

/// Tells the 8259 pair which IRQs are level-triggered, as firmware would, by its edge/level registers.
fn set_level_triggered(ports: &Bus, irqs: u16) {
    for (port, byte) in ELCR_PORTS.into_iter().zip(irqs.to_le_bytes()) {
        ports.write(port, AccessSize::Byte, byte.into());
    }
}

fn device_error(address: PciAddress, device: &str, source: devices::DeviceError) -> MachineError {
    MachineError::Device { address: address.to_string(), device: device.to_owned(), source: Box::new(source) }
}

fn name(config: &Config) -> Result<String, MachineError> {
    let name = config.require_str("name")?;
    let why = match name.len() {
        0 => "it is empty",
        n if n > MAX_NAME => "it is longer than 229 bytes",
        _ if name.contains('/') => "it contains a slash",
        _ => return Ok(name),
    };
    Err(MachineError::Name { name, why })
}

fn layout(config: &Config) -> Result<CpuLayout, MachineError> {
    let topology = Topology::resolve(config)?;
    let layout = CpuLayout {
        cpus: topology.cpus.into(),
        sockets: topology.sockets.into(),
        cores: topology.cores.into(),
        threads: topology.threads.into(),
        x2apic: config.bool_or("x86.x2apic", false)?,
    };
    if layout.cpus > MAX_CPUS || layout.apic_id(layout.cpus - 1) > MAX_CPUS {
        return Err(MachineError::TooManyCpus { requested: layout.cpus, available: MAX_CPUS });
    }
    Ok(layout)
}

/// Where the boot vCPU sits.
fn placement(layout: &CpuLayout) -> cpu::features::Placement {
    let CpuLayout { sockets, cores, threads, x2apic, .. } = *layout;
    cpu::features::Placement { apic_id: 0, sockets, cores, threads, x2apic }
}

/// The memory domains, of vCPUs that exist and are in one domain each.
fn numa(config: &Config, cpus: u32) -> Result<Vec<NumaDomain>, MachineError> {
    let domains = config::numa::domains(config, config::memory_size(config)?)?;
    let mut seen = vec![false; cpus as usize];
    for (id, domain) in domains.iter().enumerate() {
        for cpu in &domain.cpus {
            let why = match seen.get_mut(*cpu as usize) {
                None => format!("there are {cpus} vCPUs, numbered from 0"),
                Some(true) => "it is in another domain or named twice".to_owned(),
                Some(seen) => {
                    *seen = true;
                    continue;
                }
            };
            return Err(ConfigError::Numa(format!("vCPU {cpu} cannot be in NUMA domain {id}: {why}")).into());
        }
    }
    Ok(domains)
}

/// Whether other processes use guest memory: as `memory.shared` says, else if a device is served by one (vhost-user).
fn is_shared(config: &Config, functions: &[config::pci::PciFunction<'_>]) -> Result<bool, MachineError> {
    let served = functions.iter().any(|function| {
        let backend = function.node.get_str("backend").unwrap_or_default();
        function.device == "virtio-fs" || backend.starts_with("vhost-user:")
    });
    Ok(config.bool_or("memory.shared", served)?)
}

fn memory(config: &Config, numa: &[NumaDomain], shared: bool, chipset: Chipset) -> Result<GuestMemory, MachineError> {
    let size = match numa {
        [] => config::memory_size(config)?,
        domains => domains.iter().fold(0, |sum: u64, domain| sum.saturating_add(domain.size)),
    };
    let options = MemoryOptions {
        size,
        wired: config.bool_or("memory.wired", false)?,
        in_core: config.bool_or("memory.guest_in_core", false)?,
        shared,
        low_limit: chipset.low_memory_limit(size),
    };
    let memory = GuestMemory::new(options).map_err(|source| MachineError::Memory(size, source))?;
    nodes::place(&memory, numa)?;
    Ok(memory)
}

fn policy(config: &Config) -> Result<PolicyOptions, MachineError> {
    Ok(PolicyOptions {
        strict_io: config.bool_or("x86.strictio", false)?,
        strict_msr: config.bool_or("x86.strictmsr", true)?,
        verbose_msr: config.bool_or("x86.verbosemsr", false)?,
        amd: cpu::Features::host(cpu::features::Placement::single()).amd,
    })
}

/// `cpu.model` and `cpu.features`.
fn model(config: &Config) -> Result<cpu::CpuModel, MachineError> {
    let text = |key| config.get_str(key).unwrap_or_default();
    Ok(cpu::CpuModel::parse(&text("cpu.model"), &text("cpu.features"))?)
}

/// `cpu.jit.perfmap`: names for translated code, where perf(1) looks for them.
fn perf_map(config: &Config, kind: vmm::EngineKind) -> Result<Option<Arc<cpu::PerfMap>>, MachineError> {
    if !config.bool_or("cpu.jit.perfmap", false)? || kind != vmm::EngineKind::Soft {
        return Ok(None);
    }
    let map = cpu::PerfMap::create().map_err(|source| {
        let path = cpu::PerfMap::path().display().to_string();
        MachineError::PerfMap { path, source }
    })?;
    Ok(Some(Arc::new(map)))
}

/// `cpu.jit=false` (stored as `cpu.jit.enabled`), or `cpu.jit.cache` (bytes of translated code), `cpu.jit.check` (compare every n-th block with the
/// interpreter) and `cpu.jit.threshold` (runs before a block is translated).
fn translator(config: &Config) -> Result<Option<cpu::TranslatorOptions>, MachineError> {
    if !config.bool_or("cpu.jit.enabled", true)? {
        return Ok(None);
    }
    let usual = cpu::TranslatorOptions::default();
    Ok(Some(cpu::TranslatorOptions {
        cache_bytes: config.get_size("cpu.jit.cache")?.map_or(usual.cache_bytes, |size| size as usize),
        threshold: config.get_int("cpu.jit.threshold", 1..=1000u16)?.unwrap_or(usual.threshold),
        check: config.get_int("cpu.jit.check", 0..=u32::MAX)?.unwrap_or(usual.check),
    }))
}

/// The TPM and its physical presence interface, if one is configured; returns whether one is.
fn build_tpm(config: &Config, mmio: &Bus) -> Result<bool, MachineError> {
    let Some(spec) = config::lpc::tpm(config)? else { return Ok(false) };
    if spec.version != "2.0" {
        return Err(TpmError::Version(spec.version).into());
    }
    if spec.interface != "crb" {
        return Err(TpmError::Interface(spec.interface).into());
    }
    let host = backend::tpm::open(&spec.kind, &spec.path)?;
    let device = TpmCrb::new(host).map_err(|source| MachineError::Host { what: "start the TPM's thread", source })?;
    mmio.map(tpm::BASE, tpm::SIZE, device)?;
    mmio.map(tpm::PRESENCE_BASE, tpm::PRESENCE_SIZE, Presence::new())?;
    Ok(true)
}

/// The devices of the ISA bus, and the host ends of the serial ports.
fn build_isa(
    config: &Config,
    options: &VmOptions,
    chips: &dyn InterruptChips,
    time: SharedTime,
    power: &Arc<PowerLatch>,
) -> Result<(Isa, Vec<Arc<Tty>>), MachineError> {
    let mut serial = Vec::new();
    let mut uarts: [Option<Arc<dyn SerialBackend>>; 4] = Default::default();
    for (port, slot) in uarts.iter_mut().enumerate() {
        let Some(text) = config::lpc::com(config, port) else { continue };
        let open = || TtySpec::parse(&text)?.open();
        let tty = Arc::new(open().map_err(|source| MachineError::Serial { port: port + 1, source })?);
        if let Some(peer) = tty.peer() {
            eprintln!("bhyve: com{}: {}", port + 1, peer.display());
        }
        serial.push(tty.clone());
        *slot = Some(tty);
    }
    let pins = chips.pins();
    let wiring = isa::Wiring {
        io: &options.ports,
        mmio: &options.mmio,
        irq: &|irq| chips.line(irq).unwrap_or_else(|| unreachable!("every I/O APIC has the ISA interrupts")),
        gsi: chips.ioapic(),
        hpet_routes: ((1 << HPET_PINS) - 1) << (pins - HPET_PINS),
        msi: chips.msi(),
        time,
        power: power.clone() as Arc<dyn PowerSink>,
    };
    let rtc = RtcConfig {
        low_memory: options.memory.low_size(),
        high_memory: options.memory.high_size(),
        local_time: config.bool_or("rtc.use_localtime", true)?,
    };
    let options = isa::Options { rtc, serial: Some(uarts), testdev: config::lpc::pc_testdev(config)? };
    Ok((isa::build(&wiring, options)?, serial))
}
