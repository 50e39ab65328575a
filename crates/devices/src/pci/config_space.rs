//! The 256 bytes of a function's configuration space, with what a guest may write of them.

use platform::AccessSize;

use super::regs;

/// Configuration space as bytes, and for each bit whether the guest can change it.
#[derive(Clone)]
pub(crate) struct ConfigSpace {
    bytes: [u8; regs::CONFIG_SIZE],
    writable: [u8; regs::CONFIG_SIZE],
    /// Where the next capability goes, and the offset of the "next" pointer that will name it.
    next_capability: usize,
    link: usize,
}

impl ConfigSpace {
    /// A type 0 header without capabilities; everything that a type 0 header lets a guest write is writable.
    pub(crate) fn new() -> Self {
        let mut space = Self {
            bytes: [0; regs::CONFIG_SIZE],
            writable: [0; regs::CONFIG_SIZE],
            next_capability: usize::from(regs::FIRST_CAPABILITY),
            link: usize::from(regs::CAPABILITIES),
        };
        space.make_writable(regs::COMMAND, &regs::command::WRITABLE.to_le_bytes());
        space.make_writable(regs::CACHE_LINE, &[0xff, 0xff]);
        space.make_writable(regs::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Sets bytes, whether the guest may write them or not. Bytes past the end are dropped.
    pub(crate) fn set(&mut self, offset: u16, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(usize::from(offset)).zip(bytes) {
            *to = *from;
        }
    }

    /// Lets the guest write the bits set in `mask`.
    pub(crate) fn make_writable(&mut self, offset: u16, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(usize::from(offset)).zip(mask) {
            *to = *from;
        }
    }

    /// Appends a capability to the chain; `body` follows the two bytes of id and link. Returns its offset.
    ///
    /// # Panics
    /// The capabilities do not fit into configuration space: a mistake in the device's code, not in its configuration.
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        assert!(end <= regs::CONFIG_SIZE, "capabilities do not fit into configuration space");
        self.bytes[self.link] = at as u8;
        self.bytes[at] = id;
        self.bytes[at + 2..end].copy_from_slice(body);
        self.make_writable(at as u16 + 2, writable);
        let status = self.u16(regs::STATUS) | regs::status::CAPABILITIES;
        self.set(regs::STATUS, &status.to_le_bytes());
        self.link = at + 1;
        self.next_capability = end.next_multiple_of(4);
        at as u16
    }

    /// Reads a naturally aligned register; ones outside configuration space.
    pub(crate) fn read(&self, offset: u16, size: AccessSize) -> u32 {
        let from = usize::from(offset);
        let mut value = [0; 4];
        match self.bytes.get(from..from + size.bytes() as usize) {
            Some(bytes) if bytes.len() <= 4 => {
                value[..bytes.len()].copy_from_slice(bytes);
                u32::from_le_bytes(value)
            }
            _ => u32::MAX,
        }
    }

    /// Writes the writable bits of a register.
    pub(crate) fn write(&mut self, offset: u16, size: AccessSize, value: u32) {
        let from = usize::from(offset);
        let bytes = value.to_le_bytes();
        let targets = self.bytes.iter_mut().zip(&self.writable).skip(from).take(size.bytes() as usize);
        for ((byte, writable), new) in targets.zip(bytes) {
            *byte = (*byte & !writable) | (new & writable);
        }
    }

    pub(crate) fn u8(&self, offset: u16) -> u8 {
        self.read(offset, AccessSize::Byte) as u8
    }

    pub(crate) fn u16(&self, offset: u16) -> u16 {
        self.read(offset, AccessSize::Word) as u16
    }

    pub(crate) fn u32(&self, offset: u16) -> u32 {
        self.read(offset, AccessSize::Dword)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes over saved bytes, if they differ from the present ones only where a guest could have changed them, or
    /// in the status bits that follow from the state.
    pub(crate) fn restore(&mut self, saved: &[u8]) -> Result<(), String> {
        if saved.len() != self.bytes.len() {
            return Err(format!("configuration space of {} bytes", saved.len()));
        }
        let odd = (0..saved.len()).find(|&at| (saved[at] ^ self.bytes[at]) & !self.writable[at] != 0);
        match odd {
            Some(at) => Err(format!(
                "read-only configuration byte {at:#x} is {:#x}, this device has {:#x}",
                saved[at], self.bytes[at]
            )),
            None => {
                self.bytes.copy_from_slice(saved);
                Ok(())
            }
        }
    }
}
