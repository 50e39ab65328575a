//! Everything that diverts a vCPU from the next instruction.
//!
//! * [`request`]: what other threads ask of a vCPU
//! * [`deliver`]: exceptions and interrupts through the IVT or IDT

pub(crate) mod deliver;
pub mod request;
