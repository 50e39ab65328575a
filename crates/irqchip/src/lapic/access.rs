//! Register accesses: the xAPIC's page of memory and the x2APIC's MSRs.

use std::sync::atomic::Ordering;

use platform::AccessSize;

use super::registers::{LocalSource, Register, esr, icr, lvt, svr};
use super::timer::TimerMode;
use super::{ApicMode, FollowUp, GeneralProtection, LocalApic, Registers, logical};

/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// First of the x2APIC's MSRs.
pub const MSR_X2APIC_FIRST: u32 = 0x800;
/// Last of the x2APIC's MSRs; most of the range raises #GP.
pub const MSR_X2APIC_LAST: u32 = 0x8ff;

impl LocalApic {
    /// Whether an MSR belongs to the local APIC.
    pub const fn owns_msr(index: u32) -> bool {
        matches!(index, MSR_APIC_BASE | MSR_TSC_DEADLINE | MSR_X2APIC_FIRST..=MSR_X2APIC_LAST)
    }

    /// Reads from the register page. Any part of a register's 32 bits can be read; the rest of the page and, outside
    /// xAPIC mode, all of it reads as ones.
    pub fn read_mmio(&self, offset: u64, size: AccessSize) -> u64 {
        let byte = offset & 0xf;
        if self.inbox.mode() != ApicMode::XApic || offset >= 0x1000 || byte >= 4 {
            return size.mask();
        }
        let index = (offset >> 4) as u32;
        let Some(register) = Register::from_index(index).filter(|register| register.in_xapic()) else {
            self.inbox.error(esr::ILLEGAL_REGISTER);
            return 0;
        };
        (self.read_register(register, ApicMode::XApic) >> (byte * 8)) & size.mask()
    }

    /// Writes to the register page. Only aligned 32-bit writes count.
    pub fn write_mmio(&self, offset: u64, size: AccessSize, value: u64) {
        if self.inbox.mode() != ApicMode::XApic || offset >= 0x1000 || offset & 0xf != 0 || size != AccessSize::Dword {
            return;
        }
        let index = (offset >> 4) as u32;
        match Register::from_index(index).filter(|register| register.in_xapic()) {
            Some(register) => {
                let action = self.write_register(register, value, ApicMode::XApic);
                self.follow_up(action);
            }
            None => self.inbox.error(esr::ILLEGAL_REGISTER),
        }
    }

    /// Reads IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// The MSR does not exist, is not readable, or not in this mode.
    pub fn read_msr(&self, index: u32) -> Result<u64, GeneralProtection> {
        match index {
            MSR_APIC_BASE => Ok(self.inbox.base.load(Ordering::Acquire)),
            MSR_TSC_DEADLINE => self.read_tsc_deadline(),
            MSR_X2APIC_FIRST..=MSR_X2APIC_LAST => {
                let register = self.x2apic_register(index)?;
                if !register.x2apic_readable() {
                    return Err(GeneralProtection);
                }
                Ok(self.read_register(register, ApicMode::X2Apic))
            }
            _ => Err(GeneralProtection),
        }
    }

    /// Writes IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// The MSR does not exist, is not writable, or not in this mode; a reserved bit is set; the mode change is illegal.
    pub fn write_msr(&self, index: u32, value: u64) -> Result<(), GeneralProtection> {
        match index {
            MSR_APIC_BASE => self.write_base(value),
            MSR_TSC_DEADLINE => self.write_tsc_deadline(value),
            MSR_X2APIC_FIRST..=MSR_X2APIC_LAST => {
                let register = self.x2apic_register(index)?;
                let writable = register.x2apic_writable(&self.config.features).ok_or(GeneralProtection)?;
                // Delivery status (bit 12) of the LVT and whatever else is read-only may be written back.
                if value & !(writable | self.read_only_bits(register)) != 0 {
                    return Err(GeneralProtection);
                }
                let action = self.write_register(register, value, ApicMode::X2Apic);
                self.follow_up(action);
                Ok(())
            }
            _ => Err(GeneralProtection),
        }
    }

    fn x2apic_register(&self, index: u32) -> Result<Register, GeneralProtection> {
        if self.inbox.mode() != ApicMode::X2Apic {
            return Err(GeneralProtection);
        }
        Register::from_index(index - MSR_X2APIC_FIRST).ok_or(GeneralProtection)
    }

    fn read_only_bits(&self, register: Register) -> u64 {
        match register {
            Register::Lvt(LocalSource::Lint0 | LocalSource::Lint1) => u64::from(icr::DELIVERY_STATUS | lvt::REMOTE_IRR),
            Register::Lvt(_) => u64::from(icr::DELIVERY_STATUS),
            _ => 0,
        }
    }

