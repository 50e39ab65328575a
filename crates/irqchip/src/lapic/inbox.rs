//! The half of a local APIC that other threads use: it takes messages and shows what routing must know.
//!
//! Lock-free, so that an interrupt is posted without ever waiting for the vCPU it is for. The registers here are
//! written by [`super::LocalApic`] under its own lock; requests (IRR, TMR, errors) come from any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use super::registers::{FIRST_VECTOR, LVT_ENTRIES, LocalSource, base, esr, lvt, svr};
use super::{CpuPins, logical};
use crate::message::{DeliveryMode, Destination, Message, TriggerMode};
use crate::vectors::AtomicVectorSet;

/// The mode that IA32_APIC_BASE selects (SDM vol. 3, table 11-5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ApicMode {
    /// Globally disabled: the processor has no APIC, LINT0 is its INTR pin.
    Disabled,
    /// Registers in a page of memory.
    XApic,
    /// Registers in MSRs.
    X2Apic,
}

impl ApicMode {
    pub(super) fn from_base(value: u64) -> Option<Self> {
        match (value & base::ENABLED != 0, value & base::X2APIC != 0) {
            (false, false) => Some(Self::Disabled),
            (true, false) => Some(Self::XApic),
            (true, true) => Some(Self::X2Apic),
            (false, true) => None,
        }
    }
}

/// The receiving half of one local APIC.
pub(crate) struct Inbox {
    id: u32,
    pins: Arc<dyn CpuPins>,
    /// IA32_APIC_BASE.
    pub(super) base: AtomicU64,
    /// Logical destination register, xAPIC form.
    pub(super) ldr: AtomicU32,
    /// Destination format register.
    pub(super) dfr: AtomicU32,
    pub(super) svr: AtomicU32,
    lvt: [AtomicU32; LVT_ENTRIES],
    /// Errors found since the last write to the error status register.
    pub(super) errors: AtomicU32,
    pub(super) irr: AtomicVectorSet,
    pub(super) tmr: AtomicVectorSet,
    /// Processor priority: what is pending above its class can be delivered.
    pub(super) ppr: AtomicU8,
    /// An ExtINT message has come.
    pub(super) ext_int: AtomicBool,
    /// Something may be deliverable. Set after whatever makes it so; cleared before looking.
    attention: AtomicBool,
}

impl Inbox {
    pub(crate) fn new(id: u32, pins: Arc<dyn CpuPins>) -> Self {
        Self {
            id,
            pins,
            base: AtomicU64::new(base::RESET_ADDRESS | base::ENABLED),
            ldr: AtomicU32::new(0),
            dfr: AtomicU32::new(u32::MAX),
            svr: AtomicU32::new(svr::RESET),
            lvt: std::array::from_fn(|_| AtomicU32::new(lvt::MASKED)),
            errors: AtomicU32::new(0),
            irr: AtomicVectorSet::default(),
            tmr: AtomicVectorSet::default(),
            ppr: AtomicU8::new(0),
            ext_int: AtomicBool::new(false),
            attention: AtomicBool::new(false),
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn mode(&self) -> ApicMode {
        ApicMode::from_base(self.base.load(Ordering::Acquire)).unwrap_or(ApicMode::Disabled)
    }

    pub(crate) fn priority(&self) -> u8 {
        self.ppr.load(Ordering::Relaxed)
    }

    /// Whether fixed interrupts are taken: enabled both globally and in the spurious-vector register.
    pub(crate) fn accepts_fixed(&self) -> bool {
        self.svr.load(Ordering::Acquire) & svr::ENABLED != 0 && self.mode() != ApicMode::Disabled
    }

    /// Whether LINT0 passes the 8259 pair's interrupts on to the processor.
    pub(super) fn accepts_pic(&self) -> bool {
        self.mode() == ApicMode::Disabled
            || self.lvt(LocalSource::Lint0) & (lvt::MASKED | lvt::DELIVERY_MODE) == lvt::EXT_INT
    }

    pub(super) fn lvt(&self, source: LocalSource) -> u32 {
        self.lvt[source as usize].load(Ordering::Acquire)
    }

    /// Writes a local vector table entry; remote IRR is kept unless the entry becomes edge-triggered.
    pub(super) fn set_lvt(&self, source: LocalSource, value: u32) {
        let kept = if value & lvt::LEVEL != 0 { self.lvt(source) & lvt::REMOTE_IRR } else { 0 };
        self.lvt[source as usize].store(value | kept, Ordering::Release);
    }

    pub(super) fn mask_lvt(&self) {
        for entry in &self.lvt {
            entry.fetch_or(lvt::MASKED, Ordering::AcqRel);
        }
    }

    pub(super) fn lvt_entries(&self) -> [u32; LVT_ENTRIES] {
        std::array::from_fn(|index| self.lvt[index].load(Ordering::Acquire))
    }

    pub(super) fn store_lvt_entries(&self, entries: [u32; LVT_ENTRIES]) {
        for (entry, value) in self.lvt.iter().zip(entries) {
            entry.store(value, Ordering::Release);
        }
    }

    /// Whether a message with this destination is for this APIC.
    pub(crate) fn is_addressed(&self, destination: Destination) -> bool {
        match destination {
            Destination::Broadcast => true,
            Destination::Physical(id) => id == self.id,
            Destination::Logical(id) => match self.mode() {
                ApicMode::Disabled => false,
                ApicMode::XApic => {
                    let dfr = self.dfr.load(Ordering::Relaxed);
                    logical::xapic_matches(self.ldr.load(Ordering::Relaxed), dfr, id)
                }
                ApicMode::X2Apic => logical::x2apic_matches(logical::x2apic_ldr(self.id), id),
            },
        }
    }

    /// Takes a message that is for this APIC; returns whether it was accepted.
    pub(crate) fn accept(&self, message: &Message) -> bool {
        if self.mode() == ApicMode::Disabled {
            return false;
        }
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                self.accepts_fixed() && self.post(message.vector, message.trigger)
            }
            mode => {
                self.signal(mode, message.vector);
                true
            }
        }
    }

