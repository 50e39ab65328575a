//! Into the handler of an event: through the interrupt vector table in real mode, through the IDT's interrupt, trap and
//! task gates in protected and long mode (SDM vol. 3, 6.10–6.14 and 20.1–20.3; vol. 2, INT n).
//!
//! Everything that can fault comes first; then the registers change.

use platform::x86::{Segment, cr4, gpr, rflags, seg};

use crate::event::descriptor::{Descriptor, Refusal, is_null, kind, null_segment, segment_8086, segment_dpl};
use crate::event::frame::Frame;
use crate::event::task::Reason;
use crate::state::attention;
use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

/// What is delivered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(super) vector: u8,
    /// Error code to push, outside real mode.
    pub(super) error: Option<u16>,
    /// INT n, INT3 or INTO: the gate's privilege level counts, and errors do not have EXT set.
    software: bool,
    /// The saved RF is set.
    pub(super) resumes: bool,
}

impl Event {
    /// An exception, interrupt, NMI, or INT1.
    pub(crate) fn exception(vector: u8, error: Option<u16>, resumes: bool) -> Self {
        Self { vector, error, software: false, resumes }
    }

    /// INT n, INT3 or INTO.
    pub(crate) fn software(vector: u8) -> Self {
        Self { vector, error: None, software: true, resumes: false }
    }

    /// Bit 0 of error codes: the event is external to the program.
    #[inline]
    pub(super) fn ext(&self) -> u16 {
        u16::from(!self.software)
    }

    /// Error code that names the gate.
    pub(super) fn gate_error(&self) -> u16 {
        u16::from(self.vector) << 3 | 2 | self.ext()
    }
}

impl Vcpu {
    /// Enters the handler. RIP is what is saved.
    ///
    /// # Errors
    /// An exception during the delivery; the state is as before.
    #[inline]
    pub(crate) fn enter_handler(&mut self, event: &Event) -> Step {
        if self.long_mode() {
            self.enter_long(event)
        } else if self.protected() {
            self.enter_protected(event)
        } else {
            self.enter_real(event)
        }
    }

    #[inline]
    pub(super) fn check_gate(&self, event: &Event, gate: Descriptor) -> Step {
        if event.software && gate.dpl() < self.cpl {
            return Err(Trap::gp(event.gate_error()));
        }
        if !gate.present() {
            return Err(Trap::np(event.gate_error()));
        }
        Ok(())
    }

    /// The handler's code segment and privilege level.
    #[inline]
    pub(super) fn handler_code(&mut self, selector: u16, ext: u16) -> Step<(Descriptor, u8)> {
        let refusal = Refusal::gp(ext);
        if is_null(selector) {
            return Err(refusal.of(0));
        }
        let code = self.descriptor(selector, refusal)?;
        let unsuitable = self.long_mode() && (!code.is_long() || code.is_big());
        if !code.is_code() || code.dpl() > self.cpl || unsuitable {
            return Err(refusal.of(selector));
        }
        let level = if code.is_conforming_code() { self.cpl } else { code.dpl() };
        if self.v8086() && level != 0 {
            return Err(refusal.of(selector));
        }
        if !code.present() {
            return Err(refusal.absent(vector::NP, selector));
        }
        Ok((code, level))
    }

    // ------------------------------------------------------------ protected and virtual-8086 mode

    fn enter_protected(&mut self, event: &Event) -> Step {
        let offset = u64::from(event.vector) * 8;
        if offset + 7 > u64::from(self.idtr.limit) {
            return Err(Trap::gp(event.gate_error()));
        }
        let address = self.system_linear(self.idtr.base, offset);
        let gate = Descriptor::new(self.as_system(|vcpu| vcpu.load(address))?, address);
        match gate.kind() {
            kind::TASK => {
                self.check_gate(event, gate)?;
                self.enter_task(event, gate.gate_selector())
            }
            kind::INTERRUPT16 | kind::TRAP16 | kind::INTERRUPT32 | kind::TRAP32 => {
                self.check_gate(event, gate)?;
                self.enter_through(event, gate)
            }
            _ => Err(Trap::gp(event.gate_error())),
        }
    }

