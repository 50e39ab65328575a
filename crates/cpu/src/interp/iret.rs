//! Software interrupts and the way back: INT n, INT3, INT1, INTO, IRET (SDM vol. 2).

use iced_x86::Mnemonic;
use platform::x86::{cr4, gpr, rflags, seg};

use crate::decode::{Choice, Decoding, Handler, Op, end};
use crate::event::descriptor::segment_8086;
use crate::event::enter::Event;
use crate::state::attention;
use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

/// Delivers a software interrupt. TF is saved and cleared, and no single-step trap follows.
fn interrupt(vcpu: &mut Vcpu, deliver: impl FnOnce(&mut Vcpu) -> Step) -> Step {
    deliver(vcpu)?;
    vcpu.stepping = false;
    Ok(())
}

fn int_n(vcpu: &mut Vcpu, op: &Op) -> Step {
    interrupt(vcpu, |vcpu| vcpu.software_interrupt(op.imm as u8))
}

fn int3(vcpu: &mut Vcpu, _: &Op) -> Step {
    interrupt(vcpu, |vcpu| vcpu.enter_handler(&Event::software(vector::BP)))
}

/// INT1 ends like a hardware event: no DPL check, EXT set.
fn int1(vcpu: &mut Vcpu, _: &Op) -> Step {
    interrupt(vcpu, |vcpu| vcpu.enter_handler(&Event::exception(vector::DB, None, false)))
}

fn into(vcpu: &mut Vcpu, _: &Op) -> Step {
    if !vcpu.flags.of() {
        return Ok(());
    }
    interrupt(vcpu, |vcpu| vcpu.enter_handler(&Event::software(vector::OF)))
}

impl Vcpu {
    /// Loads RFLAGS from an image of `size` bytes as IRET may at the current privilege level.
    #[inline]
    pub(crate) fn load_returned_flags(&mut self, image: u64, size: u64) {
        let mut writable = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
        if size > 2 {
            writable |= rflags::RF | rflags::AC | rflags::ID;
        }
        if self.cpl <= self.iopl() {
            writable |= rflags::IF;
        }
        if self.cpl == 0 {
            writable |= rflags::IOPL;
            if size > 2 {
                writable |= rflags::VIF | rflags::VIP;
            }
        }
        self.merge_flags(image, writable);
    }

    /// Replaces the `writable` bits of RFLAGS. What depends on CPL is brought up to date by the caller's mode change.
    #[inline]
    pub(crate) fn merge_flags(&mut self, image: u64, writable: u64) {
        let before = self.flags.sys;
        self.flags.sys = before & !writable | image & writable & !rflags::ARITHMETIC | rflags::FIXED;
        self.flags.set_arithmetic(image);
        let debug = rflags::TF | rflags::RF;
        if (before | self.flags.sys) & debug != 0 || self.attention & attention::RESUME != 0 {
            self.update_debug_attention();
        }
        self.interrupts_enabled();
    }

    fn iret(&mut self, size: u64) -> Step {
        self.unblock_nmi();
        if !self.protected() {
            self.iret_real(size)
        } else if self.v8086() {
            self.iret_8086(size)
        } else if self.flags.sys & rflags::NT != 0 {
            if self.long_mode() {
                return Err(Trap::gp(0));
            }
            let switched = self.return_from_task()?;
            self.finish_switch(switched)
        } else if size == 8 {
            // There is no 64-bit operand size outside 64-bit mode.
            self.iretq()
        } else {
            self.iret_protected(size)
        }
    }

    fn iret_real(&mut self, size: u64) -> Step {
        let (ip, cs, image) = self.peek_return(size)?;
        if ip > u64::from(self.segments[seg::CS].limit) {
            return Err(Trap::gp(0));
        }
        self.set_sp(self.sp().wrapping_add(3 * size));
        self.set_segment(seg::CS, self.real_segment(seg::CS, cs));
        self.set_rip(ip);
        let mut writable = rflags::ARITHMETIC | rflags::TF | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT;
        if size == 4 {
            writable |= rflags::RF | rflags::AC | rflags::ID;
        }
        self.merge_flags(image, writable);
        self.update_access_mode();
        Ok(())
    }

