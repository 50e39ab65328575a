//! The host side of devices: disks, SCSI devices, terminals, TPMs.

pub mod block;
pub mod scsi_generic;
pub mod tpm;
pub mod tty;
