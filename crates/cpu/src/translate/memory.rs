//! Linear addresses of memory operands, and the inline TLB check.

use platform::x86::seg;

use super::asm::{Fixup, Mem, cond, reg::*};
use super::block::{Insn, Translator};
use super::held::Held;
use super::share::Shared;
use super::{SiteKind, resident, spilled};
use crate::decode::{Ea, Op};
use crate::jit::context::{at, table};
use crate::state::{NULL_SEG, RIP, ZERO};

/// The parts of an effective address in host registers.
pub(super) struct Terms {
    pub(super) base: Option<u8>,
    pub(super) index: Option<(u8, u8)>,
    pub(super) disp: i32,
}

impl Terms {
    fn mem(&self) -> Mem {
        Mem { base: self.base, index: self.index, disp: self.disp }
    }
}

/// What an access does that the TLB does not have.
enum Miss {
    /// The interpreter runs its instruction.
    Interpret,
    /// The rest of the block runs with a check for each access.
    Alone,
}

/// What is done out of line where a check has failed that took the register of an address for the address.
pub(super) struct Retry {
    base: u8,
    disp: i32,
    /// How far the last byte is from the first.
    reach: i32,
    alignment: u32,
    tags: i32,
    addends: i32,
    /// Arena offset of the code behind the check, and what is held there.
    back: u32,
    held: Held,
}

/// How far from a register's page an address may lie for the TLB to be looked at for that page first.
const CLOSE: i32 = 512;

/// Whether the TLB may be looked at for the page of a register only: the access is near, and all of it on one side.
fn is_close(disp: i32, size: u32, alignment: u32) -> bool {
    disp.abs() <= CLOSE && (disp >= 0 || size <= alignment || disp + size as i32 <= 1)
}

/// Whether the address can be computed by [`Translator::address`].
pub(super) fn addressable(op: &Op, next: u32, legacy: bool) -> bool {
    if legacy {
        let open = op.ea == Ea::Flat || matches!(usize::from(op.seg), seg::FS | seg::GS);
        return op.asize == 4 && open;
    }
    let disp = if usize::from(op.base) == RIP { op.disp.wrapping_add(u64::from(next)) } else { op.disp };
    i32::try_from(disp as i64).is_ok() && op.asize >= 4
}

/// The same for an address without registers, which may be of 64 bits unless there is a segment's base to be added.
pub(super) fn fits(op: &Op, next: u32, legacy: bool) -> bool {
    addressable(op, next, legacy) || op.asize == 8 && usize::from(op.seg) == NULL_SEG
}

