//! Which instructions run natively.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind as Kind, OpCodeTableKind, OpKind, Register};

use super::block::Request;
use super::memory::addressable;
use super::resident;
use crate::decode::{Ea, Flow, Op};

/// How an instruction is emitted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum How {
    /// By calling the interpreter.
    Interpret,
    Branch,
    Push,
    Pop,
    Leave,
    /// INC, DEC by the opcodes 40 to 4F.
    Short,
    /// Not at all.
    Nothing,
    /// Byte for byte.
    Copy,
    /// The same around a copy of guest RCX in host RCX.
    CopyWithCount,
    /// XCHG of two registers by the opcodes 91 to 97.
    Swap,
    Lea,
    MovImmediate,
    Bswap,
    /// As a vector instruction.
    Vector,
    X87,
    /// As a vector instruction on MMX registers.
    Mmx,
    /// With registers and memory operand exchanged.
    Rewrite,
    /// As a system instruction: on the state in the vCPU.
    System,
    PushMemory,
    /// MOV between the accumulator and an absolute address.
    MovOffset,
    /// DIV or IDIV, behind a check that it will not fault.
    Divide,
    /// MOVS, STOS or LODS.
    String,
    /// CMPXCHG8B, CMPXCHG16B.
    ExchangeWide,
    /// BT and its kin with a bit offset that reaches beyond the memory operand.
    BitString,
}

/// Chooses.
pub(super) fn classify(i: &Instruction, op: &Op, flow: Flow, next: u32, request: &Request<'_>) -> How {
    let legacy = !request.mode.is_64();
    let how = native_form(i, request.vectors, legacy);
    match how {
        How::Interpret => How::Interpret,
        How::Branch => classify_branch(i, op, next, legacy),
        // A family that ends the block where its instruction normally does not: not supported by this guest CPU.
        _ if flow == Flow::End => How::Interpret,
        How::Rewrite
        | How::Lea
        | How::Vector
        | How::X87
        | How::Mmx
        | How::PushMemory
        | How::Divide
        | How::ExchangeWide
        | How::BitString
            if uses_memory(i) && !addressable(op, next, legacy) =>
        {
            How::Interpret
        }
        How::Swap if resident(op.r1).is_none() || resident(op.r2).is_none() => How::Interpret,
        How::MovOffset if !super::memory::fits(op, next, legacy) => How::Interpret,
        How::String if !super::string::addressable(op, legacy) => How::Interpret,
        How::BitString if if legacy { op.ea != Ea::Flat } else { op.asize != 8 } => How::Interpret,
        _ => how,
    }
}

/// Whether the first operand is the target of a near branch of the mode's own width.
pub(super) fn is_near(i: &Instruction) -> bool {
    matches!(i.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32)
}

fn classify_branch(i: &Instruction, op: &Op, next: u32, legacy: bool) -> How {
    let near = is_near(i);
    let fits = i32::try_from((op.imm as i64).wrapping_add(i64::from(next))).is_ok();
    match i.mnemonic() {
        Mnemonic::Ret => How::Branch,
        Mnemonic::Jmp | Mnemonic::Call if !near => {
            let wide = legacy && op.osize == 4 || !legacy && op.osize == 8;
            let reachable =
                i.op0_kind() == OpKind::Register || i.op0_kind() == OpKind::Memory && addressable(op, next, legacy);
            let fine = wide && reachable;
            if fine { How::Branch } else { How::Interpret }
        }
        _ if near && fits => How::Branch,
        _ => How::Interpret,
    }
}

pub(super) fn uses_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
}

