//! The boot ROM and its variable store: which files, from where, and the devices that firmware asks for its configuration.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use boot::{Firmware, FirmwareError, Flavour};
use config::pci::PciFunction;
use config::{Config, lpc};
use devices::chipset::pm::Pm;
use devices::chipset::tpm;
use devices::firmware::{self, Flash, FwCfg, FwCfgItems, FwCtl, compat};
use devices::pci::Chipset;
use memory::{GuestMemory, HIGH_MEMORY_BASE, RomKind};
use platform::{Bus, PowerSink};

use crate::MachineError;
use crate::power::PowerLatch;

mod find;

/// The value of `bootrom` that means the first firmware found.
const AUTO: &str = "auto";
/// No image is larger; a file that is, is not read.
const MAX_IMAGE: u64 = 16 << 20;

/// Why the boot ROM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RomError {
    /// No firmware is installed where distributions put it.
    #[error(
        "bootrom=auto: no UEFI firmware found: install one (Debian: ovmf, Fedora: edk2-ovmf, Arch: edk2-ovmf, FreeBSD: \
         edk2-bhyve) or give a file (-l bootrom,FILE)"
    )]
    NotFound,
    /// The ROM's file cannot be read.
    #[error("Error opening bootrom \"{0}\"")]
    Rom(String, #[source] std::io::Error),
    /// The variable store cannot be opened for reading and writing.
    #[error("Error opening bootvars \"{0}\"")]
    Vars(String, #[source] std::io::Error),
    /// Another VM uses the variable store.
    #[error("bootvars \"{0}\" is in use by another VM: give each VM a copy of its own")]
    InUse(String),
    /// A copy of the variable store cannot be made.
    #[error("cannot make this VM's variable store {0}")]
    Copy(String, #[source] std::io::Error),
    /// One of the files has a size that cannot be.
    #[error("boot ROM {file}")]
    Size {
        /// The boot ROM.
        file: String,
        /// What is wrong.
        source: FirmwareError,
    },
    /// They do not go into memory.
    #[error("cannot put the boot ROM into memory")]
    Memory(#[from] memory::MemoryError),
}

/// A variable store, opened.
struct Vars {
    file: File,
    contents: Vec<u8>,
}

/// The boot ROM and its variable store, read and checked.
pub(crate) struct BootRom {
    firmware: Firmware,
    vars: Option<Vars>,
    /// What the user is to know about where the variables are.
    pub(crate) notes: Vec<String>,
}

impl BootRom {
    /// Reads the boot ROM that is configured, if one is.
    ///
    /// # Errors
    /// A file is not there, not readable (the variable store: writable), or has an impossible size.
    pub(crate) fn from_config(config: &Config) -> Result<Option<Self>, RomError> {
        let Some(rom) = lpc::bootrom(config) else { return Ok(None) };
        let vars = lpc::bootvars(config);
        if rom == AUTO { Self::automatic(config, vars.as_deref()) } else { Self::named(&rom, vars.as_deref()) }
            .map(Some)
    }

    fn named(rom: &str, vars: Option<&str>) -> Result<Self, RomError> {
        let code = read_rom(Path::new(rom))?;
        let vars = vars.map(|path| open_vars(Path::new(path))).transpose()?;
        let firmware = make(rom, code, vars.as_ref())?;
        let mut notes = Vec::new();
        if firmware.flavour == Flavour::Qemu && needs_smm(Path::new(rom)) {
            notes.push(format!(
                "warning: boot ROM \"{rom}\" needs System Management Mode, which is not emulated, and stops without a word: \
                 take OVMF_CODE_4M.fd, for secure boot with a copy of OVMF_VARS_4M.ms.fd"
            ));
        }
        if vars.is_none() {
            notes.push(
                "UEFI variables end with this process: to keep them, give a file for them (-l bootrom,ROM,VARS)".into(),
            );
        }
        Ok(Self { firmware, vars, notes })
    }

    /// The first firmware that is installed; with a copy of its variables, unless the user names a file for them.
    fn automatic(config: &Config, vars: Option<&str>) -> Result<Self, RomError> {
        let found = find::first(Path::new("/")).ok_or(RomError::NotFound)?;
        let rom = found.rom.display().to_string();
        let mut notes = vec![format!("boot ROM: {rom}")];
        if let Some(vars) = vars {
            return Ok(Self { notes, ..Self::named(&rom, Some(vars))? });
        }
        let mut firmware = make(&rom, read_rom(&found.rom)?, None)?;
        let template = match &found.vars {
            Some(template) => Some(
                read_file(template, MAX_IMAGE)
                    .map_err(|error| RomError::Vars(template.display().to_string(), error))?,
            ),
            None => firmware.take_variables(),
        };
        let Some(template) = template else { return Ok(Self { firmware, vars: None, notes }) };
        let name = config.get_str("name").unwrap_or_default();
        let store = found.vars.as_deref().unwrap_or(&found.rom).file_name().unwrap_or_default().to_owned();
        let file = find::state_folder().join(name).join(store);
        copy_once(&template, &file).map_err(|error| RomError::Copy(file.display().to_string(), error))?;
        let vars = open_vars(&file)?;
        notes.push(format!("UEFI variables: {}", file.display()));
        let firmware = make(&rom, firmware.code, Some(&vars))?;
        Ok(Self { firmware, vars: Some(vars), notes })
    }

    /// What the firmware was built for.
    pub(crate) fn flavour(&self) -> Flavour {
        self.firmware.flavour
    }

    /// The board that this firmware knows.
    pub(crate) fn chipset(&self) -> Chipset {
        match self.firmware.flavour {
            Flavour::Bhyve => Chipset::Bhyve,
            Flavour::Qemu => Chipset::I440fx,
        }
    }

    /// Puts the ROM and the flash below it into memory, and the flash on the bus.
    ///
    /// # Errors
    /// They do not fit.
    pub(crate) fn install(self, memory: &GuestMemory, mmio: &Bus) -> Result<Option<Arc<Flash>>, MachineError> {
        memory.add_rom(RomKind::Fixed, &self.firmware.code).map_err(RomError::from)?;
        let Some(vars) = self.vars else { return Ok(None) };
        let flash = Flash::new(memory.clone(), vars.file, &vars.contents).map_err(RomError::from)?;
        mmio.map(flash.range().start.0, flash.range().size, flash.clone())?;
        Ok(Some(flash))
    }
}

/// Where firmware puts 64-bit BARs above `high` bytes of memory that lie above 4 GiB: as much as EDK2's platforms take unless told
/// otherwise, aligned to its size.
pub(crate) fn memory64(high: u64) -> Range<u64> {
    const SIZE: u64 = 32 << 30;
    let start = (HIGH_MEMORY_BASE + high).next_multiple_of(SIZE);
    start..start + SIZE
}

/// Bits of physical addresses that QEMU's firmware is to see with `high` bytes of memory above 4 GiB.
///
/// OVMF maps all that CPUID claims before it starts its drivers, if it believes CPUID: with 48 bits and pages of 2 MiB, as Debian's has
/// them, the page tables alone need half a gigabyte, and where that is not free OVMF overwrites itself. It does not believe
/// 38 bits of anyone, and sizes the tables by memory then.
pub(crate) fn physical_bits(high: u64) -> u8 {
    const DISBELIEVED: u32 = 38;
    let needed = u64::BITS - (memory64(high).end - 1).leading_zeros();
    needed.max(DISBELIEVED) as u8
}

fn make(rom: &str, code: Vec<u8>, vars: Option<&Vars>) -> Result<Firmware, RomError> {
    let size = vars.map(|vars| vars.contents.len() as u64);
    Firmware::new(code, size).map_err(|source| RomError::Size { file: format!("\"{rom}\""), source })
}

/// Whether an OVMF is one that was built to require System Management Mode. Nothing outside its compressed volumes says so, but
/// distributions' names do: `secboot` in Debian, Fedora and Arch, behind links of other names in Debian, and `-smm-` in openSUSE.
/// Fedora's image for TDX has the name and not the mode.
fn needs_smm(rom: &Path) -> bool {
    let says_so = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        (name.contains("secboot") || name.contains("-smm-")) && !name.contains("inteltdx")
    };
    says_so(rom) || rom.canonicalize().is_ok_and(|target| says_so(&target))
}

fn read_rom(path: &Path) -> Result<Vec<u8>, RomError> {
    read_file(path, MAX_IMAGE).map_err(|error| RomError::Rom(path.display().to_string(), error))
}

/// Reads a whole file; of one larger than `most` so much that this can be seen.
fn read_file(path: &Path, most: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most + 4096).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn open_vars(path: &Path) -> Result<Vars, RomError> {
    let name = || path.display().to_string();
    let open = || -> std::io::Result<Vars> {
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut contents = Vec::new();
        Read::by_ref(&mut file).take(MAX_IMAGE + 4096).read_to_end(&mut contents)?;
        Ok(Vars { file, contents })
    };
    let vars = open().map_err(|error| RomError::Vars(name(), error))?;
    match rustix::fs::flock(&vars.file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(RomError::InUse(name())),
        // Where the file system has no locks, it goes without.
        _ => Ok(vars),
    }
}

/// Makes a file of `contents` unless it is there.
fn copy_once(contents: &[u8], file: &Path) -> std::io::Result<()> {
    if file.exists() {
        return Ok(());
    }
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    // A half-written file must not be taken for a store.
    let mut partial = PathBuf::from(file);
    partial.add_extension(format!("{}.partial", std::process::id()));
    std::fs::write(&partial, contents)?;
    std::fs::rename(&partial, file)
}

/// What the firmware's configuration device is made with.
pub(crate) struct Channel<'a> {
    pub(crate) config: &'a Config,
    pub(crate) flavour: Flavour,
    pub(crate) chipset: Chipset,
    pub(crate) cpus: u32,
    pub(crate) memory: &'a GuestMemory,
    pub(crate) ports: &'a Bus,
    pub(crate) power: &'a Arc<PowerLatch>,
    pub(crate) pm: &'a Arc<Pm>,
}

impl Channel<'_> {
    /// Whether it is QEMU's fw_cfg: firmware built for QEMU knows nothing else.
    pub(crate) fn is_fw_cfg(config: &Config, flavour: Flavour) -> Result<bool, MachineError> {
        Ok(flavour == Flavour::Qemu || lpc::fwcfg(config)? == lpc::Fwcfg::Qemu)
    }

    /// Puts the device on the ports, with `files` beside those of the user.
    ///
    /// # Errors
    /// Something else is there, or the configuration makes no sense.
    pub(crate) fn install(&self, files: Vec<(String, Vec<u8>)>) -> Result<(), MachineError> {
        let power = self.power.clone() as Arc<dyn PowerSink>;
        compat::map(self.chipset, self.ports, self.pm, &power)?;
        if !Self::is_fw_cfg(self.config, self.flavour)? {
            let channel = FwCtl::new(self.cpus, power);
            return Ok(self.ports.map(firmware::PORT, firmware::fwctl::LENGTH, channel)?);
        }
        let user = self.config.fwcfg_items().iter().map(|item| (item.name.clone(), item.data.clone()));
        let items = FwCfgItems {
            dma: self.flavour == Flavour::Qemu,
            cpus: u16::try_from(self.cpus).unwrap_or(u16::MAX),
            files: files.into_iter().chain(user).collect(),
        };
        let device = FwCfg::new(self.memory.clone(), items);
        Ok(self.ports.map(firmware::PORT, firmware::fw_cfg::LENGTH, device)?)
    }
}

