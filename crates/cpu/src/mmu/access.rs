//! Memory access of instructions: a TLB hit is a compare and a host access; everything else (misses,
//! page crossings, MMIO, code pages, breakpoints, alignment checks) takes the slow path.
#![allow(unsafe_code)]

use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memory::GuestMemory;

use super::Access;
use super::tlb::{AccessMode, Entry, Tlb};
use super::walk::is_canonical;
use crate::interp::fpu::FpuState;
use crate::state::attention;
use crate::state::int::Int;
use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

/// Replaces a page-table entry atomically if it still has the value `seen`. Outside RAM there is nothing to replace.
pub(super) fn exchange_entry(memory: &GuestMemory, gpa: u64, size: u64, seen: u64, new: u64) -> bool {
    let Ok(at) = memory.host_address(gpa, size) else { return true };
    let done = if size == 8 {
        // SAFETY: host_address checked the range; page-table entries are naturally aligned (callers mask addresses).
        unsafe { AtomicU64::from_ptr(at.cast()) }
            .compare_exchange(seen, new, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    } else {
        // SAFETY: as above.
        let entry = unsafe { AtomicU32::from_ptr(at.cast()) };
        entry.compare_exchange(seen as u32, new as u32, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    };
    memory.pages().note_write(gpa, size);
    done
}

impl Vcpu {
    /// Loads a `T` from a linear address, with the permissions of the current access mode.
    #[inline(always)]
    pub(crate) fn load<T: Int>(&mut self, linear: u64) -> Step<T> {
        let entry = self.tlb.slot(linear);
        if entry.read == linear & !0xfff && linear & 0xfff <= 0x1000 - T::BYTES {
            // SAFETY: a read tag is only set for a page of RAM whose host address is addend + linear; the access stays in it.
            return Ok(unsafe { ptr::read_unaligned(entry.addend.wrapping_add(linear) as *const T) });
        }
        self.load_slow(linear, T::BYTES).map(T::from_u64)
    }

    /// Loads a `T` that the instruction will store back: the page must be writable (SDM: read-modify-write faults as a write).
    #[inline(always)]
    pub(crate) fn load_for_store<T: Int>(&mut self, linear: u64) -> Step<T> {
        let entry = self.tlb.slot(linear);
        if entry.write == linear & !0xfff && linear & 0xfff <= 0x1000 - T::BYTES {
            // SAFETY: as for `load`.
            return Ok(unsafe { ptr::read_unaligned(entry.addend.wrapping_add(linear) as *const T) });
        }
        self.check_write(linear, T::BYTES)?;
        self.load_slow(linear, T::BYTES).map(T::from_u64)
    }

    /// Stores a `T` to a linear address.
    #[inline(always)]
    pub(crate) fn store<T: Int>(&mut self, linear: u64, value: T) -> Step {
        let entry = self.tlb.slot(linear);
        if entry.write == linear & !0xfff && linear & 0xfff <= 0x1000 - T::BYTES {
            // SAFETY: a write tag is only set for a page of RAM whose host address is addend + linear; the access stays in it.
            unsafe { ptr::write_unaligned(entry.addend.wrapping_add(linear) as *mut T, value) };
            return Ok(());
        }
        self.store_slow(linear, T::BYTES, value.to_u64())
    }

    /// Loads `N` bytes (at most 64) to the start of a field of the vector state. Alignment checking (#AC) covers scalars only.
    #[inline(always)]
    pub(crate) fn load_block<const N: usize>(
        &mut self,
        linear: u64,
        field: impl Fn(&mut FpuState) -> &mut [u8; 64],
    ) -> Step {
        let entry = self.tlb.slot(linear);
        if entry.read == linear & !0xfff && linear & 0xfff <= 0x1000 - N as u64 {
            let from = entry.addend.wrapping_add(linear) as *const [u8; N];
            // SAFETY: as for `load`; guest memory and the state do not overlap.
            field(&mut self.fpu)[..N].copy_from_slice(&unsafe { ptr::read_unaligned(from) });
            return Ok(());
        }
        let mut bytes = [0; 64];
        self.load_block_slow(linear, &mut bytes[..N])?;
        field(&mut self.fpu)[..N].copy_from_slice(&bytes[..N]);
        Ok(())
    }

    /// Stores `N` bytes.
    #[inline(always)]
    pub(crate) fn store_block<const N: usize>(&mut self, linear: u64, bytes: &[u8; N]) -> Step {
        let entry = self.tlb.slot(linear);
        if entry.write == linear & !0xfff && linear & 0xfff <= 0x1000 - N as u64 {
            // SAFETY: as for `store`.
            unsafe { ptr::write_unaligned(entry.addend.wrapping_add(linear) as *mut [u8; N], *bytes) };
            return Ok(());
        }
        self.store_block_slow(linear, bytes)
    }

    #[cold]
    fn load_block_slow(&mut self, linear: u64, bytes: &mut [u8]) -> Step {
        self.check_scalar_alignment(linear, bytes.len() as u64)?;
        self.read_bytes(linear, bytes)
    }

    #[cold]
    fn store_block_slow(&mut self, linear: u64, bytes: &[u8]) -> Step {
        self.check_scalar_alignment(linear, bytes.len() as u64)?;
        self.write_bytes(linear, bytes)
    }

    /// Makes sure that `size` bytes (at most a page) could be written, without writing and whatever their alignment.
    pub(crate) fn probe_write(&mut self, linear: u64, size: u64) -> Step {
        let second = self.second_piece(linear, size as usize)?;
        self.resolve(linear, Access::Write)?;
        if let Some((second, _)) = second {
            self.resolve(second, Access::Write)?;
        }
        Ok(())
    }

    fn check_scalar_alignment(&mut self, linear: u64, size: u64) -> Step {
        if matches!(size, 2 | 4 | 8) { self.check_alignment(linear, size) } else { Ok(()) }
    }

    /// Loads consecutive quadwords: stack frames, 16-byte gates.
    #[inline(always)]
    pub(crate) fn load_words<const N: usize>(&mut self, linear: u64) -> Step<[u64; N]> {
        let entry = self.tlb.slot(linear);
        if entry.read == linear & !0xfff && linear & 0xfff <= 0x1000 - 8 * N as u64 {
            // SAFETY: as for `load`.
            return Ok(unsafe { ptr::read_unaligned(entry.addend.wrapping_add(linear) as *const [u64; N]) });
        }
        self.load_words_slow(linear)
    }

    #[cold]
    fn load_words_slow<const N: usize>(&mut self, linear: u64) -> Step<[u64; N]> {
        self.check_alignment(linear, 8)?;
        let mut words = [0; N];
        let mut at = linear;
        for word in &mut words {
            let mut bytes = [0; 8];
            self.read_bytes(at, &mut bytes)?;
            *word = u64::from_le_bytes(bytes);
            at = at.wrapping_add(8);
        }
        Ok(words)
    }

    /// Stores consecutive quadwords, the first at the lowest address.
    #[inline(always)]
    pub(crate) fn store_words<const N: usize>(&mut self, linear: u64, words: [u64; N]) -> Step {
        let entry = self.tlb.slot(linear);
        if entry.write == linear & !0xfff && linear & 0xfff <= 0x1000 - 8 * N as u64 {
            // SAFETY: as for `store`.
            unsafe { ptr::write_unaligned(entry.addend.wrapping_add(linear) as *mut [u64; N], words) };
            return Ok(());
        }
        self.store_words_slow(linear, &words)
    }

    /// From the last to the first, as pushes do, so that a fault has the address that a push would have.
    #[cold]
    fn store_words_slow(&mut self, linear: u64, words: &[u64]) -> Step {
        self.check_alignment(linear, 8)?;
        for (i, word) in words.iter().enumerate().rev() {
            let at = linear.wrapping_add(8 * i as u64);
            self.write_bytes(at, &word.to_le_bytes())?;
        }
        Ok(())
    }

    #[cold]
    fn load_slow(&mut self, linear: u64, size: u64) -> Step<u64> {
        let mut bytes = [0; 8];
        self.check_alignment(linear, size)?;
        self.read_bytes(linear, &mut bytes[..size as usize])?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[cold]
    fn store_slow(&mut self, linear: u64, size: u64, value: u64) -> Step {
        self.check_alignment(linear, size)?;
        self.write_bytes(linear, &value.to_le_bytes()[..size as usize])
    }

    /// Whether misaligned accesses raise #AC.
    pub(crate) fn checks_alignment(&self) -> bool {
        self.tlb.mode() == AccessMode::UserAligned
    }

    fn check_alignment(&mut self, linear: u64, size: u64) -> Step {
        if self.checks_alignment() && linear & (size - 1) != 0 {
            // The end of the segment, and of the canonical addresses, comes first.
            self.second_piece(linear, size as usize)?;
            if self.in_64bit() && !(is_canonical(linear) && is_canonical(linear.wrapping_add(size - 1))) {
                return Err(Trap::gp(0));
            }
            return Err(Trap::fault_code(vector::AC, 0));
        }
        Ok(())
    }

    /// Reads bytes from linear addresses; any length, may cross pages. Nothing is read if a page faults.
    pub(crate) fn read_bytes(&mut self, linear: u64, bytes: &mut [u8]) -> Step {
        let second = self.second_piece(linear, bytes.len())?;
        let split = second.map_or(bytes.len(), |(_, split)| split);
        let first = self.resolve(linear, Access::Read)?;
        if let Some((second, _)) = second {
            let second = self.resolve(second, Access::Read)?;
            self.read_physical(second, &mut bytes[split..]);
        }
        self.read_physical(first, &mut bytes[..split]);
        self.note_data_access(linear, bytes.len() as u64, false);
        Ok(())
    }

    /// Writes bytes to linear addresses; at most a page long, may cross one page boundary. Nothing is written if a page faults.
    pub(crate) fn write_bytes(&mut self, linear: u64, bytes: &[u8]) -> Step {
        let second = self.second_piece(linear, bytes.len())?;
        let split = second.map_or(bytes.len(), |(_, split)| split);
        let first = self.resolve(linear, Access::Write)?;
        if let Some((second, _)) = second {
            let second = self.resolve(second, Access::Write)?;
            self.write_physical(second, &bytes[split..]);
        }
        self.write_physical(first, &bytes[..split]);
        self.note_data_access(linear, bytes.len() as u64, true);
        Ok(())
    }

    /// Makes sure that `size` bytes could be written, without writing.
    pub(crate) fn check_write(&mut self, linear: u64, size: u64) -> Step {
        self.check_alignment(linear, size)?;
        self.probe_write(linear, size)
    }

    /// Where an access of `len` bytes goes on in the next page, and after how many bytes.
    ///
    /// # Errors
    /// #GP(0) if it reaches over the end of a flat 4 GiB segment. Addresses in segments with a base wrap around instead.
    fn second_piece(&self, linear: u64, len: usize) -> Step<Option<(u64, usize)>> {
        let split = first_piece(linear, len);
        if split == len {
            return Ok(None);
        }
        let next = linear.wrapping_add(split as u64);
        if self.in_64bit() || next <= 0xffff_ffff {
            return Ok(Some((next, split)));
        }
        if self.mode.is_flat() { Err(Trap::gp(0)) } else { Ok(Some((next & 0xffff_ffff, split))) }
    }

    /// Guest-physical address of a linear one, filling the TLB.
    pub(crate) fn resolve(&mut self, linear: u64, access: Access) -> Step<u64> {
        let entry = self.tlb.slot(linear);
        let tag = match access {
            Access::Read => entry.read,
            Access::Write => entry.write,
            Access::Execute => entry.exec,
        };
        let slow_write = access == Access::Write && (self.is_untouched(linear) || self.is_checked(linear));
        if tag == linear & !0xfff || slow_write {
            return Ok(entry.phys | linear & 0xfff);
        }
        let found = self.translate(linear, access)?;
        let page = found.phys & !0xfff;
        let watched = self.watches_page(linear);
        if self.memory.is_readable(page, 0x1000) {
            let pages = self.memory.pages();
            // Writes to read-only memory go to the chip behind it.
            let ram = self.memory.is_ram(page, 0x1000);
            let writable = ram && found.writable && !watched && !pages.holds_code(page);
            let checked = writable && self.check.is_some();
            let writable = writable && !checked;
            // Not yet: so that zeroes, of which guests write many to memory that they never use, need no host memory.
            let untouched = writable && pages.is_untouched(page);
            let entry = Entry {
                read: Tlb::tag(linear, found.readable && !watched),
                write: Tlb::tag(linear, writable && !untouched),
                exec: Tlb::tag(linear, found.executable),
                addend: (self.memory.base() as u64).wrapping_add(page).wrapping_sub(linear & !0xfff),
                phys: page,
                global: found.global,
                untouched,
                checked,
            };
            self.tlb.fill(linear, entry, found.shift);
        }
        Ok(found.phys)
    }

    fn read_physical(&mut self, gpa: u64, bytes: &mut [u8]) {
        if self.memory.read(gpa, bytes).is_ok() {
            return;
        }
        if self.refuses_bus_access() {
            return;
        }
        for (offset, len) in bus_pieces(gpa, bytes.len()) {
            self.fpu.park();
            let value = self.env.mmio_read(gpa + offset as u64, len as u8);
            bytes[offset..offset + len].copy_from_slice(&value.to_le_bytes()[..len]);
        }
    }

    /// Whether the page of a linear address may be written, as the TLB knows, and still holds the zeroes of the start.
    fn is_untouched(&self, linear: u64) -> bool {
        let entry = self.tlb.slot(linear);
        entry.untouched && entry.read == linear & !0xfff && self.memory.pages().is_untouched(entry.phys)
    }

    /// Whether the page of a linear address may be written, as the TLB knows, by an interpreter that runs for comparison.
    fn is_checked(&self, linear: u64) -> bool {
        let entry = self.tlb.slot(linear);
        self.check.is_some() && entry.checked && entry.read == linear & !0xfff
    }

    fn write_physical(&mut self, gpa: u64, bytes: &[u8]) {
        self.note_checked_write(gpa, bytes.len() as u64);
        if self.memory.pages().is_untouched(gpa) && bytes.iter().all(|byte| *byte == 0) {
            return;
        }
        // One store per aligned scalar, so that other vCPUs never see half of it.
        if let Ok(at) = self.memory.host_address(gpa, bytes.len() as u64) {
            match bytes.len() {
                // SAFETY: host_address checked the range; unaligned raw writes of plain integers.
                2 => unsafe { ptr::write_unaligned(at.cast(), u16::from_le_bytes([bytes[0], bytes[1]])) },
                // SAFETY: as above.
                4 => unsafe { ptr::copy_nonoverlapping(bytes.as_ptr().cast::<[u8; 4]>(), at.cast(), 1) },
                // SAFETY: as above.
                8 => unsafe { ptr::copy_nonoverlapping(bytes.as_ptr().cast::<[u8; 8]>(), at.cast(), 1) },
                // SAFETY: as above.
                n => unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), at, n) },
            }
            if self.memory.pages().note_write(gpa, bytes.len() as u64) {
                self.code_was_written();
            }
            return;
        }
        if self.refuses_bus_access() {
            return;
        }
        for (offset, len) in bus_pieces(gpa, bytes.len()) {
            let mut value = [0; 8];
            value[..len].copy_from_slice(&bytes[offset..offset + len]);
            self.fpu.park();
            self.env.mmio_write(gpa + offset as u64, len as u8, u64::from_le_bytes(value));
        }
        self.follow_rom();
    }

    /// Drops translations if a flash chip has hidden or shown its contents.
    pub(crate) fn follow_rom(&mut self) {
        let epoch = self.memory.rom_epoch();
        if std::mem::replace(&mut self.rom_epoch, epoch) != epoch {
            self.tlb.flush_all();
        }
    }

    /// After a write to code: the rest of the block may just have been overwritten, and what other vCPUs run.
    #[cold]
    fn code_was_written(&mut self) {
        self.block_end = 0;
        self.shared.code_written(&self.events);
    }

    /// Atomic read-modify-write for LOCK-prefixed instructions: `update` maps the old value to the new one and may run
    /// several times. Returns the old value.
    pub(crate) fn locked_update<T: Int>(&mut self, linear: u64, mut update: impl FnMut(T) -> T) -> Step<T> {
        self.check_write(linear, T::BYTES)?;
        let gpa = self.resolve(linear, Access::Write)?;
        let in_page = linear & 0xfff <= 0x1000 - T::BYTES;
        let Ok(at) =
            self.memory.host_address(gpa, T::BYTES).map_err(|_| ()).and_then(|at| in_page.then_some(at).ok_or(()))
        else {
            // MMIO or a split lock: one at a time under the VM's bus lock.
            let shared = self.shared.clone();
            let _guard = shared.bus_lock();
            let old = self.load_for_store::<T>(linear)?;
            self.store(linear, update(old))?;
            return Ok(old);
        };
        self.note_checked_write(gpa, T::BYTES);
        // SAFETY: host_address checked the range.
        let old = unsafe { atomic::update::<T>(at, &mut update) };
        if self.memory.pages().note_write(gpa, T::BYTES) {
            self.code_was_written();
        }
        self.note_data_access(linear, T::BYTES, true);
        Ok(old)
    }

    /// CMPXCHG16B: replaces 16 aligned bytes if they equal `expected`; returns the old value.
    pub(crate) fn locked_exchange_16(&mut self, linear: u64, expected: u128, new: u128) -> Step<u128> {
        self.check_write(linear, 16)?;
        let gpa = self.resolve(linear, Access::Write)?;
        let Ok(at) = self.memory.host_address(gpa, 16) else {
            return self.bus_exchange_16(linear, expected, new);
        };
        self.note_checked_write(gpa, 16);
        // SAFETY: host_address checked the range, and callers check the alignment.
        let old = unsafe { atomic::exchange_16(at, expected, new) };
        if self.memory.pages().note_write(gpa, 16) {
            self.code_was_written();
        }
        self.note_data_access(linear, 16, true);
        Ok(old)
    }

    /// As [`Vcpu::locked_exchange_16`], on devices.
    #[cold]
    fn bus_exchange_16(&mut self, linear: u64, expected: u128, new: u128) -> Step<u128> {
        let shared = self.shared.clone();
        let _guard = shared.bus_lock();
        let mut bytes = [0; 16];
        self.read_bytes(linear, &mut bytes)?;
        let old = u128::from_le_bytes(bytes);
        // The bus sees a write whether the values are equal or not.
        let value = if old == expected { new } else { old };
        self.write_bytes(linear, &value.to_le_bytes())?;
        Ok(old)
    }

    /// Copies up to `len` bytes forward between linear addresses, as far as both pages reach and are plain RAM. Returns the
    /// number of bytes copied: 0 where the copy needs care (MMIO, code, breakpoints, overlap that repeats a pattern).
    pub(crate) fn copy_in_pages(&mut self, to: u64, from: u64, len: u64) -> Step<u64> {
        // Which of the two faults first, the single element knows, which may reach into the next page.
        let Ok(_) = self.resolve(from, Access::Read) else { return Ok(0) };
        // Both may have the same place in the TLB.
        let source = *self.tlb.slot(from);
        let Ok(gpa) = self.resolve(to, Access::Write) else { return Ok(0) };
        if self.is_untouched(to) {
            // What is copied is hardly all zeroes.
            self.memory.pages().note_write(gpa, 1);
            self.resolve(to, Access::Write)?;
        }
        let target = *self.tlb.slot(to);
        if source.read != from & !0xfff || target.write != to & !0xfff {
            return Ok(0);
        }
        let len = len.min(0x1000 - (from & 0xfff)).min(0x1000 - (to & 0xfff)) & !7;
        let (from, to) = (source.addend.wrapping_add(from), target.addend.wrapping_add(to));
        // A destination shortly behind the source must see the bytes just copied.
        if to.wrapping_sub(from) < len {
            return Ok(0);
        }
        // SAFETY: both tags prove pages of RAM at these host addresses, and `len` ends in both pages; `copy` allows overlap.
        unsafe { ptr::copy(from as *const u8, to as *mut u8, len as usize) };
        Ok(len)
    }

    /// Stores up to `count` copies of `value` from a linear address, as far as its page reaches and is plain RAM.
    /// Returns the number stored.
    pub(crate) fn fill_in_page<T: Int>(&mut self, to: u64, value: T, count: u64) -> Step<u64> {
        self.resolve(to, Access::Write)?;
        let target = *self.tlb.slot(to);
        let count = count.min((0x1000 - (to & 0xfff)) / T::BYTES);
        if target.write != to & !0xfff {
            let left_out = value.to_u64() == 0 && self.is_untouched(to);
            return Ok(if left_out { count } else { 0 });
        }
        let at = target.addend.wrapping_add(to) as *mut T;
        for i in 0..count as usize {
            // SAFETY: the tag proves a page of RAM at this host address, and `count` elements end in it.
            unsafe { ptr::write_unaligned(at.add(i), value) };
        }
        Ok(count)
    }

    /// Whether DR7 watches data in the page of `linear`.
    fn watches_page(&self, linear: u64) -> bool {
        self.dr7 & 0xff != 0 && (0..4).any(|i| self.watches_data(i) && (self.dr[i] ^ linear) & !0xfff == 0)
    }

    fn watches_data(&self, i: usize) -> bool {
        self.dr7 >> (2 * i) & 3 != 0 && self.dr7 >> (16 + 4 * i) & 1 != 0
    }

    /// Notes a data breakpoint hit (SDM vol. 3, 17.2.5); the trap is raised after the instruction.
    fn note_data_access(&mut self, linear: u64, size: u64, write: bool) {
        if self.dr7 & 0xff == 0 {
            return;
        }
        for i in 0..4 {
            let kind = self.dr7 >> (16 + 4 * i) & 3;
            let len = [1, 2, 8, 4][(self.dr7 >> (18 + 4 * i) & 3) as usize];
            let base = self.dr[i] & !(len - 1);
            let overlaps = linear < base.wrapping_add(len) && base < linear.wrapping_add(size);
            if self.watches_data(i) && overlaps && (kind == 3 || kind == 1 && write) {
                self.pending_dr6 |= 1 << i;
                self.attention |= attention::DEBUG_TRAP;
                self.block_end = 0;
            }
        }
    }
}

