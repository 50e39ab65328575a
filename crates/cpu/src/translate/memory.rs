//! Linear addresses of memory operands, and the inline TLB check.

use platform::x86::seg;

use super::asm::{Mem, cond, reg::*};
use super::block::{Insn, Translator};
use super::{resident, spilled};
use crate::decode::Op;
use crate::jit::context::{at, table};
use crate::state::{RIP, ZERO};

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

/// Whether the address can be computed by [`Translator::address`].
pub(super) fn addressable(op: &Op, next: u32) -> bool {
    let disp = if usize::from(op.base) == RIP { op.disp.wrapping_add(u64::from(next)) } else { op.disp };
    i32::try_from(disp as i64).is_ok() && op.asize >= 4
}

impl Translator<'_> {
    /// Base, index and displacement, with spilled registers loaded into R15 (base) and R14 (index).
    pub(super) fn terms(&mut self, op: &Op, next: u32) -> Terms {
        let mut disp = op.disp as i32;
        let base = match usize::from(op.base) {
            ZERO => None,
            RIP => {
                self.asm.load(R15, &Mem::context(at!(page)));
                disp = disp.wrapping_add(next as i32);
                Some(R15)
            }
            _ => Some(self.in_register(op.base, R15)),
        };
        let index = (usize::from(op.index) != ZERO).then(|| (self.in_register(op.index, R14), op.scale));
        Terms { base, index, disp }
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
        let op = &insn.op;
        let wide = op.asize == 8;
        let base_of_segment = match usize::from(op.seg) {
            seg::FS => Some(Mem::context(at!(fs_base))),
            seg::GS => Some(Mem::context(at!(gs_base))),
            _ => None,
        };
        let absolute = usize::from(op.base) == ZERO && usize::from(op.index) == ZERO;
        if let (Some(segment), true) = (base_of_segment, absolute) {
            self.asm.load(R15, &segment);
            if op.disp != 0 {
                self.asm.lea(true, R15, &Mem::base(R15, op.disp as i32));
            }
            return;
        }
        if absolute {
            return self.asm.mov_imm(R15, op.disp);
        }
        let mut terms = self.terms(op, insn.next);
        if let (Some(segment), true, None) = (base_of_segment, wide, terms.index) {
            self.asm.load(R14, &segment);
            terms.index = Some((R14, 0));
            return self.asm.lea(true, R15, &terms.mem());
        }
        let in_place = terms.base == Some(R15) && terms.index.is_none() && terms.disp == 0 && wide;
        if !in_place {
            self.asm.lea(wide, R15, &terms.mem());
        }
        if let Some(segment) = base_of_segment {
            self.asm.load(R14, &segment);
            self.asm.lea(true, R15, &Mem::indexed(R15, R14, 0, 0));
        }
    }

    /// Checks an access of `size` bytes at R15; goes to the slow path of `insn` unless the TLB has it. Uses RCX.
    /// Afterwards the operand is at [R15 + R14].
    pub(super) fn check(&mut self, insn: &Insn, size: u32, write: bool) {
        self.check_aligned(insn, size, write, 1);
    }

    /// As [`Translator::check`], where the operand must be aligned, too. An aligned operand does not cross pages, so that one
    /// comparison serves: the offset's low bits must be 0 like the page's difference.
    pub(super) fn check_aligned(&mut self, insn: &Insn, size: u32, write: bool, alignment: u32) {
        let reach = if alignment == 1 { size as i32 - 1 } else { 0 };
        let mask = 0xffff_f000 | (alignment - 1);
        let mode = self.access;
        let tags = if write { table::write(mode) } else { table::read(mode) };
        self.asm.rorx(R14, R15, 12);
        self.asm.movzx16(R14, R14);
        self.asm.load(RCX, &Mem::indexed(RSP, R14, 3, tags));
        self.asm.lea(true, RCX, &Mem::indexed(RCX, R15, 0, reach));
        if insn.live == 0 {
            // TEST RCX, -4096
            self.asm.put(&[0x48, 0xf7, 0xc1]);
            self.asm.u32(mask);
            let slow = self.asm.jcc_forward(cond::NZ);
            self.slow_path(insn, slow, true);
        } else if self.fast_pext {
            let field = match alignment {
                16 => at!(page_mask16),
                32 => at!(page_mask32),
                64 => at!(page_mask64),
                _ => at!(page_mask),
            };
            self.asm.pext_context(RCX, RCX, field);
            let hit = self.asm.jrcxz();
            let slow = self.asm.jmp_forward();
            self.slow_path(insn, slow, true);
            self.asm.bind(hit);
        } else {
            self.check_saving_flags(insn, mask);
        }
        self.asm.load(R14, &Mem::indexed(RSP, R14, 3, table::addend(mode)));
    }

    /// The comparison for hosts where PEXT is slow: flags are put aside.
    fn check_saving_flags(&mut self, insn: &Insn, mask: u32) {
        self.asm.store(&Mem::context(at!(scratch2)), RAX);
        // LAHF; SETO AL; TEST RCX, -4096
        self.asm.put(&[0x9f, 0x0f, 0x90, 0xc0, 0x48, 0xf7, 0xc1]);
        self.asm.u32(mask);
        let hit = self.asm.jcc_short(cond::Z);
        self.restore_flags();
        let slow = self.asm.jmp_forward();
        self.slow_path(insn, slow, true);
        self.asm.bind(hit);
        self.restore_flags();
    }

    fn restore_flags(&mut self) {
        // ADD AL, 127; SAHF
        self.asm.put(&[0x04, 0x7f, 0x9e]);
        self.asm.load(RAX, &Mem::context(at!(scratch2)));
    }

    /// The operand after [`Translator::check`].
    pub(super) fn operand() -> Mem {
        Mem::indexed(R15, R14, 0, 0)
    }
}
