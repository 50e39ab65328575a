//! The configuration tree, the bhyve(8) command line and the bhyve_config(5) file.
//!
//! Everything a user says about a virtual machine ends up in one tree of strings ([`Node`], [`Config`]): command line
//! options, `-k` files and `-o key=value` all write to it, in order of appearance, and the programs read nothing else.
//!
//! | module | what it does |
//! |---|---|
//! | [`tree`] | the tree: dotted paths, insertion order, one kind per name (leaf or inner node), the dump |
//! | [`expand`] | `%(other.key)` inside values, replaced when a value is read |
//! | [`value`] | text to boolean, integer, size, list of CPUs |
//! | [`store`] | [`Config`] and [`NodeRef`]: typed reading with the key's full path in every error |
//! | [`mod@file`] | the `-k` file |
//! | [`cmdline`] | the command line; [`parse_command_line`] is the entry point of the bhyve program |
//! | [`legacy`] | how the `-s` option of each device becomes keys of the tree |
//! | [`topology`], [`numa`], [`pci`], [`lpc`], [`settings`] | small typed views that several crates need |
//!
//! The tree knows no device by itself: the command line parser is given a table of [`legacy::DeviceSyntax`], normally
//! [`legacy::DEVICES`]. Whether a device that parses is also built into this program is for the caller to say.
//!
//! ```
//! use config::{NoWarnings, legacy, parse_command_line};
//!
//! let args = ["-c", "2", "-s", "3,ahci-cd,/iso/dvd.iso,ro", "vm0"].map(Into::into);
//! let config = parse_command_line(args, legacy::DEVICES, NoWarnings).unwrap();
//! assert_eq!(config.get_str("pci.0.3.0.port.0.type").as_deref(), Some("cd"));
//! assert_eq!(config::Topology::resolve(&config).unwrap().sockets, 2);
//! ```

pub mod cmdline;
pub mod error;
pub mod exit;
pub mod expand;
pub mod file;
pub mod legacy;
pub mod lpc;
pub mod numa;
pub mod pci;
pub mod settings;
pub mod store;
pub mod topology;
pub mod tree;
pub mod value;

pub use cmdline::parse_command_line;
pub use error::ConfigError;
pub use exit::Exit;
pub use pci::{PciFunction, pci_functions};
pub use settings::memory_size;
pub use store::{Config, FwcfgItem, NoWarnings, NodeRef, PrintWarnings, Warnings};
pub use topology::Topology;
pub use tree::Node;