fn native_form(i: &Instruction, vectors: u8, legacy: bool) -> How {
    use Mnemonic as N;
    let code = i.op_code();
    let word = if legacy { 4 } else { 8 };
    match i.mnemonic() {
        N::Jmp if i.is_jmp_short_or_near() || i.is_jmp_near_indirect() => How::Branch,
        N::Call if i.is_call_near() || i.is_call_near_indirect() => How::Branch,
        N::Ret if matches!(i.code(), Code::Retnq | Code::Retnq_imm16 | Code::Retnd | Code::Retnd_imm16) => How::Branch,
        N::Jrcxz => How::Branch,
        N::Jecxz if legacy => How::Branch,
        N::Loop if matches!(i.code(), Code::Loop_rel8_64_RCX | Code::Loop_rel8_32_ECX) => How::Branch,
        _ if i.is_jcc_short_or_near() => How::Branch,
        N::Push
            if i.stack_pointer_increment() == -word
                && (i.op0_kind() != OpKind::Register || is_whole_or_selector(i.op0_register())) =>
        {
            if i.op0_kind() == OpKind::Memory { How::PushMemory } else { How::Push }
        }
        N::Pop
            if i.stack_pointer_increment() == word && i.op0_kind() == OpKind::Register && i.op0_register().is_gpr() =>
        {
            How::Pop
        }
        N::Leave if matches!(i.code(), Code::Leaveq | Code::Leaved) => How::Leave,
        N::Nop | N::Endbr64 | N::Endbr32 | N::Reservednop => How::Nothing,
        N::Prefetchnta | N::Prefetcht0 | N::Prefetcht1 | N::Prefetcht2 | N::Prefetchw | N::Prefetch => How::Nothing,
        N::Cbw | N::Cwde | N::Cdqe | N::Cwd | N::Cdq | N::Cqo | N::Clc | N::Stc | N::Cmc | N::Lahf | N::Sahf => {
            How::Copy
        }
        N::Div | N::Idiv => super::divide::form(i),
        N::Cmpxchg8b | N::Cmpxchg16b => How::ExchangeWide,
        _ if i.is_string_instruction() => super::string::form(i),
        N::Lfence | N::Sfence | N::Mfence => How::Copy,
        N::Lea if i.op0_register().size() >= 4 => How::Lea,
        N::Mov if is_opcode_register(code.op0_kind()) => high_or(i, How::MovImmediate),
        N::Bswap if i.op0_register().size() >= 4 => How::Bswap,
        N::Inc | N::Dec if is_opcode_register(code.op0_kind()) => How::Short,
        _ if is_plain(i) => plain_form(i),
        _ if super::x87::is_x87(i) => super::x87::form(i, vectors, legacy),
        _ => super::vector::form(i, vectors),
    }
}

fn is_whole_or_selector(r: Register) -> bool {
    r.is_gpr() || r.is_segment_register()
}

