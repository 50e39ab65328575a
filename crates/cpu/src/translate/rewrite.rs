//! A guest instruction with its register numbers and its memory operand exchanged for the host's; opcode, operand size and
//! immediate stay as they are.

use iced_x86::{
    Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpCodeOperandKind as Kind, OpKind,
    Register,
};

use super::asm::{Mem, reg::*};
use super::block::{Insn, Translator};
use super::classify::{is_high, uses_memory};
use super::{resident, spilled};

/// The pieces of an encoded instruction.
struct Encoding<'a> {
    /// 66, F2 or F3, F0 as far as present.
    prefixes: Vec<u8>,
    rex: Option<u8>,
    /// Second and third byte of a three-byte VEX prefix.
    vex: Option<(u8, u8)>,
    /// Without a VEX prefix including 0F, 0F 38, 0F 3A.
    opcode: &'a [u8],
    modrm: u8,
    immediate: &'a [u8],
}

/// The ModRM.rm operand.
enum Rm {
    Register(u8),
    Memory(Mem),
}

/// Which operand a register field of the encoding is.
#[derive(Clone, Copy, Default)]
pub(super) struct Fields {
    pub(super) reg: Option<u32>,
    pub(super) rm: Option<u32>,
    vvvv: Option<u32>,
}

/// Adds a prefix to those before it. Of F2 and F3 the last one counts.
pub(super) fn add_prefix(prefixes: &mut Vec<u8>, byte: u8) {
    prefixes.retain(|&other| other != byte && other & byte & 0xf2 != 0xf2);
    prefixes.push(byte);
}

fn parse<'a>(bytes: &'a [u8], insn: &Insn) -> Encoding<'a> {
    let mut prefixes = Vec::new();
    let mut rex = None;
    let mut at = 0;
    loop {
        match bytes[at] {
            byte @ (0x66 | 0xf2 | 0xf3 | 0xf0) => {
                add_prefix(&mut prefixes, byte);
                rex = None;
            }
            0x67 | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => rex = None,
            byte @ 0x40..=0x4f => rex = Some(byte),
            _ => break,
        }
        at += 1;
    }
    let mut vex = None;
    let start = match bytes[at] {
        0xc4 => {
            vex = Some((bytes[at + 1], bytes[at + 2]));
            at + 3
        }
        0xc5 => {
            vex = Some((bytes[at + 1] & 0x80 | 0x61, bytes[at + 1] & 0x7f));
            at + 2
        }
        _ => at,
    };
    let length = match (vex.is_some(), bytes[start], bytes.get(start + 1)) {
        (false, 0x0f, Some(0x38 | 0x3a)) => 3,
        (false, 0x0f, _) => 2,
        _ => 1,
    };
    let immediate = if insn.offsets.has_immediate() { insn.offsets.immediate_offset() } else { bytes.len() };
    Encoding {
        prefixes,
        rex,
        vex,
        opcode: &bytes[start..start + length],
        modrm: bytes[start + length],
        immediate: &bytes[immediate..],
    }
}

pub(super) fn fields(insn: &Insn) -> Fields {
    let mut fields = Fields::default();
    let code = insn.instruction.op_code();
    for n in 0..insn.instruction.op_count() {
        match code.op_kind(n) {
            Kind::r8_reg | Kind::r16_reg | Kind::r32_reg | Kind::r64_reg => fields.reg = Some(n),
            Kind::r32_vvvv | Kind::r64_vvvv => fields.vvvv = Some(n),
            Kind::r8_or_mem | Kind::r16_or_mem | Kind::r32_or_mem | Kind::r64_or_mem => fields.rm = Some(n),
            Kind::r16_rm | Kind::r32_rm | Kind::r64_rm => fields.rm = Some(n),
            _ => {}
        }
    }
    fields
}

pub(super) fn number(register: Register) -> u8 {
    register.full_register().number() as u8
}

pub(super) fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// The general-purpose registers that an instruction writes, implied ones too.
pub(super) fn written_registers<'a>(
    i: &Instruction,
    info: &'a mut InstructionInfoFactory,
) -> impl Iterator<Item = u8> + 'a {
    let used = info.info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE).used_registers();
    used.iter()
        .filter(|used| used.register().is_gpr() && used.access() != OpAccess::Read)
        .map(|used| number(used.register()))
}

/// The registers that an instruction names, as operands and in an address.
pub(super) fn named_registers(i: &Instruction) -> impl Iterator<Item = Register> {
    let operands = (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| i.op_register(n));
    operands.chain([i.memory_base(), i.memory_index()]).filter(|r| r.is_gpr())
}

