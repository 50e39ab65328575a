//! `-c`, `-p` and `-n`: vCPUs, where they run, and their memory domains.

use super::{CommandLine, invalid};
use crate::exit::{self, Exit};
use crate::value::{self, MAX_CPUS};

/// vCPU numbers are below this: the keys `cpus`, `sockets` and so on have 16 bits.
const MAX_VCPUS: u32 = 1 << 16;

/// `-c [[cpus=]N][,sockets=N][,cores=N][,threads=N]` in any order; the last mention of a key wins. The numbers are
/// looked at when all of the configuration is known.
pub(super) fn topology(line: &mut CommandLine<'_>, argument: &str) -> Result<(), Exit> {
    if argument.is_empty() {
        return ["sockets", "cores", "threads", "cpus"].iter().try_for_each(|key| line.set(key, "1"));
    }
    for token in argument.split(',') {
        match token.split_once('=') {
            None => line.set("cpus", token)?,
            Some((key @ ("cpus" | "sockets" | "cores" | "threads"), number)) => line.set(key, number)?,
            Some(_) => return Err(invalid("cpu topology", argument)),
        }
    }
    Ok(())
}

/// `-p VCPU:HOSTCPU`, or `-p FIRST-LAST:FIRST-LAST` for as many pairs. Each mention adds to a vCPU's set.
pub(super) fn pinning(line: &mut CommandLine<'_>, argument: &str) -> Result<(), Exit> {
    let pairs =
        pairs(argument).map_err(|reason| invalid("vcpu pinning configuration", argument).preceded_by(reason))?;
    for (vcpu, host) in pairs {
        let path = format!("vcpu.{vcpu}.cpuset");
        let list = match line.config.root().value(&path) {
            Some(list) => format!("{list},{host}"),
            None => host.to_string(),
        };
        line.set(&path, list)?;
    }
    Ok(())
}

fn pairs(argument: &str) -> Result<Vec<(u32, u32)>, String> {
    let malformed = || format!("invalid format: {argument}");
    let (vcpus, hosts) = argument.split_once(':').ok_or_else(malformed)?;
    let (vcpus, hosts) = match (vcpus.contains('-'), hosts.contains('-')) {
        (false, false) => {
            let (vcpu, host) = (decimal(vcpus).ok_or_else(malformed)?, decimal(hosts).ok_or_else(malformed)?);
            (vcpu..=vcpu, host..=host)
        }
        _ => (range(vcpus).ok_or_else(malformed)?, range(hosts).ok_or_else(malformed)?),
    };
    if vcpus.is_empty() || hosts.is_empty() {
        return Err(format!("invalid range (must be ascending): {argument}"));
    }
    if *vcpus.end() >= MAX_VCPUS {
        return Err(format!("invalid vcpu '{}'", vcpus.end()));
    }
    if *hosts.end() >= MAX_CPUS {
        return Err(format!("hostcpu '{}' outside valid range from 0 to {}", hosts.end(), MAX_CPUS - 1));
    }
    if vcpus.end() - vcpus.start() != hosts.end() - hosts.start() {
        return Err(format!("range sizes do not match: {argument}"));
    }
    Ok(vcpus.zip(hosts).collect())
}

fn range(text: &str) -> Option<std::ops::RangeInclusive<u32>> {
    let (first, last) = text.split_once('-')?;
    Some(decimal(first)?..=decimal(last)?)
}

fn decimal(text: &str) -> Option<u32> {
    (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

/// `-n id=N[,size=SIZE][,cpus=LIST][,domain_policy=POLICY]`. A list of CPUs has commas itself: words without `=` after
/// `cpus=` belong to it.
pub(super) fn numa_domain(line: &mut CommandLine<'_>, argument: &str) -> Result<(), Exit> {
    let bad = || invalid("NUMA configuration", argument);
    let (mut id, mut keys) = (None, Vec::<(&str, String)>::new());
    for token in argument.split(',') {
        match token.split_once('=') {
            Some(("id", number)) => id = Some(domain_id(number)?),
            Some((key @ ("size" | "cpus" | "domain_policy"), value)) => keys.push((key, value.into())),
            Some(_) => return Err(bad()),
            None => match keys.last_mut() {
                Some(("cpus", list)) => list.extend([",", token]),
                _ => return Err(bad()),
            },
        }
    }
    let id = id.ok_or_else(|| bad().preceded_by(format!("Missing NUMA domain ID in '{argument}'")))?;
    for (key, value) in keys {
        line.set(&format!("domains.{id}.{key}"), value)?;
    }
    if !line.config.bool_or("acpi_tables", true)? {
        return Err(Exit::message(exit::EX_USAGE, "NUMA emulation requires ACPI"));
    }
    Ok(())
}

fn domain_id(text: &str) -> Result<u8, Exit> {
    value::parse_integer(text)
        .and_then(|number| u8::try_from(number).ok())
        .ok_or_else(|| Exit::message(exit::ERROR, format!("Invalid value for id: '{text}'")))
}
