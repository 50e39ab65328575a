//! PVH: an ELF kernel with a note that names a 32-bit entry point, and `struct hvm_start_info`
//! (Xen's public header arch-x86/hvm/start_info.h).

use platform::x86::{VcpuState, gpr};

use super::Request;
use super::elf::Elf;
use super::entry::protected_mode;
use super::error::BootError;
use super::image::field;
use super::space::{Space, low};
use crate::e820::e820;
use crate::tables::ACPI_BASE;

const NOTE_OWNER: &[u8] = b"Xen\0";
const PHYS32_ENTRY: u64 = 18;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const MODULE_OFFSET: u64 = 0x40;
const MEMORY_MAP_OFFSET: u64 = 0x80;

/// The 32-bit entry point that the kernel's note names, if it has one.
pub(super) fn entry(request: &Request<'_>, elf: &Elf<'_>) -> Result<Option<u32>, BootError> {
    let Some(note) = elf.note(NOTE_OWNER, PHYS32_ENTRY)? else { return Ok(None) };
    let entry = match note.len() {
        4 => field::<4>(&note, 0),
        8 => field::<8>(&note, 0),
        _ => return Err(request.kernel.invalid("its PVH note is neither 4 nor 8 bytes long")),
    };
    match u32::try_from(entry) {
        Ok(entry) => Ok(Some(entry)),
        Err(_) => Err(request.kernel.invalid("the entry point in its PVH note is beyond 4 GiB")),
    }
}

/// Loads the kernel, to be entered at `entry`.
pub(super) fn load(
    request: &Request<'_>,
    elf: &Elf<'_>,
    entry: u32,
    space: &mut Space<'_>,
) -> Result<VcpuState, BootError> {
    elf.load(space)?;
    let mut module = None;
    if let Some(initrd) = &request.initrd {
        let at = space.place(initrd.size(), 1 << 32, "initrd")?;
        initrd.copy(0, initrd.size(), space.memory(), at, "initrd")?;
        module = Some((at, initrd.size()));
    }
    space.write_command_line(request.command_line, usize::MAX)?;
    space.write(low::PARAMETERS, &start_info(request, module), "start info")?;
    let mut state = protected_mode(space, entry)?;
    state.gpr[gpr::RBX] = low::PARAMETERS;
    Ok(state)
}

/// The start info, the module list with at most one entry, and the memory map.
fn start_info(request: &Request<'_>, module: Option<(u64, u64)>) -> Vec<u8> {
    let entries = e820(request.board);
    let mut info = Vec::new();
    let words = |info: &mut Vec<u8>, words: &[u32]| words.iter().for_each(|word| info.extend(word.to_le_bytes()));
    let longs = |info: &mut Vec<u8>, longs: &[u64]| longs.iter().for_each(|long| info.extend(long.to_le_bytes()));

    words(&mut info, &[MAGIC, VERSION, 0, u32::from(module.is_some())]);
    let modules = module.map_or(0, |_| low::PARAMETERS + MODULE_OFFSET);
    let rsdp = if request.board.acpi { ACPI_BASE } else { 0 };
    longs(&mut info, &[modules, low::COMMAND_LINE, rsdp, low::PARAMETERS + MEMORY_MAP_OFFSET]);
    words(&mut info, &[entries.len() as u32, 0]);
    info.resize(MODULE_OFFSET as usize, 0);
    if let Some((address, size)) = module {
        longs(&mut info, &[address, size, 0, 0]);
    }
    info.resize(MEMORY_MAP_OFFSET as usize, 0);
    for entry in &entries {
        longs(&mut info, &[entry.range.start.0, entry.range.size]);
        words(&mut info, &[entry.kind as u32, 0]);
    }
    info
}

#[cfg(test)]
mod tests;
