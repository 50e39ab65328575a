//! Makes random programs.
//!
//! A program is a sequence of groups: one instruction of the encoding to be tested, and before it what
//! gives it a chance to do something interesting (a pointer where its memory operand needs one, a
//! dividend that fits). The generator follows which registers have a known value, so that memory
//! operands use whatever addressing form reaches the address that it wants; and which flags are
//! undefined, so that nothing depends on them.

mod address;
pub(crate) mod operand;
mod special;
mod track;

use iced_x86::{Code, Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory, Mnemonic, Register};

use crate::codes::{Codes, Family};
use crate::flags;
use crate::layout::*;
use crate::program::{Item, Program, Target, decoder_options};
use crate::random::Random;
use crate::vector::Places;
use track::State;

/// What programs may rely on.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) ldt: bool,
    pub(crate) fsgsbase: bool,
    /// Vendor is AMD: no split-lock traps, its own meaning of some prefixes.
    pub(crate) amd: bool,
}

/// A branch whose target lies ahead.
struct Join {
    branch: usize,
    /// Groups until the target.
    due: u64,
    state: State,
}

pub(crate) struct Generator<'a> {
    rng: Random,
    mode: Mode,
    kernel: Kernel,
    /// The program may write to its code.
    writable: bool,
    family: Family,
    codes: &'a Codes,
    limits: Limits,
    places: Places,
    only: Option<Code>,
    items: Vec<Item>,
    state: State,
    joins: Vec<Join>,
    info: InstructionInfoFactory,
    encoder: &'a mut Encoder,
    /// Nothing more can be executed.
    ended: bool,
    branches: bool,
}

/// Everything that does not change from program to program.
pub(crate) struct Plan<'a> {
    pub(crate) mode: Mode,
    pub(crate) family: Family,
    pub(crate) codes: &'a Codes,
    pub(crate) limits: Limits,
    pub(crate) places: Places,
    /// Test this encoding only.
    pub(crate) only: Option<Code>,
}

/// Legacy prefixes.
const PREFIXES: [u8; 11] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf2, 0xf3, 0xf0];

/// Makes the program of a seed.
pub(crate) fn program(plan: &Plan<'_>, seed: u64, encoder: &mut Encoder) -> Program {
    // An instruction that turns out not to be encodable where it is spoils its program: take the next one.
    for attempt in 0.. {
        let mut program = Generator::new(plan, seed ^ (attempt as u64) << 56, encoder).make();
        if program.assemble(encoder).is_some() {
            return program;
        }
    }
    unreachable!("attempts do not end")
}

/// Makes the program of a seed that consists of an opcode that is not assigned.
pub(crate) fn undefined(plan: &Plan<'_>, seed: u64, encoder: &mut Encoder) -> Program {
    let mut generator = Generator::new(plan, seed, encoder);
    let mut input = Input::new();
    generator.start(&mut input);
    let bytes = loop {
        let bytes = generator.random_code();
        if generator.decode(&bytes, 0).is_invalid() && !tolerated(&bytes, plan.mode) {
            break bytes;
        }
    };
    let data = Instruction::with_declare_byte(&bytes).expect("at most 16 bytes of data");
    generator.items.push(Item::new(data, Target::None));
    let code_at = generator.rng.below(PAGE) as u32;
    let mut program = generator.finish(input, code_at);
    program.assemble(encoder).expect("data can be encoded");
    program
}

/// Whether some processors let pass what is no instruction: AMD's ignore LOCK in front of VERR and VERW, bits of opmask
/// numbers beyond 7 in VEX encodings, and fields of EVEX prefixes that have no meaning.
fn tolerated(bytes: &[u8; 15], mode: Mode) -> bool {
    let mut decoder = Decoder::new(mode.bits(), bytes, DecoderOptions::NO_INVALID_CHECK);
    if matches!(decoder.decode().mnemonic(), Mnemonic::Verr | Mnemonic::Verw) {
        return true;
    }
    let evex = |window: &[u8]| window[0] == 0x62 && (mode == Mode::Long || window[1] >= 0xc0);
    if bytes.windows(2).take(4).any(evex) {
        return true;
    }
    let opcodes = [0x30..=0x33, 0x41..=0x4b, 0x90..=0x93, 0x98..=0x99];
    let vex = bytes.windows(4).take(4).find_map(|window| match window[0] {
        0xc5 => Some(window[2]),
        0xc4 => Some(window[3]),
        _ => None,
    });
    vex.is_some_and(|opcode| opcodes.iter().any(|range| range.contains(&opcode)))
}

impl<'a> Generator<'a> {
    fn new(plan: &Plan<'a>, seed: u64, encoder: &'a mut Encoder) -> Self {
        Generator {
            rng: Random::new(seed),
            mode: plan.mode,
            // 64-bit programs cannot run on the other.
            kernel: if plan.mode == Mode::Long || seed & 1 == 0 { Kernel::Long } else { Kernel::Protected },
            writable: plan.mode != Mode::Segmented16 && seed & 6 == 0,
            family: plan.family,
            codes: plan.codes,
            limits: plan.limits,
            places: plan.places,
            only: plan.only,
            items: Vec::new(),
            state: State::default(),
            joins: Vec::new(),
            info: InstructionInfoFactory::new(),
            encoder,
            ended: false,
            branches: false,
        }
    }

