//! Small ports: reset control (CF9), fast A20 and reset (92), POST codes (80, 84).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use platform::{AccessSize, BusDevice, Persist, PowerEvent, PowerSink, StateError, state};

/// Port of the reset control register. It lies between the ports of PCI configuration, whose device forwards byte
/// accesses to it.
pub const RESET_CONTROL_PORT: u64 = 0xcf9;
/// Port of the fast A20 gate.
pub const FAST_A20_PORT: u64 = 0x92;
/// Ports that firmware shows its progress on.
pub const POST_PORTS: [u64; 2] = [0x80, 0x84];

/// Bit 2 of the reset control register: reset, be it a soft or a hard one (bit 1).
const RESET_CPU: u8 = 1 << 2;
const FAST_RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;

const VERSION: u32 = 1;

/// A register of one byte that may reset the machine, to be mapped 1 byte long.
struct ResetRegister {
    value: AtomicU8,
    power: Arc<dyn PowerSink>,
}

impl ResetRegister {
    fn new(power: Arc<dyn PowerSink>) -> Self {
        Self { value: AtomicU8::new(0), power }
    }

    fn save(&self, kind: &'static str) -> Result<Vec<u8>, StateError> {
        state::encode(kind, &self.value.load(Ordering::Relaxed))
    }

    fn restore(&self, kind: &'static str, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        self.value.store(state::decode(kind, VERSION, version, bytes)?, Ordering::Relaxed);
        Ok(())
    }
}

/// The reset control register: setting bit 2 resets the machine.
pub struct ResetControl(ResetRegister);

impl ResetControl {
    /// A register that asks `power` for resets.
    pub fn new(power: Arc<dyn PowerSink>) -> Arc<Self> {
        Arc::new(Self(ResetRegister::new(power)))
    }
}

impl BusDevice for ResetControl {
    fn read(&self, _offset: u64, _size: AccessSize) -> u64 {
        self.0.value.load(Ordering::Relaxed).into()
    }

    fn write(&self, _offset: u64, _size: AccessSize, value: u64) {
        let value = value as u8;
        self.0.value.store(value & !RESET_CPU, Ordering::Relaxed);
        if value & RESET_CPU != 0 {
            self.0.power.request(PowerEvent::Reset);
        }
    }
}

/// The fast A20 gate: A20 is always on; a rising bit 0 resets the machine.
pub struct FastA20(ResetRegister);

impl FastA20 {
    /// A register that asks `power` for resets.
    pub fn new(power: Arc<dyn PowerSink>) -> Arc<Self> {
        Arc::new(Self(ResetRegister::new(power)))
    }
}

impl BusDevice for FastA20 {
    fn read(&self, _offset: u64, _size: AccessSize) -> u64 {
        (self.0.value.load(Ordering::Relaxed) | A20).into()
    }

    fn write(&self, _offset: u64, _size: AccessSize, value: u64) {
        let before = self.0.value.swap(value as u8, Ordering::Relaxed);
        if value as u8 & !before & FAST_RESET != 0 {
            self.0.power.request(PowerEvent::Reset);
        }
    }
}

macro_rules! persist_register {
    ($type:ty, $kind:literal) => {
        impl Persist for $type {
            fn kind(&self) -> &'static str {
                $kind
            }
            fn version(&self) -> u32 {
                VERSION
            }
            fn save(&self) -> Result<Vec<u8>, StateError> {
                self.0.save($kind)
            }
            fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
                self.0.restore($kind, version, bytes)
            }
            fn reset(&self) {
                self.0.value.store(0, Ordering::Relaxed);
            }
        }
    };
}

persist_register!(ResetControl, "reset-control");
persist_register!(FastA20, "fast-a20");

/// A port that swallows POST codes (and is written for its delay). Has no state.
pub struct PostPort;

impl BusDevice for PostPort {
    fn read(&self, _offset: u64, size: AccessSize) -> u64 {
        size.mask()
    }

    fn write(&self, _offset: u64, _size: AccessSize, _value: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::fixture::{Bytewise, Garbage, Lines, Power, check_state};

    #[test]
    fn reset_control() {
        let power = Arc::new(Power::default());
        let port = ResetControl::new(power.clone());
        port.outb(0, 0x02);
        assert_eq!((port.inb(0), power.take()), (0x02, vec![]));
        for value in [0x06, 0x04, 0x0e] {
            port.outb(0, value);
            assert_eq!(power.take(), [PowerEvent::Reset]);
        }
        assert_eq!(port.inb(0), 0x0a);
        port.reset();
        assert_eq!(port.inb(0), 0);
    }

    #[test]
    fn fast_a20() {
        let power = Arc::new(Power::default());
        let port = FastA20::new(power.clone());
        assert_eq!(port.inb(0), A20);
        port.outb(0, 0);
        assert_eq!((port.inb(0), power.take()), (A20, vec![]), "A20 stays on");
        port.outb(0, A20 | FAST_RESET);
        assert_eq!((port.inb(0), power.take()), (A20 | FAST_RESET, vec![PowerEvent::Reset]));
        port.outb(0, FAST_RESET);
        assert_eq!(power.take(), [], "only a rising bit");
    }

    #[test]
    fn garbage() {
        let mut garbage = Garbage(5);
        let (power, lines) = (Arc::new(Power::default()), Lines::new());
        let (control, gate) = (ResetControl::new(power.clone()), FastA20::new(power));
        for _ in 0..1000 {
            garbage.access(&*control, 1);
            garbage.access(&*gate, 1);
            garbage.access(&PostPort, 1);
            check_state(&*control, &lines, &mut garbage);
            check_state(&*gate, &lines, &mut garbage);
        }
    }
}
