//! The translation look-aside buffer: direct-mapped, one table per kind of permission.
//!
//! An entry carries one tag per kind of access; a tag equals the page's linear address exactly when
//! that access is allowed in the table's mode *and* needs no side effect (dirty bit, code tracking,
//! MMIO, breakpoint). So permission, presence and address are one compare on the fast path.

use crate::jit::table::Tables;

/// Entries per table.
const ENTRIES: usize = 512;
/// A tag that no page address equals.
const INVALID: u64 = 1;

/// Which permissions apply; selects the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum AccessMode {
    /// CPL 0–2 with SMAP enforced.
    Supervisor = 0,
    /// CPL 3.
    User = 1,
    /// CPL 0–2, SMAP off or RFLAGS.AC set.
    SupervisorAc = 2,
    /// CPL 3 with alignment checking: never filled, so that every access takes the slow path.
    UserAligned = 3,
}

/// One page's translation.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) read: u64,
    pub(crate) write: u64,
    pub(crate) exec: u64,
    /// Host address of the page minus its linear address, wrapping.
    pub(crate) addend: u64,
    /// Guest-physical address of the page.
    pub(crate) phys: u64,
    pub(crate) global: bool,
    /// The write tag is missing only because the page was untouched: see [`memory::PageMap::is_untouched`].
    pub(crate) untouched: bool,
    /// The write tag is missing only because the interpreter ran for comparison when the entry was made.
    pub(crate) checked: bool,
}

const EMPTY: Entry = Entry {
    read: INVALID,
    write: INVALID,
    exec: INVALID,
    addend: 0,
    phys: u64::MAX,
    global: false,
    untouched: false,
    checked: false,
};

/// Number of the bit that stands for a large page.
fn large_bit(linear: u64, shift: u32) -> usize {
    let page = linear >> shift;
    (page ^ page >> 12 ^ u64::from(shift) << 4) as usize & 0xfff
}

type Tables4 = Box<[[Entry; ENTRIES]; 4]>;

/// Table and entry of a number in a list of filled slots.
fn place(slot: u16) -> (usize, usize) {
    ((usize::from(slot) / ENTRIES) & 3, usize::from(slot) % ENTRIES)
}

/// Which guest-physical pages may have an entry that allows writes, by a hash: most pages that become code have none, and
/// need no search.
struct Writable(Box<[u64; 1024]>);

impl Writable {
    fn place(phys: u64) -> (usize, u64) {
        let page = phys >> 12;
        let bit = page ^ page >> 16;
        ((bit >> 6) as usize & 1023, 1 << (bit & 63))
    }
    fn insert(&mut self, phys: u64) {
        let (word, bit) = Self::place(phys);
        self.0[word] |= bit;
    }
    fn contains(&self, phys: u64) -> bool {
        let (word, bit) = Self::place(phys);
        self.0[word] & bit != 0
    }
    fn clear(&mut self) {
        self.0.fill(0);
    }
}

/// The tables of one vCPU.
pub(crate) struct Tlb {
    entries: Tables4,
    mode: AccessMode,
    /// Counts flushes; whatever was derived from a translation is valid while this stands still.
    generation: u64,
    /// Entries were filled since the last flush of the kind (all, or all but global ones).
    filled: bool,
    /// A bit for every large page that an entry stems from, by a hash of its address: INVLPG cannot find all its pieces.
    large: Box<[u64; 64]>,
    /// Slots (table, entry) filled since the last flush.
    slots: Vec<u16>,
    /// Covers all entries, those of emitted code, too.
    writable: Writable,
    /// The tables of emitted code, filled and flushed together with these.
    tables: Option<Tables>,
    /// Another set of entries, and the generation it belongs to; see [`Tlb::exchange`].
    spare: Option<(Tables4, Vec<u16>, u64)>,
    exchanged: bool,
    /// How often everything, everything but global pages, and single pages were dropped.
    pub(crate) flushes: [u64; 3],
}

impl Tlb {
    /// Offset of the mode in force, one byte, for emitted code.
    pub(crate) const MODE: usize = std::mem::offset_of!(Self, mode);

    pub(crate) fn new() -> Self {
        let entries = vec![[EMPTY; ENTRIES]; 4].try_into().unwrap_or_else(|_| unreachable!("four tables"));
        Self {
            entries,
            mode: AccessMode::SupervisorAc,
            generation: 0,
            filled: false,
            large: Box::new([0; 64]),
            slots: Vec::new(),
            writable: Writable(Box::new([0; 1024])),
            tables: None,
            spare: None,
            exchanged: false,
            flushes: [0; 3],
        }
    }

