//! Which pages hold code that a CPU engine has decoded, and what of it is still valid; which were never written.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use rustix::io::Errno;

use crate::PAGE_SIZE;

/// The state of a page at the moment code was decoded from it. The code is valid as long as
/// [`PageMap::is_current`] says so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct CodeTag(pub u32);

/// One word per page of RAM: bit 0 "code was decoded from this page", bit 1 "was written", bits 31:2 a generation that
/// counts the writes that ended the state of bit 0.
///
/// A write to a page that was written before and holds no code costs one load. The words are zero pages until touched.
pub struct PageMap {
    words: Box<[AtomicU32]>,
    /// Whether bit 1 tells of all writes.
    complete: AtomicBool,
    /// Index of the first page of high memory in `words`, and its page number.
    high: (usize, u64),
    /// Counts writes that ended the validity of code.
    epoch: AtomicU32,
    /// The pages of the last such writes: page number above bit 24, the count's low bits below.
    log: [AtomicU64; LOG],
}

const CODE: u32 = 1 << 0;
const WRITTEN: u32 = 1 << 1;
const GENERATION: u32 = 1 << 2;
/// How many writes to code are remembered.
const LOG: usize = 64;
/// Low bits of the count that a log entry carries.
const LOG_COUNT: u64 = 0xff_ffff;

impl PageMap {
    /// # Errors
    /// The host has no memory for it: it takes a thousandth of the RAM's size in addresses, which a host that does not
    /// overcommit refuses for very large guests.
    pub(crate) fn new(low_size: u64, high_base: u64, high_size: u64) -> Result<Self, Errno> {
        let low = (low_size / PAGE_SIZE) as usize;
        let count = low + (high_size / PAGE_SIZE) as usize;
        let log = std::array::from_fn(|_| AtomicU64::new(LOG_COUNT));
        let (complete, epoch) = (AtomicBool::new(false), AtomicU32::new(0));
        Ok(Self { words: zeroes(count)?, complete, high: (low, high_base / PAGE_SIZE), epoch, log })
    }

    /// The word of the page that holds guest-physical address `gpa`, or `None` outside RAM.
    #[inline]
    pub fn word(&self, gpa: u64) -> Option<&AtomicU32> {
        let page = gpa / PAGE_SIZE;
        let (low, high_page) = self.high;
        if page < low as u64 {
            self.words.get(page as usize)
        } else {
            self.words.get(low + usize::try_from(page.checked_sub(high_page)?).ok()?)
        }
    }

    /// Marks the page as holding code; what is decoded from it *after* this call is valid while the returned tag is current.
    /// The caller must make sure that no vCPU holds a write permission for the page that by-passes [`PageMap::note_write`].
    pub fn mark_code(&self, gpa: u64) -> Option<CodeTag> {
        self.word(gpa).map(|word| CodeTag(word.fetch_or(CODE, Ordering::SeqCst) | CODE))
    }

    /// Whether the page holds code, so that writes to it must be noted.
    #[inline]
    pub fn holds_code(&self, gpa: u64) -> bool {
        self.word(gpa).is_some_and(|word| word.load(Ordering::Acquire) & CODE != 0)
    }

    /// The tag of a page that holds code: what is decoded from it after this call is valid while the tag is current.
    #[inline]
    pub fn code_tag(&self, gpa: u64) -> Option<CodeTag> {
        let word = self.word(gpa)?.load(Ordering::SeqCst);
        (word & CODE != 0).then_some(CodeTag(word))
    }

    /// Whether what was decoded under `tag` is still what memory holds.
    #[inline]
    pub fn is_current(&self, gpa: u64, tag: CodeTag) -> bool {
        self.word(gpa).is_some_and(|word| word.load(Ordering::Acquire) == tag.0)
    }

    /// Promises that from the first write on, every write is noted before others can know of it. That is so when all vCPUs
    /// are software, and makes [`PageMap::is_untouched`] tell something.
    pub fn all_writes_are_noted(&self) {
        self.complete.store(true, Ordering::Relaxed);
    }

    /// Takes the promise back: another process writes guest memory too.
    pub fn has_other_writers(&self) {
        self.complete.store(false, Ordering::Relaxed);
    }

    /// Whether nothing was ever written to the page: it is all zeroes, and the host has no memory for it yet. Writing zeroes to
    /// it can be left out.
    #[inline]
    pub fn is_untouched(&self, gpa: u64) -> bool {
        self.complete.load(Ordering::Relaxed)
            && self.word(gpa).is_some_and(|word| word.load(Ordering::SeqCst) & WRITTEN == 0)
    }

    /// Notes a write of `len` bytes at `gpa`; call it after the bytes are in memory.
    /// Returns whether any page held code (whose decoded form is invalid now).
    #[inline]
    pub fn note_write(&self, gpa: u64, len: u64) -> bool {
        if len == 0 {
            return false;
        }
        let last = gpa.saturating_add(len - 1) / PAGE_SIZE;
        let mut hit = false;
        for page in gpa / PAGE_SIZE..=last {
            let Some(word) = self.word(page * PAGE_SIZE) else { continue };
            let mut seen = word.load(Ordering::SeqCst);
            while seen & (CODE | WRITTEN) != WRITTEN {
                let held_code = seen & CODE != 0;
                let ended = if held_code { GENERATION } else { 0 };
                let next = (seen & !CODE | WRITTEN).wrapping_add(ended);
                match word.compare_exchange_weak(seen, next, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(_) if !held_code => break,
                    Ok(_) => {
                        hit = true;
                        let count = self.epoch.fetch_add(1, Ordering::SeqCst);
                        let entry = page << 24 | u64::from(count) & LOG_COUNT;
                        self.log[count as usize % LOG].store(entry, Ordering::SeqCst);
                        break;
                    }
                    Err(now) => seen = now,
                }
            }
        }
        hit
    }

