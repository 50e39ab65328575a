//! Keys that more than one crate reads or that have more than one spelling.

use crate::error::ConfigError;
use crate::store::Config;
use crate::value;

/// Spellings of older versions, and what they are now. They work, with a warning.
const OLD_SPELLINGS: [(&str, &str); 2] = [("lpc.bootrom", "bootrom"), ("lpc.bootvars", "bootvars")];

/// Stores the values of old spellings under the new ones, where those are not set, and says so.
///
/// # Errors
/// A new spelling is in use as an inner node.
pub fn apply_old_spellings(config: &mut Config) -> Result<(), ConfigError> {
    for (old, new) in OLD_SPELLINGS {
        if config.root().value(new).is_some() {
            continue;
        }
        let Some(value) = config.root().value(old).map(str::to_owned) else { continue };
        config.warn(&format!("'{old}' is deprecated, use '{new}' instead"));
        config.set(new, value)?;
    }
    Ok(())
}

/// The size of the guest's memory in bytes, from `memory.size`.
///
/// Whether the host can give that much is for the caller to find out.
///
/// # Errors
/// The value is no size, or 0.
pub fn memory_size(config: &Config) -> Result<u64, ConfigError> {
    let path = "memory.size";
    let value = config.require_str(path)?;
    parse_memory_size(path, value)
}

/// Parses a size of guest memory found at `path`.
pub(crate) fn parse_memory_size(path: &str, value: String) -> Result<u64, ConfigError> {
    let reason = match value::parse_size(&value) {
        Ok(0) => "a guest needs some memory",
        Ok(size) => return Ok(size),
        Err(reason) => reason,
    };
    Err(ConfigError::MemorySize { path: path.into(), value, reason: reason.into() })
}

/// Whether virtio devices offer MSI-X: `virtio_msix`, which newer versions call `virtio.msix`.
///
/// # Errors
/// The value is no boolean.
pub fn virtio_msix(config: &Config) -> Result<bool, ConfigError> {
    match config.get_bool("virtio_msix")? {
        Some(value) => Ok(value),
        None => config.bool_or("virtio.msix", true),
    }
}

/// Whether to run in monitor mode: `monitor`, which newer versions call `monitor.enabled`.
///
/// # Errors
/// The value is no boolean.
pub fn monitor(config: &Config) -> Result<bool, ConfigError> {
    let path = if config.root().node("monitor").is_some() { "monitor.enabled" } else { "monitor" };
    config.bool_or(path, false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use crate::store::NoWarnings;

    fn config(keys: &[(&str, &str)]) -> Config {
        let mut config = Config::with_defaults(NoWarnings);
        for (key, value) in keys {
            config.set(key, *value).unwrap();
        }
        config
    }

    #[test]
    fn memory_sizes() {
        assert_eq!(memory_size(&config(&[])).unwrap(), 256 << 20);
        assert_eq!(memory_size(&config(&[("memory.size", "1024")])).unwrap(), 1 << 30);
        assert_eq!(memory_size(&config(&[("memory.size", "%(ram)G"), ("ram", "3")])).unwrap(), 3 << 30);
        for value in ["0", "0G", "many", "17000000T"] {
            let exit: Exit = memory_size(&config(&[("memory.size", value)])).unwrap_err().into();
            assert_eq!(exit.code, 64);
            assert!(exit.stderr.starts_with(&format!("bhyve: invalid memsize '{value}'")), "{}", exit.stderr);
        }
    }

    #[test]
    fn old_spellings_are_carried_over_unexpanded() {
        let mut config = config(&[("lpc.bootrom", "%(dir)/rom.fd"), ("lpc.bootvars", "/old"), ("bootvars", "/new")]);
        apply_old_spellings(&mut config).unwrap();
        assert_eq!(config.root().value("bootrom"), Some("%(dir)/rom.fd"));
        assert_eq!(config.root().value("bootvars"), Some("/new"));
    }

    #[test]
    fn both_spellings_of_renamed_keys_are_read() {
        assert!(virtio_msix(&config(&[])).unwrap());
        assert!(!virtio_msix(&config(&[("virtio_msix", "false")])).unwrap());
        assert!(!virtio_msix(&config(&[("virtio.msix", "off")])).unwrap());
        assert!(!monitor(&config(&[])).unwrap());
        assert!(monitor(&config(&[("monitor", "true")])).unwrap());
        assert!(monitor(&config(&[("monitor.enabled", "true")])).unwrap());
    }
}
