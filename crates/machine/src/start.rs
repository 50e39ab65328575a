//! What the boot vCPU begins with: firmware tables in low memory and a kernel loaded directly.

use std::path::PathBuf;
use std::sync::Arc;

use boot::{Cache, CacheKind, Flavour, InterruptRoute, Lpc, PciBus, SmbiosStrings, Window};
use config::Config;
use devices::pci::Chipset;
use devices::pci::host::ECAM_BASE;
use md5::{Digest, Md5};
use platform::x86::VcpuState;
use uuid::Uuid;

use crate::MachineError;
use crate::board::Board;
use crate::firmware::{self, Channel};
use crate::power::PowerLatch;

/// What is to be booted.
pub(crate) enum Plan {
    /// A boot ROM.
    Firmware,
    /// A kernel, without firmware.
    Kernel { image: PathBuf, initrd: Option<PathBuf>, command_line: String },
}

impl Plan {
    /// Reads what is to be booted.
    ///
    /// # Errors
    /// Nothing is configured.
    pub(crate) fn from_config(config: &Config) -> Result<Self, MachineError> {
        if config::lpc::bootrom(config).is_some() {
            return Ok(Self::Firmware);
        }
        let Some(image) = config.get_str("kernel.image") else {
            // NUMA domains without anything that could tell the guest of them are the more precise mistake.
            config::numa::domains(config, config::memory_size(config)?)?;
            return Err(MachineError::NothingToBoot);
        };
        Ok(Self::Kernel {
            image: image.into(),
            initrd: config.get_str("kernel.initrd").map(Into::into),
            command_line: config.get_str("kernel.cmdline").unwrap_or_default(),
        })
    }
}

/// Fills memory and sets the boot vCPU's state.
///
/// # Errors
/// The kernel or the tables do not fit or make no sense.
pub(crate) fn prepare(
    plan: &Plan,
    config: &Config,
    board: &mut Board,
    power: &Arc<PowerLatch>,
) -> Result<(), MachineError> {
    let description = describe(config, board)?;
    let state = match plan {
        Plan::Firmware => {
            prepare_firmware(config, board, &description, power)?;
            VcpuState::reset()
        }
        Plan::Kernel { image, initrd, command_line } => {
            boot::write_tables(&description, &board.memory)?;
            boot::load(image, initrd.as_deref(), command_line, &board.memory, &description)?
        }
    };
    if let Some(first) = board.vcpus.first_mut() {
        first.set_state(&state)?;
    }
    Ok(())
}

/// Gives firmware what it looks for in memory and at its configuration device.
fn prepare_firmware(
    config: &Config,
    board: &Board,
    description: &boot::Board,
    power: &Arc<PowerLatch>,
) -> Result<(), MachineError> {
    let flavour = board.firmware.unwrap_or(Flavour::Bhyve);
    let fw_cfg = Channel::is_fw_cfg(config, flavour)?;
    let acpi_in_memory = !fw_cfg || config.bool_or("acpi_tables_in_memory", true)?;
    let in_memory = boot::Board { acpi: description.acpi && acpi_in_memory, ..description.clone() };
    boot::write_tables(&in_memory, &board.memory)?;
    let files = if fw_cfg { firmware::files(config, description, flavour)? } else { Vec::new() };
    let channel = Channel {
        config,
        flavour,
        chipset: board.pci.chipset(),
        cpus: board.layout.cpus,
        memory: &board.memory,
        ports: &board.ports,
        power,
        pm: &board.isa.pm,
    };
    channel.install(files)
}

/// The board as firmware tables describe it.
fn describe(config: &Config, board: &Board) -> Result<boot::Board, MachineError> {
    let layout = board.layout;
    Ok(boot::Board {
        apic_ids: (0..layout.cpus).map(|index| layout.apic_id(index)).collect(),
        x2apic: layout.x2apic,
        topology: boot::Topology { sockets: layout.sockets, cores: layout.cores, threads: layout.threads },
        low_memory: board.memory.low_size(),
        high_memory: board.memory.high_size(),
        buses: buses(board),
        lpc: board.lpc.map(|address| Lpc { slot: address.slot, function: address.func, uarts: [true; 4] }),
        hpet: Some(board.hpet_id()),
        fw_cfg: board.firmware.map_or(Ok(false), |flavour| Channel::is_fw_cfg(config, flavour))?,
        tpm: board.has_tpm,
        generation_id: Some(generation_id()?),
        numa: board
            .numa
            .iter()
            .map(|domain| boot::NumaDomain { size: domain.size, cpus: domain.cpus.clone() })
            .collect(),
        caches: caches(&board.features),
        acpi: config.bool_or("acpi_tables", true)?,
        mptable: config.bool_or("x86.mptable", true)?,
        uuid: *uuid(config, &board.name)?.as_bytes(),
        smbios: SmbiosStrings::from_keys(|key| config.get_str(key)),
    })
}

