//! Linux bzImage: the 64-bit entry of protocol 2.12, and the 32-bit entry of everything since 2.00
//! (Documentation/arch/x86/boot.rst).

use platform::x86::{VcpuState, gpr};

use super::Request;
use super::entry::{long_mode, protected_mode};
use super::error::BootError;
use super::image::{Image, field};
use super::space::{Space, low};
use super::zero_page::{HEADER_OFFSET, Parameters};
use crate::e820::ONE_MIB;

const SECTOR: u64 = 512;
const BOOT_FLAG_OFFSET: usize = 0x1fe;
const MAGIC_OFFSET: usize = 0x202;
/// The header ends this far behind the byte that says so, at most.
const HEADER_LIMIT: u64 = 0x202 + 0xff;

/// Bits of `loadflags` and `xloadflags`.
const LOADED_HIGH: u8 = 1 << 0;
const KERNEL_64: u16 = 1 << 0;
const CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;

/// The 64-bit entry lies this far behind the start of the kernel.
const ENTRY_64: u64 = 0x200;
/// Limits of protocols that have no field for them: the last byte of an initrd, the length of a command line.
const OLD_INITRD_MAX: u64 = 0x37ff_ffff;
const OLD_COMMAND_LINE: u64 = 255;

/// What the setup header says. Fields that its protocol version does not have yet hold what that version assumes.
#[derive(Debug)]
struct Header {
    /// The header as it is in the file, from [`HEADER_OFFSET`].
    bytes: Vec<u8>,
    version: u16,
    /// Bytes in the file before the kernel proper.
    setup_size: u64,
    /// Bytes of the kernel proper.
    kernel_size: u64,
    load_flags: u8,
    extended_flags: u16,
    initrd_max: u64,
    relocatable: bool,
    command_line_limit: u64,
    preferred_address: u64,
    /// Bytes that it needs from where it is loaded until it has set itself up.
    init_size: u64,
}

/// Whether `start`, the first bytes of a file, are those of a Linux kernel.
pub(super) fn is_linux(start: &[u8]) -> bool {
    start.get(MAGIC_OFFSET..MAGIC_OFFSET + 4) == Some(b"HdrS") && field::<2>(start, BOOT_FLAG_OFFSET) == 0xaa55
}

impl Header {
    fn read(image: &Image) -> Result<Self, BootError> {
        let mut start = image.start(HEADER_LIMIT)?;
        let end = MAGIC_OFFSET + usize::from(start.get(0x201).copied().unwrap_or(0));
        start.truncate(end);
        let version = field::<2>(&start, 0x206) as u16;
        let since = |first: u16, value: u64, before: u64| if version >= first { value } else { before };

        let sectors = match field::<1>(&start, HEADER_OFFSET) {
            0 => 4,
            sectors => sectors,
        };
        let setup_size = (sectors + 1) * SECTOR;
        // Until 2.04 the size in the header had 16 bits, too few for most kernels.
        let rest = image.size().saturating_sub(setup_size);
        let kernel_size = since(0x204, field::<4>(&start, 0x1f4) * 16, rest);
        Ok(Self {
            bytes: start.get(HEADER_OFFSET..).unwrap_or(&[]).to_vec(),
            version,
            setup_size,
            kernel_size,
            load_flags: field::<1>(&start, 0x211) as u8,
            extended_flags: since(0x20c, field::<2>(&start, 0x236), 0) as u16,
            initrd_max: since(0x203, field::<4>(&start, 0x22c), OLD_INITRD_MAX),
            relocatable: since(0x205, field::<1>(&start, 0x234), 0) != 0,
            command_line_limit: since(0x206, field::<4>(&start, 0x238), OLD_COMMAND_LINE),
            preferred_address: since(0x20a, field::<8>(&start, 0x258), 0),
            init_size: since(0x20a, field::<4>(&start, 0x260), 0),
        })
    }

    /// Fails unless this is a kernel that can be loaded at 1 MiB or above, and is all there.
    fn check(&self, image: &Image) -> Result<(), BootError> {
        if self.version < 0x200 || self.load_flags & LOADED_HIGH == 0 {
            return Err(image.invalid("it is a zImage, which only a BIOS can start; build a bzImage"));
        }
        image.check(0, self.setup_size, "setup code")?;
        // The size counts paragraphs of 16 bytes, and the last need not be full.
        image.check(self.setup_size, self.kernel_size.saturating_sub(15), "kernel code")?;
        if self.kernel_size == 0 {
            return Err(image.invalid("it holds no kernel code"));
        }
        Ok(())
    }

    fn has_64bit_entry(&self) -> bool {
        self.extended_flags & KERNEL_64 != 0
    }

    fn load_address(&self) -> u64 {
        if self.relocatable && self.preferred_address != 0 { self.preferred_address } else { ONE_MIB }
    }

    /// The address after the last that an initrd may have.
    fn initrd_limit(&self) -> u64 {
        let anywhere = self.has_64bit_entry() && self.extended_flags & CAN_BE_LOADED_ABOVE_4G != 0;
        if anywhere { u64::MAX } else { self.initrd_max + 1 }
    }
}

/// Loads the kernel of `request`.
pub(super) fn load(request: &Request<'_>, space: &mut Space<'_>) -> Result<VcpuState, BootError> {
    let image = &request.kernel;
    let header = Header::read(image)?;
    header.check(image)?;

    let address = header.load_address();
    space.claim(address, header.init_size.max(header.kernel_size), "kernel")?;
    let in_file = header.kernel_size.min(image.size().saturating_sub(header.setup_size));
    image.copy(header.setup_size, in_file, space.memory(), address, "kernel code")?;

    let mut parameters = Parameters::new(&header.bytes);
    parameters.set_loader(address as u32);
    parameters.set_memory(request.board);
    if let Some(initrd) = &request.initrd {
        let at = space.place(initrd.size(), header.initrd_limit(), "initrd")?;
        initrd.copy(0, initrd.size(), space.memory(), at, "initrd")?;
        parameters.set_ramdisk(at, initrd.size());
    }
    space.write_command_line(request.command_line, header.command_line_limit.try_into().unwrap_or(usize::MAX))?;
    parameters.set_command_line(low::COMMAND_LINE, header.version >= 0x202);
    space.write(low::PARAMETERS, parameters.bytes(), "boot parameters")?;

    let mut state = if header.has_64bit_entry() {
        long_mode(space, address + ENTRY_64)?
    } else {
        protected_mode(space, address as u32)?
    };
    state.gpr[gpr::RSI] = low::PARAMETERS;
    Ok(state)
}

#[cfg(test)]
mod tests;