impl Translator<'_> {
    pub(super) fn access_of(&mut self, insn: &Insn, operand: u32) -> OpAccess {
        let options = InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
        self.info.info_options(&insn.instruction, options).op_access(operand)
    }

    /// Emits an instruction with a ModRM byte.
    pub(super) fn rewrite(&mut self, insn: &Insn) {
        let bytes = self.bytes;
        let encoding = parse(&bytes[insn.at..insn.at + usize::from(insn.op.len)], insn);
        let fields = fields(insn);
        let i = &insn.instruction;
        let counts_in_cl = (0..i.op_count()).any(|n| i.op_code().op_kind(n) == Kind::cl);
        let memory = uses_memory(i);
        let high = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && is_high(i.op_register(n)));
        let mut place = Mem::base(R15, 0);
        let mut busy: Vec<u8> = Vec::with_capacity(4);
        if memory {
            let operand = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory).unwrap_or(0);
            let write = writes(self.access_of(insn, operand));
            place = self.access(insn, i.memory_size().size() as u32, write, 1);
            if high {
                // An address that takes no REX prefix.
                self.release(RCX);
                self.asm.lea(true, RCX, &place);
                place = Mem::base(RCX, 0);
            }
            busy.extend(place.base);
        }
        if counts_in_cl {
            self.release(RCX);
            self.asm.mov32(RCX, R12);
            busy.push(RCX);
        }
        let mut in_memory = None;
        if let (false, Some(n)) = (memory, fields.rm)
            && self.better_in_memory(insn, n, fields)
        {
            place = spilled(number(i.op_register(n)));
            in_memory = Some(n);
        }
        let wanted = [fields.reg, fields.vvvv, if memory || in_memory.is_some() { None } else { fields.rm }];
        // The host registers of the guest registers met so far.
        let mut found: Vec<(u8, u8)> = Vec::with_capacity(3);
        // One that was written in R14.
        let mut last = None;
        for n in wanted.into_iter().flatten() {
            let guest = number(i.op_register(n));
            if found.iter().any(|(other, _)| *other == guest) {
                continue;
            }
            let (read, written) = self.uses_of(insn, guest, &wanted);
            let mut host = self.target_register(guest, read, &busy);
            if host.is_none() && memory {
                // Make the address of the memory operand one register.
                self.asm.lea(true, R14, &place);
                place = Mem::base(R14, 0);
                self.addend = None;
                busy.retain(|&host| host != R15);
                host = self.hold(guest, read, &busy);
            }
            let host = host.unwrap_or_else(|| {
                self.addend = None;
                if read {
                    self.asm.load(R14, &spilled(guest));
                }
                if written {
                    last = Some(guest);
                }
                R14
            });
            if written {
                self.written(guest);
            }
            busy.push(host);
            found.push((guest, host));
        }
        let map = |n: u32| {
            let guest = number(i.op_register(n));
            found.iter().find(|(other, _)| *other == guest).map_or(0, |(_, host)| *host)
        };
        let reg = fields.reg.filter(|_| !high).map_or(encoding.modrm >> 3 & 7, map);
        let vvvv = fields.vvvv.map(map);
        let rm = match fields.rm {
            Some(n) if !memory && in_memory.is_none() => Rm::Register(map(n)),
            _ => Rm::Memory(place),
        };
        self.encode(&encoding, reg, vvvv, &rm);
        if let Some(guest) = last {
            self.asm.store(&spilled(guest), R14);
        }
    }

    /// Whether a register operand is best used where it is in the context block: a register of which this is the only use in a
    /// while. A narrow store would stall the next load of the whole register.
    fn better_in_memory(&mut self, insn: &Insn, n: u32, fields: Fields) -> bool {
        let i = &insn.instruction;
        let guest = number(i.op_register(n));
        resident(guest).is_none()
            && self.holder(guest).is_none()
            && !self.is_used_soon(guest)
            && may_be_memory(i.mnemonic(), fields)
            && fields.reg.is_none_or(|n| number(i.op_register(n)) != guest)
            && (i.op_register(n).size() == 8 || !writes(self.access_of(insn, n)))
    }

    /// Whether an instruction reads and writes a register by its operands among `wanted`. The same one may be read as one operand
    /// and written as another: SHRX R15, RBP, R15. Of one that an instruction clears by itself, as XOR does, not even the other
    /// operand counts as read.
    fn uses_of(&mut self, insn: &Insn, guest: u8, wanted: &[Option<u32>]) -> (bool, bool) {
        let i = &insn.instruction;
        let (mut read, mut written) = (false, false);
        for n in wanted.iter().copied().flatten().filter(|&n| number(i.op_register(n)) == guest) {
            let access = self.access_of(insn, n);
            read |= access != OpAccess::Write || i.op_register(n).size() < 4;
            written |= writes(access);
        }
        (read, written)
    }

    fn encode(&mut self, encoding: &Encoding<'_>, reg: u8, vvvv: Option<u8>, rm: &Rm) {
        let (x, b) = match rm {
            Rm::Register(r) => (0, r >> 3),
            Rm::Memory(mem) => (mem.index.map_or(0, |(r, _)| r >> 3), mem.base.map_or(0, |r| r >> 3)),
        };
        self.asm.put(&encoding.prefixes);
        if let Some((second, third)) = encoding.vex {
            let inverted = (!reg >> 3 & 1) << 7 | (!x & 1) << 6 | (!b & 1) << 5;
            // Outside 64-bit mode W and the upper bit of vvvv mean nothing for instructions on general-purpose registers.
            let third = if self.legacy { third & 0x7f | 0x40 } else { third };
            let third = vvvv.map_or(third, |v| third & 0x87 | (!v & 15) << 3);
            self.asm.put(&[0xc4, inverted | second & 0x1f, third]);
        } else {
            let bits = encoding.rex.unwrap_or(0) & 8 | (reg >> 3 & 1) << 2 | x << 1 | b;
            if bits != 0 || encoding.rex.is_some() {
                self.asm.u8(0x40 | bits);
            }
        }
        self.asm.put(encoding.opcode);
        match rm {
            Rm::Register(r) => self.asm.u8(0xc0 | (reg & 7) << 3 | r & 7),
            Rm::Memory(mem) => self.asm.modrm(reg, mem),
        }
        self.asm.put(encoding.immediate);
    }

    /// LEA with a destination of 32 or 64 bits.
    pub(super) fn lea(&mut self, insn: &Insn) {
        let wide = insn.instruction.op0_register().size() == 8;
        let terms = self.terms(&insn.op, insn.next);
        let target = self.target_register(insn.op.r1, false, &[]).unwrap_or(R15);
        if insn.op.asize == 4 && wide {
            // The sum is cut to 32 bits, which a 32-bit LEA does.
            let mem = Mem { base: terms.base, index: terms.index, disp: terms.disp };
            self.asm.lea(false, target, &mem);
        } else {
            if terms.base.is_none() && terms.index.is_none() {
                self.asm.mov_imm(target, if wide { insn.op.disp } else { insn.op.disp & 0xffff_ffff });
            } else {
                let mem = Mem { base: terms.base, index: terms.index, disp: terms.disp };
                self.asm.lea(wide, target, &mem);
            }
        }
        self.written(insn.op.r1);
    }

    /// MOV of an immediate to a register by the opcodes B0 and B8.
    pub(super) fn mov_immediate(&mut self, insn: &Insn) {
        let size = insn.instruction.op0_register().size();
        let value = insn.op.imm;
        let r = self.target_register(insn.op.r1, size < 4, &[]).unwrap_or(RCX);
        self.written(insn.op.r1);
        match size {
            8 | 4 => self.asm.mov_imm(r, if size == 4 { value & 0xffff_ffff } else { value }),
            _ => {
                if size == 2 {
                    self.asm.u8(0x66);
                }
                // REX even without bits: SPL, BPL, SIL, DIL.
                self.asm.put(&[0x40 | r >> 3, if size == 2 { 0xc7 } else { 0xc6 }, 0xc0 | r & 7]);
                self.asm.put(&(value as u16).to_le_bytes()[..size]);
            }
        }
    }

    /// MOV between the accumulator and an absolute address.
    pub(super) fn mov_offset(&mut self, insn: &Insn) {
        let i = &insn.instruction;
        let store = i.op0_kind() == OpKind::Memory;
        let size = i.memory_size().size();
        self.address(insn);
        self.check(insn, size as u32, store);
        if size == 2 {
            self.asm.u8(0x66);
        }
        let opcode = if store { 0x88 } else { 0x8a } | u8::from(size != 1);
        self.asm.op_mem(size == 8, &[opcode], RAX, &Self::operand());
    }

    /// XCHG of two registers that have host registers.
    pub(super) fn swap(&mut self, insn: &Insn) {
        let size = insn.instruction.op0_register().size();
        let (a, b) = (resident(insn.op.r1).unwrap_or(R15), resident(insn.op.r2).unwrap_or(R15));
        if size == 2 {
            self.asm.u8(0x66);
        }
        self.asm.op_reg(size == 8, &[0x87], a, b);
    }

    /// BSWAP.
    pub(super) fn bswap(&mut self, insn: &Insn) {
        let wide = insn.instruction.op0_register().size() == 8;
        let host = self.target_register(insn.op.r1, true, &[]).unwrap_or(RCX);
        let rex = u8::from(wide) << 3 | host >> 3;
        if rex != 0 {
            self.asm.u8(0x40 | rex);
        }
        self.asm.put(&[0x0f, 0xc8 | host & 7]);
        self.written(insn.op.r1);
    }
}

/// Whether the r/m operand may be the context field of a register instead of the register.
fn may_be_memory(mnemonic: Mnemonic, fields: Fields) -> bool {
    match mnemonic {
        // XCHG would lock; a failing CMPXCHG would not clear the upper half.
        Mnemonic::Xchg | Mnemonic::Xadd | Mnemonic::Cmpxchg => false,
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => fields.reg.is_none(),
        _ => true,
    }
}
