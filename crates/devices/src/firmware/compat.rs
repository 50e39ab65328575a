//! What firmware built for QEMU's boards touches beside PCI: the power-management ports at the place that it gave them on
//! such a board, and the CPU hot-plug ports, which are there to say that there is no CPU hot-plug.

use std::sync::Arc;

use platform::{AccessSize, Bus, BusDevice, BusError, PowerEvent, PowerSink};

use crate::chipset::pm::{self, Pm};
use crate::pci::Chipset;

/// Ports of a board.
struct Ports {
    pm: u64,
    hot_plug: u64,
}

const HOT_PLUG_LENGTH: u64 = 12;

fn ports(chipset: Chipset) -> Option<Ports> {
    match chipset {
        Chipset::Bhyve => None,
        Chipset::I440fx => Some(Ports { pm: 0xb000, hot_plug: 0xaf00 }),
        Chipset::Q35 => Some(Ports { pm: 0x600, hot_plug: 0xcd8 }),
    }
}

/// Maps what firmware for `chipset` expects.
///
/// # Errors
/// Something else is at one of the ports.
pub fn map(chipset: Chipset, io: &Bus, pm: &Arc<Pm>, power: &Arc<dyn PowerSink>) -> Result<(), BusError> {
    let Some(ports) = ports(chipset) else { return Ok(()) };
    io.map(ports.pm, pm::LENGTH, Arc::new(PmAlias { pm: pm.clone(), power: power.clone() }))?;
    io.map(ports.hot_plug, HOT_PLUG_LENGTH, Arc::new(NoHotPlug))
}

/// The PM block once more; here sleep type 0 powers off, too, as on QEMU's boards.
struct PmAlias {
    pm: Arc<Pm>,
    power: Arc<dyn PowerSink>,
}

const PM1_CONTROL: u64 = 4;
const SLEEP_ENABLE: u64 = 1 << 13;
const SLEEP_TYPE: u64 = 7 << 10;

impl BusDevice for PmAlias {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        self.pm.read(offset, size)
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        self.pm.write(offset, size, value);
        if (offset, size) == (PM1_CONTROL, AccessSize::Word) && value & (SLEEP_ENABLE | SLEEP_TYPE) == SLEEP_ENABLE {
            self.power.request(PowerEvent::PowerOff);
        }
    }
}

/// Reads as ones.
struct NoHotPlug;

impl BusDevice for NoHotPlug {
    fn read(&self, _: u64, size: AccessSize) -> u64 {
        size.mask()
    }

    fn write(&self, _: u64, _: AccessSize, _: u64) {}
}

#[cfg(test)]
mod tests {
    use testkit::clock::FakeClock;

    use super::*;
    use crate::chipset::fixture::{Lines, Power};

    #[test]
    fn firmware_powers_off_at_the_ports_of_its_board() {
        for (chipset, port) in [(Chipset::I440fx, 0xb000), (Chipset::Q35, 0x600)] {
            let (io, power) = (Bus::new("port"), Arc::new(Power::default()));
            let pm = Pm::new(Lines::new().line(9), Arc::new(FakeClock::new()), power.clone());
            map(chipset, &io, &pm, &(power.clone() as Arc<dyn PowerSink>)).unwrap();
            assert!(io.write(port + 4, AccessSize::Word, 1 << 13));
            assert_eq!(power.take(), [PowerEvent::PowerOff]);
            io.write(port + 4, AccessSize::Word, 5 << 10);
            assert_eq!((power.take(), io.read(port + 4, AccessSize::Word)), (vec![], Some(5 << 10)));
            assert!(io.read(port + 8, AccessSize::Dword).is_some());
        }
        let (io, power) = (Bus::new("port"), Arc::new(Power::default()));
        let pm = Pm::new(Lines::new().line(9), Arc::new(FakeClock::new()), power.clone());
        map(Chipset::Bhyve, &io, &pm, &(power as Arc<dyn PowerSink>)).unwrap();
        assert_eq!(io.read(0xb004, AccessSize::Word), None);
    }
}
