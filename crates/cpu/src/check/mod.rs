//! The lock-step checker: a translated block is run by the interpreter first, its effects are taken back, and then the
//! translated code runs; both must end alike.
//!
//! While the interpreter runs for comparison, no page can be written on the fast path, so that every write passes
//! [`Vcpu::note_checked_write`]; an access to anything but RAM ends the comparison, because it cannot be taken back.
//! Meant for one vCPU: what others write meanwhile shows up as differences.

use std::fmt::Write as _;

use platform::x86::Segment;

use crate::decode::Mode;
use crate::interp::fpu::X87Copy;
use crate::mmu::tlb::AccessMode;
use crate::state::flags::Flags;
use crate::state::{RIP, Shadow};
use crate::translate::flags;
use crate::{Step, Trap, Vcpu};

/// What the interpreter has written, to be taken back.
#[derive(Default)]
pub(crate) struct Log {
    /// Guest-physical address and bytes before.
    writes: Vec<(u64, Vec<u8>)>,
    /// Something was touched that cannot be taken back.
    aborted: bool,
}

/// The state that code of a block changes.
#[derive(Clone, Copy)]
struct Snapshot {
    regs: [u64; 32],
    flags: Flags,
    fault_address: u64,
    vectors: [[u8; 64]; 32],
    opmasks: [u64; 8],
    mxcsr: u32,
    x87: X87Copy,
    system: System,
}

/// What system instructions change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct System {
    flags: u64,
    segments: [Segment; 6],
    bases: [u64; 8],
    cpl: u8,
    kernel_gs_base: u64,
    mode: Mode,
    access: AccessMode,
}

/// What the interpreter made of a block.
pub(crate) struct Expected {
    before: Snapshot,
    after: Snapshot,
    outcome: Step,
    /// Instructions that were run.
    executed: usize,
    /// Guest-physical address and bytes afterwards.
    memory: Vec<(u64, Vec<u8>)>,
}

impl Vcpu {
    /// Notes that `len` bytes at `gpa` are about to be written, if the interpreter runs for comparison.
    #[inline(always)]
    pub(crate) fn note_checked_write(&mut self, gpa: u64, len: u64) {
        if self.check.is_some() {
            self.note_checked_write_slow(gpa, len);
        }
    }

    #[cold]
    fn note_checked_write_slow(&mut self, gpa: u64, len: u64) {
        let mut before = vec![0; len as usize];
        let read = self.memory.read(gpa, &mut before).is_ok();
        let code = self.memory.pages().holds_code(gpa) || self.memory.pages().holds_code(gpa.wrapping_add(len - 1));
        if let Some(log) = self.check.as_mut() {
            log.aborted |= !read || code;
            log.writes.push((gpa, before));
        }
    }

    /// Whether an access outside RAM must not happen because the interpreter runs for comparison.
    #[inline]
    pub(crate) fn refuses_bus_access(&mut self) -> bool {
        if let Some(log) = self.check.as_mut() {
            log.aborted = true;
        }
        self.check.is_some()
    }

    /// Whether something has happened that cannot be taken back.
    #[inline]
    pub(crate) fn cannot_be_compared(&self) -> bool {
        self.check.as_ref().is_none_or(|log| log.aborted)
    }

    fn snapshot(&mut self) -> Snapshot {
        let (x87, live) = self.fpu.copy_x87();
        if live {
            self.fpu.lend();
        }
        Snapshot {
            x87,
            regs: self.regs,
            flags: self.flags,
            fault_address: self.fault_address,
            vectors: self.fpu.vectors,
            opmasks: self.fpu.opmasks,
            mxcsr: self.fpu.mxcsr(),
            system: System {
                flags: self.flags.sys,
                segments: self.segments,
                bases: self.seg_base,
                cpl: self.cpl,
                kernel_gs_base: self.msrs.kernel_gs_base,
                mode: self.mode,
                access: self.tlb.mode(),
            },
        }
    }

    /// Takes back what system instructions have changed.
    fn restore_system(&mut self, system: &System) {
        (self.segments, self.seg_base, self.cpl) = (system.segments, system.bases, system.cpl);
        self.msrs.kernel_gs_base = system.kernel_gs_base;
        self.mode = system.mode;
        self.tlb.force_mode(system.access);
    }

    /// Runs `count` instructions in the interpreter, or fewer if a branch is taken before, and takes their effects back. `None` if
    /// they cannot be compared.
    pub(crate) fn rehearse(&mut self, count: u32) -> Option<Expected> {
        let before = self.snapshot();
        let attention = self.attention;
        self.tlb.exchange();
        self.check = Some(Box::default());
        let mut outcome = Ok(());
        let (mut executed, mut left) = (0, count);
        while left != 0 {
            let run = self.interpret_some(left);
            outcome = run.outcome;
            executed += if outcome.is_err() { run.begun - 1 } else { run.begun };
            left = left.saturating_sub(run.begun as u32);
            if outcome.is_err() || !run.straight || self.cannot_be_compared() {
                break;
            }
        }
        self.tlb.exchange();
        let log = self.check.take()?;
        let after = self.snapshot();
        let memory = log.writes.iter().map(|(gpa, old)| (*gpa, self.bytes_at(*gpa, old.len()))).collect();
        for (gpa, old) in log.writes.iter().rev() {
            let _ = self.memory.write(*gpa, old);
        }
        (self.regs, self.flags, self.fault_address) = (before.regs, before.flags, before.fault_address);
        (self.fpu.vectors, self.fpu.opmasks) = (before.vectors, before.opmasks);
        self.fpu.set_mxcsr(before.mxcsr);
        // Emitted code uses the registers only if they are where it wants them.
        self.fpu.restore_x87(&before.x87, true);
        self.restore_system(&before.system);
        // A repeated instruction that stopped for an event, an interrupt shadow: there the two may differ.
        let special = self.shadow != Shadow::None || self.attention != 0 || outcome == Err(Trap::Leave);
        self.attention = attention;
        self.shadow = Shadow::None;
        (!log.aborted && !special).then_some(Expected { before, after, outcome, executed, memory })
    }

