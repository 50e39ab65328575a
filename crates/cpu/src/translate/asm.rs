//! A small emitter of x86-64 machine code: what the translator puts around the guest's own instructions.

/// Numbers of the host's general-purpose registers.
#[allow(missing_docs)]
pub(crate) mod reg {
    pub(crate) const RAX: u8 = 0;
    pub(crate) const RCX: u8 = 1;
    pub(crate) const RDX: u8 = 2;
    pub(crate) const RBX: u8 = 3;
    pub(crate) const RSP: u8 = 4;
    pub(crate) const RBP: u8 = 5;
    pub(crate) const RSI: u8 = 6;
    pub(crate) const RDI: u8 = 7;
    pub(crate) const R12: u8 = 12;
    pub(crate) const R13: u8 = 13;
    pub(crate) const R14: u8 = 14;
    pub(crate) const R15: u8 = 15;
}

/// Condition codes of Jcc.
pub(crate) mod cond {
    pub(crate) const Z: u8 = 4;
    pub(crate) const NZ: u8 = 5;
    pub(crate) const B: u8 = 2;
    pub(crate) const A: u8 = 7;
    pub(crate) const AE: u8 = 3;
    pub(crate) const S: u8 = 8;
}

/// A memory operand of the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mem {
    pub(crate) base: Option<u8>,
    /// Register and shift.
    pub(crate) index: Option<(u8, u8)>,
    pub(crate) disp: i32,
}

impl Mem {
    pub(crate) fn base(base: u8, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp }
    }
    pub(crate) fn indexed(base: u8, index: u8, shift: u8, disp: i32) -> Self {
        Self { base: Some(base), index: Some((index, shift)), disp }
    }
    /// A field of the context block.
    pub(crate) fn context(disp: i32) -> Self {
        Self::base(reg::RSP, disp)
    }
    fn rex(&self) -> u8 {
        let x = self.index.map_or(0, |(r, _)| r >> 3);
        let b = self.base.map_or(0, |r| r >> 3);
        x << 1 | b
    }
}

/// Code being written for a place in the arena.
pub(crate) struct Asm {
    pub(crate) bytes: Vec<u8>,
    /// Offset in the arena of the first byte.
    pub(crate) start: u32,
}

/// A forward reference to be filled in.
#[derive(Clone, Copy)]
pub(crate) struct Fixup {
    at: usize,
    short: bool,
}

impl Asm {
    pub(crate) fn new(start: u32) -> Self {
        Self { bytes: Vec::with_capacity(1024), start }
    }
    /// Arena offset of the next byte.
    pub(crate) fn here(&self) -> u32 {
        self.start + self.bytes.len() as u32
    }
    pub(crate) fn u8(&mut self, byte: u8) {
        self.bytes.push(byte);
    }
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
    pub(crate) fn u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    /// ModRM, SIB and displacement of a memory operand.
    pub(crate) fn modrm(&mut self, field: u8, mem: &Mem) {
        self.modrm_sized(field, mem, true);
    }

    /// As [`Asm::modrm`]; `short`: displacements other than 0 may be one byte.
    pub(crate) fn modrm_sized(&mut self, field: u8, mem: &Mem, short: bool) {
        let field = (field & 7) << 3;
        let Some(base) = mem.base else {
            // No base: SIB with base 101 and a 32-bit displacement.
            let (index, shift) = mem.index.map_or((4, 0), |(r, s)| (r & 7, s));
            self.put(&[field | 4, shift << 6 | index << 3 | 5]);
            return self.u32(mem.disp as u32);
        };
        let need_disp = mem.disp != 0 || base & 7 == 5;
        let short = mem.disp == 0 || short && i8::try_from(mem.disp).is_ok();
        let mode = match (need_disp, short) {
            (false, _) => 0,
            (true, true) => 0x40,
            (true, false) => 0x80,
        };
        match mem.index {
            None if base & 7 != 4 => self.u8(mode | field | base & 7),
            None => self.put(&[mode | field | 4, 0x24]),
            Some((index, shift)) => self.put(&[mode | field | 4, shift << 6 | (index & 7) << 3 | base & 7]),
        }
        match mode {
            0x40 => self.u8(mem.disp as u8),
            0x80 => self.u32(mem.disp as u32),
            _ => {}
        }
    }

    /// An instruction with a register field and a memory operand.
    pub(crate) fn op_mem(&mut self, wide: bool, opcode: &[u8], field: u8, mem: &Mem) {
        let rex = u8::from(wide) << 3 | (field >> 3 & 1) << 2 | mem.rex();
        if rex != 0 {
            self.u8(0x40 | rex);
        }
        self.put(opcode);
        self.modrm(field, mem);
    }
    /// An instruction with a register field and a register operand.
    pub(crate) fn op_reg(&mut self, wide: bool, opcode: &[u8], field: u8, rm: u8) {
        let rex = u8::from(wide) << 3 | (field >> 3 & 1) << 2 | rm >> 3 & 1;
        if rex != 0 {
            self.u8(0x40 | rex);
        }
        self.put(opcode);
        self.u8(0xc0 | (field & 7) << 3 | rm & 7);
    }

