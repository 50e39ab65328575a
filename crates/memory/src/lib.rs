//! Guest-physical memory: RAM, demand-paged, mapped once into this process.
//!
//! The guest's RAM lies in two pieces, as bhyve lays it out: up to 3 GiB from address 0, the rest
//! from 4 GiB. This process reserves one span of host addresses for all of it, so that the host
//! address of a guest byte is always `base + guest address`: the CPU engines rely on that.
//!
//! Every access through [`GuestMemory`] is checked and returns a `Result`; nothing hands out
//! references into guest RAM, because the guest changes it at any time.
//!
//! Below 4 GiB there may be read-only memory ([`RomKind`]): firmware, which guests read and run as fast as RAM, while their
//! writes go to a device.
//!
//! Pages that hold decoded or translated code are tracked in a [`PageMap`]: whoever writes to such
//! a page, device or vCPU, ends the validity of what was decoded from it.

mod map;
mod nodes;
mod pages;
mod ram;
mod rom;

pub use nodes::NodePolicy;
pub use pages::{CodeTag, PageMap};
pub use ram::{GuestMemory, MemoryError, MemoryOptions};
pub use rom::{Rom, RomKind};

/// Size of a guest page in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// End of low memory: RAM beyond this much lies above 4 GiB.
pub const LOW_MEMORY_LIMIT: u64 = 3 << 30;
/// Start of the window for read-only memory, which ends at 4 GiB.
pub const ROM_WINDOW: u64 = 0xff00_0000;
/// Start of high memory.
pub const HIGH_MEMORY_BASE: u64 = 4 << 30;
