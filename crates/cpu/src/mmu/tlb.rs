//! The translation look-aside buffer: direct-mapped, one table per kind of permission.
//!
//! An entry carries one tag per kind of access; a tag equals the page's linear address exactly when
//! that access is allowed in the table's mode *and* needs no side effect (dirty bit, code tracking,
//! MMIO, breakpoint). So permission, presence and address are one compare on the fast path.

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
}

const EMPTY: Entry = Entry { read: INVALID, write: INVALID, exec: INVALID, addend: 0, phys: u64::MAX, global: false };

/// The tables of one vCPU.
pub(crate) struct Tlb {
    entries: Box<[[Entry; ENTRIES]; 4]>,
    mode: AccessMode,
    /// Counts flushes; whatever was derived from a translation is valid while this stands still.
    generation: u64,
    /// Entries were filled since the last flush of the kind (all, or all but global ones).
    filled: bool,
    /// An entry stems from a large page, so that INVLPG cannot find all its pieces by address.
    large: bool,
}

impl Tlb {
    pub(crate) fn new() -> Self {
        let entries = vec![[EMPTY; ENTRIES]; 4].try_into().unwrap_or_else(|_| unreachable!("four tables"));
        Self { entries, mode: AccessMode::SupervisorAc, generation: 0, filled: false, large: false }
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
    pub(crate) fn fill(&mut self, linear: u64, entry: Entry, large: bool) {
        if self.mode == AccessMode::UserAligned {
            return;
        }
        self.filled = true;
        self.large |= large;
        self.entries[self.mode as usize & 3][(linear >> 12) as usize & (ENTRIES - 1)] = entry;
    }

    /// Drops everything.
    pub(crate) fn flush_all(&mut self) {
        self.generation += 1;
        if self.filled {
            self.entries.iter_mut().for_each(|table| table.fill(EMPTY));
            self.filled = false;
            self.large = false;
        }
    }

    /// Drops everything but global pages (MOV to CR3).
    pub(crate) fn flush_non_global(&mut self) {
        self.generation += 1;
        if self.filled {
            for entry in self.entries.iter_mut().flatten().filter(|entry| !entry.global) {
                *entry = EMPTY;
            }
        }
    }

    /// Drops the page of `linear` (INVLPG).
    pub(crate) fn flush_page(&mut self, linear: u64) {
        if self.large {
            return self.flush_all();
        }
        self.generation += 1;
        let index = (linear >> 12) as usize & (ENTRIES - 1);
        self.entries.iter_mut().for_each(|table| table[index] = EMPTY);
    }

    /// Takes away the fast write permission of every entry that maps guest-physical page `phys`, because the page
    /// holds code from now on.
    pub(crate) fn protect_code(&mut self, phys: u64) {
        for entry in self.entries.iter_mut().flatten().filter(|entry| entry.phys == phys) {
            entry.write = INVALID;
        }
    }

    /// Takes away every fast write permission; the next write to each page looks again.
    pub(crate) fn flush_writes(&mut self) {
        self.entries.iter_mut().flatten().for_each(|entry| entry.write = INVALID);
    }

    /// The tag that allows an access to the page of `linear`, or one that never does.
    pub(crate) fn tag(linear: u64, allowed: bool) -> u64 {
        if allowed { linear & !0xfff } else { INVALID }
    }
}
