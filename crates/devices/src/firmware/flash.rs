//! A NOR flash with the command set of Intel's chips (CFI command set 0001), as firmware uses it for its variables.
//!
//! | command | effect                                                                                     |
//! |---------|--------------------------------------------------------------------------------------------|
//! | 10, 40  | the next write is stored, 1 to 8 bytes; then the contents show again                        |
//! | 20, D0  | erases the block: all bytes FF; then the status shows                                       |
//! | 50      | clears the status, which shows                                                              |
//! | 70      | the status shows                                                                            |
//! | E8      | the next write is a count less one, then come as many bytes, then D0 stores them            |
//! | others  | the contents show                                                                           |
//!
//! Contents lie in the guest's read-only memory, where the guest reads them without coming here; while the status shows
//! they are hidden. Each change is in the file when the write that makes it is over. What is programmed replaces what was
//! there, also where a real chip could only clear bits.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::{GuestMemory, MemoryError, RomKind};
use platform::{AccessSize, BusDevice, GuestRange, Persist, StateError, state};
use serde::{Deserialize, Serialize};

/// Size of the blocks that are erased.
pub const BLOCK: u64 = 4096;

const KIND: &str = "flash";
const VERSION: u32 = 1;

mod command {
    pub(super) const PROGRAM: u8 = 0x10;
    pub(super) const PROGRAM_TOO: u8 = 0x40;
    pub(super) const ERASE: u8 = 0x20;
    pub(super) const CLEAR_STATUS: u8 = 0x50;
    pub(super) const READ_STATUS: u8 = 0x70;
    pub(super) const CONFIRM: u8 = 0xd0;
    pub(super) const BUFFER: u8 = 0xe8;
}

mod status {
    /// SR.7: the last operation has ended.
    pub(super) const READY: u8 = 1 << 7;
    /// SR.5 and SR.4: it failed.
    pub(super) const ERASE_ERROR: u8 = 1 << 5;
    pub(super) const PROGRAM_ERROR: u8 = 1 << 4;
}

/// What the chip makes of the next write.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
enum Expect {
    #[default]
    Command,
    Data,
    EraseConfirm,
    BufferCount,
    BufferData(u32),
    BufferConfirm,
}

/// What a write makes the chip do to its contents.
#[derive(PartialEq, Eq, Debug)]
enum Change {
    Nothing,
    Store(Vec<(u64, Vec<u8>)>),
    Erase(u64),
}

/// The command state machine, without contents.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Chip {
    expect: Expect,
    shows_status: bool,
    status: u8,
    /// Bytes to be stored together: offset and bytes.
    buffer: Vec<(u64, Vec<u8>)>,
}

impl Chip {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Change {
        match std::mem::take(&mut self.expect) {
            Expect::Command => self.command(bytes[0]),
            Expect::Data => {
                self.shows_status = false;
                return Change::Store(vec![(offset, bytes.to_vec())]);
            }
            Expect::EraseConfirm if bytes[0] == command::CONFIRM => {
                self.shows_status = true;
                return Change::Erase(offset & !(BLOCK - 1));
            }
            Expect::EraseConfirm => self.fail(status::ERASE_ERROR | status::PROGRAM_ERROR),
            Expect::BufferCount => {
                let count = bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte)) + 1;
                match u32::try_from(count) {
                    Ok(count) if u64::from(count) <= BLOCK => self.expect = Expect::BufferData(count),
                    _ => self.fail(status::PROGRAM_ERROR),
                }
            }
            Expect::BufferData(left) => {
                self.buffer.push((offset, bytes.to_vec()));
                let left = left.saturating_sub(bytes.len() as u32);
                self.expect = if left == 0 { Expect::BufferConfirm } else { Expect::BufferData(left) };
            }
            Expect::BufferConfirm if bytes[0] == command::CONFIRM => {
                self.shows_status = true;
                return Change::Store(std::mem::take(&mut self.buffer));
            }
            Expect::BufferConfirm => self.fail(status::PROGRAM_ERROR),
        }
        Change::Nothing
    }

    fn command(&mut self, command: u8) {
        self.shows_status = false;
        match command {
            command::PROGRAM | command::PROGRAM_TOO => self.expect = Expect::Data,
            command::ERASE => self.expect = Expect::EraseConfirm,
            command::CLEAR_STATUS => {
                self.status = 0;
                self.shows_status = true;
            }
            command::READ_STATUS => self.shows_status = true,
            command::BUFFER => {
                self.buffer.clear();
                self.status |= status::READY;
                self.shows_status = true;
                self.expect = Expect::BufferCount;
            }
            _ => {}
        }
    }

    fn fail(&mut self, error: u8) {
        self.buffer.clear();
        self.status |= status::READY | error;
        self.shows_status = true;
    }

    /// Whether a state from outside is one that writes could have led to.
    fn is_valid(&self) -> bool {
        let stored: usize = self.buffer.iter().map(|piece| piece.1.len()).sum();
        let left = if let Expect::BufferData(left) = self.expect { left as usize } else { 0 };
        // The last write may be longer than what was left.
        let pieces = self.buffer.iter().all(|piece| matches!(piece.1.len(), 1 | 2 | 4 | 8));
        pieces && stored < BLOCK as usize + 8 && left <= BLOCK as usize
    }
}

