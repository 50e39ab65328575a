//! Far control transfer: JMP, CALL and RET to another segment, through call gates, task gates and to
//! task-state segments (SDM vol. 3, 5.8; vol. 2, JMP, CALL, RET).

use iced_x86::{Code, Mnemonic};
use platform::x86::{Segment, gpr, seg};

use crate::decode::{Choice, Decoding, Handler, Op, Slot, end};
use crate::event::descriptor::{Descriptor, Refusal, is_null, kind, null_segment, segment_8086};
use crate::event::frame::Frame;
use crate::event::task::Reason;
use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

/// What pushes nothing, and what does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Transfer {
    Jump,
    Call,
}

impl Vcpu {
    fn is_8086(&self) -> bool {
        !self.protected() || self.v8086()
    }

    /// Makes `code` the current code segment at privilege level `level`, and goes on at `rip`.
    #[inline]
    pub(crate) fn commit_code(&mut self, code: Segment, level: u8, rip: u64) {
        self.put_segment(seg::CS, Segment { selector: code.selector & !3 | u16::from(level), ..code });
        self.cpl = level;
        self.set_rip(rip);
        self.update_mode();
    }

    fn far_transfer(&mut self, transfer: Transfer, selector: u16, offset: u64, size: u64) -> Step {
        if self.is_8086() {
            return self.far_8086(transfer, selector, offset, size);
        }
        if is_null(selector) {
            return Err(Trap::gp(0));
        }
        let descriptor = self.descriptor(selector, Refusal::GP)?;
        let rpl = (selector & 3) as u8;
        if descriptor.kind() >= 16 {
            return self.far_to_code(transfer, selector, descriptor, offset, size);
        }
        // Gates and task-state segments: DPL must be no less than CPL and RPL.
        if descriptor.dpl() < self.cpl.max(rpl) {
            return Err(Refusal::GP.of(selector));
        }
        match (descriptor.kind(), self.long_mode()) {
            (kind::CALL32, _) | (kind::CALL16, false) => self.far_through_gate(transfer, selector, descriptor),
            (kind::TASK, false) => {
                if !descriptor.present() {
                    return Err(Refusal::GP.absent(vector::NP, selector));
                }
                self.far_to_task(transfer, descriptor.gate_selector())
            }
            (kind::TSS16 | kind::TSS32, false) => self.far_to_task(transfer, selector),
            _ => Err(Refusal::GP.of(selector)),
        }
    }

    fn far_8086(&mut self, transfer: Transfer, selector: u16, offset: u64, size: u64) -> Step {
        if offset > u64::from(self.segments[seg::CS].limit) {
            return Err(Trap::gp(0));
        }
        if transfer == Transfer::Call {
            self.push_return(size)?;
        }
        let code = if self.v8086() { segment_8086(selector) } else { self.real_segment(seg::CS, selector) };
        self.set_segment(seg::CS, code);
        self.set_rip(offset);
        Ok(())
    }

    /// Pushes CS and RIP on the current stack.
    fn push_return(&mut self, size: u64) -> Step {
        let mut frame = self.current_frame(0);
        self.push_frame(&mut frame, size, u64::from(self.segments[seg::CS].selector))?;
        self.push_frame(&mut frame, size, self.rip())?;
        self.regs[gpr::RSP] = frame.rsp();
        Ok(())
    }

    /// Directly to a code segment, at the current privilege level.
    fn far_to_code(&mut self, transfer: Transfer, selector: u16, code: Descriptor, offset: u64, size: u64) -> Step {
        self.check_code(selector, code, Refusal::GP)?;
        let rpl = (selector & 3) as u8;
        let allowed =
            if code.is_conforming_code() { code.dpl() <= self.cpl } else { code.dpl() == self.cpl && rpl <= self.cpl };
        if !allowed {
            return Err(Refusal::GP.of(selector));
        }
        if !code.present() {
            return Err(Refusal::GP.absent(vector::NP, selector));
        }
        let rip = self.check_entry(code, offset, 0)?;
        self.mark_accessed(code)?;
        if transfer == Transfer::Call {
            self.push_return(size)?;
        }
        self.commit_code(code.segment(selector), self.cpl, rip);
        Ok(())
    }

