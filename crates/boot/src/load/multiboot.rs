//! Multiboot, version 1 (Multiboot Specification 0.6.96): ELF kernels, and kernels that give their addresses in the
//! header itself (the "a.out kludge").

use platform::x86::{VcpuState, gpr};

use super::Request;
use super::elf::Elf;
use super::entry::protected_mode;
use super::error::BootError;
use super::image::{Image, field};
use super::space::{Space, low};
use crate::e820::{LEGACY_HOLE, ONE_MIB, e820};

const HEADER_MAGIC: u64 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// The header lies wholly within this many bytes from the start of the file.
pub(super) const SEARCH_SIZE: u64 = 8192;

/// Header flags: wishes that are met (page-aligned modules, memory information), one that may stay open (a video mode),
/// and addresses in the header. Other flags of the lower half must be understood.
const KNOWN_WISHES: u64 = 0b111;
const MUST_UNDERSTAND: u64 = 0xffff;
const HAS_ADDRESSES: u64 = 1 << 16;

/// Flags of the information: memory sizes, command line, modules, memory map, name of the loader.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 6 | 1 << 9;
const INFO_MODULES: u32 = 1 << 3;
const MODULE_OFFSET: u64 = 0x80;
const NAME_OFFSET: u64 = 0xa0;
const MEMORY_MAP_OFFSET: u64 = 0xc0;
const LOADER_NAME: &[u8] = b"bhyve\0";

/// A multiboot header.
pub(super) struct Header {
    /// Where it lies in the file.
    offset: u64,
    flags: u64,
    addresses: Addresses,
}

/// The address fields, which count if [`HAS_ADDRESSES`] is set.
struct Addresses {
    header: u64,
    load: u64,
    load_end: u64,
    bss_end: u64,
    entry: u64,
}

/// The header in `start`, the first [`SEARCH_SIZE`] bytes of a file.
pub(super) fn find(start: &[u8]) -> Option<Header> {
    let starts_header = |at: &usize| {
        let [magic, flags, checksum] = [0, 4, 8].map(|offset| field::<4>(start, at + offset));
        magic == HEADER_MAGIC && (magic + flags + checksum) as u32 == 0 && at + 12 <= start.len()
    };
    let at = (0..start.len()).step_by(4).find(starts_header)?;
    let [header, load, load_end, bss_end, entry] = [12, 16, 20, 24, 28].map(|offset| field::<4>(start, at + offset));
    let addresses = Addresses { header, load, load_end, bss_end, entry };
    Some(Header { offset: at as u64, flags: field::<4>(start, at + 4), addresses })
}

/// Loads the kernel of `request`, which has `header`; `elf` is what it is otherwise.
pub(super) fn load(
    request: &Request<'_>,
    header: &Header,
    elf: Option<&Elf<'_>>,
    space: &mut Space<'_>,
) -> Result<VcpuState, BootError> {
    let image = &request.kernel;
    let unknown = header.flags & MUST_UNDERSTAND & !KNOWN_WISHES;
    if unknown != 0 {
        return Err(image.invalid(format!("its multiboot header asks for unknown features ({unknown:#x})")));
    }
    let entry = match elf {
        _ if header.flags & HAS_ADDRESSES != 0 => load_by_header(image, header, space)?,
        Some(elf) => {
            elf.load(space)?;
            elf.physical_entry()
        }
        None => return Err(image.invalid("its multiboot header gives no addresses, and it is no ELF file")),
    };
    let Ok(entry) = u32::try_from(entry) else {
        return Err(image.invalid("its entry point is beyond 4 GiB, and multiboot kernels start in 32-bit mode"));
    };

    let module = load_module(request, space)?;
    space.write_command_line(&arguments(image, request.command_line), usize::MAX)?;
    space.write(low::PARAMETERS, &information(request, module), "multiboot information")?;
    let mut state = protected_mode(space, entry)?;
    state.gpr[gpr::RAX] = LOADER_MAGIC;
    state.gpr[gpr::RBX] = low::PARAMETERS;
    Ok(state)
}

