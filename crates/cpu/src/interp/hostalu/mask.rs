//! Memory operands under an opmask: elements that are masked off are neither touched nor faulted on
//! (SDM vol. 1, 15.6.4). The stub runs with the same opmask, so only the memory side is done here.

use iced_x86::{Instruction, Mnemonic};

use super::super::gate::{Avx512, Gate};
use super::super::operand::stack_error;
use super::plan::{Class, Memory, Plan, name};
use super::run::{self, SINK, detail};
use crate::decode::{Decoding, Handler, Op};
use crate::{Step, Trap, Vcpu};

/// How mask bits go with memory, packed into `op.r1` (opmask register) and `op.r2`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Lanes {
    opmask: u8,
    /// Bytes per memory element.
    size: usize,
    /// Elements in memory.
    count: usize,
    /// Mask bits that count: more than `count` for broadcasts, where bit `i` wants element `i % count`.
    bits: usize,
}

impl Lanes {
    fn of(op: &Op) -> Self {
        let size = 1 << (op.r2 & 7);
        Self { opmask: op.r1 & 7, size, count: (usize::from(op.osize) / size).max(1), bits: 1 << (op.r2 >> 3 & 7) }
    }

    fn mask(self, vcpu: &Vcpu) -> u64 {
        vcpu.fpu.opmasks[usize::from(self.opmask)] & ones(self.bits)
    }

    /// Which elements in memory are wanted.
    fn wanted(self, vcpu: &Vcpu) -> u64 {
        let mask = self.mask(vcpu);
        (0..self.bits).step_by(self.count).fold(0, |wanted, bit| wanted | mask >> bit) & ones(self.count)
    }
}

