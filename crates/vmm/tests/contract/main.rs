//! What every CPU engine promises, tried on each of them with guests of a few instructions.

#[path = "../harness/mod.rs"]
mod harness;

mod basics;
mod events;
mod io;
mod lifecycle;
mod msrs;
mod smp;
