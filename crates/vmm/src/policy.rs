//! What happens on accesses that nobody answers: unknown ports (`-e`), unknown MSRs (`-w`, `x86.verbosemsr`), and the MSRs that
//! bhyve answers itself whatever the policy.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use platform::{AccessSize, PowerEvent, PowerSink};

/// The configuration of [`AccessPolicy`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PolicyOptions {
    /// An access to an unknown port aborts the VM (`-e`, `x86.strictio`).
    pub strict_io: bool,
    /// An access to an unknown MSR raises #GP (`x86.strictmsr`; off by `-w`).
    pub strict_msr: bool,
    /// Log unknown MSRs even when they are answered (`x86.verbosemsr`).
    pub verbose_msr: bool,
    /// The guest's CPU is AMD's or Hygon's.
    pub amd: bool,
}

/// Decides, and says what it refused.
pub struct AccessPolicy {
    options: PolicyOptions,
    power: Arc<dyn PowerSink>,
    /// MSRs that were logged: each once per direction, so that a guest cannot flood the log.
    logged: Mutex<HashSet<(u32, bool)>>,
}

/// MSRs without effect that guests expect (reference section 4.10): (first, last, value read).
const AMD: &[(u32, u32, u64)] = &[
    (0x8b, 0x8b, 0),
    (0xc001_0000, 0xc001_0007, 0),
    (0xc001_0010, 0xc001_0010, 0),
    (0xc001_0015, 0xc001_0015, 0x0100_0210),
    (0xc001_001f, 0xc001_001f, 0),
    (0xc001_0055, 0xc001_0055, 0),
    (0xc001_0061, 0xc001_006b, 0),
    (0xc001_0112, 0xc001_0113, 0),
    (0xc001_1020, 0xc001_1023, 0),
    // Bit 0: erratum 721 is worked around. Bit 1: LFENCE is serialising, as it is here.
    (0xc001_1029, 0xc001_1029, 3),
];
const INTEL: &[(u32, u32, u64)] = &[
    (0x17, 0x17, 0),
    // Locked, VMX off: Windows 10 reads it.
    (0x3a, 0x3a, 1),
    (0x79, 0x79, 0),
    (0x8b, 0x8b, 0),
    (0xc24, 0xc24, 0),
    (0xd04, 0xd04, 0),
    (0x606, 0x606, 0x000a_1003),
    (0x611, 0x611, 0),
    (0x619, 0x619, 0),
    (0x639, 0x639, 0),
    (0x641, 0x641, 0),
];

impl AccessPolicy {
    /// A policy that aborts through `power`.
    pub fn new(options: PolicyOptions, power: Arc<dyn PowerSink>) -> Self {
        Self { options, power, logged: Mutex::default() }
    }

    fn table(&self) -> &'static [(u32, u32, u64)] {
        if self.options.amd { AMD } else { INTEL }
    }

    /// The MSRs that are answered here whatever an engine knows of them, as ranges of (first, last).
    pub fn answered(&self) -> impl Iterator<Item = (u32, u32)> {
        self.table().iter().map(|&(first, last, _)| (first, last))
    }

    fn known(&self, index: u32) -> Option<u64> {
        self.table().iter().find(|(first, last, _)| (*first..=*last).contains(&index)).map(|entry| entry.2)
    }

    fn log(&self, index: u32, write: bool, text: impl FnOnce() -> String) {
        let wanted = self.options.strict_msr || self.options.verbose_msr;
        if wanted && self.logged.lock().unwrap_or_else(PoisonError::into_inner).insert((index, write)) {
            eprintln!("{}", text());
        }
    }

    /// RDMSR of an MSR that nobody has: its value, or `None` for #GP.
    pub fn read_msr(&self, vcpu: u32, index: u32) -> Option<u64> {
        if let Some(value) = self.known(index) {
            return Some(value);
        }
        self.log(index, false, || format!("rdmsr to register {index:#x} on vcpu {vcpu}"));
        (!self.options.strict_msr).then_some(0)
    }

    /// WRMSR of an MSR that nobody has: whether it is accepted; `false` for #GP.
    pub fn write_msr(&self, vcpu: u32, index: u32, value: u64) -> bool {
        if self.known(index).is_some() {
            return true;
        }
        self.log(index, true, || format!("wrmsr to register {index:#x}({value:#x}) on vcpu {vcpu}"));
        !self.options.strict_msr
    }

    /// An access to a port that nobody claims. Under `-e` it ends the VM; `rip` is what the message shows.
    pub fn unclaimed_port(&self, port: u16, size: AccessSize, write: bool, rip: u64) {
        if !self.options.strict_io {
            return;
        }
        let direction = if write { "out" } else { "in" };
        let width = match size {
            AccessSize::Byte => 'b',
            AccessSize::Word => 'w',
            _ => 'l',
        };
        eprintln!("Unhandled {direction}{width} 0x{port:04x} at {rip:#x}");
        self.power.request(PowerEvent::Abort);
    }

    /// Whether unknown ports end the VM.
    pub fn strict_io(&self) -> bool {
        self.options.strict_io
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Power(Mutex<Vec<PowerEvent>>);
    impl PowerSink for Power {
        fn request(&self, event: PowerEvent) {
            self.0.lock().unwrap().push(event);
        }
    }

    fn policy(options: PolicyOptions) -> (AccessPolicy, Arc<Power>) {
        let power = Arc::new(Power(Mutex::default()));
        (AccessPolicy::new(options, power.clone()), power)
    }

    #[test]
    fn strictness_decides_about_unknown_msrs_only() {
        let (strict, _) = policy(PolicyOptions { strict_msr: true, amd: true, ..Default::default() });
        assert_eq!(strict.read_msr(0, 0x1234), None);
        assert!(!strict.write_msr(0, 0x1234, 1));
        assert_eq!(strict.read_msr(0, 0xc001_0015), Some(0x0100_0210));
        assert!(strict.write_msr(0, 0xc001_0015, 7));
        let (lax, _) = policy(PolicyOptions::default());
        assert_eq!(lax.read_msr(0, 0x1234), Some(0));
        assert_eq!(lax.read_msr(0, 0x3a), Some(1));
    }

    /// KVM takes at most 16 ranges, and the engine has a bitmap for 16 MSRs in each.
    #[test]
    fn answered_ranges_are_few_and_short() {
        for amd in [false, true] {
            let (policy, _) = policy(PolicyOptions { amd, ..Default::default() });
            assert!((1..=16).contains(&policy.answered().count()));
            for (first, last) in policy.answered() {
                assert!(last - first < 16 && policy.read_msr(0, first).is_some() && policy.read_msr(0, last).is_some());
            }
        }
    }

    #[test]
    fn only_strict_io_aborts() {
        let (lax, power) = policy(PolicyOptions::default());
        lax.unclaimed_port(0x99, AccessSize::Byte, false, 0);
        assert!(power.0.lock().unwrap().is_empty());
        let (strict, power) = policy(PolicyOptions { strict_io: true, ..Default::default() });
        strict.unclaimed_port(0x99, AccessSize::Byte, false, 0);
        assert_eq!(*power.0.lock().unwrap(), [PowerEvent::Abort]);
    }
}
