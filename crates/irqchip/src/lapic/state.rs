//! The local APIC's state for snapshots. Neutral: an engine whose local APIC lives elsewhere can fill it in as well.

use std::sync::atomic::Ordering;

use platform::Persist;
use platform::state::{StateError, decode, encode};
use serde::{Deserialize, Serialize};

use super::registers::{LVT_ENTRIES, LocalSource, esr, icr, lvt};
use super::{ApicMode, LocalApic, Registers};
use crate::lapic::timer::ApicTimer;
use crate::vectors::VectorSet;

const KIND: &str = "lapic";
const VERSION: u32 = 1;

/// State of a local APIC, version 1. Registers as in the xAPIC page unless said otherwise.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LocalApicState {
    /// APIC ID; a state fits only the APIC it came from.
    pub id: u32,
    /// IA32_APIC_BASE.
    pub base: u64,
    /// Task priority.
    pub tpr: u8,
    /// Logical destination (xAPIC mode; derived from the ID in x2APIC mode).
    pub ldr: u32,
    /// Destination format.
    pub dfr: u32,
    /// Spurious-interrupt vector.
    pub svr: u32,
    /// Interrupts in service.
    pub isr: VectorSet,
    /// Interrupts requested.
    pub irr: VectorSet,
    /// Requests that were level-triggered.
    pub tmr: VectorSet,
    /// Error status as last latched.
    pub esr: u32,
    /// Errors found since.
    pub errors: u32,
    /// Interrupt command, low half.
    pub icr_low: u32,
    /// Interrupt command, high half: destination in bits 31:24, or all 32 bits in x2APIC mode.
    pub icr_high: u32,
    /// Local vector table, in the order of [`LocalSource`].
    pub lvt: [u32; LVT_ENTRIES],
    /// Initial count.
    pub initial_count: u32,
    /// Divide configuration.
    pub divide: u32,
    /// Undivided bus ticks until the counter reaches zero, if it runs.
    pub ticks_left: Option<u64>,
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
    /// An ExtINT message waits to be served.
    pub ext_int: bool,
}

fn invalid(why: &str) -> StateError {
    StateError::Invalid { kind: KIND, why: why.into() }
}

impl LocalApic {
    fn capture(&self) -> LocalApicState {
        let registers = self.lock();
        let inbox = &self.inbox;
        LocalApicState {
            id: self.id(),
            base: inbox.base.load(Ordering::Acquire),
            tpr: registers.tpr,
            ldr: inbox.ldr.load(Ordering::Relaxed),
            dfr: inbox.dfr.load(Ordering::Relaxed),
            svr: inbox.svr.load(Ordering::Relaxed),
            isr: registers.isr,
            irr: inbox.irr.load(),
            tmr: inbox.tmr.load(),
            esr: registers.esr,
            errors: inbox.errors.load(Ordering::Acquire),
            icr_low: registers.icr_low,
            icr_high: registers.icr_high,
            lvt: inbox.lvt_entries(),
            initial_count: registers.timer.initial,
            divide: registers.timer.divide,
            ticks_left: self.ticks_left(&registers),
            tsc_deadline: registers.timer.tsc_deadline,
            ext_int: inbox.ext_int.load(Ordering::Acquire),
        }
    }

    fn check(&self, state: &LocalApicState) -> Result<(), StateError> {
        let features = &self.config.features;
        if state.id != self.id() {
            return Err(invalid(&format!("it belongs to APIC {}, not {}", state.id, self.id())));
        }
        match ApicMode::from_base(state.base) {
            Some(ApicMode::X2Apic) if !features.x2apic => return Err(invalid("x2APIC mode is not available")),
            Some(_) if state.base & !self.base_bits() == 0 => {}
            _ => return Err(invalid("IA32_APIC_BASE has an impossible value")),
        }
        let sources = [
            LocalSource::Timer,
            LocalSource::Thermal,
            LocalSource::Performance,
            LocalSource::Lint0,
            LocalSource::Lint1,
            LocalSource::Error,
            LocalSource::Cmci,
        ];
        for (entry, source) in state.lvt.iter().zip(sources) {
            if entry & !(source.writable(features) | lvt::REMOTE_IRR) != 0 {
                return Err(invalid(&format!("reserved bits of the {source:?} entry are set")));
            }
        }
        let plain = state.svr & !features.svr_mask() == 0
            && state.dfr & 0x0fff_ffff == 0x0fff_ffff
            && state.ldr & 0x00ff_ffff == 0
            && (state.esr | state.errors) & !esr::ALL == 0
            && state.icr_low & !icr::WRITABLE == 0
            && state.divide & !0xb == 0;
        let reserved_vectors = (state.isr.0[0] | state.irr.0[0]) & 0xffff != 0;
        // The longest count: 2^32 ticks divided by 128.
        let timer = state.ticks_left.is_none_or(|left| left <= 1 << 39);
        if plain && !reserved_vectors && timer { Ok(()) } else { Err(invalid("a register has an impossible value")) }
    }

    fn install(&self, state: &LocalApicState) {
        let mut registers = self.lock();
        let inbox = &self.inbox;
        *registers = Registers {
            tpr: state.tpr,
            isr: state.isr,
            esr: state.esr,
            icr_low: state.icr_low,
            icr_high: state.icr_high,
            timer: ApicTimer {
                initial: state.initial_count,
                divide: state.divide,
                deadline: None,
                tsc_deadline: state.tsc_deadline,
            },
            armed_ns: registers.armed_ns,
        };
        inbox.base.store(state.base, Ordering::Release);
        inbox.ldr.store(state.ldr, Ordering::Relaxed);
        inbox.dfr.store(state.dfr, Ordering::Relaxed);
        inbox.svr.store(state.svr, Ordering::Release);
        inbox.store_lvt_entries(state.lvt);
        inbox.errors.store(state.errors, Ordering::Release);
        inbox.tmr.store(&state.tmr);
        inbox.irr.store(&state.irr);
        inbox.ext_int.store(state.ext_int, Ordering::Release);
        self.publish_priority(&registers);
        self.resume_timer(&mut registers, state.ticks_left);
        inbox.note();
    }
}

impl Persist for LocalApic {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        encode(KIND, &self.capture())
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let state: LocalApicState = decode(KIND, VERSION, version, bytes)?;
        self.check(&state)?;
        self.install(&state);
        Ok(())
    }

    fn reset(&self) {
        self.power_on();
    }
}
