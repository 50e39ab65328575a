//! One block: what is needed to emit it, and in what order that is done.

use iced_x86::{ConstantOffsets, Instruction, InstructionInfoFactory};

use super::ahead::{self, Body, Second};
use super::asm::{Asm, Fixup, Mem, reg::*};
use super::classify::How;
use super::course::{Course, decode_block, unroll};
use super::held::Held;
use super::loose::{self, Recovery};
use super::memory::Retry;
use super::rewrite::{named_registers, number};
use super::share::{self, Shared};
use super::{Site, SiteKind, resident, system};
use crate::decode::{Mode, Op};
use crate::jit::context::at;
use crate::jit::trampoline::{LEAVE, Trampolines, leave};

/// What is to be translated, and where to.
pub(crate) struct Request<'a> {
    /// The whole page.
    pub(crate) page: &'a [u8],
    /// For an instruction that crosses into the next page, its bytes.
    pub(crate) joined: Option<&'a [u8]>,
    /// Offset of the first instruction in its page.
    pub(crate) start: u32,
    /// If not 0: the block has so many instructions, and every access has its own check.
    pub(crate) alone: u8,
    pub(crate) mode: Mode,
    /// Index of the access mode.
    pub(crate) access: usize,
    pub(crate) features: &'a crate::Features,
    pub(crate) arena: u32,
    pub(crate) trampolines: Trampolines,
    pub(crate) first_site: u32,
    pub(crate) block: u32,
    pub(crate) fast_pext: bool,
    /// See [`super::vector::level`].
    pub(crate) vectors: u8,
    /// Native instructions only, to be compared with the interpreter.
    pub(crate) checking: bool,
    /// Some of its bits are built into code: see [`super::system::BUILT_IN`].
    pub(crate) cr4: u64,
    /// The time-stamp counter is the host's.
    pub(crate) host_counter: bool,
    /// The CPU notes the operands of x87 instructions always, not only for exceptions.
    pub(crate) notes_operands: bool,
}

impl<'a> Request<'a> {
    pub(super) fn bytes(&self) -> &'a [u8] {
        self.joined.unwrap_or(self.page)
    }
}

/// A translated block.
pub(crate) struct Translation {
    pub(crate) code: Vec<u8>,
    /// Arena offset of the entry for branches inside the page; looked-up branches enter at the start.
    pub(crate) direct: u32,
    pub(crate) sites: Vec<Site>,
    pub(crate) course: Course,
    /// The entry for the return from its call.
    pub(crate) landing: Option<Landing>,
}

/// Where the host's prediction expects the return from a call: an entry for looked-up branches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Landing {
    /// Offset in the page of the instruction behind the call.
    pub(crate) offset: u32,
    /// Arena offset.
    pub(crate) entry: u32,
    /// Access mode of the call.
    pub(crate) access: u8,
}

/// A decoded instruction.
#[derive(Clone)]
pub(super) struct Insn {
    pub(super) instruction: Instruction,
    pub(super) offsets: ConstantOffsets,
    /// Where its bytes are in the page, or in [`Request::joined`].
    pub(super) at: usize,
    /// Offset in the page of the instruction, and of the one behind it.
    pub(super) start: u32,
    pub(super) next: u32,
    pub(super) op: Op,
    pub(super) how: How,
    /// Offset of the one that is run after it in the block.
    pub(super) leads_to: u32,
    /// It ends its block.
    pub(super) ends: bool,
    /// Behind a jump back that the block has followed.
    pub(super) turned: bool,
    /// It branches to the start of its block, and the code for that follows.
    pub(super) again: bool,
    /// The groups of its accesses, to its memory operand and to the stack.
    pub(super) operand: Option<Shared>,
    pub(super) stack: Option<Shared>,
    /// Its check need not keep the flags: they can be had back like this.
    pub(super) recovery: Option<Recovery>,
}

