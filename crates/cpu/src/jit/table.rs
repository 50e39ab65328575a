//! The tables that emitted code looks into: translations of pages, and host code of branch targets.
#![allow(unsafe_code)]

use std::ptr;

use rustix::mm::{MapFlags, ProtFlags};

use super::context::{Context, ENTRIES, JUMP_CACHES, MODES, SIZE, STACK, table};
use super::quiet::{self, Quiet};

/// Properties of an entry, below the page address in `info`.
const GLOBAL: u64 = 1 << 0;
/// The entry is in the list of entries that are not global, or global.
const LISTED: [u64; 2] = [1 << 1, 1 << 2];
/// The host's large pages.
const LARGE_PAGE: usize = 2 << 20;
/// Bytes mapped, so that [`SIZE`] of them can be aligned.
const MAPPED: usize = SIZE + LARGE_PAGE;
/// Slots at the beginning and the end whose empty entries are not just zero: from an address in one of them a displacement may
/// lead into page 0.
const EDGE: usize = 3;
/// A negated page address of a slot in the middle: no access by an address of the first or the last slots matches it, not even
/// with its end in the next page.
const NOWHERE: u64 = ((ENTRIES as u64 / 2) << 12).wrapping_neg();

/// The context block with its tables, and what is needed to flush them in proportion to what was filled.
pub(crate) struct Tables {
    memory: *mut u8,
    /// What was mapped around it.
    mapped: *mut u8,
    /// Guest-physical page and properties of each TLB entry.
    info: Box<[u64]>,
    /// TLB entries filled since they were flushed: not global, global.
    filled: [Vec<u32>; 2],
    jump_info: Box<[u8]>,
    jumps: [Vec<u32>; 2],
    /// A bit per hashed page number: the page may have entries in a jump cache.
    jump_pages: Box<[u64; 64]>,
    /// What address spaces out of force had, the last used at the end.
    spaces: Vec<Space>,
    /// Entries filled, for statistics.
    pub(crate) fills: u64,
}

/// Entries of an address space that is not in force, in the lower half of the addresses and not global.
#[derive(Default)]
struct Space {
    /// Its process-context identifier (SDM vol. 3, 4.10.1).
    id: u16,
    pages: Vec<Page>,
    /// Jump cache, RIP, host code.
    jumps: Vec<(u8, u64, u64)>,
}

/// A page's translation.
struct Page {
    mode: u8,
    linear: u64,
    writable: bool,
    addend: u64,
    phys: u64,
}

/// Address spaces that are remembered; Linux uses 6.
const MAX_SPACES: usize = 8;
/// Addresses from here on belong to the upper half.
const UPPER_HALF: u64 = 1 << 63;

// SAFETY: the allocation is the tables' own; the vCPU that owns them moves between threads as a whole.
unsafe impl Send for Tables {}

