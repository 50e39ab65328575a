//! The local APIC of one vCPU (SDM vol. 3, chapter 11): xAPIC and x2APIC, timer, IPIs, priorities, local vector table.
//!
//! | file           | part                                                                     |
//! |----------------|--------------------------------------------------------------------------|
//! | `registers`    | register map, bits                                                       |
//! | `inbox`        | the lock-free half that other threads post to                            |
//! | `logical`      | logical destinations                                                     |
//! | `access`       | MMIO page and MSRs                                                       |
//! | `base`         | IA32_APIC_BASE, reset, INIT                                              |
//! | `ipi`          | interrupt command register                                               |
//! | `timer`        | the counter                                                              |
//! | `timing`       | the counter's place in host time, TSC-deadline mode                      |
//! | `state`        | snapshots                                                                |
//!
//! What a vCPU thread does with it: whenever its [`CpuPins::interrupt`] was called, and after every access to the APIC,
//! it asks [`LocalApic::pending`] (one atomic load when there is nothing) and, once its IF flag and shadows allow,
//! takes the vector with [`LocalApic::acknowledge`].

mod access;
mod base;
mod inbox;
mod ipi;
mod logical;
mod registers;
mod state;
#[cfg(test)]
mod tests;
mod timer;
mod timing;

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use platform::{Timer, time::SharedTime};

use crate::apic_bus::ApicBus;
use crate::vectors::VectorSet;

pub(crate) use inbox::Inbox;

pub use access::{MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC_FIRST, MSR_X2APIC_LAST};
pub use inbox::ApicMode;
pub use registers::{Features, LVT_ENTRIES, LocalSource};
pub use state::LocalApicState;

use timer::ApicTimer;

/// Where a local APIC's signals reach its vCPU.
///
/// Called on any thread, possibly with a chip's lock held: an implementation sets a flag, wakes the vCPU's thread, and
/// returns. It must not call back into a chip.
pub trait CpuPins: Send + Sync {
    /// Something may be deliverable now: look at [`LocalApic::pending`] again.
    fn interrupt(&self);
    /// Non-maskable interrupt.
    fn nmi(&self);
    /// INIT. The vCPU calls [`LocalApic::init_reset`] when it takes it. A start-up IPI that comes before that must be
    /// kept and looked at afterwards.
    fn init(&self);
    /// Start-up IPI: if the vCPU waits for one, it starts at physical address `vector << 12`.
    fn startup(&self, vector: u8);
}

/// The time-stamp counter of one vCPU, as its guest reads it.
pub trait TscSource: Send + Sync {
    /// The counter now. Called on any thread.
    fn tsc(&self) -> u64;
    /// Its frequency in Hz.
    fn hz(&self) -> u64;
}

/// The 8259 pair as local APICs see it.
pub trait ExtIntSource: Send + Sync {
    /// The level of its output INTR. Must be cheap.
    fn is_asserted(&self) -> bool;
    /// The vector that [`Self::acknowledge`] would return now.
    fn peek(&self) -> u8;
    /// One interrupt-acknowledge cycle: returns the vector of what is served now.
    fn acknowledge(&self) -> u8;
}

/// Whoever wants to know of the end of level-triggered interrupts: I/O APICs.
pub trait EoiSink: Send + Sync {
    /// The interrupt with this vector has been served.
    fn end_of_interrupt(&self, vector: u8);
}

/// An access that raises #GP(0).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the access raises a general-protection exception")]
pub struct GeneralProtection;

/// What a local APIC is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocalApicConfig {
    /// Frequency of the bus clock that the timer divides, in Hz.
    pub bus_hz: u64,
    /// Width of physical addresses in bits; IA32_APIC_BASE takes no higher ones.
    pub physical_bits: u8,
    /// Optional features.
    pub features: Features,
    /// Whether this is the boot processor's. Its LINT0 starts out in virtual-wire mode, as firmware leaves it.
    pub bootstrap: bool,
}

/// The parts around a local APIC.
pub(crate) struct Wiring {
    pub(crate) bus: Arc<ApicBus>,
    pub(crate) pic: Arc<dyn ExtIntSource>,
    pub(crate) eoi: Arc<dyn EoiSink>,
    pub(crate) time: SharedTime,
    pub(crate) tsc: Arc<dyn TscSource>,
}

/// One local APIC. Methods other than those of `Persist` and [`LocalApic::raise_local`] are for its vCPU's thread.
pub struct LocalApic {
    config: LocalApicConfig,
    wiring: Wiring,
    inbox: Arc<Inbox>,
    timer: Box<dyn Timer>,
    registers: Mutex<Registers>,
}

/// What only the vCPU's thread and the timer change.
#[derive(Default)]
struct Registers {
    tpr: u8,
    isr: VectorSet,
    /// Errors as of the last write to the error status register.
    esr: u32,
    icr_low: u32,
    icr_high: u32,
    timer: ApicTimer,
    /// The moment the host timer is set for. It may be earlier than the next expiry, never later.
    armed_ns: Option<u64>,
}

