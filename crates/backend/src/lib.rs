//! The host side of devices: block images, terminals.

pub mod block;
pub mod tty;
