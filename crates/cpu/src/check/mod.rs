//! The lock-step checker: a translated block is run by the interpreter first, its effects are taken back, and then the
//! translated code runs; both must end alike.
//!
//! While the interpreter runs for comparison, no page can be written on the fast path, so that every write passes
//! [`Vcpu::note_checked_write`]; an access to anything but RAM ends the comparison, because it cannot be taken back.
//! Meant for one vCPU: what others write meanwhile shows up as differences.

use std::fmt::Write as _;

use platform::x86::Segment;

use crate::decode::Mode;
use crate::interp::fpu::{Vectors, X87Copy};
use crate::mmu::tlb::AccessMode;
use crate::state::flags::Flags;
use crate::state::{RIP, Shadow};
use crate::translate::course::Course;
use crate::translate::flags;
use crate::{Step, Trap, Vcpu};

/// What the interpreter has written, to be taken back.
#[derive(Default)]
pub(crate) struct Log {
    writes: Vec<Write>,
    /// The bytes before, of all writes in turn.
    old: Vec<u8>,
    /// Something was touched that cannot be taken back.
    aborted: bool,
}

/// One write, or what it wrote to.
#[derive(Clone, Copy)]
struct Write {
    gpa: u64,
    /// Where its bytes are among those of all writes.
    start: usize,
    len: usize,
}

impl Write {
    fn bytes(self) -> std::ops::Range<usize> {
        self.start..self.start + self.len
    }
}

impl Log {
    fn clear(&mut self) {
        self.writes.clear();
        self.old.clear();
        self.aborted = false;
    }
}

