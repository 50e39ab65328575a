//! The software x86 CPU: one [`Vcpu`] per virtual CPU, over a [`memory::GuestMemory`] handle, an
//! [`Events`] word and an [`Environment`]. No globals; vCPUs of one VM share a [`SharedCpus`].
//!
//! | folder     | what happens there                                                               |
//! |------------|----------------------------------------------------------------------------------|
//! | [`state`]  | registers, flags, segments, model-specific registers: data and its invariants     |
//! | [`decode`] | from instruction bytes to an [`decode::Op`]: operands, and the handler that runs it |
//! | [`cache`]  | decoded blocks, found by physical address and mode, dropped when their bytes change |
//! | [`mmu`]    | linear to physical: page walks, the TLB, checked and fast memory access            |
//! | [`event`]  | exceptions, interrupts, gates, task switches, and the requests of other threads    |
//! | [`interp`] | what instructions do: one file per family                                          |
//! | `translate` | from guest code to host code                                                    |
//! | `jit`      | where host code lives, and how it is entered and left                              |
//!
//! The rule that makes exceptions precise: **an instruction changes guest-visible state only after
//! the last thing in it that can fault.** A handler that fails returns a [`Trap`] and has changed
//! nothing but what the manuals allow (partial string operations, accessed and dirty bits).

pub mod cache;
mod check;
pub mod decode;
pub mod environment;
pub mod event;
pub mod features;
pub mod interp;
mod jit;
pub mod mmu;
pub mod state;
mod statistics;
#[cfg(test)]
mod testing;
mod translate;
mod trap;

pub use environment::{Environment, HostCounter};
pub use event::request::{Events, SharedCpus, bit as event_bits};
pub use features::{CpuModel, Features, ModelError};
pub use interp::Exit;
pub use jit::perf_map::PerfMap;
pub use jit::run::TranslatorError;
pub use jit::{TranslatorCounters, TranslatorOptions};
pub use state::Vcpu;
pub use statistics::Counters;
pub use trap::{Exception, Step, Trap, vector};
