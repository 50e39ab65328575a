//! Page walks (SDM vol. 3, chapter 4): 32-bit, PAE and 4-level paging, with permissions, accessed and
//! dirty bits, reserved-bit checks and the page-fault error code.

use platform::x86::{cr0, cr4, efer};

use super::Access;
use super::tlb::AccessMode;
use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

/// Bits of the page-fault error code.
mod code {
    pub(super) const PRESENT: u16 = 1 << 0;
    pub(super) const WRITE: u16 = 1 << 1;
    pub(super) const USER: u16 = 1 << 2;
    pub(super) const RESERVED: u16 = 1 << 3;
    pub(super) const FETCH: u16 = 1 << 4;
}

const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;
/// Physical-address bits of an 8-byte entry, before the implemented width is applied.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The outcome of a walk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Translation {
    /// Guest-physical address of the byte.
    pub(crate) phys: u64,
    /// The access mode may read the page without more ado.
    pub(crate) readable: bool,
    /// The access mode may write the page, and its dirty bit is set already.
    pub(crate) writable: bool,
    /// The access mode may fetch from the page.
    pub(crate) executable: bool,
    pub(crate) global: bool,
    /// Bits of the offset in the page: more than 12 for a large page.
    pub(crate) shift: u32,
}

/// Entries met on the way, to set their accessed bits once the access is known to be allowed.
#[derive(Default)]
struct Path {
    entries: [(u64, u64); 4],
    depth: usize,
}

impl Path {
    fn push(&mut self, address: u64, value: u64) {
        self.entries[self.depth & 3] = (address, value);
        self.depth += 1;
    }
}

/// What the levels add up to.
struct Leaf {
    phys: u64,
    /// AND of the R/W and U/S bits; OR of the NX bits.
    rights: u64,
    shift: u32,
}

impl Vcpu {
    /// Translates `linear` for an access in the current access mode, sets accessed and dirty bits.
    ///
    /// # Errors
    /// A page fault, with `fault_address` set; #GP(0) for a non-canonical address.
    pub(crate) fn translate(&mut self, linear: u64, access: Access) -> Step<Translation> {
        if !self.paging() {
            let phys = linear & 0xffff_ffff;
            return Ok(Translation {
                phys,
                readable: true,
                writable: true,
                executable: true,
                global: false,
                shift: 12,
            });
        }
        self.counters.page_walks += 1;
        loop {
            let mut path = Path::default();
            let leaf = if self.long_mode() {
                if !is_canonical(linear) {
                    return Err(Trap::gp(0));
                }
                self.walk_long(linear, access, &mut path)?
            } else if self.cr4 & cr4::PAE != 0 {
                self.walk_pae(linear, access, &mut path)?
            } else {
                self.walk_32(linear, access, &mut path)?
            };
            let allowed = self.rights(leaf.rights);
            let ok = match access {
                Access::Read => allowed.0,
                Access::Write => allowed.1,
                Access::Execute => allowed.2,
            };
            if !ok {
                return Err(self.page_fault(linear, access, code::PRESENT));
            }
            let Some(dirty) = self.set_accessed(&path, access == Access::Write) else { continue };
            let leaf_entry = path.entries[(path.depth - 1) & 3].1;
            return Ok(Translation {
                phys: leaf.phys,
                readable: allowed.0,
                writable: allowed.1 && dirty,
                executable: allowed.2,
                global: leaf_entry & G != 0 && self.cr4 & cr4::PGE != 0,
                shift: leaf.shift,
            });
        }
    }

    /// Translates without side effects and without permission checks, for debuggers.
    pub fn translate_quietly(&mut self, linear: u64) -> Option<u64> {
        let saved = self.fault_address;
        let mut path = Path::default();
        let leaf = if !self.paging() {
            return Some(linear & 0xffff_ffff);
        } else if self.long_mode() {
            if is_canonical(linear) { self.walk_long(linear, Access::Read, &mut path) } else { Err(Trap::gp(0)) }
        } else if self.cr4 & cr4::PAE != 0 {
            self.walk_pae(linear, Access::Read, &mut path)
        } else {
            self.walk_32(linear, Access::Read, &mut path)
        };
        self.fault_address = saved;
        leaf.ok().map(|leaf| leaf.phys)
    }

    /// (read, write, execute) permissions of the current access mode for the accumulated rights.
    fn rights(&self, rights: u64) -> (bool, bool, bool) {
        let user_page = rights & US != 0;
        let executable = rights & NX == 0;
        match self.tlb.mode() {
            AccessMode::User | AccessMode::UserAligned => {
                (user_page, user_page && rights & RW != 0, user_page && executable)
            }
            mode => {
                let data = !user_page || mode == AccessMode::SupervisorAc;
                let write = data && (rights & RW != 0 || self.cr0 & cr0::WP == 0);
                (data, write, executable && !(user_page && self.cr4 & cr4::SMEP != 0))
            }
        }
    }

    /// Sets the accessed bits along the path, and the leaf's dirty bit for a write. `None` if an entry has changed
    /// meanwhile, so that the walk must be repeated. Otherwise whether the leaf's dirty bit is set.
    fn set_accessed(&mut self, path: &Path, write: bool) -> Option<bool> {
        let last = path.depth - 1;
        for (i, &(address, value)) in path.entries.iter().enumerate().take(path.depth) {
            let want = if i == last && write { A | D } else { A };
            if value & want != want && !self.update_entry(address, value, value | want) {
                return None;
            }
        }
        Some(write || path.entries[last & 3].1 & D != 0)
    }

