//! The host side of devices: block images, terminals.

pub mod tty;