/// The flash in its place below the boot ROM.
pub struct Flash {
    range: GuestRange,
    memory: GuestMemory,
    file: File,
    inner: Mutex<Chip>,
}

impl Flash {
    /// A flash with `contents` right below the read-only memory that there is, whose changes go to `file`. To be mapped at
    /// [`Flash::range`].
    ///
    /// # Errors
    /// The contents do not fit there.
    pub fn new(memory: GuestMemory, file: File, contents: &[u8]) -> Result<Arc<Self>, MemoryError> {
        let range = memory.add_rom(RomKind::Flash, contents)?;
        Ok(Arc::new(Self { range, memory, file, inner: Mutex::default() }))
    }

    /// Where it lies.
    pub fn range(&self) -> GuestRange {
        self.range
    }

    fn lock(&self) -> MutexGuard<'_, Chip> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, chip: &Chip) {
        self.memory.show_rom_from(if chip.shows_status { self.range.end() } else { self.range.start.0 });
    }

    /// Stores bytes in memory and file. Bytes beyond the end are lost.
    fn store(&self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let room = self.range.size.saturating_sub(offset).min(bytes.len() as u64);
        let bytes = &bytes[..room as usize];
        self.memory.write_rom(self.range.start.0 + offset, bytes).map_err(|error| error.to_string())?;
        self.file.write_all_at(bytes, offset).map_err(|error| error.to_string())
    }

    fn apply(&self, chip: &mut Chip, change: Change) {
        let (result, error) = match change {
            Change::Nothing => return,
            Change::Store(pieces) => {
                let mut pieces = pieces.iter().map(|(offset, bytes)| self.store(*offset, bytes));
                (pieces.try_for_each(|piece| piece), status::PROGRAM_ERROR)
            }
            Change::Erase(block) => (self.store(block, &[0xff; BLOCK as usize]), status::ERASE_ERROR),
        };
        chip.status |= status::READY;
        if let Err(why) = result {
            if chip.status & error == 0 {
                log::warn!("cannot write the firmware's variable store: {why}: UEFI variables may be lost");
            }
            chip.fail(error);
        }
    }
}

impl BusDevice for Flash {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        let chip = self.lock();
        if chip.shows_status {
            return u64::from_le_bytes([chip.status; 8]) & size.mask();
        }
        let mut bytes = [0; 8];
        let wanted = &mut bytes[..size.bytes() as usize];
        match self.memory.read_rom(self.range.start.0.wrapping_add(offset), wanted) {
            Ok(()) => u64::from_le_bytes(bytes),
            Err(_) => size.mask(),
        }
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        let mut chip = self.lock();
        let bytes = value.to_le_bytes();
        let change = chip.write(offset, &bytes[..size.bytes() as usize]);
        self.apply(&mut chip, change);
        self.show(&chip);
    }
}

impl Persist for Flash {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(KIND, &*self.lock())
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let restored: Chip = state::decode(KIND, VERSION, version, bytes)?;
        if !restored.is_valid() {
            return Err(StateError::Invalid { kind: KIND, why: "more is buffered than a block holds".into() });
        }
        let mut chip = self.lock();
        *chip = restored;
        self.show(&chip);
        Ok(())
    }

    fn reset(&self) {
        let mut chip = self.lock();
        *chip = Chip::default();
        self.show(&chip);
    }
}

#[cfg(test)]
mod tests {
    use memory::MemoryOptions;

    use super::*;
    use crate::chipset::fixture::{Bytewise, Garbage, Lines, check_state};

    const SIZE: usize = 0x3000;

    fn flash() -> (Arc<Flash>, GuestMemory, File) {
        let memory = GuestMemory::new(MemoryOptions { size: 1 << 20, ..Default::default() }).unwrap();
        memory.add_rom(RomKind::Fixed, &[0xcc; 0x1000]).unwrap();
        let file = tempfile::tempfile().unwrap();
        let contents: Vec<u8> = (0..SIZE).map(|i| i as u8).collect();
        file.write_all_at(&contents, 0).unwrap();
        let flash = Flash::new(memory.clone(), file.try_clone().unwrap(), &contents).unwrap();
        (flash, memory, file)
    }

    fn in_file(file: &File, offset: u64) -> u8 {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        byte[0]
    }