/// The state that code of a block changes, but for the vector registers.
#[derive(Clone, Copy)]
struct Snapshot {
    regs: [u64; 32],
    flags: Flags,
    fault_address: u64,
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

/// What the manuals leave undefined, so that the interpreter need not agree with the host.
#[derive(Clone, Copy, Default)]
struct Undefined {
    /// Bits of RFLAGS.
    flags: u64,
    /// Bits of registers and memory where such flags may have been stored.
    stored: u64,
}

/// What the interpreter made of the first rounds of an unrolled loop, where translated code may stop: accesses of several rounds
/// together may not be allowed.
struct Round {
    after: Snapshot,
    vectors: Vectors,
    executed: usize,
    /// Number of writes, and what they wrote to.
    writes: usize,
    new: Vec<u8>,
}

/// What the interpreter made of a block. Large, so it stays in its place and serves one block after the other.
pub(crate) struct Expected {
    before: Snapshot,
    after: Snapshot,
    /// The vector registers afterwards.
    vectors: Vectors,
    outcome: Step,
    /// Instructions that were run.
    executed: usize,
    log: Box<Log>,
    /// The bytes afterwards at the places of the log's writes.
    new: Vec<u8>,
    /// Rounds before the last.
    rounds: Vec<Round>,
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
        let code = self.memory.pages().holds_code(gpa) || self.memory.pages().holds_code(gpa.wrapping_add(len - 1));
        if let Some(log) = self.check.as_mut() {
            let write = Write { gpa, start: log.old.len(), len: len as usize };
            log.old.resize(write.bytes().end, 0);
            let read = self.memory.read(gpa, &mut log.old[write.bytes()]).is_ok();
            log.aborted |= !read || code;
            log.writes.push(write);
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
        Snapshot {
            x87: self.fpu.copy_x87(),
            regs: self.regs,
            flags: self.flags,
            fault_address: self.fault_address,
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

    /// Runs the instructions of a block in the interpreter, or fewer if a branch leaves it before, and takes their effects back; a
    /// loop is gone through until it ends. `None` if they cannot be compared.
    pub(crate) fn rehearse(&mut self, course: &Course) -> Option<Box<Expected>> {
        let mut expected = self.rehearsal.take().unwrap_or_else(|| self.blank());
        expected.vectors = self.fpu.vectors;
        expected.log.clear();
        expected.rounds.clear();
        expected.before = self.snapshot();
        let attention = self.attention;
        self.tlb.exchange();
        self.check = Some(std::mem::take(&mut expected.log));
        let mut outcome = Ok(());
        let (mut executed, mut left, mut in_round) = (0, course.count, course.period);
        while left != 0 {
            let done = course.period - in_round;
            let jump = course.jump_after(done);
            let run = self.interpret_some(jump.map_or(in_round, |(n, _)| n - done));
            outcome = run.outcome;
            executed += if outcome.is_err() { run.begun - 1 } else { run.begun };
            left = left.saturating_sub(run.begun as u32);
            in_round = in_round.saturating_sub(run.begun as u32);
            if outcome.is_err() || self.cannot_be_compared() {
                break;
            }
            let round_ends = in_round == 0;
            let jumps = jump.filter(|(n, _)| *n == done + run.begun as u32);
            let start = expected.before.regs[RIP];
            let goes_on = match jumps {
                Some((_, target)) => self.regs[RIP] == start & !0xfff | u64::from(target),
                None if round_ends => self.regs[RIP] == start,
                None => run.straight,
            };
            if !goes_on {
                break;
            }
            if round_ends && left != 0 {
                in_round = course.period;
                let round = self.round(executed);
                expected.rounds.push(round);
            }
        }
        self.tlb.exchange();
        expected.log = self.check.take()?;
        (expected.outcome, expected.executed) = (outcome, executed);
        expected.after = self.snapshot();
        self.take_back(&mut expected);
        // A repeated instruction that stopped for an event, an interrupt shadow: there the two may differ.
        let special = self.shadow != Shadow::None || self.attention != 0 || outcome == Err(Trap::Leave);
        self.attention = attention;
        self.shadow = Shadow::None;
        if expected.log.aborted || special {
            self.rehearsal = Some(expected);
            return None;
        }
        Some(expected)
    }

    /// What the interpreter has made of it so far.
    fn round(&mut self, executed: usize) -> Round {
        let after = self.snapshot();
        let (mut new, mut writes) = (Vec::new(), 0);
        if let Some(log) = self.check.as_ref() {
            (new, writes) = (vec![0; log.old.len()], log.writes.len());
            for write in &log.writes {
                let _ = self.memory.read(write.gpa, &mut new[write.bytes()]);
            }
        }
        Round { after, vectors: self.fpu.vectors, executed, writes, new }
    }

    /// Makes the round that translated code has stopped after, if it is not the last, the one to compare with.
    fn choose_round(&self, expected: &mut Expected, outcome: Step) {
        let memory = |writes: &[Write], new: &[u8]| {
            let mut bytes = vec![0; new.len()];
            writes.iter().all(|write| {
                let _ = self.memory.read(write.gpa, &mut bytes[write.bytes()]);
                bytes[write.bytes()] == new[write.bytes()]
            })
        };
        let same = |round: &Round| {
            round.after.regs[..16] == self.regs[..16]
                && round.after.regs[RIP] == self.regs[RIP]
                && memory(&expected.log.writes[..round.writes], &round.new)
        };
        if outcome.is_err() {
            return;
        }
        if let Some(found) = expected.rounds.iter().position(same) {
            let round = expected.rounds.swap_remove(found);
            (expected.after, expected.vectors, expected.executed) = (round.after, round.vectors, round.executed);
            (expected.outcome, expected.new) = (Ok(()), round.new);
            expected.log.writes.truncate(round.writes);
        }
    }

    fn blank(&mut self) -> Box<Expected> {
        let (before, after) = (self.snapshot(), self.snapshot());
        let (log, new) = Default::default();
        Box::new(Expected {
            before,
            after,
            vectors: self.fpu.vectors,
            outcome: Ok(()),
            executed: 0,
            log,
            new,
            rounds: Vec::new(),
        })
    }

    /// Undoes what the interpreter has done, after noting what it wrote to memory and vector registers.
    fn take_back(&mut self, expected: &mut Expected) {
        let (log, before) = (&expected.log, &expected.before);
        expected.new.resize(log.old.len(), 0);
        for write in &log.writes {
            let _ = self.memory.read(write.gpa, &mut expected.new[write.bytes()]);
        }
        for write in log.writes.iter().rev() {
            let _ = self.memory.write(write.gpa, &log.old[write.bytes()]);
        }
        (self.regs, self.flags, self.fault_address) = (before.regs, before.flags, before.fault_address);
        std::mem::swap(&mut self.fpu.vectors, &mut expected.vectors);
        self.fpu.opmasks = before.opmasks;
        if self.fpu.mxcsr() != before.mxcsr {
            self.fpu.set_mxcsr(before.mxcsr);
        }
        self.fpu.restore_x87(&before.x87);
        self.restore_system(&before.system);
    }

    /// Compares the state after translated code with the interpreter's. Nothing else can be trusted after a difference, so it
    /// ends the program.
    pub(crate) fn compare(&mut self, mut expected: Box<Expected>, course: &Course, outcome: Step) {
        // A repeated instruction may have stopped for an event.
        if outcome != Err(Trap::Leave) {
            self.choose_round(&mut expected, outcome);
            let mut found = self.differences(&expected, outcome, Undefined::default());
            if !found.is_empty() {
                // Which flags mean nothing takes a while to find out.
                let undefined = self.undefined(&expected, course);
                found = self.differences(&expected, outcome, undefined);
            }
            if !found.is_empty() {
                self.report(&expected, course, &found);
            }
        }
        self.rehearsal = Some(expected);
    }

    /// What differs, a line each.
    fn differences(&mut self, expected: &Expected, outcome: Step, undefined: Undefined) -> String {
        let mut found = String::new();
        let now = self.snapshot();
        for r in (0..16).chain([RIP]) {
            let (want, got) = (expected.after.regs[r], self.regs[r]);
            if (want ^ got) & !undefined.stored != 0 {
                let _ = writeln!(found, "register {r}: interpreter {want:#x}, translated {got:#x}");
            }
        }
        let (want, got) = (expected.after.flags.value() & !undefined.flags, self.flags.value() & !undefined.flags);
        if want != got {
            let _ = writeln!(found, "flags: interpreter {want:#x}, translated {got:#x}");
        }
        if expected.vectors != self.fpu.vectors {
            for (n, (want, got)) in expected.vectors.iter().zip(&self.fpu.vectors).enumerate() {
                if want != got {
                    let _ = writeln!(found, "vector {n}: interpreter {want:x?}, translated {got:x?}");
                }
            }
        }
        let (want, got) = (expected.after.opmasks, self.fpu.opmasks);
        if want != got {
            let _ = writeln!(found, "opmasks: interpreter {want:x?}, translated {got:x?}");
        }
        if !expected.after.x87.looks_like(&now.x87) {
            let (want, got) = (expected.after.x87.visible(), now.x87.visible());
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
        let mut bytes = Vec::new();
        for (i, write) in expected.log.writes.iter().enumerate() {
            bytes.resize(write.len, 0);
            let _ = self.memory.read(write.gpa, &mut bytes);
            let (gpa, want, got) = (write.gpa, &expected.new[write.bytes()], &bytes[..]);
            let stored = undefined.stored.to_le_bytes().into_iter().chain(std::iter::repeat(0));
            if want.iter().zip(got).zip(stored).any(|((want, got), stored)| (want ^ got) & !stored != 0) {
                let _ = writeln!(found, "write {i} at {gpa:#x}: interpreter {want:x?}, translated {got:x?}");
            }
        }
        found
    }

    /// What the manuals leave undefined where the interpreter ended.
    fn undefined(&mut self, expected: &Expected, course: &Course) -> Undefined {
        use iced_x86::Mnemonic as N;
        let round = self.listing(expected.before.regs[RIP], course);
        let executed = round.iter().cycle().take(expected.executed);
        let mut stored = 0;
        let flags = executed.fold(0, |before, instruction| {
            stored |= match instruction.mnemonic() {
                N::Pushf | N::Pushfd | N::Pushfq | N::Syscall => flags::to_rflags(before),
                N::Lahf => flags::to_rflags(before) << 8,
                _ => 0,
            };
            flags::undefined(instruction, before)
        });
        Undefined { flags: flags::to_rflags(flags), stored }
    }

    /// The instructions of one round of the block at a linear address, none that begins in the next page.
    fn listing(&mut self, linear: u64, course: &Course) -> Vec<iced_x86::Instruction> {
        let page = linear & !0xfff;
        let mut bytes = vec![0; 0x1000 + 15];
        for (address, part) in [(page, 0..0x1000), (page.wrapping_add(0x1000), 0x1000..0x1000 + 15)] {
            let phys = self.resolve(address, crate::mmu::Access::Execute).unwrap_or(u64::MAX);
            let _ = self.memory.read(phys, &mut bytes[part]);
        }
        let mut decoder =
            iced_x86::Decoder::with_ip(self.mode.code_bits(), &bytes, page, iced_x86::DecoderOptions::NONE);
        let mut list: Vec<iced_x86::Instruction> = Vec::new();
        let mut offset = (linear & 0xfff) as usize;
        for n in 1..=course.period {
            if offset >= 0x1000 || decoder.set_position(offset).is_err() {
                break;
            }
            decoder.set_ip(page.wrapping_add(offset as u64));
            list.push(decoder.decode());
            let jump = course.jumps.iter().find(|(after, _)| *after == n);
            offset = jump.map_or(decoder.position(), |(_, target)| *target as usize);
        }
        list
    }

    fn report(&mut self, expected: &Expected, course: &Course, found: &str) {
        let rip = expected.before.regs[RIP];
        let mut text = format!("translated code differs from the interpreter in the block at {rip:#x}\n{found}before:");
        for (r, value) in expected.before.regs[..16].iter().enumerate() {
            let _ = write!(text, " r{r}={value:#x}");
        }
        let _ = writeln!(text, " rflags={:#x}", expected.before.flags.value());
        let mut formatter = iced_x86::IntelFormatter::new();
        for instruction in self.listing(rip, course) {
            let _ = write!(text, "{:#x}: ", instruction.ip());
            iced_x86::Formatter::format(&mut formatter, &instruction, &mut text);
            text.push('\n');
        }
        eprintln!("{text}");
        std::process::abort();
    }
}
