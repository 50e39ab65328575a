//! System instructions: flags (PUSHF, POPF, CLI, STI, CLAC, STAC), HLT, control and debug registers, INVLPG, INVPCID,
//! time-stamp counter, cache control, FS/GS base, random numbers.

use iced_x86::{Code, Mnemonic};
use platform::x86::gpr::{RAX, RCX, RDX};
use platform::x86::{cr0, cr4, efer, rflags, seg};

use super::operand::stack_error;
use crate::decode::{Choice, Decoding, Handler, Op, Slot, end, next};
use crate::mmu::walk::is_canonical;
use crate::state::Shadow;
use crate::state::int::Int;
use crate::trap::vector;
use crate::{Step, Trap, Vcpu};

impl Vcpu {
    /// # Errors
    /// #GP(0) unless CPL is 0.
    #[inline]
    pub(crate) fn require_cpl0(&self) -> Step {
        if self.cpl == 0 { Ok(()) } else { Err(Trap::gp(0)) }
    }

    fn virtual_interrupts(&self) -> bool {
        self.protected()
            && ((self.v8086() && self.cr4 & cr4::VME != 0)
                || (!self.v8086() && self.cpl == 3 && self.cr4 & cr4::PVI != 0))
    }
}

// ---------------------------------------------------------------- flags

fn pushf<T: Int>(vcpu: &mut Vcpu, _: &Op) -> Step {
    let mut value = vcpu.rflags() & !(rflags::VM | rflags::RF);
    if vcpu.v8086() && vcpu.iopl() < 3 {
        if vcpu.cr4 & cr4::VME == 0 || T::BITS != 16 {
            return Err(Trap::gp(0));
        }
        // The image shows VIF in place of IF and IOPL 3.
        let vif = if value & rflags::VIF != 0 { rflags::IF } else { 0 };
        value = value & !rflags::IF | vif | rflags::IOPL;
    }
    vcpu.push(T::from_u64(value))
}

fn popf<T: Int>(vcpu: &mut Vcpu, _: &Op) -> Step {
    let value = vcpu.peek::<T>(0)?.to_u64();
    let old = vcpu.rflags();
    let mut writable = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;
    let mut new = value;
    if vcpu.v8086() {
        if vcpu.iopl() == 3 {
            writable |= rflags::IF;
        } else {
            let traps = value & rflags::TF != 0 || (value & rflags::IF != 0 && old & rflags::VIP != 0);
            if vcpu.cr4 & cr4::VME == 0 || T::BITS != 16 || traps {
                return Err(Trap::gp(0));
            }
            writable |= rflags::VIF;
            new = new & !rflags::VIF | if value & rflags::IF != 0 { rflags::VIF } else { 0 };
        }
    } else {
        if vcpu.cpl <= vcpu.iopl() {
            writable |= rflags::IF;
        }
        if vcpu.cpl == 0 {
            writable |= rflags::IOPL;
        }
        // VIF is left alone; VIP and VIF are cleared by a 32-bit POPF at CPL 0 only in the SDM's pseudo code for VME.
    }
    if T::BITS == 16 {
        writable &= 0xffff | rflags::VIF;
    }
    vcpu.set_sp(vcpu.sp().wrapping_add(T::BYTES));
    vcpu.set_rflags(old & !writable & !rflags::RF | new & writable);
    Ok(())
}

fn cli(vcpu: &mut Vcpu, _: &Op) -> Step {
    if !vcpu.protected() || vcpu.cpl <= vcpu.iopl() {
        vcpu.flags.sys &= !rflags::IF;
    } else if vcpu.virtual_interrupts() {
        vcpu.flags.sys &= !rflags::VIF;
    } else {
        return Err(Trap::gp(0));
    }
    Ok(())
}

fn sti(vcpu: &mut Vcpu, _: &Op) -> Step {
    if !vcpu.protected() || vcpu.cpl <= vcpu.iopl() {
        if vcpu.flags.sys & rflags::IF == 0 {
            vcpu.flags.sys |= rflags::IF;
            vcpu.shadow = Shadow::Sti;
            vcpu.interrupts_enabled();
        }
    } else if vcpu.virtual_interrupts() && vcpu.flags.sys & rflags::VIP == 0 {
        vcpu.flags.sys |= rflags::VIF;
    } else {
        return Err(Trap::gp(0));
    }
    Ok(())
}

