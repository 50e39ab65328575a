//! Masked moves, gathers and scatters: instructions that touch some elements in memory and must not fault on the others.

use iced_x86::{EncodingKind, Mnemonic};
use platform::x86::gpr;

use super::gate::{Avx, Avx512, Gate, Mmx, Sse};
use super::operand::stack_error;
use crate::decode::{Choice, Decoding, Handler, Op, next};
use crate::{Step, Vcpu};

impl Vcpu {
    /// `linear + n` with the wrap-around of the address size.
    #[inline]
    pub(super) fn element_address(&self, linear: u64, n: usize) -> u64 {
        let at = linear.wrapping_add(n as u64);
        if self.in_64bit() { at } else { at & 0xffff_ffff }
    }

    /// Loads elements of `size` bytes whose bit in `wanted` is set to their places in the buffer; the others become zero.
    pub(super) fn load_elements(&mut self, op: &Op, linear: u64, size: usize, wanted: u64) -> Step {
        let mut bytes = [0; 64];
        for (start, end) in runs(wanted, size) {
            let Some(run) = bytes.get_mut(start..end) else { break };
            self.read_bytes(self.element_address(linear, start), run).map_err(|trap| stack_error(op, trap))?;
        }
        self.fpu.bounce = bytes;
        Ok(())
    }

    /// Makes sure that the elements whose bit in `wanted` is set can be stored.
    pub(super) fn probe_elements(&mut self, op: &Op, linear: u64, size: usize, wanted: u64) -> Step {
        for (start, end) in runs(wanted, size) {
            let at = self.element_address(linear, start);
            self.probe_write(at, (end - start) as u64).map_err(|trap| stack_error(op, trap))?;
        }
        Ok(())
    }

    /// Stores elements of `bytes` whose bit in `wanted` is set: all of them or, on a fault, none.
    pub(super) fn store_elements(&mut self, op: &Op, linear: u64, bytes: &[u8; 64], size: usize, wanted: u64) -> Step {
        if runs(wanted, size).count() > 1 {
            self.probe_elements(op, linear, size, wanted)?;
        }
        for (start, end) in runs(wanted, size) {
            if let Some(run) = bytes.get(start..end) {
                self.write_bytes(self.element_address(linear, start), run).map_err(|trap| stack_error(op, trap))?;
            }
        }
        Ok(())
    }
}

/// The runs of adjacent set bits, lowest first, as ranges of bytes for elements of `size` bytes.
fn runs(mut mask: u64, size: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut passed = 0;
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let gap = mask.trailing_zeros();
        let ones = (mask >> gap).trailing_ones();
        let start = passed + gap as usize;
        passed = start + ones as usize;
        mask = mask.checked_shr(gap + ones).unwrap_or(0);
        Some((start * size, passed * size))
    })
}

/// The top bits of `count` elements of vector register `r`.
fn signs(vcpu: &Vcpu, r: u8, count: usize, size: usize) -> u64 {
    (0..count).fold(0, |mask, i| mask | u64::from(sign(vcpu, r, i, size)) << (i & 63))
}

/// Whether the top bit of element `i` of vector register `r` is set.
fn sign(vcpu: &Vcpu, r: u8, i: usize, size: usize) -> bool {
    let byte = (i + 1) * size - 1;
    vcpu.fpu.vectors[usize::from(r & 31)].get(byte).is_some_and(|byte| byte & 0x80 != 0)
}

/// The elements whose bit in `wanted` is set, each with its own address: (offset in the operand, linear address).
fn single_elements(vcpu: &mut Vcpu, op: &Op, size: usize, wanted: u64, write: bool) -> Step<Vec<(usize, u64)>> {
    let elements = (0..usize::from(op.osize) / size).filter(|&i| wanted >> (i & 63) & 1 != 0);
    elements
        .map(|i| {
            let element = Op { disp: op.disp.wrapping_add((i * size) as u64), ..*op };
            Ok((i * size, vcpu.linear(&element, size as u64, write)?))
        })
        .collect()
}

