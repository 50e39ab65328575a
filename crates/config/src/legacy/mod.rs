//! How the `-s` option of each device becomes keys of the tree.
//!
//! The text after the device's name is older than the tree: some devices want a path first, some a backend, ahci a list
//! of drives. Each has a [`DeviceSyntax`] with a function that turns the text into the device's keys, after which no
//! trace of the old form is left. A name that exists only on the command line (`ahci-cd`) is an alias: the tree gets
//! the real name.
//!
//! This is about syntax only. The values are checked by the device that reads them, for they may come from a file just
//! as well.

mod ahci;
mod block;
mod fbuf;
mod hostbridge;
mod net;
mod passthru;
mod usb;
mod virtio;

#[cfg(test)]
mod tests;

use thiserror::Error;

use crate::exit::{self, Exit};
use crate::tree::{Node, TreeError};

/// Turns the text after the device's name, if there is any, into keys of the device's node.
pub type Parse = fn(&mut Node, Option<&str>) -> Result<(), SyntaxError>;

/// The command line form of one device.
#[derive(Debug, Clone, Copy)]
pub struct DeviceSyntax {
    /// The name on the command line.
    pub name: &'static str,
    /// The name in the tree, if it is another one.
    pub alias_of: Option<&'static str>,
    /// Reads the rest of the option.
    pub parse: Parse,
}

impl DeviceSyntax {
    /// A device whose options all have the form `key=value` or `key`.
    #[must_use]
    pub const fn plain(name: &'static str) -> Self {
        Self::with(name, options)
    }

    /// A device with a form of its own.
    #[must_use]
    pub const fn with(name: &'static str, parse: Parse) -> Self {
        Self { name, alias_of: None, parse }
    }

    /// Another name for a device, with a form of its own.
    #[must_use]
    pub const fn alias(name: &'static str, of: &'static str, parse: Parse) -> Self {
        Self { name, alias_of: Some(of), parse }
    }

    /// The name the device has in the tree.
    #[must_use]
    pub fn device(&self) -> &'static str {
        self.alias_of.unwrap_or(self.name)
    }
}

/// All devices of bhyve(8) by name, and ours.
pub const DEVICES: &[DeviceSyntax] = &[
    DeviceSyntax::with("ahci", ahci::ports),
    DeviceSyntax::alias("ahci-cd", "ahci", ahci::single_cd),
    DeviceSyntax::alias("ahci-hd", "ahci", ahci::single_hd),
    DeviceSyntax::alias("amd_hostbridge", "hostbridge", hostbridge::amd),
    DeviceSyntax::with("e1000", net::backend_first),
    DeviceSyntax::with("fbuf", fbuf::parse),
    DeviceSyntax::plain("hda"),
    DeviceSyntax::plain("hostbridge"),
    DeviceSyntax::plain("lpc"),
    DeviceSyntax::with("nvme", block::nvme),
    DeviceSyntax::with("passthru", passthru::parse),
    DeviceSyntax::with("uart", uart),
    DeviceSyntax::with("virtio-9p", virtio::share),
    DeviceSyntax::plain("virtio-balloon"),
    DeviceSyntax::with("virtio-blk", block::path_first),
    DeviceSyntax::with("virtio-console", virtio::console_ports),
    DeviceSyntax::with("virtio-fs", virtio::tag_first),
    DeviceSyntax::with("virtio-input", virtio::input),
    DeviceSyntax::with("virtio-net", net::backend_first),
    DeviceSyntax::plain("virtio-rnd"),
    DeviceSyntax::with("virtio-scsi", virtio::scsi),
    DeviceSyntax::with("virtio-vsock", virtio::path_first),
    DeviceSyntax::with("xhci", usb::xhci),
];

/// The device of that name.
#[must_use]
pub fn find<'a>(devices: &'a [DeviceSyntax], name: &str) -> Option<&'a DeviceSyntax> {
    devices.iter().find(|device| device.name == name)
}

/// What `-s help` prints: one name per line.
#[must_use]
pub fn help(devices: &[DeviceSyntax]) -> String {
    devices.iter().map(|device| format!("{}\n", device.name)).collect()
}

/// A `-s` option whose device cannot make sense of it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SyntaxError {
    /// A key did not fit the tree.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// Anything else; the text may have several lines.
    #[error("{0}")]
    Text(String),
}

impl SyntaxError {
    fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// The same error with paths below `prefix`.
    fn below(self, prefix: &str) -> Self {
        match self {
            Self::Tree(error) => Self::Tree(error.below(prefix)),
            other @ Self::Text(_) => other,
        }
    }

    /// How bhyve(8) ends for this error in the device at `path`.
    #[must_use]
    pub fn into_exit(self, path: &str) -> Exit {
        match self {
            Self::Tree(error) => Exit::message(exit::ERROR, error.below(path)),
            Self::Text(text) => Exit::with_stderr(exit::ERROR, format!("{text}\n")),
        }
    }
}

/// The general form: a comma-separated list of `key=value`, where a bare `key` means `key=true`.
///
/// # Errors
/// A key does not fit the tree.
pub fn options(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    for token in conf.unwrap_or_default().split(',').filter(|token| !token.is_empty()) {
        match token.split_once('=') {
            Some((key, value)) => node.set(key, value)?,
            None => node.set(token, "true")?,
        }
    }
    Ok(())
}

/// The form of devices that want one value first: `VALUE[,options]`, the value stored as `key`.
fn leading(node: &mut Node, key: &str, conf: Option<&str>) -> Result<(), SyntaxError> {
    let Some(conf) = conf else { return Ok(()) };
    let (value, rest) = match conf.split_once(',') {
        Some((value, rest)) => (value, Some(rest)),
        None => (conf, None),
    };
    if !value.is_empty() {
        node.set(key, value)?;
    }
    options(node, rest)
}

/// Whether the first comma-separated word of `conf` is a `key=value`.
fn begins_with_option(conf: Option<&str>) -> bool {
    conf.and_then(|conf| conf.split(',').next()).is_some_and(|word| word.contains('='))
}

/// `uart`: everything is the backend, which may itself contain `=` (`tcp=PORT`).
fn uart(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    match conf {
        Some(conf) if !conf.is_empty() => Ok(node.set("path", conf)?),
        _ => Ok(()),
    }
}
