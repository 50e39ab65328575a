//! Descriptor-table registers (LGDT, LIDT, SGDT, SIDT, LLDT, SLDT, LTR, STR) and looks at descriptors (LAR, LSL, VERR,
//! VERW, ARPL).

use iced_x86::Mnemonic;
use platform::x86::DescriptorTable;

use super::operand::stack_error;
use super::segment::require_protected;
use crate::decode::{Choice, Decoding, Handler, Op, Slot, next};
use crate::event::descriptor::{Descriptor, Refusal, is_null, kind, null_segment};
use crate::mmu::walk::is_canonical;
use crate::state::int::Int;
use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

impl Vcpu {
    /// Limit and base; `op.osize` is the number of bytes of the base that count.
    fn load_table(&mut self, op: &Op) -> Step<DescriptorTable> {
        self.require_cpl0()?;
        // Three bytes are read as four.
        let size = usize::from(op.osize.next_power_of_two() & 15);
        let linear = self.linear(op, size as u64 + 2, false)?;
        let mut bytes = [0; 10];
        self.read_bytes(linear, &mut bytes[..size.min(8) + 2]).map_err(|trap| stack_error(op, trap))?;
        let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
        let base = bytes[2..].iter().take(op.osize.into()).rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        if is_canonical(base) || !self.long_mode() { Ok(DescriptorTable { base, limit }) } else { Err(Trap::gp(0)) }
    }

    fn store_table(&mut self, op: &Op, table: DescriptorTable) -> Step {
        self.refuse_umip()?;
        let size = usize::from(op.osize).min(8);
        let linear = self.linear(op, size as u64 + 2, true)?;
        let mut bytes = [0; 10];
        bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
        bytes[2..].copy_from_slice(&table.base.to_le_bytes());
        self.write_bytes(linear, &bytes[..size + 2]).map_err(|trap| stack_error(op, trap))
    }

    /// The selector operand: a word in memory, or the low half of a register.
    fn selector_operand(&mut self, op: &Op, slot: Slot, register: u8) -> Step<u16> {
        if slot == Slot::Mem { self.load_op(op) } else { Ok(u16::get(&self.regs, register)) }
    }
}

fn lgdt(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.gdtr = vcpu.load_table(op)?;
    Ok(())
}

fn lidt(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.idtr = vcpu.load_table(op)?;
    Ok(())
}

fn sgdt(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.store_table(op, vcpu.gdtr)
}

fn sidt(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.store_table(op, vcpu.idtr)
}

/// Stores a selector: 16 bits in memory, zero-extended in a register.
fn store_selector<const MEMORY: bool>(vcpu: &mut Vcpu, op: &Op, selector: u16) -> Step {
    require_protected(vcpu)?;
    vcpu.refuse_umip()?;
    if MEMORY {
        return vcpu.store_op(op, selector);
    }
    match op.osize {
        2 => selector.set(&mut vcpu.regs, op.r1),
        4 => u32::from(selector).set(&mut vcpu.regs, op.r1),
        _ => u64::from(selector).set(&mut vcpu.regs, op.r1),
    }
    Ok(())
}

fn sldt<const MEMORY: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    store_selector::<MEMORY>(vcpu, op, vcpu.ldtr.selector)
}

fn str<const MEMORY: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    store_selector::<MEMORY>(vcpu, op, vcpu.tr.selector)
}

fn slot(memory: bool) -> Slot {
    if memory { Slot::Mem } else { Slot::Reg }
}

/// A system descriptor of one of `kinds` in the GDT for LLDT or LTR, and the upper half of its base.
fn system_descriptor(vcpu: &mut Vcpu, selector: u16, kinds: [u8; 2]) -> Step<(Descriptor, u64)> {
    if selector & 4 != 0 {
        return Err(Refusal::GP.of(selector));
    }
    let descriptor = vcpu.descriptor(selector, Refusal::GP)?;
    if !kinds.contains(&descriptor.kind()) {
        return Err(Refusal::GP.of(selector));
    }
    if !descriptor.present() {
        return Err(Refusal::GP.absent(vector::NP, selector));
    }
    let upper = vcpu.descriptor_extension(selector, descriptor, Refusal::GP)?;
    if vcpu.long_mode() && !is_canonical(descriptor.base() | upper << 32) {
        return Err(Refusal::GP.of(selector));
    }
    Ok((descriptor, upper))
}

fn lldt<const MEMORY: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    require_protected(vcpu)?;
    vcpu.require_cpl0()?;
    let selector = vcpu.selector_operand(op, slot(MEMORY), op.r1)?;
    vcpu.ldtr = if is_null(selector) {
        null_segment(selector, 0)
    } else {
        let (descriptor, upper) = system_descriptor(vcpu, selector, [kind::LDT; 2])?;
        descriptor.system_segment(selector, upper)
    };
    Ok(())
}

fn ltr<const MEMORY: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    require_protected(vcpu)?;
    vcpu.require_cpl0()?;
    let selector = vcpu.selector_operand(op, slot(MEMORY), op.r1)?;
    if is_null(selector) {
        return Err(Trap::gp(0));
    }
    // Long mode has no 16-bit task-state segments.
    let kinds = if vcpu.long_mode() { [kind::TSS32; 2] } else { [kind::TSS16, kind::TSS32] };
    let (descriptor, upper) = system_descriptor(vcpu, selector, kinds)?;
    vcpu.set_busy(descriptor.address, true)?;
    vcpu.tr = descriptor.system_segment(selector, upper);
    vcpu.tr.access |= u32::from(kind::BUSY);
    Ok(())
}

// ---------------------------------------------------------------- looks at descriptors