    fn bytes_at(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let _ = self.memory.read(gpa, &mut bytes);
        bytes
    }

    /// Compares the state after translated code with the interpreter's. Nothing else can be trusted after a difference, so it
    /// ends the program.
    pub(crate) fn compare(&mut self, expected: &Expected, instructions: u32, outcome: Step) {
        if outcome == Err(Trap::Leave) {
            // A repeated instruction has stopped for an event.
            return;
        }
        let mut found = String::new();
        let now = self.snapshot();
        for r in (0..16).chain([RIP]) {
            let (want, got) = (expected.after.regs[r], self.regs[r]);
            if want != got {
                let _ = writeln!(found, "register {r}: interpreter {want:#x}, translated {got:#x}");
            }
        }
        let (want, got) = (expected.after.flags.value(), self.flags.value());
        // Which flags mean nothing takes a while to find out.
        let mask = if want == got { 0 } else { !self.undefined_flags(expected) };
        let (want, got) = (want & mask, got & mask);
        if want != got {
            let _ = writeln!(found, "flags: interpreter {want:#x}, translated {got:#x}");
        }
        for (n, (want, got)) in expected.after.vectors.iter().zip(&self.fpu.vectors).enumerate() {
            if want != got {
                let _ = writeln!(found, "vector {n}: interpreter {want:x?}, translated {got:x?}");
            }
        }
        let (want, got) = (expected.after.opmasks, self.fpu.opmasks);
        if want != got {
            let _ = writeln!(found, "opmasks: interpreter {want:x?}, translated {got:x?}");
        }
        let (want, got) = (expected.after.x87.visible(), now.x87.visible());
        if want != got {
            let _ = writeln!(found, "x87: interpreter {want:x?}, translated {got:x?}");
        }
        let (want, got) = (expected.after.mxcsr, self.fpu.mxcsr());
        if want != got {
            let _ = writeln!(found, "MXCSR: interpreter {want:#x}, translated {got:#x}");
        }
        let (want, got) = (expected.after.system, now.system);
        if want != got {
            let _ = writeln!(found, "system state: interpreter {want:x?}, translated {got:x?}");
        }
        if expected.outcome != outcome {
            let _ = writeln!(found, "outcome: interpreter {:?}, translated {outcome:?}", expected.outcome);
        }
        // A place that was written twice is compared with its last value.
        for (i, (gpa, want)) in expected.memory.iter().enumerate() {
            let got = self.bytes_at(*gpa, want.len());
            if got != *want {
                let _ = writeln!(found, "write {i} at {gpa:#x}: interpreter {want:x?}, translated {got:x?}");
            }
        }
        if !found.is_empty() {
            self.report(expected, instructions, &found);
        }
    }

    /// Flags of RFLAGS that the manuals leave undefined where the interpreter ended.
    fn undefined_flags(&mut self, expected: &Expected) -> u64 {
        let executed = self.listing(expected.before.regs[RIP], expected.executed as u32);
        flags::to_rflags(executed.iter().fold(0, |before, instruction| flags::undefined(instruction, before)))
    }

    /// The instructions at a linear address, at most `count`, none that begins in the next page.
    fn listing(&mut self, linear: u64, count: u32) -> Vec<iced_x86::Instruction> {
        let in_page = 0x1000 - (linear & 0xfff) as usize;
        let mut bytes = vec![0; in_page + 15];
        for (address, part) in [(linear, 0..in_page), (linear.wrapping_add(in_page as u64), in_page..in_page + 15)] {
            let phys = self.resolve(address, crate::mmu::Access::Execute).unwrap_or(u64::MAX);
            let _ = self.memory.read(phys, &mut bytes[part]);
        }
        let options = iced_x86::DecoderOptions::NONE;
        let decoder = iced_x86::Decoder::with_ip(self.mode.code_bits(), &bytes, linear, options);
        let inside = |instruction: &iced_x86::Instruction| instruction.ip().wrapping_sub(linear) < in_page as u64;
        decoder.into_iter().take(count as usize).take_while(inside).collect()
    }

    fn report(&mut self, expected: &Expected, instructions: u32, found: &str) {
        let rip = expected.before.regs[RIP];
        let mut text = format!("translated code differs from the interpreter in the block at {rip:#x}\n{found}before:");
        for (r, value) in expected.before.regs[..16].iter().enumerate() {
            let _ = write!(text, " r{r}={value:#x}");
        }
        let _ = writeln!(text, " rflags={:#x}", expected.before.flags.value());
        let mut formatter = iced_x86::IntelFormatter::new();
        for instruction in self.listing(rip, instructions) {
            let _ = write!(text, "{:#x}: ", instruction.ip());
            iced_x86::Formatter::format(&mut formatter, &instruction, &mut text);
            text.push('\n');
        }
        eprintln!("{text}");
        std::process::abort();
    }
}