    pub(crate) fn load(&mut self, r: u8, mem: &Mem) {
        self.op_mem(true, &[0x8b], r, mem);
    }
    pub(crate) fn load32(&mut self, r: u8, mem: &Mem) {
        self.op_mem(false, &[0x8b], r, mem);
    }
    pub(crate) fn store(&mut self, mem: &Mem, r: u8) {
        self.op_mem(true, &[0x89], r, mem);
    }
    pub(crate) fn lea(&mut self, wide: bool, r: u8, mem: &Mem) {
        self.op_mem(wide, &[0x8d], r, mem);
    }
    pub(crate) fn mov(&mut self, to: u8, from: u8) {
        if to != from {
            self.op_reg(true, &[0x89], from, to);
        }
    }
    pub(crate) fn mov32(&mut self, to: u8, from: u8) {
        self.op_reg(false, &[0x89], from, to);
    }
    /// MOV r64, imm in its shortest form.
    pub(crate) fn mov_imm(&mut self, r: u8, value: u64) {
        if let Ok(value) = u32::try_from(value) {
            if r > 7 {
                self.u8(0x41);
            }
            self.u8(0xb8 | r & 7);
            self.u32(value);
        } else if i32::try_from(value as i64).is_ok() {
            self.op_reg(true, &[0xc7], 0, r);
            self.u32(value as u32);
        } else {
            self.u8(0x48 | r >> 3);
            self.u8(0xb8 | r & 7);
            self.put(&value.to_le_bytes());
        }
    }
    /// MOVZX r32, r16.
    pub(crate) fn movzx16(&mut self, to: u8, from: u8) {
        self.op_reg(false, &[0x0f, 0xb7], to, from);
    }
    /// RORX r64, r64, count: rotates without touching flags (BMI2).
    pub(crate) fn rorx(&mut self, to: u8, from: u8, count: u8) {
        self.put(&[0xc4, (!to >> 3 & 1) << 7 | 0x40 | (!from >> 3 & 1) << 5 | 3, 0xfb, 0xf0]);
        self.put(&[0xc0 | (to & 7) << 3 | from & 7, count]);
    }
    /// SARX (`right_signed`) or SHRX by the count in a register: shifts without touching flags (BMI2).
    pub(crate) fn shift_right(&mut self, wide: bool, right_signed: bool, to: u8, from: u8, count: u8) {
        let pp = if right_signed { 2 } else { 3 };
        self.put(&[0xc4, (!to >> 3 & 1) << 7 | 0x40 | (!from >> 3 & 1) << 5 | 2]);
        self.put(&[u8::from(wide) << 7 | (!count & 15) << 3 | pp, 0xf7, 0xc0 | (to & 7) << 3 | from & 7]);
    }
    /// PEXT r64, r64, m64: gathers the bits under a mask without touching flags (BMI2).
    pub(crate) fn pext_context(&mut self, to: u8, from: u8, disp: i32) {
        self.put(&[0xc4, (!to >> 3 & 1) << 7 | 0x62, 0x82 | (!from & 15) << 3, 0xf5]);
        self.modrm(to, &Mem::context(disp));
    }

    /// A jump to an arena offset.
    pub(crate) fn jmp(&mut self, target: u32) {
        self.u8(0xe9);
        self.rel32(target);
    }
    fn rel32(&mut self, target: u32) {
        let next = self.here() + 4;
        self.u32(target.wrapping_sub(next));
    }
    /// JMP with its target to be filled in.
    pub(crate) fn jmp_forward(&mut self) -> Fixup {
        self.u8(0xe9);
        self.u32(0);
        Fixup { at: self.bytes.len(), short: false }
    }
    /// CALL with its target to be filled in.
    pub(crate) fn call_forward(&mut self) -> Fixup {
        self.u8(0xe8);
        self.u32(0);
        Fixup { at: self.bytes.len(), short: false }
    }
    pub(crate) fn jcc_forward(&mut self, condition: u8) -> Fixup {
        self.put(&[0x0f, 0x80 | condition & 15]);
        self.u32(0);
        Fixup { at: self.bytes.len(), short: false }
    }
    pub(crate) fn jcc_short(&mut self, condition: u8) -> Fixup {
        self.put(&[0x70 | condition & 15, 0]);
        Fixup { at: self.bytes.len(), short: true }
    }
    /// Jcc to an arena offset behind us.
    pub(crate) fn jcc_back(&mut self, condition: u8, target: u32) {
        self.put(&[0x0f, 0x80 | condition & 15]);
        self.rel32(target);
    }
    pub(crate) fn jrcxz(&mut self) -> Fixup {
        self.put(&[0xe3, 0]);
        Fixup { at: self.bytes.len(), short: true }
    }
    /// JRCXZ over a distance that a byte may not hold.
    pub(crate) fn jrcxz_far(&mut self) -> Fixup {
        // JRCXZ to the JMP; JMP over it.
        self.put(&[0xe3, 2, 0xeb, 5]);
        self.jmp_forward()
    }
    /// Lets a forward reference lead here.
    pub(crate) fn bind(&mut self, fixup: Fixup) {
        let distance = self.bytes.len() - fixup.at;
        if fixup.short {
            debug_assert!(distance < 128);
            self.bytes[fixup.at - 1] = distance as u8;
        } else {
            self.bytes[fixup.at - 4..fixup.at].copy_from_slice(&(distance as u32).to_le_bytes());
        }
    }
    /// Arena offset of the 32-bit field of a forward reference.
    pub(crate) fn field(&self, fixup: Fixup) -> u32 {
        self.start + fixup.at as u32 - 4
    }
}
