//! The interpreter: runs decoded blocks, one operation after the other.

pub(crate) mod alu;
pub(crate) mod bcd;
pub(crate) mod bit;
pub(crate) mod control;
pub(crate) mod cpuid;
pub(crate) mod data;
pub(crate) mod exchange;
pub(crate) mod far;
pub(crate) mod fpu;
pub(crate) mod gate;
pub(crate) mod hostalu;
pub(crate) mod io;
pub(crate) mod iret;
pub(crate) mod msr;
pub(crate) mod muldiv;
pub(crate) mod operand;
pub(crate) mod segment;
pub(crate) mod shift;
pub(crate) mod simd_mask;
pub(crate) mod simd_move;
pub(crate) mod stack;
pub(crate) mod string;
pub(crate) mod syscall;
pub(crate) mod system;
pub(crate) mod table;
pub(crate) mod x87;
pub(crate) mod xsave;

use platform::x86::{Activity, rflags, seg};

use crate::cache::Block;
use crate::decode::{self, Flow, Op};
use crate::event::request::bit as event;
use crate::mmu::Access;
use crate::mmu::walk::is_canonical;
use crate::state::{RIP, Shadow, attention};
use crate::{Step, Trap, Vcpu};

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// [`event::STOP`] was raised.
    Stop,
    /// The vCPU is in HLT with nothing to wake it; whether interrupts are enabled.
    Halt {
        /// RFLAGS.IF.
        interruptible: bool,
    },
    /// The vCPU waits for a start-up IPI.
    WaitForSipi,
    /// Triple fault.
    Shutdown,
}

/// What to do after looking at events.
enum Next {
    Exit(Exit),
    /// Look again: something was delivered.
    Again,
    /// Run one instruction.
    One,
    /// Run a block.
    Block,
}

/// Code to run.
enum Code {
    Cached(u32),
    /// From memory that is not RAM: decoded each time.
    Uncached(Op),
}

/// How [`Vcpu::interpret_some`] went.
pub(crate) struct Run {
    /// Instructions begun, at least one.
    pub(crate) begun: usize,
    /// How the last of them ended.
    pub(crate) outcome: Step,
    /// Execution goes on behind it.
    pub(crate) straight: bool,
}

/// Longest block, in instructions.
const MAX_BLOCK: usize = 64;
/// Longest block, in bytes.
const MAX_BLOCK_BYTES: usize = 512;

impl Vcpu {
    /// Runs the guest until something must be done outside.
    pub fn run(&mut self) -> Exit {
        self.events.enter_guest();
        let exit = self.run_inside(u64::MAX);
        self.fpu.park();
        self.events.leave_guest();
        exit.unwrap_or(Exit::Stop)
    }

    /// Runs at most `count` rounds of one instruction each; `None` if the count ran out first. A round delivers at most one
    /// event. For tests and debuggers.
    pub fn step(&mut self, count: u64) -> Option<Exit> {
        self.events.enter_guest();
        self.attention |= attention::HOST_STEP;
        let exit = self.run_inside(count);
        self.fpu.park();
        self.attention &= !attention::HOST_STEP;
        self.events.leave_guest();
        exit
    }

    fn run_inside(&mut self, count: u64) -> Option<Exit> {
        let mut left = count;
        let mut asleep = self.activity != Activity::Running;
        while left != 0 {
            left -= 1;
            let mut single = false;
            if asleep || self.events.pending() | self.attention != 0 {
                let next = self.attend();
                asleep = self.activity != Activity::Running;
                match next {
                    Next::Exit(exit) => return Some(exit),
                    Next::Again => continue,
                    Next::One => single = true,
                    Next::Block => {}
                }
            }
            self.stepping = single && self.flags.sys & rflags::TF != 0;
            if single {
                // RF serves one instruction, and one that loads RFLAGS may set it again.
                self.flags.sys &= !rflags::RF;
                self.attention &= !attention::RESUME;
            }
            self.shadow = Shadow::None;
            match self.execute(single) {
                Ok(()) | Err(Trap::Leave) => self.instruction_done(single),
                Err(Trap::Halt) => {
                    self.activity = Activity::Halted;
                    self.counters.halts += 1;
                    self.instruction_done(single);
                    if self.events.pending() | (self.attention & !attention::HOST_STEP) == 0 {
                        return Some(self.halt_exit());
                    }
                }
                Err(Trap::Fault(exception)) => {
                    self.refresh_shadow();
                    self.counters.exceptions += 1;
                    if self.deliver_exception(exception).is_err() {
                        return Some(self.shut_down());
                    }
                }
                Err(Trap::Shutdown) => return Some(self.shut_down()),
            }
        }
        None
    }

