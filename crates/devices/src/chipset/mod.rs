//! The chipset around the CPU: what a PC has on board besides PCI and the interrupt chips.
//!
//! | module         | device                                            | where                                 |
//! |----------------|---------------------------------------------------|---------------------------------------|
//! | [`uart16550`]  | 16550A serial ports com1 to com4                  | 3F8, 2F8, 3E8, 2E8                    |
//! | [`rtc`]        | MC146818 real-time clock with NVRAM               | 70–71                                 |
//! | [`hpet`]       | high precision event timers                       | memory FED00000                       |
//! | [`pm`]         | ACPI PM1 block, PM timer, SMI command port        | 400–40B, B2                           |
//! | [`reset`]      | reset control, fast A20, POST codes               | CF9, 92, 80, 84                       |
//! | [`i8042`]      | keyboard controller with PS/2 keyboard and mouse  | 60, 64                                |
//! | [`pc_testdev`] | what kvm-unit-tests want of a machine             | E0–E7, F4, 2000–2017, memory FF000000 |
//! | [`lines`]      | interrupt lines with more than one source         |                                       |
//! | [`isa`]        | puts all of these on the buses                    |                                       |
//!
//! Each device is a pure chip, driven by register accesses and told the time, inside a wrapper that owns the lock,
//! the interrupt line and the timers. A chip's interrupt line is a function of its state, pushed out after every
//! change. Devices that wait for time use no CPU while they wait.

mod bytes;
#[cfg(test)]
pub(crate) mod fixture;
pub mod hpet;
pub mod i8042;
pub mod isa;
pub mod lines;
pub mod pc_testdev;
pub mod pm;
pub mod reset;
pub mod rtc;
pub mod tpm;
pub mod uart16550;