/// The files that firmware reads, beside the tables: what it boots, in Open Firmware's notation, which sleep states there are,
/// the number of CPUs, the memory map, where the TPM's physical presence interface is.
///
/// # Errors
/// A `bootindex` is not a number.
pub(crate) fn files(
    config: &Config,
    board: &boot::Board,
    flavour: Flavour,
) -> Result<Vec<(String, Vec<u8>)>, MachineError> {
    let mut files = boot::table_files(board)?;
    let mut add = |name: &str, contents: Vec<u8>| files.push((name.to_owned(), contents));
    add("etc/e820", memory_map(board, flavour));
    add("etc/system-states", system_states());
    add("opt/bhyve/hw.ncpu", (board.apic_ids.len() as u32).to_le_bytes().to_vec());
    if board.tpm {
        add("etc/tpm/config", tpm::firmware_config().to_vec());
    }
    let order = boot_order(&config::pci_functions(config, config::legacy::DEVICES)?)?;
    if !order.is_empty() {
        add("bootorder", order);
    }
    Ok(files)
}

/// Entries of 20 bytes: address, size, kind. Firmware built for QEMU knows where the rest of a PC is, and takes reserved
/// ranges amiss that lie where it puts BARs.
fn memory_map(board: &boot::Board, flavour: Flavour) -> Vec<u8> {
    let mut entries = boot::e820(board);
    entries.retain(|entry| flavour == Flavour::Bhyve || entry.kind == boot::E820Kind::Ram);
    let bytes = |entry: &boot::E820Entry| {
        let kind = entry.kind as u32;
        [&entry.range.start.0.to_le_bytes()[..], &entry.range.size.to_le_bytes(), &kind.to_le_bytes()].concat()
    };
    entries.iter().flat_map(bytes).collect()
}

