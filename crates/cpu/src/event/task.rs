//! Hardware task switches (SDM vol. 3, chapter 8). Outside long mode only.

use platform::x86::{Segment, cr0, rflags, seg};

use crate::event::debug::DR6_BT;
use crate::event::descriptor::{Descriptor, Refusal, is_null, kind, null_segment, segment_8086};
use crate::state::attention;
use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

/// Why tasks are switched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reason {
    Jump,
    Call,
    /// IRET with RFLAGS.NT set.
    Return,
    /// Through a task gate in the IDT.
    Event {
        /// The EXT bit of error codes.
        ext: u16,
        /// The saved RF is set.
        resumes: bool,
    },
}

impl Reason {
    fn ext(self) -> u16 {
        match self {
            Self::Event { ext, .. } => ext,
            _ => 0,
        }
    }
    /// Whether the new task returns to the old one.
    fn nests(self) -> bool {
        matches!(self, Self::Call | Self::Event { .. })
    }
}

/// A task-state segment that may be switched to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    selector: u16,
    descriptor: Descriptor,
}

/// Where things are in a task-state segment (SDM vol. 3, figures 8-2 and 8-10).
struct Layout {
    /// Size of registers in bytes: 4 or 2.
    word: u64,
    cr3: Option<u64>,
    ip: u64,
    flags: u64,
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    registers: u64,
    /// ES, CS, SS, DS and, in the 32-bit form, FS and GS.
    segments: u64,
    segment_count: usize,
    ldt: u64,
    /// The word whose bit 0 is T.
    trap: Option<u64>,
    /// Smallest limit.
    limit: u32,
}

const LAYOUT32: Layout = Layout {
    word: 4,
    cr3: Some(0x1c),
    ip: 0x20,
    flags: 0x24,
    registers: 0x28,
    segments: 0x48,
    segment_count: 6,
    ldt: 0x60,
    trap: Some(0x64),
    limit: 0x67,
};

const LAYOUT16: Layout = Layout {
    word: 2,
    cr3: None,
    ip: 0x0e,
    flags: 0x10,
    registers: 0x12,
    segments: 0x22,
    segment_count: 4,
    ldt: 0x2a,
    trap: None,
    limit: 0x2b,
};

fn layout(kind: u8) -> &'static Layout {
    if kind & kind::WIDE != 0 { &LAYOUT32 } else { &LAYOUT16 }
}