    fn finish(self, input: Box<Input>, code_at: u32) -> Program {
        Program {
            mode: self.mode,
            kernel: self.kernel,
            writable: self.writable,
            items: self.items,
            undefined: Vec::new(),
            code_at,
            branches: self.branches,
            input,
            starts: Vec::new(),
        }
    }
}

impl Generator<'_> {
    fn make(mut self) -> Program {
        let mut input = Input::new();
        self.start(&mut input);
        let groups = 8 + self.rng.below(25);
        for _ in 0..groups {
            self.settle(false);
            self.group();
            if self.ended {
                break;
            }
        }
        self.settle(true);
        let code_at = self.place();
        self.finish(input, code_at)
    }

    /// Where the code goes: anywhere, across the boundary of its two pages, or over the end of the second.
    fn place(&mut self) -> u32 {
        let at = match self.rng.below(20) {
            0..8 => self.rng.below(PAGE),
            8..19 => PAGE - 1 - self.rng.below(80),
            // A far call over the end of its segment faults, but processors of AMD have written to the stack by then.
            _ if self
                .items
                .iter()
                .any(|item| item.instruction.is_call_far() || item.instruction.is_call_far_indirect()) =>
            {
                0
            }
            _ => 2 * PAGE - 1 - self.rng.below(64),
        };
        at as u32
    }

    /// Chooses the registers that the program starts with.
    fn start(&mut self, input: &mut Input) {
        let count = if self.mode == Mode::Long { 16 } else { 8 };
        let mask = if self.mode == Mode::Long { u64::MAX } else { 0xffff_ffff };
        let (data, stack) = match self.mode {
            Mode::Segmented16 => (0, 0),
            _ => (DATA, STACK),
        };
        for (r, value) in input.gpr.iter_mut().enumerate().take(count) {
            *value = match self.rng.below(20) {
                _ if r == 4 => stack + PAGE / 2 + 8 * self.rng.below(64),
                _ if r == 5 && self.rng.below(2) == 0 => stack + PAGE / 2 + 8 * self.rng.below(64),
                0..6 => data + self.rng.below(DATA_LEN as u64),
                6 => data + PAGE - self.rng.below(16),
                7..9 => self.rng.below(64),
                _ => self.rng.value(),
            } & mask;
            self.state.known[r] = Some(*value);
        }
        input.selectors = self.mode.selectors(self.limits.ldt);
        self.state.selectors = input.selectors.map(Some);
        (self.state.fs_base, self.state.gs_base) = (Some(FS_BASE), Some(GS_BASE));
        input.rflags = 0x202 | self.rng.next() & 0x8d5;
        if self.rng.permille(150) {
            input.rflags |= 0x400;
        }
        self.state.direction = Some(input.rflags & 0x400 != 0);
        input.image = self.rng.below(IMAGES as u64) as u16;
        if matches!(self.family, Family::Simd | Family::X87) {
            input.use_xsave = 1;
            let registers = if self.mode == Mode::Long { 32 } else { 8 };
            self.places.randomise(&mut input.xsave, &mut self.rng, registers);
        }
    }

    /// One instruction of the encodings to be tested, with what it needs.
    fn group(&mut self) {
        const REWRITES: u64 = 40;
        if self.writable && self.only.is_none() && self.rng.permille(REWRITES) {
            return self.rewrite_code();
        }
        const FAULTS: u64 = 6;
        const INVALID_LOCKS: u64 = 2;
        if self.family == Family::Integer && self.only.is_none() && self.rng.permille(INVALID_LOCKS) {
            return self.invalid_lock();
        }
        let faults = !self.codes.fault.is_empty() && self.rng.permille(FAULTS);
        let code = match self.only {
            Some(code) if self.rng.permille(700) => code,
            _ if faults => self.rng.pick(&self.codes.fault),
            _ => self.completing(),
        };
        self.instruction(code);
        if self.codes.fault.contains(&code) {
            self.ended = true;
        }
    }

    /// An encoding that can complete; seldom one that cuts the instruction pointer to 16 bits, which ends the program.
    fn completing(&mut self) -> Code {
        let code = self.rng.pick(&self.codes.complete);
        if self.mode != Mode::Segmented16 && special::cuts_pointer(code) && !self.rng.permille(50) {
            return self.rng.pick(&self.codes.complete);
        }
        code
    }

    /// Lets branches whose time has come, or all of them, go to the next instruction.
    fn settle(&mut self, all: bool) {
        let next = self.items.len();
        let mut waiting = std::mem::take(&mut self.joins);
        waiting.retain_mut(|join| {
            join.due = join.due.saturating_sub(1);
            if join.due != 0 && !all {
                return true;
            }
            self.state.merge(&join.state);
            if let Some(n) = self.items[join.branch].target.item() {
                *n = next;
            }
            false
        });
        self.joins = waiting;
    }

    /// Notes that `branch` may jump a few groups ahead, with the state of now.
    fn join_ahead(&mut self, branch: usize) {
        let due = 1 + self.rng.below(4);
        self.joins.push(Join { branch, due, state: self.state.clone() });
        self.branches = true;
    }

    /// Appends an instruction, after defining the flags that it reads.
    fn emit(&mut self, instruction: Instruction, target: Target) {
        if self.state.undefined & flags::read(&instruction) != 0 {
            self.define_flags();
        }
        let mut item = Item::new(instruction, target);
        if target == Target::None && self.rng.permille(60) {
            self.add_prefixes(&mut item);
        }
        self.push(item);
    }

    fn push(&mut self, item: Item) {
        self.items.push(item);
        self.state.after(&item.instruction, self.mode, &mut self.info);
    }

    /// CMP of registers gives all flags a value.
    fn define_flags(&mut self) {
        let (a, b) = (self.rng.below(8) as u32, self.rng.below(8) as u32);
        let compare = match self.mode {
            Mode::Long => Instruction::with2(Code::Cmp_rm64_r64, Register::RAX + a, Register::RAX + b),
            _ => Instruction::with2(Code::Cmp_r32_rm32, Register::EAX + a, Register::EAX + b),
        };
        self.push(Item::new(compare.expect("CMP takes two registers"), Target::None));
    }

    /// Puts redundant prefixes in front of an instruction, if it stays what it is.
    fn add_prefixes(&mut self, item: &mut Item) {
        // All but LOCK.
        const REDUNDANT: &[u8] = PREFIXES.split_at(10).0;
        let count = 1 + self.rng.below(2) as usize;
        let mut prefixes = [0; 3];
        for prefix in &mut prefixes[..count] {
            *prefix = match self.mode {
                Mode::Long if self.rng.below(3) == 0 => 0x40 + self.rng.below(16) as u8,
                _ => self.rng.pick(REDUNDANT),
            };
        }
        let Some(plain) = self.encoded(&item.instruction, &[]) else { return };
        let Some(prefixed) = self.encoded(&item.instruction, &prefixes[..count]) else { return };
        let (a, b) = (self.decode(&plain, 0), self.decode(&prefixed, 0));
        if b.len() == prefixed.len() && track::same_meaning(&a, &b, self.mode) {
            item.prefixes = prefixes;
            item.prefix_count = count as u8;
        }
    }

    /// Bytes in the shape of code, as many as the longest instruction has.
    fn random_code(&mut self) -> [u8; 15] {
        let mut bytes = [0; 15];
        self.rng.fill(&mut bytes);
        let mut at = self.rng.below(3) as usize;
        for prefix in &mut bytes[..at] {
            *prefix = self.rng.pick(&PREFIXES);
        }
        if self.mode == Mode::Long && self.rng.below(3) == 0 {
            bytes[at] = 0x40 | bytes[at] & 0xf;
            at += 1;
        }
        match self.rng.below(9) {
            0..4 => bytes[at] = 0x0f,
            4 => bytes[at..at + 2].copy_from_slice(&[0x0f, 0x38]),
            5 => bytes[at..at + 2].copy_from_slice(&[0x0f, 0x3a]),
            6 => bytes[at] = self.rng.pick(&[0xc4, 0xc5]),
            _ => {}
        }
        bytes
    }

    /// LOCK where it is not allowed: #UD.
    fn invalid_lock(&mut self) {
        let code = self.rng.pick(&self.codes.complete);
        let Some(instruction) = self.build(code) else { return };
        let Some(bytes) = self.encoded(&instruction, &[0xf0]) else { return };
        // Some processors of AMD let it pass in front of VERR and VERW.
        let lenient = matches!(instruction.mnemonic(), Mnemonic::Verr | Mnemonic::Verw);
        if lenient || !self.decode(&bytes, 0).is_invalid() {
            return;
        }
        let mut item = Item::new(instruction, Target::None);
        (item.prefixes[0], item.prefix_count) = (0xf0, 1);
        self.push(item);
        self.ended = true;
    }

    fn encoded(&mut self, instruction: &Instruction, prefixes: &[u8]) -> Option<Vec<u8>> {
        self.encoder.set_buffer(prefixes.to_vec());
        let at = self.address_for_encoding() + prefixes.len() as u64;
        self.encoder.encode(instruction, at).ok()?;
        Some(self.encoder.take_buffer())
    }

    /// An address close enough to the final one for relative operands.
    fn address_for_encoding(&self) -> u64 {
        let area = if self.writable { WRITABLE_CODE } else { CODE };
        area - self.mode.code_base()
    }

    fn decode(&self, bytes: &[u8], at: u64) -> Instruction {
        Decoder::with_ip(self.mode.bits(), bytes, self.address_for_encoding() + at, decoder_options()).decode()
    }
}