    fn halt_exit(&self) -> Exit {
        Exit::Halt { interruptible: self.flags.sys & rflags::IF != 0 }
    }

    fn shut_down(&mut self) -> Exit {
        self.activity = Activity::Shutdown;
        Exit::Shutdown
    }

    /// After one instruction (or a block, when nothing special is going on).
    fn instruction_done(&mut self, single: bool) {
        self.refresh_shadow();
        if !single {
            return;
        }
        // A load of SS holds off debug traps until after the next instruction, and the trap of a stepped MOV SS is lost.
        if self.stepping && self.shadow != Shadow::MovSs {
            self.pending_dr6 |= crate::event::debug::DR6_BS;
        }
        if self.pending_dr6 != 0 && self.shadow != Shadow::MovSs {
            self.attention |= attention::DEBUG_TRAP;
        }
    }

    /// Brings the shadow bit of `attention` in line with `shadow`.
    fn refresh_shadow(&mut self) {
        if self.shadow == Shadow::None {
            self.attention &= !attention::SHADOW;
        } else {
            self.attention |= attention::SHADOW;
        }
    }

    /// Looks at requests of other threads and at the reasons in `attention`, in the order of SDM vol. 3, table 6-2.
    #[cold]
    fn attend(&mut self) -> Next {
        self.fpu.park();
        self.follow_rom();
        let pending = self.events.pending();
        if pending & event::SYNC_CODE != 0 {
            self.serve_code_sync();
        }
        if pending & event::CODE != 0 {
            // Whatever runs next is looked up.
            self.events.take(event::CODE);
        }
        if pending & event::STOP != 0 {
            self.events.take(event::STOP);
            return Next::Exit(Exit::Stop);
        }
        if self.activity == Activity::Shutdown && pending & event::INIT == 0 {
            return Next::Exit(Exit::Shutdown);
        }
        if pending & event::INIT != 0 {
            self.events.take(event::INIT);
            self.init();
            return Next::Again;
        }
        if self.activity == Activity::WaitForSipi {
            if self.events.take(event::STARTUP) == 0 {
                return Next::Exit(Exit::WaitForSipi);
            }
            self.start_up(self.events.startup_vector());
            return Next::Again;
        }
        // A start-up IPI to a CPU that does not wait for one is lost.
        if pending & event::STARTUP != 0 {
            self.events.take(event::STARTUP);
        }
        if self.attention & attention::DEBUG_TRAP != 0 && self.shadow != Shadow::MovSs {
            self.attention &= !attention::DEBUG_TRAP;
            return self.deliver_or_shut_down(Self::deliver_debug_trap);
        }
        if self.events.take(event::NMI) != 0 || self.nmi_waiting {
            self.nmi_waiting = true;
            if !self.nmi_blocked && self.shadow != Shadow::MovSs {
                self.nmi_waiting = false;
                self.activity = Activity::Running;
                return self.deliver_or_shut_down(Self::deliver_nmi);
            }
        }
        if self.events.take(event::INTERRUPT) != 0 || self.attention & attention::INTERRUPT != 0 {
            self.attention &= !attention::INTERRUPT;
            self.interrupt_waiting = true;
            if self.flags.sys & rflags::IF != 0 && self.shadow == Shadow::None {
                self.interrupt_waiting = false;
                if let Some(vector) = self.acknowledge_interrupt() {
                    self.activity = Activity::Running;
                    self.counters.interrupts += 1;
                    return self.deliver_or_shut_down(|vcpu| vcpu.deliver_interrupt(vector));
                }
            } else if self.flags.sys & rflags::IF != 0 {
                // Only the shadow is in the way: look again after the next instruction.
                self.attention |= attention::INTERRUPT;
            }
        }
        if self.nmi_waiting && !self.nmi_blocked {
            self.attention |= attention::INTERRUPT;
        }
        if self.activity == Activity::Halted {
            return Next::Exit(self.halt_exit());
        }
        if self.attention & attention::BREAKPOINT != 0 && self.flags.sys & rflags::RF == 0 && self.hits_breakpoint() {
            return self.deliver_or_shut_down(Self::deliver_debug_trap);
        }
        let one = attention::SINGLE_STEP
            | attention::SHADOW
            | attention::BREAKPOINT
            | attention::DEBUG_TRAP
            | attention::RESUME
            | attention::HOST_STEP;
        if self.attention & (one | attention::INTERRUPT) != 0 { Next::One } else { Next::Block }
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        let vector = self.env.interrupt_pending().then(|| self.env.interrupt_acknowledge())??;
        // There may be more behind it.
        if self.env.interrupt_pending() {
            self.interrupt_waiting = true;
        }
        Some(vector)
    }

