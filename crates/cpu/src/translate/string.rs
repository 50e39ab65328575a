//! MOVS and STOS, repeated inside one page on each side, CMPS and SCAS of bytes, repeated page by page, and single MOVS, STOS,
//! LODS, CMPS and SCAS: forward, without a segment override, with addresses of the mode's own width. The rest is the
//! interpreter's: it works page by page, too, and looks at events between pages; and such a long operation does not notice the
//! way there.

use iced_x86::{Instruction, Mnemonic};

use super::asm::{Mem, cond, reg::*};
use super::block::{Insn, Translator};
use super::classify::How;
use crate::decode::{Ea, Op};
use crate::jit::context::{at, table};
use crate::state::NULL_SEG;

/// Whether the string instruction runs here, as far as its form tells.
pub(super) fn form(i: &Instruction) -> How {
    match kind(i.mnemonic()) {
        Some((Kind::Lods, _) | (Kind::Cmps | Kind::Scas, 1..)) if repeats(i) => How::Interpret,
        Some(_) => How::String,
        None => How::Interpret,
    }
}

/// Whether its addresses are plain ones.
pub(super) fn addressable(op: &Op, legacy: bool) -> bool {
    if legacy {
        // Of STOS, whose segment cannot be another than ES, the operation has none.
        return op.asize == 4 && (op.ea == Ea::Flat || usize::from(op.seg) == NULL_SEG);
    }
    op.asize == 8 && usize::from(op.seg) == NULL_SEG
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Movs,
    Stos,
    Lods,
    Cmps,
    Scas,
}

/// The operation, and the binary logarithm of its element's size.
fn kind(mnemonic: Mnemonic) -> Option<(Kind, u8)> {
    use Mnemonic as N;
    Some(match mnemonic {
        N::Movsb => (Kind::Movs, 0),
        N::Movsw => (Kind::Movs, 1),
        N::Movsd => (Kind::Movs, 2),
        N::Movsq => (Kind::Movs, 3),
        N::Stosb => (Kind::Stos, 0),
        N::Stosw => (Kind::Stos, 1),
        N::Stosd => (Kind::Stos, 2),
        N::Stosq => (Kind::Stos, 3),
        N::Lodsb => (Kind::Lods, 0),
        N::Lodsw => (Kind::Lods, 1),
        N::Lodsd => (Kind::Lods, 2),
        N::Lodsq => (Kind::Lods, 3),
        N::Cmpsb => (Kind::Cmps, 0),
        N::Cmpsw => (Kind::Cmps, 1),
        N::Cmpsd => (Kind::Cmps, 2),
        N::Cmpsq => (Kind::Cmps, 3),
        N::Scasb => (Kind::Scas, 0),
        N::Scasw => (Kind::Scas, 1),
        N::Scasd => (Kind::Scas, 2),
        N::Scasq => (Kind::Scas, 3),
        _ => return None,
    })
}

fn repeats(i: &Instruction) -> bool {
    i.has_rep_prefix() || i.has_repne_prefix()
}