    /// The mode in force.
    #[inline]
    pub(crate) fn mode(&self) -> AccessMode {
        self.mode
    }

    /// Chooses the mode from the privilege level and whether SMAP is out of force. Alignment checking is added by
    /// [`Tlb::force_mode`].
    #[inline]
    pub(crate) fn set_mode(&mut self, user: bool, smap_off: bool) {
        self.mode = match (user, smap_off) {
            (true, _) => AccessMode::User,
            (false, false) => AccessMode::Supervisor,
            (false, true) => AccessMode::SupervisorAc,
        };
    }

    /// Sets the mode; returns the one before.
    #[inline]
    pub(crate) fn force_mode(&mut self, mode: AccessMode) -> AccessMode {
        std::mem::replace(&mut self.mode, mode)
    }

    /// Counts flushes.
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// The entry in which the page of `linear` would be, in the current mode.
    #[inline(always)]
    pub(crate) fn slot(&self, linear: u64) -> &Entry {
        &self.entries[self.mode as usize & 3][(linear >> 12) as usize & (ENTRIES - 1)]
    }

    /// Fills an entry in the current mode.
    pub(crate) fn fill(&mut self, linear: u64, entry: Entry, shift: u32) {
        if self.mode == AccessMode::UserAligned {
            return;
        }
        self.filled = true;
        if shift > 12 {
            let bit = large_bit(linear, shift);
            self.large[bit / 64] |= 1 << (bit % 64);
        }
        let slot = (self.mode as usize & 3) * ENTRIES + ((linear >> 12) as usize & (ENTRIES - 1));
        let target = &mut self.entries[slot / ENTRIES][slot % ENTRIES];
        if target.phys == u64::MAX {
            self.slots.push(slot as u16);
        }
        *target = entry;
        if entry.write != INVALID || entry.untouched {
            self.writable.insert(entry.phys);
        }
        self.mirror(linear);
    }

    /// Drops everything.
    pub(crate) fn flush_all(&mut self) {
        self.flushes[0] += 1;
        self.generation += 1;
        self.writable.clear();
        if self.filled {
            for slot in self.slots.drain(..) {
                self.entries[place(slot).0][place(slot).1] = EMPTY;
            }
            self.filled = false;
            self.large.fill(0);
        }
        if let Some(tables) = self.tables.as_mut() {
            tables.flush_all();
        }
    }

    /// Drops everything but global pages (MOV to CR3).
    pub(crate) fn flush_non_global(&mut self) {
        self.drop_non_global();
        if let Some(tables) = self.tables.as_mut() {
            tables.flush_non_global();
        }
    }

    /// Goes over to another process-context identifier (SDM vol. 3, 4.10.4.1); `keep`: its translations need not be dropped.
    /// Emitted code finds those of both again.
    pub(crate) fn switch_space(&mut self, from: u16, to: u16, keep: bool) {
        self.drop_non_global();
        if let Some(tables) = self.tables.as_mut() {
            tables.switch_space(from, to, keep);
        }
    }

    fn drop_non_global(&mut self) {
        self.flushes[1] += 1;
        self.generation += 1;
        if self.filled {
            let entries = &mut self.entries;
            self.slots.retain(|&slot| {
                let entry = &mut entries[place(slot).0][place(slot).1];
                if !entry.global {
                    *entry = EMPTY;
                }
                entry.phys != u64::MAX
            });
        }
    }

    /// Drops the page of `linear` (INVLPG).
    pub(crate) fn flush_page(&mut self, linear: u64) {
        self.flushes[2] += 1;
        let maybe_large = [21, 22, 30].into_iter().any(|shift| {
            let bit = large_bit(linear, shift);
            self.large[bit / 64] >> (bit % 64) & 1 != 0
        });
        if maybe_large {
            return self.flush_all();
        }
        self.generation += 1;
        let index = (linear >> 12) as usize & (ENTRIES - 1);
        // The slots stay in the list of those filled, so that each is in it once.
        self.entries.iter_mut().for_each(|table| table[index] = Entry { phys: table[index].phys, ..EMPTY });
        if let Some(tables) = self.tables.as_mut() {
            tables.flush_page(linear);
        }
    }