    fn deliver_or_shut_down(&mut self, deliver: impl FnOnce(&mut Self) -> Step) -> Next {
        match deliver(self) {
            Ok(()) => {
                self.refresh_shadow();
                self.interrupts_enabled();
                Next::Again
            }
            Err(_) => Next::Exit(self.shut_down()),
        }
    }

    /// Runs a block, or its first instruction only.
    fn execute(&mut self, single: bool) -> Step {
        if !single
            && self.jit.is_some()
            && let Some(result) = self.run_translated()
        {
            return result;
        }
        self.interpret(single)
    }

    /// As [`Vcpu::execute`], in the interpreter unless the block has become hot.
    pub(crate) fn interpret(&mut self, single: bool) -> Step {
        self.count_interpreted(single);
        let block = match self.fetch()? {
            Code::Cached(block) => block,
            Code::Uncached(op) => {
                if self.near_limit() && self.within_limit(std::slice::from_ref(&op)) == 0 {
                    return Err(Trap::gp(0));
                }
                return self.run_op(&op);
            }
        };
        if !single
            && self.heat(block)
            && let Some(result) = self.run_translated()
        {
            // The interpreter will rarely see it again.
            self.cache.forget(block);
            return result;
        }
        let ops = self.cache.take_ops(block);
        self.block_end = if single { 1.min(ops.len()) } else { ops.len() };
        let start = self.rip();
        let mut result = Ok(());
        if self.near_limit() {
            let inside = self.within_limit(&ops);
            if inside == 0 {
                result = Err(Trap::gp(0));
            }
            self.block_end = self.block_end.min(inside);
        }
        let mut i = 0;
        while i < self.block_end {
            result = self.run_op(&ops[i]);
            if result.is_err() {
                break;
            }
            i += 1;
        }
        if self.stepping {
            self.step_on_branches(start, ops.first());
        }
        self.cache.put_back(block, ops);
        result
    }

    /// Runs up to `limit` instructions of the block at RIP for comparison with translated code, and ends where one does not go on
    /// with the next.
    pub(crate) fn interpret_some(&mut self, limit: u32) -> Run {
        let block = match self.fetch() {
            Ok(Code::Cached(block)) if !self.near_limit() => block,
            Err(trap) => return Run { begun: 1, outcome: Err(trap), straight: false },
            Ok(_) => {
                // Code outside RAM or near the end of its segment is not compared.
                self.refuses_bus_access();
                return Run { begun: 1, outcome: Ok(()), straight: false };
            }
        };
        let ops = self.cache.take_ops(block);
        self.block_end = ops.len().min(limit as usize);
        let mut run = Run { begun: 0, outcome: Ok(()), straight: true };
        while run.begun < self.block_end && run.straight && run.outcome.is_ok() && !self.cannot_be_compared() {
            let op = &ops[run.begun];
            let next = self.regs[RIP].wrapping_add(u64::from(op.len));
            run.outcome = self.run_op(op);
            run.straight = self.regs[RIP] == next;
            run.begun += 1;
        }
        self.cache.put_back(block, ops);
        run
    }

