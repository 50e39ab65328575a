//! The host side of devices: disks, SCSI devices, networks, terminals, shared folders, sockets, TPMs.

pub mod block;
pub mod evdev;
pub mod net;
pub mod scsi_generic;
pub mod share;
pub mod tpm;
pub mod tty;
pub mod vhost_user;
pub mod vsock;
