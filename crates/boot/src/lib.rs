//! Firmware tables and kernel loaders: from a board description to bytes in guest memory and the
//! state in which the boot vCPU starts.
//!
//! * [`Board`] says what the machine is made of.
//! * [`write_tables`] puts the tables where bhyve's guests look for them: MP table at
//!   [`MPTABLE_BASE`], SMBIOS at [`SMBIOS_BASE`], ACPI at [`ACPI_BASE`].
//! * [`table_files`] makes files of them for firmware that takes its tables from QEMU's fw_cfg.
//! * [`Firmware`] is a boot ROM's image: what kind it is and where its variables are.
//! * [`e820`] is the memory map that loaders and firmware channels hand to the guest.
//! * [`load`] puts a kernel into memory without any firmware: Linux bzImage, PVH ELF, multiboot.
//!
//! Kernel and initrd files are not trusted: whatever they hold, loading ends in a state or an error.

mod board;
mod e820;
mod firmware;
mod load;
mod tables;

pub use board::{Board, Cache, CacheKind, InterruptRoute, Lpc, NumaDomain, PciBus, SmbiosStrings, Topology, Window};
pub use e820::{E820Entry, E820Kind, e820};
pub use firmware::{Firmware, FirmwareError, Flavour};
pub use load::{BootError, Role, load};
pub use tables::{ACPI_BASE, GENERATION_ID_BASE, MPTABLE_BASE, SMBIOS_BASE, TableError, table_files, write_tables};

#[cfg(test)]
mod fixture;