impl Vcpu {
    /// The descriptor that `selector` names if it may be looked at: inside its table, visible at CPL and RPL, and if it
    /// is a system descriptor of one of `system`.
    fn visible(&mut self, selector: u16, system: &[u8]) -> Step<Option<Descriptor>> {
        if is_null(selector) || self.descriptor_address(selector, 8).is_none() {
            return Ok(None);
        }
        let descriptor = self.descriptor(selector, Refusal::GP)?;
        let hidden = !descriptor.is_conforming_code() && descriptor.dpl() < self.cpl.max((selector & 3) as u8);
        if hidden {
            return Ok(None);
        }
        if descriptor.kind() < 16 {
            let extended = self.descriptor_extension(selector, descriptor, Refusal::GP);
            // A malformed second half makes the descriptor invalid; a page fault is one.
            if !system.contains(&descriptor.kind()) || extended == Err(Refusal::GP.of(selector)) {
                return Ok(None);
            }
            extended?;
        }
        Ok(Some(descriptor))
    }
}

/// Writes a register of the operand size if the descriptor is visible, and says so in ZF.
fn put_if_visible(vcpu: &mut Vcpu, op: &Op, value: Option<u32>) -> Step {
    if let Some(value) = value {
        match op.osize {
            2 => (value as u16).set(&mut vcpu.regs, op.r1),
            4 => value.set(&mut vcpu.regs, op.r1),
            _ => u64::from(value).set(&mut vcpu.regs, op.r1),
        }
    }
    vcpu.flags.set_zf(value.is_some());
    Ok(())
}

fn lar<const MEMORY: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    require_protected(vcpu)?;
    let selector = vcpu.selector_operand(op, slot(MEMORY), op.r2)?;
    let system: &[u8] = if vcpu.long_mode() {
        &[kind::LDT, kind::TSS32, kind::TSS32_BUSY, kind::CALL32]
    } else {
        &[
            kind::TSS16,
            kind::LDT,
            kind::TSS16_BUSY,
            kind::CALL16,
            kind::TASK,
            kind::TSS32,
            kind::TSS32_BUSY,
            kind::CALL32,
        ]
    };
    let rights = vcpu.visible(selector, system)?.map(|descriptor| descriptor.upper() & 0x00ff_ff00);
    put_if_visible(vcpu, op, rights)
}

fn lsl<const MEMORY: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    require_protected(vcpu)?;
    let selector = vcpu.selector_operand(op, slot(MEMORY), op.r2)?;
    let system: &[u8] = if vcpu.long_mode() {
        &[kind::LDT, kind::TSS32, kind::TSS32_BUSY]
    } else {
        &[kind::TSS16, kind::LDT, kind::TSS16_BUSY, kind::TSS32, kind::TSS32_BUSY]
    };
    let limit = vcpu.visible(selector, system)?.map(Descriptor::limit);
    put_if_visible(vcpu, op, limit)
}

/// VERR, or VERW with `WRITE`.
fn verify<const MEMORY: bool, const WRITE: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    require_protected(vcpu)?;
    let selector = vcpu.selector_operand(op, slot(MEMORY), op.r1)?;
    let descriptor = vcpu.visible(selector, &[])?;
    let allowed = descriptor.is_some_and(|d| if WRITE { d.is_writable() } else { d.is_readable() });
    vcpu.flags.set_zf(allowed);
    Ok(())
}

fn arpl<const MEMORY: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    require_protected(vcpu)?;
    let (target, source) = if MEMORY {
        (vcpu.load_op::<u16>(op)?, u16::get(&vcpu.regs, op.r1))
    } else {
        (u16::get(&vcpu.regs, op.r1), u16::get(&vcpu.regs, op.r2))
    };
    let raise = target & 3 < source & 3;
    if raise {
        // Only then must the operand be writable.
        let raised = target & !3 | source & 3;
        if MEMORY { vcpu.store_op(op, raised)? } else { raised.set(&mut vcpu.regs, op.r1) }
    }
    vcpu.flags.set_zf(raise);
    Ok(())
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    use Mnemonic as N;
    macro_rules! form {
        ($slot:expr, $handler:ident) => {
            match $slot {
                Slot::Mem => $handler::<true> as Handler,
                Slot::Reg => $handler::<false>,
                _ => return None,
            }
        };
    }
    let run: Handler = match d.instruction.mnemonic() {
        N::Lgdt | N::Lidt | N::Sgdt | N::Sidt => {
            // With 16-bit operand size 24 bits of the base are loaded, but 32 stored.
            use iced_x86::Code as C;
            d.op.osize = match d.instruction.code() {
                C::Lgdt_m1632_16 | C::Lidt_m1632_16 => 3,
                C::Lgdt_m1664 | C::Lidt_m1664 | C::Sgdt_m1664 | C::Sidt_m1664 => 8,
                _ => 4,
            };
            match d.instruction.mnemonic() {
                N::Lgdt => lgdt,
                N::Lidt => lidt,
                N::Sgdt => sgdt,
                _ => sidt,
            }
        }
        N::Sldt => form!(d.shape[0], sldt),
        N::Str => form!(d.shape[0], str),
        N::Lldt => form!(d.shape[0], lldt),
        N::Ltr => form!(d.shape[0], ltr),
        N::Lar => form!(d.shape[1], lar),
        N::Lsl => form!(d.shape[1], lsl),
        N::Verr => match d.shape[0] {
            Slot::Mem => verify::<true, false>,
            _ => verify::<false, false>,
        },
        N::Verw => match d.shape[0] {
            Slot::Mem => verify::<true, true>,
            _ => verify::<false, true>,
        },
        N::Arpl => form!(d.shape[0], arpl),
        _ => return None,
    };
    next(run)
}

#[cfg(test)]
mod tests;