impl Tables {
    /// Allocates empty tables, with a view of `events`.
    ///
    /// # Errors
    /// The kernel's, from mapping memory.
    pub(crate) fn new(events: &Quiet) -> Result<Self, rustix::io::Errno> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                MAPPED,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let mapped: *mut u8 = mapped.cast();
        let memory = mapped.wrapping_add((mapped as usize).wrapping_neg() % LARGE_PAGE);
        // Almost every guest access looks in here: the host's TLB should have it. Not having large pages is no failure.
        // Those of the last mode and of other than 64-bit code are not worth the memory.
        let busiest = STACK + table::read(MODES - 1) as usize;
        // SAFETY: the advice changes no contents, and the range lies in the mapping.
        let _ = unsafe { rustix::mm::madvise(memory.cast(), busiest, rustix::mm::Advice::LinuxHugepage) };
        let mut tables = Self {
            memory,
            mapped,
            info: vec![0; MODES * ENTRIES].into(),
            filled: Default::default(),
            jump_info: vec![0; JUMP_CACHES * ENTRIES].into(),
            jumps: Default::default(),
            jump_pages: Box::new([0; 64]),
            spaces: Vec::new(),
            fills: 0,
        };
        // SAFETY: a page of the new mapping that nothing else uses.
        unsafe { events.map_at(tables.memory.wrapping_add(SIZE - quiet::PAGE)) }?;
        for mode in 0..MODES {
            (0..EDGE).chain(ENTRIES - EDGE..ENTRIES).for_each(|index| tables.invalidate(mode, index));
        }
        for cache in 0..JUMP_CACHES {
            tables.set(table::jumps(cache), 0, 1);
        }
        Ok(tables)
    }

    /// The context block.
    pub(crate) fn context(&self) -> *mut Context {
        self.memory.wrapping_add(STACK).cast()
    }

    fn word(&self, offset: i32, index: usize) -> *mut u64 {
        debug_assert!(offset >= 0 && STACK + offset as usize + index * 8 < SIZE);
        self.memory.wrapping_add(STACK + offset as usize + index * 8).cast()
    }
    fn get(&self, offset: i32, index: usize) -> u64 {
        // SAFETY: the callers take offsets from `table` and indices below its size: inside the allocation.
        unsafe { self.word(offset, index).read() }
    }
    fn set(&mut self, offset: i32, index: usize, value: u64) {
        // SAFETY: as for `get`.
        unsafe { self.word(offset, index).write(value) }
    }

    fn index(linear: u64) -> usize {
        (linear >> 12) as usize & (ENTRIES - 1)
    }

    /// A page address that an access to slot `index` never matches: zero but for the slots around page 0.
    fn nowhere(index: usize) -> u64 {
        if (EDGE..ENTRIES - EDGE).contains(&index) { 0 } else { NOWHERE }
    }

    fn invalidate(&mut self, mode: usize, index: usize) {
        self.set(table::read(mode), index, Self::nowhere(index));
        self.set(table::write(mode), index, Self::nowhere(index));
    }

    /// Fills the entry of the page of `linear`. `addend` is host address minus linear address.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn fill(
        &mut self,
        mode: usize,
        linear: u64,
        (read, write): (bool, bool),
        addend: u64,
        phys: u64,
        global: bool,
    ) {
        if mode >= MODES {
            return;
        }
        self.fills += 1;
        let index = Self::index(linear);
        let tag = (linear & !0xfff).wrapping_neg();
        let choose = |allowed| if allowed { tag } else { Self::nowhere(index) };
        self.set(table::read(mode), index, choose(read));
        self.set(table::write(mode), index, choose(write));
        self.set(table::addend(mode), index, addend);
        let slot = mode * ENTRIES + index;
        let list = usize::from(global);
        let mut info = self.info[slot] & (LISTED[0] | LISTED[1]);
        if info & LISTED[list] == 0 {
            info |= LISTED[list];
            self.filled[list].push(slot as u32);
        }
        self.info[slot] = info | (phys & !0xfff) | if global { GLOBAL } else { 0 };
    }

    /// Drops everything, of all address spaces.
    pub(crate) fn flush_all(&mut self) {
        self.spaces.clear();
        for list in 0..2 {
            let mut filled = std::mem::take(&mut self.filled[list]);
            for slot in filled.drain(..) {
                self.info[slot as usize] = 0;
                self.invalidate(slot as usize / ENTRIES, slot as usize % ENTRIES);
            }
            self.filled[list] = filled;
        }
        self.forget_jumps();
    }

    /// Drops what is not global.
    pub(crate) fn flush_non_global(&mut self) {
        self.take_non_global(None);
    }

    /// Goes over from one address space to another; `keep`: what was known of the other one is still valid.
    pub(crate) fn switch_space(&mut self, from: u16, to: u16, keep: bool) {
        let mut space = self.take_space(from).emptied();
        self.take_non_global(Some(&mut space));
        let known = self.take_space(to);
        if from != to {
            self.spaces.push(space);
        }
        if keep && from != to {
            for page in &known.pages {
                let rights = (true, page.writable);
                self.fill(page.mode.into(), page.linear, rights, page.addend, page.phys, false);
            }
            for &(cache, rip, code) in &known.jumps {
                self.remember_jump(cache.into(), rip, code, false);
            }
        }
    }

    /// What is remembered of an address space, which is forgotten; or that of the one that was not used for the longest time, to
    /// be filled anew.
    fn take_space(&mut self, id: u16) -> Space {
        match self.spaces.iter().position(|space| space.id == id) {
            Some(found) => self.spaces.remove(found),
            None if self.spaces.len() >= MAX_SPACES => Space { id, ..self.spaces.remove(0) }.emptied(),
            None => Space { id, ..Space::default() },
        }
    }

    /// Drops what is not global; what of it can be remembered goes to `space`.
    fn take_non_global(&mut self, mut space: Option<&mut Space>) {
        let mut filled = std::mem::take(&mut self.filled[0]);
        for slot in filled.drain(..) {
            let slot = slot as usize;
            self.info[slot] &= !LISTED[0];
            if self.info[slot] & GLOBAL == 0 {
                if let Some(space) = space.as_deref_mut() {
                    space.pages.extend(self.page(slot));
                }
                self.invalidate(slot / ENTRIES, slot % ENTRIES);
            }
        }
        self.filled[0] = filled;
        let mut jumps = std::mem::take(&mut self.jumps[0]);
        for slot in jumps.drain(..) {
            let slot = slot as usize;
            self.jump_info[slot] &= !(LISTED[0] as u8);
            if self.jump_info[slot] & GLOBAL as u8 == 0 {
                if let Some(space) = space.as_deref_mut() {
                    space.jumps.extend(self.jump(slot));
                }
                self.forget_jump(slot);
            }
        }
        self.jumps[0] = jumps;
    }

    /// The content of a TLB entry of the lower half that can be read.
    fn page(&self, slot: usize) -> Option<Page> {
        let (mode, index) = (slot / ENTRIES, slot % ENTRIES);
        let (read, write) = (self.get(table::read(mode), index), self.get(table::write(mode), index));
        let linear = read.wrapping_neg();
        let phys = self.info[slot] & !0xfff;
        let addend = self.get(table::addend(mode), index);
        let valid = read != Self::nowhere(index) && linear < UPPER_HALF;
        valid.then_some(Page { mode: mode as u8, linear, writable: write == read, addend, phys })
    }

    /// The content of an entry of a jump cache of the lower half.
    fn jump(&self, slot: usize) -> Option<(u8, u64, u64)> {
        let (cache, index) = (slot / ENTRIES, slot % ENTRIES);
        let rip = self.get(table::jumps(cache), 2 * index).wrapping_neg();
        let code = self.get(table::jumps(cache), 2 * index + 1);
        let valid = rip as usize & (ENTRIES - 1) == index && rip < UPPER_HALF && code != 0;
        valid.then_some((cache as u8, rip, code))
    }

    /// Drops the page of `linear`.
    pub(crate) fn flush_page(&mut self, linear: u64) {
        let index = Self::index(linear);
        (0..MODES).for_each(|mode| self.invalidate(mode, index));
        let page = Self::page_bit(linear);
        if self.jump_pages[page / 64] >> (page % 64) & 1 != 0 {
            self.forget_jumps();
        }
    }

    /// Takes away the write permission of entries that map guest-physical page `phys`; tells `others` the pages of the other
    /// entries that allow writes.
    pub(crate) fn protect_code(&mut self, phys: u64, mut others: impl FnMut(u64)) {
        for page in self.spaces.iter_mut().flat_map(|space| &mut space.pages).filter(|page| page.writable) {
            if page.phys == phys & !0xfff {
                page.writable = false;
            } else {
                others(page.phys);
            }
        }
        for list in 0..2 {
            for i in 0..self.filled[list].len() {
                let slot = self.filled[list][i] as usize;
                let (offset, index) = (table::write(slot / ENTRIES), slot % ENTRIES);
                let page = self.info[slot] & !0xfff;
                if page == phys & !0xfff {
                    self.set(offset, index, Self::nowhere(index));
                } else if self.get(offset, index) != Self::nowhere(index) {
                    others(page);
                }
            }
        }
    }

    /// Takes away every write permission.
    pub(crate) fn flush_writes(&mut self) {
        self.spaces.iter_mut().flat_map(|space| &mut space.pages).for_each(|page| page.writable = false);
        for list in 0..2 {
            for i in 0..self.filled[list].len() {
                let slot = self.filled[list][i] as usize;
                self.set(table::write(slot / ENTRIES), slot % ENTRIES, Self::nowhere(slot % ENTRIES));
            }
        }
    }

    fn page_bit(linear: u64) -> usize {
        let page = linear >> 12;
        (page ^ page >> 12) as usize & 0xfff
    }

    /// The host code for `rip`, or 0.
    pub(crate) fn find_jump(&self, cache: usize, rip: u64) -> u64 {
        if cache >= JUMP_CACHES {
            return 0;
        }
        let index = rip as usize & (ENTRIES - 1);
        let found = self.get(table::jumps(cache), 2 * index).wrapping_add(rip) == 0;
        if found { self.get(table::jumps(cache), 2 * index + 1) } else { 0 }
    }

    /// Lets emitted code find host code for `rip`.
    pub(crate) fn remember_jump(&mut self, cache: usize, rip: u64, code: u64, global: bool) {
        if cache >= JUMP_CACHES {
            return;
        }
        let index = rip as usize & (ENTRIES - 1);
        self.set(table::jumps(cache), 2 * index, rip.wrapping_neg());
        self.set(table::jumps(cache), 2 * index + 1, code);
        self.watch_page(rip);
        let slot = cache * ENTRIES + index;
        let list = usize::from(global);
        let mut info = self.jump_info[slot] & !(GLOBAL as u8);
        if info & LISTED[list] as u8 == 0 {
            info |= LISTED[list] as u8;
            self.jumps[list].push(slot as u32);
        }
        self.jump_info[slot] = info | u8::from(global);
    }

    /// Drops the entry for `rip`.
    pub(crate) fn forget(&mut self, cache: usize, rip: u64) {
        if self.find_jump(cache, rip) != 0 {
            self.forget_jump(cache * ENTRIES + (rip as usize & (ENTRIES - 1)));
        }
    }

    /// Makes [`Tables::flush_page`] of this page empty the jump caches.
    pub(crate) fn watch_page(&mut self, linear: u64) {
        let page = Self::page_bit(linear);
        self.jump_pages[page / 64] |= 1 << (page % 64);
    }

    fn forget_jump(&mut self, slot: usize) {
        let index = slot % ENTRIES;
        // Address 0 would match slot 0; 1 is the negated address -1, which is not in slot 0.
        self.set(table::jumps(slot / ENTRIES), 2 * index, u64::from(index == 0));
    }

    /// Empties the jump caches.
    pub(crate) fn forget_jumps(&mut self) {
        self.spaces.iter_mut().for_each(|space| space.jumps.clear());
        for list in 0..2 {
            let mut jumps = std::mem::take(&mut self.jumps[list]);
            for slot in jumps.drain(..) {
                self.jump_info[slot as usize] = 0;
                self.forget_jump(slot as usize);
            }
            self.jumps[list] = jumps;
        }
        self.jump_pages.fill(0);
    }
}

