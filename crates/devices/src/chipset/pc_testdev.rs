//! What kvm-unit-tests want of a machine: QEMU's `pc-testdev` and `isa-debug-exit`. Off unless asked for.
//!
//! | where            | what                                                                            |
//! |------------------|---------------------------------------------------------------------------------|
//! | ports E0–E3      | 4 bytes that read as they were written                                          |
//! | port E4          | names a page whose host mapping is to be renewed                                |
//! | port F4          | writing v ends the process with status (v << 1) \| 1                            |
//! | ports 2000–2017  | writing to port 2000 + n asserts (non-zero) or de-asserts interrupt line n      |
//! | memory FF000000  | 64 KB that read as they were written, as memory-mapped I/O                      |

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use platform::{AccessSize, Bus, BusDevice, BusError, IrqSink, Persist, PowerEvent, PowerSink, StateError, state};
use serde::{Deserialize, Serialize};

use super::bytes;

const LOOPBACK_PORT: u64 = 0xe0;
const LOOPBACK_BYTES: usize = 4;
const FLUSH_PORT: u64 = 0xe4;
const EXIT_PORT: u64 = 0xf4;
const LINES_PORT: u64 = 0x2000;
const LINES: u64 = 24;
const MEMORY_ADDRESS: u64 = 0xff00_0000;
const MEMORY_BYTES: usize = 0x1_0000;
/// Ports take accesses of up to 32 bits.
const PORT_BYTES: u64 = 4;

const KIND: &str = "pc-testdev";
const VERSION: u32 = 1;

/// Version 1.
#[derive(Serialize, Deserialize)]
struct State {
    loopback: Vec<u8>,
    memory: Vec<u8>,
    /// Bit n: line n is asserted.
    levels: u32,
}

impl State {
    fn new() -> Self {
        Self { loopback: vec![0; LOOPBACK_BYTES], memory: vec![0; MEMORY_BYTES], levels: 0 }
    }
}

/// The test device.
pub struct PcTestdev {
    state: Mutex<State>,
    lines: Arc<dyn IrqSink>,
    power: Arc<dyn PowerSink>,
}

impl PcTestdev {
    /// A test device that drives the I/O APIC inputs `lines` (by GSI) and ends the process through `power`.
    pub fn new(lines: Arc<dyn IrqSink>, power: Arc<dyn PowerSink>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State::new()), lines, power })
    }

    /// Puts the device on the buses.
    ///
    /// # Errors
    /// Something else is there: a boot ROM, or an I/O BAR.
    pub fn map(self: &Arc<Self>, io: &Bus, mmio: &Bus) -> Result<(), BusError> {
        io.map(LOOPBACK_PORT, LOOPBACK_BYTES as u64, Arc::new(Loopback(self.clone())))?;
        io.map(FLUSH_PORT, PORT_BYTES, Arc::new(Flush))?;
        io.map(EXIT_PORT, PORT_BYTES, Arc::new(Exit(self.clone())))?;
        io.map(LINES_PORT, LINES, Arc::new(Lines(self.clone())))?;
        mmio.map(MEMORY_ADDRESS, MEMORY_BYTES as u64, Arc::new(Memory(self.clone())))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_line(&self, line: u64, asserted: bool) {
        if line >= LINES {
            return;
        }
        let mut state = self.lock();
        let bit = 1 << line;
        state.levels = if asserted { state.levels | bit } else { state.levels & !bit };
        self.lines.set_level(line as u32, asserted);
    }
}

fn load(bytes: &[u8], offset: u64) -> u8 {
    usize::try_from(offset).ok().and_then(|offset| bytes.get(offset)).copied().unwrap_or(0xff)
}

fn store(bytes: &mut [u8], offset: u64, value: u8) {
    if let Some(byte) = usize::try_from(offset).ok().and_then(|offset| bytes.get_mut(offset)) {
        *byte = value;
    }
}

struct Loopback(Arc<PcTestdev>);

impl BusDevice for Loopback {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        let state = self.0.lock();
        bytes::read(offset, size, |at| load(&state.loopback, at))
    }
    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        let mut state = self.0.lock();
        bytes::write(offset, size, value, |at, byte| store(&mut state.loopback, at, byte));
    }
}

struct Memory(Arc<PcTestdev>);

impl BusDevice for Memory {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        let state = self.0.lock();
        bytes::read(offset, size, |at| load(&state.memory, at))
    }
    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        let mut state = self.0.lock();
        bytes::write(offset, size, value, |at, byte| store(&mut state.memory, at, byte));
    }
}

/// The page's contents are to stay, so renewing its mapping has no effect that a guest could see.
struct Flush;

impl BusDevice for Flush {
    fn read(&self, _offset: u64, size: AccessSize) -> u64 {
        size.mask()
    }
    fn write(&self, _offset: u64, _size: AccessSize, _value: u64) {}
}

