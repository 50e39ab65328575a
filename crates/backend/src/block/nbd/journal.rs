//! What the server has acknowledged but not yet made durable: should the server die, it is written again.

use std::collections::VecDeque;
use std::sync::Arc;

use super::wire::{Header, Kind};

/// Bytes kept, beyond which the client flushes on its own account.
const FLUSH_AT: usize = 32 << 20;
/// Bytes at which writes wait for a flush to end.
const FULL_AT: usize = 128 << 20;

/// Payloads smaller than this are cheap to allocate; the others are used again, for their memory is the host's to map
/// and to clear each time.
const WORTH_KEEPING: usize = 64 << 10;
/// Bytes kept for use again.
const MAX_SPARE: usize = FLUSH_AT;

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
    /// Payloads to be used again, and the bytes that they take.
    spare: Vec<Vec<u8>>,
    spare_bytes: usize,
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
            let Some(entry) = self.entries.pop_front() else { break };
            self.bytes = self.bytes.saturating_sub(entry.payload.len() + size_of::<Entry>());
            self.keep(entry.payload);
        }
    }

    /// A payload of `len` bytes, whatever they are.
    pub(super) fn payload(&mut self, len: usize) -> Vec<u8> {
        let fits = |spare: &Vec<u8>| (len..=len.saturating_mul(2)).contains(&spare.capacity());
        let found = if len < WORTH_KEEPING { None } else { self.spare.iter().rposition(fits) };
        let Some(at) = found else { return vec![0; len] };
        let mut payload = self.spare.swap_remove(at);
        self.spare_bytes = self.spare_bytes.saturating_sub(payload.capacity());
        payload.resize(len, 0);
        payload
    }

    fn keep(&mut self, payload: Arc<Vec<u8>>) {
        let capacity = payload.capacity();
        if capacity >= WORTH_KEEPING
            && self.spare_bytes + capacity <= MAX_SPARE
            && let Ok(payload) = Arc::try_unwrap(payload)
        {
            self.spare_bytes += capacity;
            self.spare.push(payload);
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
    fn memory_of_large_payloads_is_used_again() {
        let header = Header { kind: Kind::Write, flags: 0, offset: 0, len: 0 };
        let mut journal = Journal::default();
        for len in [2 * WORTH_KEEPING, 100, MAX_SPARE] {
            journal.add(header, Arc::new(vec![1; len]));
        }
        journal.forget(journal.mark());
        assert_eq!((journal.spare.len(), journal.spare_bytes), (1, 2 * WORTH_KEEPING));
        assert_eq!(journal.payload(WORTH_KEEPING / 4), vec![0; WORTH_KEEPING / 4]);
        assert_eq!(journal.spare.len(), 1);
        let payload = journal.payload(WORTH_KEEPING + 1);
        assert_eq!((payload.len(), payload[0]), (WORTH_KEEPING + 1, 1));
        assert_eq!((journal.spare.len(), journal.spare_bytes), (0, 0));
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
