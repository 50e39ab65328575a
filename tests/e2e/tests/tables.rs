//! What a Linux guest makes of the firmware tables: its own parsers, `dmidecode`, and Intel's ACPI tools.

use e2e::linux::Guest;
use e2e::{Debian, debian};

/// The tables as Intel's disassembler sees them in the guest: no complaint but those about any guest.
fn check_acpi(guest: &mut Guest) {
    let found = guest.shell("mkdir -p /tmp/acpi && cd /tmp/acpi && acpidump -b && ls *.dat | sort | tr '\\n' ' '");
    for table in ["apic", "dsdt", "facp", "facs", "hpet", "mcfg", "spcr", "srat"] {
        guest.check(found.contains(&format!("{table}.dat")), &format!("no table {table}: {found}"));
    }
    let said = guest.shell("cd /tmp/acpi && iasl -d *.dat 2>&1 | grep -iE 'error|warning|invalid' || true");
    guest.check(said.trim().is_empty(), &format!("iasl complains: {said}"));
    let complaints =
        guest.shell("dmesg | grep -E 'ACPI( BIOS)?:? (Error|Warning)|(incorrect|bad) checksum|MP-BIOS' || true");
    guest.check(complaints.trim().is_empty(), &format!("Linux complains: {complaints}"));
}

/// Structures and strings by `dmidecode`, which prints its own doubts as comments.
fn check_smbios(guest: &mut Guest) {
    let text = guest.shell("dmidecode");
    for wanted in [
        "SMBIOS 3.0.0 present.",
        "Manufacturer: ACME",
        "Serial Number: S-42",
        "Socket Designation: CPU #1",
        "Core Count: 1",
        "Thread Count: 2",
        "Cache Information",
        "Maximum Capacity: 1 GB",
        "End Of Table",
    ] {
        guest.check(text.contains(wanted), &format!("dmidecode does not say {wanted:?}:\n{text}"));
    }
    for doubt in ["<BAD INDEX>", "<OUT OF SPEC>", "# ", "Wrong", "Invalid", "truncated"] {
        let lines: Vec<_> =
            text.lines().filter(|line| line.contains(doubt) && !line.starts_with("# dmidecode")).collect();
        guest.check(lines.is_empty(), &format!("dmidecode doubts: {lines:?}"));
    }
}

/// Two sockets of one core of two threads; a memory domain for each socket.
#[test]
fn tables_topology_and_numa() {
    let machine = Debian::amd64()
        .cpus(4)
        .topology("sockets=2,cores=1,threads=2")
        .args(&["-n", "id=0,size=640M,cpus=0-1", "-n", "id=1,size=384M,cpus=2-3"])
        .args(&["-o", "system.manufacturer=ACME", "-o", "system.serial_number=S-42"])
        .build();
    let mut guest = machine.boot();
    // For the transcript, whatever fails.
    guest.shell(
        "dmesg | grep -iE 'acpi|srat|numa|smbios|genid'; cat /proc/iomem | head -40; dmidecode; lscpu; numactl -H",
    );
    check_acpi(&mut guest);
    check_smbios(&mut guest);

    let lscpu = guest.shell("lscpu");
    let field = |name: &str| {
        let line = lscpu.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    };
    let shape = ["CPU(s)", "Thread(s) per core", "Core(s) per socket", "Socket(s)", "NUMA node(s)"].map(field);
    guest.check(shape == ["4", "2", "1", "2", "2"], &format!("{shape:?}:\n{lscpu}"));
    guest.check(field("NUMA node1 CPU(s)") == "2,3", &lscpu);
    let numa = guest.shell("numactl -H");
    let size = |node: usize| {
        let line = numa.lines().find_map(|line| line.strip_prefix(&format!("node {node} size: ")));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u32>().ok()).unwrap_or(0)
    };
    guest.check((500..=640).contains(&size(0)) && (330..=384).contains(&size(1)), &numa);
    debian::power_off(&mut guest);
}