/// Loads by the addresses in the header, and returns the entry point.
fn load_by_header(image: &Image, header: &Header, space: &mut Space<'_>) -> Result<u64, BootError> {
    const WHAT: &str = "kernel";
    let Addresses { header: header_address, load, load_end, bss_end, entry } = header.addresses;
    let senseless = || image.invalid("the addresses in its multiboot header contradict each other");
    let before_header = header_address.checked_sub(load).ok_or_else(senseless)?;
    let offset = header.offset.checked_sub(before_header).ok_or_else(senseless)?;
    let in_file = match load_end {
        0 => image.size().saturating_sub(offset),
        end => end.checked_sub(load).ok_or_else(senseless)?,
    };
    let in_memory = match bss_end {
        0 => in_file,
        end => end.checked_sub(load).filter(|size| *size >= in_file).ok_or_else(senseless)?,
    };
    image.check(offset, in_file, "kernel code")?;
    space.claim(load, in_memory, WHAT)?;
    image.copy(offset, in_file, space.memory(), load, "kernel code")?;
    space
        .memory()
        .fill(load + in_file, in_memory - in_file, 0)
        .map_err(|source| BootError::Memory { what: WHAT, source })?;
    Ok(entry)
}

/// The name of a file followed by a command line: programs are used to their own name being first.
fn arguments(image: &Image, rest: &[u8]) -> Vec<u8> {
    let mut text = image.path().as_os_str().as_encoded_bytes().to_vec();
    if !rest.is_empty() {
        text.push(b' ');
        text.extend(rest);
    }
    text
}

/// Loads the initrd as a module; returns where it begins and ends.
fn load_module(request: &Request<'_>, space: &mut Space<'_>) -> Result<Option<(u64, u64)>, BootError> {
    let Some(initrd) = &request.initrd else { return Ok(None) };
    let at = space.place(initrd.size(), 1 << 32, "initrd")?;
    initrd.copy(0, initrd.size(), space.memory(), at, "initrd")?;
    let mut name = arguments(initrd, &[]);
    name.truncate(low::MODULE_STRING_SIZE as usize - 1);
    name.push(0);
    space.write(low::MODULE_STRING, &name, "module string")?;
    Ok(Some((at, at + initrd.size())))
}

/// The information structure (section 3.3), with the module list, the loader's name and the memory map behind it.
fn information(request: &Request<'_>, module: Option<(u64, u64)>) -> Vec<u8> {
    let board = request.board;
    let entries = e820(board);
    let at = |offset: u64| (low::PARAMETERS + offset) as u32;
    let lower = board.low_memory.min(LEGACY_HOLE) >> 10;
    let upper = board.low_memory.saturating_sub(ONE_MIB) >> 10;
    let (flags, modules) = if module.is_some() { (INFO_FLAGS | INFO_MODULES, 1) } else { (INFO_FLAGS, 0) };

    let mut info = Vec::new();
    let words = |info: &mut Vec<u8>, words: &[u32]| words.iter().for_each(|word| info.extend(word.to_le_bytes()));
    words(&mut info, &[flags, lower as u32, upper as u32, 0]);
    words(&mut info, &[low::COMMAND_LINE as u32, modules, at(MODULE_OFFSET)]);
    words(&mut info, &[0; 4]); // no symbols
    words(&mut info, &[entries.len() as u32 * 24, at(MEMORY_MAP_OFFSET)]);
    words(&mut info, &[0; 3]); // no drives, no configuration table
    words(&mut info, &[at(NAME_OFFSET)]);
    info.resize(MODULE_OFFSET as usize, 0);
    if let Some((start, end)) = module {
        words(&mut info, &[start as u32, end as u32, low::MODULE_STRING as u32, 0]);
    }
    info.resize(NAME_OFFSET as usize, 0);
    info.extend(LOADER_NAME);
    info.resize(MEMORY_MAP_OFFSET as usize, 0);
    for entry in &entries {
        words(&mut info, &[20]); // size of the entry without this field
        info.extend(entry.range.start.0.to_le_bytes());
        info.extend(entry.range.size.to_le_bytes());
        words(&mut info, &[entry.kind as u32]);
    }
    info
}

#[cfg(test)]
mod tests;
