//! Segment and gate descriptors (SDM vol. 3, 3.4.5, 3.5, 5.8.3 and 6.11), and the checks that are the same
//! wherever a descriptor is loaded.

use platform::x86::{SEGMENT_UNUSABLE, Segment};

use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

/// Types of system descriptors (SDM vol. 3, table 3-2). In long mode the 32-bit ones are the 64-bit ones.
pub(crate) mod kind {
    pub(crate) const TSS16: u8 = 1;
    pub(crate) const LDT: u8 = 2;
    pub(crate) const TSS16_BUSY: u8 = 3;
    pub(crate) const CALL16: u8 = 4;
    pub(crate) const TASK: u8 = 5;
    pub(crate) const INTERRUPT16: u8 = 6;
    pub(crate) const TRAP16: u8 = 7;
    pub(crate) const TSS32: u8 = 9;
    pub(crate) const TSS32_BUSY: u8 = 11;
    pub(crate) const CALL32: u8 = 12;
    pub(crate) const INTERRUPT32: u8 = 14;
    pub(crate) const TRAP32: u8 = 15;
    /// Set in the type of everything that is 32-bit (or 64-bit) rather than 16-bit.
    pub(crate) const WIDE: u8 = 8;
    /// Tells busy task-state segments from available ones.
    pub(crate) const BUSY: u8 = 2;
}

/// Bits of an access-rights word that concern the descriptor privilege level.
const DPL_SHIFT: u32 = 5;

/// The first eight bytes of a descriptor, and where they are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    raw: u64,
    /// Linear address.
    pub(crate) address: u64,
}

impl Descriptor {
    pub(crate) fn new(raw: u64, address: u64) -> Self {
        Self { raw, address }
    }

    #[inline]
    fn bit(self, n: u32) -> bool {
        self.raw >> n & 1 != 0
    }

    /// Type of a system descriptor; for code and data more than 15.
    #[inline]
    pub(crate) fn kind(self) -> u8 {
        (self.raw >> 40) as u8 & 31
    }
    #[inline]
    pub(crate) fn is_code(self) -> bool {
        self.kind() >= 24
    }
    #[inline]
    pub(crate) fn is_conforming_code(self) -> bool {
        self.kind() >= 28
    }
    /// Data, or code that may be read.
    #[inline]
    pub(crate) fn is_readable(self) -> bool {
        matches!(self.kind(), 16..24) || (self.is_code() && self.bit(41))
    }
    #[inline]
    pub(crate) fn is_writable(self) -> bool {
        matches!(self.kind(), 16..24) && self.bit(41)
    }
    #[inline]
    pub(crate) fn dpl(self) -> u8 {
        (self.raw >> 45) as u8 & 3
    }
    #[inline]
    pub(crate) fn present(self) -> bool {
        self.bit(47)
    }
    /// Code: L, 64-bit.
    #[inline]
    pub(crate) fn is_long(self) -> bool {
        self.bit(53)
    }
    /// D or B.
    #[inline]
    pub(crate) fn is_big(self) -> bool {
        self.bit(54)
    }
    #[inline]
    pub(crate) fn base(self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }
    /// Limit in bytes.
    #[inline]
    pub(crate) fn limit(self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.bit(55) { limit << 12 | 0xfff } else { limit }
    }
    /// The upper doubleword, as LAR shows it.
    #[inline]
    pub(crate) fn upper(self) -> u32 {
        (self.raw >> 32) as u32
    }

    /// The segment register that this descriptor gives, marked as accessed.
    #[inline]
    pub(crate) fn segment(self, selector: u16) -> Segment {
        let access = (self.raw >> 40) as u32 & 0xf0ff | 1;
        Segment { selector, base: self.base(), limit: self.limit(), access }
    }

    /// LDTR or TR with the upper half of the base that long mode adds.
    #[inline]
    pub(crate) fn system_segment(self, selector: u16, upper: u64) -> Segment {
        let access = (self.raw >> 40) as u32 & 0xf0ff;
        Segment { selector, base: self.base() | upper << 32, limit: self.limit(), access }
    }