    #[inline]
    fn count_interpreted(&mut self, single: bool) {
        let counter = match single {
            true => &mut self.counters.single_steps,
            false if self.jit.is_some() && self.translatable() => &mut self.counters.cold_blocks,
            false => &mut self.counters.untranslated_blocks,
        };
        *counter += 1;
    }

    /// Whether a block at RIP might reach beyond the limit of CS.
    #[inline(always)]
    fn near_limit(&self) -> bool {
        let room = u64::from(self.segments[seg::CS].limit).wrapping_sub(self.regs[RIP]);
        room < MAX_BLOCK_BYTES as u64 + 15 && !self.mode.is_64()
    }

    /// How many operations from RIP on lie wholly inside the limit of CS.
    #[cold]
    fn within_limit(&self, ops: &[Op]) -> usize {
        let room = (u64::from(self.segments[seg::CS].limit) + 1).saturating_sub(self.regs[RIP]);
        let mut end = 0;
        let fits = |op: &&Op| {
            end += u64::from(op.len);
            end <= room
        };
        ops.iter().take_while(fits).count()
    }

    #[inline(always)]
    pub(crate) fn run_op(&mut self, op: &Op) -> Step {
        self.regs[RIP] = self.regs[RIP].wrapping_add(u64::from(op.len));
        let result = (op.run)(self, op);
        if let Err(Trap::Fault(_)) = result {
            self.regs[RIP] = self.regs[RIP].wrapping_sub(u64::from(op.len));
        }
        result
    }

    /// The code at CS:RIP.
    #[inline]
    fn fetch(&mut self) -> Step<Code> {
        let rip = self.regs[RIP];
        let linear = if self.mode.is_64() {
            rip
        } else {
            if rip > u64::from(self.segments[seg::CS].limit) {
                return Err(Trap::gp(0));
            }
            self.seg_base[seg::CS].wrapping_add(rip) & 0xffff_ffff
        };
        let generation = self.tlb.generation();
        if let Some(block) = self.cache.find_linear(linear, generation, self.mode, self.memory.pages()) {
            return Ok(Code::Cached(block));
        }
        self.fetch_slow(linear)
    }

    #[cold]
    fn fetch_slow(&mut self, linear: u64) -> Step<Code> {
        if self.host_alu.make_room() {
            self.cache = crate::cache::BlockCache::new();
            self.drop_translations();
        }
        if self.mode.is_64() && !is_canonical(linear) {
            return Err(Trap::gp(0));
        }
        let phys = self.resolve(linear, Access::Execute)?;
        if !self.memory.is_readable(phys, 1) {
            return self.decode_uncached(linear, phys).map(Code::Uncached);
        }
        let next_page = (linear & !0xfff).wrapping_add(0x1000);
        let memory = self.memory.clone();
        // Resolving the second page may fault; then the block is not usable and decoding raises the fault.
        let mode = self.mode;
        let has_second = self.cache.find(phys, mode, memory.pages(), || None);
        let found = match has_second {
            Some(block) => Some(block),
            None => {
                let second =
                    if phys & 0xfff > 0x1000 - 15 { self.resolve(next_page, Access::Execute).ok() } else { None };
                self.cache.find(phys, mode, memory.pages(), || second)
            }
        };
        let block = match found {
            Some(block) => block,
            None => self.decode_block(linear, phys)?,
        };
        self.cache.remember(linear, self.tlb.generation(), mode, block);
        Ok(Code::Cached(block))
    }