impl Translator<'_> {
    /// Base, index and displacement, with spilled registers in scratch registers; R14 only if the others are taken.
    pub(super) fn terms(&mut self, op: &Op, next: u32) -> Terms {
        let mut disp = op.disp as i32;
        let base = match usize::from(op.base) {
            ZERO => None,
            RIP => {
                self.release(R15);
                self.asm.load(R15, &Mem::context(at!(page)));
                disp = disp.wrapping_add(next as i32);
                Some(R15)
            }
            _ => {
                // Not where the index is already.
                let index = self.holder(op.index);
                Some(self.readable(op.base, index.as_slice()))
            }
        };
        let index = (usize::from(op.index) != ZERO).then(|| (self.readable(op.index, base.as_slice()), op.scale & 3));
        Terms { base, index, disp }
    }

    /// The host register where a guest register can be read: R14 if it has none and all others are busy.
    fn readable(&mut self, guest: u8, busy: &[u8]) -> u8 {
        if let Some(host) = self.target_register(guest, true, busy) {
            return host;
        }
        self.addend = None;
        self.asm.load(R14, &spilled(guest));
        R14
    }

    /// The host register of a guest register, loaded into `scratch` if it has none.
    pub(super) fn in_register(&mut self, guest: u8, scratch: u8) -> u8 {
        resident(guest).unwrap_or_else(|| {
            self.asm.load(scratch, &spilled(guest));
            scratch
        })
    }

    /// Linear address of the memory operand into R15. Uses R14.
    pub(super) fn address(&mut self, insn: &Insn) {
        if self.legacy {
            return self.legacy_address(insn);
        }
        let op = &insn.op;
        let wide = op.asize == 8;
        let base_of_segment = match usize::from(op.seg) {
            seg::FS => Some(Mem::context(at!(fs_base))),
            seg::GS => Some(Mem::context(at!(gs_base))),
            _ => None,
        };
        let absolute = usize::from(op.base) == ZERO && usize::from(op.index) == ZERO;
        if let (Some(segment), true) = (base_of_segment, absolute) {
            self.release(R15);
            self.asm.load(R15, &segment);
            if op.disp != 0 {
                self.asm.lea(true, R15, &Mem::base(R15, op.disp as i32));
            }
            return;
        }
        if absolute {
            self.release(R15);
            return self.asm.mov_imm(R15, op.disp);
        }
        let mut terms = self.terms(op, insn.next);
        self.release(R15);
        if let (Some(segment), true, None) = (base_of_segment, wide, terms.index) {
            self.addend = None;
            self.asm.load(R14, &segment);
            terms.index = Some((R14, 0));
            return self.asm.lea(true, R15, &terms.mem());
        }
        let in_place = terms.base == Some(R15) && terms.index.is_none() && terms.disp == 0 && wide;
        if !in_place {
            self.asm.lea(wide, R15, &terms.mem());
        }
        if let Some(segment) = base_of_segment {
            self.addend = None;
            self.asm.load(R14, &segment);
            self.asm.lea(true, R15, &Mem::indexed(R15, R14, 0, 0));
        }
    }

    /// Checks the access to the memory operand; returns the operand. Uses R14, R15, RCX.
    pub(super) fn access(&mut self, insn: &Insn, size: u32, write: bool, alignment: u32) -> Mem {
        let op = &insn.op;
        let simple = usize::from(op.index) == ZERO
            && !matches!(usize::from(op.base), ZERO | RIP)
            && !matches!(usize::from(op.seg), seg::FS | seg::GS);
        let Some(shared) = insn.operand else {
            if let (true, Some(base)) = (simple && op.asize == self.word() as u8, resident(op.base)) {
                return self.check_at(insn, base, op.disp as i32, size, write, alignment);
            }
            self.address(insn);
            self.check_aligned(insn, size, write, alignment);
            return Self::operand();
        };
        if let (true, Some(base)) = (simple && shared.plain, resident(op.base)) {
            return self.shared_access(insn, shared, base, op.disp as i32);
        }
        self.address(insn);
        self.shared_access(insn, shared, R15, 0)
    }

    /// As [`Translator::access`] for one word of the stack at a register plus a displacement.
    pub(super) fn stack_access(&mut self, insn: &Insn, base: u8, disp: i32, write: bool) -> Mem {
        let wide = !self.legacy;
        if insn.stack.is_none_or(|shared| shared.first) {
            // The block may be left.
            self.settle_stack();
        }
        let disp = if base == R13 { disp.wrapping_add(self.stack_moved) } else { disp };
        if let Some(shared) = insn.stack {
            if shared.plain {
                return self.shared_access(insn, shared, base, disp);
            }
            self.release(R15);
            self.asm.lea(wide, R15, &Mem::base(base, disp));
            return self.shared_access(insn, shared, R15, 0);
        }
        self.check_at(insn, base, disp, self.word(), write, 1)
    }

    /// Checks an access by a register and a displacement; returns the operand.
    fn check_at(&mut self, insn: &Insn, base: u8, disp: i32, size: u32, write: bool, alignment: u32) -> Mem {
        if disp == 0 || !self.legacy && is_close(disp, size, alignment) {
            return self.probe_at(insn, (base, disp), size, write, alignment, Miss::Interpret);
        }
        self.release(R15);
        self.asm.lea(!self.legacy, R15, &Mem::base(base, disp));
        self.check_aligned(insn, size, write, alignment);
        Self::operand()
    }

    /// The operand at [base + disp], of a group of accesses.
    fn shared_access(&mut self, insn: &Insn, shared: Shared, base: u8, disp: i32) -> Mem {
        let (span, alignment) = (shared.span, shared.alignment);
        if shared.first && !shared.ahead {
            if let Some(from) = disp.checked_add(shared.start).filter(|&from| is_close(from, span, alignment)) {
                self.probe_at(insn, (base, from), span, shared.write, alignment, Miss::Alone);
                self.note_addend(shared);
                return Mem::indexed(base, R14, 0, disp);
            }
            if base != R15 {
                self.release(R15);
            }
            // The range of the group first, in two steps if the sum of the displacements is out of range.
            match disp.checked_add(shared.start) {
                Some(0) => self.asm.mov(R15, base),
                Some(disp) => self.asm.lea(true, R15, &Mem::base(base, disp)),
                None => {
                    self.asm.lea(true, R15, &Mem::base(base, disp));
                    self.asm.lea(true, R15, &Mem::base(R15, shared.start));
                }
            }
            self.probe(insn, span, shared.write, alignment, Miss::Alone);
            self.note_addend(shared);
            return Mem::indexed(R15, R14, 0, -shared.start);
        }
        if self.addend != Some(shared.group) {
            match shared.slot {
                Some(slot) => self.asm.load(R14, &Mem::context(at!(addends) + 8 * i32::from(slot))),
                None => {
                    // Not foreseen: as if the access stood alone.
                    self.release(R15);
                    self.asm.lea(true, R15, &Mem::base(base, disp));
                    self.probe(insn, shared.span, shared.write, 1, Miss::Alone);
                    return Self::operand();
                }
            }
            self.addend = Some(shared.group);
        }
        Mem::indexed(base, R14, 0, disp)
    }

    fn note_addend(&mut self, shared: Shared) {
        if let Some(slot) = shared.slot {
            self.asm.store(&Mem::context(at!(addends) + 8 * i32::from(slot)), R14);
        }
        self.addend = Some(shared.group);
    }

    /// Checks an access of `size` bytes at R15; goes to the slow path of `insn` unless the TLB has it. Uses RCX, keeps the
    /// flags: a fault's frame shows even those that nothing else reads. Afterwards the operand is at [R15 + R14].
    pub(super) fn check(&mut self, insn: &Insn, size: u32, write: bool) {
        self.check_aligned(insn, size, write, 1);
    }

    /// As [`Translator::check`], where the operand must be aligned, too.
    pub(super) fn check_aligned(&mut self, insn: &Insn, size: u32, write: bool, alignment: u32) {
        self.probe(insn, size, write, alignment, Miss::Interpret);
    }

    /// The operand after [`Translator::check`].
    pub(super) fn operand() -> Mem {
        Mem::indexed(R15, R14, 0, 0)
    }

    /// As [`Translator::check_aligned`], with the choice of what happens otherwise.
    fn probe(&mut self, insn: &Insn, size: u32, write: bool, alignment: u32, miss: Miss) {
        self.release(R15);
        self.probe_at(insn, (R15, 0), size, write, alignment, miss);
    }

    /// The same for the access at a register and a displacement of not more than [`CLOSE`]. What is aligned crosses pages as a
    /// whole only, so that one comparison serves for both: the offset's low bits must be 0 like the page's difference.
    fn probe_at(
        &mut self,
        insn: &Insn,
        (base, disp): (u8, i32),
        size: u32,
        write: bool,
        alignment: u32,
        miss: Miss,
    ) -> Mem {
        let reach = (size as i32 - 1) & (alignment as i32).wrapping_neg();
        let tags = if write { table::write(self.access) } else { table::read(self.access) };
        let addends = table::addend(self.access);
        self.addend = None;
        self.settle_held();
        self.release(RCX);
        // The byte that is farthest from the register: the others lie between them.
        self.look_at(base, if disp < 0 { disp } else { disp + reach }, tags);
        let slow = if insn.recovery.is_some() {
            let slow = self.jump_if_beyond(alignment);
            self.asm.load(R14, &Mem::indexed(RSP, R14, 3, addends));
            slow
        } else {
            let hit = self.compare(alignment);
            let slow = self.asm.jmp_forward();
            self.asm.bind(hit);
            self.load_addend(addends);
            slow
        };
        match miss {
            Miss::Interpret => self.slow_path(insn, slow, true),
            Miss::Alone => self.go_alone(insn, slow),
        }
        let (back, held) = (self.asm.here(), self.held);
        let retry = (base != R15).then_some(Retry { base, disp, reach, alignment, tags, addends, back, held });
        self.complete_stub(retry, insn.recovery);
        Mem::indexed(base, R14, 0, disp)
    }

    /// The TLB entry of the page of `base`: its index into R14, and into RCX what is below 4096 if the byte at `base` plus
    /// `disp` is in the entry's page.
    fn look_at(&mut self, base: u8, disp: i32, tags: i32) {
        self.asm.rorx(R14, base, 12);
        self.asm.movzx16(R14, R14);
        self.asm.load(RCX, &Mem::indexed(RSP, R14, 3, tags));
        self.asm.lea(true, RCX, &Mem::indexed(RCX, base, 0, disp));
    }

    /// After a check that looked at the page of a register: looks at the page of the address, which R15 becomes.
    pub(super) fn try_again(&mut self, retry: &Retry, kind: &mut SiteKind) {
        self.asm.lea(true, R15, &Mem::base(retry.base, retry.disp));
        if retry.disp == 0 {
            return;
        }
        self.look_at(R15, retry.reach, retry.tags);
        let hit = self.compare(retry.alignment);
        let miss = self.asm.jmp_forward();
        self.asm.bind(hit);
        self.load_addend(retry.addends);
        retry.held.reload(&mut self.asm);
        self.asm.jmp(retry.back);
        if let SiteKind::Link { patch, .. } = kind {
            *patch = self.asm.field(miss);
        }
        self.asm.bind(miss);
    }

    /// A jump that is taken if RCX is below 4096, and a multiple of `alignment`. Uses RCX.
    fn compare(&mut self, alignment: u32) -> Fixup {
        if !self.fast_pext {
            return self.compare_saving_flags(0xffff_f000 | (alignment - 1));
        }
        let mask = match alignment {
            16 => at!(page_mask16),
            32 => at!(page_mask32),
            64 => at!(page_mask64),
            _ => at!(page_mask),
        };
        self.asm.pext_context(RCX, RCX, mask);
        self.asm.jrcxz()
    }

    /// Behind [`Translator::compare`]: from the index of the entry in R14 to the distance between host and linear addresses.
    fn load_addend(&mut self, addends: i32) {
        if !self.fast_pext {
            self.recall_flags();
        }
        self.asm.load(R14, &Mem::indexed(RSP, R14, 3, addends));
    }

    /// The comparison for hosts where PEXT is slow: flags are put aside. They are back if it fails.
    fn compare_saving_flags(&mut self, mask: u32) -> Fixup {
        self.spare_flags();
        // TEST RCX, mask
        self.asm.put(&[0x48, 0xf7, 0xc1]);
        self.asm.u32(mask);
        let hit = self.asm.jcc_short(cond::Z);
        self.recall_flags();
        hit
    }
}
