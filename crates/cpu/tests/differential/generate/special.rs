//! Instructions that need company: a pointer in a certain register, a dividend that fits, a target to jump to.

mod branch;
mod segment;
mod vector;

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register};

use super::Generator;
use super::address::Access;
use crate::layout::*;
use crate::program::{Item, Target};

/// A value to be stored: known, or the address of a later instruction.
#[derive(Clone, Copy)]
enum Word {
    Value(u64),
    Label,
}

impl Generator<'_> {
    /// Appends an instruction of an encoding, and before it what it needs.
    pub(super) fn instruction(&mut self, code: Code) {
        use Mnemonic as M;
        let first = code.op_code().op_kinds().first().copied();
        match code.mnemonic() {
            _ if first.is_some_and(is_near_target) => self.near_branch(code),
            M::Jmp | M::Call if code.op_code().op_kinds()[0] == OpCodeOperandKind::mem => self.far_indirect(code),
            M::Jmp | M::Call if matches!(first, Some(OpCodeOperandKind::farbr2_2 | OpCodeOperandKind::farbr4_2)) => {
                self.far_direct(code);
            }
            M::Jmp | M::Call => self.near_indirect(code),
            M::Ret => self.near_return(code),
            M::Retf => self.far_return(code),
            M::Iret | M::Iretd | M::Iretq => self.interrupt_return(code),
            M::Div | M::Idiv => self.division(code),
            M::Xlatb => self.translate(code),
            M::Enter => self.enter(code),
            M::Leave => {
                self.frame_pointer(900);
                self.plain(code);
            }
            M::Popf | M::Popfd | M::Popfq => self.pop_flags(code),
            M::Shld | M::Shrd => self.double_shift(code),
            M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b => self.compare_exchange(code),
            M::Bound => self.bound(code),
            M::Aam => self.decimal_split(code),
            M::Int => self.interrupt(code),
            M::Lar | M::Lsl | M::Verr | M::Verw | M::Lldt | M::Ltr => self.selector_operand(code),
            M::Arpl => self.plain(code),
            M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => self.load_far_pointer(code),
            M::Mov if first == Some(OpCodeOperandKind::seg_reg) => self.load_segment(code),
            M::Pop if first.is_some_and(is_fixed_segment) => self.pop_segment(code),
            M::Wrfsbase | M::Wrgsbase => self.write_base(code),
            M::Ldmxcsr | M::Vldmxcsr => self.load_mxcsr(code),
            M::Fldcw => self.load_control_word(code),
            M::Fxrstor | M::Fxrstor64 => self.restore_image(code),
            M::Fnstenv | M::Fstenv | M::Fnsave | M::Fsave | M::Fxsave | M::Fxsave64 => self.save_environment(code),
            _ if code.op_code().op_kinds().iter().any(|&kind| vector::is_gathered(kind)) => self.gather(code),
            _ if is_string(code) => self.string(code),
            _ if code.op_code().is_stack_instruction() => {
                self.ensure_stack();
                self.plain(code);
            }
            _ => self.plain(code),
        }
        if self.rng.permille(15) {
            self.backward_loop();
        }
    }

    /// An instruction that needs nothing but operands.
    fn plain(&mut self, code: Code) {
        for _ in 0..4 {
            if let Some(instruction) = self.build(code)
                && self.encoded(&instruction, &[]).is_some()
            {
                return self.emit(instruction, Target::None);
            }
        }
    }

    /// A stack pointer inside its segment.
    fn stack_value(&mut self) -> u64 {
        let inside = 8 * self.rng.below(64);
        let based = self.mode == Mode::Segmented16 || self.state.selectors[2].is_some_and(|selector| selector & 4 != 0);
        if based { 0x500 + inside } else { STACK + PAGE / 2 + inside }
    }

    /// Makes the stack pointer known and good, almost always.
    fn ensure_stack(&mut self) {
        let based = self.mode == Mode::Segmented16 || self.state.selectors[2].is_some_and(|selector| selector & 4 != 0);
        let good = self.state.known[4].is_some_and(|sp| {
            let offset = if based { sp & 0xffff } else { sp.wrapping_sub(STACK) };
            (0x180..0xf00).contains(&offset) && (!based || offset < 0x700 || self.mode == Mode::Segmented16)
        });
        if !good && !self.rng.permille(30) {
            let value = self.stack_value();
            self.load_constant(4, value);
        }
    }

    /// Makes the frame pointer point into the stack in `permille` of cases.
    fn frame_pointer(&mut self, permille: u64) {
        if self.rng.permille(permille) {
            let value = self.stack_value();
            self.load_constant(5, value);
        }
    }

    // ------------------------------------------------------------ helpers for memory

    /// A memory operand for `code`'s first operand, with all other operands absent.
    fn memory_only(&mut self, code: Code, size: u64, writes: bool) -> Option<Instruction> {
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        instruction.set_op_kind(0, OpKind::Memory);
        self.keep_pointers();
        self.memory(&mut instruction, Access { size, align: 1, writes, margin: 0 })?;
        Some(instruction)
    }

    /// Gives `instruction` the memory operand of `like`, `delta` bytes further.
    fn copy_memory(&self, instruction: &mut Instruction, like: &Instruction, delta: u64) {
        let (base, index) = (like.memory_base(), like.memory_index());
        instruction.set_memory_base(base);
        instruction.set_memory_index(index);
        instruction.set_memory_index_scale(like.memory_index_scale());
        instruction.set_segment_prefix(like.segment_prefix());
        let relative = base.is_gpr() || index.is_gpr();
        let size = match (base.is_gpr(), index.is_gpr()) {
            (true, _) => base.size() as u32,
            (_, true) => index.size() as u32,
            _ => like.memory_displ_size(),
        };
        let moved = like.memory_displacement64().wrapping_add(delta);
        let moved = match (relative, size) {
            (true, 2) => moved as i16 as u64,
            (true, 4) => moved as i32 as u64,
            (false, 2) => moved & 0xffff,
            (false, 4) => moved & 0xffff_ffff,
            _ => moved,
        };
        instruction.set_memory_displacement64(moved);
        instruction.set_memory_displ_size(size);
    }

    /// MOV of an immediate to `like`'s memory operand plus `delta`. Returns the item's number.
    fn store_word(&mut self, like: &Instruction, delta: u64, size: u64, word: Word) -> usize {
        let (code, kind) = match size {
            2 => (Code::Mov_rm16_imm16, OpKind::Immediate16),
            4 => (Code::Mov_rm32_imm32, OpKind::Immediate32),
            _ => (Code::Mov_rm64_imm32, OpKind::Immediate32to64),
        };
        let mut store = Instruction::default();
        store.set_code(code);
        store.set_op_kind(0, OpKind::Memory);
        store.set_op_kind(1, kind);
        self.copy_memory(&mut store, like, delta);
        let target = match word {
            Word::Value(value) => {
                match size {
                    2 => store.set_immediate16(value as u16),
                    4 => store.set_immediate32(value as u32),
                    _ => store.set_immediate32to64(i64::from(value as i32)),
                }
                Target::None
            }
            Word::Label => Target::Immediate(1, 0),
        };
        self.push(Item::new(store, target));
        self.items.len() - 1
    }

    /// Puts words on the stack, the first at its top. Returns the item that holds a label.
    fn stack_frame(&mut self, size: u64, words: &[Word]) -> Option<usize> {
        let value = self.stack_value();
        self.load_constant(4, value);
        let mut like = Instruction::default();
        like.set_memory_base(if self.mode == Mode::Long { Register::RSP } else { Register::ESP });
        let mut label = None;
        for (i, &word) in words.iter().enumerate() {
            let item = self.store_word(&like, size * i as u64, size, word);
            if matches!(word, Word::Label) {
                label = Some(item);
            }
        }
        label
    }

    // ------------------------------------------------------------ arithmetic

    /// A dividend whose quotient mostly fits.
    fn division(&mut self, code: Code) {
        if self.rng.permille(800) {
            let size = match code.op_code().op0_kind() {
                OpCodeOperandKind::r8_or_mem => 1,
                OpCodeOperandKind::r16_or_mem => 2,
                OpCodeOperandKind::r32_or_mem => 4,
                _ => 8,
            };
            let extend = match (code.mnemonic() == Mnemonic::Idiv, size) {
                (true, 1) => Instruction::with(Code::Cbw),
                (true, 2) => Instruction::with(Code::Cwd),
                (true, 4) => Instruction::with(Code::Cdq),
                (true, _) => Instruction::with(Code::Cqo),
                (false, 1) => Instruction::with2(Code::Mov_r8_imm8, Register::AH, self.rng.below(4) as u32)
                    .expect("MOV takes a register and an immediate"),
                (false, _) => Instruction::with2(Code::Mov_r32_imm32, Register::EDX, self.rng.below(3) as u32)
                    .expect("MOV takes a register and an immediate"),
            };
            self.emit(extend, Target::None);
        }
        self.plain(code);
    }

    /// Counts above 16 are undefined for 16-bit operands.
    fn double_shift(&mut self, code: Code) {
        let sixteen = code.op_code().op0_kind() == OpCodeOperandKind::r16_or_mem;
        let count = self.rng.below(17) + 32 * self.rng.below(8);
        let by_register = code.op_code().op_kinds()[2] == OpCodeOperandKind::cl;
        if !sixteen {
            return self.plain(code);
        }
        if by_register {
            self.load_constant(1, count);
        }
        for _ in 0..4 {
            let Some(mut instruction) = self.build(code) else { continue };
            if !by_register {
                instruction.set_immediate8(count as u8);
            }
            return self.emit(instruction, Target::None);
        }
    }

    fn decimal_split(&mut self, code: Code) {
        let base = if self.rng.permille(30) { 0 } else { 1 + self.rng.below(255) as u32 };
        if let Ok(instruction) = Instruction::with1(code, base) {
            self.emit(instruction, Target::None);
        }
    }

    /// In half of the cases with the accumulator equal to the operand.
    fn compare_exchange(&mut self, code: Code) {
        let Some(instruction) = self.build(code) else { return };
        let uses = |r: Register| {
            [instruction.memory_base(), instruction.memory_index()].iter().any(|m| m.full_register() == r)
        };
        let in_memory = instruction.op0_kind() == OpKind::Memory;
        if self.rng.below(2) == 0 && in_memory && !uses(Register::RAX) && !uses(Register::RDX) {
            let wide = self.mode == Mode::Long;
            let size = instruction.memory_size().size() as u64;
            let half = if size == 16 { 8 } else { 4 };
            let load = if wide { Code::Mov_r64_rm64 } else { Code::Mov_r32_rm32 };
            let (low, high) = if wide { (Register::RAX, Register::RDX) } else { (Register::EAX, Register::EDX) };
            for (register, delta) in [(low, 0), (high, half)] {
                let mut mov = Instruction::default();
                mov.set_code(load);
                mov.set_op_kind(0, OpKind::Register);
                mov.set_op_register(0, register);
                mov.set_op_kind(1, OpKind::Memory);
                self.copy_memory(&mut mov, &instruction, delta);
                self.emit(mov, Target::None);
                if size < 8 {
                    break;
                }
            }
        }
        self.emit(instruction, Target::None);
    }

    /// In most cases with bounds that hold.
    fn bound(&mut self, code: Code) {
        let size = if code == Code::Bound_r16_m1616 { 2 } else { 4 };
        let Some(mut instruction) = self.build(code) else { return };
        if self.rng.permille(800) {
            let least = if size == 2 { 0x8000 } else { 0x8000_0000 };
            self.store_word(&instruction, 0, size, Word::Value(least));
            self.store_word(&instruction, size, size, Word::Value(least - 1));
        }
        instruction.set_code(code);
        self.emit(instruction, Target::None);
    }

    // ------------------------------------------------------------ self-modifying code

    /// A store into the immediate operand of an instruction that follows soon.
    pub(super) fn rewrite_code(&mut self) {
        let size = self.rng.pick(&[1u64, 1, 4, 2]);
        let (code, kind) = match size {
            1 => (Code::Mov_rm8_imm8, OpKind::Immediate8),
            2 => (Code::Mov_rm16_imm16, OpKind::Immediate16),
            _ => (Code::Mov_rm32_imm32, OpKind::Immediate32),
        };
        let mut store = Instruction::default();
        store.set_code(code);
        store.set_op_kind(0, OpKind::Memory);
        store.set_memory_displ_size(if self.mode == Mode::Long { 8 } else { 4 });
        if self.mode == Mode::Long && self.rng.below(2) == 0 {
            store.set_memory_base(Register::RIP);
        }
        store.set_op_kind(1, kind);
        let value = self.rng.next();
        match size {
            1 => store.set_immediate8(value as u8),
            2 => store.set_immediate16(value as u16),
            _ => store.set_immediate32(value as u32),
        }
        let between = self.rng.below(3) as usize;
        // The immediate of MOV to a 32-bit register lies behind its opcode.
        self.push(Item::new(store, Target::Code(self.items.len() + 1 + between, 1)));
        for _ in 0..between {
            let (a, b) = (self.rng.below(3) as u32, self.rng.below(3) as u32);
            let mov = Instruction::with2(Code::Mov_r32_rm32, Register::EAX + a, Register::EAX + b);
            self.push(Item::new(mov.expect("MOV takes two registers"), Target::None));
        }
        let r = self.rng.pick(&[0u32, 1, 2, 3]);
        let mov = Instruction::with2(Code::Mov_r32_imm32, Register::EAX + r, self.rng.next() as u32);
        self.push(Item::new(mov.expect("MOV takes a register and an immediate"), Target::None));
        self.state.known[r as usize] = None;
    }

    // ------------------------------------------------------------ implicit operands

    fn translate(&mut self, code: Code) {
        let size = self.address_size_of_strings();
        let over = self.string_override();
        let segment = if over == Register::None { Register::DS } else { over };
        let at = self.offset(segment, Access { size: 256, align: 1, writes: false, margin: 0 });
        self.load_constant(3, at);
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        instruction.set_op_kind(0, OpKind::Memory);
        instruction.set_memory_base(match size {
            8 => Register::RBX,
            4 => Register::EBX,
            _ => Register::BX,
        });
        instruction.set_memory_index(Register::AL);
        instruction.set_segment_prefix(over);
        self.emit(instruction, Target::None);
    }

    pub(super) fn address_size_of_strings(&mut self) -> u32 {
        match (self.mode, self.rng.below(5)) {
            (Mode::Long, 0) | (Mode::Segmented16, 0) => 4,
            (Mode::Long, _) => 8,
            (Mode::Flat32, 0) => 2,
            (Mode::Flat32, _) => 4,
            (Mode::Segmented16, _) => 2,
        }
    }

    pub(super) fn string_override(&mut self) -> Register {
        match self.rng.below(10) {
            0 => Register::FS,
            1 => Register::GS,
            2 => self.rng.pick(&[Register::ES, Register::SS, Register::CS, Register::DS]),
            _ => Register::None,
        }
    }

    fn string(&mut self, code: Code) {
        let address_size = self.address_size_of_strings();
        let over = self.string_override();
        let size = code.op_code().memory_size().size().max(1) as u64;
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        let mut segment_used = false;
        for (i, &kind) in code.op_code().op_kinds().iter().enumerate() {
            let i = i as u32;
            let source = [OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI];
            let destination = [OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI];
            let column = address_size.trailing_zeros() as usize - 1;
            let repeats = size * 24;
            match kind {
                OpCodeOperandKind::seg_rSI => {
                    instruction.set_op_kind(i, source[column]);
                    let segment = if over == Register::None { Register::DS } else { over };
                    self.point(6, segment, Access { size: repeats, align: 1, writes: false, margin: 0 });
                    segment_used = true;
                }
                OpCodeOperandKind::es_rDI => {
                    instruction.set_op_kind(i, destination[column]);
                    let writes = !matches!(
                        code.mnemonic(),
                        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq
                    ) && !matches!(
                        code.mnemonic(),
                        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq
                    );
                    self.point(7, Register::ES, Access { size: repeats, align: 1, writes, margin: 0 });
                }
                kind => {
                    let register = super::operand::fixed_register(kind).unwrap_or(Register::DX);
                    instruction.set_op_kind(i, OpKind::Register);
                    instruction.set_op_register(i, register);
                }
            }
        }
        if segment_used {
            instruction.set_segment_prefix(over);
        }
        self.repeat(&mut instruction);
        self.emit(instruction, Target::None);
    }

    /// A repeat prefix and a count.
    fn repeat(&mut self, instruction: &mut Instruction) {
        let info = instruction.op_code();
        match self.rng.below(10) {
            0..4 if info.can_use_rep_prefix() => instruction.set_has_rep_prefix(true),
            4..7 if info.can_use_repne_prefix() => instruction.set_has_repne_prefix(true),
            _ => return,
        }
        let count = match self.rng.below(20) {
            0..14 => self.rng.below(24),
            14..18 => self.rng.below(0x600),
            18 => self.rng.value(),
            _ => return,
        };
        let count = if self.mode == Mode::Long { count } else { count & 0xffff_ffff };
        self.load_constant(1, count);
    }

    /// Lets a string's pointer point into a segment, almost always.
    pub(super) fn point(&mut self, r: usize, segment: Register, access: Access) {
        let kept = self.state.known[r].is_some() && self.rng.below(8) == 0;
        if kept || self.rng.permille(10) {
            return;
        }
        let mut at = self.offset(segment, access);
        if self.state.direction == Some(true) {
            at = at.wrapping_add(access.size / 2);
        }
        let at = if self.mode == Mode::Long { at } else { at & 0xffff_ffff };
        self.load_constant(r, at);
    }

    // ------------------------------------------------------------ stack

    fn enter(&mut self, code: Code) {
        self.ensure_stack();
        let size = match self.rng.below(20) {
            0 => self.rng.value() as u32 & 0xffff,
            _ => self.rng.below(64) as u32,
        };
        let level = match self.rng.below(10) {
            0..5 => 0,
            5..7 => 1,
            7..9 => self.rng.below(8) as u32,
            _ => self.rng.below(256) as u32,
        };
        if level & 31 > 1 {
            self.frame_pointer(950);
        }
        if let Ok(instruction) = Instruction::with2(code, size, level) {
            self.emit(instruction, Target::None);
        }
    }

    /// A value for RFLAGS: anything in the arithmetic flags, seldom what ends the program soon.
    fn flags_value(&mut self) -> u64 {
        let mut value = self.rng.next() & 0x8d5;
        const RARE: [(u64, u64); 9] = [
            (1 << 10, 150),
            (1 << 8, 10),
            (1 << 14, 40),
            (1 << 18, 25),
            (1 << 21, 60),
            (3 << 12, 100),
            (1 << 9, 500),
            (1 << 16, 60),
            (0x1a_8022, 60),
        ];
        for (bits, permille) in RARE {
            // With NT, IRET returns from a task in protected mode only.
            let task = bits == 1 << 14 && self.kernel == Kernel::Protected;
            if !task && self.rng.permille(permille) {
                value |= bits;
            }
        }
        value
    }

    fn pop_flags(&mut self, code: Code) {
        if self.rng.permille(970) || self.kernel == Kernel::Protected {
            let size = match code.mnemonic() {
                Mnemonic::Popf => 2,
                Mnemonic::Popfd => 4,
                _ => 8,
            };
            let flags = self.flags_value();
            self.stack_frame(size, &[Word::Value(flags)]);
        }
        self.plain(code);
    }
}

