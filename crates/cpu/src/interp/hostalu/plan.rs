//! What an instruction reads and writes, and its rewritten form.

use iced_x86::{
    EncodingKind, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register,
    RflagsBits, RoundingControl,
};

use super::super::fpu::FpuState;

/// The flags of RFLAGS among what iced tracks (it also tracks the x87 condition codes).
const ARITHMETIC: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Which enabling conditions apply, and which registers there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    X87,
    Mmx,
    Sse,
    /// Legacy SSE with an MMX operand.
    SseMmx,
    Avx,
    Avx512,
}

/// What happens to the memory operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Memory {
    None,
    Load,
    Store,
}

/// One register that the instruction uses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Use {
    pub(super) number: u8,
    /// Bytes that take part; 8 for an opmask.
    pub(super) size: u8,
    pub(super) load: bool,
    pub(super) store: bool,
}

/// The stub of one instruction.
pub(super) struct Plan {
    pub(super) class: Class,
    /// Memory operand `[RDI + bounce]`, general-purpose operand EAX or RAX.
    pub(super) instruction: Instruction,
    pub(super) vectors: Vec<Use>,
    pub(super) opmasks: Vec<Use>,
    /// Guest numbers of the general-purpose operand where it is read and where it is written.
    pub(super) gpr_in: Option<u8>,
    pub(super) gpr_out: Option<u8>,
    /// PCMPESTRI, PCMPESTRM: RAX and RDX are read.
    pub(super) lengths: bool,
    /// PCMPESTRI, PCMPISTRI: RCX is written.
    pub(super) index: bool,
    pub(super) memory: Memory,
    /// Depends on MXCSR and may set flags in it.
    pub(super) uses_mxcsr: bool,
    /// Suppresses all exceptions, as if MXCSR masked them.
    pub(super) silent: bool,
    /// Has results that it may round, so that they can be tiny.
    pub(super) underflows: bool,
    pub(super) reads_flags: bool,
    pub(super) writes_flags: bool,
}

impl Plan {
    /// `None`: not an instruction that the host can run alone.
    pub(super) fn new(original: &Instruction, factory: &mut InstructionInfoFactory) -> Option<Self> {
        let class = class(original)?;
        let name = name(original);
        let mut plan = Self {
            class,
            instruction: *original,
            vectors: Vec::new(),
            opmasks: Vec::new(),
            gpr_in: None,
            gpr_out: None,
            lengths: name.contains("pcmpestr"),
            index: name.contains("pcmpestri") || name.contains("pcmpistri"),
            memory: Memory::None,
            uses_mxcsr: uses_mxcsr(&name),
            silent: original.suppress_all_exceptions()
                || original.rounding_control() != RoundingControl::None
                || approximates(&name),
            underflows: underflows(&name),
            reads_flags: original.rflags_read() & ARITHMETIC != 0,
            writes_flags: original.rflags_modified() & ARITHMETIC != 0,
        };
        plan.rewrite_memory();
        let info = factory.info_options(&plan.instruction, InstructionInfoOptions::NO_MEMORY_USAGE);
        for register in info.used_registers() {
            plan.note_register(register.register(), register.access());
        }
        for i in 0..original.op_count() {
            plan.note_operand(i, info.op_access(i))?;
        }
        if plan.index {
            plan.gpr_out = Some(platform::x86::gpr::RCX as u8);
        }
        Some(plan)
    }

    fn rewrite_memory(&mut self) {
        let instruction = &mut self.instruction;
        instruction.set_code_size(iced_x86::CodeSize::Code64);
        for prefix in [Instruction::set_has_rep_prefix, Instruction::set_has_repne_prefix] {
            prefix(instruction, false);
        }
        if instruction.op_kinds().any(|kind| kind == OpKind::Memory) {
            instruction.set_segment_prefix(Register::None);
            instruction.set_memory_base(Register::RDI);
            instruction.set_memory_index(Register::None);
            instruction.set_memory_index_scale(1);
            instruction.set_memory_displacement64(std::mem::offset_of!(FpuState, bounce) as u64);
            instruction.set_memory_displ_size(0);
        }
    }

    fn note_register(&mut self, register: Register, access: OpAccess) {
        use OpAccess as A;
        let written = matches!(access, A::Write | A::CondWrite | A::ReadWrite | A::ReadCondWrite);
        let (list, size) = match register {
            r if r.is_vector_register() => (&mut self.vectors, r.size() as u8),
            r if r.is_k() => (&mut self.opmasks, 8),
            _ => return,
        };
        // Legacy encodings may write a part of the register only, whatever the table says.
        let load = access != A::Write || self.instruction.encoding() == EncodingKind::Legacy;
        let number = register.number() as u8;
        match list.iter_mut().find(|entry| entry.number == number) {
            Some(entry) => {
                entry.size = entry.size.max(size);
                entry.load |= load;
                entry.store |= written;
            }
            None => list.push(Use { number, size, load, store: written }),
        }
    }