    /// An event from inside the processor or from one of its pins; returns whether it was accepted.
    pub(super) fn raise(&self, source: LocalSource) -> bool {
        let entry = self.lvt(source);
        if entry & lvt::MASKED != 0 {
            return false;
        }
        let vector = entry as u8;
        match source {
            LocalSource::Timer | LocalSource::Error => return self.post(vector, TriggerMode::Edge),
            LocalSource::Performance => {
                // The entry masks itself (SDM vol. 3, 11.5.1): the handler must unmask it.
                self.lvt[source as usize].fetch_or(lvt::MASKED, Ordering::AcqRel);
            }
            _ => {}
        }
        match DeliveryMode::from_bits(entry >> 8) {
            Some(DeliveryMode::Fixed) => self.raise_fixed(source, entry),
            Some(mode) => {
                self.signal(mode, vector);
                true
            }
            None => false,
        }
    }

    fn raise_fixed(&self, source: LocalSource, entry: u32) -> bool {
        let pin = matches!(source, LocalSource::Lint0 | LocalSource::Lint1);
        if !pin || entry & lvt::LEVEL == 0 {
            return self.post(entry as u8, TriggerMode::Edge);
        }
        let before = self.lvt[source as usize].fetch_or(lvt::REMOTE_IRR, Ordering::AcqRel);
        before & lvt::REMOTE_IRR == 0 && self.post(entry as u8, TriggerMode::Level)
    }

    /// Ends a level-triggered interrupt of a LINT pin; returns whether there was one with this vector.
    pub(super) fn end_level(&self, source: LocalSource, vector: u8) -> bool {
        let entry = self.lvt(source);
        if entry & lvt::REMOTE_IRR == 0 || entry as u8 != vector {
            return false;
        }
        self.lvt[source as usize].fetch_and(!lvt::REMOTE_IRR, Ordering::AcqRel);
        true
    }

    /// The 8259 pair's output rose.
    pub(crate) fn lint0_rose(&self) {
        // Pairs with the fence in `LocalApic::look`.
        fence(Ordering::SeqCst);
        if self.accepts_pic() {
            self.wake();
        } else {
            self.raise(LocalSource::Lint0);
        }
    }

    fn signal(&self, mode: DeliveryMode, vector: u8) {
        match mode {
            DeliveryMode::Nmi => self.pins.nmi(),
            DeliveryMode::Init => self.pins.init(),
            DeliveryMode::Startup => self.pins.startup(vector),
            DeliveryMode::ExtInt => {
                self.ext_int.store(true, Ordering::Release);
                self.wake();
            }
            DeliveryMode::Smi | DeliveryMode::Fixed | DeliveryMode::LowestPriority => {}
        }
    }

    /// Requests an interrupt; `false` if the vector is one of the reserved ones.
    pub(super) fn post(&self, vector: u8, trigger: TriggerMode) -> bool {
        if vector < FIRST_VECTOR {
            self.error(esr::RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        match trigger {
            TriggerMode::Edge => self.tmr.remove(vector),
            TriggerMode::Level => self.tmr.insert(vector),
        };
        // One already requested has been announced: the two become one interrupt.
        if !self.irr.insert(vector) {
            self.wake();
        }
        true
    }

    /// Notes an error and, if it is a new one, raises the error interrupt.
    pub(super) fn error(&self, bit: u32) {
        let known = self.errors.fetch_or(bit, Ordering::AcqRel);
        if known & bit != 0 {
            return;
        }
        let entry = self.lvt(LocalSource::Error);
        if entry as u8 >= FIRST_VECTOR {
            self.raise(LocalSource::Error);
        } else if entry & lvt::MASKED == 0 {
            self.errors.fetch_or(esr::RECEIVE_ILLEGAL_VECTOR, Ordering::AcqRel);
        }
    }

    /// Makes the vCPU look for a deliverable interrupt.
    pub(super) fn wake(&self) {
        self.note();
        self.pins.interrupt();
    }

    /// Makes the next look a real one, without telling the vCPU.
    pub(super) fn note(&self) {
        self.attention.store(true, Ordering::Release);
    }

    /// Whether a look may find something.
    pub(super) fn is_noted(&self) -> bool {
        self.attention.load(Ordering::Acquire)
    }

    /// Forgets the note: to be called before looking, so that what comes during the look is seen by the next one.
    pub(super) fn clear_note(&self) {
        self.attention.swap(false, Ordering::AcqRel);
    }

    /// The highest requested vector whose class is above the processor's priority.
    pub(super) fn deliverable(&self) -> Option<u8> {
        let vector = self.irr.highest()?;
        (vector >> 4 > self.priority() >> 4).then_some(vector)
    }
}
