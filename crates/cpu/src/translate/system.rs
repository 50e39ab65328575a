//! System instructions that run without leaving emitted code: they work on the state in the vCPU, as the interpreter does,
//! and go to it whenever something is not as usual.

use std::mem::offset_of;

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use platform::x86::{Segment, cr4, rflags, seg};

use super::asm::{Mem, cond, reg::*};
use super::block::{Insn, Request, Translator};
use super::classify::How;
use super::{resident, spilled};
use crate::Vcpu;
use crate::decode::Flow;
use crate::interp::data::SPINNING;
use crate::jit::calls::FastCalls;
use crate::jit::context::{Context, at};
use crate::mmu::tlb::{AccessMode, Tlb};
use crate::state::Msrs;
use crate::state::flags::Flags;

/// Bits of CR4 that emitted code relies on: when one changes, all code is dropped.
pub(crate) const BUILT_IN: u64 = cr4::SMAP | cr4::FSGSBASE;

/// Offsets in the vCPU.
const SYS: i32 = (offset_of!(Vcpu, flags) + offset_of!(Flags, sys)) as i32;
const WAITING: i32 = offset_of!(Vcpu, interrupt_waiting) as i32;
const CPL: i32 = offset_of!(Vcpu, cpl) as i32;
const ACCESS: i32 = (offset_of!(Vcpu, tlb) + Tlb::MODE) as i32;
const KERNEL_GS: i32 = (offset_of!(Vcpu, msrs) + offset_of!(Msrs, kernel_gs_base)) as i32;
const TSC_AUX: i32 = (offset_of!(Vcpu, msrs) + offset_of!(Msrs, tsc_aux)) as i32;

const TSC_OFFSET: i32 = (offset_of!(Vcpu, msrs) + offset_of!(Msrs, tsc_offset)) as i32;
const PAUSES: i32 = offset_of!(Vcpu, pauses) as i32;
const CR4: i32 = offset_of!(Vcpu, cr4) as i32;

const USER: usize = AccessMode::User as usize;
const SUPERVISOR: usize = AccessMode::Supervisor as usize;
const SUPERVISOR_AC: usize = AccessMode::SupervisorAc as usize;

fn segment(index: usize) -> i32 {
    (offset_of!(Vcpu, segments) + index * size_of::<Segment>()) as i32
}
fn segment_base(index: usize) -> i32 {
    (offset_of!(Vcpu, seg_base) + index * 8) as i32
}

/// A field of [`FastCalls`] in the context block.
macro_rules! fast {
    ($field:ident) => {
        (offset_of!(Context, calls) + offset_of!(FastCalls, $field)) as i32
    };
}

/// Whether the instruction runs here; `None`: it is none of the system's.
pub(super) fn form(i: &Instruction, flow: Flow, request: &Request<'_>) -> Option<How> {
    use Mnemonic as N;
    let kernel = request.access != USER;
    let native = match i.mnemonic() {
        N::Cli | N::Sti | N::Clac | N::Stac | N::Swapgs | N::Sysretq => kernel,
        // Two runs do not read the same.
        N::Rdtsc | N::Rdtscp => request.host_counter && !request.checking,
        N::Pushfq | N::Popfq | N::Pushfd | N::Popfd | N::Rdpid | N::Cld | N::Pause => true,
        N::Syscall => request.mode.is_64(),
        N::Rdfsbase | N::Rdgsbase | N::Wrfsbase | N::Wrgsbase => request.cr4 & cr4::FSGSBASE != 0,
        N::Mov if matches!(i.code(), Code::Mov_r64_cr | Code::Mov_r32_cr) => kernel && control_register(i).is_some(),
        N::Mov if stores_selector(i) => true,
        _ => return None,
    };
    // Where this guest CPU does not have the instruction, the block ends at it.
    let ending = matches!(i.mnemonic(), N::Sti | N::Popfq | N::Popfd | N::Syscall | N::Sysretq);
    let native = native && (flow == Flow::Next || ending);
    Some(if native { How::System } else { How::Interpret })
}