/// Whether it is AH, CH, DH or BH.
pub(super) fn is_high(r: Register) -> bool {
    matches!(r, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// Registers AH, CH, DH, BH cannot be named together with a REX prefix: such instructions run natively as they are, or not at
/// all. With a memory operand they are rewritten, if its address can be brought into RCX.
fn high_or(i: &Instruction, how: How) -> How {
    let registers = (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| i.op_register(n));
    if !registers.clone().any(is_high) {
        return how;
    }
    let in_place = |r: Register| {
        use Register as R;
        matches!(r.full_register(), R::RAX | R::RDX | R::RBX)
            || matches!(r, R::EBP | R::ESI | R::EDI | R::RBP | R::RSI | R::RDI)
    };
    let count = |r: Register| r.full_register() == Register::RCX;
    match (uses_memory(i), registers.clone().all(in_place)) {
        (false, true) => How::Copy,
        (true, true) if how == How::Rewrite => How::Rewrite,
        (false, false) if registers.clone().all(|r| in_place(r) || count(r)) => How::CopyWithCount,
        _ => How::Interpret,
    }
}

fn is_opcode_register(kind: Kind) -> bool {
    matches!(kind, Kind::r8_opcode | Kind::r16_opcode | Kind::r32_opcode | Kind::r64_opcode)
}

fn plain_form(i: &Instruction) -> How {
    let code = i.op_code();
    if code.table() == OpCodeTableKind::Normal && code.op_code() == 0x82 {
        // Another name for 80, but not in 64-bit mode.
        return How::Interpret;
    }
    let kinds = (0..i.op_count()).map(|n| code.op_kind(n));
    // Forms without ModRM: with an implied accumulator (in place), or with the register in the opcode.
    let has_modrm = kinds.clone().any(|kind| {
        matches!(
            kind,
            Kind::r8_or_mem
                | Kind::r16_or_mem
                | Kind::r32_or_mem
                | Kind::r64_or_mem
                | Kind::mem
                | Kind::r16_rm
                | Kind::r32_rm
                | Kind::r64_rm
        )
    });
    if kinds.clone().any(|kind| kind == Kind::mem_offs) {
        return How::MovOffset;
    }
    if kinds.clone().any(is_opcode_register) {
        return if i.mnemonic() == Mnemonic::Xchg { How::Swap } else { How::Interpret };
    }
    if !has_modrm {
        let accumulator = i.op0_kind() == OpKind::Register && i.op0_register().full_register() == Register::RAX;
        return if accumulator && i.op_count() == 2 && i.op1_kind() != OpKind::Register {
            How::Copy
        } else {
            How::Interpret
        };
    }
    // Some processors read 32 bits for it, some 16.
    if i.mnemonic() == Mnemonic::Movsxd && i.op0_register().size() == 2 && uses_memory(i) {
        return How::Interpret;
    }
    // A bit offset in a register reaches beyond the operand.
    let bit_string = matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    if bit_string && uses_memory(i) && i.op1_kind() == OpKind::Register {
        return if i.op1_register().size() >= 4 { How::BitString } else { How::Interpret };
    }
    high_or(i, How::Rewrite)
}

/// Integer instructions on general-purpose registers and one memory operand, with no effect besides registers, memory and
/// arithmetic flags.
fn is_plain(i: &Instruction) -> bool {
    use Mnemonic as N;
    let general = (0..i.op_count()).all(|n| i.op_kind(n) != OpKind::Register || i.op_register(n).is_gpr());
    if !general {
        return false;
    }
    matches!(
        i.mnemonic(),
        N::Mov
            | N::Movzx
            | N::Movsx
            | N::Movsxd
            | N::Movbe
            | N::Add
            | N::Or
            | N::Adc
            | N::Sbb
            | N::And
            | N::Sub
            | N::Xor
            | N::Cmp
            | N::Test
            | N::Inc
            | N::Dec
            | N::Neg
            | N::Not
            | N::Mul
            | N::Imul
            | N::Shl
            | N::Sal
            | N::Shr
            | N::Sar
            | N::Rol
            | N::Ror
            | N::Rcl
            | N::Rcr
            | N::Shld
            | N::Shrd
            | N::Bt
            | N::Bts
            | N::Btr
            | N::Btc
            | N::Bsf
            | N::Bsr
            | N::Tzcnt
            | N::Lzcnt
            | N::Popcnt
            | N::Xchg
            | N::Xadd
            | N::Cmpxchg
            | N::Crc32
            | N::Adcx
            | N::Adox
            | N::Andn
            | N::Bextr
            | N::Blsi
            | N::Blsmsk
            | N::Blsr
            | N::Bzhi
            | N::Pdep
            | N::Pext
            | N::Rorx
            | N::Sarx
            | N::Shlx
            | N::Shrx
            | N::Mulx
            | N::Seto
            | N::Setno
            | N::Setb
            | N::Setae
            | N::Sete
            | N::Setne
            | N::Setbe
            | N::Seta
            | N::Sets
            | N::Setns
            | N::Setp
            | N::Setnp
            | N::Setl
            | N::Setge
            | N::Setle
            | N::Setg
            | N::Cmovo
            | N::Cmovno
            | N::Cmovb
            | N::Cmovae
            | N::Cmove
            | N::Cmovne
            | N::Cmovbe
            | N::Cmova
            | N::Cmovs
            | N::Cmovns
            | N::Cmovp
            | N::Cmovnp
            | N::Cmovl
            | N::Cmovge
            | N::Cmovle
            | N::Cmovg
    )
}
