//! ACPI fixed hardware (ACPI 6.5, section 4.8): PM1 event and control block, PM timer, and the SMI command port.
//!
//! | port | size | register                                                                       |
//! |------|------|--------------------------------------------------------------------------------|
//! | 400  | 2    | PM1 status: writing ones clears WAK, RTC, SLPBTN, PWRBTN, BM                   |
//! | 402  | 2    | PM1 enable: PWRBTN and GBL                                                     |
//! | 404  | 2    | PM1 control: SCI_EN (read only), SLP_TYP; SLP_EN with type 5 powers off        |
//! | 408  | 4    | PM timer, 32 bits of 3,579,545 Hz                                              |
//! | 40C  | 2    | general-purpose event status: writing ones clears; bit 0 is a new VM generation |
//! | 40E  | 2    | general-purpose event enable                                                   |
//! | B2   | 1    | SMI command: A0 enables ACPI, A1 disables it                                   |
//!
//! The first three take accesses of 16 bits only, those of general-purpose events any. The SCI (IRQ 9, level) is asserted while ACPI is enabled and an
//! enabled event stands in the status.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use platform::time::{SharedTime, ns_to_ticks};
use platform::{AccessSize, BusDevice, IrqLine, Persist, PowerEvent, PowerSink, StateError, state};
use serde::{Deserialize, Serialize};

/// First port of the block.
pub const PORT: u64 = 0x400;
/// Number of ports of the block.
pub const LENGTH: u64 = 16;
/// Frequency of the PM timer.
pub const TIMER_HZ: u64 = 3_579_545;
/// Port of the SMI command register.
pub const SMI_COMMAND_PORT: u64 = 0xb2;
/// Written to the SMI command port, enables ACPI.
pub const ACPI_ENABLE: u8 = 0xa0;
/// Written to the SMI command port, disables ACPI.
pub const ACPI_DISABLE: u8 = 0xa1;
/// The general-purpose event of a new VM generation.
pub const GENERATION_EVENT: u8 = 0;
/// Sleep type of S5 (soft off), as the DSDT must tell.
pub const SLEEP_TYPE_S5: u16 = 5;

mod offset {
    pub(super) const STATUS: u64 = 0;
    pub(super) const ENABLE: u64 = 2;
    pub(super) const CONTROL: u64 = 4;
    pub(super) const TIMER: u64 = 8;
    pub(super) const EVENTS: u64 = 12;
}

/// PM1 status and enable.
mod event {
    pub(super) const BUS_MASTER: u16 = 1 << 4;
    pub(super) const GLOBAL: u16 = 1 << 5;
    pub(super) const POWER_BUTTON: u16 = 1 << 8;
    pub(super) const SLEEP_BUTTON: u16 = 1 << 9;
    pub(super) const RTC: u16 = 1 << 10;
    pub(super) const WAKE: u16 = 1 << 15;
    pub(super) const CLEARABLE: u16 = WAKE | RTC | SLEEP_BUTTON | POWER_BUTTON | BUS_MASTER;
    // RTC is kept although no RTC event ever comes: Linux reads it back and reports an error where it is not kept.
    pub(super) const ENABLES: u16 = POWER_BUTTON | GLOBAL | RTC;
}

/// PM1 control.
mod control {
    pub(super) const SCI_ENABLE: u16 = 1 << 0;
    pub(super) const GLOBAL_RELEASE: u16 = 1 << 2;
    pub(super) const SLEEP_TYPE_SHIFT: u16 = 10;
    pub(super) const SLEEP_TYPE: u16 = 7 << SLEEP_TYPE_SHIFT;
    pub(super) const SLEEP_ENABLE: u16 = 1 << 13;
}

const KIND: &str = "acpi-pm";
const VERSION: u32 = 2;

/// The PM1 registers without line, clock or power.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Chip {
    status: u16,
    enable: u16,
    control: u16,
    /// General-purpose events: status, enable.
    gpe: [u16; 2],
}

impl Chip {
    fn acpi_enabled(&self) -> bool {
        self.control & control::SCI_ENABLE != 0
    }

    fn sci(&self) -> bool {
        let [gpe_status, gpe_enable] = self.gpe;
        self.acpi_enabled() && (self.status & self.enable != 0 || gpe_status & gpe_enable != 0)
    }