impl Insn {
    /// Offset in the page of a direct branch's target, which may lie outside of it.
    pub(super) fn target(&self) -> i64 {
        i64::from(self.next).wrapping_add(self.op.imm as i64)
    }
}

/// A branch to code at the block's end.
struct Exit {
    from: Fixup,
    /// Index of its instruction, and the access mode there.
    insn: usize,
    access: usize,
    /// Offset relative to the page.
    target: i64,
}

struct Stub {
    from: Fixup,
    trampoline: u32,
    kind: SiteKind,
    access: usize,
    x87: bool,
    /// What the vCPU is to be told first.
    x87_last: Option<super::x87::Last>,
    /// Index into `resumes` for operations that go on behind themselves.
    resume: Option<usize>,
    /// What is done first.
    retry: Option<Retry>,
    recovery: Option<Recovery>,
    /// What was checked ahead holds for this iteration only.
    last_iteration: bool,
}

/// State of a translation.
pub(crate) struct Translator<'a> {
    pub(super) asm: Asm,
    pub(super) bytes: &'a [u8],
    page: &'a [u8],
    bitness: u32,
    /// Not 64-bit mode: addresses and stack words have 32 bits.
    pub(super) legacy: bool,
    /// Index of the access mode in force here.
    pub(super) access: usize,
    pub(super) cr4: u64,
    pub(super) notes_operands: bool,
    pub(super) trampolines: Trampolines,
    pub(super) fast_pext: bool,
    /// The vector registers are loaded from here on.
    pub(super) vectors_ready: bool,
    /// The x87 registers are there from here on.
    pub(super) x87_ready: bool,
    /// The last x87 instruction, as far as the vCPU does not have it yet.
    pub(super) x87_last: Option<super::x87::Last>,
    pub(super) info: InstructionInfoFactory,
    /// The group whose distance to the host address is in R14.
    pub(super) addend: Option<u16>,
    /// What the other scratch registers hold.
    pub(super) held: Held,
    /// Guest RSP is R13 and so much more.
    pub(super) stack_moved: i32,
    /// Guest registers without a host register of their own that each instruction names, one bit for each.
    pub(super) uses: Vec<u16>,
    /// Offset of the first instruction in the page, and arena offset of its code.
    start: u32,
    direct: u32,
    pub(super) landing: Option<Landing>,
    /// A branch to the first instruction need not leave emitted code.
    pub(super) may_loop: bool,
    /// See [`ahead`]: which version of the block is being emitted, where the first instruction of it and the check are, and
    /// jumps to the check.
    pub(super) body: Body,
    pub(super) direct_again: u32,
    pub(super) checks_at: u32,
    pub(super) to_check: Vec<Fixup>,
    /// Instructions of the block, and the index of the last vector instruction.
    count: usize,
    /// Instructions of one copy of an unrolled loop, or all.
    period: usize,
    pub(super) last_vector: usize,
    exits: Vec<Exit>,
    stubs: Vec<Stub>,
    /// Arena offset behind each instruction, and what is held there; the index of the first one of the version that is being
    /// emitted.
    pub(super) resumes: Vec<(u32, Held)>,
    pub(super) first_resume: usize,
    pub(super) current: usize,
    sites: Vec<Site>,
    first_site: u32,
    block: u32,
}