/// What is left to do after an access, once the lock is released.
enum FollowUp {
    Nothing,
    /// Priorities or masks changed: something may be deliverable now.
    Look,
    /// The interrupt with this vector has ended.
    EndOfInterrupt(u8),
    /// The interrupt command register was written.
    SendIpi {
        low: u32,
        destination: u32,
        mode: ApicMode,
    },
    /// A vector for this APIC itself.
    SelfIpi(u8),
}

impl Registers {
    /// The processor-priority register (SDM vol. 3, 11.8.3.1).
    fn processor_priority(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service & 0xf0 }
    }
}

impl LocalApic {
    pub(crate) fn new(config: LocalApicConfig, inbox: Arc<Inbox>, wiring: Wiring) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| {
            let this = this.clone();
            let timer = wiring.time.timer(Box::new(move || {
                if let Some(apic) = this.upgrade() {
                    apic.timer_ran_out();
                }
            }));
            let apic = Self { config, wiring, inbox, timer, registers: Mutex::default() };
            apic.power_on();
            apic
        })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The APIC ID.
    pub fn id(&self) -> u32 {
        self.inbox.id()
    }

    /// The vector that [`Self::acknowledge`] would return, if an interrupt is deliverable: above the processor's
    /// priority, or from the 8259 pair. Whether the vCPU's IF flag allows it is the caller's business.
    pub fn pending(&self) -> Option<u8> {
        if !self.inbox.is_noted() {
            return None;
        }
        self.inbox.clear_note();
        let found = if self.ext_int_requested() { Some(self.wiring.pic.peek()) } else { self.inbox.deliverable() };
        if found.is_some() {
            self.inbox.note();
        }
        found
    }

    /// Takes the pending interrupt: from now on it is in service. If it has vanished since [`Self::pending`], the
    /// result is a spurious interrupt's vector.
    pub fn acknowledge(&self) -> u8 {
        if self.ext_int_requested() {
            self.inbox.ext_int.store(false, Ordering::Release);
            return self.wiring.pic.acknowledge();
        }
        let mut registers = self.lock();
        match self.inbox.deliverable() {
            Some(vector) => {
                self.inbox.irr.remove(vector);
                registers.isr.insert(vector);
                self.publish_priority(&registers);
                vector
            }
            None => self.inbox.svr.load(Ordering::Relaxed) as u8,
        }
    }

    fn ext_int_requested(&self) -> bool {
        self.wiring.pic.is_asserted() && (self.inbox.accepts_pic() || self.inbox.ext_int.load(Ordering::Acquire))
    }

    /// CR8: bits 7:4 of the task priority.
    pub fn cr8(&self) -> u8 {
        self.lock().tpr >> 4
    }

    /// Writes CR8; bits above 3 are ignored (the processor has checked them).
    pub fn set_cr8(&self, value: u8) {
        self.set_task_priority(&mut self.lock(), value << 4);
        self.look();
    }

    /// An event from inside the processor (performance counter, thermal sensor) or a pin; any thread.
    pub fn raise_local(&self, source: LocalSource) {
        self.inbox.raise(source);
    }

    fn set_task_priority(&self, registers: &mut Registers, value: u8) {
        registers.tpr = value;
        self.publish_priority(registers);
    }

    fn publish_priority(&self, registers: &Registers) {
        self.inbox.ppr.store(registers.processor_priority(), Ordering::Relaxed);
    }

    /// After a change that may have made something deliverable.
    fn look(&self) {
        // Pairs with the fence in `Inbox::lint0_rose`: either this sees the output up, or that sees the new entry.
        fence(Ordering::SeqCst);
        if self.inbox.irr.highest().is_none() && !self.wiring.pic.is_asserted() {
            return;
        }
        self.inbox.note();
        if self.pending().is_some() {
            self.inbox.wake();
        }
    }

    fn follow_up(&self, action: FollowUp) {
        match action {
            FollowUp::Nothing => {}
            FollowUp::Look => self.look(),
            FollowUp::EndOfInterrupt(vector) => {
                self.finish(vector);
                self.look();
            }
            FollowUp::SendIpi { low, destination, mode } => self.send_ipi(low, destination, mode),
            FollowUp::SelfIpi(vector) => self.send_self(vector),
        }
    }

    /// Tells whoever waits for the end of a level-triggered interrupt.
    fn finish(&self, vector: u8) {
        if !self.inbox.tmr.contains(vector) {
            return;
        }
        let lint0 = self.inbox.end_level(LocalSource::Lint0, vector);
        self.inbox.end_level(LocalSource::Lint1, vector);
        if lint0 && self.wiring.pic.is_asserted() {
            self.inbox.lint0_rose();
        }
        let svr = self.inbox.svr.load(Ordering::Relaxed);
        if svr & registers::svr::SUPPRESS_EOI_BROADCAST == 0 {
            self.wiring.eoi.end_of_interrupt(vector);
        }
    }
}