/// VMASKMOV, VPMASKMOV from memory: `r1` destination, `r2` mask; elements of `SIZE` bytes, `op.osize` bytes in all.
fn mask_load<const SIZE: usize>(vcpu: &mut Vcpu, op: &Op) -> Step {
    Avx::check(vcpu)?;
    let total = usize::from(op.osize);
    let wanted = signs(vcpu, op.r2, total / SIZE, SIZE);
    if let Ok(linear) = vcpu.linear(op, total as u64, false) {
        vcpu.load_elements(op, linear, SIZE, wanted)?;
    } else {
        // The segment ends inside the operand.
        let mut bytes = [0; 64];
        for (at, linear) in single_elements(vcpu, op, SIZE, wanted, false)? {
            let Some(element) = bytes.get_mut(at..at + SIZE) else { break };
            vcpu.read_bytes(linear, element).map_err(|trap| stack_error(op, trap))?;
        }
        vcpu.fpu.bounce = bytes;
    }
    let bounce = vcpu.fpu.bounce;
    vcpu.fpu.vectors[usize::from(op.r1 & 31)] = bounce;
    Ok(())
}

/// VMASKMOV, VPMASKMOV to memory: `r1` mask, `r2` source.
fn mask_store<const SIZE: usize>(vcpu: &mut Vcpu, op: &Op) -> Step {
    Avx::check(vcpu)?;
    let total = usize::from(op.osize);
    let wanted = signs(vcpu, op.r1, total / SIZE, SIZE);
    let bytes = vcpu.fpu.vectors[usize::from(op.r2 & 31)];
    if let Ok(linear) = vcpu.linear(op, total as u64, true) {
        return vcpu.store_elements(op, linear, &bytes, SIZE, wanted);
    }
    let elements = single_elements(vcpu, op, SIZE, wanted, true)?;
    for &(_, linear) in &elements {
        vcpu.probe_write(linear, SIZE as u64).map_err(|trap| stack_error(op, trap))?;
    }
    for (at, linear) in elements {
        let Some(element) = bytes.get(at..at + SIZE) else { break };
        vcpu.write_bytes(linear, element)?;
    }
    Ok(())
}

/// MASKMOVDQU: bytes of `r1` where `r2` says so, to DS:rDI.
fn byte_mask_store<G: Gate>(vcpu: &mut Vcpu, op: &Op) -> Step {
    G::check(vcpu)?;
    let linear = vcpu.linear(op, 16, true)?;
    // Processors may, and some do, fault whatever the mask.
    vcpu.probe_write(linear, 16).map_err(|trap| stack_error(op, trap))?;
    let bytes = vcpu.fpu.vectors[usize::from(op.r1 & 31)];
    vcpu.store_elements(op, linear, &bytes, 1, signs(vcpu, op.r2, 16, 1))
}

/// MASKMOVQ.
fn byte_mask_store_mmx(vcpu: &mut Vcpu, op: &Op) -> Step {
    Mmx::check(vcpu)?;
    vcpu.fpu.park();
    let linear = vcpu.linear(op, 8, true).and_then(|linear| {
        vcpu.probe_write(linear, 8).map_err(|trap| stack_error(op, trap))?;
        Ok(linear)
    });
    if linear.is_err() && vcpu.features.amd {
        // The switch to MMX registers comes first.
        vcpu.fpu.enter_mmx();
    }
    let linear = linear?;
    let top = usize::from(vcpu.fpu.fsw() >> 11 & 7);
    let register = |vcpu: &Vcpu, r: u8| vcpu.fpu.st((usize::from(r & 7) + 8 - top) & 7);
    let (source, mask) = (register(vcpu, op.r1), register(vcpu, op.r2));
    let mut bytes = [0; 64];
    bytes[..8].copy_from_slice(&source[..8]);
    let wanted = (0..8).fold(0, |wanted, i| wanted | u64::from(mask[i] >> 7) << i);
    vcpu.store_elements(op, linear, &bytes, 1, wanted)?;
    vcpu.fpu.enter_mmx();
    Ok(())
}

/// The shape of a gather or scatter, packed into an operation's immediate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Vsib {
    /// Index register.
    index: u8,
    /// Bytes per index and per element.
    index_size: u8,
    size: u8,
    count: u8,
}

impl Vsib {
    fn pack(self) -> u64 {
        u64::from(u32::from_le_bytes([self.index, self.index_size, self.size, self.count]))
    }

    fn unpack(imm: u64) -> Self {
        let [index, index_size, size, count] = (imm as u32).to_le_bytes();
        Self { index, index_size, size, count }
    }