/// The `n` lowest bits.
fn ones(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// Reads the whole operand or, if that faults, the elements that are wanted.
fn load(vcpu: &mut Vcpu, op: &Op) -> Step {
    Avx512::check(vcpu)?;
    let lanes = Lanes::of(op);
    let wanted = lanes.wanted(vcpu);
    match vcpu.linear(op, u64::from(op.osize), false) {
        Ok(linear) => {
            check_alignment(vcpu, op, linear, wanted)?;
            if let Err(Trap::Fault(_)) = run::load_operand(vcpu, op, linear) {
                vcpu.load_elements(op, linear, lanes.size, wanted)?;
            }
        }
        // The segment ends inside the operand.
        Err(_) => {
            let linear = checked_linear(vcpu, op, lanes, wanted, false)?;
            check_alignment(vcpu, op, linear, wanted)?;
            vcpu.load_elements(op, linear, lanes.size, wanted)?;
        }
    }
    finish(vcpu, op)
}

/// VPEXPAND, VEXPANDPS, VEXPANDPD: as many elements as there are bits in the mask, one after the other.
fn expand(vcpu: &mut Vcpu, op: &Op) -> Step {
    Avx512::check(vcpu)?;
    let lanes = Lanes::of(op);
    let wanted = lanes.mask(vcpu).count_ones() as usize;
    if wanted != 0 {
        let linear = vcpu.linear(op, (wanted * lanes.size) as u64, false)?;
        vcpu.load_elements(op, linear, lanes.size, ones(wanted))?;
    }
    finish(vcpu, op)
}

/// Where no element is wanted, AMD's processors do not look at the address at all.
fn check_alignment(vcpu: &Vcpu, op: &Op, linear: u64, wanted: u64) -> Step {
    if wanted == 0 && vcpu.features.amd { Ok(()) } else { run::check_alignment(vcpu, op, linear) }
}

fn finish(vcpu: &mut Vcpu, op: &Op) -> Step {
    let op = without_lanes(op);
    let result = run::call_general(vcpu, &op)?;
    run::commit(vcpu, &op, result);
    Ok(())
}

fn store(vcpu: &mut Vcpu, op: &Op) -> Step {
    Avx512::check(vcpu)?;
    let lanes = Lanes::of(op);
    let wanted = lanes.wanted(vcpu);
    let linear = match vcpu.linear(op, u64::from(op.osize), true) {
        Ok(linear) => linear,
        Err(_) => checked_linear(vcpu, op, lanes, wanted, true)?,
    };
    check_alignment(vcpu, op, linear, wanted)?;
    let plain = without_lanes(op);
    if op.r3 & detail::MXCSR != 0 {
        // A page fault comes before a numeric exception.
        vcpu.probe_elements(op, linear, lanes.size, wanted)?;
    }
    let result = run::call_general(vcpu, &plain)?;
    if wanted == ones(lanes.count) {
        run::store_operand(vcpu, op, linear)?;
    } else {
        let bytes = vcpu.fpu.bounce;
        vcpu.store_elements(op, linear, &bytes, lanes.size, wanted)?;
    }
    run::commit(vcpu, &plain, result);
    Ok(())
}

/// VEXTRACTF32X4 and its kin: the whole operand must be writable whatever the mask (exception class E6NF).
fn extract(vcpu: &mut Vcpu, op: &Op) -> Step {
    Avx512::check(vcpu)?;
    let linear = vcpu.linear(op, u64::from(op.osize), true)?;
    vcpu.probe_write(linear, u64::from(op.osize)).map_err(|trap| stack_error(op, trap))?;
    store(vcpu, op)
}

/// VPCOMPRESS, VCOMPRESSPS, VCOMPRESSPD.
fn compress(vcpu: &mut Vcpu, op: &Op) -> Step {
    Avx512::check(vcpu)?;
    let lanes = Lanes::of(op);
    let wanted = lanes.mask(vcpu).count_ones() as usize;
    let plain = without_lanes(op);
    let result = run::call_general(vcpu, &plain)?;
    if wanted != 0 {
        let linear = vcpu.linear(op, (wanted * lanes.size) as u64, true)?;
        let bytes = vcpu.fpu.bounce;
        vcpu.store_elements(op, linear, &bytes, lanes.size, ones(wanted))?;
    }
    run::commit(vcpu, &plain, result);
    Ok(())
}

/// The operation as the general handlers read it.
fn without_lanes(op: &Op) -> Op {
    Op { r1: crate::state::ZERO as u8, r2: SINK, ..*op }
}

/// Linear address of the operand after a check of the wanted elements one by one, for a segment that ends inside it.
#[cold]
fn checked_linear(vcpu: &mut Vcpu, op: &Op, lanes: Lanes, wanted: u64, write: bool) -> Step<u64> {
    let offset = vcpu.offset(op);
    for i in (0..lanes.count).filter(|&i| wanted >> (i & 63) & 1 != 0) {
        // Elements do not wrap around to the start of the segment.
        let element = offset + (i * lanes.size) as u64;
        vcpu.linear_checked(usize::from(op.seg), element, lanes.size as u64, write)?;
    }
    Ok(vcpu.seg_base[usize::from(op.seg & 7)].wrapping_add(offset) & 0xffff_ffff)
}

/// The handler, and the operation's fields for it, if the instruction has a memory operand under an opmask.
pub(super) fn form(d: &mut Decoding<'_>, plan: &Plan) -> Option<Handler> {
    use Mnemonic as N;
    let instruction = d.instruction;
    if plan.class != Class::Avx512 || plan.memory == Memory::None || !instruction.has_op_mask() {
        return None;
    }
    let dense = matches!(
        instruction.mnemonic(),
        N::Vpexpandb
            | N::Vpexpandw
            | N::Vpexpandd
            | N::Vpexpandq
            | N::Vexpandps
            | N::Vexpandpd
            | N::Vpcompressb
            | N::Vpcompressw
            | N::Vpcompressd
            | N::Vpcompressq
            | N::Vcompressps
            | N::Vcompresspd
    );
    if plan.memory == Memory::Load && !dense && faults_anyway(d) {
        return None;
    }
    let size = element_size(instruction);
    let count = (usize::from(d.op.osize) / size).max(1);
    let bits = (spread(instruction) / size).max(count);
    d.op.r1 = instruction.op_mask().number() as u8;
    d.op.r2 = size.trailing_zeros() as u8 & 7 | (bits.min(64).trailing_zeros() as u8) << 3;
    debug_assert!(d.op.r3 & (detail::LOAD | detail::STORE) != 0);
    Some(match (plan.memory, dense) {
        (Memory::Load, true) => expand,
        (Memory::Load, false) => load,
        (_, true) => compress,
        (_, false) if name(instruction).starts_with("vextract") => extract,
        (_, false) => store,
    })
}

/// Bytes of memory per bit of the mask.
fn element_size(instruction: &Instruction) -> usize {
    match instruction.mnemonic() {
        // Half of each element is used.
        Mnemonic::Vpmuldq | Mnemonic::Vpmuludq => 8,
        // Several numbers make an element.
        _ if name(instruction).starts_with("vpdp") => 4,
        _ => instruction.memory_size().element_size().max(1),
    }
}

/// Bytes that a memory operand stands for which goes to several elements of the vector, else 0.
fn spread(instruction: &Instruction) -> usize {
    if instruction.is_broadcast() {
        let mut whole = *instruction;
        whole.set_is_broadcast(false);
        whole.memory_size().size()
    } else if name(instruction).contains("broadcast") {
        instruction.op0_register().size()
    } else {
        0
    }
}

/// Instructions whose memory operand is read whatever the mask (exception classes E4NF, E5NF, E6NF): those in which elements
/// do not stay in their lane.
fn faults_anyway(d: &Decoding<'_>) -> bool {
    const PREFIXES: &[&str] = &[
        "valign",
        "vpack",
        "vpunpck",
        "vunpck",
        "vshuf",
        "vperm",
        "vpshufb",
        "vpshufd",
        "vpshufh",
        "vpshufl",
        "vpalignr",
        "vdbpsad",
        "vpmultishift",
        "vpconflict",
        "vmovddup",
        "vmovshdup",
        "vmovsldup",
        "vinsert",
        "vpmaddw",
        "vpmaddub",
        "vcvtne2ps2bf16",
        "vgf2p8affine",
    ];
    let name = name(d.instruction);
    // Shifts by a count in memory.
    let by_count = ["vpsll", "vpsrl", "vpsra"].iter().any(|shift| name.starts_with(shift))
        && !name.contains("lv")
        && !name.contains("av")
        && d.instruction.op_count() == 3
        && d.instruction.op2_kind() == iced_x86::OpKind::Memory;
    let exempt = d.instruction.mnemonic() == Mnemonic::Vpshufbitqmb;
    !exempt && (by_count || PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
}
