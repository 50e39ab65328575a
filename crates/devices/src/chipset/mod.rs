//! The chipset around the CPU: what a PC has on board besides PCI and the interrupt chips.
//!
//! | module         | device                                            | where                              |
//! |----------------|---------------------------------------------------|------------------------------------|
//! | [`uart16550`]  | 16550A serial ports com1 to com4                  | 3F8, 2F8, 3E8, 2E8                 |
//! | [`lines`]      | interrupt lines that several devices share        |                                    |
//!
//! Each device is a pure chip, driven by register accesses and told the time, inside a wrapper that owns the lock,
//! the interrupt line and the timers. A chip's interrupt line is a function of its state, pushed out after every
//! change. Devices that wait for time use no CPU while they wait.

mod bytes;
#[cfg(test)]
mod fixture;
pub mod hpet;
pub mod i8042;
pub mod lines;
pub mod pc_testdev;
pub mod pm;
pub mod reset;
pub mod rtc;
pub mod uart16550;
