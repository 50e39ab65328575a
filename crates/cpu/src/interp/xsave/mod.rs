//! Saving and restoring extended state: MXCSR, FXSAVE and FXRSTOR, the XSAVE family, XCR0 (SDM vol. 1, chapter 13).

mod model;

use iced_x86::{Code, Mnemonic};
use platform::x86::gpr::{RAX, RCX, RDX};

use super::fpu::{FpuState, component, image, mxcsr};
use super::gate::{Avx, Gate, Sse, X87NoWait, Xsave};
use super::operand::stack_error;
use crate::decode::{Choice, Decoding, Handler, Op, end, next};
use crate::state::int::Int;
use crate::{Step, Trap, Vcpu};
pub(crate) use model::Model;
use model::Place;

/// Components that this CPU can have, in ascending order.
const COMPONENTS: [u32; 6] =
    [component::X87, component::SSE, component::AVX, component::OPMASK, component::ZMM_HI256, component::HI16_ZMM];
const X87: u64 = 1 << component::X87;
const SSE: u64 = 1 << component::SSE;
const AVX: u64 = 1 << component::AVX;
const AVX512: u64 = 1 << component::OPMASK | 1 << component::ZMM_HI256 | 1 << component::HI16_ZMM;
/// All of [`COMPONENTS`].
pub(crate) const KNOWN: u64 = X87 | SSE | AVX | AVX512;

/// Offsets in the area: header, and what comes after it.
const XSTATE_BV: usize = 512;
const XCOMP_BV: usize = 520;
const EXTENDED: usize = 576;
/// XCOMP_BV: the area has the compacted format.
const COMPACTED: u64 = 1 << 63;
/// Longest area: what goes into one page.
const MAX_AREA: usize = 4096;

/// EFER.FFXSR.
const FFXSR: u64 = 1 << 14;

impl Vcpu {
    /// What the guest's CPUID says about the area.
    fn xsave_model(&self) -> Model {
        self.fpu.model.unwrap_or_else(|| Model::new(&self.features))
    }

    /// FCS and FDS as images show them: zero on CPUs that deprecate them.
    pub(super) fn x87_selectors(&self) -> (u16, u16) {
        if self.xsave_model().no_selectors { (0, 0) } else { (self.fpu.fcs, self.fpu.fds) }
    }

    /// x87 and SSE state in the form of FXSAVE (`wide`: with REX.W).
    fn legacy_area(&self, wide: bool) -> [u8; 416] {
        let fpu = &self.fpu;
        let mut area = [0; 416];
        area[..2].copy_from_slice(&fpu.fcw().to_le_bytes());
        area[2..4].copy_from_slice(&fpu.fsw().to_le_bytes());
        area[4] = fpu.ftw();
        // AMD CPUs store zero pointers unless an exception is pending (APM vol. 2, 11.5.6).
        if !self.features.amd || fpu.x87_pending() {
            let (fcs, fds) = self.x87_selectors();
            area[6..8].copy_from_slice(&(fpu.fop & 0x7ff).to_le_bytes());
            area[8..16].copy_from_slice(&pointer(fpu.fip, fcs, wide));
            area[16..24].copy_from_slice(&pointer(fpu.fdp, fds, wide));
        }
        area[24..28].copy_from_slice(&fpu.mxcsr().to_le_bytes());
        area[28..32].copy_from_slice(&self.xsave_model().mxcsr_mask.to_le_bytes());
        for (i, slot) in area[image::ST..image::XMM].chunks_exact_mut(16).enumerate() {
            slot[..10].copy_from_slice(&fpu.st(i));
        }
        for (slot, vector) in area[image::XMM..].chunks_exact_mut(16).zip(&fpu.vectors) {
            slot.copy_from_slice(&vector[..16]);
        }
        area
    }

    fn load_x87(&mut self, area: &[u8; 416], wide: bool) {
        let word = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
        let fpu = &mut self.fpu;
        fpu.set_fcw(word(0));
        fpu.set_fsw(word(2));
        fpu.set_ftw(area[4]);
        fpu.fop = word(6) & 0x7ff;
        (fpu.fip, fpu.fcs) = parse_pointer(&area[8..16], wide);
        (fpu.fdp, fpu.fds) = parse_pointer(&area[16..24], wide);
        for (i, slot) in area[image::ST..image::XMM].chunks_exact(16).enumerate() {
            fpu.set_st(i, &std::array::from_fn(|n| slot[n]));
        }
    }