    #[test]
    fn is_recognised_as_edk2_probes_it() {
        let (flash, _, _) = flash();
        assert_eq!(flash.inb(0x12), 0x12);
        flash.outb(0x12, 0x50);
        assert_ne!(flash.inb(0x12), 0x50, "no RAM");
        flash.outb(0x12, 0x70);
        assert_eq!(flash.inb(0x12), 0, "neither ROM, which would show 12, nor RAM, which would show 70");
        flash.outb(0x12, 0x10);
        flash.outb(0x12, 0x12);
        flash.outb(0x12, 0x70);
        assert_eq!(flash.inb(0x12) & 0x10, 0, "not write-protected");
        flash.outb(0x12, 0xff);
        assert_eq!(flash.inb(0x12), 0x12);
    }

    #[test]
    fn programs_in_place() {
        let (flash, memory, file) = flash();
        let start = flash.range().start.0;
        for (command, size) in [(0x10, AccessSize::Byte), (0x40, AccessSize::Qword)] {
            flash.outb(0x1008, command);
            flash.write(0x1008, size, 0x8877_6655_4433_2211 & size.mask());
        }
        assert_eq!(memory.read_u64(start + 0x1008).unwrap(), 0x8877_6655_4433_2211, "without a command in between");
        assert_eq!((in_file(&file, 0x1008), in_file(&file, 0x100f), in_file(&file, 0x1010)), (0x11, 0x88, 0x10));
    }

    #[test]
    fn erases_blocks() {
        let (flash, memory, file) = flash();
        let start = flash.range().start.0;
        flash.outb(0x1234, 0x20);
        flash.outb(0x1234, 0xd0);
        assert_eq!(flash.inb(0x2000), 0x80, "ready, no error");
        assert!(memory.read_u8(start).is_err(), "hidden");
        flash.outb(0, 0xff);
        let byte = |offset| (memory.read_u8(start + offset).unwrap(), in_file(&file, offset));
        assert_eq!(
            [byte(0xffe), byte(0x1000), byte(0x1ffe), byte(0x2001)],
            [(0xfe, 0xfe), (255, 255), (255, 255), (1, 1)]
        );
        flash.outb(0, 0x20);
        flash.outb(0, 0x00);
        assert_eq!(flash.inb(0), 0xb0, "not confirmed");
        flash.outb(0, 0x50);
        assert_eq!(flash.inb(0), 0);
        flash.outb(0, 0xff);
        assert_eq!(byte(1), (1, 1));
    }

    #[test]
    fn stores_a_buffer_at_once() {
        let (flash, memory, file) = flash();
        let start = flash.range().start.0;
        flash.outb(0, 0xe8);
        assert_eq!(flash.inb(0) & 0x80, 0x80);
        flash.outb(0, 2);
        for i in 0..3 {
            flash.outb(0x100 + i, 0xa0);
        }
        assert_eq!(in_file(&file, 0x100), 0);
        flash.outb(0, 0xd0);
        flash.outb(0, 0xff);
        assert_eq!(memory.read_u32(start + 0x100).unwrap(), 0x03a0_a0a0);
        assert_eq!(in_file(&file, 0x102), 0xa0);
    }

    #[test]
    fn a_store_that_cannot_be_written_is_an_error_in_the_status() {
        let memory = GuestMemory::new(MemoryOptions { size: 1 << 20, ..Default::default() }).unwrap();
        let file = File::open("/dev/null").unwrap();
        let flash = Flash::new(memory, file, &[0; 0x1000]).unwrap();
        flash.outb(0, 0x10);
        flash.outb(0, 1);
        assert_eq!(flash.inb(0), 0x90);
    }

    #[test]
    fn garbage() {
        let (flash, memory, file) = flash();
        let (mut garbage, lines) = (Garbage(77), Lines::new());
        for round in 0..100_000 {
            garbage.access(&*flash, SIZE as u64);
            if garbage.next().is_multiple_of(4) {
                let commands = [0x10, 0x20, 0x40, 0x50, 0x70, 0xd0, 0xe8, 0xff];
                flash.outb(garbage.next() % SIZE as u64, commands[(garbage.next() % 8) as usize]);
            }
            if round % 1000 == 0 {
                check_state(&*flash, &lines, &mut garbage);
            }
        }
        assert_eq!(memory.read_u8(0xffff_ffff).unwrap(), 0xcc, "the code above is as it was");
        assert_eq!(file.metadata().unwrap().len(), SIZE as u64);
        flash.reset();
        let mut contents = vec![0; SIZE];
        file.read_exact_at(&mut contents, 0).unwrap();
        let mut shown = vec![0; SIZE];
        memory.read(flash.range().start.0, &mut shown).unwrap();
        assert_eq!(contents, shown, "file and memory are the same");
    }
}