    /// Through a call gate.
    fn far_through_gate(&mut self, transfer: Transfer, gate_selector: u16, gate: Descriptor) -> Step {
        let high = self.descriptor_extension(gate_selector, gate, Refusal::GP)?;
        if !gate.present() {
            return Err(Refusal::GP.absent(vector::NP, gate_selector));
        }
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(Trap::gp(0));
        }
        let code = self.descriptor(selector, Refusal::GP)?;
        let unsuitable = self.long_mode() && (!code.is_long() || code.is_big());
        let inward = transfer == Transfer::Call || code.is_conforming_code() || code.dpl() == self.cpl;
        if !code.is_code() || code.dpl() > self.cpl || unsuitable || !inward {
            return Err(Refusal::GP.of(selector));
        }
        if !code.present() {
            return Err(Refusal::GP.absent(vector::NP, selector));
        }
        let rip = self.check_entry(code, gate.gate_offset() | high << 32, 0)?;
        self.mark_accessed(code)?;
        let level = if code.is_conforming_code() { self.cpl } else { code.dpl() };
        if transfer == Transfer::Call {
            self.call_gate_stack(gate, level)?;
        }
        self.commit_code(code.segment(selector), level, rip);
        Ok(())
    }

    /// The stack side of a call through a gate to privilege level `level`; RSP and SS change here, as the last step that can fail.
    fn call_gate_stack(&mut self, gate: Descriptor, level: u8) -> Step {
        if self.long_mode() {
            return self.call_gate_stack_long(level);
        }
        let size = if gate.kind() & kind::WIDE != 0 { 4 } else { 2 };
        if level == self.cpl {
            return self.push_return(size);
        }
        let (stack, esp) = self.inner_stack(level, 0)?;
        let mut frame = Frame::legacy(stack, esp, stack.selector & !3);
        let count = gate.gate_parameters();
        let mut parameters = [0; 31];
        for (i, parameter) in parameters.iter_mut().enumerate().take(count as usize) {
            let offset = i as u64 * size;
            *parameter =
                if size == 4 { u64::from(self.peek::<u32>(offset)?) } else { u64::from(self.peek::<u16>(offset)?) };
        }
        let saved_stack = [u64::from(self.segments[seg::SS].selector), self.regs[gpr::RSP]];
        let back = [u64::from(self.segments[seg::CS].selector), self.rip()];
        self.at_level(level, |vcpu| {
            let parameters = parameters.iter().take(count as usize).rev();
            saved_stack
                .iter()
                .chain(parameters)
                .chain(&back)
                .try_for_each(|&value| vcpu.push_frame(&mut frame, size, value))
        })?;
        self.put_segment(seg::SS, stack);
        self.regs[gpr::RSP] = frame.rsp();
        Ok(())
    }

    fn call_gate_stack_long(&mut self, level: u8) -> Step {
        let mut frame = Frame::long(self.long_stack(level, 0, 0)?, 0);
        let saved_stack = [u64::from(self.segments[seg::SS].selector), self.regs[gpr::RSP]];
        let back = [u64::from(self.segments[seg::CS].selector), self.rip()];
        let changes = level != self.cpl;
        self.at_level(level, |vcpu| {
            let saved = if changes { &saved_stack[..] } else { &[] };
            saved.iter().chain(&back).try_for_each(|&value| vcpu.push_frame(&mut frame, 8, value))
        })?;
        if changes {
            self.put_segment(seg::SS, null_segment(u16::from(level), level));
        }
        self.regs[gpr::RSP] = frame.rsp();
        Ok(())
    }

    fn far_to_task(&mut self, transfer: Transfer, selector: u16) -> Step {
        let target = self.available_task(selector, Refusal::GP)?;
        let reason = if transfer == Transfer::Call { Reason::Call } else { Reason::Jump };
        let switched = self.switch_task(target, reason)?;
        self.finish_switch(switched)
    }

    // ------------------------------------------------------------ returns

    /// The code segment that a far return or IRET goes to, after all checks but that of the offset.
    #[inline]
    pub(crate) fn return_code(&mut self, selector: u16) -> Step<Descriptor> {
        if is_null(selector) {
            return Err(Trap::gp(0));
        }
        let code = self.descriptor(selector, Refusal::GP)?;
        self.check_code(selector, code, Refusal::GP)?;
        let level = (selector & 3) as u8;
        let allowed = if code.is_conforming_code() { code.dpl() <= level } else { code.dpl() == level };
        if level < self.cpl || !allowed {
            return Err(Refusal::GP.of(selector));
        }
        if !code.present() {
            return Err(Refusal::GP.absent(vector::NP, selector));
        }
        self.mark_accessed(code)?;
        Ok(code)
    }

    /// The stack segment that a return to `level` in `code` loads. In 64-bit code inside of level 3 it may be null.
    #[inline]
    pub(crate) fn return_stack(&mut self, selector: u16, level: u8, code: Descriptor) -> Step<Segment> {
        let long = self.long_mode() && code.is_long();
        if is_null(selector) && long && level < 3 && (selector & 3) as u8 == level {
            return Ok(null_segment(selector, level));
        }
        self.stack_segment(selector, level, Refusal::GP)
    }

    /// Takes over the stack pointer of the level returned to: as wide as the new stack.
    #[inline]
    pub(crate) fn set_returned_stack(&mut self, stack: Segment, long: bool, rsp: u64) {
        self.put_segment(seg::SS, stack);
        self.regs[gpr::RSP] = if long {
            rsp
        } else if stack.access & (1 << 14) != 0 {
            rsp & 0xffff_ffff
        } else {
            self.regs[gpr::RSP] & !0xffff | rsp & 0xffff
        };
    }

    /// Reads the value of `size` bytes `offset` bytes above the stack pointer.
    #[inline]
    pub(crate) fn peek_sized(&mut self, offset: u64, size: u64) -> Step<u64> {
        match size {
            2 => self.peek::<u16>(offset).map(u64::from),
            4 => self.peek::<u32>(offset).map(u64::from),
            _ => self.peek::<u64>(offset),
        }
    }

    fn far_return(&mut self, size: u64, released: u64) -> Step {
        let offset = self.peek_sized(0, size)?;
        let selector = self.peek_sized(size, size)? as u16;
        if self.is_8086() {
            if offset > u64::from(self.segments[seg::CS].limit) {
                return Err(Trap::gp(0));
            }
            self.set_sp(self.sp().wrapping_add(2 * size + released));
            let code = if self.v8086() { segment_8086(selector) } else { self.real_segment(seg::CS, selector) };
            self.set_segment(seg::CS, code);
            self.set_rip(offset);
            return Ok(());
        }
        let code = self.return_code(selector)?;
        let level = (selector & 3) as u8;
        let rip = self.check_entry(code, offset, 0)?;
        if level == self.cpl {
            self.set_sp(self.sp().wrapping_add(2 * size + released));
            self.commit_code(code.segment(selector), level, rip);
            return Ok(());
        }
        let rsp = self.peek_sized(2 * size + released, size)?;
        let stack_selector = self.peek_sized(3 * size + released, size)? as u16;
        let stack = self.return_stack(stack_selector, level, code)?;
        let long = self.long_mode() && code.is_long();
        self.set_returned_stack(stack, long, rsp.wrapping_add(released));
        self.commit_code(code.segment(selector), level, rip);
        self.drop_privileged_segments();
        self.update_mode();
        Ok(())
    }
}