    /// Takes XMM registers over: 16 in 64-bit mode, else 8.
    fn load_xmm(&mut self, area: &[u8; 416], count: usize) {
        for (vector, slot) in self.fpu.vectors[..count].iter_mut().zip(area[image::XMM..].chunks_exact(16)) {
            vector[..16].copy_from_slice(slot);
        }
    }

    fn xmm_count(&self) -> usize {
        if self.in_64bit() { 16 } else { 8 }
    }

    /// Components in use as the compacted format and XGETBV see them: SSE also for an MXCSR that is not the initial one.
    fn in_use_with_mxcsr(&self) -> u64 {
        let sse = if self.fpu.mxcsr() == mxcsr::RESET { 0 } else { SSE };
        self.fpu.in_use() | sse
    }

    /// Puts the x87, SSE, AVX and AVX-512 state back to what RESET leaves (INIT leaves it alone).
    pub fn reset_fpu(&mut self) {
        self.fpu.park();
        *self.fpu = FpuState::default();
    }

    /// The x87, SSE, AVX and AVX-512 state as an XSAVE area in the standard format, for snapshots and other engines. Its layout
    /// is that of the guest's CPUID leaf 0DH; its length covers the last component.
    pub fn xsave_area(&self) -> Vec<u8> {
        let model = self.xsave_model();
        let mut area = vec![0; model.end(KNOWN, false)];
        area[..416].copy_from_slice(&self.legacy_area(true));
        // Whatever a snapshot is taken of, the pointers are part of the state.
        area[6..8].copy_from_slice(&self.fpu.fop.to_le_bytes());
        area[8..16].copy_from_slice(&self.fpu.fip.to_le_bytes());
        area[16..24].copy_from_slice(&self.fpu.fdp.to_le_bytes());
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&(self.fpu.in_use() | X87 | SSE).to_le_bytes());
        for (n, place) in model.places(KNOWN, false) {
            self.fpu.save_component(n, &mut area[place.offset..place.offset + place.size]);
        }
        area
    }

    /// Takes over an XSAVE area in the standard format. Components that XSTATE_BV leaves out get their initial state, bytes
    /// beyond the area's end read as zero; reserved bits of MXCSR are dropped.
    pub fn set_xsave_area(&mut self, area: &[u8]) {
        let mut padded = [0; MAX_AREA];
        let length = area.len().min(MAX_AREA);
        padded[..length].copy_from_slice(&area[..length]);
        let in_use = u64::from_le_bytes(std::array::from_fn(|i| padded[XSTATE_BV + i]));
        self.fpu.park();
        for n in COMPONENTS {
            self.fpu.init_component(n);
        }
        let legacy: [u8; 416] = std::array::from_fn(|i| padded[i]);
        let value = u32::from_le_bytes(std::array::from_fn(|i| padded[image::MXCSR + i]));
        let model = self.xsave_model();
        self.fpu.set_mxcsr(value & model.mxcsr_mask);
        if in_use & X87 != 0 {
            self.load_x87(&legacy, true);
        }
        if in_use & SSE != 0 {
            self.load_xmm(&legacy, 16);
        }
        for (n, place) in model.places(in_use, false) {
            self.fpu.load_component(n, &padded[place.offset..place.offset + place.size]);
        }
    }
}

/// FIP or FDP: 64 bits, or 32 bits and a selector.
fn pointer(offset: u64, selector: u16, wide: bool) -> [u8; 8] {
    let narrow = offset & 0xffff_ffff | u64::from(selector) << 32;
    if wide { offset.to_le_bytes() } else { narrow.to_le_bytes() }
}

fn parse_pointer(bytes: &[u8], wide: bool) -> (u64, u16) {
    let value = u64::from_le_bytes(std::array::from_fn(|i| bytes.get(i).copied().unwrap_or(0)));
    if wide { (value, 0) } else { (value & 0xffff_ffff, (value >> 32) as u16) }
}

