//! IA32_APIC_BASE, and the states after power-up and INIT (SDM vol. 3, 11.4.3 to 11.4.7 and 11.12.5).

use std::sync::atomic::Ordering;

use super::registers::{LVT_ENTRIES, LocalSource, base, lvt, svr};
use super::{ApicMode, GeneralProtection, LocalApic, Registers};
use crate::vectors::VectorSet;

impl LocalApic {
    /// The mode the APIC is in.
    pub fn mode(&self) -> ApicMode {
        self.inbox.mode()
    }

    /// Guest-physical address of the register page, where accesses go to [`Self::read_mmio`] and
    /// [`Self::write_mmio`]; `None` when there is none (disabled, or x2APIC mode). One atomic load.
    pub fn mmio_base(&self) -> Option<u64> {
        let value = self.inbox.base.load(Ordering::Acquire);
        (ApicMode::from_base(value) == Some(ApicMode::XApic)).then_some(value & base::ADDRESS)
    }

    /// INIT: everything but the ID, the mode and the address is as after power-up.
    pub fn init_reset(&self) {
        let mut registers = self.lock();
        self.clear(&mut registers);
    }

    /// The state after power-up: xAPIC mode, software-disabled.
    pub(super) fn power_on(&self) {
        let mut registers = self.lock();
        let bootstrap = if self.config.bootstrap { base::BSP } else { 0 };
        self.inbox.base.store(base::RESET_ADDRESS | base::ENABLED | bootstrap, Ordering::Release);
        self.clear(&mut registers);
    }

    fn clear(&self, registers: &mut Registers) {
        *registers = Registers { armed_ns: registers.armed_ns, ..Registers::default() };
        self.inbox.ldr.store(0, Ordering::Relaxed);
        self.inbox.dfr.store(u32::MAX, Ordering::Relaxed);
        self.inbox.svr.store(svr::RESET, Ordering::Release);
        let mut entries = [lvt::MASKED; LVT_ENTRIES];
        if self.config.bootstrap {
            // Firmware leaves the boot processor in virtual-wire mode (MultiProcessor Specification 3.6.2.2). There
            // may be no firmware, so this is its state from the beginning.
            entries[LocalSource::Lint0 as usize] = lvt::EXT_INT;
        }
        self.inbox.store_lvt_entries(entries);
        self.inbox.errors.store(0, Ordering::Release);
        self.inbox.irr.store(&VectorSet::default());
        self.inbox.tmr.store(&VectorSet::default());
        self.inbox.ext_int.store(false, Ordering::Release);
        self.publish_priority(registers);
        self.inbox.note();
    }

    /// The bits of IA32_APIC_BASE that exist.
    pub(super) fn base_bits(&self) -> u64 {
        let physical = 1u64.checked_shl(self.config.physical_bits.into()).unwrap_or(0).wrapping_sub(1);
        base::ADDRESS & physical | base::ENABLED | base::X2APIC | base::BSP
    }

    pub(super) fn write_base(&self, value: u64) -> Result<(), GeneralProtection> {
        if value & !self.base_bits() != 0 {
            return Err(GeneralProtection);
        }
        let new = ApicMode::from_base(value).ok_or(GeneralProtection)?;
        let old = self.mode();
        let legal = match (old, new) {
            (_, ApicMode::X2Apic) if !self.config.features.x2apic => false,
            (ApicMode::Disabled, ApicMode::X2Apic) | (ApicMode::X2Apic, ApicMode::XApic) => false,
            _ => true,
        };
        if !legal {
            return Err(GeneralProtection);
        }
        let mut registers = self.lock();
        self.inbox.base.store(value, Ordering::Release);
        if new == ApicMode::Disabled && old != ApicMode::Disabled {
            self.clear(&mut registers);
        }
        drop(registers);
        self.look();
        Ok(())
    }
}
