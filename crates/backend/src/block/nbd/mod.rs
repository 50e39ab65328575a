//! Disks behind a server that speaks NBD: `qemu-nbd`, `nbdkit`, and what these can reach.
//!
//! | module | what it does |
//! |---|---|
//! | [`uri`] | where the server is |
//! | `wire` | the protocol |
//! | `parts` | what a request becomes on the wire, and how its parts come together again |
//! | `journal` | what was acknowledged but is not durable yet |
//! | `client` | the threads: one sends, one receives and reconnects |
//!
//! When the connection is lost, requests wait. On the new connection first the journal is written again, for a server
//! that died may have lost it, then what was under way is sent again: nothing that the guest was told is done is lost.

mod client;
mod journal;
mod parts;
#[cfg(test)]
mod tests;
mod uri;
mod wire;

pub(super) use client::NbdClient;
pub use uri::{NbdAddress, NbdUri};
