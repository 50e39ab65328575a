//! Puts the chipset's devices on the buses, at a PC's addresses and interrupts.
//!
//! Not among them: 8259, 8254, port 61 and I/O APIC (they are interrupt chips or close to them), and the reset control
//! register, which is handed out because PCI's configuration ports surround it.

use std::sync::Arc;

use backend::tty::SerialBackend;
use platform::time::SharedTime;
use platform::{Bus, BusDevice, BusError, IrqLine, IrqSink, MsiSink, Persist, PowerSink};

use super::hpet::{self, Hpet, HpetWiring};
use super::i8042::{self, I8042};
use super::lines::{LineSwitch, OrLine};
use super::pc_testdev::PcTestdev;
use super::pm::{self, Pm};
use super::reset::{self, FastA20, PostPort, ResetControl};
use super::rtc::{self, Rtc, RtcConfig};
use super::uart16550::{self, Uart16550};

/// First port and IRQ of com1 to com4.
pub const SERIAL_PORTS: [(u64, u32); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];
/// IRQ of the real-time clock.
pub const RTC_IRQ: u32 = 8;
/// IRQ of ACPI's events (SCI), level-triggered.
pub const SCI_IRQ: u32 = 9;
/// IRQs of keyboard and mouse.
pub const PS2_IRQS: [u32; 2] = [1, 12];
/// First port of the real-time clock.
pub const RTC_PORT: u64 = 0x70;

const PIT_IRQ: u32 = 0;

/// What the devices are connected to.
pub struct Wiring<'a> {
    /// Port I/O.
    pub io: &'a Bus,
    /// Memory-mapped I/O.
    pub mmio: &'a Bus,
    /// The line of an ISA IRQ, to the 8259s and the I/O APIC alike (IRQ 0 to its input 2). Asked for once for each IRQ.
    pub irq: &'a dyn Fn(u32) -> IrqLine,
    /// The I/O APIC's inputs by number.
    pub gsi: Arc<dyn IrqSink>,
    /// I/O APIC inputs that HPET timers can be routed to, one bit each: its upper four, and nobody else's.
    pub hpet_routes: u32,
    /// Takes messages.
    pub msi: Arc<dyn MsiSink>,
    /// Clock and timers.
    pub time: SharedTime,
    /// Takes resets, power-off, and the test device's exit.
    pub power: Arc<dyn PowerSink>,
}

/// What to build.
pub struct Options {
    /// What the real-time clock starts with.
    pub rtc: RtcConfig,
    /// The backends of com1 to com4; `None` for a machine without serial ports.
    pub serial: Option<[Option<Arc<dyn SerialBackend>>; 4]>,
    /// Whether there is the test device.
    pub testdev: bool,
}

