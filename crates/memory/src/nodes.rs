//! On which of the host's NUMA nodes guest memory lies.

use rustix::io::Errno;

use crate::map::NodeMask;
use crate::{GuestMemory, HIGH_MEMORY_BASE, MemoryError, PAGE_SIZE};

/// From which of the host's NUMA nodes memory comes: mbind(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePolicy<'a> {
    /// The node of the CPU that touches a page first.
    Local,
    /// These nodes in turn, page by page.
    Interleave(&'a [u32]),
    /// This node while it has memory.
    Prefer(u32),
}

impl GuestMemory {
    /// Sets where a part of RAM comes from: `size` bytes behind the first `skip`, low memory before high. Whole pages that the
    /// part touches are meant, and those there already move. A host without NUMA has but one place: it fulfils every policy.
    ///
    /// # Errors
    /// A node that the host does not have, or the host refuses, as in containers that lack the right.
    pub fn place_on_nodes(&self, skip: u64, size: u64, policy: NodePolicy<'_>) -> Result<(), MemoryError> {
        let (mode, nodes) = match &policy {
            NodePolicy::Local => (libc::MPOL_LOCAL, &[][..]),
            NodePolicy::Interleave(nodes) => (libc::MPOL_INTERLEAVE, *nodes),
            NodePolicy::Prefer(node) => (libc::MPOL_PREFERRED, std::slice::from_ref(node)),
        };
        let error = |source| MemoryError::Host { what: "set the NUMA policy of", size, source };
        let mask = NodeMask::new(nodes).ok_or(error(Errno::INVAL))?;
        let from = skip - skip % PAGE_SIZE;
        let end = skip.saturating_add(size).min(self.size());
        let low = self.low_size();
        // What of the part lies in low memory, and what in high.
        let pieces = [(from, end.min(low)), (from.max(low), end)];
        for (start, end) in pieces.into_iter().filter(|(start, end)| start < end) {
            let gpa = if start < low { start } else { start - low + HIGH_MEMORY_BASE };
            match self.0.map.bind(gpa, end - start, mode, &mask) {
                Ok(()) | Err(Errno::NOSYS) => {}
                Err(source) => return Err(error(source)),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::MemoryOptions;

    /// The policy that the host shows for the mapping that begins at a guest address; `None` on hosts that do not tell.
    fn policy_at(memory: &GuestMemory, gpa: u64) -> Option<String> {
        let maps = fs::read_to_string("/proc/self/numa_maps").ok()?;
        let start = format!("{:08x} ", memory.host_address(gpa, 1).unwrap() as usize);
        let line = maps.lines().find_map(|line| line.strip_prefix(&start));
        Some(line.and_then(|line| line.split(' ').next()).unwrap_or_default().to_owned())
    }

    #[test]
    fn each_part_has_its_policy() {
        const GIB: u64 = 1 << 30;
        for shared in [false, true] {
            let memory = GuestMemory::new(MemoryOptions { size: 5 * GIB, shared, ..Default::default() }).unwrap();
            memory.write_u64(GIB, 7).unwrap();
            let refused = |result| matches!(result, Err(MemoryError::Host { source: Errno::PERM, .. }));
            if refused(memory.place_on_nodes(0, GIB, NodePolicy::Local)) {
                // A container without the right.
                return;
            }
            memory.place_on_nodes(GIB, GIB, NodePolicy::Prefer(0)).unwrap();
            memory.place_on_nodes(2 * GIB, 2 * GIB, NodePolicy::Interleave(&[0])).unwrap();
            let policies = [0, GIB, 2 * GIB, HIGH_MEMORY_BASE, HIGH_MEMORY_BASE + GIB].map(|at| policy_at(&memory, at));
            let expected = ["local", "prefer:0", "interleave:0", "interleave:0", "default"];
            assert!(policies[0].is_none() || policies == expected.map(|text| Some(text.to_owned())), "{policies:?}");
            assert_eq!(memory.read_u64(GIB).unwrap(), 7);
        }
    }

    #[test]
    fn nodes_that_no_host_has_are_refused() {
        let memory = GuestMemory::new(MemoryOptions { size: 1 << 20, ..Default::default() }).unwrap();
        for node in [1024, u32::MAX] {
            assert!(memory.place_on_nodes(0, 1 << 20, NodePolicy::Prefer(node)).is_err());
        }
        memory.place_on_nodes(u64::MAX, u64::MAX, NodePolicy::Local).unwrap();
    }
}