    fn read(&self, register: u64) -> u16 {
        match register {
            offset::STATUS => self.status,
            offset::ENABLE => self.enable,
            offset::CONTROL => self.control,
            _ => 0xffff,
        }
    }

    /// Returns whether the write powers the machine off.
    fn write(&mut self, register: u64, value: u16) -> bool {
        match register {
            offset::STATUS => self.status &= !(value & event::CLEARABLE),
            offset::ENABLE => self.enable = value & event::ENABLES,
            offset::CONTROL => {
                // SCI_EN changes by the SMI command alone; SLP_EN and GBL_RLS are triggers and read as zero.
                let kept = value & !(control::SCI_ENABLE | control::SLEEP_ENABLE | control::GLOBAL_RELEASE);
                self.control = self.control & control::SCI_ENABLE | kept;
                let sleep_type = (value & control::SLEEP_TYPE) >> control::SLEEP_TYPE_SHIFT;
                return value & control::SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5;
            }
            _ => {}
        }
        false
    }

    /// A byte of the general-purpose event registers.
    fn read_gpe(&self, index: usize) -> u8 {
        let [status, enable] = self.gpe.map(u16::to_le_bytes);
        [status, enable].as_flattened().get(index).copied().unwrap_or(0xff)
    }

    fn write_gpe(&mut self, index: usize, value: u8) {
        let [status, enable] = &mut self.gpe;
        let value = u16::from(value) << (8 * (index & 1));
        let mask = 0xff << (8 * (index & 1));
        match index {
            0 | 1 => *status &= !value,
            2 | 3 => *enable = *enable & !mask | value,
            _ => {}
        }
    }

    fn smi_command(&mut self, command: u8) {
        match command {
            ACPI_ENABLE => self.control |= control::SCI_ENABLE,
            ACPI_DISABLE => self.control &= !control::SCI_ENABLE,
            _ => {}
        }
    }

    /// Returns whether anybody will hear of it.
    fn press_power_button(&mut self) -> bool {
        if self.acpi_enabled() {
            self.status |= event::POWER_BUTTON;
        }
        self.acpi_enabled()
    }
}

struct Inner {
    chip: Chip,
    /// The level last given to the SCI.
    asserted: bool,
    /// Added to the ticks of the clock, so that the timer goes on after a restore.
    timer_offset: u32,
}

/// The PM block on its ports.
pub struct Pm {
    inner: Mutex<Inner>,
    sci: IrqLine,
    time: SharedTime,
    power: Arc<dyn PowerSink>,
}

impl Pm {
    /// A PM block with ACPI disabled; `sci` is IRQ 9.
    pub fn new(sci: IrqLine, time: SharedTime, power: Arc<dyn PowerSink>) -> Arc<Self> {
        let inner = Inner { chip: Chip::default(), asserted: false, timer_offset: 0 };
        Arc::new(Self { inner: Mutex::new(inner), sci, time, power })
    }

    /// Whether the guest has enabled ACPI, thus handles the power button.
    pub fn acpi_enabled(&self) -> bool {
        self.lock().chip.acpi_enabled()
    }

    /// Presses the power button; `false` if the guest has not enabled ACPI. Another press before the guest has seen
    /// the first changes nothing.
    pub fn press_power_button(&self) -> bool {
        self.change(Chip::press_power_button)
    }

    /// Reports general-purpose event `number`, 0–15: the guest gets an interrupt if it has enabled it.
    pub fn report_event(&self, number: u8) {
        self.change(|chip| chip.gpe[0] |= 1u16.checked_shl(number.into()).unwrap_or(0));
    }

    /// The SMI command port of this block, to be mapped at [`SMI_COMMAND_PORT`], 1 byte long.
    pub fn smi_command_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(SmiCommand(self.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Chip) -> T) -> T {
        let mut inner = self.lock();
        let result = change(&mut inner.chip);
        let asserted = inner.chip.sci();
        if asserted != inner.asserted {
            inner.asserted = asserted;
            self.sci.set(asserted);
        }
        result
    }

    fn ticks(&self) -> u32 {
        ns_to_ticks(self.time.now_ns(), TIMER_HZ) as u32
    }

    fn timer(&self) -> u32 {
        self.ticks().wrapping_add(self.lock().timer_offset)
    }
}