/// The devices, for those who deal with them by other ways than the bus.
pub struct Isa {
    /// com1 to com4, if there are any.
    pub uarts: Vec<Arc<Uart16550>>,
    /// The real-time clock.
    pub rtc: Arc<Rtc>,
    /// The HPET.
    pub hpet: Arc<Hpet>,
    /// The ACPI PM block: power button, and whether ACPI is enabled.
    pub pm: Arc<Pm>,
    /// The reset control register: what owns ports CF8 to CFF forwards byte accesses at CF9 to it.
    pub reset_control: Arc<ResetControl>,
    /// Keyboard and mouse.
    pub i8042: Arc<I8042>,
    /// The 8254's line. The HPET may cut it off.
    pub pit_line: IrqLine,
    /// All devices with state, each by a name of its own that stays the same across releases.
    pub persist: Vec<(&'static str, Arc<dyn Persist>)>,
}

/// Builds the devices and maps them.
///
/// # Errors
/// Something else is mapped where a device belongs.
pub fn build(wiring: &Wiring<'_>, options: Options) -> Result<Isa, BusError> {
    let mut persist: Vec<(&'static str, Arc<dyn Persist>)> = Vec::new();
    let irq_0 = LineSwitch::new((wiring.irq)(PIT_IRQ));
    let irq_8 = LineSwitch::new((wiring.irq)(RTC_IRQ));
    let (rtc, hpet) = build_clocks(wiring, options.rtc, [irq_0.clone(), irq_8.clone()])?;
    let pm = build_pm(wiring)?;
    let i8042 = build_keyboard(wiring)?;
    let reset_control = ResetControl::new(wiring.power.clone());
    let fast_a20 = FastA20::new(wiring.power.clone());
    wiring.io.map(reset::FAST_A20_PORT, 1, fast_a20.clone())?;
    for port in reset::POST_PORTS {
        wiring.io.map(port, 1, Arc::new(PostPort))?;
    }
    let uarts = match options.serial {
        Some(backends) => build_serial(wiring, backends, &mut persist)?,
        None => Vec::new(),
    };
    if options.testdev {
        let testdev = PcTestdev::new(wiring.gsi.clone(), wiring.power.clone());
        testdev.map(wiring.io, wiring.mmio)?;
        persist.push(("pc-testdev", testdev));
    }
    let pit_line = irq_0.first();
    persist.extend([
        ("irq0", irq_0 as Arc<dyn Persist>),
        ("irq8", irq_8),
        ("rtc", rtc.clone()),
        ("hpet", hpet.clone()),
        ("pm", pm.clone()),
        ("reset-control", reset_control.clone()),
        ("fast-a20", fast_a20),
        ("i8042", i8042.clone()),
    ]);
    Ok(Isa { uarts, rtc, hpet, pm, reset_control, i8042, pit_line, persist })
}

fn build_clocks(
    wiring: &Wiring<'_>,
    config: RtcConfig,
    legacy: [Arc<LineSwitch>; 2],
) -> Result<(Arc<Rtc>, Arc<Hpet>), BusError> {
    let rtc = Rtc::new(config, legacy[1].first(), wiring.time.clone());
    wiring.io.map(RTC_PORT, rtc::LENGTH, rtc.clone())?;
    let hpet_wiring =
        HpetWiring { gsi: wiring.gsi.clone(), routes: wiring.hpet_routes, legacy, msi: wiring.msi.clone() };
    let hpet = Hpet::new(hpet_wiring, wiring.time.clone());
    wiring.mmio.map(hpet::ADDRESS, hpet::LENGTH, hpet.clone())?;
    Ok((rtc, hpet))
}

fn build_pm(wiring: &Wiring<'_>) -> Result<Arc<Pm>, BusError> {
    let pm = Pm::new((wiring.irq)(SCI_IRQ), wiring.time.clone(), wiring.power.clone());
    wiring.io.map(pm::PORT, pm::LENGTH, pm.clone())?;
    wiring.io.map(pm::SMI_COMMAND_PORT, 1, pm.smi_command_port())?;
    Ok(pm)
}

fn build_keyboard(wiring: &Wiring<'_>) -> Result<Arc<I8042>, BusError> {
    let [keyboard, mouse] = PS2_IRQS.map(wiring.irq);
    let i8042 = I8042::new(keyboard, mouse, wiring.power.clone());
    wiring.io.map(i8042::DATA_PORT, 1, i8042.data_port())?;
    wiring.io.map(i8042::COMMAND_PORT, 1, i8042.command_port())?;
    Ok(i8042)
}

/// com1 and com3 share a line, com2 and com4 the other.
fn build_serial(
    wiring: &Wiring<'_>,
    backends: [Option<Arc<dyn SerialBackend>>; 4],
    persist: &mut Vec<(&'static str, Arc<dyn Persist>)>,
) -> Result<Vec<Arc<Uart16550>>, BusError> {
    let [irq_4, irq_3] = [4, 3].map(|irq| OrLine::new((wiring.irq)(irq)));
    let mut uarts = Vec::new();
    for (n, (backend, (port, irq))) in backends.into_iter().zip(SERIAL_PORTS).enumerate() {
        let shared = if irq == 4 { &irq_4 } else { &irq_3 };
        let uart = Uart16550::new(shared.source(n as u32), backend);
        let device: Arc<dyn BusDevice> = uart.clone();
        wiring.io.map(port, uart16550::LENGTH, device)?;
        persist.push((["com1", "com2", "com3", "com4"][n], uart.clone()));
        uarts.push(uart);
    }
    persist.extend([("irq4", irq_4 as Arc<dyn Persist>), ("irq3", irq_3)]);
    Ok(uarts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::fixture::{Garbage, Lines, Messages, Power};
    use platform::{AccessSize, PowerEvent};
    use testkit::clock::FakeClock;

    const GSI: u32 = 1000;

    struct Gsis(Arc<Lines>);
    impl IrqSink for Gsis {
        fn set_level(&self, line: u32, asserted: bool) {
            self.0.set_level(GSI + line, asserted);
        }
    }

    struct Machine {
        io: Bus,
        mmio: Bus,
        lines: Arc<Lines>,
        power: Arc<Power>,
        clock: FakeClock,
        isa: Isa,
    }

    fn machine(serial: bool, testdev: bool) -> Machine {
        let (io, mmio) = (Bus::new("port"), Bus::new("memory"));
        let (lines, power, clock) = (Lines::new(), Arc::new(Power::default()), FakeClock::new());
        let irq = |n| lines.line(n);
        let wiring = Wiring {
            io: &io,
            mmio: &mmio,
            irq: &irq,
            gsi: Arc::new(Gsis(lines.clone())),
            hpet_routes: 0xf0_0000,
            msi: Arc::new(Messages::default()),
            time: Arc::new(clock.clone()),
            power: power.clone(),
        };
        let rtc = RtcConfig { local_time: false, low_memory: 1 << 30, high_memory: 0 };
        let serial = serial.then(|| [None, None, None, None]);
        let isa = build(&wiring, Options { rtc, serial, testdev }).unwrap();
        Machine { io, mmio, lines, power, clock, isa }
    }

    impl Machine {
        fn outb(&self, port: u64, value: u8) {
            assert!(self.io.write(port, AccessSize::Byte, value.into()), "port {port:#x}");
        }
        fn inb(&self, port: u64) -> Option<u64> {
            self.io.read(port, AccessSize::Byte)
        }
    }

    #[test]
    fn everything_is_where_it_belongs() {
        let m = machine(true, true);
        for (port, _) in SERIAL_PORTS {
            assert_eq!(m.inb(port + 5), Some(0x60));
        }
        m.outb(0x70, 0x0d);
        assert_eq!(m.inb(0x71), Some(0x80));
        assert_eq!(m.inb(0x64), Some(0x14));
        assert_eq!(m.inb(0x92), Some(0x02));
        assert_eq!((m.inb(0x80), m.inb(0x84), m.inb(0xb2)), (Some(0xff), Some(0xff), Some(0)));
        assert!(m.io.read(0x408, AccessSize::Dword).is_some());
        assert_eq!(m.mmio.read(0xfed0_0000, AccessSize::Dword), Some(0x8086_8701));
        assert_eq!(m.mmio.read(0xff00_0000, AccessSize::Byte), Some(0));
        assert_eq!(m.inb(0xcf9), None, "the reset control is handed out");
        m.isa.reset_control.write(0, AccessSize::Byte, 6);
        assert_eq!(m.power.take(), [PowerEvent::Reset]);

        let bare = machine(false, false);
        assert!(bare.isa.uarts.is_empty());
        assert_eq!((bare.inb(0x3f8), bare.inb(0xf4)), (None, None));
    }

    #[test]
    fn interrupts_go_where_they_belong() {
        let m = machine(true, false);
        for (port, irq) in SERIAL_PORTS {
            m.outb(port + 1, 2);
            assert_eq!(m.lines.take(), [(irq, true)]);
            m.outb(port + 1, 0);
            assert_eq!(m.lines.take(), [(irq, false)]);
        }
        m.outb(0x3f9, 2);
        m.outb(0x3e9, 2);
        m.outb(0x3f9, 0);
        assert_eq!(m.lines.take(), [(4, true)], "com1 and com3 share a line");
        m.isa.i8042.key_scancode(&[0x1c]);
        assert_eq!(m.lines.take(), [(1, true)]);
        m.outb(0xb2, 0xa0);
        m.io.write(0x402, AccessSize::Word, 0x100);
        assert!(m.isa.pm.press_power_button());
        assert_eq!(m.lines.take(), [(9, true)]);
        m.isa.pit_line.pulse();
        assert_eq!(m.lines.take(), [(0, true), (0, false)]);
        m.outb(0x70, 0x0b);
        m.outb(0x71, 0x12);
        m.clock.advance(1_000_000_000);
        assert_eq!(m.lines.take(), [(8, true)]);
        m.mmio.write(0xfed0_0010, AccessSize::Dword, 3);
        m.isa.pit_line.pulse();
        assert_eq!(m.lines.take(), [(8, false)], "the HPET has taken over");
    }

    #[test]
    fn an_idle_chipset_waits_for_nothing() {
        let m = machine(true, true);
        m.clock.advance(10_000_000_000);
        assert_eq!((m.clock.armed(), m.lines.take()), (0, vec![]));
    }

    #[test]
    fn names_are_unique_and_states_go_round() {
        let m = machine(true, true);
        let names: std::collections::BTreeSet<_> = m.isa.persist.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), m.isa.persist.len());
        let mut garbage = Garbage(8);
        for _ in 0..20_000 {
            let port = garbage.next() % 0x410;
            m.io.write(port, AccessSize::Byte, garbage.next() & 0xff);
            m.io.read(port, AccessSize::Byte);
            m.clock.advance(garbage.next() % 1_000_000);
        }
        let other = machine(true, true);
        for ((name, from), (_, to)) in m.isa.persist.iter().zip(&other.isa.persist) {
            let saved = from.save().unwrap();
            to.restore(from.version(), &saved).unwrap();
            // The HPET stands still: nothing in any state depends on when it is saved but the PM timer.
            assert!(*name == "pm" || to.save().unwrap() == saved, "{name}");
        }
    }
}