    /// Gate: selector.
    #[inline]
    pub(crate) fn gate_selector(self) -> u16 {
        (self.raw >> 16) as u16
    }
    /// Gate: offset, 16 bits wide for 16-bit gates.
    #[inline]
    pub(crate) fn gate_offset(self) -> u64 {
        let low = self.raw & 0xffff;
        if self.kind() & kind::WIDE != 0 { low | self.raw >> 32 & 0xffff_0000 } else { low }
    }
    /// Call gate: number of parameters.
    #[inline]
    pub(crate) fn gate_parameters(self) -> u64 {
        self.raw >> 32 & 31
    }
    /// 64-bit interrupt or trap gate: interrupt stack table entry, 0 for none.
    #[inline]
    pub(crate) fn gate_ist(self) -> u64 {
        self.raw >> 32 & 7
    }
}

/// How a selector is refused: the exception for what is plainly wrong, and the EXT bit of every error code.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refusal {
    vector: u8,
    ext: u16,
}

impl Refusal {
    /// As instructions do: #GP, EXT clear.
    pub(crate) const GP: Self = Self { vector: vector::GP, ext: 0 };
    /// #GP during the delivery of an event.
    pub(crate) fn gp(ext: u16) -> Self {
        Self { vector: vector::GP, ext }
    }
    /// #TS: the selector came from a task-state segment.
    pub(crate) fn ts(ext: u16) -> Self {
        Self { vector: vector::TS, ext }
    }
    /// The exception about `selector`.
    #[cold]
    pub(crate) fn of(self, selector: u16) -> Trap {
        Trap::fault_code(self.vector, selector & !3 | self.ext)
    }
    /// The exception about `selector` whose segment is not present: `vector` is #NP, or #SS for a stack.
    #[cold]
    pub(crate) fn absent(self, vector: u8, selector: u16) -> Trap {
        Trap::fault_code(vector, selector & !3 | self.ext)
    }
}

/// Whether a selector is null, whatever its RPL.
#[inline]
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// A segment register with a null selector. Its DPL only counts in SS, where it is the CPL.
#[inline]
pub(crate) fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment { selector, base: 0, limit: 0, access: SEGMENT_UNUSABLE | u32::from(dpl) << DPL_SHIFT }
}

/// DPL of a loaded segment.
#[inline]
pub(crate) fn segment_dpl(segment: &Segment) -> u8 {
    (segment.access >> DPL_SHIFT) as u8 & 3
}

/// A segment register as virtual-8086 mode has it.
pub(crate) fn segment_8086(selector: u16) -> Segment {
    Segment { selector, base: u64::from(selector) << 4, limit: 0xffff, access: 0xf3 }
}

impl Vcpu {
    /// Linear address of a byte in a system structure. Outside long mode addresses wrap at 4 GiB.
    #[inline]
    pub(crate) fn system_linear(&self, base: u64, offset: u64) -> u64 {
        let linear = base.wrapping_add(offset);
        if self.long_mode() { linear } else { linear & 0xffff_ffff }
    }

