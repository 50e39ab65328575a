//! NUMA emulation: the keys below `domains`, from the `-n` option.

use crate::error::ConfigError;
use crate::lpc;
use crate::settings::parse_memory_size;
use crate::store::{Config, NodeRef};
use crate::value;

/// How many domains a guest may have.
pub const MAX_DOMAINS: usize = 8;

/// One memory domain of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NumaDomain {
    /// Bytes of guest memory in it.
    pub size: u64,
    /// The guest's vCPUs in it.
    pub cpus: Vec<u32>,
    /// From where the host is to take the memory.
    pub policy: Option<HostPolicy>,
}

/// Which of the host's NUMA nodes a domain's memory comes from, in the words of cpuset(1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostPolicy {
    /// The node of the CPU that touches a page first.
    FirstTouch,
    /// All nodes in turn.
    RoundRobin,
    /// Large extents from all nodes in turn.
    Interleave,
    /// This node while it has memory.
    Prefer(u32),
}

impl HostPolicy {
    /// Reads `first-touch`, `round-robin`, `interleave` or `prefer:N`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "first-touch" | "ft" => Some(Self::FirstTouch),
            "round-robin" | "rr" => Some(Self::RoundRobin),
            "interleave" | "il" => Some(Self::Interleave),
            _ => {
                let node = text.strip_prefix("prefer:")?;
                let digits = !node.is_empty() && node.bytes().all(|b| b.is_ascii_digit());
                digits.then(|| node.parse().ok())?.map(Self::Prefer)
            }
        }
    }
}

/// Reads the guest's domains; empty if none is configured.
///
/// If a domain has no size, all get equal shares of `memory` bytes, with a warning. Otherwise the sizes stand, and
/// their sum takes the place of `memory`.
///
/// # Errors
/// Numbers with gaps or too many, a size, list or policy that does not parse, no CPUs, or neither ACPI nor a boot ROM
/// to tell the guest.
pub fn domains(config: &Config, memory: u64) -> Result<Vec<NumaDomain>, ConfigError> {
    let nodes = numbered_nodes(config)?;
    if nodes.is_empty() {
        return Ok(Vec::new());
    }
    if !config.bool_or("acpi_tables", true)? {
        return Err(ConfigError::Numa("NUMA emulation requires ACPI".into()));
    }
    // A kernel that is started directly gets its tables without firmware.
    if lpc::bootrom(config).is_none() && config.get_str("kernel.image").is_none() {
        return Err(ConfigError::Numa("NUMA emulation requires a boot ROM: give one with -l bootrom".into()));
    }
    let sizes: Vec<Option<u64>> = nodes.iter().map(size).collect::<Result<_, _>>()?;
    if sizes.iter().flatten().try_fold(0u64, |sum, size| sum.checked_add(*size)).is_none() {
        return Err(ConfigError::Numa("the sizes of the NUMA domains add up to more than 64 bits can count".into()));
    }
    let share = if sizes.contains(&None) {
        config.warn(
            "At least one domain memory size was not specified, distributing total VM memory size across all domains",
        );
        Some(memory / nodes.len() as u64)
    } else {
        None
    };
    nodes
        .iter()
        .zip(sizes)
        .map(|(node, size)| {
            let size = share.or(size).unwrap_or(0);
            Ok(NumaDomain { size, cpus: cpus(node)?, policy: policy(node)? })
        })
        .collect()
}

fn numbered_nodes(config: &Config) -> Result<Vec<NodeRef<'_>>, ConfigError> {
    let Some(domains) = config.node("domains") else { return Ok(Vec::new()) };
    let mut found: Vec<(u32, NodeRef<'_>)> =
        domains.nodes().filter_map(|(name, node)| Some((name.parse().ok()?, node))).collect();
    found.sort_by_key(|(id, _)| *id);
    if found.len() > MAX_DOMAINS {
        return Err(ConfigError::Numa(format!(
            "{} NUMA domains requested but only {MAX_DOMAINS} available",
            found.len()
        )));
    }
    for (expected, (id, _)) in (0..).zip(&found) {
        if *id != expected {
            return Err(ConfigError::Numa(format!(
                "NUMA domain {id} is given but domain {expected} is not: number them from 0 without gaps"
            )));
        }
    }
    Ok(found.into_iter().map(|(_, node)| node).collect())
}

fn size(node: &NodeRef<'_>) -> Result<Option<u64>, ConfigError> {
    let path = node.absolute("size");
    node.get_str("size").map(|value| parse_memory_size(&path, value)).transpose()
}

