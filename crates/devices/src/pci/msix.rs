//! MSI-X (PCI 3.0, 6.8.2): the table and the pending bits, which lie in a BAR of their own.

use platform::{AccessSize, MsiMessage, MsiSink};
use serde::{Deserialize, Serialize};

use super::config_space::ConfigSpace;
use super::regs;

const CONTROL: u16 = 2;
const FUNCTION_MASK: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;

const ENTRY_SIZE: u64 = 16;
const VECTOR_MASKED: u32 = 1;
const PAGE: u64 = 4096;

/// One entry of the table: message address (low, high), message data, vector control.
type Entry = [u32; 4];
const EMPTY: Entry = [0, 0, 0, VECTOR_MASKED];

/// The MSI-X registers of a function.
pub(crate) struct Msix {
    at: u16,
    bar: usize,
    table: MsixTable,
}

/// What the guest wrote into the table, and which masked vectors wait.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct MsixTable {
    entries: Vec<Entry>,
    pending: Vec<u64>,
}

/// Size of the BAR that holds the table of `vectors` entries and, from the next page, its pending bits.
pub(crate) fn bar_size(vectors: u16) -> u64 {
    pending_offset(vectors) + u64::from(vectors).div_ceil(64) * 8
}

fn pending_offset(vectors: u16) -> u64 {
    (u64::from(vectors) * ENTRY_SIZE).next_multiple_of(PAGE)
}

impl Msix {
    /// Adds the capability; table and pending bits lie in `bar`, which the caller makes of [`bar_size`].
    pub(crate) fn add(space: &mut ConfigSpace, vectors: u16, bar: usize) -> Self {
        let vectors = vectors.clamp(1, 2048);
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(bar as u32).to_le_bytes());
        body[6..10].copy_from_slice(&(pending_offset(vectors) as u32 | bar as u32).to_le_bytes());
        let writable = (FUNCTION_MASK | ENABLE).to_le_bytes();
        let at = space.add_capability(regs::capability::MSIX, &body, &writable);
        let table = MsixTable {
            entries: vec![EMPTY; usize::from(vectors)],
            pending: vec![0; usize::from(vectors).div_ceil(64)],
        };
        Self { at, bar, table }
    }

    pub(crate) fn offset(&self) -> u16 {
        self.at
    }

    pub(crate) fn enabled(&self, space: &ConfigSpace) -> bool {
        space.u16(self.at + CONTROL) & ENABLE != 0
    }

    pub(crate) fn vectors(&self) -> u16 {
        self.table.entries.len() as u16
    }

    pub(crate) fn bar(&self) -> usize {
        self.bar
    }

    pub(crate) fn reset(&mut self) {
        self.table.entries.fill(EMPTY);
        self.table.pending.fill(0);
    }

    pub(crate) fn table(&self) -> &MsixTable {
        &self.table
    }

    /// Takes over a saved table of the same size.
    pub(crate) fn restore(&mut self, saved: MsixTable) -> Result<(), String> {
        if saved.entries.len() != self.table.entries.len() || saved.pending.len() != self.table.pending.len() {
            return Err(format!("an MSI-X table of {} entries", saved.entries.len()));
        }
        self.table = saved;
        Ok(())
    }

    /// Sends the message of `vector`, or keeps it pending while it is masked.
    pub(crate) fn send(&mut self, space: &ConfigSpace, vector: u16, sink: &dyn MsiSink) {
        let Some(entry) = self.table.entries.get(usize::from(vector)) else { return };
        if !self.enabled(space) {
            return;
        }
        if entry[3] & VECTOR_MASKED != 0 || self.function_masked(space) {
            self.table.pending[usize::from(vector) / 64] |= 1 << (vector % 64);
        } else {
            sink.send(message(entry));
        }
    }

    /// Sends what waits and is no longer masked: after a write to the control register or the table.
    pub(crate) fn send_pending(&mut self, space: &ConfigSpace, sink: &dyn MsiSink) {
        if !self.enabled(space) || self.function_masked(space) {
            return;
        }
        for (word_at, word) in self.table.pending.iter_mut().enumerate() {
            let mut waiting = *word;
            while waiting != 0 {
                let bit = waiting.trailing_zeros();
                waiting &= waiting - 1;
                let Some(entry) = self.table.entries.get(word_at * 64 + bit as usize) else { continue };
                if entry[3] & VECTOR_MASKED == 0 {
                    *word &= !(1 << bit);
                    sink.send(message(entry));
                }
            }
        }
    }

    fn function_masked(&self, space: &ConfigSpace) -> bool {
        space.u16(self.at + CONTROL) & FUNCTION_MASK != 0
    }

    /// Reads table or pending bits: aligned accesses of 4 and 8 bytes; anything else reads zero.
    pub(crate) fn read(&self, offset: u64, size: AccessSize) -> u64 {
        if size == AccessSize::Qword {
            return self.read(offset, AccessSize::Dword) | self.read(offset + 4, AccessSize::Dword) << 32;
        }
        if size != AccessSize::Dword || !offset.is_multiple_of(4) {
            return 0;
        }
        let word = match self.register(offset) {
            Some((entry, field)) => self.table.entries[entry][field],
            None => offset.checked_sub(pending_offset(self.vectors())).map_or(0, |offset| self.pending_word(offset)),
        };
        u64::from(word)
    }

    /// Writes the table; the pending bits are read-only.
    pub(crate) fn write(&mut self, offset: u64, size: AccessSize, value: u64) {
        if size == AccessSize::Qword {
            self.write(offset, AccessSize::Dword, value & 0xffff_ffff);
            self.write(offset + 4, AccessSize::Dword, value >> 32);
            return;
        }
        if size != AccessSize::Dword || !offset.is_multiple_of(4) {
            return;
        }
        if let Some((entry, field)) = self.register(offset) {
            self.table.entries[entry][field] = value as u32 & if field == 3 { VECTOR_MASKED } else { u32::MAX };
        }
    }

    /// Table entry and field at a BAR offset.
    fn register(&self, offset: u64) -> Option<(usize, usize)> {
        let entry = usize::try_from(offset / ENTRY_SIZE).ok()?;
        (entry < self.table.entries.len()).then_some((entry, (offset % ENTRY_SIZE / 4) as usize))
    }

    fn pending_word(&self, offset: u64) -> u32 {
        let word = usize::try_from(offset / 8).ok().and_then(|at| self.table.pending.get(at)).copied().unwrap_or(0);
        (word >> (offset % 8 * 8)) as u32
    }
}

fn message(entry: &Entry) -> MsiMessage {
    MsiMessage { address: u64::from(entry[1]) << 32 | u64::from(entry[0]), data: entry[2] }
}