/// What a task-state segment holds.
struct Task {
    cr3: Option<u64>,
    ip: u64,
    flags: u64,
    registers: [u64; 8],
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Vcpu {
    /// The available task-state segment that `selector` names.
    pub(crate) fn available_task(&mut self, selector: u16, refusal: Refusal) -> Step<Target> {
        self.task(selector, refusal, [kind::TSS16, kind::TSS32])
    }

    /// The task-state segment that `selector` names, which must be in the GDT and of one of `kinds`.
    fn task(&mut self, selector: u16, refusal: Refusal, kinds: [u8; 2]) -> Step<Target> {
        if is_null(selector) || selector & 4 != 0 {
            return Err(refusal.of(selector));
        }
        let descriptor = self.descriptor(selector, refusal)?;
        if !kinds.contains(&descriptor.kind()) {
            return Err(refusal.of(selector));
        }
        if !descriptor.present() {
            return Err(refusal.absent(vector::NP, selector));
        }
        Ok(Target { selector, descriptor })
    }

    /// IRET with RFLAGS.NT: back to the task that the current one's back link names.
    pub(crate) fn return_from_task(&mut self) -> Step<Step> {
        let base = self.tr.base;
        let link: u16 = self.as_system(|vcpu| vcpu.load(vcpu.system_linear(base, 0)))?;
        let target = self.task(link, Refusal::ts(0), [kind::TSS16_BUSY, kind::TSS32_BUSY])?;
        self.switch_task(target, Reason::Return)
    }

    /// Switches tasks. The outer result is of everything before the commit point, where the old task is still in place;
    /// the inner one is of the loads that follow, whose exceptions are the new task's.
    pub(crate) fn switch_task(&mut self, target: Target, reason: Reason) -> Step<Step> {
        let ext = reason.ext();
        let new = layout(target.descriptor.kind());
        if target.descriptor.limit() < new.limit {
            return Err(Refusal::ts(ext).of(target.selector));
        }
        let task = self.read_task(target.descriptor.base(), new)?;
        self.save_task(reason)?;
        if reason.nests() {
            let (base, link) = (target.descriptor.base(), self.tr.selector);
            self.as_system(|vcpu| vcpu.store(vcpu.system_linear(base, 0), link))?;
        } else if let Some(address) = self.descriptor_address(self.tr.selector, 8) {
            self.set_busy(address, false)?;
        }
        if reason != Reason::Return {
            self.set_busy(target.descriptor.address, true)?;
        }
        self.tr = target.descriptor.system_segment(target.selector, 0);
        self.tr.access |= u32::from(kind::BUSY);
        self.cr0 |= cr0::TS;
        Ok(self.enter_new_task(task, reason))
    }

    fn read_task(&mut self, base: u64, layout: &Layout) -> Step<Task> {
        self.as_system(|vcpu| {
            let mut word = |offset| vcpu.load_task_word(base, offset, layout.word);
            let mut registers = [0; 8];
            for (i, register) in registers.iter_mut().enumerate() {
                *register = word(layout.registers + layout.word * i as u64)?;
            }
            let mut segments = [0; 6];
            for (i, selector) in segments.iter_mut().enumerate().take(layout.segment_count) {
                *selector = word(layout.segments + layout.word * i as u64)? as u16;
            }
            Ok(Task {
                cr3: layout.cr3.map(&mut word).transpose()?,
                ip: word(layout.ip)?,
                flags: word(layout.flags)?,
                registers,
                segments,
                ldt: word(layout.ldt)? as u16,
                trap: layout.trap.map(word).transpose()?.is_some_and(|trap| trap & 1 != 0),
            })
        })
    }

    fn load_task_word(&mut self, base: u64, offset: u64, size: u64) -> Step<u64> {
        let linear = self.system_linear(base, offset);
        if size == 4 { self.load::<u32>(linear).map(u64::from) } else { self.load::<u16>(linear).map(u64::from) }
    }

    /// Saves the current task in its task-state segment.
    fn save_task(&mut self, reason: Reason) -> Step {
        let layout = layout(self.tr.access as u8);
        let base = self.tr.base;
        let mut flags = self.rflags();
        if reason == Reason::Return {
            flags &= !rflags::NT;
        }
        if matches!(reason, Reason::Event { resumes: true, .. }) {
            flags |= rflags::RF;
        }
        let registers: [u64; 8] = std::array::from_fn(|i| self.regs[i]);
        let words = [(layout.ip, self.rip()), (layout.flags, flags)]
            .into_iter()
            .chain((0..).zip(registers).map(|(i, register)| (layout.registers + layout.word * i, register)));
        self.as_system(|vcpu| {
            // Nothing is written before it is sure that all can be.
            vcpu.check_write(vcpu.system_linear(base, layout.ip), 1)?;
            vcpu.check_write(vcpu.system_linear(base, layout.ldt - 1), 1)?;
            for (offset, value) in words {
                let linear = vcpu.system_linear(base, offset);
                if layout.word == 4 { vcpu.store(linear, value as u32)? } else { vcpu.store(linear, value as u16)? }
            }
            for i in 0..layout.segment_count {
                let linear = vcpu.system_linear(base, layout.segments + layout.word * i as u64);
                vcpu.store(linear, vcpu.segments[i].selector)?;
            }
            Ok(())
        })
    }

    /// Everything behind the commit point: exceptions are raised in the new task.
    fn enter_new_task(&mut self, task: Task, reason: Reason) -> Step {
        if let Some(cr3) = task.cr3.filter(|_| self.paging()) {
            self.cr3 = cr3;
            self.tlb.flush_non_global();
            self.load_pdptes_quietly();
        }
        self.regs[..8].copy_from_slice(&task.registers);
        self.set_rip(task.ip);
        // The level of the new code segment holds from the start; the segments count for nothing until they are loaded.
        let cs = task.segments[seg::CS];
        let v8086 = task.flags & rflags::VM != 0;
        self.cpl = if v8086 { 3 } else { (cs & 3) as u8 };
        let flags = if reason.nests() { task.flags | rflags::NT } else { task.flags };
        for index in 0..6 {
            self.put_segment(index, null_segment(task.segments[index], self.cpl));
        }
        self.ldtr = null_segment(task.ldt, 0);
        // Local breakpoints do not outlive their task.
        self.dr7 &= !0x155;
        self.set_rflags(flags);
        self.update_mode();
        let loaded = self.load_task_segments(&task, Refusal::ts(reason.ext()));
        self.update_mode();
        loaded?;
        if self.rip() > u64::from(self.segments[seg::CS].limit) {
            return Err(Trap::gp(reason.ext()));
        }
        if task.trap {
            self.pending_dr6 |= DR6_BT;
            self.attention |= attention::DEBUG_TRAP;
        }
        Ok(())
    }

    fn load_task_segments(&mut self, task: &Task, refusal: Refusal) -> Step {
        self.ldtr = self.task_ldt(task.ldt, refusal)?;
        if self.v8086() {
            for index in 0..6 {
                self.put_segment(index, segment_8086(task.segments[index]));
            }
            return Ok(());
        }
        let code = self.task_code(task.segments[seg::CS], refusal)?;
        self.put_segment(seg::CS, code);
        let stack = self.stack_segment(task.segments[seg::SS], self.cpl, refusal)?;
        self.put_segment(seg::SS, stack);
        for index in [seg::DS, seg::ES, seg::FS, seg::GS] {
            let segment = self.data_segment(task.segments[index], self.cpl, refusal)?;
            self.put_segment(index, segment);
        }
        Ok(())
    }

    fn task_ldt(&mut self, selector: u16, refusal: Refusal) -> Step<Segment> {
        if is_null(selector) {
            return Ok(null_segment(selector, 0));
        }
        if selector & 4 != 0 {
            return Err(refusal.of(selector));
        }
        let descriptor = self.descriptor(selector, refusal)?;
        if descriptor.kind() != kind::LDT || !descriptor.present() {
            return Err(refusal.of(selector));
        }
        Ok(descriptor.system_segment(selector, 0))
    }

    fn task_code(&mut self, selector: u16, refusal: Refusal) -> Step<Segment> {
        if is_null(selector) {
            return Err(refusal.of(0));
        }
        let code = self.descriptor(selector, refusal)?;
        let (level, dpl) = ((selector & 3) as u8, code.dpl());
        let allowed = if code.is_conforming_code() { dpl <= level } else { dpl == level };
        if !code.is_code() || !allowed {
            return Err(refusal.of(selector));
        }
        if !code.present() {
            return Err(refusal.absent(vector::NP, selector));
        }
        self.mark_accessed(code)?;
        Ok(code.segment(selector))
    }

    /// For instructions: an exception behind the commit point belongs to the new task, whose RIP must not be wound back.
    pub(crate) fn finish_switch(&mut self, switched: Step) -> Step {
        match switched {
            Ok(()) => Ok(()),
            Err(Trap::Fault(exception)) => {
                self.stepping = false;
                self.deliver_exception(exception).and(Err(Trap::Leave))
            }
            other => other,
        }
    }
}