    /// Linear address of element `i`.
    fn linear(self, vcpu: &mut Vcpu, op: &Op, i: usize, write: bool) -> Step<u64> {
        let vector = &vcpu.fpu.vectors[usize::from(self.index & 31)];
        let index = if self.index_size == 4 {
            i32::from_le_bytes(std::array::from_fn(|n| vector[(4 * i + n) & 63])) as u64
        } else {
            u64::from_le_bytes(std::array::from_fn(|n| vector[(8 * i + n) & 63]))
        };
        let element = Op { disp: op.disp.wrapping_add(index << (op.scale & 3)), scale: 0, ..*op };
        vcpu.linear(&element, u64::from(self.size), write)
    }
}

/// Where a gather's mask is.
trait Mask: Gate {
    /// On AMD's processors the first element that is loaded cuts the destination to the vector length.
    const CUTS_EARLY: bool;
    fn wanted(vcpu: &Vcpu, op: &Op, i: usize, size: usize) -> bool;
    /// Element `i` is done.
    fn done(vcpu: &mut Vcpu, op: &Op, i: usize, size: usize);
    /// All are.
    fn finish(vcpu: &mut Vcpu, op: &Op);
}

/// VEX: the sign bits of vector register `r2`.
impl Mask for Avx {
    const CUTS_EARLY: bool = false;
    fn wanted(vcpu: &Vcpu, op: &Op, i: usize, size: usize) -> bool {
        sign(vcpu, op.r2, i, size)
    }
    fn done(vcpu: &mut Vcpu, op: &Op, i: usize, size: usize) {
        if let Some(element) = vcpu.fpu.vectors[usize::from(op.r2 & 31)].get_mut(i * size..(i + 1) * size) {
            element.fill(0);
        }
    }
    fn finish(vcpu: &mut Vcpu, op: &Op) {
        vcpu.fpu.vectors[usize::from(op.r2 & 31)] = [0; 64];
    }
}

/// EVEX: opmask register `r3`.
impl Mask for Avx512 {
    const CUTS_EARLY: bool = true;
    fn wanted(vcpu: &Vcpu, op: &Op, i: usize, _: usize) -> bool {
        vcpu.fpu.opmasks[usize::from(op.r3 & 7)] >> (i & 63) & 1 != 0
    }
    fn done(vcpu: &mut Vcpu, op: &Op, i: usize, _: usize) {
        vcpu.fpu.opmasks[usize::from(op.r3 & 7)] &= !(1 << (i & 63));
    }
    fn finish(vcpu: &mut Vcpu, op: &Op) {
        vcpu.fpu.opmasks[usize::from(op.r3 & 7)] = 0;
    }
}

/// Gathers: an element that has been loaded is visible, and its mask bit cleared, even if a later one faults.
fn gather<M: Mask>(vcpu: &mut Vcpu, op: &Op) -> Step {
    M::check(vcpu)?;
    let vsib = Vsib::unpack(op.imm);
    let (count, size) = (usize::from(vsib.count), usize::from(vsib.size));
    let destination = usize::from(op.r1 & 31);
    for i in 0..count {
        if M::wanted(vcpu, op, i, size) {
            let bytes = gather_element(vcpu, op, vsib, i)?;
            if M::CUTS_EARLY && vcpu.features.amd {
                let length = count * size.max(usize::from(vsib.index_size));
                vcpu.fpu.vectors[destination][length.min(64)..].fill(0);
            }
            if let Some(element) = vcpu.fpu.vectors[destination].get_mut(i * size..(i + 1) * size) {
                element.copy_from_slice(&bytes[..size & 15]);
            }
        }
        M::done(vcpu, op, i, size);
    }
    M::finish(vcpu, op);
    vcpu.fpu.vectors[destination][(count * size).min(64)..].fill(0);
    Ok(())
}

fn gather_element(vcpu: &mut Vcpu, op: &Op, vsib: Vsib, i: usize) -> Step<[u8; 8]> {
    let linear = vsib.linear(vcpu, op, i, false)?;
    let mut bytes = [0; 8];
    vcpu.read_bytes(linear, &mut bytes[..usize::from(vsib.size & 15)]).map_err(|trap| stack_error(op, trap))?;
    Ok(bytes)
}

