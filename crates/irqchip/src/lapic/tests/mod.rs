//! Tests of the local APIC, on a whole board: IPIs need a second one, EOIs an I/O APIC.

mod garbage;
mod ipis;
mod modes;
mod priorities;
mod timer;