/// How many of `len` bytes from `linear` lie in its page.
fn first_piece(linear: u64, len: usize) -> usize {
    len.min(0x1000 - (linear & 0xfff) as usize)
}

/// Cuts an access into naturally aligned pieces of 1, 2, 4 or 8 bytes: (offset, length). An access that is itself a
/// scalar stays whole, as on the bus of a PC.
fn bus_pieces(gpa: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let left = len - offset;
        if left == 0 {
            return None;
        }
        let piece = if offset == 0 && matches!(len, 1 | 2 | 4 | 8) {
            len
        } else {
            let aligned = 1 << (gpa + offset as u64).trailing_zeros().min(3);
            let fits = 1 << left.ilog2().min(3);
            usize::min(aligned, fits)
        };
        offset += piece;
        Some((offset - piece, piece))
    })
}

/// Host atomics on guest memory of any alignment.
mod atomic {
    use crate::state::int::Int;

    /// Compare-and-swap loop on `T` at `at`.
    ///
    /// # Safety
    /// `at` points to `T::BYTES` bytes of mapped RAM.
    pub(super) unsafe fn update<T: Int>(at: *mut u8, update: &mut impl FnMut(T) -> T) -> T {
        // SAFETY: the caller's promise.
        let mut seen = unsafe { std::ptr::read_unaligned(at.cast::<T>()) };
        loop {
            let new = update(seen);
            // SAFETY: the caller's promise.
            let found = unsafe { compare_exchange(at, seen.to_u64(), new.to_u64(), T::BYTES) };
            let found = T::from_u64(found);
            if found == seen {
                return seen;
            }
            seen = found;
        }
    }

