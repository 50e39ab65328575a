//! Segment registers: MOV, PUSH, POP, LDS, LES, LFS, LGS, LSS.

use iced_x86::{Code, Mnemonic};
use platform::x86::{gpr, seg};

use crate::decode::{Choice, Decoding, Handler, Op, Slot, end, next};
use crate::event::descriptor::{Refusal, is_null, null_segment, segment_8086};
use crate::state::Shadow;
use crate::state::int::Int;
use crate::{Step, Trap, Vcpu};

impl Vcpu {
    /// Loads a segment register other than CS, in any mode.
    ///
    /// # Errors
    /// #GP, #NP, #SS with the selector (SDM vol. 2, MOV); nothing has changed then.
    #[inline]
    pub(crate) fn load_segment(&mut self, index: usize, selector: u16) -> Step {
        let segment = if !self.protected() {
            self.real_segment(index, selector)
        } else if self.v8086() {
            segment_8086(selector)
        } else if index == seg::SS {
            if is_null(selector) && self.in_64bit() && self.cpl < 3 && (selector & 3) as u8 == self.cpl {
                null_segment(selector, self.cpl)
            } else {
                self.stack_segment(selector, self.cpl, Refusal::GP)?
            }
        } else {
            self.data_segment(selector, self.cpl, Refusal::GP)?
        };
        self.put_segment(index, segment);
        let mode = self.mode;
        self.update_mode();
        if self.mode != mode {
            // The rest of the block was decoded for other segments.
            self.block_end = 0;
        }
        Ok(())
    }
}

/// The segment register in operand `op.r1` or `op.r2`.
fn index(number: u8) -> usize {
    usize::from(number.min(5))
}

fn store_to_register(vcpu: &mut Vcpu, op: &Op) -> Step {
    let selector = vcpu.segments[index(op.r2)].selector;
    match op.osize {
        2 => selector.set(&mut vcpu.regs, op.r1),
        4 => u32::from(selector).set(&mut vcpu.regs, op.r1),
        _ => u64::from(selector).set(&mut vcpu.regs, op.r1),
    }
    Ok(())
}

fn store_to_memory(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.store_op(op, vcpu.segments[index(op.r1)].selector)
}

fn load_from_register(vcpu: &mut Vcpu, op: &Op) -> Step {
    let selector = u16::get(&vcpu.regs, op.r2);
    vcpu.load_segment(index(op.r1), selector)
}

fn load_from_memory(vcpu: &mut Vcpu, op: &Op) -> Step {
    let selector = vcpu.load_op(op)?;
    vcpu.load_segment(index(op.r1), selector)
}

/// MOV SS: interrupts and debug exceptions wait for the next instruction.
fn load_stack_from_register(vcpu: &mut Vcpu, op: &Op) -> Step {
    load_from_register(vcpu, op)?;
    vcpu.shadow = Shadow::MovSs;
    Ok(())
}

fn load_stack_from_memory(vcpu: &mut Vcpu, op: &Op) -> Step {
    load_from_memory(vcpu, op)?;
    vcpu.shadow = Shadow::MovSs;
    Ok(())
}

fn push<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.push(T::from_u64(u64::from(vcpu.segments[index(op.r1)].selector)))
}

fn pop<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let selector = vcpu.peek::<T>(0)?.to_u64() as u16;
    // The stack pointer moves in the address size of the old stack.
    let before = vcpu.regs[gpr::RSP];
    vcpu.set_sp(vcpu.sp().wrapping_add(T::BYTES));
    let loaded = vcpu.load_segment(index(op.r1), selector);
    if loaded.is_err() {
        vcpu.regs[gpr::RSP] = before;
    } else if index(op.r1) == seg::SS {
        vcpu.shadow = Shadow::MovSs;
    }
    loaded
}

/// LDS and its kin: an offset of `T`, then a selector.
fn load_pointer<T: Int, const INDEX: usize>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let (offset, selector) = vcpu.load_far_pointer::<T>(op)?;
    vcpu.load_segment(INDEX, selector)?;
    T::from_u64(offset).set(&mut vcpu.regs, op.r1);
    Ok(())
}

fn pointer_form<const INDEX: usize>(d: &Decoding<'_>) -> Option<Choice> {
    if d.shape[1] != Slot::Mem {
        return None;
    }
    let run: Handler = match d.op.osize {
        2 => load_pointer::<u16, INDEX>,
        4 => load_pointer::<u32, INDEX>,
        _ => load_pointer::<u64, INDEX>,
    };
    Some(flow_of(INDEX, run))
}

/// A load of SS ends the block. So does one of the other flat segments outside 64-bit mode if it changes how code is decoded, which the
/// handler sees.
fn flow_of(index: usize, run: Handler) -> Choice {
    let choice = if index == seg::SS { end(run) } else { next(run) };
    choice.unwrap_or(Choice { run, flow: crate::decode::Flow::End })
}

fn mov_form(d: &Decoding<'_>) -> Option<Choice> {
    match d.instruction.code() {
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
            next(if d.shape[0] == Slot::Mem { store_to_memory } else { store_to_register })
        }
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
            match (usize::from(d.op.r1), d.shape[1]) {
                (seg::CS, _) => None,
                (seg::SS, Slot::Mem) => end(load_stack_from_memory),
                (seg::SS, _) => end(load_stack_from_register),
                (_, Slot::Mem) => next(load_from_memory),
                (_, _) => next(load_from_register),
            }
        }
        _ => None,
    }
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    use Mnemonic as N;
    let mnemonic = d.instruction.mnemonic();
    if matches!(mnemonic, N::Push | N::Pop) && !d.instruction.op0_register().is_segment_register() {
        return None;
    }
    let delta = d.instruction.stack_pointer_increment().unsigned_abs();
    match mnemonic {
        N::Mov => mov_form(d),
        N::Push => next(match delta {
            2 => push::<u16>,
            4 => push::<u32>,
            _ => push::<u64>,
        }),
        N::Pop => {
            let run: Handler = match delta {
                2 => pop::<u16>,
                4 => pop::<u32>,
                _ => pop::<u64>,
            };
            Some(flow_of(usize::from(d.op.r1), run))
        }
        N::Lds => pointer_form::<{ seg::DS }>(d),
        N::Les => pointer_form::<{ seg::ES }>(d),
        N::Lfs => pointer_form::<{ seg::FS }>(d),
        N::Lgs => pointer_form::<{ seg::GS }>(d),
        N::Lss => pointer_form::<{ seg::SS }>(d),
        _ => None,
    }
}

/// #UD outside protected mode, and in virtual-8086 mode.
pub(crate) fn require_protected(vcpu: &Vcpu) -> Step {
    if vcpu.protected() && !vcpu.v8086() { Ok(()) } else { Err(Trap::ud()) }
}

#[cfg(test)]
mod tests;