fn ldmxcsr<G: Gate>(vcpu: &mut Vcpu, op: &Op) -> Step {
    G::check(vcpu)?;
    let value = vcpu.load_op::<u32>(op)?;
    check_mxcsr(vcpu, value)?;
    vcpu.fpu.set_mxcsr(value);
    Ok(())
}

fn stmxcsr<G: Gate>(vcpu: &mut Vcpu, op: &Op) -> Step {
    G::check(vcpu)?;
    let value = vcpu.fpu.mxcsr();
    vcpu.store_op(op, value)
}

/// #GP(0) for reserved bits.
fn check_mxcsr(vcpu: &Vcpu, value: u32) -> Step {
    if value & !vcpu.xsave_model().mxcsr_mask == 0 { Ok(()) } else { Err(Trap::gp(0)) }
}

/// Checks, and moves the x87 registers to where they can be looked at.
fn enter<G: Gate>(vcpu: &mut Vcpu) -> Step<Model> {
    G::check(vcpu)?;
    vcpu.fpu.park();
    let model = vcpu.xsave_model();
    vcpu.fpu.model = Some(model);
    Ok(model)
}

/// The operand's linear address, aligned.
fn area_address(vcpu: &mut Vcpu, op: &Op, size: usize, write: bool, align: u64) -> Step<u64> {
    let linear = vcpu.linear(op, size as u64, write)?;
    if linear & (align - 1) != 0 { Err(Trap::gp(0)) } else { Ok(linear) }
}

/// EFER.FFXSR: at CPL 0 in 64-bit mode the XMM registers are left out (AMD APM vol. 2, 11.4.4).
fn fast_fxsave(vcpu: &Vcpu) -> bool {
    vcpu.efer & FFXSR != 0 && vcpu.cpl == 0 && vcpu.in_64bit()
}

fn fxsave<const WIDE: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    enter::<X87NoWait>(vcpu)?;
    let linear = area_address(vcpu, op, 512, true, 16)?;
    let area = vcpu.legacy_area(WIDE);
    let registers = if fast_fxsave(vcpu) { 0 } else { vcpu.xmm_count() };
    vcpu.probe_write(linear, 512).map_err(|trap| stack_error(op, trap))?;
    vcpu.write_bytes(linear, &area[..image::XMM + 16 * registers]).map_err(|trap| stack_error(op, trap))
}

fn fxrstor<const WIDE: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    enter::<X87NoWait>(vcpu)?;
    let linear = area_address(vcpu, op, 512, false, 16)?;
    let mut bytes = [0; 512];
    vcpu.read_bytes(linear, &mut bytes).map_err(|trap| stack_error(op, trap))?;
    let area: [u8; 416] = std::array::from_fn(|i| bytes[i]);
    let value = u32::from_le_bytes(std::array::from_fn(|i| area[image::MXCSR + i]));
    check_mxcsr(vcpu, value)?;
    vcpu.load_x87(&area, WIDE);
    vcpu.fpu.set_mxcsr(value);
    if !fast_fxsave(vcpu) {
        let count = vcpu.xmm_count();
        vcpu.load_xmm(&area, count);
    }
    Ok(())
}

/// Which instruction of the family.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    /// Components in their initial state are not written.
    Optimised,
    /// Compacted format.
    Compacted,
    /// Compacted format with supervisor components.
    Supervisor,
}

/// The instruction's mask: EDX:EAX.
fn requested(vcpu: &Vcpu) -> u64 {
    vcpu.regs[RDX] << 32 | vcpu.regs[RAX] & 0xffff_ffff
}

/// Components that the instruction may touch.
fn enabled(vcpu: &Vcpu, kind: Kind) -> u64 {
    let supervisor = if kind == Kind::Supervisor { vcpu.msrs.xss } else { 0 };
    (vcpu.xcr0 | supervisor) & KNOWN
}

fn check_supervisor(vcpu: &Vcpu, kind: Kind) -> Step {
    if kind == Kind::Supervisor && vcpu.cpl != 0 { Err(Trap::gp(0)) } else { Ok(()) }
}

const PLAIN: u8 = 0;
const OPTIMISED: u8 = 1;
const COMPACT: u8 = 2;
const SUPERVISOR: u8 = 3;