    #[cfg(target_arch = "x86_64")]
    unsafe fn compare_exchange(at: *mut u8, seen: u64, new: u64, size: u64) -> u64 {
        use std::arch::asm;
        let mut rax = seen;
        // SAFETY: the caller's promise; LOCK CMPXCHG works at any alignment.
        unsafe {
            match size {
                1 => {
                    asm!("lock cmpxchg byte ptr [{at}], {new}", at = in(reg) at, new = in(reg_byte) new as u8, inout("rax") rax, options(nostack))
                }
                2 => {
                    asm!("lock cmpxchg word ptr [{at}], {new:x}", at = in(reg) at, new = in(reg) new, inout("rax") rax, options(nostack))
                }
                4 => {
                    asm!("lock cmpxchg dword ptr [{at}], {new:e}", at = in(reg) at, new = in(reg) new, inout("rax") rax, options(nostack))
                }
                _ => {
                    asm!("lock cmpxchg qword ptr [{at}], {new}", at = in(reg) at, new = in(reg) new, inout("rax") rax, options(nostack))
                }
            }
        }
        rax
    }

    /// LOCK CMPXCHG16B.
    ///
    /// # Safety
    /// `at` points to 16 aligned bytes of mapped RAM.
    #[cfg(target_arch = "x86_64")]
    pub(super) unsafe fn exchange_16(at: *mut u8, expected: u128, new: u128) -> u128 {
        let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
        // SAFETY: the caller's promise; RBX is saved by hand because LLVM reserves it.
        unsafe {
            std::arch::asm!(
                "xchg rsi, rbx",
                "lock cmpxchg16b xmmword ptr [rdi]",
                "mov rbx, rsi",
                in("rdi") at,
                inout("rsi") new as u64 => _,
                in("rcx") (new >> 64) as u64,
                inout("rax") low,
                inout("rdx") high,
                options(nostack)
            );
        }
        u128::from(high) << 64 | u128::from(low)
    }

