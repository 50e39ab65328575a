//! Page tables (SDM vol. 3, chapter 4).

use platform::x86::{cr0, cr4};

use super::{Machine, at};

/// Bits of page-table entries.
pub mod pte {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
    /// A table, or a page for everybody.
    pub const ALL: u64 = P | W | U;
}

const PDPT: u64 = at::PAGES + 0x1000;
const PD: u64 = at::PAGES + 0x2000;
/// Page table of the first 2 MiB (PAE, long) or the first 4 MiB (32-bit), made by [`Machine::split`].
const PT: u64 = at::PAGES + 0x8000;

/// The three paging modes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Paging {
    Bits32,
    Pae,
    Long,
}

/// Maps the first 4 GiB one to one, by large pages that everybody may use.
pub(super) fn identity_long(machine: &Machine) {
    machine.put64(at::PAGES, PDPT | pte::ALL);
    identity_pae(machine, PDPT, pte::ALL);
}

fn identity_pae(machine: &Machine, pdpt: u64, flags: u64) {
    for i in 0..4 {
        machine.put64(pdpt + 8 * i, (PD + 0x1000 * i) | flags);
    }
    for i in 0..2048 {
        machine.put64(PD + 8 * i, i << 21 | pte::ALL | pte::PS);
    }
}

impl Machine {
    /// A machine in `paging` with the first 4 GiB mapped one to one, the pages of the first 2 MiB one by one. Of those, ring 3
    /// has [`at::USER_CODE`], its stack, [`at::DATA`] and everything from [`at::FREE`].
    pub fn paged(engine: vmm::EngineKind, paging: Paging) -> Self {
        if paging == Paging::Long {
            let mut machine = Self::long(engine);
            machine.split(paging);
            return machine;
        }
        let mut machine = Self::protected(engine);
        machine.state.cr0 |= cr0::PG | cr0::WP;
        if paging == Paging::Pae {
            machine.state.cr3 = PDPT;
            machine.state.cr4 = cr4::PAE;
            machine.state.efer = platform::x86::efer::NXE;
            identity_pae(&machine, PDPT, pte::P);
        } else {
            machine.state.cr3 = at::PAGES;
            machine.state.cr4 = cr4::PSE;
            for i in 0..1024u32 {
                machine.put32(at::PAGES + 4 * u64::from(i), i << 22 | (pte::ALL | pte::PS) as u32);
            }
        }
        machine.split(paging);
        machine
    }

    /// Replaces the first large page by a table of small ones: for ring 0, but for what ring 3 needs and what is free.
    fn split(&mut self, paging: Paging) {
        let user = [at::USER_CODE, at::USER_STACK & !0xfff, at::DATA];
        let flags = |page: u64| {
            let address = page << 12;
            if address >= at::FREE || user.contains(&address) { pte::ALL } else { pte::P | pte::W }
        };
        if paging == Paging::Bits32 {
            for i in 0..1024 {
                self.put32(PT + 4 * i, (i << 12 | flags(i)) as u32);
            }
            self.put32(at::PAGES, (PT | pte::ALL) as u32);
        } else {
            for i in 0..512 {
                self.put64(PT + 8 * i, i << 12 | flags(i));
            }
            self.put64(PD, PT | pte::ALL);
        }
    }

    /// Where the entry is that maps the small page of `linear` (below 2 MiB).
    pub fn entry_at(&self, paging: Paging, linear: u64) -> u64 {
        PT + (linear >> 12) * if paging == Paging::Bits32 { 4 } else { 8 }
    }

    /// Where the entry above is: that of the table of small pages.
    pub fn table_entry_at(&self, paging: Paging) -> u64 {
        if paging == Paging::Bits32 { at::PAGES } else { PD }
    }

    /// Writes an entry.
    pub fn set_entry(&self, paging: Paging, entry: u64, value: u64) {
        if paging == Paging::Bits32 { self.put32(entry, value as u32) } else { self.put64(entry, value) }
    }

    /// Reads an entry.
    pub fn entry(&self, paging: Paging, entry: u64) -> u64 {
        if paging == Paging::Bits32 { u64::from(self.get32(entry)) } else { self.get64(entry) }
    }

    /// Maps the small page of `linear` (below 2 MiB) to itself with `flags`.
    pub fn map_page(&self, paging: Paging, linear: u64, flags: u64) {
        self.set_entry(paging, self.entry_at(paging, linear), linear & !0xfff | flags);
    }
}
