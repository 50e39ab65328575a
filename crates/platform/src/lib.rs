//! The seam between the parts of the hypervisor: small types and traits, no unsafe code and no OS calls.
//!
//! | module      | what crosses the seam there                                             |
//! |-------------|-------------------------------------------------------------------------|
//! | [`address`] | guest-physical addresses and ranges                                     |
//! | [`bus`]     | port and memory-mapped accesses on their way to devices                 |
//! | [`irq`]     | interrupt lines and message-signalled interrupts on their way to chips  |
//! | [`time`]    | the clock and one-shot timers, so that tests can move them              |
//! | [`power`]   | why a VM ends, and who wants it to                                      |
//! | [`state`]   | versioned device state for snapshots                                    |
//! | [`x86`]     | the architectural state of a vCPU, as plain data                        |
//! | [`counter`] | statistics                                                              |

pub mod address;
pub mod bus;
pub mod counter;
pub mod irq;
pub mod power;
pub mod state;
pub mod time;
pub mod x86;

pub use address::{GuestAddress, GuestRange};
pub use bus::{AccessSize, Bus, BusDevice, BusError};
pub use irq::{IrqLine, IrqSink, MsiMessage, MsiSink};
pub use power::{PowerEvent, PowerSink};
pub use state::{Persist, StateError};
pub use time::{Clock, TimeSource, Timer, TimerCallback};