/// One byte for each of S0 to S5: bit 7 says that there is the state, the others are its sleep type.
fn system_states() -> Vec<u8> {
    const THERE: u8 = 1 << 7;
    vec![THERE, 0, 0, 0, 0, THERE | devices::chipset::pm::SLEEP_TYPE_S5 as u8]
}

/// The functions with a `bootindex`, lowest first, as lines of Open Firmware paths that end with NUL.
fn boot_order(functions: &[PciFunction<'_>]) -> Result<Vec<u8>, MachineError> {
    let mut entries = Vec::new();
    for function in functions {
        let ports = (0..32).map(|port| format!("port.{port}.bootindex"));
        for key in std::iter::once("bootindex".to_owned()).chain(ports) {
            if let Some(index) = function.node.get_int(&key, 0..=u32::MAX)? {
                entries.push((index, function.address));
            }
        }
    }
    entries.sort();
    entries.dedup_by_key(|entry| entry.1);
    let lines: Vec<_> =
        entries.iter().map(|(_, address)| format!("/pci@i0cf8/pci@{:x},{:x}", address.slot, address.func)).collect();
    Ok(if lines.is_empty() { Vec::new() } else { format!("{}\0", lines.join("\n")).into_bytes() })
}

#[cfg(test)]
mod tests;