const fn kind_of(kind: u8) -> Kind {
    match kind {
        PLAIN => Kind::Plain,
        OPTIMISED => Kind::Optimised,
        COMPACT => Kind::Compacted,
        _ => Kind::Supervisor,
    }
}

/// What an XSAVE instruction stores, and where.
struct Save {
    linear: u64,
    compacted: bool,
    /// Components asked for and enabled; those of them in use; those that are written.
    wanted: u64,
    in_use: u64,
    written: u64,
}

impl Save {
    fn put(&self, vcpu: &mut Vcpu, offset: usize, bytes: &[u8]) -> Step {
        if bytes.is_empty() { Ok(()) } else { vcpu.write_bytes(vcpu.element_address(self.linear, offset), bytes) }
    }

    fn put_legacy(&self, vcpu: &mut Vcpu, wide: bool) -> Step {
        let legacy = vcpu.legacy_area(wide);
        if self.written & X87 != 0 {
            self.put(vcpu, 0, &legacy[..image::MXCSR])?;
            self.put(vcpu, image::ST, &legacy[image::ST..image::XMM])?;
        }
        // In the standard format MXCSR goes with AVX too.
        if self.written & SSE != 0 || !self.compacted && self.wanted & (SSE | AVX) != 0 {
            self.put(vcpu, image::MXCSR, &legacy[image::MXCSR..image::ST])?;
        }
        if self.written & SSE != 0 {
            let end = image::XMM + 16 * vcpu.xmm_count();
            self.put(vcpu, image::XMM, &legacy[image::XMM..end])?;
        }
        Ok(())
    }

    fn put_extended(&self, vcpu: &mut Vcpu, model: Model) -> Step {
        let mut bytes = [0; 1024];
        for (n, place) in model.places(self.wanted, self.compacted) {
            if self.written >> n & 1 != 0 {
                let bytes = &mut bytes[..place.size.min(1024)];
                vcpu.fpu.save_component(n, bytes);
                let visible = visible(vcpu, n, bytes.len());
                self.put(vcpu, place.offset, &bytes[..visible])?;
            }
        }
        Ok(())
    }

    fn put_header(&self, vcpu: &mut Vcpu) -> Step {
        let header = vcpu.element_address(self.linear, XSTATE_BV);
        if self.compacted {
            let layout = vcpu.element_address(self.linear, XCOMP_BV);
            vcpu.store::<u64>(header, self.in_use)?;
            vcpu.store::<u64>(layout, self.wanted | COMPACTED)
        } else {
            let before = vcpu.load::<u64>(header)?;
            vcpu.store::<u64>(header, before & !self.wanted | self.in_use)
        }
    }
}

fn xsave<const KIND: u8, const WIDE: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let kind = kind_of(KIND);
    let model = enter::<Xsave>(vcpu)?;
    check_supervisor(vcpu, kind)?;
    let compacted = matches!(kind, Kind::Compacted | Kind::Supervisor);
    let wanted = requested(vcpu) & enabled(vcpu, kind);
    let in_use = wanted & if compacted { vcpu.in_use_with_mxcsr() } else { vcpu.fpu.in_use() };
    let written = if kind == Kind::Plain { wanted } else { in_use };
    let end = model.end(wanted, compacted);
    let linear = area_address(vcpu, op, end, true, 64)?;
    vcpu.probe_write(linear, end as u64).map_err(|trap| stack_error(op, trap))?;
    let save = Save { linear, compacted, wanted, in_use, written };
    save.put_legacy(vcpu, WIDE)?;
    save.put_extended(vcpu, model)?;
    save.put_header(vcpu)
}

/// How many of the `size` bytes of component `n` the mode can see: outside 64-bit mode, those of registers 0-7.
fn visible(vcpu: &Vcpu, n: u32, size: usize) -> usize {
    match n {
        _ if vcpu.in_64bit() => size,
        component::AVX | component::ZMM_HI256 => size / 2,
        component::HI16_ZMM => 0,
        _ => size,
    }
}

/// A checked header.
struct Header {
    in_use: u64,
    /// Components with room in a compacted area; `None` for the standard format.
    compacted: Option<u64>,
}

