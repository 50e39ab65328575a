//! Boot ROM images: their sizes, what they were built for, and the variables that may be inside.

use memory::{HIGH_MEMORY_BASE, PAGE_SIZE, ROM_WINDOW};

/// Bytes that ROM and variable store may have together.
const ROOM: u64 = HIGH_MEMORY_BASE - ROM_WINDOW;

/// What firmware was built for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flavour {
    /// bhyve, or something that this program does not know.
    Bhyve,
    /// QEMU's boards: OVMF, as Linux distributions have it.
    Qemu,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FirmwareError {
    /// The ROM.
    #[error("Invalid bootrom size {0}: it must be a multiple of 4096, and with the variable store at most 16 MB")]
    RomSize(u64),
    /// The variable store.
    #[error("Invalid bootvars size {0}: it must be a multiple of 4096, and with the boot ROM at most 16 MB")]
    VarsSize(u64),
}

/// Checks the sizes, in bytes, of a ROM and its variable store, if it has one.
///
/// # Errors
/// One of them is not whole pages, or they do not fit.
pub(crate) fn check_sizes(rom: u64, vars: Option<u64>) -> Result<(), FirmwareError> {
    let pages = |size: u64| size > 0 && size.is_multiple_of(PAGE_SIZE);
    if let Some(size) = vars
        && (!pages(size) || size >= ROOM)
    {
        return Err(FirmwareError::VarsSize(size));
    }
    if pages(rom) && rom <= ROOM - vars.unwrap_or(0) { Ok(()) } else { Err(FirmwareError::RomSize(rom)) }
}

/// A boot ROM.
pub struct Firmware {
    /// What the guest executes: its last byte is at 4 GiB less one.
    pub code: Vec<u8>,
    /// What it was built for.
    pub flavour: Flavour,
}

/// The GUID of the table that OVMF has below its reset vector, in the order of its bytes: 96b582de-1fb2-45f7-baea-a366c55a082d.
const FOOTER: [u8; 16] =
    [0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45, 0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d];
/// Distance of the GUID's first byte from the end.
const FOOTER_FROM_END: usize = 48;
/// A firmware volume (UEFI Platform Initialization 1.7, volume 3, section 3.2.1): its type, length and signature.
const VOLUME_GUID: usize = 16;
const VOLUME_LENGTH: usize = 32;
const VOLUME_SIGNATURE: usize = 40;
/// The type of volumes of variables: fff12b8d-7696-4c8b-a985-2747075b4f50.
const VARIABLES: [u8; 16] =
    [0x8d, 0x2b, 0xf1, 0xff, 0x96, 0x76, 0x8b, 0x4c, 0xa9, 0x85, 0x27, 0x47, 0x07, 0x5b, 0x4f, 0x50];

impl Firmware {
    /// A boot ROM from its file's bytes, with a variable store of `vars` bytes below it.
    ///
    /// # Errors
    /// The sizes cannot be.
    pub fn new(rom: Vec<u8>, vars: Option<u64>) -> Result<Self, FirmwareError> {
        check_sizes(rom.len() as u64, vars)?;
        let flavour = Flavour::of(&rom);
        Ok(Self { code: rom, flavour })
    }

    /// Takes a volume of variables off the start of an image that holds variables and code, so that the variables can be kept
    /// apart. `None` if the image holds no variables.
    pub fn take_variables(&mut self) -> Option<Vec<u8>> {
        let field = |at, size| self.code.get(at..at + size);
        if field(VOLUME_GUID, 16)? != VARIABLES || field(VOLUME_SIGNATURE, 4)? != b"_FVH" {
            return None;
        }
        let length = u64::from_le_bytes(field(VOLUME_LENGTH, 8)?.try_into().ok()?);
        let length = usize::try_from(length).ok().filter(|length| length.is_multiple_of(PAGE_SIZE as usize))?;
        if length == 0 || length >= self.code.len() {
            return None;
        }
        let code = self.code.split_off(length);
        Some(std::mem::replace(&mut self.code, code))
    }
}

impl Flavour {
    /// Tells by the table of GUIDs at the end.
    fn of(rom: &[u8]) -> Self {
        let footer = rom.len().checked_sub(FOOTER_FROM_END).and_then(|at| rom.get(at..at + FOOTER.len()));
        if footer == Some(&FOOTER) { Self::Qemu } else { Self::Bhyve }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_pages_and_fit() {
        use FirmwareError::{RomSize, VarsSize};
        for (rom, vars, expected) in [
            (0, None, Err(RomSize(0))),
            (4095, None, Err(RomSize(4095))),
            (4097, None, Err(RomSize(4097))),
            (4096, None, Ok(())),
            (16 << 20, None, Ok(())),
            ((16 << 20) + 4096, None, Err(RomSize((16 << 20) + 4096))),
            (16 << 20, Some(4096), Err(RomSize(16 << 20))),
            (4096, Some(16 << 20), Err(VarsSize(16 << 20))),
            (4096, Some(100), Err(VarsSize(100))),
            (4096, Some(0), Err(VarsSize(0))),
            (4096, Some((16 << 20) - 4096), Ok(())),
        ] {
            assert_eq!(check_sizes(rom, vars), expected, "{rom} {vars:?}");
        }
    }

    #[test]
    fn qemus_firmware_has_a_footer() {
        let mut rom = vec![0; 8192];
        assert_eq!(Firmware::new(rom.clone(), None).unwrap().flavour, Flavour::Bhyve);
        rom[8192 - 48..8192 - 32].copy_from_slice(&FOOTER);
        assert_eq!(Firmware::new(rom, None).unwrap().flavour, Flavour::Qemu);
    }

    #[test]
    fn variables_come_off_a_combined_image() {
        let mut rom = vec![7; 0x3000];
        assert!(Firmware::new(rom.clone(), None).unwrap().take_variables().is_none());
        rom[16..32].copy_from_slice(&VARIABLES);
        rom[40..44].copy_from_slice(b"_FVH");
        for (length, expected) in
            [(0x1000u64, Some(0x1000)), (0x3000, None), (0, None), (u64::MAX, None), (0x800, None)]
        {
            rom[32..40].copy_from_slice(&length.to_le_bytes());
            let mut firmware = Firmware::new(rom.clone(), None).unwrap();
            assert_eq!(firmware.take_variables().map(|vars| vars.len()), expected, "{length:#x}");
            assert_eq!(firmware.code.len(), 0x3000 - expected.unwrap_or(0));
        }
    }
}