impl Translator<'_> {
    /// Emits a string instruction.
    pub(super) fn string(&mut self, insn: &Insn) {
        let Some((kind, shift)) = kind(insn.instruction.mnemonic()) else { return };
        let repeated = repeats(&insn.instruction);
        let mut nothing_to_do = None;
        if repeated {
            self.asm.mov(RCX, R12);
            nothing_to_do = Some(self.asm.jrcxz_far());
        }
        self.asm.load(RCX, &Mem::context(at!(backward)));
        let forward = self.asm.jrcxz();
        let backward = self.asm.jmp_forward();
        self.slow_path(insn, backward, false);
        self.asm.bind(forward);
        match (kind, repeated) {
            (Kind::Movs, true) => self.copy(insn, shift),
            (Kind::Stos, true) => self.fill(insn, shift),
            (Kind::Cmps | Kind::Scas, true) => self.search(insn, kind),
            (Kind::Lods, true) => {}
            (Kind::Cmps | Kind::Scas, false) => self.compare_element(insn, kind, shift),
            (_, false) => self.element(insn, kind, shift),
        }
        if let Some(skip) = nothing_to_do {
            self.asm.bind(skip);
        }
    }

    /// One element.
    fn element(&mut self, insn: &Insn, kind: Kind, shift: u8) {
        let size = 1 << shift;
        if kind != Kind::Stos {
            self.asm.mov(R15, RSI);
            self.check(insn, size, false);
            let target = if kind == Kind::Lods { RAX } else { RCX };
            self.element_move(shift, false, target);
        }
        if kind == Kind::Movs {
            self.asm.store(&Mem::context(at!(scratch)), RCX);
        }
        if kind != Kind::Lods {
            self.asm.mov(R15, RDI);
            self.check(insn, size, true);
            if kind == Kind::Movs {
                self.asm.load(RCX, &Mem::context(at!(scratch)));
            }
            self.element_move(shift, true, if kind == Kind::Movs { RCX } else { RAX });
            self.add_word(RDI, RDI, size as i32);
        }
        if kind != Kind::Stos {
            self.add_word(RSI, RSI, size as i32);
        }
    }

    /// Moves an element between a register and the operand.
    fn element_move(&mut self, shift: u8, store: bool, r: u8) {
        if shift == 1 {
            self.asm.u8(0x66);
        }
        let opcode = if store { 0x88 } else { 0x8a } | u8::from(shift != 0);
        self.asm.op_mem(shift == 3, &[opcode], r, &Self::operand());
    }

    /// Checks that all RCX elements from R15 on are in one page that may be accessed; their host address to R15.
    fn check_range(&mut self, insn: &Insn, shift: u8, write: bool) {
        let mode = self.access;
        let tags = if write { table::write(mode) } else { table::read(mode) };
        self.asm.rorx(R14, R15, 12);
        self.asm.movzx16(R14, R14);
        self.asm.load(RCX, &Mem::indexed(RSP, R14, 3, tags));
        self.asm.lea(true, RCX, &Mem::indexed(RCX, R15, 0, -1));
        self.asm.lea(true, RCX, &Mem::indexed(RCX, R12, shift, 0));
        self.page_offset_only(insn);
        self.asm.load(R14, &Mem::indexed(RSP, R14, 3, table::addend(mode)));
        self.asm.lea(true, R15, &Self::operand());
    }

    /// To the slow path unless RCX is below 4096.
    fn page_offset_only(&mut self, insn: &Insn) {
        self.asm.pext_context(RCX, RCX, at!(page_mask));
        let hit = self.asm.jrcxz();
        let slow = self.asm.jmp_forward();
        self.slow_path(insn, slow, true);
        self.asm.bind(hit);
    }

    /// A count that cannot wrap: below 4096.
    fn check_count(&mut self, insn: &Insn) {
        self.asm.mov(RCX, R12);
        self.page_offset_only(insn);
    }

    /// REP MOVS.
    fn copy(&mut self, insn: &Insn, shift: u8) {
        self.check_count(insn);
        self.asm.mov(R15, RSI);
        self.check_range(insn, shift, false);
        self.asm.store(&Mem::context(at!(scratch)), R15);
        self.asm.mov(R15, RDI);
        self.check_range(insn, shift, true);
        self.asm.load(R14, &Mem::context(at!(scratch)));
        for (r, field) in [(RDI, at!(scratch)), (RSI, at!(scratch2))] {
            self.asm.lea(!self.legacy, RCX, &Mem::indexed(r, R12, shift, 0));
            self.asm.store(&Mem::context(field), RCX);
        }
        self.asm.mov(RDI, R15);
        self.asm.mov(RSI, R14);
        self.repeat(0xa4, shift);
        self.asm.load(RDI, &Mem::context(at!(scratch)));
        self.asm.load(RSI, &Mem::context(at!(scratch2)));
    }

    /// REP STOS.
    fn fill(&mut self, insn: &Insn, shift: u8) {
        self.check_count(insn);
        self.asm.mov(R15, RDI);
        self.check_range(insn, shift, true);
        self.asm.lea(!self.legacy, R14, &Mem::indexed(RDI, R12, shift, 0));
        self.asm.mov(RDI, R15);
        self.repeat(0xaa, shift);
        self.asm.mov(RDI, R14);
    }

    /// REP with all of the guest's count.
    fn repeat(&mut self, opcode: u8, shift: u8) {
        self.asm.mov(RCX, R12);
        if shift == 1 {
            self.asm.u8(0x66);
        }
        self.asm.u8(0xf3);
        if shift == 3 {
            self.asm.u8(0x48);
        }
        self.asm.u8(opcode | u8::from(shift != 0));
        self.asm.mov_imm(R12, 0);
    }

    /// One element of CMPS or SCAS.
    fn compare_element(&mut self, insn: &Insn, kind: Kind, shift: u8) {
        let size = 1 << shift;
        let mut register = RAX;
        if kind == Kind::Cmps {
            self.asm.mov(R15, RSI);
            self.check(insn, size, false);
            self.element_move(shift, false, RCX);
            self.asm.store(&Mem::context(at!(scratch)), RCX);
            register = RCX;
        }
        self.asm.mov(R15, RDI);
        self.check(insn, size, false);
        if kind == Kind::Cmps {
            self.asm.load(RCX, &Mem::context(at!(scratch)));
        }
        if shift == 1 {
            self.asm.u8(0x66);
        }
        // CMP r, m
        self.asm.op_mem(shift == 3, &[0x3a | u8::from(shift != 0)], register, &Self::operand());
        self.add_word(RDI, RDI, size as i32);
        if kind == Kind::Cmps {
            self.add_word(RSI, RSI, size as i32);
        }
    }

    /// Repeated CMPSB or SCASB up to the end of a page; then the instruction begins anew. The count is not 0, and the first
    /// bytes are known to be there before the flags change, which they do from then on.
    fn search(&mut self, insn: &Insn, kind: Kind) {
        let compares = kind == Kind::Cmps;
        if compares {
            self.asm.mov(R15, RSI);
            self.check(insn, 1, false);
            self.asm.lea(true, R15, &Self::operand());
            self.asm.store(&Mem::context(at!(scratch)), R15);
        }
        self.asm.mov(R15, RDI);
        self.check(insn, 1, false);
        self.asm.lea(true, R15, &Self::operand());
        // The number of bytes to R14: up to the end of the page of either side, and no more than the count.
        self.room(R14, RDI);
        if compares {
            self.room(RCX, RSI);
            self.at_most(R14, RCX);
            self.asm.store(&Mem::context(at!(scratch2)), RSI);
            self.asm.load(RSI, &Mem::context(at!(scratch)));
        }
        self.at_most(R14, R12);
        self.asm.store(&Mem::context(at!(scratch)), RDI);
        self.asm.mov(RCX, R14);
        self.asm.mov(RDI, R15);
        let all_equal = insn.instruction.has_rep_prefix();
        self.asm.put(&[if all_equal { 0xf3 } else { 0xf2 }, if compares { 0xa6 } else { 0xae }]);
        // What was done: R14 minus RCX, without touching the flags, which are the guest's now.
        self.not(RCX);
        self.asm.lea(true, R14, &Mem::indexed(R14, RCX, 0, 1));
        for (r, field) in [(RDI, at!(scratch)), (RSI, at!(scratch2))].into_iter().take(1 + usize::from(compares)) {
            self.asm.load(r, &Mem::context(field));
            self.asm.lea(!self.legacy, r, &Mem::indexed(r, R14, 0, 0));
        }
        self.not(R14);
        self.asm.lea(!self.legacy, R12, &Mem::indexed(R12, R14, 0, 1));
        let found = self.asm.jcc_forward(if all_equal { cond::NZ } else { cond::Z });
        self.asm.mov(RCX, R12);
        let over = self.asm.jrcxz();
        let more = self.asm.jmp_forward();
        if self.may_loop {
            self.exit_later(more, i64::from(insn.start));
        } else {
            self.slow_path(insn, more, false);
        }
        self.asm.bind(over);
        self.asm.bind(found);
    }

    /// Bytes from the address in one register to the end of its page. Changes the flags.
    fn room(&mut self, to: u8, address: u8) {
        self.asm.mov(to, address);
        // OR to, -4096; NEG to
        self.asm.op_reg(true, &[0x81], 1, to);
        self.asm.u32(-4096i32 as u32);
        self.asm.op_reg(true, &[0xf7], 3, to);
    }

    /// Makes one register the lower of two, unsigned. Changes the flags.
    fn at_most(&mut self, to: u8, other: u8) {
        // CMP other, to; CMOVB to, other
        self.asm.op_reg(true, &[0x39], to, other);
        self.asm.op_reg(true, &[0x0f, 0x42], to, other);
    }

    /// NOT leaves the flags alone.
    fn not(&mut self, r: u8) {
        self.asm.op_reg(true, &[0xf7], 2, r);
    }
}
