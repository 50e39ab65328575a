//! Guest registers without a host register of their own, R12 to R15, in scratch registers for a while.
//!
//! A scratch register holds one from its first use on until it is needed for something else, or the block is left: emitted code
//! is entered, and left in a fault too, with all of them in the context block. What is written goes there as late as that.

use super::asm::{Asm, reg::*};
use super::block::Translator;
use super::{resident, spilled};

/// The scratch registers that hold guest registers; R14 is for addresses.
const HOSTS: [u8; 2] = [RCX, R15];
/// How many instructions ahead a use counts when it is to be decided what stays.
const AHEAD: usize = 6;

/// A guest register that is held.
#[derive(Clone, Copy)]
struct Kept {
    guest: u8,
    /// The context block does not have its value yet.
    dirty: bool,
}

/// What the scratch registers hold, by index in [`HOSTS`].
#[derive(Clone, Copy, Default)]
pub(super) struct Held([Option<Kept>; HOSTS.len()]);

impl Held {
    fn place(&self, guest: u8) -> Option<usize> {
        self.0.iter().position(|kept| kept.is_some_and(|kept| kept.guest == guest))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// Loads all again, after something else has run.
    pub(super) fn reload(&self, asm: &mut Asm) {
        for (host, kept) in HOSTS.into_iter().zip(self.0) {
            if let Some(kept) = kept {
                asm.load(host, &spilled(kept.guest));
            }
        }
    }
}

impl Translator<'_> {
    /// The scratch register that holds a guest register.
    pub(super) fn holder(&self, guest: u8) -> Option<u8> {
        self.held.place(guest).map(|n| HOSTS[n])
    }

    /// A scratch register that holds `guest` from now on, or `None` if all are `busy`. Its value is loaded if it is to be read.
    pub(super) fn hold(&mut self, guest: u8, read: bool, busy: &[u8]) -> Option<u8> {
        if let Some(host) = self.holder(guest) {
            return Some(host);
        }
        let free = |n: &usize| !busy.contains(&HOSTS[*n]);
        let soon = self.used_soon();
        let n = (0..HOSTS.len()).filter(free).min_by_key(|&n| match self.held.0[n] {
            None => 0,
            Some(kept) => 1 + (soon >> kept.guest & 1),
        })?;
        self.release(HOSTS[n]);
        if read {
            self.asm.load(HOSTS[n], &spilled(guest));
        }
        self.held.0[n] = Some(Kept { guest, dirty: false });
        Some(HOSTS[n])
    }

    /// Notes that a held register was written.
    pub(super) fn written(&mut self, guest: u8) {
        if let Some(n) = self.held.place(guest)
            && let Some(kept) = &mut self.held.0[n]
        {
            kept.dirty = true;
        }
    }

    /// The host register of a guest register, for writing; [`Translator::written`] is to follow. `None` if all are busy.
    pub(super) fn target_register(&mut self, guest: u8, read: bool, busy: &[u8]) -> Option<u8> {
        resident(guest).or_else(|| self.hold(guest, read, busy))
    }

    /// Brings the context block up to date.
    pub(super) fn settle_held(&mut self) {
        for (host, kept) in HOSTS.into_iter().zip(&mut self.held.0) {
            if let Some(kept) = kept.as_mut().filter(|kept| kept.dirty) {
                self.asm.store(&spilled(kept.guest), host);
                kept.dirty = false;
            }
        }
    }

    /// Lets a scratch register be used for something else. Its content stays for now.
    pub(super) fn release(&mut self, host: u8) {
        for (n, _) in HOSTS.iter().enumerate().filter(|(_, held)| **held == host) {
            if let Some(kept) = self.held.0[n].take().filter(|kept| kept.dirty) {
                self.asm.store(&spilled(kept.guest), host);
            }
        }
    }

    /// Lets all scratch registers be used for something else.
    pub(super) fn release_all(&mut self) {
        HOSTS.into_iter().for_each(|host| self.release(host));
    }

    /// Whether a guest register is used soon behind the current instruction.
    pub(super) fn is_used_soon(&self, guest: u8) -> bool {
        self.used_soon() >> guest & 1 != 0
    }

    /// The same of all, one bit for each.
    fn used_soon(&self) -> u32 {
        self.uses.iter().skip(self.current + 1).take(AHEAD).fold(0, |all, uses| all | u32::from(*uses))
    }
}