    fn walk_long(&mut self, linear: u64, access: Access, path: &mut Path) -> Step<Leaf> {
        let mut table = self.cr3 & ADDRESS;
        let mut rights = RW | US;
        for level in (0..4).rev() {
            let shift = 12 + 9 * level;
            let entry = self.entry64(table + ((linear >> shift) & 511) * 8, path);
            let large = entry & PS != 0 && (level == 1 || level == 2);
            self.check_entry64(linear, access, entry, level, large)?;
            rights = combine(rights, entry);
            if level == 0 || large {
                let offset = linear & ((1 << shift) - 1);
                return Ok(Leaf { phys: entry & ADDRESS & !((1 << shift) - 1) | offset, rights, shift });
            }
            table = entry & ADDRESS;
        }
        unreachable!("level 0 always ends the walk")
    }

    fn walk_pae(&mut self, linear: u64, access: Access, path: &mut Path) -> Step<Leaf> {
        let pdpte = self.pdptes[(linear >> 30) as usize & 3];
        if pdpte & P == 0 {
            return Err(self.page_fault(linear, access, 0));
        }
        let pde = self.entry64((pdpte & ADDRESS) + ((linear >> 21) & 511) * 8, path);
        let large = pde & PS != 0;
        self.check_entry64(linear, access, pde, 1, large)?;
        let rights = combine(RW | US, pde);
        if large {
            return Ok(Leaf { phys: pde & ADDRESS & !0x1f_ffff | linear & 0x1f_ffff, rights, shift: 21 });
        }
        let pte = self.entry64((pde & ADDRESS) + ((linear >> 12) & 511) * 8, path);
        self.check_entry64(linear, access, pte, 0, false)?;
        Ok(Leaf { phys: pte & ADDRESS | linear & 0xfff, rights: combine(rights, pte), shift: 12 })
    }

    fn walk_32(&mut self, linear: u64, access: Access, path: &mut Path) -> Step<Leaf> {
        let pde = self.entry32((self.cr3 & 0xffff_f000) + ((linear >> 22) & 1023) * 4, path);
        if pde & P == 0 {
            return Err(self.page_fault(linear, access, 0));
        }
        let rights = combine(RW | US, pde);
        if pde & PS != 0 && self.cr4 & cr4::PSE != 0 {
            // PSE-36: bits 20:13 are address bits 39:32; bit 21 is reserved.
            if pde & 1 << 21 != 0 {
                return Err(self.page_fault(linear, access, code::PRESENT | code::RESERVED));
            }
            let phys = pde & 0xffc0_0000 | (pde >> 13 & 0xff) << 32 | linear & 0x3f_ffff;
            return Ok(Leaf { phys, rights, shift: 22 });
        }
        let pte = self.entry32((pde & 0xffff_f000) + ((linear >> 12) & 1023) * 4, path);
        if pte & P == 0 {
            return Err(self.page_fault(linear, access, 0));
        }
        Ok(Leaf { phys: pte & 0xffff_f000 | linear & 0xfff, rights: combine(rights, pte), shift: 12 })
    }

    fn entry64(&mut self, address: u64, path: &mut Path) -> u64 {
        let value = self.read_entry(address, 8);
        path.push(address, value);
        value
    }

    fn entry32(&mut self, address: u64, path: &mut Path) -> u64 {
        let value = self.read_entry(address, 4);
        // Marks the width for update_entry: 4-byte entries are kept with an odd address.
        path.push(address | 1, value);
        value
    }

    fn read_entry(&self, address: u64, size: u8) -> u64 {
        let value =
            if size == 8 { self.memory.read_u64(address) } else { self.memory.read_u32(address).map(u64::from) };
        value.unwrap_or_else(|_| self.env.mmio_read(address, size))
    }

    /// Replaces an entry atomically if it still has the value seen. Entries outside RAM keep no accessed bits.
    fn update_entry(&mut self, address: u64, seen: u64, new: u64) -> bool {
        let (gpa, size) = if address & 1 != 0 { (address & !1, 4) } else { (address, 8) };
        super::access::exchange_entry(&self.memory, gpa, size, seen, new)
    }

    fn check_entry64(&mut self, linear: u64, access: Access, entry: u64, level: u32, large: bool) -> Step {
        if entry & P == 0 {
            return Err(self.page_fault(linear, access, 0));
        }
        let mut reserved = ADDRESS & !((1u64 << self.features.physical_bits) - 1);
        if self.efer & efer::NXE == 0 {
            reserved |= NX;
        }
        if !self.long_mode() {
            // PAE: bits 62:52 are reserved (SDM table 4-9 ff.).
            reserved |= 0x7ff << 52;
        }
        if large {
            reserved |= ((1u64 << (12 + 9 * level)) - 1) & !0x1fff;
        } else if level == 3 {
            reserved |= PS;
        }
        if entry & reserved != 0 {
            return Err(self.page_fault(linear, access, code::PRESENT | code::RESERVED));
        }
        Ok(())
    }

    /// The page fault of an access, with its address noted.
    #[cold]
    fn page_fault(&mut self, linear: u64, access: Access, mut error: u16) -> Trap {
        self.fault_address = linear;
        if access == Access::Write {
            error |= code::WRITE;
        }
        if matches!(self.tlb.mode(), AccessMode::User | AccessMode::UserAligned) {
            error |= code::USER;
        }
        let reports_fetch = self.efer & efer::NXE != 0 && (self.cr4 & cr4::PAE != 0) || self.cr4 & cr4::SMEP != 0;
        if access == Access::Execute && reports_fetch {
            error |= code::FETCH;
        }
        Trap::fault_code(vector::PF, error)
    }
}

/// Whether bits 63:47 are all equal.
#[inline]
pub(crate) fn is_canonical(linear: u64) -> bool {
    ((linear << 16) as i64 >> 16) as u64 == linear
}

fn combine(rights: u64, entry: u64) -> u64 {
    (rights & entry & (RW | US)) | ((rights | entry) & NX)
}
