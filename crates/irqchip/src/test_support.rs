//! What the chips' tests share: vCPU pins that count, a clock moved by hand, a whole board, random numbers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use platform::time::{SharedTime, ns_to_ticks};
use platform::{AccessSize, Bus, Clock};
use testkit::clock::FakeClock;

use crate::lapic::{CpuPins, LocalApic, TscSource};
use crate::soft::{ChipOptions, CpuWiring, SoftIrqChip};

/// The TSC's frequency on test boards: three ticks per nanosecond.
pub(crate) const TSC_HZ: u64 = 3_000_000_000;

/// Pins that remember what came.
#[derive(Default)]
pub(crate) struct Pins {
    pub(crate) interrupts: AtomicU64,
    pub(crate) signals: Mutex<Vec<Signal>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Signal {
    Nmi,
    Init,
    Startup(u8),
}

impl Pins {
    pub(crate) fn take_signals(&self) -> Vec<Signal> {
        std::mem::take(&mut self.signals.lock().unwrap())
    }

    /// Number of `interrupt()` calls since the last one of this.
    pub(crate) fn take_interrupts(&self) -> u64 {
        self.interrupts.swap(0, Ordering::Relaxed)
    }
}

impl CpuPins for Pins {
    fn interrupt(&self) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }
    fn nmi(&self) {
        self.signals.lock().unwrap().push(Signal::Nmi);
    }
    fn init(&self) {
        self.signals.lock().unwrap().push(Signal::Init);
    }
    fn startup(&self, vector: u8) {
        self.signals.lock().unwrap().push(Signal::Startup(vector));
    }
}

/// A TSC that follows the clock, with an offset.
pub(crate) struct Tsc {
    clock: FakeClock,
    pub(crate) offset: AtomicU64,
}

impl TscSource for Tsc {
    fn tsc(&self) -> u64 {
        ns_to_ticks(self.clock.now_ns(), TSC_HZ).wrapping_add(self.offset.load(Ordering::Relaxed))
    }
    fn hz(&self) -> u64 {
        TSC_HZ
    }
}

/// All chips with `cpus` vCPUs.
pub(crate) struct Board {
    pub(crate) clock: FakeClock,
    pub(crate) chip: SoftIrqChip,
    pub(crate) pins: Vec<Arc<Pins>>,
    pub(crate) tsc: Arc<Tsc>,
    pub(crate) ports: Bus,
    pub(crate) memory: Bus,
}

impl Board {
    pub(crate) fn new(cpus: u32) -> Self {
        Self::with_ids((0..cpus).collect(), ChipOptions::default())
    }

    pub(crate) fn with_ids(ids: Vec<u32>, options: ChipOptions) -> Self {
        let clock = FakeClock::new();
        let time: SharedTime = Arc::new(clock.clone());
        let tsc = Arc::new(Tsc { clock: clock.clone(), offset: AtomicU64::new(0) });
        let pins: Vec<_> = ids.iter().map(|_| Arc::new(Pins::default())).collect();
        let cpus =
            ids.iter().zip(&pins).map(|(&apic_id, pins)| CpuWiring { apic_id, pins: pins.clone(), tsc: tsc.clone() });
        let chip = SoftIrqChip::new(cpus.collect(), options, time);
        let (ports, memory) = (Bus::new("port"), Bus::new("memory"));
        chip.map(&ports, &memory).unwrap();
        Self { clock, chip, pins, tsc, ports, memory }
    }

    pub(crate) fn apic(&self, index: usize) -> &LocalApic {
        &self.chip.local_apics()[index]
    }

    pub(crate) fn outb(&self, port: u64, value: u8) {
        assert!(self.ports.write(port, AccessSize::Byte, value.into()), "port {port:#x}");
    }

    pub(crate) fn inb(&self, port: u64) -> u8 {
        self.ports.read(port, AccessSize::Byte).unwrap() as u8
    }

    /// Initialises the 8259 pair as PCs do: vectors 0x20 and 0x28, all inputs unmasked.
    pub(crate) fn init_pic(&self) {
        for (port, values) in [(0x20, [0x11, 0x20, 4, 1]), (0xa0, [0x11, 0x28, 2, 1])] {
            self.outb(port, values[0]);
            for value in &values[1..] {
                self.outb(port + 1, *value);
            }
            self.outb(port + 1, 0);
        }
    }

    /// Writes an I/O APIC redirection entry.
    pub(crate) fn redirect(&self, pin: u64, entry: u64) {
        for half in [1, 0] {
            assert!(self.memory.write(0xfec0_0000, AccessSize::Dword, 0x10 + pin * 2 + half));
            assert!(self.memory.write(0xfec0_0010, AccessSize::Dword, entry >> (32 * half) & 0xffff_ffff));
        }
    }

    /// Reads an I/O APIC redirection entry.
    pub(crate) fn redirection(&self, pin: u64) -> u64 {
        (0..2).fold(0, |entry, half| {
            assert!(self.memory.write(0xfec0_0000, AccessSize::Dword, 0x10 + pin * 2 + half));
            entry | self.memory.read(0xfec0_0010, AccessSize::Dword).unwrap() << (32 * half)
        })
    }
}

/// Register access by offset in the xAPIC's page.
impl LocalApic {
    pub(crate) fn get(&self, offset: u64) -> u32 {
        self.read_mmio(offset, AccessSize::Dword) as u32
    }

    pub(crate) fn put(&self, offset: u64, value: u32) {
        self.write_mmio(offset, AccessSize::Dword, value.into());
    }

    /// Enables the APIC with spurious vector 0xff.
    pub(crate) fn enable(&self) {
        self.put(0xf0, 0x1ff);
    }

    pub(crate) fn eoi(&self) {
        self.put(0xb0, 0);
    }

    pub(crate) fn enter_x2apic(&self) {
        let base = self.read_msr(0x1b).unwrap();
        self.write_msr(0x1b, base | 1 << 10).unwrap();
    }

    /// Takes the pending interrupt, ends it and returns its vector.
    pub(crate) fn serve(&self) -> Option<u8> {
        let vector = self.pending()?;
        assert_eq!(self.acknowledge(), vector);
        match self.mode() {
            crate::ApicMode::X2Apic => self.write_msr(0x80b, 0).unwrap(),
            _ => self.eoi(),
        }
        Some(vector)
    }
}

/// SplitMix64: the same numbers in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn size(&mut self) -> AccessSize {
        [AccessSize::Byte, AccessSize::Word, AccessSize::Dword, AccessSize::Qword][self.below(4) as usize]
    }
}
