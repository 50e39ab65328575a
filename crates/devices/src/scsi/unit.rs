//! A direct-access logical unit: the commands of SBC-3 on a disk.

use std::sync::{Mutex, MutexGuard, PoisonError};

use backend::block::{BlockOptions, Disk, Geometry, Operation};
use memory::GuestMemory;
use platform::GuestRange;

use super::cdb::{Cdb, READ_CAPACITY_16, opcode};
use super::inquiry::{self, Identity, MAX_UNMAP, MAX_UNMAP_DESCRIPTORS, MAX_WRITE_SAME, Traits};
use super::mode::{self, Medium};
use super::sense::Sense;
use crate::virtio::Buffers;

/// Bytes of parameter data that are looked at, at most; no command has a use for more.
const MAX_PARAMETERS: u64 = 4096;

/// What a command comes to.
#[derive(PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Done, with data for the initiator, who may have asked for less.
    Data(Vec<u8>),
    /// For the disk, one after the other; if all succeed, so many bytes of data have moved.
    Disk {
        /// What to do; at least one.
        operations: Vec<Operation>,
        /// Bytes read or written.
        moved: u64,
        /// Whether a failure is one of writing.
        writes: bool,
    },
    /// Not done.
    Failed(Sense),
    /// The initiator's buffers are smaller than the data.
    Overrun,
}

impl Outcome {
    /// Done, without data.
    const GOOD: Self = Self::Data(Vec::new());
}

/// A command with the memory for its data.
pub struct Command<'a> {
    /// The command descriptor block.
    pub cdb: Cdb<'a>,
    /// Data from the initiator.
    pub out: Buffers,
    /// Room for data to the initiator.
    pub input: Buffers,
    /// Where these are.
    pub memory: &'a GuestMemory,
}

/// A logical unit.
pub struct LogicalUnit {
    disk: Disk,
    identity: Identity,
    /// Writes are done before they are on stable storage.
    write_cache: bool,
    /// What the initiator is to be told at its next command.
    attention: Mutex<Option<Sense>>,
}

