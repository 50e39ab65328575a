//! What firmware talks to: the flash that holds its variables, and the two channels by which it asks for its configuration.
//!
//! | module   | what                                                           | who asks                    |
//! |----------|----------------------------------------------------------------|-----------------------------|
//! | `flash`  | a NOR flash with the command set of Intel's chips              | UEFI variable services      |
//! | `fwctl`  | bhyve's small protocol: the number of CPUs                     | firmware built for bhyve    |
//! | `fw_cfg` | QEMU's directory of files, with DMA                            | firmware built for QEMU     |
//! | `compat` | ports of QEMU's boards that firmware expects                   | firmware built for QEMU     |

pub mod compat;
pub mod flash;
pub mod fw_cfg;
pub mod fwctl;

pub use flash::Flash;
pub use fw_cfg::{FwCfg, FwCfgItems};
pub use fwctl::FwCtl;

/// First port of both configuration channels.
pub const PORT: u64 = 0x510;