fn clac(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.require_cpl0().map_err(|_| Trap::ud())?;
    vcpu.flags.sys &= !rflags::AC;
    vcpu.update_access_mode();
    Ok(())
}

fn stac(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.require_cpl0().map_err(|_| Trap::ud())?;
    vcpu.flags.sys |= rflags::AC;
    vcpu.update_access_mode();
    Ok(())
}

fn hlt(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.require_cpl0()?;
    Err(Trap::Halt)
}

// ---------------------------------------------------------------- control registers

fn mov_from_cr(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.require_cpl0()?;
    let value = match op.r2 {
        0 => vcpu.cr0,
        2 => vcpu.cr2,
        3 => vcpu.cr3,
        4 => vcpu.cr4,
        8 => u64::from(vcpu.env.read_cr8()),
        _ => return Err(Trap::ud()),
    };
    put_native(vcpu, op.r1, value);
    Ok(())
}

/// MOV to and from control and debug registers ignores the operand size: 64 bits in 64-bit mode, else 32.
fn put_native(vcpu: &mut Vcpu, r: u8, value: u64) {
    if vcpu.in_64bit() { value.set(&mut vcpu.regs, r) } else { (value as u32).set(&mut vcpu.regs, r) }
}

fn get_native(vcpu: &Vcpu, r: u8) -> u64 {
    if vcpu.in_64bit() { u64::get(&vcpu.regs, r) } else { u64::from(u32::get(&vcpu.regs, r)) }
}

fn mov_to_cr(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.require_cpl0()?;
    let value = get_native(vcpu, op.r2);
    match op.r1 {
        0 => vcpu.write_cr0(value),
        2 => {
            vcpu.cr2 = value;
            Ok(())
        }
        3 => vcpu.write_cr3(value),
        4 => vcpu.write_cr4(value),
        8 if value < 16 => {
            vcpu.env.write_cr8(value as u8);
            Ok(())
        }
        8 => Err(Trap::gp(0)),
        _ => Err(Trap::ud()),
    }
}

impl Vcpu {
    /// MOV to CR0 (SDM vol. 3, 2.5; mode switches of 9.8).
    pub(crate) fn write_cr0(&mut self, value: u64) -> Step {
        const KNOWN: u64 =
            cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;
        if value >> 32 != 0
            || (value & cr0::PG != 0 && value & cr0::PE == 0)
            || (value & cr0::NW != 0 && value & cr0::CD == 0)
        {
            return Err(Trap::gp(0));
        }
        let new = value & KNOWN | cr0::ET;
        let old = self.cr0;
        let enables_paging = new & cr0::PG != 0 && old & cr0::PG == 0;
        if enables_paging && self.efer & efer::LME != 0 {
            let cs_long = self.segments[seg::CS].access & (1 << 13) != 0;
            if self.cr4 & cr4::PAE == 0 || cs_long {
                return Err(Trap::gp(0));
            }
            self.efer |= efer::LMA;
        } else if enables_paging && self.cr4 & cr4::PAE != 0 {
            self.load_pdptes(self.cr3)?;
        }
        if old & cr0::PG != 0 && new & cr0::PG == 0 {
            if self.in_64bit() || self.cr4 & cr4::PCIDE != 0 {
                return Err(Trap::gp(0));
            }
            self.efer &= !efer::LMA;
        }
        self.cr0 = new;
        if (old ^ new) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.tlb.flush_all();
        }
        self.update_mode();
        Ok(())
    }

    /// MOV to CR3.
    pub(crate) fn write_cr3(&mut self, value: u64) -> Step {
        let pcid = self.cr4 & cr4::PCIDE != 0 && self.long_mode();
        let keep = value >> 63 != 0;
        let value = if pcid { value & !(1 << 63) } else { value };
        if self.long_mode() && value >> self.features.physical_bits != 0 {
            return Err(Trap::gp(0));
        }
        if self.paging() && self.cr4 & cr4::PAE != 0 && !self.long_mode() {
            self.load_pdptes(value)?;
        }
        let from = std::mem::replace(&mut self.cr3, value);
        if pcid {
            self.tlb.switch_space((from & 0xfff) as u16, (value & 0xfff) as u16, keep);
        } else {
            self.tlb.flush_non_global();
        }
        Ok(())
    }

    /// MOV to CR4.
    pub(crate) fn write_cr4(&mut self, value: u64) -> Step {
        let old = self.cr4;
        if value & !self.features.cr4_mask != 0 {
            return Err(Trap::gp(0));
        }
        if self.long_mode() && value & cr4::PAE == 0 {
            return Err(Trap::gp(0));
        }
        let sets_pcide = value & cr4::PCIDE != 0 && old & cr4::PCIDE == 0;
        if sets_pcide && (!self.long_mode() || self.cr3 & 0xfff != 0) {
            return Err(Trap::gp(0));
        }
        let paging_bits = cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP | cr4::SMAP | cr4::PCIDE;
        if (old ^ value) & paging_bits != 0 {
            if self.paging() && value & cr4::PAE != 0 && !self.long_mode() {
                self.cr4 = value;
                if let Err(trap) = self.load_pdptes(self.cr3) {
                    self.cr4 = old;
                    return Err(trap);
                }
            }
            self.tlb.flush_all();
        }
        self.cr4 = value;
        self.cr4_changed(old);
        self.update_access_mode();
        Ok(())
    }

    /// Loads and checks the PDPTEs of PAE paging (SDM vol. 3, 4.4.1).
    fn load_pdptes(&mut self, cr3: u64) -> Step {
        let table = cr3 & 0xffff_ffe0;
        let mut loaded = [0; 4];
        for (i, entry) in loaded.iter_mut().enumerate() {
            *entry = self.memory.read_u64(table + 8 * i as u64).unwrap_or(0);
            let address_mask = (1u64 << self.features.physical_bits) - 1;
            let reserved = 0x1e6 | !address_mask;
            if *entry & 1 != 0 && *entry & reserved != 0 {
                return Err(Trap::gp(0));
            }
        }
        self.pdptes = loaded;
        Ok(())
    }
}

