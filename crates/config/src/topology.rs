//! How many vCPUs there are and how they are grouped: the keys of `-c`, and of `-p`.

use crate::error::ConfigError;
use crate::store::Config;
use crate::value;

/// Sockets, cores and threads; their product is the number of vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Number of vCPUs.
    pub cpus: u16,
    /// Number of sockets.
    pub sockets: u16,
    /// Cores of a socket.
    pub cores: u16,
    /// Threads of a core.
    pub threads: u16,
}

impl Topology {
    /// Reads `cpus`, `sockets`, `cores` and `threads`.
    ///
    /// `cores` and `threads` default to 1 and `sockets` to the number of vCPUs, so that `-c 8` means eight sockets. If
    /// only `cpus` is missing, it is the product of the others.
    ///
    /// # Errors
    /// A value is no number from 1 to 65535, or the product does not match.
    pub fn resolve(config: &Config) -> Result<Self, ConfigError> {
        let number = |key: &str| config.get_int(key, 1..=u16::MAX);
        let wanted = number("cpus")?;
        let sockets = number("sockets")?.or(wanted).unwrap_or(1);
        let cores = number("cores")?.unwrap_or(1);
        let threads = number("threads")?.unwrap_or(1);
        let product = u64::from(sockets) * u64::from(cores) * u64::from(threads);
        let cpus = u16::try_from(product).map_err(|_| ConfigError::TooManyCpus { cpus: product })?;
        match wanted {
            Some(wanted) if wanted != cpus => Err(ConfigError::Topology { sockets, cores, threads, cpus: wanted }),
            _ => Ok(Self { cpus, sockets, cores, threads }),
        }
    }
}

/// The host CPUs on which a vCPU may run, from `vcpu.N.cpuset`; `None` if it may run anywhere.
///
/// # Errors
/// The value is no list of host CPUs.
pub fn vcpu_cpuset(config: &Config, vcpu: u32) -> Result<Option<Vec<u32>>, ConfigError> {
    let path = format!("vcpu.{vcpu}.cpuset");
    let Some(list) = config.get_str(&path) else { return Ok(None) };
    value::parse_cpu_list(&list).map(Some).map_err(|reason| ConfigError::Value { path, value: list, reason })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use crate::store::NoWarnings;

    fn resolve(keys: &[(&str, &str)]) -> Result<(u16, u16, u16, u16), Exit> {
        let mut config = Config::with_defaults(NoWarnings);
        for (key, value) in keys {
            config.set(key, *value).unwrap();
        }
        let found = Topology::resolve(&config)?;
        Ok((found.cpus, found.sockets, found.cores, found.threads))
    }

    #[test]
    fn what_is_missing_follows_from_the_rest() {
        assert_eq!(resolve(&[]), Ok((1, 1, 1, 1)));
        assert_eq!(resolve(&[("cpus", "0x4")]), Ok((4, 4, 1, 1)));
        assert_eq!(resolve(&[("cores", "2"), ("threads", "2"), ("sockets", "1")]), Ok((4, 1, 2, 2)));
        assert_eq!(resolve(&[("cores", "2"), ("threads", "2")]), Ok((4, 1, 2, 2)));
        assert_eq!(resolve(&[("cpus", "4"), ("sockets", "2"), ("cores", "2")]), Ok((4, 2, 2, 1)));
        assert_eq!(resolve(&[("n", "2"), ("cpus", "%(n)")]), Ok((2, 2, 1, 1)));
    }

    #[test]
    fn a_product_that_does_not_match_is_refused() {
        let exit = resolve(&[("cpus", "4"), ("cores", "2")]).unwrap_err();
        assert_eq!(exit.code, 4);
        assert_eq!(exit.stderr, "bhyve: Topology (4 sockets, 2 cores, 1 threads) does not match 4 vCPUs\n");
        let exit = resolve(&[("sockets", "65535"), ("cores", "65535"), ("threads", "65535")]).unwrap_err();
        assert_eq!(exit.stderr, "bhyve: Computed number of vCPUs too high: 281462092005375\n");
    }

    #[test]
    fn numbers_are_checked() {
        for value in ["0", "-1", "65536", "two", "2x", "99999999999999999999999"] {
            let exit = resolve(&[("cpus", value)]).unwrap_err();
            assert_eq!(exit.code, 4);
            assert!(exit.stderr.starts_with(&format!("bhyve: Invalid value for cpus: '{value}'")), "{}", exit.stderr);
        }
    }

    #[test]
    fn cpusets_are_lists() {
        let mut config = Config::new(NoWarnings);
        config.set("vcpu.1.cpuset", "0-2,5").unwrap();
        config.set("vcpu.2.cpuset", "9-1").unwrap();
        assert_eq!(vcpu_cpuset(&config, 0).unwrap(), None);
        assert_eq!(vcpu_cpuset(&config, 1).unwrap(), Some(vec![0, 1, 2, 5]));
        let error = vcpu_cpuset(&config, 2).unwrap_err();
        assert_eq!(error.to_string(), "Invalid value for vcpu.2.cpuset: '9-1': the range 9-1 runs backwards");
    }
}
