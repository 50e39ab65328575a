//! The machine code of stubs.
//!
//! A stub is a System V function `(context in RDI, a in RSI, b in RDX) -> RAX`:
//!
//! ```text
//! FXRSTOR64 [legacy]                  MMX and SSE registers together
//! load vector and opmask registers    those that the instruction uses
//! MOV RAX, RSI; POPF                  where it reads them
//! LDMXCSR [run_mxcsr]                 floating point; then a first run of VCVTPS2PH, see [`super::half`]
//! the instruction
//! PUSHF; POP [stub_flags]             where it writes them
//! STMXCSR [raised]; LDMXCSR [host]    floating point;
//! TEST raised, unmasked; JNZ out      an exception: nothing is stored
//! store vector and opmask registers
//! FXSAVE64 [legacy]                   MMX and SSE registers together
//! FNSTSW [status]                     x87, MMX
//! out: FNINIT                         MMX and SSE registers together
//! VZEROUPPER                          VEX, EVEX
//! RET
//! ```
//!
//! x87 and MMX stubs find the guest's registers in the host's, see [`super::x87`]. The few that have operands in both
//! register files save and restore them, because an unmasked exception must leave both as they were.

use std::collections::HashMap;
use std::mem::offset_of;

use iced_x86::{Code, Encoder, IcedError, Instruction, InstructionInfoFactory, MemoryOperand, Register};

use super::super::fpu::FpuState;
use super::arena::{self, Arena};
use super::half;
use super::plan::{Class, Plan, Use};

/// Room kept for the stubs of one block: 64 instructions, none longer than this many bytes.
const BLOCK_ROOM: usize = 64 * 512;

/// The rewritten instruction's bytes, zero-padded: what makes a stub what it is.
type Key = [u8; 16];

/// The stubs made so far.
pub(super) struct Stubs {
    /// `None` until needed; an error is final.
    arena: Option<Option<Arena>>,
    known: HashMap<Key, u64>,
    factory: InstructionInfoFactory,
    host: Host,
}

/// How registers are loaded and stored on this host.
#[derive(Clone, Copy)]
struct Host {
    avx512: bool,
    /// EVEX forms of 16 and 32 bytes.
    avx512vl: bool,
    /// 64-bit opmasks.
    avx512bw: bool,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            avx512: std::arch::is_x86_feature_detected!("avx512f"),
            avx512vl: std::arch::is_x86_feature_detected!("avx512vl"),
            avx512bw: std::arch::is_x86_feature_detected!("avx512bw"),
        }
    }
}

impl Default for Stubs {
    fn default() -> Self {
        Self { arena: None, known: HashMap::new(), factory: InstructionInfoFactory::new(), host: Host::default() }
    }
}

impl Stubs {
    pub(super) fn factory(&mut self) -> &mut InstructionInfoFactory {
        &mut self.factory
    }

    /// See [`super::HostAlu::make_room`].
    pub(super) fn make_room(&mut self) -> bool {
        match &mut self.arena {
            Some(Some(arena)) if arena.room() < BLOCK_ROOM.min(arena::SIZE / 2) => {
                arena.reset();
                self.known.clear();
                true
            }
            _ => false,
        }
    }

    /// The address of the stub for a plan; `None` if the host refuses generated code.
    pub(super) fn get(&mut self, plan: &Plan) -> Option<u64> {
        let arena = self.arena.get_or_insert_with(|| Arena::new().ok()).as_mut()?;
        let mut encoder = Encoder::new(64);
        encoder.encode(&plan.instruction, 0).ok()?;
        let bytes = encoder.take_buffer();
        let mut key: Key = [0; 16];
        key.get_mut(..bytes.len())?.copy_from_slice(&bytes);
        if let Some(&address) = self.known.get(&key) {
            return Some(address);
        }
        let code = emit(plan, self.host).ok()?;
        let address = arena.add(&code)?;
        self.known.insert(key, address);
        Some(address)
    }
}

