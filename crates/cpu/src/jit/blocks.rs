//! Which code was made from what, and how long it stays valid.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};

use memory::{CodeTag, PageMap};

use crate::translate::block::Landing;
use crate::translate::course::Course;

/// What a block is found by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Key {
    /// Guest-physical address of the first byte.
    pub(crate) phys: u64,
    /// Guest-physical page that the block's only instruction crosses into, or [`Key::one_page`].
    pub(crate) second: u64,
    /// Decoding mode, access mode, vector level.
    pub(crate) mode: (u8, u8, u8),
}

/// [`Key::second`] of a block inside one page.
pub(crate) const ONE_PAGE: u64 = 1;

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // One word is enough: blocks that differ in the second page only are rare.
        let (decoding, access, vectors) = self.mode;
        state.write_u64(self.phys ^ u64::from(decoding) << 48 ^ u64::from(access) << 56 ^ u64::from(vectors) << 60);
    }
}

impl Key {
    /// [`Key::second`] of a block inside one page; `alone`: see [`crate::translate::SiteKind::Link`].
    pub(crate) fn one_page(alone: u8) -> u64 {
        ONE_PAGE | u64::from(alone) << 1
    }
}

/// A page whose code was overwritten this often is not translated any more.
const MAX_REWRITES: u32 = 200;

/// A translated block.
pub(crate) struct Block {
    pub(crate) key: Key,
    /// Arena offsets of the entries for looked-up and for direct branches.
    pub(crate) entry: u32,
    pub(crate) direct: u32,
    pub(crate) course: Course,
    pub(crate) landing: Option<Landing>,
}

impl Block {
    /// The key of the block that its landing leads to, and the landing's arena offset.
    fn landing(&self) -> Option<(Key, u32)> {
        // Versions where every access has its own check run less often.
        let landing = self.landing.filter(|_| self.key.second == ONE_PAGE)?;
        let phys = self.key.phys & !0xfff | u64::from(landing.offset);
        let mode = (self.key.mode.0, landing.access, self.key.mode.2);
        Some((Key { phys, second: ONE_PAGE, mode }, landing.entry))
    }
}

/// A fast hash for keys that nobody gains by making collide: guests only slow down themselves.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

struct Page {
    tag: CodeTag,
    blocks: Vec<u32>,
    rewrites: u32,
}

/// The blocks of one vCPU.
#[derive(Default)]
pub(crate) struct Blocks {
    by_key: Map<Key, u32>,
    list: Vec<Block>,
    /// Landings of calls, by the block that is behind the call.
    landings: Map<Key, u32>,
    pages: Map<u64, Page>,
    /// [`PageMap::code_epoch`] up to which writes were looked at.
    epoch: u32,
}

impl Blocks {
    pub(crate) fn find(&self, key: &Key) -> Option<(u32, &Block)> {
        let number = *self.by_key.get(key)?;
        Some((number, self.list.get(number as usize)?))
    }

    /// Arena offset of the entry that looked-up branches to the block are best led to.
    pub(crate) fn entry(&self, key: &Key) -> Option<u32> {
        let block = self.find(key)?.1;
        Some(self.landings.get(key).copied().unwrap_or(block.entry))
    }

    pub(crate) fn get(&self, number: u32) -> Option<&Block> {
        self.list.get(number as usize)
    }

    /// The block with an entry.
    pub(crate) fn at_entry(&self, entry: u32) -> Option<&Block> {
        let index = self.list.binary_search_by_key(&entry, |block| block.entry).ok()?;
        self.list.get(index)
    }

    /// The number of the next block.
    pub(crate) fn next(&self) -> u32 {
        self.list.len() as u32
    }

    /// Whether code may have been written since [`Blocks::stale`] looked.
    #[inline]
    pub(crate) fn is_behind(&self, pages: &PageMap) -> bool {
        self.epoch != pages.code_epoch()
    }

    /// Whether blocks of the page are worth translating.
    pub(crate) fn is_stable(&self, page: u64) -> bool {
        self.pages.get(&page).is_none_or(|page| page.rewrites < MAX_REWRITES)
    }

    /// Adds a block made from pages (address, tag).
    pub(crate) fn insert(&mut self, block: Block, pages: &[(u64, CodeTag)]) -> u32 {
        let number = self.next();
        self.by_key.insert(block.key, number);
        if let Some((key, entry)) = block.landing() {
            self.landings.insert(key, entry);
        }
        self.list.push(block);
        for &(address, tag) in pages {
            let page = self.pages.entry(address & !0xfff).or_insert(Page { tag, blocks: Vec::new(), rewrites: 0 });
            page.tag = tag;
            page.blocks.push(number);
        }
        number
    }

    /// Forgets the blocks of pages that were written; returns their entries, which must not be entered any more.
    pub(crate) fn stale(&mut self, pages: &PageMap) -> Vec<u32> {
        let until = pages.code_epoch();
        let mut written = Vec::new();
        if !pages.code_writes(self.epoch, until, |page| written.push(page)) {
            written = self.pages.keys().copied().collect();
        }
        self.epoch = until;
        let mut entries = Vec::new();
        for address in written {
            self.forget_page(address, pages, &mut entries);
        }
        entries
    }

    /// Forgets the blocks of one page if its tag is not current.
    fn forget_page(&mut self, address: u64, pages: &PageMap, entries: &mut Vec<u32>) {
        let Some(page) = self.pages.get_mut(&address) else { return };
        if page.blocks.is_empty() || pages.is_current(address, page.tag) {
            return;
        }
        page.rewrites += 1;
        for number in std::mem::take(&mut page.blocks) {
            let Some(block) = self.list.get(number as usize) else { continue };
            if self.by_key.get(&block.key) == Some(&number) {
                self.by_key.remove(&block.key);
            }
            entries.push(block.entry);
            if let Some((key, entry)) = block.landing() {
                self.landings.remove(&key);
                entries.push(entry);
            }
        }
    }

    /// Forgets everything but which pages were rewritten.
    pub(crate) fn clear(&mut self) {
        self.by_key.clear();
        self.landings.clear();
        self.list.clear();
        self.pages.retain(|_, page| {
            page.blocks = Vec::new();
            page.rewrites > 0
        });
    }
}