/// A VM that starts is of a new generation: no other one has its random numbers.
fn generation_id() -> Result<[u8; 16], MachineError> {
    let mut id = [0; 16];
    let filled = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty());
    filled.map_err(|error| MachineError::Host { what: "get random numbers", source: error.into() })?;
    Ok(id)
}

/// The caches that CPUID tells: leaf 4 of Intel's processors, leaf 8000001D of AMD's.
fn caches(features: &cpu::Features) -> Vec<Cache> {
    let function = if features.amd { 0x8000_001d } else { 4 };
    let leaves = (0..8).map(|index| features.leaf(function, index)).take_while(|[kind, ..]| kind & 31 != 0);
    let cache = |[eax, ebx, ecx, _]: [u32; 4]| {
        let kind = match eax & 31 {
            1 => CacheKind::Data,
            2 => CacheKind::Instruction,
            _ => CacheKind::Unified,
        };
        let (line, partitions, ways) = ((ebx & 0xfff) + 1, (ebx >> 12 & 0x3ff) + 1, (ebx >> 22) + 1);
        let size = u64::from(line) * u64::from(partitions) * u64::from(ways) * (u64::from(ecx) + 1);
        let fully_associative = eax >> 9 & 1 != 0;
        Cache { level: (eax >> 5 & 7) as u8, kind, size, ways: if fully_associative { 0 } else { ways } }
    };
    leaves.map(cache).collect()
}

fn buses(board: &Board) -> Vec<PciBus> {
    let window = |range: &std::ops::Range<u64>| {
        (range.end > range.start).then(|| Window { base: range.start, size: range.end - range.start })
    };
    let routes = board.pci.pin_routes();
    let describe = |windows: &devices::pci::BusWindows| PciBus {
        number: windows.bus,
        io: window(&windows.io),
        mem32: window(&windows.memory32),
        mem64: window(&windows.memory64),
        routes: routes
            .iter()
            .filter(|route| route.bus == windows.bus)
            .map(|route| InterruptRoute { slot: route.slot, pin: route.pin + 1, gsi: route.gsi, link: route.link })
            .collect(),
    };
    let mut buses: Vec<_> = board.pci.windows().iter().map(describe).collect();
    if let (Some(flavour), [bus]) = (board.firmware, &mut buses[..]) {
        firmware_windows(bus, flavour, board);
    }
    buses
}

/// Firmware moves BARs, so a bus that is alone has all of the ranges that firmware takes for PCI (EDK2's platform
/// initialisation). Only what is memory-mapped configuration stays out.
fn firmware_windows(bus: &mut PciBus, flavour: Flavour, board: &Board) {
    const GIB: u64 = 1 << 30;
    let window = |start: u64, end: u64| Some(Window { base: start, size: end - start });
    let first_port = if board.pci.chipset() == Chipset::Q35 { 0x6000 } else { 0xc000 };
    bus.io = window(first_port, 0x1_0000);
    let small = flavour == Flavour::Qemu && board.pci.chipset() != Chipset::Q35 && board.memory.low_size() <= 2 * GIB;
    bus.mem32 = window(if small { 2 * GIB } else { 3 * GIB }, ECAM_BASE);
    let mem64 = firmware::memory64(board.memory.high_size());
    bus.mem64 = window(mem64.start, mem64.end);
}

/// The machine's UUID: configured, or made from the MD5 sum of VM name and host name, so that it is the same at every start.
fn uuid(config: &Config, name: &str) -> Result<Uuid, MachineError> {
    if let Some(text) = config.get_str("uuid") {
        return Uuid::try_parse(&text).map_err(|_| MachineError::Uuid(text));
    }
    let host = rustix::system::uname();
    let mut hash = Md5::new();
    hash.update(name.as_bytes());
    hash.update(host.nodename().to_bytes());
    let sum: [u8; 16] = hash.finalize().into();
    Ok(uuid::Builder::from_md5_bytes(sum).into_uuid())
}

/// Refuses options that this build parses but does not have, in one line each.
///
/// # Errors
/// One of them is given.
pub(crate) fn reject_unavailable(config: &Config) -> Result<(), MachineError> {
    if config.get_str("gdb.port").is_some_and(|port| port != "0") {
        return Err(MachineError::NotAvailable("gdb stub (-G)".into()));
    }
    if config::settings::monitor(config)? {
        return Err(MachineError::NotAvailable("monitor mode (-M)".into()));
    }
    Ok(())
}
