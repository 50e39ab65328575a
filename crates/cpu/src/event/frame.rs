//! A stack that is written before it becomes the current one: what events, call gates and far calls push.

use platform::x86::{Segment, gpr, seg};

use crate::mmu::tlb::AccessMode;
use crate::{Step, Trap, Vcpu};

/// Where the next value goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    segment: Segment,
    rsp: u64,
    /// Mask of the stack's address size; all ones for 64-bit code, where the segment does not count.
    mask: u64,
    /// Error code of the #SS for what does not fit.
    error: u16,
}

impl Frame {
    /// A stack of 64-bit mode.
    #[inline]
    pub(crate) fn long(rsp: u64, error: u16) -> Self {
        Self { segment: Segment::default(), rsp, mask: u64::MAX, error }
    }

    /// A stack in a segment.
    pub(crate) fn legacy(segment: Segment, rsp: u64, error: u16) -> Self {
        let mask = if segment.access & (1 << 14) != 0 { 0xffff_ffff } else { 0xffff };
        Self { segment, rsp, mask, error }
    }

    /// The stack pointer register's new value.
    #[inline]
    pub(crate) fn rsp(&self) -> u64 {
        self.rsp
    }
}

impl Vcpu {
    /// The current stack.
    pub(crate) fn current_frame(&self, error: u16) -> Frame {
        let rsp = self.regs[gpr::RSP];
        if self.in_64bit() { Frame::long(rsp, error) } else { Frame::legacy(self.segments[seg::SS], rsp, error) }
    }

    /// Pushes the low `size` bytes (2, 4 or 8) of a value, with the permissions in force.
    #[inline]
    pub(crate) fn push_frame(&mut self, frame: &mut Frame, size: u64, value: u64) -> Step {
        let sp = frame.rsp.wrapping_sub(size) & frame.mask;
        let linear = if frame.mask == u64::MAX {
            sp
        } else {
            self.linear_in(&frame.segment, sp, size, true).ok_or(Trap::ss(frame.error))?
        };
        let stored = match size {
            2 => self.store(linear, value as u16),
            4 => self.store(linear, value as u32),
            _ => self.store(linear, value),
        };
        stored.map_err(|trap| if trap == Trap::gp(0) { Trap::ss(frame.error) } else { trap })?;
        let keep = if frame.mask == 0xffff { !frame.mask } else { 0 };
        frame.rsp = frame.rsp & keep | sp;
        Ok(())
    }

    /// Runs `access` with the permissions that privilege level `level` will have: for the stack of an inner level.
    #[inline]
    pub(crate) fn at_level<R>(&mut self, level: u8, access: impl FnOnce(&mut Self) -> R) -> R {
        if self.cpl != 3 || level == 3 {
            return access(self);
        }
        let mode = if self.smap_off() { AccessMode::SupervisorAc } else { AccessMode::Supervisor };
        let saved = self.tlb.force_mode(mode);
        let result = access(self);
        self.tlb.force_mode(saved);
        result
    }
}