struct Exit(Arc<PcTestdev>);

impl BusDevice for Exit {
    fn read(&self, _offset: u64, size: AccessSize) -> u64 {
        size.mask()
    }
    fn write(&self, _offset: u64, _size: AccessSize, value: u64) {
        // The status of a process has 8 bits.
        self.0.power.request(PowerEvent::Exit((value << 1) as u8 | 1));
    }
}

struct Lines(Arc<PcTestdev>);

impl BusDevice for Lines {
    fn read(&self, _offset: u64, size: AccessSize) -> u64 {
        size.mask()
    }
    fn write(&self, offset: u64, _size: AccessSize, value: u64) {
        self.0.set_line(offset, value != 0);
    }
}

impl Persist for PcTestdev {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(KIND, &*self.lock())
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let restored: State = state::decode(KIND, VERSION, version, bytes)?;
        if restored.loopback.len() != LOOPBACK_BYTES || restored.memory.len() != MEMORY_BYTES {
            return Err(StateError::Invalid { kind: KIND, why: "memory of another size".to_owned() });
        }
        *self.lock() = restored;
        Ok(())
    }

    fn reset(&self) {
        let mut state = self.lock();
        let levels = std::mem::replace(&mut *state, State::new()).levels;
        for line in (0..LINES as u32).filter(|line| levels & 1 << line != 0) {
            self.lines.set_level(line, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::fixture::{self, Garbage, Power, check_state};

    struct Bench {
        device: Arc<PcTestdev>,
        io: Bus,
        mmio: Bus,
        lines: Arc<fixture::Lines>,
        power: Arc<Power>,
    }

    fn bench() -> Bench {
        let (lines, power) = (fixture::Lines::new(), Arc::new(Power::default()));
        let device = PcTestdev::new(lines.clone(), power.clone());
        let (io, mmio) = (Bus::new("port"), Bus::new("memory"));
        device.map(&io, &mmio).unwrap();
        Bench { device, io, mmio, lines, power }
    }

    #[test]
    fn debug_exit() {
        let b = bench();
        for (value, size, status) in
            [(0, AccessSize::Dword, 1), (0x10, AccessSize::Byte, 0x21), (0xffff_ff80, AccessSize::Dword, 1)]
        {
            assert!(b.io.write(EXIT_PORT, size, value));
            assert_eq!(b.power.take(), [PowerEvent::Exit(status)]);
        }
        assert_eq!(b.io.read(EXIT_PORT, AccessSize::Byte), Some(0xff));
    }

    #[test]
    fn loopbacks() {
        let b = bench();
        b.io.write(0xe0, AccessSize::Dword, 0x1234_5678);
        b.io.write(0xe1, AccessSize::Byte, 0xab);
        assert_eq!(b.io.read(0xe0, AccessSize::Dword), Some(0x1234_ab78));
        assert_eq!(b.io.read(0xe2, AccessSize::Word), Some(0x1234));
        b.mmio.write(0xff00_fff8, AccessSize::Qword, 0x1122_3344_5566_7788);
        assert_eq!(b.mmio.read(0xff00_fffa, AccessSize::Dword), Some(0x3344_5566));
        assert_eq!(b.mmio.read(0xff00_fffc, AccessSize::Qword), None);
        assert!(b.io.write(FLUSH_PORT, AccessSize::Dword, 0xdead_f000));
    }

    #[test]
    fn lines() {
        let b = bench();
        b.io.write(0x2000 + 5, AccessSize::Byte, 1);
        b.io.write(0x2000 + 23, AccessSize::Dword, 1);
        b.io.write(0x2000 + 23, AccessSize::Byte, 1);
        assert_eq!(b.lines.take(), [(5, true), (23, true)]);
        b.io.write(0x2000 + 5, AccessSize::Byte, 0);
        assert_eq!(b.lines.take(), [(5, false)]);
        b.device.reset();
        assert_eq!(b.lines.take(), [(23, false)]);
    }

    #[test]
    fn garbage() {
        let mut garbage = Garbage(6);
        let b = bench();
        let views: [(Arc<dyn BusDevice>, u64); 5] = [
            (Arc::new(Loopback(b.device.clone())), LOOPBACK_BYTES as u64),
            (Arc::new(Memory(b.device.clone())), MEMORY_BYTES as u64),
            (Arc::new(Flush), PORT_BYTES),
            (Arc::new(Exit(b.device.clone())), PORT_BYTES),
            (Arc::new(Lines(b.device.clone())), LINES),
        ];
        for _ in 0..2000 {
            for (view, length) in &views {
                garbage.access(&**view, *length);
            }
        }
        check_state(&*b.device, &b.lines, &mut garbage);
    }
}
