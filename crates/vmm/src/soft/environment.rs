//! What the pins of a software vCPU connect to: buses, its local APIC, the access policy, time.

use std::sync::Arc;

use cpu::{Environment, HostCounter};
use irqchip::lapic::{MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC_FIRST, MSR_X2APIC_LAST};
use irqchip::{LocalApic, TscSource};
use platform::counter::Counter;
use platform::{AccessSize, Bus};

use super::tsc::HostTsc;
use crate::engine::VmOptions;
use crate::policy::AccessPolicy;

/// Size of a local APIC's register page.
const APIC_PAGE: u64 = 0x1000;

pub(super) struct CpuEnvironment {
    index: u32,
    apic: Arc<LocalApic>,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    policy: Arc<AccessPolicy>,
    tsc: Arc<HostTsc>,
    counters: Counters,
}

/// Accesses that leave the CPU, by kind.
#[derive(Default)]
struct Counters {
    port_reads: Counter,
    port_writes: Counter,
    mmio_reads: Counter,
    mmio_writes: Counter,
    apic: Counter,
    msrs: Counter,
}

impl CpuEnvironment {
    pub(super) fn new(index: u32, apic: Arc<LocalApic>, options: &VmOptions, tsc: Arc<HostTsc>) -> Self {
        let (ports, mmio, policy) = (options.ports.clone(), options.mmio.clone(), options.policy.clone());
        Self { index, apic, ports, mmio, policy, tsc, counters: Counters::default() }
    }

    /// Names and counts.
    pub(super) fn statistics(&self) -> impl Iterator<Item = (String, u64)> {
        let Counters { port_reads, port_writes, mmio_reads, mmio_writes, apic, msrs } = &self.counters;
        [
            ("exits: port reads", port_reads),
            ("exits: port writes", port_writes),
            ("exits: device memory reads", mmio_reads),
            ("exits: device memory writes", mmio_writes),
            ("exits: local APIC", apic),
            ("exits: MSRs outside the CPU", msrs),
        ]
        .into_iter()
        .map(|(name, counter)| (name.to_owned(), counter.get()))
    }

    /// Offset into the local APIC's page, if the access is there.
    fn apic_offset(&self, gpa: u64) -> Option<u64> {
        let base = self.apic.mmio_base()?;
        gpa.checked_sub(base).filter(|offset| *offset < APIC_PAGE)
    }
}

fn is_apic_msr(index: u32) -> bool {
    index == MSR_APIC_BASE || index == MSR_TSC_DEADLINE || (MSR_X2APIC_FIRST..=MSR_X2APIC_LAST).contains(&index)
}

fn width(size: u8) -> AccessSize {
    AccessSize::from_bytes(usize::from(size)).unwrap_or(AccessSize::Byte)
}

impl Environment for CpuEnvironment {
    fn mmio_read(&self, gpa: u64, size: u8) -> u64 {
        let size = width(size);
        match self.apic_offset(gpa) {
            Some(offset) => {
                self.counters.apic.bump();
                self.apic.read_mmio(offset, size)
            }
            None => {
                self.counters.mmio_reads.bump();
                self.mmio.read(gpa, size).unwrap_or(size.mask())
            }
        }
    }

    fn mmio_write(&self, gpa: u64, size: u8, value: u64) {
        let size = width(size);
        match self.apic_offset(gpa) {
            Some(offset) => {
                self.counters.apic.bump();
                self.apic.write_mmio(offset, size, value);
            }
            None => {
                self.counters.mmio_writes.bump();
                self.mmio.write(gpa, size, value);
            }
        }
    }

    fn io_read(&self, port: u16, size: u8, rip: u64) -> u32 {
        let size = width(size);
        self.counters.port_reads.bump();
        let value = self.ports.read(u64::from(port), size).unwrap_or_else(|| {
            self.policy.unclaimed_port(port, size, false, rip);
            size.mask()
        });
        value as u32
    }

    fn io_write(&self, port: u16, size: u8, value: u32, rip: u64) {
        let size = width(size);
        self.counters.port_writes.bump();
        if !self.ports.write(u64::from(port), size, u64::from(value)) {
            self.policy.unclaimed_port(port, size, true, rip);
        }
    }

    fn interrupt_pending(&self) -> bool {
        self.apic.pending().is_some()
    }

    fn interrupt_acknowledge(&self) -> Option<u8> {
        Some(self.apic.acknowledge())
    }

    fn read_cr8(&self) -> u8 {
        self.apic.cr8()
    }

    fn write_cr8(&self, value: u8) {
        self.apic.set_cr8(value);
    }

    fn read_msr(&self, index: u32) -> Option<u64> {
        self.counters.msrs.bump();
        if is_apic_msr(index) { self.apic.read_msr(index).ok() } else { self.policy.read_msr(self.index, index) }
    }

    fn write_msr(&self, index: u32, value: u64) -> bool {
        self.counters.msrs.bump();
        if is_apic_msr(index) {
            self.apic.write_msr(index, value).is_ok()
        } else {
            self.policy.write_msr(self.index, index, value)
        }
    }

    fn tsc(&self) -> u64 {
        self.tsc.tsc()
    }

    fn host_counter(&self) -> Option<HostCounter<'_>> {
        self.tsc.host_counter()
    }

    fn init_reset(&self) {
        self.apic.init_reset();
    }
}
