//! What devices are wired to in tests.

use std::sync::{Arc, Mutex};

use platform::{AccessSize, BusDevice, IrqLine, IrqSink, MsiMessage, MsiSink, Persist, PowerEvent, PowerSink};

/// Records what happens to interrupt lines.
#[derive(Default)]
pub(crate) struct Lines(Mutex<Vec<(u32, bool)>>);

impl Lines {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }
    pub(crate) fn line(self: &Arc<Self>, n: u32) -> IrqLine {
        IrqLine::new(self.clone(), n)
    }
    /// Changes since the last call.
    pub(crate) fn take(&self) -> Vec<(u32, bool)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl IrqSink for Lines {
    fn set_level(&self, line: u32, asserted: bool) {
        self.0.lock().unwrap().push((line, asserted));
    }
}

/// Records messages.
#[derive(Default)]
pub(crate) struct Messages(Mutex<Vec<MsiMessage>>);

impl Messages {
    pub(crate) fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl MsiSink for Messages {
    fn send(&self, message: MsiMessage) {
        self.0.lock().unwrap().push(message);
    }
}

/// Records requests to end the machine.
#[derive(Default)]
pub(crate) struct Power(Mutex<Vec<PowerEvent>>);

impl Power {
    pub(crate) fn take(&self) -> Vec<PowerEvent> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl PowerSink for Power {
    fn request(&self, event: PowerEvent) {
        self.0.lock().unwrap().push(event);
    }
}

/// Pseudo-random numbers (splitmix64).
pub(crate) struct Garbage(pub(crate) u64);

impl Garbage {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One random access to a device that is mapped `length` bytes long, aligned or not.
    pub(crate) fn access(&mut self, device: &dyn BusDevice, length: u64) {
        let sizes = [AccessSize::Byte, AccessSize::Word, AccessSize::Dword, AccessSize::Qword];
        let size = sizes[(self.next() % 4) as usize];
        if size.bytes() > length {
            return;
        }
        let offset = self.next() % (length - size.bytes() + 1);
        if self.next().is_multiple_of(2) {
            let value = device.read(offset, size);
            assert_eq!(value & !size.mask(), 0, "a read of {} bytes has more", size.bytes());
        } else {
            // Small values now and then: they hit commands and enables.
            let value = if self.next().is_multiple_of(2) { self.next() } else { self.next() & 0xff };
            device.write(offset, size, value & size.mask());
        }
    }
}

/// What every device owes a snapshot: its state goes round unchanged and without touching the line, and neither a
/// state of another version nor mangled bytes are taken over blindly.
pub(crate) fn check_state(device: &dyn Persist, lines: &Lines, garbage: &mut Garbage) {
    lines.take();
    let saved = device.save().unwrap();
    device.restore(device.version(), &saved).unwrap();
    assert_eq!(device.save().unwrap(), saved);
    assert_eq!(lines.take(), [], "restoring makes no edge");
    assert!(device.restore(device.version() + 1, &saved).is_err());
    if !saved.is_empty() {
        assert!(device.restore(device.version(), &saved[..saved.len() - 1]).is_err());
    }
    for _ in 0..20 {
        let mut mangled = saved.clone();
        for byte in &mut mangled {
            if garbage.next().is_multiple_of(8) {
                *byte = garbage.next() as u8;
            }
        }
        // Whether taken over or refused: what follows must not panic.
        let _ = device.restore(device.version(), &mangled);
    }
}

/// Byte access to a device, as most drivers do it.
pub(crate) trait Bytewise {
    fn inb(&self, offset: u64) -> u8;
    fn outb(&self, offset: u64, value: u8);
}

impl<T: BusDevice + ?Sized> Bytewise for T {
    fn inb(&self, offset: u64) -> u8 {
        self.read(offset, AccessSize::Byte) as u8
    }
    fn outb(&self, offset: u64, value: u8) {
        self.write(offset, AccessSize::Byte, value.into());
    }
}