/// # Errors
/// #GP(0) for a header that the instruction does not take (SDM vol. 1, 13.8 and 13.12).
fn check_header(bytes: &[u8; 64], kind: Kind, enabled: u64, has_compacted: bool) -> Step<Header> {
    let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|n| bytes[8 * i + n]));
    let (in_use, comp) = (word(0), word(1));
    let rest_zero = |from: usize| bytes[from..].iter().all(|&byte| byte == 0);
    let good = if comp & COMPACTED != 0 {
        let room = comp & !COMPACTED;
        has_compacted && room & !enabled == 0 && in_use & !room == 0 && rest_zero(16)
    } else {
        kind == Kind::Plain && comp == 0 && in_use & !enabled == 0 && bytes[8..24].iter().all(|&byte| byte == 0)
    };
    if !good {
        return Err(Trap::gp(0));
    }
    Ok(Header { in_use, compacted: (comp & COMPACTED != 0).then_some(comp & !COMPACTED) })
}

fn xrstor<const KIND: u8, const WIDE: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let kind = kind_of(KIND);
    let model = enter::<Xsave>(vcpu)?;
    check_supervisor(vcpu, kind)?;
    let enabled = enabled(vcpu, kind);
    let wanted = requested(vcpu) & enabled;
    let linear = area_address(vcpu, op, EXTENDED, false, 64)?;
    let mut area = [0; MAX_AREA];
    vcpu.read_bytes(linear, &mut area[..EXTENDED]).map_err(|trap| stack_error(op, trap))?;
    let bytes: [u8; 64] = std::array::from_fn(|i| area[XSTATE_BV + i]);
    let header = check_header(&bytes, kind, enabled, model.xsavec)?;
    let places = || model.places(header.compacted.unwrap_or(wanted), header.compacted.is_some());
    let read = wanted & header.in_use;
    for (n, place) in places().filter(|(n, _)| read >> n & 1 != 0) {
        read_component(vcpu, op, n, place, &mut area)?;
    }
    let legacy: [u8; 416] = std::array::from_fn(|i| area[i]);
    let loads_mxcsr = match header.compacted {
        None => wanted & (SSE | AVX) != 0,
        Some(_) => read & SSE != 0,
    };
    let value = u32::from_le_bytes(std::array::from_fn(|i| area[image::MXCSR + i]));
    let value = if loads_mxcsr { value } else { mxcsr::RESET };
    check_mxcsr(vcpu, value)?;

    // Nothing can fail any more.
    if loads_mxcsr || wanted & SSE != 0 {
        vcpu.fpu.set_mxcsr(value);
    }
    restore(vcpu, wanted, read, &legacy, WIDE);
    for (n, place) in places().filter(|(n, _)| read >> n & 1 != 0) {
        let size = visible(vcpu, n, place.size);
        load_visible(&mut vcpu.fpu, n, &area[place.offset..place.offset + place.size], size);
    }
    Ok(())
}

/// Reads what the mode can see of component `n` to its place in `area`.
fn read_component(vcpu: &mut Vcpu, op: &Op, n: u32, place: Place, area: &mut [u8; MAX_AREA]) -> Step {
    let end = place.offset + visible(vcpu, n, place.size);
    let start = vcpu.linear(op, end as u64, false)?;
    let at = vcpu.element_address(start, place.offset);
    match area.get_mut(place.offset..end) {
        Some(bytes) if !bytes.is_empty() => vcpu.read_bytes(at, bytes).map_err(|trap| stack_error(op, trap)),
        _ => Ok(()),
    }
}

/// Loads the legacy components of `read`, and initialises the rest of `wanted`.
fn restore(vcpu: &mut Vcpu, wanted: u64, read: u64, legacy: &[u8; 416], wide: bool) {
    let count = vcpu.xmm_count();
    if read & X87 != 0 {
        vcpu.load_x87(legacy, wide);
    }
    if read & SSE != 0 {
        vcpu.load_xmm(legacy, count);
    }
    for n in COMPONENTS.into_iter().filter(|n| (wanted & !read) >> n & 1 != 0) {
        if count == 16 {
            vcpu.fpu.init_component(n);
        } else {
            init_low(&mut vcpu.fpu, n);
        }
    }
}