    /// Linear address of the `size` bytes of a descriptor; `None` outside the table's limit.
    #[inline]
    pub(crate) fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let offset = u64::from(selector & !7);
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        } else if self.ldtr.access & SEGMENT_UNUSABLE == 0 {
            (self.ldtr.base, u64::from(self.ldtr.limit))
        } else {
            return None;
        };
        (offset + size - 1 <= limit).then(|| self.system_linear(base, offset))
    }

    /// Reads a descriptor from the GDT or LDT. Null selectors are the caller's business.
    #[inline]
    pub(crate) fn descriptor(&mut self, selector: u16, refusal: Refusal) -> Step<Descriptor> {
        let Some(address) = self.descriptor_address(selector, 8) else { return Err(refusal.of(selector)) };
        let raw = self.as_system(|vcpu| vcpu.load(address))?;
        Ok(Descriptor::new(raw, address))
    }

    /// The second half of a system descriptor: in long mode bits 63:32 of the base or offset, else 0.
    pub(crate) fn descriptor_extension(
        &mut self,
        selector: u16,
        descriptor: Descriptor,
        refusal: Refusal,
    ) -> Step<u64> {
        if !self.long_mode() {
            return Ok(0);
        }
        if self.descriptor_address(selector, 16).is_none() {
            return Err(refusal.of(selector));
        }
        let raw: u64 = self.as_system(|vcpu| vcpu.load(descriptor.address.wrapping_add(8)))?;
        // A type other than 0 there would be another descriptor.
        if raw >> 40 & 31 != 0 {
            return Err(refusal.of(selector));
        }
        Ok(raw & 0xffff_ffff)
    }

    /// Sets the accessed bit of a code or data descriptor.
    #[inline]
    pub(crate) fn mark_accessed(&mut self, descriptor: Descriptor) -> Step {
        if descriptor.bit(40) {
            return Ok(());
        }
        let address = descriptor.address.wrapping_add(5);
        self.as_system(|vcpu| vcpu.locked_update::<u8>(address, |access| access | 1)).map(drop)
    }

    /// Sets or clears the busy bit of a task-state segment.
    pub(crate) fn set_busy(&mut self, address: u64, busy: bool) -> Step {
        let address = address.wrapping_add(5);
        let update = |access: u8| if busy { access | kind::BUSY } else { access & !kind::BUSY };
        self.as_system(|vcpu| vcpu.locked_update::<u8>(address, update)).map(drop)
    }

    /// The stack segment `selector` for privilege level `level`, after all checks.
    #[inline]
    pub(crate) fn stack_segment(&mut self, selector: u16, level: u8, refusal: Refusal) -> Step<Segment> {
        if is_null(selector) {
            return Err(refusal.of(0));
        }
        let descriptor = self.descriptor(selector, refusal)?;
        if (selector & 3) as u8 != level || descriptor.dpl() != level || !descriptor.is_writable() {
            return Err(refusal.of(selector));
        }
        if !descriptor.present() {
            return Err(refusal.absent(vector::SS, selector));
        }
        self.mark_accessed(descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// The data segment `selector` (for DS, ES, FS, GS) at privilege level `level`, after all checks.
    #[inline]
    pub(crate) fn data_segment(&mut self, selector: u16, level: u8, refusal: Refusal) -> Step<Segment> {
        if is_null(selector) {
            return Ok(null_segment(selector, 0));
        }
        let descriptor = self.descriptor(selector, refusal)?;
        let privileged = !descriptor.is_conforming_code() && descriptor.dpl() < level.max((selector & 3) as u8);
        if !descriptor.is_readable() || privileged {
            return Err(refusal.of(selector));
        }
        if !descriptor.present() {
            return Err(refusal.absent(vector::NP, selector));
        }
        self.mark_accessed(descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// The code segment to which control goes at privilege level `level`: for far JMP and CALL, and through call gates, after the
    /// checks that they share (SDM vol. 3, 5.8.1).
    pub(crate) fn check_code(&self, selector: u16, descriptor: Descriptor, refusal: Refusal) -> Step {
        let malformed = self.long_mode() && descriptor.is_long() && descriptor.is_big();
        if !descriptor.is_code() || malformed {
            return Err(refusal.of(selector));
        }
        Ok(())
    }

    /// The offset of a control transfer into `code`, checked: canonical for 64-bit code, else cut to 32 bits and within the
    /// limit.
    #[inline]
    pub(crate) fn check_entry(&self, code: Descriptor, offset: u64, ext: u16) -> Step<u64> {
        if self.long_mode() && code.is_long() {
            return if crate::mmu::walk::is_canonical(offset) { Ok(offset) } else { Err(Trap::gp(ext)) };
        }
        let offset = offset & 0xffff_ffff;
        if offset > u64::from(code.limit()) { Err(Trap::gp(ext)) } else { Ok(offset) }
    }
}
