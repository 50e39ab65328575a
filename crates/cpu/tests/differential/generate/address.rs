//! Memory operands: which address to reach, and by which form of addressing.

use iced_x86::{Code, Instruction, Register};

use super::Generator;
use crate::layout::*;
use crate::program::Target;

/// What is known about a segment.
#[derive(Clone, Copy)]
struct Segment {
    base: u64,
    /// Offsets that are inside: first and last.
    first: u64,
    last: u64,
    writable: bool,
}

/// What an instruction does with its memory operand.
#[derive(Clone, Copy)]
pub(super) struct Access {
    /// Bytes; at least 1.
    pub(super) size: u64,
    /// What the address must be a multiple of, almost always.
    pub(super) align: u64,
    pub(super) writes: bool,
    /// Bytes around the operand that must be accessible too (bit strings).
    pub(super) margin: u64,
}

/// How an address is formed.
#[derive(Clone, Copy, Default)]
struct Form {
    base: Option<usize>,
    index: Option<usize>,
    scale: u32,
    ip: bool,
}

impl Generator<'_> {
    /// Chooses the memory operand of `instruction`.
    pub(super) fn memory(&mut self, instruction: &mut Instruction, access: Access) -> Option<()> {
        for _ in 0..12 {
            let (size, over) = self.address_size_and_override(access.writes);
            if self.try_form(instruction, access, size, over).is_some() {
                return Some(());
            }
        }
        None
    }

    fn address_size_and_override(&mut self, writes: bool) -> (u32, Register) {
        let mut over = match self.mode {
            Mode::Long => match self.rng.below(40) {
                0..3 => Register::FS,
                3..6 => Register::GS,
                6 => self.rng.pick(&[Register::ES, Register::CS, Register::SS, Register::DS]),
                _ => Register::None,
            },
            _ => match self.rng.below(40) {
                0..4 => Register::FS,
                4..8 => Register::GS,
                8..12 => self.rng.pick(&[Register::ES, Register::SS, Register::DS]),
                12 => Register::CS,
                _ => Register::None,
            },
        };
        if writes && self.segment(over).is_some_and(|segment| !segment.writable) && !self.rng.permille(30) {
            over = Register::None;
        }
        let size = match self.mode {
            Mode::Long if self.rng.below(10) == 0 => 4,
            Mode::Long => 8,
            // Nothing of the flat segments lies in the reach of 16-bit addresses.
            Mode::Flat32
                if matches!(over, Register::FS | Register::GS) && self.limits.ldt && self.rng.below(2) == 0 =>
            {
                2
            }
            Mode::Segmented16 if self.rng.below(4) != 0 => 2,
            _ => 4,
        };
        (size, over)
    }

    fn try_form(&mut self, instruction: &mut Instruction, access: Access, size: u32, over: Register) -> Option<()> {
        let form = self.form(size);
        let default = match form.base {
            Some(4 | 5) => Register::SS,
            _ => Register::DS,
        };
        let segment = if over == Register::None { default } else { over };
        let offset = self.offset(segment, access);
        let part = |r: Option<usize>, scale: u32| match r {
            Some(r) => Some(self.state.known[r]?.wrapping_shl(scale)),
            None => Some(0),
        };
        let sum = part(form.base, 0)?.wrapping_add(part(form.index, form.scale)?);
        let rest = offset.wrapping_sub(sum);
        let displacement = match size {
            8 if form.ip => offset,
            8 => i64::from(i32::try_from(rest as i64).ok()?) as u64,
            4 if offset >> 32 != 0 => return None,
            4 if form.ip => offset,
            4 => rest as i32 as u64,
            _ if offset >> 16 != 0 => return None,
            _ => rest as i16 as u64,
        };
        let absolute = form.base.is_none() && form.index.is_none() && !form.ip;
        let displacement = match size {
            4 if absolute => displacement & 0xffff_ffff,
            2 if absolute => displacement & 0xffff,
            _ => displacement,
        };
        self.set_memory(instruction, size, form, displacement, over);
        // A full displacement where a short one, or none, would do.
        let has_base = form.base.is_some() || form.index.is_some();
        let short = has_base && self.rng.below(5) != 0;
        let len = match (short, displacement) {
            (true, 0) if self.rng.below(2) == 0 => 0,
            (true, _) => 1,
            (false, _) => size,
        };
        instruction.set_memory_displ_size(len);
        Some(())
    }

    fn set_memory(&mut self, instruction: &mut Instruction, size: u32, form: Form, displacement: u64, over: Register) {
        let register = |r: usize| {
            let first = match size {
                8 => Register::RAX,
                4 => Register::EAX,
                _ => Register::AX,
            };
            first + r as u32
        };
        let ip = if size == 8 { Register::RIP } else { Register::EIP };
        instruction.set_memory_base(if form.ip { ip } else { form.base.map_or(Register::None, register) });
        instruction.set_memory_index(form.index.map_or(Register::None, register));
        instruction.set_memory_index_scale(1 << form.scale);
        instruction.set_memory_displacement64(displacement);
        instruction.set_segment_prefix(over);
    }

    /// Which registers take part.
    fn form(&mut self, size: u32) -> Form {
        if size == 2 {
            const FORMS: [(Option<usize>, Option<usize>); 9] = [
                (Some(3), Some(6)),
                (Some(3), Some(7)),
                (Some(5), Some(6)),
                (Some(5), Some(7)),
                (Some(6), None),
                (Some(7), None),
                (Some(5), None),
                (Some(3), None),
                (None, None),
            ];
            let known = |r: Option<usize>| r.is_none_or(|r| self.state.known[r].is_some());
            let usable: Vec<_> = FORMS.into_iter().filter(|&(b, i)| known(b) && known(i)).collect();
            let (base, index) = self.rng.pick(&usable);
            return Form { base, index, ..Form::default() };
        }
        let known: Vec<usize> = (0..16).filter(|&r| self.state.known[r].is_some()).collect();
        let any = |g: &mut Self| (!known.is_empty()).then(|| g.rng.pick(&known));
        let kind = self.rng.below(20);
        let mut form = Form::default();
        match kind {
            0..11 => form.base = any(self),
            11..17 => {
                form.base = any(self);
                form.index = any(self).filter(|&r| r != 4);
            }
            17 => form.index = any(self).filter(|&r| r != 4),
            18 if self.mode == Mode::Long => form.ip = true,
            _ => {}
        }
        if form.index.is_some() {
            form.scale = self.rng.below(4) as u32;
        }
        form
    }

    /// Loads a register with an address in the data area if too few are left that help to form addresses.
    pub(super) fn keep_pointers(&mut self) {
        let reach = |value: u64| match self.mode {
            Mode::Segmented16 => value < 0x1_0000,
            _ => value.wrapping_sub(DATA - PAGE) < 4 * PAGE || value < 0x1000,
        };
        let usable = (0..8).filter(|&r| r != 4 && self.state.known[r].is_some_and(reach)).count();
        if usable < 2 {
            let r = self.rng.pick(&[3usize, 5, 6, 7]);
            let base = if self.mode == Mode::Segmented16 { 0 } else { DATA };
            let value = base + self.rng.below(DATA_LEN as u64);
            self.load_constant(r, value);
        }
    }

    /// MOV of a constant to a register.
    pub(super) fn load_constant(&mut self, r: usize, value: u64) {
        let wide = self.mode == Mode::Long && (value >> 32 != 0 || self.rng.below(8) == 0);
        let instruction = if wide {
            Instruction::with2(Code::Mov_r64_imm64, Register::RAX + r as u32, value)
        } else {
            Instruction::with2(Code::Mov_r32_imm32, Register::EAX + r as u32, value as u32)
        };
        self.emit(instruction.expect("MOV takes a register and an immediate"), Target::None);
    }

    fn segment(&self, register: Register) -> Option<Segment> {
        let writable = register != Register::CS || self.mode == Mode::Long;
        let last = if self.mode == Mode::Long { u64::MAX } else { 0xffff_ffff };
        let flat = |base| Segment { base, first: 0, last, writable };
        if self.mode == Mode::Long {
            return match register {
                Register::FS => self.state.fs_base.map(flat),
                Register::GS => self.state.gs_base.map(flat),
                _ => Some(flat(0)),
            };
        }
        if !register.is_segment_register() {
            return None;
        }
        let selector = self.state.selectors[register.number()]?;
        if selector & 4 == 0 {
            let data = selector == crate::layout::selector::DATA;
            return (selector > 3).then(|| Segment { writable: writable && data, ..flat(0) });
        }
        let entry = LDT.get(usize::from(selector >> 3))?;
        let limit = u64::from(entry.limit);
        let expands_down = entry.kind & 0xc == 4;
        let top = if entry.big { 0xffff_ffff } else { 0xffff };
        let (first, last) = if expands_down { (limit + 1, top) } else { (0, limit) };
        Some(Segment { base: u64::from(entry.base), first, last, writable: entry.kind & 0xa == 2 })
    }

    /// Chooses an offset in a segment.
    pub(super) fn offset(&mut self, register: Register, access: Access) -> u64 {
        let Some(segment) = self.segment(register) else { return self.rng.below(0x1000) };
        if self.rng.permille(12) {
            let offset = self.bad_offset(segment, access);
            return self.agreed(segment, offset);
        }
        let linear = self.good_linear(segment, access);
        let last = segment.base.wrapping_add(segment.last);
        let mut offset = linear.wrapping_sub(segment.base);
        let inside = offset >= segment.first && offset.saturating_add(access.size - 1) <= segment.last;
        if !inside && segment.first < segment.last {
            // A segment that covers only a part of the areas: anywhere in that part.
            let end = (last + 1).min(CONSTANTS + PAGE).max(segment.base + segment.first + access.size);
            let room = end - (segment.base + segment.first) - access.size + 1;
            offset = segment.first + self.rng.below(room.min(2 * PAGE));
        }
        if access.align > 1 && !self.rng.permille(30) {
            let linear = segment.base.wrapping_add(offset);
            offset = offset.wrapping_sub(linear & (access.align - 1));
        }
        self.agreed(segment, offset)
    }

    /// The offset, or 0 where processors differ: AMD's want the offset itself to be canonical, not only its sum with the base
    /// of FS or GS, which is all that the manuals speak of.
    fn agreed(&self, segment: Segment, offset: u64) -> u64 {
        let canonical = |address: u64| (address as i64) << 16 >> 16 == address as i64;
        let differ = canonical(segment.base.wrapping_add(offset)) && !canonical(offset);
        if self.mode == Mode::Long && differ { 0 } else { offset }
    }

    /// A linear address where the access succeeds.
    fn good_linear(&mut self, segment: Segment, access: Access) -> u64 {
        let Access { size, margin, .. } = access;
        let stack_only = segment.base == STACK;
        let crossing = size > 1 && self.rng.permille(120);
        let pick = self.rng.below(100);
        let aligned = |at: u64| at & !(size.next_power_of_two().min(64) - 1);
        if stack_only || pick < 10 && margin == 0 {
            return STACK + self.rng.below(STACK_LEN as u64 - size.min(4000) + 1);
        }
        if crossing {
            return DATA + PAGE - 1 - self.rng.below(size - 1);
        }
        if pick < 22 && !access.writes && margin == 0 {
            return CONSTANTS + self.rng.below(PAGE - size.min(4000) + 1);
        }
        let at = DATA + margin + self.rng.below((DATA_LEN as u64).saturating_sub(size + 2 * margin).max(1));
        if self.rng.below(2) == 0 { aligned(at).max(DATA + margin) } else { at }
    }

    /// An offset where the access probably fails.
    fn bad_offset(&mut self, segment: Segment, access: Access) -> u64 {
        let below = |g: &mut Self, at: u64| at - 1 - g.rng.below(access.size.max(2) - 1);
        let linear = match self.rng.below(12) {
            0 => below(self, CONSTANTS + PAGE),
            1 => below(self, CONSTANTS),
            2 => CONSTANTS + self.rng.below(PAGE),
            3 => below(self, DATA),
            4 => below(self, STACK),
            5 => below(self, STACK + STACK_LEN as u64),
            6 => self.rng.below(0x1_0000),
            7 => CODE + self.rng.below(PAGE),
            8 if self.mode == Mode::Long => 0x8000_0000_0000 + self.rng.below(0x1000),
            9 if self.mode == Mode::Long => self.rng.next() | 1 << 63 & !(1 << 62),
            10 if self.mode == Mode::Long => self.rng.below(4096).wrapping_neg(),
            _ if self.mode != Mode::Long => {
                // Around the ends of the segment.
                let end = self.rng.pick(&[segment.first, segment.last.wrapping_add(1)]);
                let offset = end.wrapping_sub(self.rng.below(access.size + 1));
                return offset & if segment.last > 0xffff { 0xffff_ffff } else { 0xffff };
            }
            _ => DATA + 16 * PAGE,
        };
        let offset = linear.wrapping_sub(segment.base);
        if self.mode == Mode::Long { offset } else { offset & 0xffff_ffff }
    }
}