    /// Takes away the fast write permission of every entry that maps guest-physical page `phys`, because the page
    /// holds code from now on.
    pub(crate) fn protect_code(&mut self, phys: u64) {
        if !self.writable.contains(phys) {
            return;
        }
        // Whoever searches finds out what is still there.
        self.writable.clear();
        let spare = self.spare.as_mut().map(|(entries, slots, _)| (entries, &*slots));
        for (entries, slots) in [Some((&mut self.entries, &self.slots)), spare].into_iter().flatten() {
            for &slot in slots {
                let entry = &mut entries[place(slot).0][place(slot).1];
                if entry.phys == phys {
                    entry.write = INVALID;
                    entry.untouched = false;
                } else if entry.write != INVALID || entry.untouched {
                    self.writable.insert(entry.phys);
                }
            }
        }
        if let Some(tables) = self.tables.as_mut() {
            let writable = &mut self.writable;
            tables.protect_code(phys, |phys| writable.insert(phys));
        }
    }

    /// Takes away every fast write permission; the next write to each page looks again.
    pub(crate) fn flush_writes(&mut self) {
        self.writable.clear();
        for &slot in &self.slots {
            let entry = &mut self.entries[place(slot).0][place(slot).1];
            entry.write = INVALID;
            entry.untouched = false;
        }
        if let Some(tables) = self.tables.as_mut() {
            tables.flush_writes();
        }
    }

    /// Changes over to another set of entries, and back: the interpreter uses its own when it runs for comparison, where no
    /// entry allows writes. Emitted code sees neither its fills nor the change.
    pub(crate) fn exchange(&mut self) {
        let generation = self.generation;
        let (entries, slots, made) = self.spare.get_or_insert_with(|| {
            let entries = vec![[EMPTY; ENTRIES]; 4].try_into().unwrap_or_else(|_| unreachable!("four tables"));
            (entries, Vec::new(), generation)
        });
        if !self.exchanged && std::mem::replace(made, generation) != generation {
            for slot in slots.drain(..) {
                entries[place(slot).0][place(slot).1] = EMPTY;
            }
        }
        std::mem::swap(entries, &mut self.entries);
        std::mem::swap(slots, &mut self.slots);
        self.exchanged ^= true;
    }

    /// Attaches or detaches the tables of emitted code.
    pub(crate) fn set_tables(&mut self, tables: Option<Tables>) {
        self.tables = tables;
    }

    /// The tables of emitted code.
    #[inline]
    pub(crate) fn tables(&self) -> Option<&Tables> {
        self.tables.as_ref()
    }

    /// Gives emitted code the entry of the page of `linear`, if there is one.
    #[inline]
    pub(crate) fn mirror(&mut self, linear: u64) {
        if self.exchanged {
            return;
        }
        let mode = self.mode as usize & 3;
        let entry = &self.entries[mode][(linear >> 12) as usize & (ENTRIES - 1)];
        let page = linear & !0xfff;
        let rights = (entry.read == page, entry.write == page);
        if let (Some(tables), true) = (self.tables.as_mut(), rights.0 | rights.1) {
            tables.fill(mode, linear, rights, entry.addend, entry.phys, entry.global);
        }
    }

    /// Lets emitted code find `code` for a branch to `rip`; `crossing`: it depends on the next page, too.
    pub(crate) fn remember_jump(&mut self, cache: usize, rip: u64, code: u64, global: bool, crossing: bool) {
        if let Some(tables) = self.tables.as_mut() {
            tables.remember_jump(cache, rip, code, global);
            if crossing {
                tables.watch_page(rip.wrapping_add(0x1000));
            }
        }
    }

    /// Makes emitted code look up `rip` anew.
    pub(crate) fn forget_jump(&mut self, cache: usize, rip: u64) {
        if let Some(tables) = self.tables.as_mut() {
            tables.forget(cache, rip);
        }
    }

    /// Makes emitted code look up every branch anew.
    pub(crate) fn forget_jumps(&mut self) {
        if let Some(tables) = self.tables.as_mut() {
            tables.forget_jumps();
        }
    }

    /// The tag that allows an access to the page of `linear`, or one that never does.
    pub(crate) fn tag(linear: u64, allowed: bool) -> u64 {
        if allowed { linear & !0xfff } else { INVALID }
    }
}
