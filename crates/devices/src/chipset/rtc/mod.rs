//! MC146818 real-time clock with 114 bytes of NVRAM, at ports 70 and 71, interrupt on IRQ 8.
//!
//! Keeps local time or UTC by the host's wall clock, so that it does not drift, also over a sleep of the host. Local
//! time is that of the start: daylight saving is the guest's business. The guest may set its clock; only the
//! difference is kept. The NVRAM tells firmware the size of memory (0x34–35, 0x5B–5D).
//!
//! A timer is armed only for interrupts that the guest has enabled and not yet to acknowledge.

mod calendar;
mod chip;
mod regs;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use platform::{AccessSize, BusDevice, IrqLine, Persist, StateError, Timer, state, time::SharedTime};

use self::chip::{Chip, Now};
use self::regs::index;
use super::bytes;

/// Number of ports.
pub const LENGTH: u64 = 2;

const KIND: &str = "mc146818";
const VERSION: u32 = 1;

/// What the clock starts with.
#[derive(Clone, Copy, Debug)]
pub struct RtcConfig {
    /// Keep the host's local time rather than UTC.
    pub local_time: bool,
    /// Bytes of memory below 4 GiB.
    pub low_memory: u64,
    /// Bytes of memory above 4 GiB.
    pub high_memory: u64,
}

struct Inner {
    chip: Chip,
    /// The level last given to the line.
    asserted: bool,
    /// For when the timer is armed.
    armed: Option<u64>,
}

/// The real-time clock on its ports.
pub struct Rtc {
    inner: Mutex<Inner>,
    irq: IrqLine,
    time: SharedTime,
    timer: Box<dyn Timer>,
}

impl Rtc {
    /// A clock that shows the host's time.
    pub fn new(config: RtcConfig, irq: IrqLine, time: SharedTime) -> Arc<Self> {
        let offset_s = if config.local_time { time.local_offset_s() } else { 0 };
        let mut chip = Chip::new(offset_s, now(&time));
        tell_memory_size(&mut chip, config);
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = weak.clone();
            let timer = time.timer(Box::new(move || {
                if let Some(rtc) = weak.upgrade() {
                    rtc.timer_ran_out();
                }
            }));
            Self { inner: Mutex::new(Inner { chip, asserted: false, armed: None }), irq, time, timer }
        })
    }

    /// What the clock shows, in seconds since 1970 (of local time, if that is what it keeps).
    pub fn time(&self) -> i64 {
        self.lock().chip.time(now(&self.time))
    }

    /// Sets the clock, in seconds since 1970.
    pub fn set_time(&self, seconds: i64) {
        self.change(|chip, now| chip.set_time(seconds, now));
    }

    /// The NVRAM byte at `index` (0x0E to 0x7F); `None` for the clock's own registers, the century among them.
    pub fn nvram(&self, index: u8) -> Option<u8> {
        self.lock().chip.nvram(index)
    }

    /// Sets the NVRAM byte at `index`; `false` where [`Self::nvram`] reads none.
    pub fn set_nvram(&self, index: u8, value: u8) -> bool {
        self.lock().chip.set_nvram(index, value)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Chip, Now) -> T) -> T {
        let mut inner = self.lock();
        let now = now(&self.time);
        let result = change(&mut inner.chip, now);
        self.sync(&mut inner, now);
        result
    }

    fn timer_ran_out(&self) {
        let mut inner = self.lock();
        inner.armed = None;
        let now = now(&self.time);
        inner.chip.look(now);
        self.sync(&mut inner, now);
    }

    /// Makes line and timer what the chip's state says.
    fn sync(&self, inner: &mut Inner, now: Now) {
        let asserted = inner.chip.interrupt();
        if asserted != inner.asserted {
            inner.asserted = asserted;
            self.irq.set(asserted);
        }
        let next = inner.chip.next_interrupt(now);
        if next != inner.armed {
            inner.armed = next;
            match next {
                Some(deadline) => self.timer.arm(deadline),
                None => self.timer.disarm(),
            }
        }
    }
}

fn now(time: &SharedTime) -> Now {
    Now { wall_ns: time.wall_ns(), mono_ns: time.now_ns() }
}

fn tell_memory_size(chip: &mut Chip, config: RtcConfig) {
    let above_16m = (config.low_memory.saturating_sub(16 << 20) >> 16).min(0xffff);
    let above_4g = (config.high_memory >> 16).min(0xff_ffff);
    for (first, value, count) in [(index::MEMORY_ABOVE_16M, above_16m, 2), (index::MEMORY_ABOVE_4G, above_4g, 3)] {
        for n in 0..count {
            chip.set_nvram(first + n, (value >> (8 * n)) as u8);
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        // The index cannot be read back.
        bytes::read(offset, size, |port| if port == 1 { self.change(Chip::read) } else { 0xff })
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        bytes::write(offset, size, value, |port, byte| match port {
            0 => self.lock().chip.select(byte),
            1 => self.change(|chip, now| chip.write(byte, now)),
            _ => {}
        });
    }
}

impl Persist for Rtc {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(KIND, &self.lock().chip)
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let chip: Chip = state::decode(KIND, VERSION, version, bytes)?;
        chip.check().map_err(|why| StateError::Invalid { kind: KIND, why })?;
        let mut inner = self.lock();
        inner.asserted = chip.interrupt();
        inner.chip = chip;
        self.sync(&mut inner, now(&self.time));
        Ok(())
    }

    fn reset(&self) {
        self.change(Chip::reset);
    }
}