/// Translates a block; `None` if its first instruction is not whole in its page, or nothing can run natively when checking.
pub(crate) fn translate(request: &Request<'_>, host_alu: &mut crate::interp::hostalu::HostAlu) -> Option<Translation> {
    let (mut insns, complete) = decode_block(request, host_alu);
    if let Some(last) = insns.last_mut().filter(|last| !complete && system::casts_shadow(&last.instruction)) {
        // What it holds off for one instruction must not happen at the block's end.
        (last.how, last.ends) = (How::Interpret, true);
    }
    insns.last()?;
    let period = insns.len();
    if complete && request.alone == 0 && request.joined.is_none() {
        unroll(&mut insns);
    }
    let mut info = InstructionInfoFactory::new();
    loose::plan(&mut insns, &mut info);
    let legacy = !request.mode.is_64();
    if request.alone == 0 {
        share::plan(&mut insns, &mut info, legacy, false);
    }
    let may_loop = request.alone == 0 && !request.checking;
    let second = may_loop.then(|| ahead::plan(&insns, request.start, &mut info, legacy)).flatten();
    let mut translator = Translator {
        asm: Asm::new(request.arena),
        bytes: request.bytes(),
        page: request.page,
        bitness: request.mode.code_bits(),
        legacy,
        access: request.access,
        cr4: request.cr4,
        notes_operands: request.notes_operands,
        trampolines: request.trampolines,
        fast_pext: request.fast_pext,
        vectors_ready: false,
        info,
        addend: None,
        held: Held::default(),
        stack_moved: 0,
        uses: insns.iter().map(names_spilled).collect(),
        start: request.start,
        direct: 0,
        landing: None,
        may_loop,
        body: if second.is_some() { Body::First } else { Body::Only },
        direct_again: 0,
        checks_at: 0,
        to_check: Vec::new(),
        count: insns.len(),
        period,
        last_vector: insns.iter().rposition(|insn| insn.how == How::Vector).unwrap_or(0),
        exits: Vec::new(),
        x87_ready: false,
        x87_last: None,
        stubs: Vec::new(),
        resumes: Vec::new(),
        first_resume: 0,
        current: 0,
        sites: Vec::new(),
        first_site: request.first_site,
        block: request.block,
    };
    translator.emit(&insns, complete, second.as_ref());
    let (direct, landing) = (translator.direct, translator.landing);
    let (code, sites) = translator.finish();
    Some(Translation { code, direct, sites, course: Course::new(&insns, period), landing })
}

/// Guest registers without a host register of their own that an instruction names, one bit for each.
fn names_spilled(insn: &Insn) -> u16 {
    let named = named_registers(&insn.instruction).map(number);
    named.filter(|guest| resident(*guest).is_none()).fold(0, |all, guest| all | 1 << guest)
}