fn is_near_target(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(kind, K::br16_1 | K::br32_1 | K::br64_1 | K::br16_2 | K::br32_4 | K::br64_4)
}

fn is_fixed_segment(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(kind, K::es | K::cs | K::ss | K::ds | K::fs | K::gs)
}

fn is_string(code: Code) -> bool {
    code.op_code().op_kinds().iter().any(|kind| matches!(kind, OpCodeOperandKind::seg_rSI | OpCodeOperandKind::es_rDI))
}

/// Whether a branch loads 16 bits into the instruction pointer.
pub(super) fn cuts_pointer(code: Code) -> bool {
    use OpCodeOperandKind as K;
    match code.mnemonic() {
        Mnemonic::Jmp | Mnemonic::Call if matches!(code, Code::Jmp_m1616 | Code::Call_m1616) => true,
        Mnemonic::Jmp | Mnemonic::Call if code.op_code().op0_kind() == K::r16_or_mem => true,
        Mnemonic::Iret => true,
        _ if matches!(code, Code::Retnw | Code::Retnw_imm16 | Code::Retfw | Code::Retfw_imm16) => true,
        _ => code.op_code().op_kinds().first().is_some_and(|kind| matches!(kind, K::br16_1 | K::br16_2 | K::farbr2_2)),
    }
}
