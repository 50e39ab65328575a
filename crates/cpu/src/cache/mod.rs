//! Decoded blocks, found by guest-physical address and mode.
//!
//! A block is a run of instructions inside one page (its last instruction may reach into the next).
//! It is valid as long as its pages' code tags are current; a write to the page by anybody changes
//! the tag. In front of the map by physical address lies a small table by linear address, valid as
//! long as no translation was dropped.

use std::collections::HashMap;

use memory::{CodeTag, PageMap};

use crate::decode::{Mode, Op};

/// A decoded block.
pub(crate) struct Block {
    pub(crate) ops: Box<[Op]>,
    pub(crate) mode: Mode,
    /// Guest-physical address of the first byte, and its page's tag.
    phys: u64,
    tag: CodeTag,
    /// Guest-physical address inside the second page, if the last instruction reaches into it.
    second: Option<(u64, CodeTag)>,
    /// How often the interpreter ran it, up to the point where that no longer matters.
    runs: u16,
}

impl Block {
    pub(crate) fn new(ops: Vec<Op>, mode: Mode, phys: u64, tag: CodeTag, second: Option<(u64, CodeTag)>) -> Self {
        Self { ops: ops.into_boxed_slice(), mode, phys, tag, second, runs: 0 }
    }

    #[inline]
    fn is_current(&self, pages: &PageMap) -> bool {
        !self.ops.is_empty()
            && pages.is_current(self.phys, self.tag)
            && self.second.is_none_or(|(phys, tag)| pages.is_current(phys, tag))
    }
}

#[derive(Clone, Copy)]
struct Front {
    linear: u64,
    /// TLB generation and mode; never matches in an empty entry.
    context: u64,
    block: u32,
}

const FRONT_ENTRIES: usize = 4096;
/// More blocks than this are dropped all at once: about 100 MB at the usual size.
const MAX_BLOCKS: usize = 1 << 17;

/// The blocks of one vCPU.
pub(crate) struct BlockCache {
    front: Box<[Front]>,
    by_address: HashMap<(u64, u8), u32>,
    blocks: Vec<Block>,
}

impl BlockCache {
    pub(crate) fn new() -> Self {
        let empty = Front { linear: 0, context: u64::MAX, block: 0 };
        Self { front: vec![empty; FRONT_ENTRIES].into(), by_address: HashMap::new(), blocks: Vec::new() }
    }

    #[inline]
    fn index(linear: u64) -> usize {
        (linear ^ linear >> 12) as usize & (FRONT_ENTRIES - 1)
    }

    #[inline]
    fn context(generation: u64, mode: Mode) -> u64 {
        generation << 8 | u64::from(mode.key())
    }

    /// The valid block at a linear address whose translation has not changed since `remember`.
    #[inline]
    pub(crate) fn find_linear(&self, linear: u64, generation: u64, mode: Mode, pages: &PageMap) -> Option<u32> {
        let front = &self.front[Self::index(linear)];
        let hit = front.linear == linear && front.context == Self::context(generation, mode);
        (hit && self.blocks.get(front.block as usize)?.is_current(pages)).then_some(front.block)
    }

    /// Lets [`BlockCache::find_linear`] find `block`.
    #[inline]
    pub(crate) fn remember(&mut self, linear: u64, generation: u64, mode: Mode, block: u32) {
        self.front[Self::index(linear)] = Front { linear, context: Self::context(generation, mode), block };
    }

    /// The valid block at a physical address. A block whose second page is `second` only counts while it is that page that
    /// follows in linear space.
    pub(crate) fn find(
        &self,
        phys: u64,
        mode: Mode,
        pages: &PageMap,
        second: impl FnOnce() -> Option<u64>,
    ) -> Option<u32> {
        let index = *self.by_address.get(&(phys, mode.key()))?;
        let block = self.blocks.get(index as usize)?;
        if !block.is_current(pages) {
            return None;
        }
        match block.second {
            Some((expected, _)) if second() != Some(expected) => None,
            _ => Some(index),
        }
    }

    /// Adds a block, in place of a stale one at the same address. Must not be called while a block is taken out.
    pub(crate) fn insert(&mut self, block: Block) -> u32 {
        let key = (block.phys, block.mode.key());
        if let Some(&index) = self.by_address.get(&key)
            && let Some(slot) = self.blocks.get_mut(index as usize)
        {
            *slot = block;
            return index;
        }
        if self.blocks.len() >= MAX_BLOCKS {
            *self = Self::new();
        }
        let index = self.blocks.len() as u32;
        self.by_address.insert(key, index);
        self.blocks.push(block);
        index
    }

    /// Counts a run; whether it is the one that makes the block hot. Asks again after as many runs.
    #[inline]
    pub(crate) fn heat(&mut self, block: u32, threshold: u16) -> bool {
        let Some(block) = self.blocks.get_mut(block as usize) else { return false };
        block.runs += 1;
        let hot = block.runs >= threshold;
        if hot {
            block.runs = 0;
        }
        hot
    }

    /// Takes the operations out of a block, to run them while the vCPU is borrowed; give them back with [`BlockCache::put_back`].
    #[inline]
    pub(crate) fn take_ops(&mut self, block: u32) -> Box<[Op]> {
        self.blocks.get_mut(block as usize).map(|block| std::mem::take(&mut block.ops)).unwrap_or_default()
    }

    /// Frees the operations of a block, which is not found any more.
    pub(crate) fn forget(&mut self, block: u32) {
        drop(self.take_ops(block));
    }

    /// Gives operations back.
    #[inline]
    pub(crate) fn put_back(&mut self, block: u32, ops: Box<[Op]>) {
        if let Some(slot) = self.blocks.get_mut(block as usize) {
            slot.ops = ops;
        }
    }
}
