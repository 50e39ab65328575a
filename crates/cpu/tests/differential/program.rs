//! A test program: instructions, and where their branches go.

use iced_x86::{Code, Encoder, Formatter, Instruction, IntelFormatter, OpKind};

use crate::flags;
use crate::layout::*;

/// What in an instruction depends on where another one lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Target {
    None,
    /// A near branch goes to this item.
    Branch(usize),
    /// As `Branch`, but what the branch loads is cut to 16 bits.
    Branch16(usize),
    /// The memory operand is this item's address, relative to the instruction pointer.
    Memory(usize),
    /// The immediate operand of this number is this item's address.
    Immediate(u32, usize),
    /// A far branch goes to this item.
    Far(usize),
    /// The memory operand is so many bytes into this item's code.
    Code(usize, u8),
}

/// An instruction of a program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item {
    pub(crate) instruction: Instruction,
    /// Redundant prefixes in front of it.
    pub(crate) prefixes: [u8; 3],
    pub(crate) prefix_count: u8,
    pub(crate) target: Target,
}

/// Instructions and the state that they start in.
#[derive(Clone)]
pub(crate) struct Program {
    pub(crate) mode: Mode,
    pub(crate) kernel: Kernel,
    pub(crate) items: Vec<Item>,
    /// Flags whose value is undefined before each item and at the end, in their places in EFLAGS.
    pub(crate) undefined: Vec<u32>,
    /// Offset of the first instruction in the code area.
    pub(crate) code_at: u32,
    /// It runs where its code can be written.
    pub(crate) writable: bool,
    /// It has branches, so that the instructions executed are not simply those before the last.
    pub(crate) branches: bool,
    /// Registers and so on; the code is filled in by [`Program::assemble`].
    pub(crate) input: Box<Input>,
    /// Offset of each item from the first, and of the end.
    pub(crate) starts: Vec<u32>,
}

impl Target {
    /// The item meant.
    pub(crate) fn item(&mut self) -> Option<&mut usize> {
        match self {
            Target::None => None,
            Target::Branch(n)
            | Target::Branch16(n)
            | Target::Memory(n)
            | Target::Immediate(_, n)
            | Target::Far(n)
            | Target::Code(n, _) => Some(n),
        }
    }
}

impl Program {
    /// Encodes the instructions. `None` if one of them cannot be encoded, or reads a flag that is undefined.
    pub(crate) fn assemble(&mut self, encoder: &mut Encoder) -> Option<()> {
        self.follow_flags()?;
        let area = if self.writable { WRITABLE_CODE } else { CODE };
        let start = area + u64::from(self.code_at) - self.mode.code_base();
        self.input.rip = start;
        self.input.code_at = self.code_at;
        let mut bytes = Vec::with_capacity(512);
        self.starts.clear();
        // Sizes do not depend on where targets are.
        for item in &self.items {
            self.starts.push(bytes.len() as u32);
            let here = start + bytes.len() as u64;
            bytes = encode(encoder, bytes, item, here, here)?;
        }
        self.starts.push(bytes.len() as u32);
        if self.items.iter().any(|item| item.target != Target::None) {
            bytes.clear();
            for (i, item) in self.items.iter().enumerate() {
                let target = match item.target.clone().item() {
                    Some(n) => start + u64::from(*self.starts.get(*n)?),
                    None => 0,
                };
                bytes = encode(encoder, bytes, item, start + u64::from(self.starts[i]), target)?;
            }
        }
        if bytes.len() != *self.starts.last()? as usize || bytes.len() > MAX_PROGRAM {
            return None;
        }
        let room = CODE_LEN - self.code_at as usize;
        let len = bytes.len().min(room);
        self.input.code[..len].copy_from_slice(&bytes[..len]);
        self.input.code_len = len as u32;
        Some(())
    }