fn clts(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.require_cpl0()?;
    vcpu.cr0 &= !cr0::TS;
    Ok(())
}

/// LMSW loads the low four bits of CR0, but cannot clear PE.
fn lmsw<const MEMORY: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.require_cpl0()?;
    let value = if MEMORY { vcpu.load_op::<u16>(op)? } else { u16::get(&vcpu.regs, op.r1) };
    let low = u64::from(value & 15) | vcpu.cr0 & cr0::PE;
    vcpu.write_cr0(vcpu.cr0 & !15 | low)
}

fn smsw(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.refuse_umip()?;
    let value = vcpu.cr0;
    match op.osize {
        2 => (value as u16).set(&mut vcpu.regs, op.r1),
        4 => (value as u32).set(&mut vcpu.regs, op.r1),
        _ => value.set(&mut vcpu.regs, op.r1),
    }
    Ok(())
}

fn smsw_memory(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.refuse_umip()?;
    vcpu.store_op(op, vcpu.cr0 as u16)
}

impl Vcpu {
    /// User-mode instruction prevention: SGDT, SIDT, SLDT, STR, SMSW.
    ///
    /// # Errors
    /// #GP(0) at CPL > 0 with CR4.UMIP set.
    pub(crate) fn refuse_umip(&self) -> Step {
        if self.cpl > 0 && self.cr4 & cr4::UMIP != 0 { Err(Trap::gp(0)) } else { Ok(()) }
    }
}

// ---------------------------------------------------------------- debug registers

const DR7_FIXED: u64 = 1 << 10;
const DR7_GD: u64 = 1 << 13;
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR6_BD: u64 = 1 << 13;

impl Vcpu {
    /// The register that a MOV to or from DRn means, after privilege and general-detect checks.
    fn debug_register(&mut self, n: u8) -> Step<usize> {
        self.require_cpl0()?;
        let n = match n {
            4 | 5 if self.cr4 & cr4::DE != 0 => return Err(Trap::ud()),
            4 | 5 => n + 2,
            0..=7 => n,
            _ => return Err(Trap::ud()),
        };
        if self.dr7 & DR7_GD != 0 {
            self.dr6 |= DR6_BD;
            self.dr7 &= !DR7_GD;
            return Err(Trap::fault(vector::DB));
        }
        Ok(usize::from(n))
    }
}

fn mov_from_dr(vcpu: &mut Vcpu, op: &Op) -> Step {
    let value = match vcpu.debug_register(op.r2)? {
        6 => vcpu.dr6,
        7 => vcpu.dr7,
        n => vcpu.dr[n & 3],
    };
    put_native(vcpu, op.r1, value);
    Ok(())
}

