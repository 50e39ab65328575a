//! What the boot vCPU begins with: firmware tables in low memory and a kernel loaded directly.

use std::path::PathBuf;

use boot::{Cache, CacheKind, InterruptRoute, Lpc, PciBus, SmbiosStrings, Window};
use config::Config;
use md5::{Digest, Md5};
use uuid::Uuid;

use crate::MachineError;
use crate::board::Board;

/// What is to be booted.
pub(crate) struct Plan {
    image: PathBuf,
    initrd: Option<PathBuf>,
    command_line: String,
}

impl Plan {
    /// Reads what is to be booted.
    ///
    /// # Errors
    /// Nothing is configured, or something this build cannot boot.
    pub(crate) fn from_config(config: &Config) -> Result<Self, MachineError> {
        if let Some(rom) = config::lpc::bootrom(config) {
            return Err(MachineError::NotAvailable(format!("boot ROM {rom}")));
        }
        let Some(image) = config.get_str("kernel.image") else {
            // NUMA domains without anything that could tell the guest of them are the more precise mistake.
            config::numa::domains(config, config::memory_size(config)?)?;
            return Err(MachineError::NothingToBoot);
        };
        Ok(Self {
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
pub(crate) fn prepare(plan: &Plan, config: &Config, board: &mut Board) -> Result<(), MachineError> {
    let description = describe(config, board)?;
    boot::write_tables(&description, &board.memory)?;
    let state = boot::load(&plan.image, plan.initrd.as_deref(), &plan.command_line, &board.memory, &description)?;
    if let Some(first) = board.vcpus.first_mut() {
        first.set_state(&state)?;
    }
    Ok(())
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
        fw_cfg: false,
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
    board.pci.windows().iter().map(describe).collect()
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