fn field(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ_size(Register::RDI, offset as i64, 1)
}

fn emit(plan: &Plan, host: Host) -> Result<Vec<u8>, IcedError> {
    let mut bytes = encode(&before(plan, host)?)?;
    bytes.extend(encode(&around(plan)?)?);
    let stores = encode(&stores(plan, host)?)?;
    if plan.uses_mxcsr && !stores.is_empty() {
        // JNZ over the stores.
        bytes.extend([0x0f, 0x85]);
        bytes.extend((stores.len() as u32).to_le_bytes());
    }
    bytes.extend(stores);
    bytes.extend(encode(&after(plan))?);
    Ok(bytes)
}

/// Loads what the instruction reads.
fn before(plan: &Plan, host: Host) -> Result<Vec<Instruction>, IcedError> {
    use Code as C;
    let mut code = Vec::new();
    if plan.class == Class::SseMmx {
        code.push(Instruction::with1(C::Fxrstor64_m512byte, field(offset_of!(FpuState, legacy)))?);
    }
    for register in plan.vectors.iter().filter(|register| register.load) {
        let (load, name) = vector_load(plan.class, register, host);
        code.push(Instruction::with2(load, name, vector_field(register))?);
    }
    for register in plan.opmasks.iter().filter(|register| register.load) {
        let load = if host.avx512bw { C::VEX_Kmovq_kr_km64 } else { C::VEX_Kmovw_kr_km16 };
        code.push(Instruction::with2(load, opmask(register), opmask_field(register))?);
    }
    if plan.reads_flags {
        code.push(Instruction::with1(C::Push_rm64, field(offset_of!(FpuState, stub_flags)))?);
        code.push(Instruction::with(C::Popfq));
    }
    if plan.gpr_in.is_some() || plan.lengths {
        code.push(Instruction::with2(C::Mov_r64_rm64, Register::RAX, Register::RSI)?);
    }
    if plan.uses_mxcsr {
        let control = match (plan.silent, plan.underflows) {
            (true, _) => offset_of!(FpuState, run_mxcsr),
            (false, true) => offset_of!(FpuState, underflow_mxcsr),
            (false, false) => offset_of!(FpuState, report_mxcsr),
        };
        let control = Instruction::with1(C::Ldmxcsr_m32, field(control))?;
        code.push(control);
        if half::is_needed(plan) {
            code.extend(half::first_run(plan, field(offset_of!(FpuState, raised_before)))?);
            code.push(control);
        }
    }
    Ok(code)
}

/// The instruction, and what must be read off right behind it. ZF says whether results may be stored, if MXCSR is in use.
fn around(plan: &Plan) -> Result<Vec<Instruction>, IcedError> {
    use Code as C;
    let mut code = vec![plan.instruction];
    if plan.writes_flags {
        code.push(Instruction::with(C::Pushfq));
        code.push(Instruction::with1(C::Pop_rm64, field(offset_of!(FpuState, stub_flags)))?);
    }
    if plan.index {
        code.push(Instruction::with2(C::Mov_r32_rm32, Register::EAX, Register::ECX)?);
    }
    if plan.uses_mxcsr {
        let raised = field(offset_of!(FpuState, raised));
        code.push(Instruction::with1(C::Stmxcsr_m32, raised)?);
        if half::is_needed(plan) {
            let first = field(offset_of!(FpuState, raised_before));
            code.extend(half::merge(first, raised, field(offset_of!(FpuState, unmasked)))?);
        }
        code.push(Instruction::with1(C::Ldmxcsr_m32, field(offset_of!(FpuState, host_mxcsr)))?);
        code.push(Instruction::with2(C::Mov_r32_rm32, Register::ECX, field(offset_of!(FpuState, raised)))?);
        code.push(Instruction::with2(C::And_r32_rm32, Register::ECX, field(offset_of!(FpuState, unmasked)))?);
    }
    Ok(code)
}