    #[cfg(not(target_arch = "x86_64"))]
    unsafe fn compare_exchange(at: *mut u8, seen: u64, new: u64, size: u64) -> u64 {
        use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::SeqCst};
        macro_rules! exchange {
            ($atomic:ty, $int:ty) => {{
                if !at.cast::<$int>().is_aligned() {
                    // A host without split locks: single-vCPU guests are unaffected, others lose atomicity here.
                    // SAFETY: the caller's promise.
                    let found = unsafe { at.cast::<$int>().read_unaligned() };
                    if found == seen as $int {
                        // SAFETY: the caller's promise.
                        unsafe { at.cast::<$int>().write_unaligned(new as $int) };
                    }
                    return u64::from(found);
                }
                // SAFETY: the caller's promise, and the alignment was just checked.
                let atomic = unsafe { <$atomic>::from_ptr(at.cast()) };
                let (Ok(found) | Err(found)) = atomic.compare_exchange(seen as $int, new as $int, SeqCst, SeqCst);
                u64::from(found)
            }};
        }
        match size {
            1 => exchange!(AtomicU8, u8),
            2 => exchange!(AtomicU16, u16),
            4 => exchange!(AtomicU32, u32),
            _ => exchange!(AtomicU64, u64),
        }
    }

    /// 16-byte compare and exchange for hosts without one: not atomic between vCPUs.
    ///
    /// # Safety
    /// `at` points to 16 bytes of mapped RAM.
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) unsafe fn exchange_16(at: *mut u8, expected: u128, new: u128) -> u128 {
        // SAFETY: the caller's promise.
        let found = unsafe { at.cast::<u128>().read_unaligned() };
        if found == expected {
            // SAFETY: the caller's promise.
            unsafe { at.cast::<u128>().write_unaligned(new) };
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::code_asm::*;
    use platform::x86::gpr::{RAX, RCX, RDI, RSI};

    use crate::testing::Machine;

    /// Never written by the machine's set-up.
    const PAGE: u64 = 0x20_0000;

    /// A machine whose memory leaves out zeroes, with `PAGE` in RDI.
    fn machine() -> Machine {
        let mut machine = Machine::long();
        machine.memory.pages().all_writes_are_noted();
        machine.set_reg(RDI, PAGE);
        machine
    }

    fn host_blocks(machine: &Machine) -> i64 {
        rustix::fs::fstat(machine.memory.fd().unwrap()).unwrap().st_blocks
    }

    #[test]
    fn zeroes_in_untouched_pages_need_no_host_memory() {
        let mut machine = machine();
        machine.set_reg(RCX, 0x4000);
        machine.code(|a| {
            a.push(0)?;
            a.mov(qword_ptr(rdi), 0)?;
            a.mov(qword_ptr(rdi + 0x1ffc), 0)?;
            a.rep().stosb()
        });
        machine.step(1);
        let before = host_blocks(&machine);
        machine.step(3);
        assert_eq!((machine.reg(RDI), machine.reg(RCX)), (PAGE + 0x4000, 0));
        assert_eq!(host_blocks(&machine), before);
        assert!((PAGE..PAGE + 0x4000).step_by(0x1000).all(|page| machine.memory.pages().is_untouched(page)));
    }

    #[test]
    fn zeroes_over_something_else_are_written() {
        let mut machine = machine();
        machine.set_reg(RAX, 0x1122_3344_5566_7788);
        machine.code(|a| {
            a.mov(dword_ptr(rdi), 0)?;
            a.mov(qword_ptr(rdi + 8), rax)?;
            a.mov(byte_ptr(rdi + 9), 0)?;
            a.lock().add(qword_ptr(rdi + 0x1000), rax)?;
            a.mov(word_ptr(rdi + 0x1002), 0)?;
            a.mov(word_ptr(rdi + 0x2ffe), 0)?;
            a.mov(qword_ptr(rdi + 0x2ffc), rax)?;
            a.mov(byte_ptr(rdi + 0x3000), 0)
        });
        machine.step(8);
        assert_eq!(machine.get::<u64>(PAGE + 8), 0x1122_3344_5566_0088);
        assert_eq!(machine.get::<u64>(PAGE + 0x1000), 0x1122_3344_0000_7788);
        assert_eq!(machine.get::<u64>(PAGE + 0x2ffc), 0x1122_3300_5566_7788);
    }

    #[test]
    fn what_others_write_is_overwritten_by_zeroes() {
        let mut machine = machine();
        machine.code(|a| {
            a.mov(qword_ptr(rdi), 0)?;
            a.mov(qword_ptr(rdi), 0)
        });
        machine.step(1);
        // A device, or another CPU.
        machine.put(PAGE, u64::MAX);
        machine.step(1);
        assert_eq!(machine.get::<u64>(PAGE), 0);
    }

    #[test]
    fn copies_and_fills_reach_untouched_pages() {
        let mut machine = machine();
        machine.memory.fill(PAGE + 0x10_0000, 0x3000, 7).unwrap();
        machine.set_reg(RSI, PAGE + 0x10_0800);
        machine.set_reg(RCX, 0x300);
        machine.set_reg(RAX, 9);
        machine.code(|a| {
            a.rep().movsd()?;
            a.mov(ecx, 0x1000)?;
            a.rep().stosb()
        });
        machine.step(3);
        let mut bytes = [0; 0x2000];
        machine.memory.read(PAGE, &mut bytes).unwrap();
        assert!(bytes[..0xc00].iter().all(|byte| *byte == 7) && bytes[0xc00..0x1c00].iter().all(|byte| *byte == 9));
        assert!(bytes[0x1c00..].iter().all(|byte| *byte == 0));
    }
}