/// Scatters, in element order.
fn scatter(vcpu: &mut Vcpu, op: &Op) -> Step {
    Avx512::check(vcpu)?;
    let vsib = Vsib::unpack(op.imm);
    let (count, size) = (usize::from(vsib.count), usize::from(vsib.size));
    for i in 0..count {
        if Avx512::wanted(vcpu, op, i, size) {
            let linear = vsib.linear(vcpu, op, i, true)?;
            let source = &vcpu.fpu.vectors[usize::from(op.r1 & 31)];
            let bytes: [u8; 8] = std::array::from_fn(|n| source[(i * size + n) & 63]);
            vcpu.write_bytes(linear, &bytes[..size & 15]).map_err(|trap| stack_error(op, trap))?;
            Avx512::done(vcpu, op, i, size);
        }
    }
    Avx512::finish(vcpu, op);
    Ok(())
}

/// (bytes per index, bytes per element) of gathers and scatters.
fn vsib_sizes(mnemonic: Mnemonic) -> Option<(u8, u8)> {
    use Mnemonic as N;
    Some(match mnemonic {
        N::Vpgatherdd | N::Vgatherdps | N::Vpscatterdd | N::Vscatterdps => (4, 4),
        N::Vpgatherdq | N::Vgatherdpd | N::Vpscatterdq | N::Vscatterdpd => (4, 8),
        N::Vpgatherqd | N::Vgatherqps | N::Vpscatterqd | N::Vscatterqps => (8, 4),
        N::Vpgatherqq | N::Vgatherqpd | N::Vpscatterqq | N::Vscatterqpd => (8, 8),
        _ => return None,
    })
}

fn select_vsib(d: &mut Decoding<'_>) -> Option<Handler> {
    let instruction = d.instruction;
    let (index_size, size) = vsib_sizes(instruction.mnemonic())?;
    let index = instruction.memory_index();
    let data = (0..instruction.op_count()).map(|i| instruction.op_register(i)).find(|r| r.is_vector_register())?;
    let count = (index.size() as u8 / index_size).min(data.size() as u8 / size);
    d.op.imm = Vsib { index: index.number() as u8, index_size, size, count }.pack();
    d.op.scale = instruction.memory_index_scale().trailing_zeros() as u8;
    let is_scatter = format!("{:?}", instruction.mnemonic()).contains("scatter");
    if instruction.encoding() == EncodingKind::VEX {
        // Destination, index and mask must be three registers.
        let distinct = d.op.r1 != d.op.r2 && d.op.r1 != index.number() as u8 && d.op.r2 != index.number() as u8;
        return distinct.then_some(gather::<Avx> as Handler);
    }
    if !instruction.has_op_mask() || !is_scatter && d.op.r1 == index.number() as u8 {
        return None;
    }
    d.op.r3 = instruction.op_mask().number() as u8;
    Some(if is_scatter { scatter } else { gather::<Avx512> })
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    use Mnemonic as N;
    let mnemonic = d.instruction.mnemonic();
    let loads = d.instruction.op0_kind() == iced_x86::OpKind::Register;
    let run: Handler = match mnemonic {
        N::Vmaskmovps | N::Vpmaskmovd if loads => mask_load::<4>,
        N::Vmaskmovps | N::Vpmaskmovd => mask_store::<4>,
        N::Vmaskmovpd | N::Vpmaskmovq if loads => mask_load::<8>,
        N::Vmaskmovpd | N::Vpmaskmovq => mask_store::<8>,
        N::Maskmovdqu | N::Vmaskmovdqu | N::Maskmovq => {
            // The implicit DS:rDI becomes an ordinary operand.
            d.op.base = gpr::RDI as u8;
            match mnemonic {
                N::Maskmovdqu => byte_mask_store::<Sse>,
                N::Vmaskmovdqu => byte_mask_store::<Avx>,
                _ => byte_mask_store_mmx,
            }
        }
        _ => select_vsib(d)?,
    };
    super::hostalu::available(d).then_some(())?;
    next(run)
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn runs_cover_every_set_bit_once() {
        let list = |mask, size| runs(mask, size).collect::<Vec<_>>();
        assert_eq!(list(0, 4), []);
        assert_eq!(list(0b1101, 4), [(0, 4), (8, 16)]);
        assert_eq!(list(u64::MAX, 1), [(0, 64)]);
        assert_eq!(list(1 << 63, 1), [(63, 64)]);
        assert_eq!(list(1 << 63 | 1, 1), [(0, 1), (63, 64)]);
    }
}
