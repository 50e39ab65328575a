//! The host side of devices: disks, SCSI devices, terminals, TPMs, shared folders, sockets, input devices.

pub mod block;
pub mod evdev;
pub mod scsi_generic;
pub mod share;
pub mod tpm;
pub mod tty;
pub mod vhost_user;
pub mod vsock;