    /// Finds out which flags are undefined where. `None` if an instruction depends on one.
    fn follow_flags(&mut self) -> Option<()> {
        self.undefined = vec![0; self.items.len() + 1];
        // The second round takes branches back into account.
        for _ in 0..2 {
            for i in 0..self.items.len() {
                let Item { instruction, mut target, .. } = self.items[i];
                let after = flags::undefined_after(self.undefined[i], &instruction);
                self.undefined[i + 1] |= after;
                // What leads to a label holds the flags of later, when the branch happens: a few items on.
                if let Some(n) = target.item() {
                    let near = self.undefined[i..(i + 4).min(*n + 1).max(i + 1)].iter().fold(after, |all, u| all | u);
                    *self.undefined.get_mut(*n)? |= near;
                }
            }
        }
        let depends = |(item, undefined): (&Item, &u32)| flags::read(&item.instruction) & undefined != 0;
        (!self.items.iter().zip(&self.undefined).any(depends)).then_some(())
    }

    /// The item at an instruction pointer; the number of items stands for the end.
    pub(crate) fn item_at(&self, rip: u64) -> Option<usize> {
        let offset = rip.wrapping_sub(self.input.rip);
        self.starts.iter().position(|&start| u64::from(start) == offset)
    }

    /// Bytes of an item.
    pub(crate) fn bytes_of(&self, i: usize) -> &[u8] {
        let end = self.starts[i + 1].min(self.input.code_len) as usize;
        &self.input.code[(self.starts[i] as usize).min(end)..end]
    }

    /// A listing with addresses and bytes.
    pub(crate) fn listing(&self) -> String {
        let mut formatter = IntelFormatter::new();
        formatter.options_mut().set_hex_prefix("0x");
        formatter.options_mut().set_hex_suffix("");
        let mut text = String::new();
        for (i, _) in self.items.iter().enumerate() {
            let bytes = self.bytes_of(i);
            let rip = self.input.rip + u64::from(self.starts[i]);
            let mut decoder = iced_x86::Decoder::with_ip(self.mode.bits(), bytes, rip, decoder_options());
            let instruction = decoder.decode();
            let mut line = String::new();
            formatter.format(&instruction, &mut line);
            let hex: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            text += &format!("  {i:3} {rip:#x}: {:<32} {line} ({:?})\n", hex.join(" "), instruction.code());
        }
        text
    }
}

/// How the host's vendor decodes.
pub(crate) fn decoder_options() -> u32 {
    let amd = std::arch::x86_64::__cpuid(0).ebx != u32::from_le_bytes(*b"Genu");
    let vendor = if amd { iced_x86::DecoderOptions::AMD } else { 0 };
    vendor | iced_x86::DecoderOptions::FORCE_RESERVED_NOP
}

fn encode(encoder: &mut Encoder, mut bytes: Vec<u8>, item: &Item, here: u64, target: u64) -> Option<Vec<u8>> {
    let count = usize::from(item.prefix_count);
    bytes.extend_from_slice(&item.prefixes[..count]);
    let mut instruction = item.instruction;
    match item.target {
        Target::None => {}
        Target::Branch(_) => match instruction.op0_kind() {
            OpKind::NearBranch16 => instruction.set_near_branch16(target as u16),
            OpKind::NearBranch32 => instruction.set_near_branch32(target as u32),
            _ => instruction.set_near_branch64(target),
        },
        Target::Branch16(_) => instruction.set_near_branch16(target as u16),
        Target::Memory(_) => instruction.set_memory_displacement64(target),
        Target::Code(_, offset) => instruction.set_memory_displacement64(target + u64::from(offset)),
        Target::Immediate(operand, _) => instruction.set_immediate_u64(operand, target),
        Target::Far(_) => match instruction.op0_kind() {
            OpKind::FarBranch16 => instruction.set_far_branch16(target as u16),
            _ => instruction.set_far_branch32(target as u32),
        },
    }
    encoder.set_buffer(bytes);
    encoder.encode(&instruction, here + count as u64).ok()?;
    Some(encoder.take_buffer())
}

impl Item {
    pub(crate) fn new(instruction: Instruction, target: Target) -> Self {
        Self { instruction, prefixes: [0; 3], prefix_count: 0, target }
    }
    pub(crate) fn code(&self) -> Code {
        self.instruction.code()
    }
}