impl Space {
    fn emptied(mut self) -> Self {
        self.pages.clear();
        self.jumps.clear();
        self
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        // SAFETY: the mapping is the tables' own.
        let _ = unsafe { rustix::mm::munmap(self.mapped.cast(), MAPPED) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(tables: &Tables, mode: usize, linear: u64, size: u64, offset: fn(usize) -> i32) -> bool {
        let tag = tables.get(offset(mode), Tables::index(linear));
        tag.wrapping_add(linear).wrapping_add(size - 1) < 4096
    }

    #[test]
    fn an_empty_table_matches_nothing() {
        let tables = Tables::new(&Quiet::new().unwrap()).unwrap();
        for linear in [0, 1, 0xfff, 0xffff_ffff_ffff_fffd, 0xffff_ffff_ffff_f000, 0xfff_fffe, 0x1000_0000, 0x5000] {
            assert!(!hits(&tables, 0, linear, 8, table::read), "{linear:#x}");
        }
    }

    #[test]
    fn address_spaces_are_remembered() {
        let mut tables = Tables::new(&Quiet::new().unwrap()).unwrap();
        let writable = |tables: &Tables, linear| hits(tables, 1, linear, 8, table::write);
        let readable = |tables: &Tables, linear| hits(tables, 1, linear, 8, table::read);
        let fill = |tables: &mut Tables| {
            tables.fill(1, 0x1000, (true, true), 5, 0x9000, false);
            tables.fill(1, 0x2000, (true, true), 5, 0xa000, false);
            tables.fill(1, 0xffff_8000_0000_5000, (true, true), 5, 0xb000, false);
            tables.remember_jump(1, 0x1004, 77, false);
        };
        fill(&mut tables);
        tables.switch_space(3, 4, true);
        assert!(!readable(&tables, 0x1000) && tables.find_jump(1, 0x1004) == 0);
        let mut others = Vec::new();
        tables.protect_code(0x9000, |page| others.push(page));
        assert_eq!(others, [0xa000]);
        tables.switch_space(4, 3, true);
        assert!(readable(&tables, 0x1000) && !writable(&tables, 0x1000) && writable(&tables, 0x2000));
        assert!(!readable(&tables, 0xffff_8000_0000_5000), "the upper half belongs to all");
        assert_eq!(tables.find_jump(1, 0x1004), 77);
        // Without being asked to keep them; after a flush of everything; and with the jump caches emptied.
        tables.switch_space(3, 4, true);
        tables.switch_space(4, 3, false);
        assert!(!readable(&tables, 0x1000) && tables.find_jump(1, 0x1004) == 0);
        fill(&mut tables);
        tables.switch_space(3, 4, true);
        tables.flush_all();
        tables.switch_space(4, 3, true);
        assert!(!readable(&tables, 0x1000));
        fill(&mut tables);
        tables.switch_space(3, 4, true);
        tables.flush_writes();
        tables.forget_jumps();
        tables.switch_space(4, 3, true);
        assert!(readable(&tables, 0x1000) && !writable(&tables, 0x1000) && tables.find_jump(1, 0x1004) == 0);
        // A space that loads itself again; and more spaces than are remembered.
        tables.switch_space(3, 3, true);
        assert!(!readable(&tables, 0x1000));
        fill(&mut tables);
        (4..4 + 2 * MAX_SPACES as u16).for_each(|id| tables.switch_space(id - 1, id, true));
        tables.switch_space(3 + 2 * MAX_SPACES as u16, 3, true);
        assert!(!readable(&tables, 0x1000) && tables.spaces.len() <= MAX_SPACES);
    }

    #[test]
    fn flushes_drop_what_they_should() {
        let mut tables = Tables::new(&Quiet::new().unwrap()).unwrap();
        tables.fill(0, 0x1000, (true, true), 5, 0x9000, false);
        tables.fill(0, 0xffff_8000_0000_2000, (true, false), 5, 0xa000, true);
        tables.remember_jump(0, 0x1004, 77, false);
        tables.remember_jump(0, 0xffff_8000_0000_2000, 78, true);
        assert!(hits(&tables, 0, 0x1ff8, 8, table::write) && !hits(&tables, 0, 0x1ff9, 8, table::write));
        assert!(!hits(&tables, 0, 0xffff_8000_0000_2000, 1, table::write));
        assert!(!hits(&tables, 1, 0x1ff8, 8, table::read), "another mode");
        tables.protect_code(0x9123, |_| ());
        assert!(!hits(&tables, 0, 0x1000, 1, table::write) && hits(&tables, 0, 0x1000, 1, table::read));
        tables.flush_non_global();
        assert!(!hits(&tables, 0, 0x1000, 1, table::read));
        assert!(hits(&tables, 0, 0xffff_8000_0000_2000, 8, table::read));
        assert_eq!((tables.find_jump(0, 0x1004), tables.find_jump(0, 0xffff_8000_0000_2000)), (0, 78));
        tables.flush_page(0xffff_8000_0000_2abc);
        assert!(!hits(&tables, 0, 0xffff_8000_0000_2000, 8, table::read));
        assert_eq!(tables.find_jump(0, 0xffff_8000_0000_2000), 0);
        assert_eq!(tables.find_jump(0, 0), 0);
    }
}
