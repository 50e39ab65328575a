//! What `-l` configures: boot ROM, serial ports, firmware configuration channel, TPM, test device.

use crate::error::ConfigError;
use crate::store::Config;

/// The serial ports of the LPC bridge.
pub const COM_PORTS: [&str; 4] = ["com1", "com2", "com3", "com4"];

/// How firmware asks for its configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fwcfg {
    /// bhyve's own fwctl ports.
    Bhyve,
    /// QEMU's fw_cfg device.
    Qemu,
}

/// A TPM for the guest, from the keys below `tpm`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tpm {
    /// `passthru` or `swtpm`.
    pub kind: String,
    /// Host device or socket.
    pub path: String,
    /// Version of the specification.
    pub version: String,
    /// Register interface.
    pub interface: String,
}

/// The boot ROM's file.
#[must_use]
pub fn bootrom(config: &Config) -> Option<String> {
    config.get_str("bootrom")
}

/// The file of the boot ROM's variable store.
#[must_use]
pub fn bootvars(config: &Config) -> Option<String> {
    config.get_str("bootvars")
}

/// The backend of one of the [`COM_PORTS`], numbered from 0.
#[must_use]
pub fn com(config: &Config, port: usize) -> Option<String> {
    config.get_str(&format!("lpc.{}.path", COM_PORTS.get(port)?))
}

/// The firmware configuration channel, `lpc.fwcfg`.
///
/// # Errors
/// The value is neither `bhyve` nor `qemu`.
pub fn fwcfg(config: &Config) -> Result<Fwcfg, ConfigError> {
    Ok(match config.get_word("lpc.fwcfg", &["bhyve", "qemu"])? {
        Some(1) => Fwcfg::Qemu,
        _ => Fwcfg::Bhyve,
    })
}

/// Whether the ports of the debugging device are there, `lpc.pc-testdev`.
///
/// # Errors
/// The value is no boolean.
pub fn pc_testdev(config: &Config) -> Result<bool, ConfigError> {
    config.bool_or("lpc.pc-testdev", false)
}

/// The TPM, if one is configured.
///
/// # Errors
/// `tpm.type` is set and `tpm.path` is not.
pub fn tpm(config: &Config) -> Result<Option<Tpm>, ConfigError> {
    let Some(kind) = config.get_str("tpm.type") else { return Ok(None) };
    let or = |key: &str, default: &str| config.get_str(key).unwrap_or_else(|| default.into());
    Ok(Some(Tpm {
        kind,
        path: config.require_str("tpm.path")?,
        version: or("tpm.version", "2.0"),
        interface: or("tpm.intf", "crb"),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::NoWarnings;

    fn config(keys: &[(&str, &str)]) -> Config {
        let mut config = Config::with_defaults(NoWarnings);
        for (key, value) in keys {
            config.set(key, *value).unwrap();
        }
        config
    }

    #[test]
    fn parts_are_found() {
        let config = config(&[
            ("bootrom", "/fw/%(name).fd"),
            ("name", "vm0"),
            ("lpc.com2.path", "tcp=1234"),
            ("lpc.fwcfg", "qemu"),
            ("lpc.pc-testdev", "on"),
        ]);
        assert_eq!(bootrom(&config).as_deref(), Some("/fw/vm0.fd"));
        assert_eq!(bootvars(&config), None);
        assert_eq!((com(&config, 0), com(&config, 1).as_deref(), com(&config, 4)), (None, Some("tcp=1234"), None));
        assert_eq!(fwcfg(&config).unwrap(), Fwcfg::Qemu);
        assert!(pc_testdev(&config).unwrap());
        assert_eq!(tpm(&config).unwrap(), None);
    }

    #[test]
    fn tpm_needs_a_path_and_has_defaults() {
        assert_eq!(tpm(&config(&[("tpm.type", "swtpm")])).unwrap_err().to_string(), "tpm.path is not set");
        let tpm = tpm(&config(&[("tpm.type", "swtpm"), ("tpm.path", "/run/tpm")])).unwrap().unwrap();
        assert_eq!((tpm.version.as_str(), tpm.interface.as_str()), ("2.0", "crb"));
    }

    #[test]
    fn fwcfg_is_one_of_two() {
        assert_eq!(fwcfg(&config(&[])).unwrap(), Fwcfg::Bhyve);
        assert_eq!(
            fwcfg(&config(&[("lpc.fwcfg", "uefi")])).unwrap_err().to_string(),
            "Invalid value for lpc.fwcfg: 'uefi': give one of: bhyve, qemu"
        );
    }
}