    fn read_register(&self, register: Register, mode: ApicMode) -> u64 {
        let x2apic = mode == ApicMode::X2Apic;
        let value = match register {
            Register::Id if x2apic => self.id(),
            Register::Id => self.id() << 24,
            Register::Version => self.config.features.version(),
            Register::TaskPriority => u32::from(self.lock().tpr),
            Register::ProcessorPriority | Register::ArbitrationPriority => u32::from(self.inbox.priority()),
            Register::Eoi | Register::RemoteRead | Register::SelfIpi => 0,
            Register::LogicalDestination if x2apic => logical::x2apic_ldr(self.id()),
            Register::LogicalDestination => self.inbox.ldr.load(Ordering::Relaxed),
            Register::DestinationFormat => self.inbox.dfr.load(Ordering::Relaxed),
            Register::SpuriousVector => self.inbox.svr.load(Ordering::Relaxed),
            Register::InService(word) => self.lock().isr.0.get(usize::from(word)).copied().unwrap_or(0),
            Register::TriggerMode(word) => self.inbox.tmr.word(word),
            Register::InterruptRequest(word) => self.inbox.irr.word(word),
            Register::ErrorStatus => self.lock().esr,
            Register::IcrLow if x2apic => {
                let registers = self.lock();
                return u64::from(registers.icr_high) << 32 | u64::from(registers.icr_low);
            }
            Register::IcrLow => self.lock().icr_low,
            Register::IcrHigh => self.lock().icr_high,
            Register::Lvt(source) => self.inbox.lvt(source),
            Register::InitialCount => self.lock().timer.initial,
            Register::CurrentCount => self.current_count(),
            Register::DivideConfiguration => self.lock().timer.divide,
        };
        u64::from(value)
    }

    /// Writes a register; `value` has no reserved bits set in x2APIC mode.
    fn write_register(&self, register: Register, value: u64, mode: ApicMode) -> FollowUp {
        let word = value as u32;
        let mut registers = self.lock();
        match register {
            Register::TaskPriority => {
                self.set_task_priority(&mut registers, word as u8);
                return FollowUp::Look;
            }
            Register::Eoi => return self.write_eoi(&mut registers),
            Register::LogicalDestination => self.inbox.ldr.store(word & 0xff00_0000, Ordering::Relaxed),
            Register::DestinationFormat => self.inbox.dfr.store(word | 0x0fff_ffff, Ordering::Relaxed),
            Register::SpuriousVector => self.write_svr(word),
            Register::ErrorStatus => registers.esr = self.inbox.errors.swap(0, Ordering::AcqRel),
            Register::IcrLow => {
                registers.icr_low = word & icr::WRITABLE;
                if mode == ApicMode::X2Apic {
                    registers.icr_high = (value >> 32) as u32;
                }
                let shift = if mode == ApicMode::X2Apic { 0 } else { 24 };
                let destination = registers.icr_high >> shift;
                return FollowUp::SendIpi { low: registers.icr_low, destination, mode };
            }
            Register::IcrHigh => registers.icr_high = word & 0xff00_0000,
            Register::Lvt(source) => return self.write_lvt(&mut registers, source, word),
            Register::InitialCount => self.write_initial_count(&mut registers, word),
            Register::DivideConfiguration => self.write_divide(&mut registers, word),
            Register::SelfIpi => return FollowUp::SelfIpi(word as u8),
            Register::Id
            | Register::Version
            | Register::ArbitrationPriority
            | Register::ProcessorPriority
            | Register::RemoteRead
            | Register::InService(_)
            | Register::TriggerMode(_)
            | Register::InterruptRequest(_)
            | Register::CurrentCount => {}
        }
        FollowUp::Nothing
    }

    fn write_eoi(&self, registers: &mut Registers) -> FollowUp {
        let Some(vector) = registers.isr.highest() else { return FollowUp::Nothing };
        registers.isr.remove(vector);
        self.publish_priority(registers);
        FollowUp::EndOfInterrupt(vector)
    }

    fn write_svr(&self, value: u32) {
        self.inbox.svr.store(value & self.config.features.svr_mask(), Ordering::Release);
        if value & svr::ENABLED == 0 {
            self.inbox.mask_lvt();
        }
    }

    fn write_lvt(&self, registers: &mut Registers, source: LocalSource, value: u32) -> FollowUp {
        let mut entry = value & source.writable(&self.config.features);
        if self.inbox.svr.load(Ordering::Relaxed) & svr::ENABLED == 0 {
            entry |= lvt::MASKED;
        }
        match source {
            LocalSource::Timer => {
                self.write_timer_entry(registers, entry);
                FollowUp::Nothing
            }
            LocalSource::Lint0 => {
                self.inbox.set_lvt(source, entry);
                FollowUp::Look
            }
            _ => {
                self.inbox.set_lvt(source, entry);
                FollowUp::Nothing
            }
        }
    }

    pub(super) fn timer_mode(&self) -> TimerMode {
        TimerMode::from_lvt(self.inbox.lvt(LocalSource::Timer))
    }
}
