//! Everything that diverts a vCPU from the next instruction.
//!
//! * [`request`]: what other threads ask of a vCPU
//! * [`deliver`]: which exception or interrupt is delivered: double and triple faults, NMI
//! * [`enter`]: into the handler, through the IVT or IDT
//! * [`long`]: the same in long mode, and IRETQ
//! * [`debug`]: debug exceptions and instruction breakpoints
//! * [`reset`]: INIT and start-up
//! * [`descriptor`], [`frame`]: what transfers through gates and far transfers share
//! * [`task`]: task switches

pub(crate) mod debug;
pub(crate) mod deliver;
pub(crate) mod descriptor;
pub(crate) mod enter;
pub(crate) mod frame;
pub(crate) mod long;
pub mod request;
pub(crate) mod reset;
pub(crate) mod task;

#[cfg(test)]
mod tests;
