//! The usage text. Other programs look for an option's letter followed by a colon to see whether it exists.

use crate::exit::{Exit, PROGRAM};

/// The lines after the first one that show the forms of options with arguments.
const FORMS: [&str; 4] = [
    "[-c [[cpus=]numcpus][,sockets=n][,cores=n][,threads=n]]",
    "[-f fwcfg] [-G [w][addr:]port] [-K layout] [-k config_file] [-l lpc]",
    "[-m mem] [-n numa] [-o var=value] [-p vcpu:hostcpu] [-r file]",
    "[-s pci] [-U uuid] [vmname]",
];

/// One line for each option.
const OPTIONS: [(char, &str); 29] = [
    ('A', "create ACPI tables (always done)"),
    ('a', "local APIC is in xAPIC mode (the default)"),
    ('C', "include guest memory in core dumps"),
    ('c', "number of CPUs and/or topology specification"),
    ('D', "destroy the VM when the guest powers off"),
    ('e', "stop on access to an I/O port nobody has"),
    ('f', "add a firmware configuration item: [name=]name,(string|file)=value"),
    ('G', "start a debug server"),
    ('H', "leave the guest on HLT"),
    ('h', "help"),
    ('I', "no effect"),
    ('K', "PS/2 keyboard layout"),
    ('k', "file of key=value lines"),
    ('l', "LPC device configuration, or 'help' for a list"),
    ('M', "monitor mode: start the guest again when it reboots"),
    ('m', "memory size"),
    ('n', "NUMA domain: id=n[,size=size][,cpus=list][,domain_policy=policy]"),
    ('o', "set config 'var' to 'value'"),
    ('P', "leave the guest on PAUSE"),
    ('p', "pin 'vcpu' to 'hostcpu'"),
    ('r', "path to checkpoint file"),
    ('S', "guest memory cannot be swapped"),
    ('s', "<slot,driver,configinfo> PCI slot config, or 'help' for a list"),
    ('U', "UUID"),
    ('u', "RTC keeps UTC time"),
    ('W', "virtio devices use a single MSI vector"),
    ('w', "ignore MSRs nobody has"),
    ('x', "local APIC is in x2APIC mode"),
    ('Y', "no MP table"),
];

/// Ends with the usage text on standard error, where it goes for `-h` as well as for mistakes.
pub(super) fn usage(code: u8) -> Exit {
    let mut text = format!("Usage: {PROGRAM} [-aCDeHhPSuWwxY]\n");
    let indent = " ".repeat("Usage: ".len() + PROGRAM.len());
    for form in FORMS {
        text.push_str(&format!("{indent} {form}\n"));
    }
    for (letter, what) in OPTIONS {
        text.push_str(&format!("       -{letter}: {what}\n"));
    }
    Exit::with_stderr(code, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmdline::{FLAGS, WITH_ARGUMENT};

    #[test]
    fn every_option_has_its_line() {
        let text = usage(1).stderr;
        let letters: Vec<u8> = FLAGS.iter().map(|(letter, _)| *letter).chain(WITH_ARGUMENT.iter().copied()).collect();
        assert_eq!(letters.len() + 1, OPTIONS.len(), "the letter h is not in the tables");
        for letter in letters {
            assert!(text.contains(&format!("\n       -{}: ", letter as char)), "{}", letter as char);
        }
    }

    #[test]
    fn what_other_programs_look_for() {
        let text = usage(0).stderr;
        assert!(text.starts_with("Usage: bhyve [-aCDeHhPSuWwxY]\n             [-c "));
        assert!(text.contains("-u:"));
        assert!(!text.contains("-c vcpus"));
        assert!(text.contains("       -c: number of CPUs and/or topology specification\n"));
    }
}
