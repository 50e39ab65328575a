//! Kernel loaders: direct boot without firmware.
//!
//! The format is told by the contents of the file. All formats end in the same way: the kernel and its initrd are in
//! memory, the loader's structures lie in conventional memory (see [`space::low`]), and the boot vCPU has a state.

mod elf;
mod entry;
mod error;
mod image;
mod linux;
mod multiboot;
mod pvh;
mod space;
mod zero_page;

use std::path::Path;

use memory::GuestMemory;
use platform::x86::VcpuState;

pub use self::error::{BootError, Role};
use self::image::Image;
use self::space::Space;
use crate::board::Board;

/// What is to be loaded, and for which machine.
struct Request<'a> {
    kernel: Image,
    initrd: Option<Image>,
    /// Without a terminator.
    command_line: &'a [u8],
    board: &'a Board,
}

/// Loads `kernel`, with `initrd` and `command_line` for it, into `memory` of the machine `board`, and returns the state in
/// which the boot vCPU starts.
///
/// Where a kernel can be told of ACPI, it is told [`crate::ACPI_BASE`] if the board has it; the tables themselves
/// are [`crate::write_tables`]'s, before or after.
///
/// Kernels that use the 8259 pair without looking for APICs expect what firmware leaves behind: the boot vCPU's local
/// APIC in virtual-wire mode, LINT0 set to ExtINT and LINT1 to NMI. A vCPU's state has no place for that, so it is up to
/// the caller.
///
/// # Errors
/// A file that is missing, no regular file, unreadable, truncated, of unknown format or senseless; a kernel, initrd or
/// command line for which there is no room. Guest memory may be half filled then.
pub fn load(
    kernel: &Path,
    initrd: Option<&Path>,
    command_line: &str,
    memory: &GuestMemory,
    board: &Board,
) -> Result<VcpuState, BootError> {
    let request = Request {
        kernel: Image::open(Role::Kernel, kernel)?,
        initrd: initrd.map(open_initrd).transpose()?,
        command_line: command_line.as_bytes(),
        board,
    };
    let mut space = Space::new(memory);
    let start = request.kernel.start(multiboot::SEARCH_SIZE)?;
    if linux::is_linux(&start) {
        return linux::load(&request, &mut space);
    }
    let header = multiboot::find(&start);
    if start.starts_with(elf::MAGIC) {
        let elf = elf::Elf::read(&request.kernel)?;
        if let Some(entry) = pvh::entry(&request, &elf)? {
            return pvh::load(&request, &elf, entry, &mut space);
        }
        if let Some(header) = header {
            return multiboot::load(&request, &header, Some(&elf), &mut space);
        }
        return Err(unknown_format(&request.kernel, "an ELF file with neither a PVH note nor a multiboot header"));
    }
    match header {
        Some(header) => multiboot::load(&request, &header, None, &mut space),
        None => Err(unknown_format(&request.kernel, appearance(&start))),
    }
}

fn open_initrd(path: &Path) -> Result<Image, BootError> {
    let image = Image::open(Role::Initrd, path)?;
    if image.size() == 0 { Err(BootError::EmptyInitrd { path: path.to_owned() }) } else { Ok(image) }
}

fn unknown_format(kernel: &Image, what: &'static str) -> BootError {
    BootError::Format { path: kernel.path().to_owned(), what }
}

/// What a file of no known format looks like.
fn appearance(start: &[u8]) -> &'static str {
    match start {
        [] => "empty",
        [0x1f, 0x8b, ..] => "compressed with gzip and must be unpacked first",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "compressed with zstd and must be unpacked first",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "compressed with xz and must be unpacked first",
        [b'M', b'Z', ..] => "an EFI application",
        [b'!', b'<', b'a', b'r', b'c', b'h', ..] => "an archive",
        _ => "of unknown format",
    }
}

#[cfg(test)]
mod tests;
