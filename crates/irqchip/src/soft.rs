//! All the chips of a board whose vCPUs the software engine runs, wired together.

use std::sync::Arc;

use platform::time::SharedTime;
use platform::{Bus, BusError, IrqLine, MsiSink, Persist};

use crate::apic_bus::ApicBus;
use crate::ioapic::{IOAPIC_ADDRESS, IOAPIC_SIZE, IoApic};
use crate::lapic::{CpuPins, Features, Inbox, LocalApic, LocalApicConfig, TscSource, Wiring};
use crate::pic::{IntrListener, Pic};
use crate::pit::Pit;
use crate::router::IrqRouter;

/// bhyve's local APIC timer frequency before division, in Hz.
pub const DEFAULT_APIC_BUS_HZ: u64 = 1 << 27;

/// One vCPU, for [`SoftIrqChip::new`].
pub struct CpuWiring {
    /// APIC ID, unique; 255 cannot be addressed.
    pub apic_id: u32,
    /// Where interrupts reach it.
    pub pins: Arc<dyn CpuPins>,
    /// Its time-stamp counter.
    pub tsc: Arc<dyn TscSource>,
}

/// What the chips are like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChipOptions {
    /// Number of I/O APIC pins, 1 to 32.
    pub ioapic_pins: u32,
    /// Frequency of the local APIC timers' bus clock, in Hz.
    pub apic_bus_hz: u64,
    /// Width of physical addresses in bits, as CPUID leaf 0x80000008 says.
    pub physical_bits: u8,
    /// Optional features of the local APICs. With `eoi_suppression` the I/O APIC has an EOI register.
    pub features: Features,
    /// MSI destinations of 15 bits (announced by CPUID leaf 0x40000001).
    pub extended_destination_ids: bool,
}

impl Default for ChipOptions {
    /// 24 pins as on KVM, bhyve's timer frequency, addresses of 52 bits, x2APIC and TSC-deadline mode, extended destinations.
    fn default() -> Self {
        Self {
            ioapic_pins: 24,
            apic_bus_hz: DEFAULT_APIC_BUS_HZ,
            physical_bits: 52,
            features: Features { x2apic: true, tsc_deadline: true, eoi_suppression: false },
            extended_destination_ids: true,
        }
    }
}

/// The chips of one VM.
pub struct SoftIrqChip {
    local_apics: Vec<Arc<LocalApic>>,
    bus: Arc<ApicBus>,
    ioapic: Arc<IoApic>,
    pic: Arc<Pic>,
    pit: Arc<Pit>,
    router: Arc<IrqRouter>,
}

/// Where the 8259 pair's output goes: every LINT0, and pin 0 of the I/O APIC.
struct IntrWiring {
    bus: Arc<ApicBus>,
    pin: IrqLine,
}

impl IntrListener for IntrWiring {
    fn intr_rose(&self) {
        self.bus.pic_rose();
        self.pin.pulse();
    }
}

impl SoftIrqChip {
    /// Builds and wires the chips. The first of `cpus` is the boot processor.
    pub fn new(cpus: Vec<CpuWiring>, options: ChipOptions, time: SharedTime) -> Self {
        let inboxes: Vec<_> = cpus.iter().map(|cpu| Arc::new(Inbox::new(cpu.apic_id, cpu.pins.clone()))).collect();
        let bus = Arc::new(ApicBus::new(inboxes.clone(), options.extended_destination_ids));
        let ioapic = Arc::new(IoApic::new(options.ioapic_pins, options.features.eoi_suppression, bus.clone()));
        let pic = Arc::new(Pic::new());
        let router = Arc::new(IrqRouter::new(&pic, &ioapic));
        let pin = router.ioapic_source(0).unwrap_or_else(|| IrqLine::new(ioapic.clone(), 0));
        pic.connect(Arc::new(IntrWiring { bus: bus.clone(), pin }));
        let pit = Pit::new(time.clone(), router.source(0).unwrap_or_else(|| IrqLine::new(router.clone(), 0)));
        let local_apics = cpus.into_iter().zip(inboxes).enumerate().map(|(index, (cpu, inbox))| {
            let config = LocalApicConfig {
                bus_hz: options.apic_bus_hz,
                physical_bits: options.physical_bits,
                features: options.features,
                bootstrap: index == 0,
            };
            let wiring =
                Wiring { bus: bus.clone(), pic: pic.clone(), eoi: ioapic.clone(), time: time.clone(), tsc: cpu.tsc };
            LocalApic::new(config, inbox, wiring)
        });
        Self { local_apics: local_apics.collect(), bus, ioapic, pic, pit, router }
    }

