//! PUSH, POP, PUSHA, POPA, ENTER, LEAVE.

use iced_x86::Mnemonic;
use platform::x86::{gpr, seg};

use super::operand::{I, M, R1, Source};
use crate::decode::{Choice, Decoding, Handler, Op, Slot, next};
use crate::state::int::Int;
use crate::{Step, Trap, Vcpu};

impl Vcpu {
    /// Linear address of the stack at `sp` (already masked).
    #[inline(always)]
    fn stack_linear(&mut self, sp: u64, size: u64, write: bool) -> Step<u64> {
        self.segment_linear(seg::SS, sp, size, write)
    }

    /// Pushes a value; the stack pointer changes only if the store succeeds.
    #[inline(always)]
    pub(crate) fn push<T: Int>(&mut self, value: T) -> Step {
        let sp = self.sp().wrapping_sub(T::BYTES) & self.mode.stack_mask();
        let linear = self.stack_linear(sp, T::BYTES, true)?;
        self.store(linear, value).map_err(on_stack)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Reads the value `offset` bytes above the stack pointer without popping.
    #[inline(always)]
    pub(crate) fn peek<T: Int>(&mut self, offset: u64) -> Step<T> {
        let sp = self.sp().wrapping_add(offset) & self.mode.stack_mask();
        let linear = self.stack_linear(sp, T::BYTES, false)?;
        self.load(linear).map_err(on_stack)
    }

    /// Pops a value.
    #[inline(always)]
    pub(crate) fn pop<T: Int>(&mut self) -> Step<T> {
        let value = self.peek(0)?;
        self.set_sp(self.sp().wrapping_add(T::BYTES));
        Ok(value)
    }
}

/// Address errors of implicit stack accesses are #SS.
#[cold]
fn on_stack(trap: Trap) -> Trap {
    if trap == Trap::gp(0) { Trap::ss(0) } else { trap }
}

fn push<T: Int, S: Source>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let value = S::get::<T>(vcpu, op)?;
    vcpu.push(value)
}

fn pop_register<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let value: T = vcpu.pop()?;
    value.set(&mut vcpu.regs, op.r1);
    Ok(())
}

/// POP to memory: an address based on the stack pointer uses its value after the pop.
fn pop_memory<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let saved = vcpu.regs[gpr::RSP];
    let value: T = vcpu.pop()?;
    let done = vcpu.store_op(op, value);
    if done.is_err() {
        vcpu.regs[gpr::RSP] = saved;
    }
    done
}

/// PUSHA, PUSHAD: all eight, or none.
fn pusha<T: Int>(vcpu: &mut Vcpu, _: &Op) -> Step {
    let saved = vcpu.regs[gpr::RSP];
    for r in 0..8 {
        let value = if r == gpr::RSP { T::from_u64(saved) } else { T::get(&vcpu.regs, r as u8) };
        if let Err(trap) = vcpu.push(value) {
            vcpu.regs[gpr::RSP] = saved;
            return Err(trap);
        }
    }
    Ok(())
}

/// POPA, POPAD: the saved stack pointer is skipped.
fn popa<T: Int>(vcpu: &mut Vcpu, _: &Op) -> Step {
    let mut values = [T::from_u64(0); 8];
    for (i, value) in values.iter_mut().enumerate() {
        *value = vcpu.peek(i as u64 * T::BYTES)?;
    }
    for (i, value) in values.into_iter().enumerate() {
        let r = 7 - i;
        if r != gpr::RSP {
            value.set(&mut vcpu.regs, r as u8);
        }
    }
    vcpu.set_sp(vcpu.sp().wrapping_add(8 * T::BYTES));
    Ok(())
}

fn leave<T: Int>(vcpu: &mut Vcpu, _: &Op) -> Step {
    let frame = vcpu.regs[gpr::RBP] & vcpu.mode.stack_mask();
    let linear = vcpu.stack_linear(frame, T::BYTES, false)?;
    let value: T = vcpu.load(linear).map_err(on_stack)?;
    vcpu.set_sp(frame.wrapping_add(T::BYTES));
    value.set(&mut vcpu.regs, gpr::RBP as u8);
    Ok(())
}

/// ENTER size, level (SDM vol. 2).
fn enter<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let (size, level) = (op.imm & 0xffff, op.disp & 31);
    let (saved_sp, saved_bp) = (vcpu.regs[gpr::RSP], vcpu.regs[gpr::RBP]);
    let result = enter_frames::<T>(vcpu, level).and_then(|frame| {
        let sp = vcpu.sp().wrapping_sub(size) & vcpu.mode.stack_mask();
        // The new top of the stack must be writable, so that a later push into the frame cannot be what faults first.
        let linear = vcpu.stack_linear(sp, T::BYTES, true)?;
        vcpu.check_write(linear, T::BYTES).map_err(on_stack)?;
        vcpu.set_sp(sp);
        T::from_u64(frame).set(&mut vcpu.regs, gpr::RBP as u8);
        Ok(())
    });
    if result.is_err() {
        vcpu.regs[gpr::RSP] = saved_sp;
        vcpu.regs[gpr::RBP] = saved_bp;
    }
    result
}

fn enter_frames<T: Int>(vcpu: &mut Vcpu, level: u64) -> Step<u64> {
    vcpu.push(T::get(&vcpu.regs, gpr::RBP as u8))?;
    let frame = vcpu.regs[gpr::RSP];
    let mask = vcpu.mode.stack_mask();
    let mut from = vcpu.regs[gpr::RBP];
    for _ in 1..level {
        from = from.wrapping_sub(T::BYTES);
        let linear = vcpu.stack_linear(from & mask, T::BYTES, false)?;
        let display: T = vcpu.load(linear).map_err(on_stack)?;
        vcpu.push(display)?;
    }
    if level > 0 {
        vcpu.push(T::from_u64(frame))?;
    }
    Ok(frame)
}

macro_rules! wide {
    ($size:expr, $handler:ident $(, $param:ty)*) => {
        match $size {
            2 => $handler::<u16 $(, $param)*> as Handler,
            4 => $handler::<u32 $(, $param)*>,
            _ => $handler::<u64 $(, $param)*>,
        }
    };
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    use Mnemonic as N;
    // The width of what is pushed or popped, which for immediates is not the operand's own size.
    let delta = d.instruction.stack_pointer_increment().unsigned_abs();
    let run: Handler = match (d.instruction.mnemonic(), d.shape[0]) {
        (N::Push, Slot::Reg) => wide!(delta, push, R1),
        (N::Push, Slot::Mem) => wide!(delta, push, M),
        (N::Push, Slot::Imm) => wide!(delta, push, I),
        (N::Pop, Slot::Reg) => wide!(delta, pop_register),
        (N::Pop, Slot::Mem) => wide!(delta, pop_memory),
        (N::Pusha, _) => pusha::<u16>,
        (N::Pushad, _) => pusha::<u32>,
        (N::Popa, _) => popa::<u16>,
        (N::Popad, _) => popa::<u32>,
        (N::Leave, _) => {
            use iced_x86::Code as C;
            match d.instruction.code() {
                C::Leavew => leave::<u16>,
                C::Leaved => leave::<u32>,
                _ => leave::<u64>,
            }
        }
        (N::Enter, _) => {
            use iced_x86::Code as C;
            match d.instruction.code() {
                C::Enterw_imm16_imm8 => enter::<u16>,
                C::Enterd_imm16_imm8 => enter::<u32>,
                _ => enter::<u64>,
            }
        }
        _ => return None,
    };
    next(run)
}