fn mov_to_dr(vcpu: &mut Vcpu, op: &Op) -> Step {
    let n = vcpu.debug_register(op.r1)?;
    let value = get_native(vcpu, op.r2);
    if n >= 6 && value >> 32 != 0 {
        return Err(Trap::gp(0));
    }
    match n {
        6 => vcpu.dr6 = value & 0x1e00f | DR6_FIXED,
        7 => vcpu.dr7 = value & 0xffff_2bff | DR7_FIXED,
        n => vcpu.dr[n & 3] = value,
    }
    // Pages with data breakpoints have no fast translations.
    vcpu.tlb.flush_all();
    vcpu.update_debug_attention();
    Ok(())
}

// ---------------------------------------------------------------- translations

fn invlpg(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.require_cpl0()?;
    let base = if vcpu.in_64bit() {
        vcpu.seg_base[usize::from(op.seg & 7)]
    } else {
        vcpu.seg_base[usize::from(op.seg & 7)] & 0xffff_ffff
    };
    let linear = base.wrapping_add(vcpu.offset(op));
    if !vcpu.in_64bit() || is_canonical(linear) {
        vcpu.tlb.flush_page(if vcpu.in_64bit() { linear } else { linear & 0xffff_ffff });
    }
    Ok(())
}

/// INVPCID r, m128. Dropping more than asked is allowed.
fn invpcid(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.require_cpl0()?;
    let kind = get_native(vcpu, op.r1);
    let linear = vcpu.linear(op, 16, false)?;
    let descriptor: u64 = vcpu.load(linear).map_err(|trap| stack_error(op, trap))?;
    let address: u64 = vcpu.load(linear.wrapping_add(8)).map_err(|trap| stack_error(op, trap))?;
    let pcid_allowed = vcpu.cr4 & cr4::PCIDE != 0 || descriptor & 0xfff == 0;
    let valid = match kind {
        0 => descriptor >> 12 == 0 && pcid_allowed && is_canonical(address),
        1 => descriptor >> 12 == 0 && pcid_allowed,
        2 | 3 => true,
        _ => false,
    };
    if !valid {
        return Err(Trap::gp(0));
    }
    vcpu.tlb.flush_all();
    Ok(())
}

// ---------------------------------------------------------------- time, randomness, the rest

impl Vcpu {
    /// The guest's time-stamp counter.
    #[inline]
    pub(crate) fn tsc(&self) -> u64 {
        self.env.tsc().wrapping_add(self.msrs.tsc_offset)
    }
}

fn put_pair(vcpu: &mut Vcpu, value: u64) {
    vcpu.regs[RAX] = value & 0xffff_ffff;
    vcpu.regs[RDX] = value >> 32;
}

fn rdtsc(vcpu: &mut Vcpu, _: &Op) -> Step {
    if vcpu.cr4 & cr4::TSD != 0 && vcpu.cpl > 0 {
        return Err(Trap::gp(0));
    }
    let tsc = vcpu.tsc();
    put_pair(vcpu, tsc);
    Ok(())
}

fn rdtscp(vcpu: &mut Vcpu, op: &Op) -> Step {
    rdtsc(vcpu, op)?;
    vcpu.regs[RCX] = vcpu.msrs.tsc_aux & 0xffff_ffff;
    Ok(())
}

fn rdpid(vcpu: &mut Vcpu, op: &Op) -> Step {
    vcpu.regs[usize::from(op.r1 & 31)] = vcpu.msrs.tsc_aux & 0xffff_ffff;
    Ok(())
}

/// No performance counters: every index is invalid.
fn rdpmc(vcpu: &mut Vcpu, _: &Op) -> Step {
    let _ = vcpu;
    Err(Trap::gp(0))
}

/// WBINVD, INVD, WBNOINVD: the host's caches are coherent.
fn cache_control(vcpu: &mut Vcpu, _: &Op) -> Step {
    vcpu.require_cpl0()
}

/// CLFLUSH, CLFLUSHOPT, CLWB, CLDEMOTE: faults like a read, else nothing.
fn cache_line(vcpu: &mut Vcpu, op: &Op) -> Step {
    let linear = vcpu.linear(op, 1, false)?;
    vcpu.load::<u8>(linear).map(drop).map_err(|trap| stack_error(op, trap))
}

