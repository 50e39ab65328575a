//! The long-mode side of events: entry through 64-bit gates, and IRETQ (SDM vol. 3, 6.14). Both are on the
//! path of every system call by interrupt, page fault and timer tick, so they touch memory in as few steps as they can.

use platform::x86::{gpr, rflags, seg};

use crate::event::descriptor::{Descriptor, Refusal, kind, null_segment};
use crate::event::enter::Event;
use crate::mmu::walk::is_canonical;
use crate::{Step, Trap, Vcpu};

impl Vcpu {
    pub(super) fn enter_long(&mut self, event: &Event) -> Step {
        let ext = event.ext();
        let (gate, high) = self.long_gate(event)?;
        let selector = gate.gate_selector();
        let (code, level) = self.handler_code(selector, ext)?;
        let rip = gate.gate_offset() | high << 32;
        if !is_canonical(rip) {
            return Err(Trap::gp(ext));
        }
        // The hardware aligns the frame.
        let top = self.long_stack(level, gate.gate_ist(), ext)? & !15;
        let saved = [
            self.rip(),
            u64::from(self.segments[seg::CS].selector),
            self.saved_flags(event.resumes),
            self.regs[gpr::RSP],
            u64::from(self.segments[seg::SS].selector),
        ];
        let rsp = self.at_level(level, |vcpu| vcpu.store_long_frame(top, saved, event.error)).map_err(|trap| {
            // The stack pointer is not canonical.
            if trap == Trap::gp(0) { Trap::ss(ext) } else { trap }
        })?;
        self.mark_accessed(code)?;
        if level != self.cpl {
            self.put_segment(seg::SS, null_segment(u16::from(level), level));
        }
        self.regs[gpr::RSP] = rsp;
        self.finish_entry(gate.kind(), code.segment(selector & !3 | u16::from(level)), level, rip);
        Ok(())
    }

    /// Stores the frame below `top`; returns the new stack pointer.
    #[inline]
    fn store_long_frame(&mut self, top: u64, saved: [u64; 5], error: Option<u16>) -> Step<u64> {
        let Some(error) = error else {
            let rsp = top.wrapping_sub(40);
            self.store_words(rsp, saved)?;
            return Ok(rsp);
        };
        let rsp = top.wrapping_sub(48);
        let [rip, cs, flags, old_rsp, ss] = saved;
        self.store_words(rsp, [u64::from(error), rip, cs, flags, old_rsp, ss])?;
        Ok(rsp)
    }

    /// The 64-bit gate of the event, and bits 63:32 of its offset.
    #[inline]
    fn long_gate(&mut self, event: &Event) -> Step<(Descriptor, u64)> {
        let offset = u64::from(event.vector) * 16;
        if offset + 15 > u64::from(self.idtr.limit) {
            return Err(Trap::gp(event.gate_error()));
        }
        let address = self.idtr.base.wrapping_add(offset);
        let [low, high] = self.as_system(|vcpu| vcpu.load_words(address))?;
        let gate = Descriptor::new(low, address);
        if !matches!(gate.kind(), kind::INTERRUPT32 | kind::TRAP32) {
            return Err(Trap::gp(event.gate_error()));
        }
        self.check_gate(event, gate)?;
        Ok((gate, high))
    }

    /// The stack pointer for privilege level `level` in long mode: from the interrupt stack table, from the TSS if the level
    /// changes, else the current one.
    #[inline]
    pub(crate) fn long_stack(&mut self, level: u8, ist: u64, ext: u16) -> Step<u64> {
        let offset = match ist {
            0 if level == self.cpl => return Ok(self.regs[gpr::RSP]),
            0 => 4 + 8 * u64::from(level),
            n => 0x1c + 8 * n,
        };
        if offset + 7 > u64::from(self.tr.limit) {
            return Err(Refusal::ts(ext).of(self.tr.selector));
        }
        let address = self.tr.base.wrapping_add(offset);
        self.as_system(|vcpu| vcpu.load(address))
    }

    /// IRETQ in 64-bit mode with RFLAGS.NT clear.
    pub(crate) fn iretq(&mut self) -> Step {
        let frame = self.load_words(self.regs[gpr::RSP]);
        let [offset, selector, image, rsp, stack_selector] =
            frame.map_err(|trap| if trap == Trap::gp(0) { Trap::ss(0) } else { trap })?;
        let selector = selector as u16;
        let code = self.return_code(selector)?;
        let level = (selector & 3) as u8;
        let rip = self.check_entry(code, offset, 0)?;
        let stack = self.return_stack(stack_selector as u16, level, code)?;
        self.set_returned_stack(stack, code.is_long(), rsp);
        // With the privileges of before.
        self.load_returned_flags(image & !rflags::VM, 8);
        self.put_segment(seg::CS, code.segment(selector));
        self.set_rip(rip);
        if level != self.cpl {
            self.cpl = level;
            self.drop_privileged_segments();
        }
        self.update_mode();
        Ok(())
    }
}
