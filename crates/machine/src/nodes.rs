//! The host's NUMA nodes that the guest's memory domains come from (`-n id=N,domain_policy=POLICY`).

use std::fs;

use config::numa::{HostPolicy, NumaDomain};
use config::{ConfigError, value};
use memory::{GuestMemory, NodePolicy};

use crate::MachineError;

/// Nodes of the host that have memory; a host that does not tell has node 0.
fn host_nodes() -> Vec<u32> {
    let list = fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_default();
    value::parse_cpu_list(list.trim()).ok().filter(|nodes| !nodes.is_empty()).unwrap_or_else(|| vec![0])
}

/// Applies the domains' policies to their parts of memory, which follow each other.
pub(crate) fn place(memory: &GuestMemory, domains: &[NumaDomain]) -> Result<(), MachineError> {
    let nodes = host_nodes();
    let mut skip = 0u64;
    for (id, domain) in domains.iter().enumerate() {
        if let Some(policy) = &domain.policy {
            let policy = on_host(id, policy, &nodes)?;
            memory
                .place_on_nodes(skip, domain.size, policy)
                .map_err(|source| MachineError::DomainPolicy(id, source))?;
        }
        skip = skip.saturating_add(domain.size);
    }
    Ok(())
}

/// What a policy means on a host with these nodes. Linux interleaves by pages, whichever of the two ways of FreeBSD is named.
fn on_host<'a>(id: usize, policy: &HostPolicy, nodes: &'a [u32]) -> Result<NodePolicy<'a>, ConfigError> {
    match *policy {
        HostPolicy::FirstTouch => Ok(NodePolicy::Local),
        HostPolicy::RoundRobin | HostPolicy::Interleave => Ok(NodePolicy::Interleave(nodes)),
        HostPolicy::Prefer(node) if nodes.contains(&node) => Ok(NodePolicy::Prefer(node)),
        HostPolicy::Prefer(node) => {
            let known: Vec<_> = nodes.iter().map(u32::to_string).collect();
            Err(ConfigError::Numa(format!(
                "domains.{id}.domain_policy: the host has no memory on NUMA node {node}, only on {}",
                known.join(", ")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_name_nodes_of_the_host() {
        assert_eq!(on_host(0, &HostPolicy::FirstTouch, &[0]).unwrap(), NodePolicy::Local);
        assert_eq!(on_host(0, &HostPolicy::RoundRobin, &[0, 2]).unwrap(), NodePolicy::Interleave(&[0, 2]));
        assert_eq!(on_host(0, &HostPolicy::Prefer(2), &[0, 2]).unwrap(), NodePolicy::Prefer(2));
        let error = on_host(3, &HostPolicy::Prefer(1), &[0, 2]).unwrap_err();
        assert_eq!(error.to_string(), "domains.3.domain_policy: the host has no memory on NUMA node 1, only on 0, 2");
    }
}