impl BusDevice for Pm {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        if let Some(index) = offset.checked_sub(offset::EVENTS) {
            let chip = self.lock().chip;
            let bytes: Vec<u8> =
                (index as usize..).take(size.bytes() as usize).map(|index| chip.read_gpe(index)).collect();
            return bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        }
        match size {
            AccessSize::Dword if offset == offset::TIMER => self.timer().into(),
            AccessSize::Word => self.lock().chip.read(offset).into(),
            _ => size.mask(),
        }
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        if let Some(index) = offset.checked_sub(offset::EVENTS) {
            let bytes = value.to_le_bytes();
            self.change(|chip| {
                (index as usize..)
                    .zip(bytes)
                    .take(size.bytes() as usize)
                    .for_each(|(index, byte)| chip.write_gpe(index, byte));
            });
        } else if size == AccessSize::Word && self.change(|chip| chip.write(offset, value as u16)) {
            self.power.request(PowerEvent::PowerOff);
        }
    }
}

struct SmiCommand(Arc<Pm>);

impl BusDevice for SmiCommand {
    fn read(&self, _offset: u64, _size: AccessSize) -> u64 {
        0
    }

    fn write(&self, _offset: u64, _size: AccessSize, value: u64) {
        self.0.change(|chip| chip.smi_command(value as u8));
    }
}

/// Version 2: the registers and the PM timer's value.
#[derive(Serialize, Deserialize)]
struct Archived {
    chip: Chip,
    timer: u32,
}

