//! Devices that record what reaches them.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use platform::{AccessSize, Bus, BusDevice, PowerEvent, PowerSink};
use vmm::VcpuHandle;

use super::{FINISH, HUNG, PORT, PORTS, at};

/// An access to a recording device. Ports and memory are numbered from the device's start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    In(u64, u64),
    Out(u64, u64, u64),
    Read(u64, u64),
    Write(u64, u64, u64),
}

/// Everything outside the VM.
#[derive(Default)]
pub struct World {
    log: Mutex<Vec<Access>>,
    logged: Condvar,
    inputs: Mutex<VecDeque<u64>>,
    memory: Mutex<Vec<u8>>,
    finish: Mutex<Vec<u64>>,
    power: Mutex<Vec<PowerEvent>>,
    handles: Mutex<Vec<Arc<dyn VcpuHandle>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Ports(Arc<World>);
struct Finish(Arc<World>);
struct Memory(Arc<World>);

impl World {
    pub(super) fn map(self: &Arc<Self>, ports: &Bus, mmio: &Bus) {
        lock(&self.memory).resize(at::MMIO_SIZE as usize, 0);
        ports.map(u64::from(PORT), PORTS, Arc::new(Ports(self.clone()))).expect("free");
        ports.map(u64::from(FINISH), 1, Arc::new(Finish(self.clone()))).expect("free");
        mmio.map(at::MMIO, at::MMIO_SIZE, Arc::new(Memory(self.clone()))).expect("free");
    }

    pub(super) fn connect(&self, handles: impl Iterator<Item = Arc<dyn VcpuHandle>>) {
        lock(&self.handles).extend(handles);
    }

    pub fn stop(&self, index: usize) {
        let handle = lock(&self.handles)[index].clone();
        handle.stop();
    }

    pub fn stop_all(&self) {
        for handle in lock(&self.handles).iter() {
            handle.stop();
        }
    }

    fn push(&self, access: Access) {
        lock(&self.log).push(access);
        self.logged.notify_all();
    }

    /// All accesses so far.
    pub fn log(&self) -> Vec<Access> {
        lock(&self.log).clone()
    }

    /// Takes the accesses so far.
    pub fn take_log(&self) -> Vec<Access> {
        std::mem::take(&mut *lock(&self.log))
    }

    /// The values written to ports so far.
    pub fn outputs(&self) -> Vec<u64> {
        let value = |access: &Access| if let Access::Out(_, _, value) = *access { Some(value) } else { None };
        lock(&self.log).iter().filter_map(value).collect()
    }

    /// Waits for the guest to write `value` to a port.
    #[track_caller]
    pub fn await_output(&self, value: u64) {
        let arrived =
            |log: &mut Vec<Access>| !log.iter().any(|access| matches!(access, Access::Out(_, _, v) if *v == value));
        let (_log, timeout) =
            self.logged.wait_timeout_while(lock(&self.log), HUNG, arrived).unwrap_or_else(PoisonError::into_inner);
        assert!(!timeout.timed_out(), "the guest never wrote {value:#x}");
    }

    /// What the next IN instructions read; without it, a pattern.
    pub fn supply(&self, values: &[u64]) {
        lock(&self.inputs).extend(values);
    }

    /// What the guest wrote to the finishing port.
    pub fn finishes(&self) -> Vec<u64> {
        lock(&self.finish).clone()
    }

    pub fn power(&self) -> Vec<PowerEvent> {
        lock(&self.power).clone()
    }

    /// The memory-mapped device's bytes.
    pub fn mmio(&self, offset: u64, len: usize) -> Vec<u8> {
        lock(&self.memory)[offset as usize..][..len].to_vec()
    }

    pub fn set_mmio(&self, offset: u64, bytes: &[u8]) {
        lock(&self.memory)[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }
}

impl PowerSink for World {
    fn request(&self, event: PowerEvent) {
        lock(&self.power).push(event);
        self.stop_all();
    }
}

impl BusDevice for Ports {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        self.0.push(Access::In(offset, size.bytes()));
        lock(&self.0.inputs).pop_front().unwrap_or(0x8877_6655_4433_2211) & size.mask()
    }
    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        self.0.push(Access::Out(offset, size.bytes(), value));
    }
}

impl BusDevice for Finish {
    fn read(&self, _: u64, size: AccessSize) -> u64 {
        size.mask()
    }
    fn write(&self, _: u64, _: AccessSize, value: u64) {
        lock(&self.0.finish).push(value);
        self.0.stop_all();
    }
}

impl BusDevice for Memory {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        self.0.push(Access::Read(offset, size.bytes()));
        let mut bytes = [0; 8];
        let len = size.bytes() as usize;
        bytes[..len].copy_from_slice(&lock(&self.0.memory)[offset as usize..][..len]);
        u64::from_le_bytes(bytes)
    }
    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        self.0.push(Access::Write(offset, size.bytes(), value));
        self.0.set_mmio(offset, &value.to_le_bytes()[..size.bytes() as usize]);
    }
}
