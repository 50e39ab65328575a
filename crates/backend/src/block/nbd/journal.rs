//! What the server has acknowledged but not yet made durable: should the server die, it is written again.

use std::collections::VecDeque;
use std::sync::Arc;

use super::wire::{Header, Kind};

/// Bytes kept, beyond which the client flushes on its own account.
const FLUSH_AT: usize = 32 << 20;
/// Bytes at which writes wait for a flush to end.
const FULL_AT: usize = 128 << 20;

/// A change that was acknowledged.
pub(super) struct Entry {
    sequence: u64,
    pub(super) header: Header,
    pub(super) payload: Arc<Vec<u8>>,
}

/// The changes since the last flush, in the order of their acknowledgements.
#[derive(Default)]
pub(super) struct Journal {
    entries: VecDeque<Entry>,
    next: u64,
    bytes: usize,
}

impl Journal {
    /// Notes a change that was acknowledged.
    pub(super) fn add(&mut self, header: Header, payload: Arc<Vec<u8>>) {
        debug_assert!(matches!(header.kind, Kind::Write | Kind::WriteZeroes | Kind::Trim));
        self.bytes += payload.len() + size_of::<Entry>();
        self.entries.push_back(Entry { sequence: self.next, header, payload });
        self.next += 1;
    }

    /// What a flush that is sent now will make durable: a value for [`forget`](Self::forget).
    pub(super) fn mark(&self) -> u64 {
        self.next
    }

    /// Drops what was acknowledged before a flush, which has succeeded, was sent.
    pub(super) fn forget(&mut self, mark: u64) {
        while self.entries.front().is_some_and(|entry| entry.sequence < mark) {
            let bytes = self.entries.pop_front().map_or(0, |entry| entry.payload.len() + size_of::<Entry>());
            self.bytes = self.bytes.saturating_sub(bytes);
        }
    }

    /// Whether so much has come together that it is time for a flush.
    pub(super) fn is_large(&self) -> bool {
        self.bytes >= FLUSH_AT
    }

    /// Whether there is so much that writes have to wait for the flush.
    pub(super) fn is_full(&self) -> bool {
        self.bytes >= FULL_AT
    }

    /// All of it, oldest first.
    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_was_acknowledged_before_it_was_sent() {
        let header = |offset| Header { kind: Kind::Write, flags: 0, offset, len: 4 };
        let mut journal = Journal::default();
        journal.add(header(0), Arc::new(vec![0; 4]));
        journal.add(header(4), Arc::new(vec![0; 4]));
        let mark = journal.mark();
        journal.add(header(8), Arc::new(vec![0; 4]));
        journal.forget(mark);
        assert_eq!(journal.entries().map(|entry| entry.header.offset).collect::<Vec<_>>(), [8]);
        journal.forget(mark);
        assert_eq!(journal.entries().count(), 1);
        journal.forget(journal.mark());
        assert_eq!((journal.entries().count(), journal.bytes), (0, 0));
    }

    #[test]
    fn it_does_not_grow_without_bounds() {
        let mut journal = Journal::default();
        let header = Header { kind: Kind::Write, flags: 0, offset: 0, len: 1 << 20 };
        (0..32).for_each(|_| journal.add(header, Arc::new(vec![0; 1 << 20])));
        assert!(journal.is_large() && !journal.is_full());
        (0..96).for_each(|_| journal.add(header, Arc::new(vec![0; 1 << 20])));
        assert!(journal.is_full());
    }
}
