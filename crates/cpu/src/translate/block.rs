//! One block: decoded forward, looked through backward for live flags, emitted forward.

use iced_x86::{ConstantOffsets, Instruction, InstructionInfoFactory};

use super::asm::{Asm, Fixup, Mem, reg::*};
use super::classify::{How, classify};
use super::{Site, SiteKind, liveness};
use crate::decode::{self, Flow, Mode, Op};
use crate::jit::context::at;
use crate::jit::trampoline::Trampolines;

/// Longest block, in instructions.
const MAX_INSTRUCTIONS: usize = 64;
/// How far behind a block's end the flags' fate is looked for, in instructions.
const LOOKAHEAD: usize = 8;

/// What is to be translated, and where to.
pub(crate) struct Request<'a> {
    /// From the first instruction to the end of its page; or, for an instruction that crosses into the next page, its bytes.
    pub(crate) bytes: &'a [u8],
    /// The whole page, for looking at branch targets.
    pub(crate) page: &'a [u8],
    /// Offset of the first instruction in its page.
    pub(crate) start: u32,
    pub(crate) crossing: bool,
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
}

/// A translated block.
pub(crate) struct Translation {
    pub(crate) code: Vec<u8>,
    /// Arena offset of the entry for branches inside the page; looked-up branches enter at the start.
    pub(crate) direct: u32,
    pub(crate) sites: Vec<Site>,
    /// Guest instructions in it.
    pub(crate) instructions: u32,
    /// Arithmetic flags (RFLAGS bits) that are right at its end, whichever way it is left.
    pub(crate) defined: u64,
}

/// A decoded instruction.
pub(super) struct Insn {
    pub(super) instruction: Instruction,
    pub(super) offsets: ConstantOffsets,
    /// Range in [`Request::bytes`].
    pub(super) at: usize,
    /// Offset in the page of the instruction, and of the one behind it.
    pub(super) start: u32,
    pub(super) next: u32,
    pub(super) op: Op,
    pub(super) how: How,
    /// It ends its block.
    pub(super) ends: bool,
    /// Flags live before it.
    pub(super) live: u32,
}

struct Stub {
    from: Fixup,
    trampoline: u32,
    kind: SiteKind,
    /// Index into `resumes` for operations that go on behind themselves.
    resume: Option<usize>,
}

/// State of a translation.
pub(crate) struct Translator<'a> {
    pub(super) asm: Asm,
    pub(super) bytes: &'a [u8],
    pub(super) access: usize,
    pub(super) trampolines: Trampolines,
    pub(super) fast_pext: bool,
    /// The vector registers are loaded from here on.
    pub(super) vectors_ready: bool,
    pub(super) info: InstructionInfoFactory,
    stubs: Vec<Stub>,
    /// Arena offset behind each instruction.
    resumes: Vec<u32>,
    current: usize,
    sites: Vec<Site>,
    first_site: u32,
    block: u32,
}

/// Translates a block; `None` if its first instruction is not whole in `bytes`, or nothing can run natively when checking.
pub(crate) fn translate(request: &Request<'_>, host_alu: &mut crate::interp::hostalu::HostAlu) -> Option<Translation> {
    let (mut insns, complete) = decode_block(request, host_alu);
    let last = insns.last()?;
    let end_live = if complete { exit_liveness(last, request) } else { flags_at(i64::from(last.next), request) };
    let mut live = end_live;
    for insn in insns.iter_mut().rev() {
        live = match insn.how {
            How::Interpret => liveness::ALL,
            _ => liveness::before(&insn.instruction, live),
        };
        insn.live = live;
    }
    let undefined = insns.iter().fold(0, |undefined, insn| {
        undefined & !liveness::overwritten(&insn.instruction) | insn.instruction.rflags_undefined()
    });
    let mut translator = Translator {
        asm: Asm::new(request.arena),
        bytes: request.bytes,
        access: request.access,
        trampolines: request.trampolines,
        fast_pext: request.fast_pext,
        vectors_ready: false,
        info: InstructionInfoFactory::new(),
        stubs: Vec::new(),
        resumes: Vec::new(),
        current: 0,
        sites: Vec::new(),
        first_site: request.first_site,
        block: request.block,
    };
    let direct = translator.emit(request.start, &insns, complete);
    let (code, sites) = translator.finish();
    Some(Translation {
        code,
        direct,
        sites,
        instructions: insns.len() as u32,
        defined: rflags_of(end_live & !undefined),
    })
}

/// Decodes up to the end of the block; whether its last instruction ends it by itself.
fn decode_block(request: &Request<'_>, host_alu: &mut crate::interp::hostalu::HostAlu) -> (Vec<Insn>, bool) {
    let mut insns = Vec::new();
    let mut at = 0;
    let limit = if request.crossing { 1 } else { MAX_INSTRUCTIONS };
    while at < request.bytes.len() && insns.len() < limit {
        let window = &request.bytes[at..request.bytes.len().min(at + 15)];
        let Some(decoded) = decode::decode_full(window, request.mode, request.features, host_alu) else { break };
        let (instruction, offsets, op, flow) = decoded;
        let start = request.start + at as u32;
        let next = start + u32::from(op.len);
        let how = classify(&instruction, &op, flow, next, request.vectors);
        if request.checking && how == How::Interpret {
            break;
        }
        let ends = flow == Flow::End || changes_access(&instruction);
        insns.push(Insn { instruction, offsets, at, start, next, op, how, ends, live: liveness::ALL });
        at += usize::from(op.len);
        if ends {
            return (insns, true);
        }
    }
    (insns, false)
}

/// Instructions that go on in the same block of the interpreter, but under another access mode.
fn changes_access(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), iced_x86::Mnemonic::Stac | iced_x86::Mnemonic::Clac)
}

