//! Local APIC, I/O APIC, 8259 pair and 8254 as pure chips with neutral state.
//!
//! | module       | what it is                                                             |
//! |--------------|------------------------------------------------------------------------|
//! | [`lapic`]    | the local APIC of a vCPU                                               |
//! | [`apic_bus`] | carries messages between I/O APIC, MSI senders and local APICs         |
//! | [`ioapic`]   | the I/O APIC                                                           |
//! | [`pic`]      | the pair of 8259As                                                     |
//! | [`pit`]      | the 8254 and port 61h                                                  |
//! | [`router`]   | which chips an interrupt line reaches                                  |
//! | [`lines`]    | lines with several sources                                             |
//! | [`soft`]     | all of it, wired, for the software engine                              |
//!
//! # Lock order
//!
//! A thread that holds one of these locks takes only locks further down:
//!
//! 1. a device's own lock, the 8254's among them
//! 2. a line of the router, then an input of the 8259 pair, then a pin of the I/O APIC ([`lines::SharedLine`])
//! 3. the registers of a local APIC
//! 4. the I/O APIC, or the 8259 pair
//! 5. a timer's own lock ([`platform::Timer::arm`]), and what a vCPU locks in [`lapic::CpuPins`]
//!
//! Messages to local APICs take no lock: the receiving half of a local APIC is made of atomics. A local APIC releases
//! its registers before it sends an IPI or announces the end of an interrupt. The 8259 pair announces its output after
//! releasing its lock.

pub mod apic_bus;
mod bytewise;
pub mod ioapic;
pub mod lapic;
pub mod lines;
pub mod message;
pub mod pic;
pub mod pit;
pub mod router;
pub mod soft;
#[cfg(test)]
mod test_support;
mod vectors;

pub use apic_bus::ApicBus;
pub use ioapic::IoApic;
pub use lapic::{ApicMode, CpuPins, Features, GeneralProtection, LocalApic, LocalSource, TscSource};
pub use lines::SharedLine;
pub use pic::Pic;
pub use pit::Pit;
pub use router::IrqRouter;
pub use soft::{ChipOptions, CpuWiring, DEFAULT_APIC_BUS_HZ, SoftIrqChip};
pub use vectors::VectorSet;