fn base_register<const GS: bool>() -> usize {
    if GS { seg::GS } else { seg::FS }
}

fn check_fsgsbase(vcpu: &Vcpu) -> Step {
    if vcpu.cr4 & cr4::FSGSBASE == 0 { Err(Trap::ud()) } else { Ok(()) }
}

fn read_base<const GS: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    check_fsgsbase(vcpu)?;
    let base = vcpu.seg_base[base_register::<GS>()];
    if op.osize == 8 {
        base.set(&mut vcpu.regs, op.r1)
    } else {
        (base as u32).set(&mut vcpu.regs, op.r1)
    }
    Ok(())
}

fn write_base<const GS: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    check_fsgsbase(vcpu)?;
    let value = if op.osize == 8 { u64::get(&vcpu.regs, op.r1) } else { u64::from(u32::get(&vcpu.regs, op.r1)) };
    if !is_canonical(value) {
        return Err(Trap::gp(0));
    }
    let index = base_register::<GS>();
    vcpu.segments[index].base = value;
    vcpu.seg_base[index] = value;
    Ok(())
}

/// RDRAND, RDSEED: the flags clear, CF set.
fn random(vcpu: &mut Vcpu, op: &Op) -> Step {
    let mut bytes = [0; 8];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) == Ok(8);
    let value = if filled { u64::from_le_bytes(bytes) } else { 0 };
    match op.osize {
        2 => (value as u16).set(&mut vcpu.regs, op.r1),
        4 => (value as u32).set(&mut vcpu.regs, op.r1),
        _ => value.set(&mut vcpu.regs, op.r1),
    }
    vcpu.flags.set_arithmetic(if filled { rflags::CF } else { 0 });
    Ok(())
}

/// MOVNTI, and MOVDIRI: plain stores.
fn store_register<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let value = T::get(&vcpu.regs, op.r1);
    vcpu.store_op(op, value)
}

/// SERIALIZE needs nothing but the end of its block; RDSSP without shadow stacks is a NOP.
fn nothing(_: &mut Vcpu, _: &Op) -> Step {
    Ok(())
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    use Mnemonic as N;
    let memory = d.shape[0] == Slot::Mem;
    let run: Handler = match d.instruction.mnemonic() {
        N::Mov => match d.instruction.code() {
            Code::Mov_r32_cr | Code::Mov_r64_cr => return next(mov_from_cr),
            Code::Mov_cr_r32 | Code::Mov_cr_r64 => mov_to_cr,
            Code::Mov_r32_dr | Code::Mov_r64_dr => mov_from_dr,
            Code::Mov_dr_r32 | Code::Mov_dr_r64 => mov_to_dr,
            _ => return None,
        },
        N::Pushf => return next(pushf::<u16>),
        N::Pushfd => return next(pushf::<u32>),
        N::Pushfq => return next(pushf::<u64>),
        N::Popf => popf::<u16>,
        N::Popfd => popf::<u32>,
        N::Popfq => popf::<u64>,
        N::Cli => return next(cli),
        N::Sti => sti,
        N::Clac => return next(clac),
        N::Stac => return next(stac),
        N::Hlt => hlt,
        N::Clts => clts,
        N::Lmsw if memory => lmsw::<true>,
        N::Lmsw => lmsw::<false>,
        N::Smsw if memory => return next(smsw_memory),
        N::Smsw => return next(smsw),
        N::Invlpg => invlpg,
        N::Invpcid => invpcid,
        N::Rdtsc => return next(rdtsc),
        N::Rdtscp => return next(rdtscp),
        N::Rdpid => return next(rdpid),
        N::Rdpmc => rdpmc,
        N::Wbinvd | N::Invd | N::Wbnoinvd => return next(cache_control),
        N::Clflush | N::Clflushopt | N::Clwb | N::Cldemote => return next(cache_line),
        N::Rdfsbase => return next(read_base::<false>),
        N::Rdgsbase => return next(read_base::<true>),
        N::Wrfsbase => return next(write_base::<false>),
        N::Wrgsbase => return next(write_base::<true>),
        N::Rdrand | N::Rdseed => return next(random),
        N::Movnti if d.op.osize == 8 => return next(store_register::<u64>),
        N::Movnti => return next(store_register::<u32>),
        N::Serialize => nothing,
        N::Rdsspd | N::Rdsspq => return next(nothing),
        _ => return None,
    };
    end(run)
}