fn cpus(node: &NodeRef<'_>) -> Result<Vec<u32>, ConfigError> {
    let list = node.require_str("cpus")?;
    value::parse_cpu_list(&list).map_err(|reason| node.invalid("cpus", reason))
}

fn policy(node: &NodeRef<'_>) -> Result<Option<HostPolicy>, ConfigError> {
    let Some(text) = node.get_str("domain_policy") else { return Ok(None) };
    match HostPolicy::parse(&text) {
        Some(policy) => Ok(Some(policy)),
        None => Err(ConfigError::Numa(format!(
            "failed to parse domain policy '{text}': use first-touch, round-robin, interleave or prefer:NODE"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use crate::store::NoWarnings;

    const GIB: u64 = 1 << 30;

    fn resolve(keys: &[(&str, &str)]) -> Result<Vec<NumaDomain>, Exit> {
        let mut config = Config::with_defaults(NoWarnings);
        config.set("bootrom", "/fw.fd").unwrap();
        for (key, value) in keys {
            config.set(key, *value).unwrap();
        }
        Ok(domains(&config, 4 * GIB)?)
    }

    #[test]
    fn sizes_stand_if_all_are_given() {
        let found = resolve(&[
            ("domains.1.size", "2G"),
            ("domains.1.cpus", "2-3"),
            ("domains.0.size", "1G"),
            ("domains.0.cpus", "0,1"),
            ("domains.0.domain_policy", "prefer:1"),
        ]);
        assert_eq!(
            found,
            Ok(vec![
                NumaDomain { size: GIB, cpus: vec![0, 1], policy: Some(HostPolicy::Prefer(1)) },
                NumaDomain { size: 2 * GIB, cpus: vec![2, 3], policy: None },
            ])
        );
        assert_eq!(resolve(&[]), Ok(vec![]));
    }

    #[test]
    fn a_missing_size_shares_memory_out_evenly() {
        let found = resolve(&[("domains.0.size", "1G"), ("domains.0.cpus", "0"), ("domains.1.cpus", "1")]).unwrap();
        assert_eq!(found.iter().map(|d| d.size).collect::<Vec<_>>(), [2 * GIB, 2 * GIB]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let failure = |keys: &[(&str, &str)]| {
            let exit = resolve(keys).unwrap_err();
            (exit.code, exit.stderr)
        };
        let (code, text) = failure(&[("domains.1.cpus", "0")]);
        assert_eq!(code, 64);
        assert!(text.contains("domain 1 is given but domain 0 is not"), "{text}");
        let (code, text) = failure(&[("domains.0.size", "1G")]);
        assert_eq!((code, text.as_str()), (4, "bhyve: domains.0.cpus is not set\n"));
        let (code, text) = failure(&[("domains.0.size", "much"), ("domains.0.cpus", "0")]);
        assert!(code == 64 && text.contains("invalid memsize 'much' for domains.0.size"), "{text}");
        let (code, text) = failure(&[("domains.0.cpus", "0"), ("domains.0.domain_policy", "near")]);
        assert!(code == 64 && text.contains("failed to parse domain policy 'near'"), "{text}");
        let (code, text) = failure(&[("domains.0.cpus", "0"), ("acpi_tables", "false")]);
        assert_eq!((code, text.as_str()), (64, "bhyve: NUMA emulation requires ACPI\n"));
        let (code, text) = failure(&[
            ("domains.0.size", "15E"),
            ("domains.0.cpus", "0"),
            ("domains.1.size", "15E"),
            ("domains.1.cpus", "1"),
        ]);
        assert!(code == 64 && text.contains("add up to"), "{text}");
        let many: Vec<(String, &str)> = (0..9).map(|n| (format!("domains.{n}.cpus"), "0")).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|(k, v)| (k.as_str(), *v)).collect();
        assert_eq!(failure(&many).0, 64);
    }

    #[test]
    fn a_boot_rom_is_needed() {
        let mut config = Config::with_defaults(NoWarnings);
        config.set("domains.0.cpus", "0").unwrap();
        assert_eq!(domains(&config, GIB).unwrap_err().exit_code(), 64);
        config.set("kernel.image", "/vmlinuz").unwrap();
        assert_eq!(domains(&config, GIB).unwrap().len(), 1, "or a kernel");
    }

    #[test]
    fn policies() {
        assert_eq!(HostPolicy::parse("first-touch"), Some(HostPolicy::FirstTouch));
        assert_eq!(HostPolicy::parse("prefer:3"), Some(HostPolicy::Prefer(3)));
        for text in ["", "prefer", "prefer:", "prefer:x", "prefer:99999999999"] {
            assert_eq!(HostPolicy::parse(text), None, "{text}");
        }
    }
}