    /// How many writes have ended the validity of code so far, wrapping.
    #[inline]
    pub fn code_epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Tells `page` the addresses of the pages whose code became invalid between two values of [`PageMap::code_epoch`].
    /// `false`: they are no longer known; whoever asks must check every page with [`PageMap::is_current`].
    pub fn code_writes(&self, since: u32, until: u32, mut page: impl FnMut(u64)) -> bool {
        let count = until.wrapping_sub(since) as usize;
        if count > LOG {
            return false;
        }
        for i in 0..count as u32 {
            let n = since.wrapping_add(i);
            let entry = self.log[n as usize % LOG].load(Ordering::SeqCst);
            if entry & LOG_COUNT != u64::from(n) & LOG_COUNT {
                return false;
            }
            page((entry >> 24) * PAGE_SIZE);
        }
        true
    }
}

/// `count` zeroes in pages that the kernel has not touched yet.
fn zeroes(count: usize) -> Result<Box<[AtomicU32]>, Errno> {
    if count == 0 {
        return Ok(Box::default());
    }
    let layout = Layout::array::<AtomicU32>(count).map_err(|_| Errno::NOMEM)?;
    // SAFETY: the layout is not empty.
    let start = unsafe { alloc_zeroed(layout) }.cast::<AtomicU32>();
    if start.is_null() {
        return Err(Errno::NOMEM);
    }
    // SAFETY: the memory has the layout of the slice, comes from the global allocator, is owned here alone, and zero is a
    // valid AtomicU32.
    Ok(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(start, count)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_ends_the_validity_of_decoded_code() {
        let map = PageMap::new(0x4000, 4 << 30, 0x2000).unwrap();
        let tag = map.mark_code(0x1234).unwrap();
        assert!(map.holds_code(0x1fff) && map.is_current(0x1000, tag));
        assert_eq!((map.code_tag(0x1fff), map.code_tag(0x2000)), (Some(tag), None));
        assert!(!map.note_write(0x2000, 8), "another page");
        assert!(map.is_current(0x1000, tag));
        assert!(map.note_write(0xffc, 8), "a write that straddles into the page");
        assert!(!map.is_current(0x1000, tag) && !map.holds_code(0x1000));
        let again = map.mark_code(0x1000).unwrap();
        assert_ne!(again, tag, "an old tag never becomes valid again");
    }

    #[test]
    fn pages_are_untouched_until_written() {
        let map = PageMap::new(0x4000, 4 << 30, 0x2000).unwrap();
        assert!(!map.is_untouched(0x1000), "nobody has promised anything");
        map.all_writes_are_noted();
        let tag = map.mark_code(0x1000).unwrap();
        assert!(map.is_untouched(0x1fff) && map.is_current(0x1000, tag));
        assert!(map.note_write(0x1800, 1));
        assert!(!map.is_untouched(0x1000) && map.is_untouched(0) && map.is_untouched(0x2000));
        map.note_write((4 << 30) + 0xfff, 2);
        assert!(!map.is_untouched(4 << 30) && !map.is_untouched((4 << 30) + 0x1000));
        assert!(!map.is_untouched(0x4000) && !map.is_untouched(u64::MAX), "no RAM");
    }

    #[test]
    fn a_map_that_the_host_has_no_memory_for_is_an_error() {
        assert!(PageMap::new(u64::MAX, 0, 0).is_err());
    }

    #[test]
    fn writes_to_code_are_logged() {
        let map = PageMap::new(0x4000, 4 << 30, 0x2000).unwrap();
        let since = map.code_epoch();
        map.mark_code(0x1000);
        map.mark_code((4 << 30) + 0x1000);
        map.note_write(0x1800, 1);
        map.note_write(0x2800, 1);
        map.note_write((4 << 30) + 0x1000, 1);
        let mut pages = Vec::new();
        assert!(map.code_writes(since, map.code_epoch(), |page| pages.push(page)));
        assert_eq!(pages, [0x1000, (4 << 30) + 0x1000]);
        for _ in 0..LOG {
            map.mark_code(0x1000);
            map.note_write(0x1000, 1);
        }
        assert!(!map.code_writes(since, map.code_epoch(), |_| ()), "older than the log reaches");
    }

    #[test]
    fn knows_both_pieces_and_nothing_else() {
        let map = PageMap::new(0x4000, 4 << 30, 0x2000).unwrap();
        assert!(map.mark_code((4 << 30) + 0x1fff).is_some());
        assert!(map.mark_code((4 << 30) + 0x2000).is_none());
        assert!(map.mark_code(0x4000).is_none());
        assert!(map.mark_code(u64::MAX).is_none());
        assert!(!map.note_write(u64::MAX - 3, 100));
    }
}