fn transfer_immediate<const CALL: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let transfer = if CALL { Transfer::Call } else { Transfer::Jump };
    vcpu.far_transfer(transfer, op.disp as u16, op.imm, u64::from(op.osize))
}

fn transfer_memory<const CALL: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let (offset, selector) = match op.osize {
        2 => vcpu.load_far_pointer::<u16>(op)?,
        4 => vcpu.load_far_pointer::<u32>(op)?,
        _ => vcpu.load_far_pointer::<u64>(op)?,
    };
    let transfer = if CALL { Transfer::Call } else { Transfer::Jump };
    vcpu.far_transfer(transfer, selector, offset, u64::from(op.osize))
}

fn return_far(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.far_return(u64::from(op.osize), op.imm & 0xffff)
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    let mnemonic = d.instruction.mnemonic();
    if !matches!(mnemonic, Mnemonic::Jmp | Mnemonic::Call | Mnemonic::Retf) {
        return None;
    }
    let (run, size): (Handler, u8) = match d.instruction.code() {
        Code::Jmp_ptr1616 => (transfer_immediate::<false>, 2),
        Code::Jmp_ptr1632 => (transfer_immediate::<false>, 4),
        Code::Call_ptr1616 => (transfer_immediate::<true>, 2),
        Code::Call_ptr1632 => (transfer_immediate::<true>, 4),
        Code::Jmp_m1616 => (transfer_memory::<false>, 2),
        Code::Jmp_m1632 => (transfer_memory::<false>, 4),
        Code::Jmp_m1664 => (transfer_memory::<false>, 8),
        Code::Call_m1616 => (transfer_memory::<true>, 2),
        Code::Call_m1632 => (transfer_memory::<true>, 4),
        Code::Call_m1664 => (transfer_memory::<true>, 8),
        Code::Retfw | Code::Retfw_imm16 => (return_far, 2),
        Code::Retfd | Code::Retfd_imm16 => (return_far, 4),
        Code::Retfq | Code::Retfq_imm16 => (return_far, 8),
        _ => return None,
    };
    if d.shape[0] == Slot::None {
        d.op.imm = 0;
    }
    d.op.osize = size;
    end(run)
}

#[cfg(test)]
mod tests;