impl LogicalUnit {
    /// A unit on an open disk.
    pub fn new(disk: Disk, options: &BlockOptions, identity: Identity) -> Self {
        Self { disk, identity, write_cache: !options.sync, attention: Mutex::new(Some(Sense::RESET)) }
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    fn attention(&self) -> MutexGuard<'_, Option<Sense>> {
        self.attention.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the initiator will be told at its next command.
    pub fn pending_attention(&self) -> Option<Sense> {
        *self.attention()
    }

    /// Has the initiator told something at its next command.
    pub fn set_attention(&self, sense: Option<Sense>) {
        *self.attention() = sense;
    }

    /// Decides what a command comes to. `luns` is the answer to REPORT LUNS.
    pub fn start(&self, command: Command<'_>, luns: &[u8]) -> Outcome {
        let code = command.cdb.opcode();
        // These three are answered whatever there is to tell.
        if code != opcode::INQUIRY && code != opcode::REPORT_LUNS {
            let told = self.attention().take();
            match told {
                Some(sense) if code == opcode::REQUEST_SENSE => return Outcome::Data(sense.to_bytes().to_vec()),
                Some(sense) => return Outcome::Failed(sense),
                None => {}
            }
        }
        self.execute(command, luns).unwrap_or_else(Outcome::Failed)
    }

    fn execute(&self, command: Command<'_>, luns: &[u8]) -> Result<Outcome, Sense> {
        let cdb = command.cdb;
        let data = |bytes: Vec<u8>, at: usize, len: usize| Ok(Outcome::Data(limited(bytes, cdb.number(at, len))));
        match cdb.opcode() {
            opcode::TEST_UNIT_READY
            | opcode::RESERVE_6
            | opcode::RELEASE_6
            | opcode::PREVENT_ALLOW
            | opcode::START_STOP_UNIT => Ok(Outcome::GOOD),
            opcode::REQUEST_SENSE => data(Sense::NONE.to_bytes().to_vec(), 4, 1),
            opcode::INQUIRY => data(inquiry::answer(cdb, &self.identity, self.traits())?, 3, 2),
            opcode::MODE_SENSE_6 => data(mode::sense(cdb, self.medium())?, 4, 1),
            opcode::MODE_SENSE_10 => data(mode::sense(cdb, self.medium())?, 7, 2),
            opcode::MODE_SELECT_6 => self.select(command, cdb.number(4, 1)),
            opcode::MODE_SELECT_10 => self.select(command, cdb.number(7, 2)),
            opcode::READ_CAPACITY_10 => Ok(Outcome::Data(self.capacity_10())),
            opcode::SERVICE_ACTION_IN_16 if cdb.byte(1) & 0x1f == READ_CAPACITY_16 => data(self.capacity_16(), 10, 4),
            opcode::REPORT_LUNS => data(luns.to_vec(), 6, 4),
            opcode::READ_6 | opcode::READ_10 | opcode::READ_12 | opcode::READ_16 => self.read(command),
            opcode::WRITE_6 | opcode::WRITE_10 | opcode::WRITE_12 | opcode::WRITE_16 => self.write(command, false),
            opcode::WRITE_VERIFY_10 | opcode::WRITE_VERIFY_12 | opcode::WRITE_VERIFY_16 => self.write(command, true),
            opcode::VERIFY_10 | opcode::VERIFY_12 | opcode::VERIFY_16 => self.verify(cdb),
            opcode::SYNCHRONIZE_CACHE_10 | opcode::SYNCHRONIZE_CACHE_16 => {
                self.extent(cdb)?;
                Ok(Outcome::Disk { operations: vec![Operation::Flush], moved: 0, writes: true })
            }
            opcode::WRITE_SAME_10 | opcode::WRITE_SAME_16 => self.write_same(command),
            opcode::UNMAP => self.unmap(command),
            _ => Err(Sense::INVALID_OPCODE),
        }
    }

    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn block_size(&self) -> u64 {
        u64::from(self.geometry().sector_size.logical)
    }

    fn blocks(&self) -> u64 {
        self.geometry().size / self.block_size()
    }

    fn traits(&self) -> Traits {
        let Geometry { sector_size, discard, .. } = self.geometry();
        Traits { discard, granularity: sector_size.physical / sector_size.logical }
    }

    fn medium(&self) -> Medium {
        let geometry = self.geometry();
        Medium {
            read_only: geometry.read_only,
            write_cache: self.write_cache,
            blocks: self.blocks(),
            block_size: geometry.sector_size.logical,
        }
    }

    fn capacity_10(&self) -> Vec<u8> {
        let last = u32::try_from(self.blocks().saturating_sub(1)).unwrap_or(u32::MAX);
        [last.to_be_bytes(), (self.block_size() as u32).to_be_bytes()].concat()
    }

    fn capacity_16(&self) -> Vec<u8> {
        let traits = self.traits();
        let mut bytes = self.blocks().saturating_sub(1).to_be_bytes().to_vec();
        bytes.extend((self.block_size() as u32).to_be_bytes());
        // No protection; blocks per physical block; thin provisioning.
        bytes.extend([0, traits.granularity.trailing_zeros() as u8, u8::from(traits.discard) << 7, 0]);
        bytes.resize(32, 0);
        bytes
    }

    /// First byte and number of bytes that a command names, inside the disk.
    fn extent(&self, cdb: Cdb<'_>) -> Result<(u64, u64), Sense> {
        let (block, count) = cdb.extent();
        self.range(block, count)
    }

    fn range(&self, block: u64, count: u64) -> Result<(u64, u64), Sense> {
        if block.checked_add(count).is_none_or(|end| end > self.blocks()) {
            return Err(Sense::LBA_OUT_OF_RANGE);
        }
        // Both are inside the disk, whose size in bytes is a u64.
        Ok((block * self.block_size(), count * self.block_size()))
    }

    fn writable(&self) -> Result<(), Sense> {
        if self.geometry().read_only { Err(Sense::WRITE_PROTECTED) } else { Ok(()) }
    }

    fn read(&self, command: Command<'_>) -> Result<Outcome, Sense> {
        if command.cdb.has_protection() {
            return Err(Sense::INVALID_FIELD);
        }
        let (offset, len) = self.extent(command.cdb)?;
        if len > command.input.len() {
            return Ok(Outcome::Overrun);
        }
        if len == 0 {
            return Ok(Outcome::GOOD);
        }
        let to = command.input.split(len).0.into_ranges();
        Ok(Outcome::Disk { operations: vec![Operation::Read { offset, to }], moved: len, writes: false })
    }

    fn write(&self, command: Command<'_>, verify: bool) -> Result<Outcome, Sense> {
        if command.cdb.has_protection() {
            return Err(Sense::INVALID_FIELD);
        }
        self.writable()?;
        let (offset, len) = self.extent(command.cdb)?;
        if len > command.out.len() {
            return Ok(Outcome::Overrun);
        }
        if len == 0 {
            return Ok(Outcome::GOOD);
        }
        // What is verified has to be on the medium.
        let fua = command.cdb.fua() || verify;
        let from = command.out.split(len).0.into_ranges();
        Ok(Outcome::Disk { operations: vec![Operation::Write { offset, from, fua }], moved: len, writes: true })
    }

    /// VERIFY without comparison: the host vouches for what it stores.
    fn verify(&self, cdb: Cdb<'_>) -> Result<Outcome, Sense> {
        self.extent(cdb)?;
        if cdb.byte(1) & 6 == 0 { Ok(Outcome::GOOD) } else { Err(Sense::INVALID_FIELD) }
    }

    fn select(&self, command: Command<'_>, len: u64) -> Result<Outcome, Sense> {
        let list = parameters(&command, len)?;
        mode::select(command.cdb, &list, self.medium())?;
        Ok(Outcome::GOOD)
    }

    fn write_same(&self, command: Command<'_>) -> Result<Outcome, Sense> {
        let cdb = command.cdb;
        // No protection, no anchoring, no numbering of blocks.
        if cdb.byte(1) & 0xf6 != 0 {
            return Err(Sense::INVALID_FIELD);
        }
        self.writable()?;
        let (unmap, no_data) = (cdb.byte(1) & 8 != 0, cdb.byte(1) & 1 != 0);
        let (block, count) = cdb.extent();
        // None means all that follow.
        let count = if count == 0 { self.blocks().saturating_sub(block) } else { count };
        let (offset, len) = self.range(block, count)?;
        if count > MAX_WRITE_SAME || (no_data && cdb.opcode() == opcode::WRITE_SAME_10) {
            return Err(Sense::INVALID_FIELD);
        }
        let size = self.block_size();
        if no_data || self.is_zero_block(&command, size)? {
            let operations = vec![Operation::WriteZeroes { offset, len, unmap }];
            return Ok(Outcome::Disk { operations, moved: if no_data { 0 } else { size }, writes: true });
        }
        // The same memory for every block; in crumbs it would be too long a list.
        let pattern = command.out.split(size).0.into_ranges();
        if pattern.len() as u64 * count > 2 * MAX_WRITE_SAME {
            return Err(Sense::DATA_PHASE_ERROR);
        }
        let from: Vec<GuestRange> = (0..count).flat_map(|_| pattern.iter().copied()).collect();
        Ok(Outcome::Disk { operations: vec![Operation::Write { offset, from, fua: false }], moved: size, writes: true })
    }

    fn is_zero_block(&self, command: &Command<'_>, size: u64) -> Result<bool, Sense> {
        let mut bytes = vec![0; size.min(1 << 20) as usize];
        match command.out.read(command.memory, &mut bytes) {
            Ok(read) if read as u64 == size => Ok(bytes.iter().all(|byte| *byte == 0)),
            _ => Err(Sense::DATA_PHASE_ERROR),
        }
    }

    fn unmap(&self, command: Command<'_>) -> Result<Outcome, Sense> {
        self.writable()?;
        if !self.geometry().discard {
            return Err(Sense::INVALID_OPCODE);
        }
        if command.cdb.byte(1) & 1 != 0 {
            return Err(Sense::INVALID_FIELD);
        }
        let len = command.cdb.number(7, 2);
        if len == 0 {
            return Ok(Outcome::GOOD);
        }
        let list = parameters(&command, len)?;
        let descriptors = list.get(8..).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
        let told = usize::from(u16::from_be_bytes([list[2], list[3]]));
        let descriptors = &descriptors[..descriptors.len().min(told)];
        if descriptors.len() / 16 > MAX_UNMAP_DESCRIPTORS as usize {
            return Err(Sense::INVALID_PARAMETER);
        }
        let mut operations = Vec::new();
        for descriptor in descriptors.chunks_exact(16) {
            let fields = Cdb(descriptor);
            let (block, count) = (fields.number(0, 8), fields.number(8, 4));
            if count > u64::from(MAX_UNMAP) {
                return Err(Sense::INVALID_PARAMETER);
            }
            let (offset, len) = self.range(block, count)?;
            if len > 0 {
                operations.push(Operation::Discard { offset, len });
            }
        }
        let moved = list.len() as u64;
        Ok(if operations.is_empty() { Outcome::GOOD } else { Outcome::Disk { operations, moved, writes: true } })
    }
}

/// The first `len` bytes of an answer.
fn limited(mut bytes: Vec<u8>, len: u64) -> Vec<u8> {
    bytes.truncate(usize::try_from(len).unwrap_or(usize::MAX));
    bytes
}

/// Parameter data of a command that announces `len` bytes.
fn parameters(command: &Command<'_>, len: u64) -> Result<Vec<u8>, Sense> {
    let mut bytes = vec![0; len.min(MAX_PARAMETERS) as usize];
    match command.out.read(command.memory, &mut bytes) {
        Ok(read) if read == bytes.len() => Ok(bytes),
        _ => Err(Sense::PARAMETER_LIST_LENGTH),
    }
}