    /// From virtual-8086 mode to virtual-8086 mode (SDM vol. 3, 20.2.7 and 20.3.3).
    fn iret_8086(&mut self, size: u64) -> Step {
        let virtual_flag = self.iopl() < 3;
        if virtual_flag && (self.cr4 & cr4::VME == 0 || size != 2) {
            return Err(Trap::gp(0));
        }
        let (ip, cs, mut image) = self.peek_return(size)?;
        if ip > u64::from(self.segments[seg::CS].limit) {
            return Err(Trap::gp(0));
        }
        let mut writable = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
        if virtual_flag {
            let enables = image & rflags::IF != 0;
            if image & rflags::TF != 0 || (enables && self.flags.sys & rflags::VIP != 0) {
                return Err(Trap::gp(0));
            }
            writable |= rflags::VIF;
            image = image & !rflags::VIF | if enables { rflags::VIF } else { 0 };
        } else {
            writable |= rflags::IF;
        }
        if size == 4 {
            writable |= rflags::RF | rflags::AC | rflags::ID;
        }
        self.set_sp(self.sp().wrapping_add(3 * size));
        self.set_segment(seg::CS, segment_8086(cs));
        self.set_rip(ip);
        self.merge_flags(image, writable);
        self.update_access_mode();
        Ok(())
    }

    /// RIP, CS and RFLAGS on the stack.
    #[inline]
    fn peek_return(&mut self, size: u64) -> Step<(u64, u16, u64)> {
        let ip = self.peek_sized(0, size)?;
        let cs = self.peek_sized(size, size)? as u16;
        let flags = self.peek_sized(2 * size, size)?;
        Ok((ip, cs, flags))
    }

    fn iret_protected(&mut self, size: u64) -> Step {
        let (offset, selector, image) = self.peek_return(size)?;
        if image & rflags::VM != 0 && size == 4 && self.cpl == 0 && !self.long_mode() {
            return self.iret_to_8086(offset, selector, image);
        }
        let code = self.return_code(selector)?;
        let level = (selector & 3) as u8;
        let rip = self.check_entry(code, offset, 0)?;
        let outward = level != self.cpl;
        // 64-bit code always has its stack restored.
        if outward || self.in_64bit() {
            let rsp = self.peek_sized(3 * size, size)?;
            let stack_selector = self.peek_sized(4 * size, size)? as u16;
            let stack = self.return_stack(stack_selector, level, code)?;
            let long = self.long_mode() && code.is_long();
            self.set_returned_stack(stack, long, rsp);
        } else {
            self.set_sp(self.sp().wrapping_add(3 * size));
        }
        // With the privileges of before.
        self.load_returned_flags(image, size);
        self.put_segment(seg::CS, code.segment(selector));
        self.cpl = level;
        self.set_rip(rip);
        if outward {
            self.drop_privileged_segments();
        }
        self.update_mode();
        Ok(())
    }

    /// From protected mode, ring 0, to virtual-8086 mode.
    fn iret_to_8086(&mut self, ip: u64, cs: u16, image: u64) -> Step {
        // EIP, CS, EFLAGS, then ESP, SS, ES, DS, FS, GS.
        let mut words = [0; 6];
        for (i, word) in words.iter_mut().enumerate() {
            *word = u64::from(self.peek::<u32>(12 + 4 * i as u64)?);
        }
        if ip > 0xffff {
            return Err(Trap::gp(0));
        }
        let [esp, ss, es, ds, fs, gs] = words;
        for (index, selector) in [(seg::SS, ss), (seg::ES, es), (seg::DS, ds), (seg::FS, fs), (seg::GS, gs)] {
            self.put_segment(index, segment_8086(selector as u16));
        }
        self.put_segment(seg::CS, segment_8086(cs));
        self.regs[gpr::RSP] = esp;
        self.set_rip(ip);
        self.cpl = 3;
        self.set_rflags(image);
        self.update_mode();
        Ok(())
    }
}

fn iret<const SIZE: u64>(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.iret(SIZE)
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    let run: Handler = match d.instruction.mnemonic() {
        Mnemonic::Iret => iret::<2>,
        Mnemonic::Iretd => iret::<4>,
        Mnemonic::Iretq => iret::<8>,
        Mnemonic::Int => int_n,
        Mnemonic::Int3 => int3,
        Mnemonic::Int1 => int1,
        Mnemonic::Into => into,
        _ => return None,
    };
    end(run)
}

#[cfg(test)]
mod tests;