    /// Decodes the block at `phys` and puts it into the cache.
    fn decode_block(&mut self, linear: u64, phys: u64) -> Step<u32> {
        let memory = self.memory.clone();
        let tag = self.claim_code_page(phys);
        let in_page = (0x1000 - (phys & 0xfff) as usize).min(MAX_BLOCK_BYTES);
        let in_segment = self.code_left();
        let mut buffer = [0; MAX_BLOCK_BYTES];
        let bytes = &mut buffer[..in_page.min(in_segment)];
        memory.read(phys, bytes).map_err(|_| Trap::gp(0))?;
        let mut ops = Vec::new();
        let mut at = 0;
        while at < bytes.len() && ops.len() < MAX_BLOCK {
            let window = &bytes[at..bytes.len().min(at + 15)];
            let Some((op, flow)) = decode::decode_one(window, self.mode, &self.features, &mut self.host_alu) else {
                break;
            };
            at += usize::from(op.len);
            ops.push(op);
            if flow == Flow::End {
                break;
            }
        }
        if !ops.is_empty() {
            return Ok(self.cache.insert(Block::new(ops, self.mode, phys, tag, None)));
        }
        if in_segment <= in_page {
            return Err(Trap::gp(0));
        }
        // The first instruction reaches into the next page.
        let next_page = (linear & !0xfff).wrapping_add(0x1000);
        let next_page = if self.in_64bit() { next_page } else { next_page & 0xffff_ffff };
        let second = self.resolve(next_page, Access::Execute)?;
        let second_tag = self.claim_code_page(second);
        let mut joined = [0; 15];
        joined[..in_page].copy_from_slice(bytes);
        self.fetch_bytes(second, &mut joined[in_page..]);
        let joined = &joined[..joined.len().min(in_segment)];
        let (op, _) = decode::decode_one(joined, self.mode, &self.features, &mut self.host_alu).ok_or(Trap::gp(0))?;
        let block = Block::new(vec![op], self.mode, phys, tag, Some((second, second_tag)));
        Ok(self.cache.insert(block))
    }

    /// Bytes from RIP to the end of the code segment.
    fn code_left(&self) -> usize {
        if self.mode.is_64() {
            return usize::MAX;
        }
        (u64::from(self.segments[seg::CS].limit) + 1).saturating_sub(self.rip()) as usize
    }

    /// Decodes one instruction from a device.
    fn decode_uncached(&mut self, linear: u64, phys: u64) -> Step<Op> {
        let mut bytes = [0; 15];
        let in_page = (0x1000 - (phys & 0xfff) as usize).min(15);
        self.fetch_bytes(phys, &mut bytes[..in_page]);
        if let Some((op, _)) = decode::decode_one(&bytes[..in_page], self.mode, &self.features, &mut self.host_alu) {
            return Ok(op);
        }
        let second = self.resolve((linear & !0xfff).wrapping_add(0x1000), Access::Execute)?;
        self.fetch_bytes(second, &mut bytes[in_page..]);
        decode::decode_one(&bytes, self.mode, &self.features, &mut self.host_alu).map(|(op, _)| op).ok_or(Trap::ud())
    }

    fn fetch_bytes(&self, phys: u64, bytes: &mut [u8]) {
        if self.memory.read(phys, bytes).is_err() {
            for (i, byte) in bytes.iter_mut().enumerate() {
                *byte = self.env.mmio_read(phys.wrapping_add(i as u64), 1) as u8;
            }
        }
    }

    /// Marks the page as holding code and makes sure that no vCPU can write to it unnoticed.
    pub(crate) fn claim_code_page(&mut self, phys: u64) -> memory::CodeTag {
        let shared = self.shared.clone();
        // Most pages are code on another vCPU already. The order matters: first the tag, then whether its claim has ended.
        if let Some(tag) = self.memory.pages().code_tag(phys)
            && shared.is_settled()
        {
            return tag;
        }
        let events = self.events.clone();
        let _claim = shared.code_lock(&events, || self.serve_code_sync());
        if let Some(tag) = self.memory.pages().code_tag(phys) {
            return tag;
        }
        shared.begin_claim();
        let tag = self.memory.pages().mark_code(phys).unwrap_or(memory::CodeTag(0));
        self.tlb.protect_code(phys & !0xfff);
        shared.sync_code(&events);
        tag
    }

    /// Answers another vCPU's request: no page that holds code may be written on the fast path.
    fn serve_code_sync(&mut self) {
        if self.events.pending() & event::SYNC_CODE != 0 {
            self.tlb.flush_writes();
            self.events.take(event::SYNC_CODE);
        }
    }
}