/// [`FpuState::init_component`] outside 64-bit mode: registers 8 and above are out of reach.
fn init_low(fpu: &mut FpuState, n: u32) {
    let range = match n {
        component::SSE => 0..16,
        component::AVX => 16..32,
        component::ZMM_HI256 => 32..64,
        component::HI16_ZMM => return,
        _ => return fpu.init_component(n),
    };
    fpu.vectors[..8].iter_mut().for_each(|vector| vector[range.clone()].fill(0));
}

/// Loads the first `size` bytes of component `n`, keeping what the mode cannot see.
fn load_visible(fpu: &mut FpuState, n: u32, bytes: &[u8], size: usize) {
    if size == bytes.len() {
        return fpu.load_component(n, bytes);
    }
    let mut merged = [0; 1024];
    let Some(merged) = merged.get_mut(..bytes.len()) else { return };
    fpu.save_component(n, merged);
    merged[..size].copy_from_slice(&bytes[..size]);
    fpu.load_component(n, merged);
}

fn xgetbv(vcpu: &mut Vcpu, _: &Op) -> Step {
    if vcpu.cr4 & platform::x86::cr4::OSXSAVE == 0 {
        return Err(Trap::ud());
    }
    vcpu.fpu.park();
    let value = match vcpu.regs[RCX] as u32 {
        0 => vcpu.xcr0,
        1 if vcpu.xsave_model().xgetbv1 => vcpu.xcr0 & vcpu.in_use_with_mxcsr(),
        _ => return Err(Trap::gp(0)),
    };
    (value as u32).set(&mut vcpu.regs, RAX as u8);
    ((value >> 32) as u32).set(&mut vcpu.regs, RDX as u8);
    Ok(())
}

fn xsetbv(vcpu: &mut Vcpu, _: &Op) -> Step {
    if vcpu.cr4 & platform::x86::cr4::OSXSAVE == 0 {
        return Err(Trap::ud());
    }
    let privileged = vcpu.cpl == 0 && !vcpu.v8086();
    let value = requested(vcpu);
    if !privileged || vcpu.regs[RCX] as u32 != 0 || !xcr0_is_valid(value, vcpu.features.xcr0_mask & KNOWN) {
        return Err(Trap::gp(0));
    }
    vcpu.xcr0 = value;
    Ok(())
}

/// Whether XCR0 may have this value (SDM vol. 1, 13.3).
fn xcr0_is_valid(value: u64, supported: u64) -> bool {
    let avx = value & AVX != 0;
    let avx512 = value & AVX512;
    value & X87 != 0
        && value & !supported == 0
        && (!avx || value & SSE != 0)
        && (avx512 == 0 || avx512 == AVX512 && avx)
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    use Mnemonic as N;
    let run: Handler = match d.instruction.mnemonic() {
        N::Ldmxcsr => ldmxcsr::<Sse>,
        N::Stmxcsr => stmxcsr::<Sse>,
        N::Vldmxcsr => ldmxcsr::<Avx>,
        N::Vstmxcsr => stmxcsr::<Avx>,
        N::Fxsave => fxsave::<false>,
        N::Fxsave64 => fxsave::<true>,
        N::Fxrstor => fxrstor::<false>,
        N::Fxrstor64 => fxrstor::<true>,
        N::Xsave => xsave::<PLAIN, false>,
        N::Xsave64 => xsave::<PLAIN, true>,
        N::Xsaveopt => xsave::<OPTIMISED, false>,
        N::Xsaveopt64 => xsave::<OPTIMISED, true>,
        N::Xsavec => xsave::<COMPACT, false>,
        N::Xsavec64 => xsave::<COMPACT, true>,
        N::Xsaves => xsave::<SUPERVISOR, false>,
        N::Xsaves64 => xsave::<SUPERVISOR, true>,
        N::Xrstor => xrstor::<PLAIN, false>,
        N::Xrstor64 => xrstor::<PLAIN, true>,
        N::Xrstors => xrstor::<SUPERVISOR, false>,
        N::Xrstors64 => xrstor::<SUPERVISOR, true>,
        N::Xgetbv => xgetbv,
        N::Xsetbv => xsetbv,
        _ => return None,
    };
    super::hostalu::available(d).then_some(())?;
    if d.instruction.code() == Code::Xsetbv { end(run) } else { next(run) }
}