/// Whether a block ends behind the instruction when it runs here.
pub(super) fn ends(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Syscall | Mnemonic::Sysretq)
}

/// Whether the instruction holds off interrupts for one more.
pub(super) fn casts_shadow(i: &Instruction) -> bool {
    i.mnemonic() == Mnemonic::Sti
}

fn stores_selector(i: &Instruction) -> bool {
    matches!(i.code(), Code::Mov_r64m16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_rm16_Sreg)
}

/// Offset in the vCPU of the control register that is read.
fn control_register(i: &Instruction) -> Option<i32> {
    use iced_x86::Register as R;
    Some(match i.op1_register() {
        R::CR0 => offset_of!(Vcpu, cr0),
        R::CR2 => offset_of!(Vcpu, cr2),
        R::CR3 => offset_of!(Vcpu, cr3),
        R::CR4 => offset_of!(Vcpu, cr4),
        _ => return None,
    } as i32)
}

impl Translator<'_> {
    /// Emits a system instruction.
    pub(super) fn system(&mut self, insn: &Insn) {
        use Mnemonic as N;
        let i = &insn.instruction;
        match i.mnemonic() {
            N::Cli => self.change_flags(4, !(rflags::IF as u32)),
            N::Cld => {
                self.change_flags(4, !(rflags::DF as u32));
                self.asm.op_mem(true, &[0xc7], 0, &Mem::context(at!(backward)));
                self.asm.u32(0);
            }
            N::Pause => self.pause(insn),
            N::Sti => self.sti(insn),
            N::Stac | N::Clac => self.change_access(insn),
            N::Swapgs => self.swapgs(),
            N::Pushfq | N::Pushfd => self.pushf(insn),
            N::Popfq | N::Popfd => self.popf(insn),
            N::Syscall => self.syscall(insn),
            N::Sysretq => self.sysret(insn),
            N::Rdfsbase | N::Rdgsbase => self.read_base(insn),
            N::Wrfsbase | N::Wrgsbase => self.write_base(insn),
            N::Rdpid => {
                self.vcpu(RCX);
                self.asm.load32(RCX, &Mem::base(RCX, TSC_AUX));
                self.put_register(insn.op.r1, RCX);
            }
            N::Rdtsc | N::Rdtscp => self.read_counter(insn),
            N::Mov if matches!(i.code(), Code::Mov_r64_cr | Code::Mov_r32_cr) => {
                self.vcpu(RCX);
                self.load_word(RCX, &Mem::base(RCX, control_register(i).unwrap_or(0)));
                self.put_register(insn.op.r1, RCX);
            }
            _ => self.store_selector(insn),
        }
    }

    /// The address of the vCPU.
    fn vcpu(&mut self, to: u8) {
        self.asm.load(to, &Mem::context(at!(vcpu)));
    }

    /// Loads the selector of a segment register into RCX.
    pub(super) fn load_selector(&mut self, index: u8) {
        self.vcpu(RCX);
        let selector = segment(usize::from(index.min(5))) + offset_of!(Segment, selector) as i32;
        // MOVZX r32, m16
        self.asm.op_mem(false, &[0x0f, 0xb7], RCX, &Mem::base(RCX, selector));
    }

    /// MOV from a segment register.
    fn store_selector(&mut self, insn: &Insn) {
        let memory = insn.instruction.op0_kind() == OpKind::Memory;
        let place = if memory { self.access(insn, 2, true, 1) } else { spilled(insn.op.r1) };
        let index = if memory { insn.op.r1 } else { insn.op.r2 };
        self.load_selector(index);
        if !memory && insn.op.osize != 2 {
            return self.put_register(insn.op.r1, RCX);
        }
        // MOV r/m16, CX
        self.asm.u8(0x66);
        match resident(insn.op.r1).filter(|_| !memory) {
            Some(host) => self.asm.op_reg(false, &[0x89], RCX, host),
            None => self.asm.op_mem(false, &[0x89], RCX, &place),
        }
    }

    /// Stores 64 bits into a guest register.
    fn put_register(&mut self, guest: u8, from: u8) {
        match resident(guest) {
            Some(host) => self.asm.mov(host, from),
            None => self.asm.store(&spilled(guest), from),
        }
    }

    /// Puts the arithmetic flags aside; RAX must be left alone until [`Translator::recall_flags`].
    pub(super) fn spare_flags(&mut self) {
        self.asm.store(&Mem::context(at!(scratch2)), RAX);
        // LAHF; SETO AL
        self.asm.put(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    pub(super) fn recall_flags(&mut self) {
        self.load_spared_flags();
        self.asm.load(RAX, &Mem::context(at!(scratch2)));
    }

    /// ADD AL, 127; SAHF: flags from RAX, where [`Translator::spare_flags`] had put them.
    fn load_spared_flags(&mut self) {
        self.asm.put(&[0x04, 0x7f, 0x9e]);
    }

    /// RDTSC, RDTSCP: as [`crate::HostCounter`] says, plus the vCPU's offset.
    fn read_counter(&mut self, insn: &Insn) {
        self.vcpu(R14);
        self.spare_flags();
        if self.access == USER {
            // TEST dword [cr4], TSD
            self.asm.op_mem(false, &[0xf7], 0, &Mem::base(R14, CR4));
            self.asm.u32(cr4::TSD as u32);
            let allowed = self.asm.jcc_short(cond::Z);
            self.recall_flags();
            let forbidden = self.asm.jmp_forward();
            self.slow_path(insn, forbidden, false);
            self.asm.bind(allowed);
        }
        self.asm.mov(R15, RAX);
        // LFENCE: not before what the guest did before. RDTSC; SHL RDX, 32; OR RDX, RAX
        self.asm.put(&[0x0f, 0xae, 0xe8, 0x0f, 0x31, 0x48, 0xc1, 0xe2, 32, 0x48, 0x09, 0xc2]);
        self.asm.op_mem(true, &[0x03], RDX, &Mem::context(at!(tsc_base)));
        self.asm.load(RCX, &Mem::context(at!(tsc_highest)));
        self.asm.load(RAX, &Mem::base(RCX, 0));
        let again = self.asm.here();
        // CMP RDX, RAX: another vCPU may have read more; then that it is.
        self.asm.put(&[0x48, 0x39, 0xc2]);
        let later = self.asm.jcc_short(cond::A);
        self.asm.mov(RDX, RAX);
        let done = self.asm.jmp_forward();
        self.asm.bind(later);
        // LOCK CMPXCHG [RCX], RDX
        self.asm.put(&[0xf0, 0x48, 0x0f, 0xb1, 0x11]);
        self.asm.jcc_back(cond::NZ, again);
        self.asm.bind(done);
        self.asm.op_mem(true, &[0x03], RDX, &Mem::base(R14, TSC_OFFSET));
        self.asm.mov32(RCX, RDX);
        // SHR RDX, 32
        self.asm.put(&[0x48, 0xc1, 0xea, 32]);
        self.asm.mov(RAX, R15);
        self.load_spared_flags();
        self.asm.mov32(RAX, RCX);
        if insn.instruction.mnemonic() == Mnemonic::Rdtscp {
            self.asm.load32(R12, &Mem::base(R14, TSC_AUX));
        }
    }

    /// PAUSE; each so many times the interpreter offers the host CPU to others.
    fn pause(&mut self, insn: &Insn) {
        self.vcpu(R14);
        // MOVZX ECX, byte [pauses]
        self.asm.op_mem(false, &[0x0f, 0xb6], RCX, &Mem::base(R14, PAUSES));
        self.asm.lea(false, RCX, &Mem::base(RCX, 1));
        self.asm.op_mem(false, &[0x88], RCX, &Mem::base(R14, PAUSES));
        self.asm.lea(true, RCX, &Mem::base(RCX, -i32::from(SPINNING)));
        let spinning = self.asm.jrcxz_far();
        self.slow_path(insn, spinning, false);
        self.asm.put(&[0xf3, 0x90]);
    }

    /// AND (4) or OR (1) of RFLAGS' system bits. Uses R14.
    fn change_flags(&mut self, operation: u8, mask: u32) {
        self.vcpu(R14);
        self.spare_flags();
        self.asm.op_mem(false, &[0x81], operation, &Mem::base(R14, SYS));
        self.asm.u32(mask);
        self.recall_flags();
    }

    /// To the slow path if an interrupt waits for RFLAGS.IF. Uses RCX; R14 is the vCPU. Keeps flags.
    fn unless_interrupt_waits(&mut self, insn: &Insn) {
        self.asm.op_mem(false, &[0x0f, 0xb6], RCX, &Mem::base(R14, WAITING));
        let quiet = self.asm.jrcxz();
        let waits = self.asm.jmp_forward();
        self.slow_path(insn, waits, false);
        self.asm.bind(quiet);
    }

    /// STI. Nothing looks at events before the end of the next instruction: blocks do not end here.
    fn sti(&mut self, insn: &Insn) {
        self.vcpu(R14);
        self.unless_interrupt_waits(insn);
        self.change_flags(1, rflags::IF as u32);
    }

    /// STAC, CLAC. With CR4.SMAP the access mode tells RFLAGS.AC.
    fn change_access(&mut self, insn: &Insn) {
        let sets = insn.instruction.mnemonic() == Mnemonic::Stac;
        if self.cr4 & cr4::SMAP == 0 {
            let (operation, mask) = if sets { (1, rflags::AC as u32) } else { (4, !(rflags::AC as u32)) };
            return self.change_flags(operation, mask);
        }
        let wanted = if sets { SUPERVISOR_AC } else { SUPERVISOR };
        if self.access == wanted {
            return;
        }
        let change = if sets { rflags::AC as i32 } else { -(rflags::AC as i32) };
        self.vcpu(R14);
        self.asm.load(RCX, &Mem::base(R14, SYS));
        self.asm.lea(true, RCX, &Mem::base(RCX, change));
        self.asm.store(&Mem::base(R14, SYS), RCX);
        self.store_byte(ACCESS, wanted as u8);
        self.access = wanted;
    }

    /// MOV byte [vCPU + field], value; R14 is the vCPU.
    fn store_byte(&mut self, field: i32, value: u8) {
        self.asm.op_mem(false, &[0xc6], 0, &Mem::base(R14, field));
        self.asm.u8(value);
    }

    fn swapgs(&mut self) {
        self.vcpu(R14);
        self.asm.load(RCX, &Mem::context(at!(gs_base)));
        self.asm.load(R15, &Mem::base(R14, KERNEL_GS));
        self.asm.store(&Mem::base(R14, KERNEL_GS), RCX);
        self.store_base(seg::GS);
    }

    /// Makes R15 the base of FS or GS; R14 is the vCPU.
    fn store_base(&mut self, index: usize) {
        let field = if index == seg::FS { at!(fs_base) } else { at!(gs_base) };
        self.asm.store(&Mem::context(field), R15);
        self.asm.store(&Mem::base(R14, segment_base(index)), R15);
        self.asm.store(&Mem::base(R14, segment(index) + offset_of!(Segment, base) as i32), R15);
    }

    fn read_base(&mut self, insn: &Insn) {
        let field = if insn.instruction.mnemonic() == Mnemonic::Rdfsbase { at!(fs_base) } else { at!(gs_base) };
        if insn.op.osize == 8 {
            self.asm.load(RCX, &Mem::context(field));
        } else {
            self.asm.load32(RCX, &Mem::context(field));
        }
        self.put_register(insn.op.r1, RCX);
    }

    /// To the slow path unless a register holds an address in the lower half. Uses RCX, keeps flags.
    fn unless_low(&mut self, insn: &Insn, address: u8) {
        // Bits 62:47 and 63:48 must be clear.
        for count in [47, 48] {
            self.asm.rorx(RCX, address, count);
            self.asm.movzx16(RCX, RCX);
            let low = self.asm.jrcxz();
            let other = self.asm.jmp_forward();
            self.slow_path(insn, other, false);
            self.asm.bind(low);
        }
    }

    /// WRFSBASE, WRGSBASE with an address in the lower half; others go to the slow path.
    fn write_base(&mut self, insn: &Insn) {
        let index = if insn.instruction.mnemonic() == Mnemonic::Wrfsbase { seg::FS } else { seg::GS };
        let value = self.in_register(insn.op.r1, R15);
        if insn.op.osize == 8 {
            self.asm.mov(R15, value);
            self.unless_low(insn, R15);
        } else {
            self.asm.mov32(R15, value);
        }
        self.vcpu(R14);
        self.store_base(index);
    }

    /// The arithmetic flags, as in RFLAGS, in RCX. Changes them.
    fn arithmetic_flags(&mut self) {
        // PUSHFQ; POP RCX; AND ECX, imm32
        self.asm.put(&[0x9c, 0x59, 0x81, 0xe1]);
        self.asm.u32(rflags::ARITHMETIC as u32);
    }

    /// Loads the arithmetic flags from RCX.
    fn load_arithmetic_flags(&mut self) {
        self.asm.store(&Mem::context(at!(scratch2)), RAX);
        // MOV EAX, ECX; SHR EAX, 11; AND AL, 1; MOV AH, CL
        self.asm.put(&[0x89, 0xc8, 0xc1, 0xe8, 11, 0x24, 1, 0x88, 0xcc]);
        self.recall_flags();
    }

    fn pushf(&mut self, insn: &Insn) {
        let word = self.word();
        self.add_word(R15, R13, -(word as i32));
        self.check(insn, word, true);
        self.asm.lea(true, R15, &Self::operand());
        self.vcpu(R14);
        self.spare_flags();
        self.arithmetic_flags();
        self.asm.op_mem(true, &[0x0b], RCX, &Mem::base(R14, SYS));
        self.store_word(&Mem::base(R15, 0), RCX);
        self.recall_flags();
        self.add_word(R13, R13, -(word as i32));
    }

    /// POPF that changes no more than the arithmetic flags and, in the kernel, IF.
    fn popf(&mut self, insn: &Insn) {
        const WATCHED: u64 = rflags::TF | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID;
        let kernel = self.access != USER;
        let watched = if kernel { WATCHED & !rflags::IF } else { WATCHED };
        self.asm.mov(R15, R13);
        self.check(insn, self.word(), false);
        if kernel {
            self.asm.store(&Mem::context(at!(scratch)), R14);
            self.vcpu(R14);
            self.unless_interrupt_waits(insn);
            self.asm.load(R14, &Mem::context(at!(scratch)));
        }
        self.load_word(RCX, &Self::operand());
        self.vcpu(R14);
        self.asm.load(R15, &Mem::base(R14, SYS));
        // XOR R15, RCX; TEST R15D, imm32
        self.asm.op_reg(true, &[0x31], RCX, R15);
        self.asm.op_reg(false, &[0xf7], 0, R15);
        self.asm.u32(watched as u32);
        let other = self.asm.jcc_forward(cond::NZ);
        self.slow_path(insn, other, false);
        if kernel {
            // AND R15D, IF; XOR [sys], R15
            self.asm.op_reg(false, &[0x81], 4, R15);
            self.asm.u32(rflags::IF as u32);
            self.asm.op_mem(true, &[0x31], R15, &Mem::base(R14, SYS));
        }
        self.load_arithmetic_flags();
        self.add_word(R13, R13, self.word() as i32);
    }

    /// Loads CS and SS as [`FastCalls`] has them, and the privilege level; R14 is the vCPU. Uses RCX.
    fn enter_level(&mut self, images: [i32; 2], level: u8, access: usize) {
        for (index, image) in [seg::CS, seg::SS].into_iter().zip(images) {
            for word in (0..size_of::<Segment>() as i32).step_by(8) {
                self.asm.load(RCX, &Mem::context(image + word));
                self.asm.store(&Mem::base(R14, segment(index) + word), RCX);
            }
            self.asm.op_mem(true, &[0xc7], 0, &Mem::base(R14, segment_base(index)));
            self.asm.u32(0);
        }
        self.asm.op_mem(true, &[0xc7], 0, &Mem::context(at!(backward)));
        self.asm.u32(0);
        self.store_byte(CPL, level);
        self.store_byte(ACCESS, access as u8);
        self.access = access;
    }

    /// To the slow path unless a word of the context block says that the fast way is prepared. Uses RCX.
    fn unless_prepared(&mut self, insn: &Insn, word: i32) {
        self.asm.load(RCX, &Mem::context(word));
        let ready = self.asm.jrcxz();
        let slow = self.asm.jmp_forward();
        self.slow_path(insn, slow, false);
        self.asm.bind(ready);
    }

    /// SYSCALL to a handler with all arithmetic flags, TF, IF, DF and AC clear.
    fn syscall(&mut self, insn: &Insn) {
        self.unless_prepared(insn, fast!(no_call));
        self.arithmetic_flags();
        self.vcpu(R14);
        self.asm.load(R15, &Mem::base(R14, SYS));
        // OR RCX, R15; MOV R11, RCX; AND R15, [keep]
        self.asm.op_reg(true, &[0x09], R15, RCX);
        self.asm.mov(11, RCX);
        self.asm.op_mem(true, &[0x23], R15, &Mem::context(fast!(keep)));
        self.asm.store(&Mem::base(R14, SYS), R15);
        let access = if self.cr4 & cr4::SMAP == 0 { SUPERVISOR_AC } else { SUPERVISOR };
        self.enter_level([fast!(call_cs), fast!(call_ss)], 0, access);
        self.asm.load(R12, &Mem::context(at!(page)));
        self.asm.lea(true, R12, &Mem::base(R12, insn.next as i32));
        self.asm.load(R15, &Mem::context(fast!(target)));
        // XOR ECX, ECX; ADD ECX, 1: all flags clear.
        self.asm.put(&[0x31, 0xc9, 0x83, 0xc1, 1]);
        self.look_up(insn, 0, true);
    }

    /// SYSRET to an address in the lower half, with no system flag but IF set, and no interrupt waiting for that.
    fn sysret(&mut self, insn: &Insn) {
        /// What R11 decides but for the arithmetic flags.
        const WATCHED: u32 = 0x3c_7fd5 & !(rflags::ARITHMETIC as u32);
        self.unless_prepared(insn, fast!(no_return));
        self.vcpu(R14);
        self.unless_interrupt_waits(insn);
        self.unless_low(insn, R12);
        // MOV ECX, R11D; AND ECX, imm32; CMP ECX, IF
        self.asm.mov32(RCX, 11);
        self.asm.put(&[0x81, 0xe1]);
        self.asm.u32(WATCHED);
        self.asm.put(&[0x81, 0xf9]);
        self.asm.u32(rflags::IF as u32);
        let odd = self.asm.jcc_forward(cond::NZ);
        self.slow_path(insn, odd, false);
        self.asm.op_mem(true, &[0xc7], 0, &Mem::base(R14, SYS));
        self.asm.u32((rflags::IF | rflags::FIXED) as u32);
        self.enter_level([fast!(return_cs), fast!(return_ss)], 3, USER);
        self.asm.mov(R15, R12);
        self.asm.mov(RCX, 11);
        self.load_arithmetic_flags();
        self.look_up(insn, 0, true);
    }
}