/// Flags live behind the last instruction of a block.
fn exit_liveness(last: &Insn, request: &Request<'_>) -> u32 {
    if last.how != How::Branch {
        return liveness::ALL;
    }
    let target = i64::from(last.next).wrapping_add(last.op.imm as i64);
    match last.instruction.op0_kind() {
        iced_x86::OpKind::NearBranch64 if last.instruction.is_jmp_short_or_near() => flags_at(target, request),
        iced_x86::OpKind::NearBranch64 if last.instruction.mnemonic() != iced_x86::Mnemonic::Call => {
            flags_at(target, request) | flags_at(i64::from(last.next), request)
        }
        iced_x86::OpKind::NearBranch64 => flags_at(target, request),
        _ => liveness::ALL,
    }
}

/// Flags live at an offset of the page, as far as a short look tells.
fn flags_at(offset: i64, request: &Request<'_>) -> u32 {
    let Some(bytes) = usize::try_from(offset).ok().and_then(|offset| request.page.get(offset..)) else {
        return liveness::ALL;
    };
    let options = iced_x86::DecoderOptions::NONE;
    let mut decoder = iced_x86::Decoder::with_ip(request.mode.code_bits(), bytes, offset as u64, options);
    let (mut live, mut open) = (0, liveness::ALL);
    let mut instruction = Instruction::default();
    for _ in 0..LOOKAHEAD {
        decoder.decode_out(&mut instruction);
        let plain = !instruction.is_invalid()
            && instruction.flow_control() == iced_x86::FlowControl::Next
            && super::classify::is_native(&instruction, request.vectors);
        if !plain {
            break;
        }
        live |= instruction.rflags_read() & open;
        open &= !liveness::overwritten(&instruction);
        if open == 0 {
            break;
        }
    }
    live | open
}

/// iced's flag bits as bits of RFLAGS.
pub(crate) fn rflags_of(bits: u32) -> u64 {
    use iced_x86::RflagsBits as B;
    use platform::x86::rflags as R;
    [(B::OF, R::OF), (B::SF, R::SF), (B::ZF, R::ZF), (B::AF, R::AF), (B::CF, R::CF), (B::PF, R::PF)]
        .into_iter()
        .filter(|(bit, _)| bits & bit != 0)
        .fold(0, |all, (_, bit)| all | bit)
}

impl Translator<'_> {
    fn emit(&mut self, start: u32, insns: &[Insn], complete: bool) -> u32 {
        // Looked-up branches come with the linear address in R15: LEA with a 32-bit displacement, so that this entry is
        // always long enough to be overwritten by a call when the block is dropped.
        self.asm.put(&[0x4d, 0x8d, 0xbf]);
        self.asm.u32(start.wrapping_neg());
        self.asm.store(&Mem::context(at!(page)), R15);
        let direct = self.asm.here();
        for (i, insn) in insns.iter().enumerate() {
            self.current = i;
            self.instruction(insn);
            self.resumes.push(self.asm.here());
        }
        if let (false, Some(last)) = (complete, insns.last()) {
            self.fall_through(last);
        }
        direct
    }

    fn fall_through(&mut self, last: &Insn) {
        self.go_to(last, i64::from(last.next));
    }

    fn instruction(&mut self, insn: &Insn) {
        match insn.how {
            How::Interpret => self.interpret(insn),
            How::Branch => self.branch(insn),
            How::Push => self.push(insn),
            How::Pop => self.pop(insn),
            How::Leave => self.leave(insn),
            How::Nothing => {}
            How::Copy => {
                let bytes = self.bytes;
                self.asm.put(&bytes[insn.at..insn.at + usize::from(insn.op.len)]);
            }
            How::Lea => self.lea(insn),
            How::MovImmediate => self.mov_immediate(insn),
            How::Bswap => self.bswap(insn),
            How::Rewrite => self.rewrite(insn),
            How::Vector => self.vector(insn),
        }
    }

    /// Calls the interpreter for one instruction.
    fn interpret(&mut self, insn: &Insn) {
        self.asm.call(self.trampolines.op);
        self.asm.u32(self.first_site + self.sites.len() as u32);
        let kind = self.op_site(insn, false);
        let resume = self.asm.here();
        self.site(kind, Some(resume));
    }

    fn op_site(&self, insn: &Insn, memory: bool) -> SiteKind {
        SiteKind::Op { op: insn.op, start: insn.start, resume: 0, ends: insn.ends, memory }
    }

    fn site(&mut self, mut kind: SiteKind, behind: Option<u32>) {
        if let (SiteKind::Op { resume, .. }, Some(behind)) = (&mut kind, behind) {
            *resume = behind;
        }
        self.sites.push(Site { kind, access: self.access as u8, block: self.block });
    }

    /// Lets a forward jump lead to the interpreter running `insn`.
    pub(super) fn slow_path(&mut self, insn: &Insn, from: Fixup, memory: bool) {
        let kind = self.op_site(insn, memory);
        let resume = Some(self.current);
        self.stubs.push(Stub { from, trampoline: self.trampolines.op, kind, resume });
    }

    /// Lets a forward jump lead to a trampoline.
    pub(super) fn stub(&mut self, from: Fixup, trampoline: u32, kind: SiteKind) {
        self.stubs.push(Stub { from, trampoline, kind, resume: None });
    }

    fn finish(mut self) -> (Vec<u8>, Vec<Site>) {
        for stub in std::mem::take(&mut self.stubs) {
            self.asm.bind(stub.from);
            self.asm.call(stub.trampoline);
            let number = self.first_site + self.sites.len() as u32;
            self.asm.u32(number);
            let behind = stub.resume.and_then(|i| self.resumes.get(i).copied());
            self.site(stub.kind, behind);
        }
        (self.asm.bytes, self.sites)
    }
}