    /// The local APICs, in the order of the vCPUs.
    pub fn local_apics(&self) -> &[Arc<LocalApic>] {
        &self.local_apics
    }

    /// Delivers message-signalled interrupts.
    pub fn msi(&self) -> Arc<dyn MsiSink> {
        self.bus.clone()
    }

    /// Takes interrupt lines.
    pub fn router(&self) -> &Arc<IrqRouter> {
        &self.router
    }

    /// The 8259 pair.
    pub fn pic(&self) -> &Arc<Pic> {
        &self.pic
    }

    /// The I/O APIC.
    pub fn ioapic(&self) -> &Arc<IoApic> {
        &self.ioapic
    }

    /// The interval timer.
    pub fn pit(&self) -> &Arc<Pit> {
        &self.pit
    }

    /// Puts the chips at their places. The local APICs' pages are not on the bus: every vCPU sees its own.
    ///
    /// # Errors
    /// Something else is there.
    pub fn map(&self, ports: &Bus, memory: &Bus) -> Result<(), BusError> {
        self.pic.map(ports)?;
        self.pit.map(ports)?;
        memory.map(IOAPIC_ADDRESS, IOAPIC_SIZE, self.ioapic.clone())
    }

    /// Everything with state, each under a name that is unique among them and stable.
    pub fn persistent(&self) -> Vec<(String, Arc<dyn Persist>)> {
        let chips: [(&str, Arc<dyn Persist>); 4] = [
            ("irq-router", self.router.clone()),
            ("pic", self.pic.clone()),
            ("ioapic", self.ioapic.clone()),
            ("pit", self.pit.clone()),
        ];
        let chips = chips.into_iter().map(|(name, chip)| (name.to_owned(), chip));
        let local =
            self.local_apics.iter().map(|apic| (format!("lapic{}", apic.id()), apic.clone() as Arc<dyn Persist>));
        chips.chain(local).collect()
    }
}

#[cfg(test)]
mod tests {
    use platform::AccessSize;

    use crate::test_support::{Board, Random};

    #[test]
    fn the_timer_ticks_through_both_chips() {
        let board = Board::new(1);
        let apic = board.apic(0);
        apic.enable();
        apic.put(0x350, 0x1_0000);
        board.redirect(2, 0x30);
        board.outb(0x43, 0x34);
        for byte in 11_932u16.to_le_bytes() {
            board.outb(0x40, byte);
        }
        apic.serve();
        let mut ticks = 0;
        for _ in 0..100 {
            board.clock.advance(10_000_000);
            ticks += u32::from(apic.serve() == Some(0x30));
        }
        assert_eq!(ticks, 99, "100 Hz, less the one that is not quite over");
        board.redirect(2, 0x1_0000);
        apic.put(0x350, 0x700);
        board.init_pic();
        board.clock.advance(10_000_000);
        assert_eq!(apic.pending(), Some(0x20));
    }

    #[test]
    fn chips_are_where_a_pc_has_them() {
        let board = Board::new(1);
        for port in [0x20, 0x21, 0x40, 0x41, 0x42, 0x43, 0x61, 0xa0, 0xa1, 0x4d0, 0x4d1] {
            assert!(board.ports.read(port, AccessSize::Byte).is_some(), "{port:#x}");
        }
        assert_eq!(board.memory.read(0xfec0_0fff, AccessSize::Byte), Some(0xff));
        assert!(board.memory.read(0xfee0_0000, AccessSize::Dword).is_none(), "every vCPU has its own page");
        assert!(board.chip.map(&board.ports, &board.memory).is_err());
    }

    #[test]
    fn everything_with_state_has_a_name_of_its_own_and_resets() {
        let board = Board::new(3);
        let (mut random, parts) = (Random(7), board.chip.persistent());
        let fresh: Vec<_> = parts.iter().map(|(_, part)| part.save().unwrap()).collect();
        for _ in 0..1000 {
            board.apic(0).put(random.below(0x3f) * 16, random.next() as u32);
            board.outb([0x21, 0x43, 0x40, 0x42, 0x61][random.below(5) as usize], random.next() as u8);
            board.redirect(random.below(24), random.next());
        }
        for (_, part) in &parts {
            part.reset();
        }
        for ((name, part), fresh) in parts.iter().zip(fresh) {
            assert_eq!(parts.iter().filter(|(other, _)| other == name).count(), 1);
            assert_eq!(part.save().unwrap(), fresh, "{name}");
        }
    }
}