    fn enter_through(&mut self, event: &Event, gate: Descriptor) -> Step {
        let ext = event.ext();
        let selector = gate.gate_selector();
        let (code, level) = self.handler_code(selector, ext)?;
        let size = if gate.kind() & kind::WIDE != 0 { 4 } else { 2 };
        let inner = if level == self.cpl { None } else { Some(self.inner_stack(level, ext)?) };
        let mut frame = match inner {
            Some((stack, esp)) => Frame::legacy(stack, esp, stack.selector & !3 | ext),
            None => self.current_frame(ext),
        };
        let rip = self.check_entry(code, gate.gate_offset(), ext)?;
        self.at_level(level, |vcpu| {
            if inner.is_some() {
                vcpu.push_outer_stack(&mut frame, size)?;
            }
            vcpu.push_frame(&mut frame, size, vcpu.saved_flags(event.resumes))?;
            vcpu.push_frame(&mut frame, size, u64::from(vcpu.segments[seg::CS].selector))?;
            vcpu.push_frame(&mut frame, size, vcpu.rip())?;
            event.error.map_or(Ok(()), |error| vcpu.push_frame(&mut frame, size, u64::from(error)))
        })?;
        self.mark_accessed(code)?;
        if self.v8086() {
            for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.put_segment(index, null_segment(0, 0));
            }
        }
        if let Some((stack, _)) = inner {
            self.put_segment(seg::SS, stack);
        }
        self.regs[gpr::RSP] = frame.rsp();
        self.finish_entry(gate.kind(), code.segment(selector & !3 | u16::from(level)), level, rip);
        Ok(())
    }

    /// What an entry from an outer level saves first: the data segments of virtual-8086 mode, and the outer stack.
    fn push_outer_stack(&mut self, frame: &mut Frame, size: u64) -> Step {
        if self.v8086() {
            for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.push_frame(frame, size, u64::from(self.segments[index].selector))?;
            }
        }
        self.push_frame(frame, size, u64::from(self.segments[seg::SS].selector))?;
        self.push_frame(frame, size, self.regs[gpr::RSP])
    }

    /// Stack segment and pointer for inner privilege level `level` from the TSS, outside long mode.
    pub(crate) fn inner_stack(&mut self, level: u8, ext: u16) -> Step<(Segment, u64)> {
        let wide = self.tr.access as u8 & kind::WIDE != 0;
        let (offset, size) = if wide { (4 + 8 * u64::from(level), 8) } else { (2 + 4 * u64::from(level), 4) };
        // SDM vol. 2, INT n: the six (or four) bytes that are used must be inside.
        let last = offset + if wide { 5 } else { size - 1 };
        if last > u64::from(self.tr.limit) {
            return Err(Refusal::ts(ext).of(self.tr.selector));
        }
        let pointer = self.system_linear(self.tr.base, offset);
        let selector = self.system_linear(self.tr.base, offset + size / 2);
        let (esp, ss) = self.as_system(|vcpu| {
            let esp = if wide { u64::from(vcpu.load::<u32>(pointer)?) } else { u64::from(vcpu.load::<u16>(pointer)?) };
            Ok((esp, vcpu.load::<u16>(selector)?))
        })?;
        Ok((self.stack_segment(ss, level, Refusal::ts(ext))?, esp))
    }

    /// The end of every entry in protected mode.
    #[inline]
    pub(super) fn finish_entry(&mut self, gate: u8, code: Segment, level: u8, rip: u64) {
        let mut cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if matches!(gate, kind::INTERRUPT16 | kind::INTERRUPT32) {
            cleared |= rflags::IF;
        }
        self.flags.sys &= !cleared;
        self.put_segment(seg::CS, code);
        self.cpl = level;
        self.set_rip(rip);
        self.update_mode();
        if self.attention & (attention::SINGLE_STEP | attention::RESUME) != 0 {
            self.update_debug_attention();
        }
    }

    /// Stores a segment register without what is derived from it; [`Vcpu::update_mode`] follows.
    #[inline]
    pub(crate) fn put_segment(&mut self, index: usize, segment: Segment) {
        self.segments[index] = segment;
        self.seg_base[index] = segment.base;
    }

    /// Task gate.
    fn enter_task(&mut self, event: &Event, selector: u16) -> Step {
        let target = self.available_task(selector, Refusal::gp(event.ext()))?;
        self.switch_task(target, Reason::Event { ext: event.ext(), resumes: event.resumes })??;
        let Some(error) = event.error else { return Ok(()) };
        let size = if self.tr.access as u8 & kind::WIDE != 0 { 4 } else { 2 };
        let mut frame = self.current_frame(event.ext());
        self.push_frame(&mut frame, size, u64::from(error))?;
        self.regs[gpr::RSP] = frame.rsp();
        Ok(())
    }

    // ------------------------------------------------------------ real mode, and as if

    fn enter_real(&mut self, event: &Event) -> Step {
        let offset = u64::from(event.vector) * 4;
        if offset + 3 > u64::from(self.idtr.limit) {
            return Err(Trap::gp(event.gate_error()));
        }
        let address = self.system_linear(self.idtr.base, offset);
        let (ip, cs) = self.load_vector(address)?;
        self.push_8086(self.saved_flags(event.resumes))?;
        self.flags.sys &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        self.set_segment(seg::CS, self.real_segment(seg::CS, cs));
        self.set_rip(ip);
        self.update_debug_attention();
        Ok(())
    }

    fn load_vector(&mut self, address: u64) -> Step<(u64, u16)> {
        let vector: u32 = self.load(address)?;
        Ok((u64::from(vector as u16), (vector >> 16) as u16))
    }

    /// Pushes FLAGS, CS and IP as an 8086 does.
    fn push_8086(&mut self, flags: u64) -> Step {
        let mut frame = self.current_frame(0);
        self.push_frame(&mut frame, 2, flags)?;
        self.push_frame(&mut frame, 2, u64::from(self.segments[seg::CS].selector))?;
        self.push_frame(&mut frame, 2, self.rip())?;
        self.regs[gpr::RSP] = frame.rsp();
        Ok(())
    }

    /// What a load of `selector` gives in real mode: limit and attributes stay, so that "unreal" mode works.
    pub(crate) fn real_segment(&self, index: usize, selector: u16) -> Segment {
        let old = self.segments[index.min(5)];
        if old.access & platform::x86::SEGMENT_UNUSABLE != 0 {
            return Segment::real(selector);
        }
        Segment { selector, base: u64::from(selector) << 4, ..old }
    }

    /// INT n. In virtual-8086 mode it may be refused, or go to the 8086 program's own handler (SDM vol. 3, table 20-2).
    pub(crate) fn software_interrupt(&mut self, vector: u8) -> Step {
        if self.v8086() {
            if self.cr4 & cr4::VME != 0 && !self.redirected(vector)? {
                return self.enter_8086(vector);
            }
            if self.iopl() < 3 {
                return Err(Trap::gp(0));
            }
        }
        self.enter_handler(&Event::software(vector))
    }

    /// Whether the TSS's software-interrupt redirection bitmap sends `vector` to protected mode.
    fn redirected(&mut self, vector: u8) -> Step<bool> {
        let (base, limit) = (self.tr.base, u64::from(self.tr.limit));
        if self.tr.access as u8 & kind::WIDE == 0 || limit < 0x67 {
            return Err(Trap::gp(0));
        }
        let io_map: u16 = self.as_system(|vcpu| vcpu.load(vcpu.system_linear(base, 0x66)))?;
        // The bitmap is the 32 bytes below the I/O permission bitmap.
        let Some(offset) = (u64::from(io_map) + u64::from(vector / 8)).checked_sub(32) else {
            return Err(Trap::gp(0));
        };
        if offset > limit {
            return Err(Trap::gp(0));
        }
        let bits: u8 = self.as_system(|vcpu| vcpu.load(vcpu.system_linear(base, offset)))?;
        Ok(bits >> (vector & 7) & 1 != 0)
    }

    /// To the handler in the virtual-8086 program's vector table at linear address 0.
    fn enter_8086(&mut self, vector: u8) -> Step {
        let (ip, cs) = self.load_vector(u64::from(vector) * 4)?;
        let flags = self.rflags() & !rflags::RF;
        let owned = self.iopl() == 3;
        let image = if owned {
            flags
        } else {
            // The program sees its virtual interrupt flag and full privilege.
            let vif = if flags & rflags::VIF != 0 { rflags::IF } else { 0 };
            flags & !rflags::IF | vif | rflags::IOPL
        };
        self.push_8086(image)?;
        self.flags.sys &= !(rflags::TF | rflags::RF | if owned { rflags::IF } else { rflags::VIF });
        self.set_segment(seg::CS, segment_8086(cs));
        self.set_rip(ip);
        self.update_debug_attention();
        Ok(())
    }

    /// Makes data segments that the new, outer privilege level may not use null.
    pub(crate) fn drop_privileged_segments(&mut self) {
        const CONFORMING: u32 = 0xc;
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let segment = &self.segments[index];
            let unusable = segment.access & platform::x86::SEGMENT_UNUSABLE != 0;
            if !unusable && segment.access & CONFORMING != CONFORMING && segment_dpl(segment) < self.cpl {
                self.put_segment(index, null_segment(0, 0));
            }
        }
    }
}