/// Stores what the instruction wrote.
fn stores(plan: &Plan, host: Host) -> Result<Vec<Instruction>, IcedError> {
    use Code as C;
    let mut code = Vec::new();
    for register in plan.vectors.iter().filter(|register| register.store) {
        let (store, name) = vector_store(plan.class, register, host);
        code.push(Instruction::with2(store, vector_field(register), name)?);
    }
    for register in plan.opmasks.iter().filter(|register| register.store) {
        let store = if host.avx512bw { C::VEX_Kmovq_m64_kr } else { C::VEX_Kmovw_m16_kr };
        code.push(Instruction::with2(store, opmask_field(register), opmask(register))?);
    }
    if plan.class == Class::SseMmx {
        code.push(Instruction::with1(C::Fxsave64_m512byte, field(offset_of!(FpuState, legacy)))?);
    }
    if matches!(plan.class, Class::X87 | Class::Mmx | Class::SseMmx) {
        code.push(Instruction::with1(C::Fnstsw_m2byte, field(offset_of!(FpuState, status)))?);
    }
    Ok(code)
}

/// Leaves the host's registers as compiled code wants them.
fn after(plan: &Plan) -> Vec<Instruction> {
    let mut code = Vec::new();
    match plan.class {
        Class::SseMmx => code.push(Instruction::with(Code::Fninit)),
        Class::Avx | Class::Avx512 => code.push(Instruction::with(Code::VEX_Vzeroupper)),
        _ => {}
    }
    code.push(Instruction::with(Code::Retnq));
    code
}

fn encode(instructions: &[Instruction]) -> Result<Vec<u8>, IcedError> {
    let mut encoder = Encoder::new(64);
    for instruction in instructions {
        encoder.encode(instruction, 0)?;
    }
    Ok(encoder.take_buffer())
}

fn vector_field(register: &Use) -> MemoryOperand {
    field(offset_of!(FpuState, vectors) + 64 * usize::from(register.number))
}

fn opmask_field(register: &Use) -> MemoryOperand {
    field(offset_of!(FpuState, opmasks) + 8 * usize::from(register.number & 7))
}

fn opmask(register: &Use) -> Register {
    Register::K0 + u32::from(register.number & 7)
}

/// The move that loads a register: as many bytes as the instruction looks at.
fn vector_load(class: Class, register: &Use, host: Host) -> (Code, Register) {
    let number = u32::from(register.number & 31);
    let evex = class == Class::Avx512;
    match (evex, if evex && !host.avx512vl { 64 } else { register.size }) {
        (true, 16) => (Code::EVEX_Vmovups_xmm_k1z_xmmm128, Register::XMM0 + number),
        (true, 32) => (Code::EVEX_Vmovups_ymm_k1z_ymmm256, Register::YMM0 + number),
        (true, _) => (Code::EVEX_Vmovups_zmm_k1z_zmmm512, Register::ZMM0 + number),
        (false, _) if class != Class::Avx => (Code::Movups_xmm_xmmm128, Register::XMM0 + number),
        (false, 16) => (Code::VEX_Vmovups_xmm_xmmm128, Register::XMM0 + number),
        (false, _) => (Code::VEX_Vmovups_ymm_ymmm256, Register::YMM0 + number),
    }
}

/// The move that stores a register: all of it, because VEX and EVEX instructions zero what they do not write.
fn vector_store(class: Class, register: &Use, host: Host) -> (Code, Register) {
    let number = u32::from(register.number & 31);
    match class {
        Class::Avx | Class::Avx512 if host.avx512 => (Code::EVEX_Vmovups_zmmm512_k1z_zmm, Register::ZMM0 + number),
        Class::Avx | Class::Avx512 => (Code::VEX_Vmovups_ymmm256_ymm, Register::YMM0 + number),
        _ => (Code::Movups_xmmm128_xmm, Register::XMM0 + number),
    }
}