impl Persist for Pm {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let timer = self.timer();
        state::encode(KIND, &Archived { chip: self.lock().chip, timer })
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let Archived { chip, timer } = state::decode(KIND, VERSION, version, bytes)?;
        if chip.enable & !event::ENABLES != 0 {
            return Err(StateError::Invalid { kind: KIND, why: format!("PM1 enable is {:#x}", chip.enable) });
        }
        let mut inner = self.lock();
        inner.chip = chip;
        inner.asserted = chip.sci();
        inner.timer_offset = timer.wrapping_sub(self.ticks());
        Ok(())
    }

    fn reset(&self) {
        self.change(|chip| *chip = Chip::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::fixture::{Bytewise, Garbage, Lines, Power, check_state};
    use testkit::clock::FakeClock;

    struct Bench {
        pm: Arc<Pm>,
        smi: Arc<dyn BusDevice>,
        clock: FakeClock,
        lines: Arc<Lines>,
        power: Arc<Power>,
    }

    fn bench() -> Bench {
        let (clock, lines, power) = (FakeClock::new(), Lines::new(), Arc::new(Power::default()));
        let pm = Pm::new(lines.line(9), Arc::new(clock.clone()), power.clone());
        Bench { smi: pm.smi_command_port(), pm, clock, lines, power }
    }

    impl Bench {
        fn inw(&self, offset: u64) -> u16 {
            self.pm.read(offset, AccessSize::Word) as u16
        }
        fn outw(&self, offset: u64, value: u16) {
            self.pm.write(offset, AccessSize::Word, value.into());
        }
        fn timer(&self) -> u64 {
            self.pm.read(offset::TIMER, AccessSize::Dword)
        }
    }

    #[test]
    fn power_button_needs_acpi() {
        let b = bench();
        b.outw(offset::ENABLE, 0xffff);
        assert_eq!(b.inw(offset::ENABLE), event::ENABLES);
        assert!(!b.pm.press_power_button() && !b.pm.acpi_enabled());
        b.smi.outb(0, ACPI_ENABLE);
        assert!(b.pm.acpi_enabled());
        assert_eq!((b.inw(offset::CONTROL), b.inw(offset::STATUS)), (control::SCI_ENABLE, 0));
        assert!(b.pm.press_power_button() && b.pm.press_power_button());
        assert_eq!(b.lines.take(), [(9, true)]);
        assert_eq!(b.inw(offset::STATUS), event::POWER_BUTTON);
        b.outw(offset::STATUS, !event::POWER_BUTTON);
        assert_eq!(b.lines.take(), []);
        b.outw(offset::STATUS, event::POWER_BUTTON);
        assert_eq!((b.lines.take(), b.inw(offset::STATUS)), (vec![(9, false)], 0));
        b.outw(offset::ENABLE, 0);
        assert!(b.pm.press_power_button());
        assert_eq!(b.lines.take(), [], "not enabled");
        b.outw(offset::ENABLE, event::POWER_BUTTON);
        b.smi.outb(0, ACPI_DISABLE);
        assert_eq!(b.lines.take(), [(9, true), (9, false)]);
        assert!(!b.pm.acpi_enabled());
    }

    #[test]
    fn soft_off() {
        let b = bench();
        for sleep_type in 0..8 {
            b.outw(offset::CONTROL, sleep_type << 10);
            assert_eq!((b.inw(offset::CONTROL), b.power.take()), (sleep_type << 10, vec![]));
            b.outw(offset::CONTROL, sleep_type << 10 | control::SLEEP_ENABLE | control::SCI_ENABLE);
            let expected = if sleep_type == 5 { vec![PowerEvent::PowerOff] } else { vec![] };
            assert_eq!((b.inw(offset::CONTROL), b.power.take()), (sleep_type << 10, expected));
        }
    }

    #[test]
    fn only_16_bit_accesses() {
        let b = bench();
        assert_eq!(b.pm.inb(offset::STATUS), 0xff);
        assert_eq!(b.pm.read(offset::STATUS, AccessSize::Dword), 0xffff_ffff);
        b.pm.write(offset::STATUS, AccessSize::Dword, 0x0100_0000);
        b.pm.outb(offset::ENABLE + 1, 1);
        assert_eq!(b.inw(offset::ENABLE), 0);
        assert_eq!((b.inw(1), b.inw(6)), (0xffff, 0xffff));
    }

    #[test]
    fn general_purpose_events_interrupt_when_enabled() {
        let b = bench();
        b.smi.outb(0, ACPI_ENABLE);
        b.pm.report_event(GENERATION_EVENT);
        b.pm.report_event(200);
        assert_eq!((b.pm.inb(offset::EVENTS), b.lines.take()), (1, vec![]));
        b.pm.outb(offset::EVENTS + 2, 1);
        assert_eq!(b.lines.take(), [(9, true)]);
        assert_eq!(b.pm.read(offset::EVENTS, AccessSize::Dword), 0x0001_0001);
        b.pm.outb(offset::EVENTS + 1, 0xff);
        assert_eq!(b.lines.take(), []);
        b.pm.outb(offset::EVENTS, 1);
        assert_eq!((b.lines.take(), b.pm.inb(offset::EVENTS)), (vec![(9, false)], 0));
        b.outw(offset::EVENTS + 2, 0xabcd);
        assert_eq!((b.inw(offset::EVENTS + 2), b.pm.inb(offset::EVENTS + 3)), (0xabcd, 0xab));
    }

    #[test]
    fn timer_counts() {
        let b = bench();
        let start = b.timer();
        b.clock.advance(1_000_000_000);
        assert_eq!(b.timer() - start, TIMER_HZ);
        b.clock.advance(1_200 * 1_000_000_000);
        assert_eq!(b.timer(), TIMER_HZ * 1201 % (1 << 32), "32 bits wide");
        assert_eq!(b.clock.armed(), 0);
    }

    #[test]
    fn state_survives() {
        let b = bench();
        b.clock.advance(5_000_000_000);
        b.smi.outb(0, ACPI_ENABLE);
        b.outw(offset::ENABLE, event::POWER_BUTTON);
        b.pm.press_power_button();
        let other = bench();
        other.pm.restore(VERSION, &b.pm.save().unwrap()).unwrap();
        assert_eq!((other.timer(), other.lines.take()), (b.timer(), vec![]));
        other.outw(offset::STATUS, event::POWER_BUTTON);
        assert_eq!(other.lines.take(), [(9, false)]);
        other.pm.reset();
        assert!(!other.pm.acpi_enabled());
    }

    #[test]
    fn garbage() {
        let mut garbage = Garbage(4);
        let b = bench();
        for round in 0..20_000 {
            garbage.access(&*b.pm, LENGTH);
            garbage.access(&*b.smi, 1);
            b.pm.press_power_button();
            b.clock.advance(garbage.next() % 1_000_000_000);
            if round % 1000 == 0 {
                check_state(&*b.pm, &b.lines, &mut garbage);
            }
        }
    }
}