impl Translator<'_> {
    fn emit(&mut self, insns: &[Insn], complete: bool, second: Option<&Second>) {
        self.looked_up_entry(self.start);
        self.direct = self.asm.here();
        if second.is_some() {
            self.begin_warm_up();
        }
        self.direct_again = self.asm.here();
        self.run_through(insns);
        if let (false, Some(last)) = (complete, insns.last()) {
            self.fall_through(last);
        }
        self.emit_exits(insns);
        if let Some(second) = second {
            self.second_body(second, self.start);
        }
    }

    /// Emits all instructions.
    pub(super) fn run_through(&mut self, insns: &[Insn]) {
        for (i, insn) in insns.iter().enumerate() {
            self.current = i;
            if insns.get(i + 1).is_some_and(|next| next.how == How::Branch) {
                // Not between a comparison and its branch.
                self.settle_held();
            }
            self.instruction(insn);
            self.resumes.push((self.asm.here(), self.held));
        }
    }

    /// Emits the ways out of the version that was emitted last.
    pub(super) fn emit_exits(&mut self, insns: &[Insn]) {
        self.held = Held::default();
        for exit in std::mem::take(&mut self.exits) {
            self.asm.bind(exit.from);
            self.access = exit.access;
            self.go_to(&insns[exit.insn], exit.target);
        }
    }

    /// Where looked-up branches come in, with the linear address in R15: an offset of the page. LEA with a 32-bit displacement, so
    /// that the entry is always long enough to be overwritten by [`leave`] when the block is dropped.
    pub(super) fn looked_up_entry(&mut self, offset: u32) {
        self.asm.put(&[0x4d, 0x8d, 0xbf]);
        self.asm.u32(offset.wrapping_neg());
        self.asm.store(&Mem::context(at!(page)), R15);
    }

    /// Whether the current instruction is the last of the block.
    pub(super) fn is_last(&self) -> bool {
        self.current + 1 == self.count
    }

    /// Lets a forward jump of the current instruction lead to code that goes on at an offset relative to the page.
    pub(super) fn exit_later(&mut self, jump: Fixup, target: i64) {
        self.exits.push(Exit { from: jump, insn: self.current, access: self.access, target });
    }

    /// The arena offset to jump to for the first instruction, if `target` is that.
    pub(super) fn loops_to(&self, target: u32) -> Option<u32> {
        (self.may_loop && target == self.start).then_some(self.direct_again)
    }

    /// Lets a forward jump lead to the version of the block from `insn` on where every access has its own check.
    pub(super) fn go_alone(&mut self, insn: &Insn, from: Fixup) {
        let alone = (self.period - self.current % self.period) as u8;
        let patch = self.asm.field(from);
        self.stub(from, self.trampolines.link, SiteKind::Link { patch, target: insn.start, alone });
    }

    fn fall_through(&mut self, last: &Insn) {
        self.release_all();
        self.settle_stack();
        self.note_x87();
        self.go_to(last, i64::from(last.leads_to));
    }

    fn instruction(&mut self, insn: &Insn) {
        let x87 = matches!(insn.how, How::X87 | How::Mmx);
        if insn.ends || !x87 && !super::share::touches_registers_only(insn) {
            if self.x87_last.is_some() {
                self.release_all();
            }
            self.note_x87();
        }
        if !super::share::stays(insn.how) {
            self.addend = None;
        }
        if !super::stack::keeps_moved(insn) {
            self.settle_stack();
        }
        match insn.how {
            How::Nothing | How::Copy | How::Lea | How::MovImmediate | How::Bswap | How::Rewrite => {}
            // Only the way on finds them held.
            How::Branch if insn.instruction.is_jcc_short_or_near() && !self.is_last() => self.settle_held(),
            _ => self.release_all(),
        }
        match insn.how {
            How::Interpret => self.interpret(insn),
            How::Branch => self.branch(insn),
            How::Push => self.push(insn),
            How::Pop => self.pop(insn),
            How::Leave => self.leave(insn),
            How::Short => self.short_form(insn),
            How::Nothing => {}
            How::Copy => {
                let bytes = self.bytes;
                self.asm.put(&bytes[insn.at..insn.at + usize::from(insn.op.len)]);
            }
            How::CopyWithCount => {
                let bytes = self.bytes;
                self.asm.mov(RCX, R12);
                self.asm.put(&bytes[insn.at..insn.at + usize::from(insn.op.len)]);
                self.asm.mov(R12, RCX);
            }
            How::Swap => self.swap(insn),
            How::Lea => self.lea(insn),
            How::MovImmediate => self.mov_immediate(insn),
            How::Bswap => self.bswap(insn),
            How::Rewrite => self.rewrite(insn),
            How::Vector => self.vector(insn),
            How::X87 => self.x87(insn),
            How::Mmx => {
                self.want_x87(insn);
                self.vector(insn);
            }
            How::System => self.system(insn),
            How::PushMemory => self.push_memory(insn),
            How::MovOffset => self.mov_offset(insn),
            How::Divide => self.divide(insn),
            How::String if !self.fast_pext => self.interpret(insn),
            How::String => self.string(insn),
            How::ExchangeWide => self.exchange_wide(insn),
            How::BitString => self.bit_string(insn),
        }
    }

    /// Whether the instruction at an offset of the page reaches into the next one.
    pub(super) fn crosses(&self, offset: usize) -> bool {
        let Some(bytes) = self.page.get(offset..).filter(|bytes| bytes.len() < 15) else { return false };
        let mut decoder = iced_x86::Decoder::new(self.bitness, bytes, iced_x86::DecoderOptions::NONE);
        decoder.decode().is_invalid() && decoder.last_error() == iced_x86::DecoderError::NoMoreBytes
    }

    /// Calls the interpreter for one instruction.
    fn interpret(&mut self, insn: &Insn) {
        self.note_x87();
        self.x87_ready = false;
        let resume = self.asm.here() + LEAVE;
        let site = self.op_site(insn, false, resume);
        self.leave_here(self.trampolines.op, site);
        self.addend = None;
    }

    /// Leaves by a trampoline: [`LEAVE`] bytes.
    pub(super) fn leave_here(&mut self, trampoline: u32, kind: SiteKind) {
        leave(&mut self.asm, trampoline, self.first_site + self.sites.len() as u32);
        self.site(kind);
    }

    fn op_site(&self, insn: &Insn, memory: bool, resume: u32) -> SiteKind {
        let vectors = self.vectors_ready && self.current < self.last_vector;
        let code = insn.instruction.code();
        SiteKind::Op { op: insn.op, start: insn.start, resume, ends: insn.ends, memory, vectors, code }
    }

    fn site(&mut self, kind: SiteKind) {
        self.sites.push(Site { kind, access: self.access as u8, block: self.block, x87: self.x87_ready });
    }

    /// Lets a forward jump lead to the interpreter running `insn`.
    pub(super) fn slow_path(&mut self, insn: &Insn, from: Fixup, memory: bool) {
        let kind = self.op_site(insn, memory, 0);
        let resume = Some(self.first_resume + self.current);
        let last_iteration = self.body == Body::Second;
        let (trampoline, access, x87) = (self.trampolines.op, self.access, self.x87_ready);
        let x87_last = self.x87_last;
        self.stubs.push(Stub {
            from,
            trampoline,
            kind,
            access,
            x87,
            x87_last,
            resume,
            retry: None,
            recovery: None,
            last_iteration,
        });
    }

    /// Lets the stub that was made last try once more first, and work the flags out.
    pub(super) fn complete_stub(&mut self, retry: Option<Retry>, recovery: Option<Recovery>) {
        if let Some(stub) = self.stubs.last_mut() {
            (stub.retry, stub.recovery) = (retry, recovery);
        }
    }

    /// Lets a forward jump lead to a trampoline.
    pub(super) fn stub(&mut self, from: Fixup, trampoline: u32, kind: SiteKind) {
        let access = self.access;
        self.stubs.push(Stub {
            from,
            trampoline,
            kind,
            access,
            x87: false,
            x87_last: None,
            resume: None,
            retry: None,
            recovery: None,
            last_iteration: false,
        });
    }

    fn finish(mut self) -> (Vec<u8>, Vec<Site>) {
        for mut stub in std::mem::take(&mut self.stubs) {
            self.asm.bind(stub.from);
            if let Some(retry) = &stub.retry {
                self.try_again(retry, &mut stub.kind);
            }
            if let Some(recovery) = &stub.recovery {
                self.recover_flags(recovery);
                if let SiteKind::Link { patch, .. } = &mut stub.kind {
                    let on = self.asm.jmp_forward();
                    *patch = self.asm.field(on);
                    self.asm.bind(on);
                }
            }
            let behind = stub.resume.and_then(|i| self.resumes.get(i).copied());
            (self.access, self.x87_ready) = (stub.access, stub.x87);
            if stub.x87_last.is_some() {
                self.x87_last = stub.x87_last;
                self.note_x87_keeping_address();
            }
            let held = behind.map(|(_, held)| held).filter(|held| !held.is_empty());
            if let (SiteKind::Op { resume, .. }, Some((behind, _))) = (&mut stub.kind, behind) {
                *resume = if held.is_some() { self.asm.here() + LEAVE } else { behind };
            }
            if stub.last_iteration {
                ahead::set_left(&mut self.asm, 1);
            }
            self.leave_here(stub.trampoline, stub.kind);
            if let (Some(held), Some((behind, _))) = (held, behind) {
                held.reload(&mut self.asm);
                self.asm.jmp(behind);
            }
        }
        (self.asm.bytes, self.sites)
    }
}
