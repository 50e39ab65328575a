//! Runs the real `bhyve` program with real guests, for the tests of this folder.
//!
//! | module | what it is |
//! |---|---|
//! | [`program`] | a command line of bhyve and its running process: [`Bhyve`], [`Vm`] |
//! | [`console`] | the text that comes out of a guest, and what is typed into it |
//! | [`linux`] | the Debian guests of `cargo xtask guest all` and their shell |
//! | [`debian`] | installed Debian systems with systemd and tools, directly or by firmware: [`Debian`] |
//! | [`kernel`] | a kernel of a few hundred bytes that ends the VM in any way it is told to |
//! | [`servers`] | small servers on the host for guests to talk to |
//! | [`vhost_switch`] | a switch that speaks vhost-user |
//! | [`terminal`] | pseudo terminals and their modes |
//! | [`host`] | what the host's kernel says of a process |
//! | [`files`] | the program under test, guests' files, scratch folders |
//!
//! | variable | meaning | otherwise |
//! |---|---|---|
//! | `BHYVE_BIN` | the program under test | `target/release/bhyve` |
//! | `BHYVE_GUESTS` | the folder of the guests | `guests` |
//!
//! Tests wait for texts and for ends of processes, never for fixed times. The limits are so far away that they are only
//! met when something hangs; the failure shows everything that the guest and bhyve have printed.

pub mod console;
pub mod debian;
pub mod files;
pub mod host;
pub mod kernel;
pub mod linux;
pub mod program;
pub mod servers;
pub mod terminal;
pub mod vhost_switch;

use std::time::Duration;

pub use console::Console;
pub use debian::Debian;
pub use linux::Linux;
pub use program::{Bhyve, Outcome, Vm};
pub use terminal::Terminal;

/// How long to wait for anything before it counts as hung.
pub const PATIENCE: Duration = Duration::from_secs(240);
