//! The host side of devices: disks, SCSI devices, terminals.

pub mod block;
pub mod scsi_generic;
pub mod tty;
