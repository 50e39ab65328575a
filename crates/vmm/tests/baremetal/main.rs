//! Bare-metal tests: the mechanisms of an x86 processor at system level, each tried by a guest of a few instructions that
//! knows what the manuals promise. On the software CPU all of them; on KVM those that every host's KVM does right.

#[path = "../harness/mod.rs"]
mod harness;

mod crossing;
mod debug;
mod gates;
mod interrupts;
mod mmio;
mod paging;
mod privilege;
mod segments;
mod tasks;
mod v8086;