    fn note_operand(&mut self, i: u32, access: OpAccess) -> Option<()> {
        use OpAccess as A;
        match self.instruction.op_kind(i) {
            OpKind::Memory => {
                self.memory = match access {
                    A::Read | A::CondRead => Memory::Load,
                    A::Write | A::CondWrite => Memory::Store,
                    _ => return None,
                };
            }
            OpKind::Register => {
                let register = self.instruction.op_register(i);
                if register.is_gpr() {
                    let number = Some(register.number() as u8);
                    let twice = self.gpr_in.is_some() || self.gpr_out.is_some();
                    let replacement = match register.size() {
                        _ if twice => return None,
                        8 => Register::RAX,
                        4 => Register::EAX,
                        _ => return None,
                    };
                    match access {
                        A::Read | A::CondRead => self.gpr_in = number,
                        A::Write | A::CondWrite => self.gpr_out = number,
                        _ => return None,
                    }
                    self.instruction.set_op_register(i, replacement);
                }
            }
            OpKind::Immediate8 | OpKind::Immediate8_2nd => {}
            _ => return None,
        }
        Some(())
    }
}

/// The mnemonic in small letters.
pub(super) fn name(instruction: &Instruction) -> String {
    format!("{:?}", instruction.mnemonic()).to_ascii_lowercase()
}

/// The class of a data instruction.
fn class(instruction: &Instruction) -> Option<Class> {
    use Mnemonic as N;
    use iced_x86::CpuidFeature as F;
    if instruction.is_vsib() || is_special(instruction.mnemonic()) {
        return None;
    }
    let registers = || (0..instruction.op_count()).map(|i| instruction.op_register(i));
    let vector = registers().any(Register::is_vector_register) || is_conversion_to_integer(instruction.mnemonic());
    let opmask = registers().any(Register::is_k);
    match instruction.encoding() {
        EncodingKind::EVEX if vector || opmask => Some(Class::Avx512),
        EncodingKind::VEX if opmask => Some(Class::Avx512),
        EncodingKind::VEX | EncodingKind::XOP if vector => Some(Class::Avx),
        EncodingKind::D3NOW => Some(Class::Mmx),
        EncodingKind::Legacy => {
            let mmx = registers().any(Register::is_mm);
            let x87 = instruction.cpuid_features().iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387));
            match instruction.mnemonic() {
                N::Cvtpi2ps | N::Cvtps2pi | N::Cvttps2pi => Some(Class::SseMmx),
                // With a memory operand the x87 state is not touched.
                N::Cvtpi2pd if !mmx => Some(Class::Sse),
                N::Emms | N::Femms => Some(Class::Mmx),
                _ if mmx && vector => Some(Class::SseMmx),
                _ if mmx => Some(if instruction.memory_size().size() == 16 { Class::SseMmx } else { Class::Mmx }),
                _ if vector => Some(Class::Sse),
                _ if x87 => Some(Class::X87),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Scalar conversions to general-purpose registers: with a source in memory they name no vector register.
fn is_conversion_to_integer(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Cvtss2si
            | Cvtsd2si
            | Cvttss2si
            | Cvttsd2si
            | Vcvtss2si
            | Vcvtsd2si
            | Vcvttss2si
            | Vcvttsd2si
            | Vcvtss2usi
            | Vcvtsd2usi
            | Vcvttss2usi
            | Vcvttsd2usi
    )
}

/// Instructions of these classes that are not pure data.
fn is_special(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Fninit
            | Fnclex
            | Fnstcw
            | Fldcw
            | Fnstsw
            | Fnstenv
            | Fldenv
            | Fnsave
            | Frstor
            | Fneni
            | Fndisi
            | Fnsetpm
            | Frstpm
            | Wait
            | Maskmovq
            | Maskmovdqu
            | Vmaskmovdqu
            | Vmaskmovps
            | Vmaskmovpd
            | Vpmaskmovd
            | Vpmaskmovq
            | Vzeroupper
            | Vzeroall
    )
}

/// Whether the instruction has results that it may round, so that they can be tiny.
fn underflows(name: &str) -> bool {
    const ROUNDING: &[&str] =
        &["add", "sub", "mul", "div", "cvtpd2ps", "cvtsd2ss", "cvtps2ph", "scalef", "dpp", "cvtne"];
    ROUNDING.iter().any(|part| name.contains(part))
}

/// Whether the instruction approximates a reciprocal: that raises no exceptions, but flushes tiny results as MXCSR says.
fn approximates(name: &str) -> bool {
    name.contains("rcp") || name.contains("rsqrt")
}

/// Whether the instruction may depend on MXCSR or set its flags. Moves, logic and integer arithmetic are known not to; all
/// others are taken to, which is slower but never wrong.
fn uses_mxcsr(name: &str) -> bool {
    const NEVER: &[&str] = &[
        "p",
        "mov",
        "and",
        "or",
        "xor",
        "unpck",
        "shuf",
        "blend",
        "insert",
        "extr",
        "broadcast",
        "perm",
        "align",
        "expand",
        "compress",
        "aes",
        "sha",
        "gf2",
        "k",
        "lddqu",
        "dbpsad",
        "test",
        "sm3",
        "sm4",
        "emms",
        "femms",
        "f",
    ];
    // VF... are the fused multiply-adds and VFPCLASS, VFIXUPIMM; a plain F is x87.
    match name.strip_prefix('v') {
        Some(rest) => rest.starts_with('f') || !NEVER.iter().any(|prefix| rest.starts_with(prefix)),
        None => !NEVER.iter().any(|prefix| name.starts_with(prefix)),
    }
}
