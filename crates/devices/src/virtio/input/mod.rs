//! `virtio-input`: an input device of the host, handed to the guest (virtio 1.2, 5.8).

mod config_space;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use backend::evdev::{Evdev, InputEvent, Waker};
use config::NodeRef;
use platform::state::{decode, encode};
use platform::{Persist, StateError};
use serde::{Deserialize, Serialize};

use super::context::VirtioContext;
use super::transport::{self, VirtioSpec};
use super::worker::Worker;
use super::{Chain, VirtioDevice, read_structure};
use crate::factory::{BuildContext, DeviceError, PciFactory};
use crate::pci::{PciFunction, regs};
use config_space::{CONFIG_SIZE, structure};

/// How to hand over an input device.
pub const FACTORY: PciFactory =
    PciFactory { name: "virtio-input", help: "input device of the host; /dev/input/eventN|unix:PATH", build };

const QUEUE_SIZE: u16 = 64;
/// Queues: events for the guest, and from it.
const EVENTS: u16 = 0;
const STATUS: u16 = 1;
/// Bytes of an event.
const EVENT_LEN: usize = 8;
/// Events of one group, at most.
const MAX_GROUP: usize = 256;

fn build(context: &BuildContext<'_>, node: &NodeRef<'_>) -> Result<Arc<PciFunction>, DeviceError> {
    let Some(path) = node.get_str("path") else {
        return Err(DeviceError::Other(
            "virtio-input: name the event device, as in virtio-input,/dev/input/event0".into(),
        ));
    };
    let device = match path.strip_prefix("unix:") {
        Some(socket) => Evdev::connect(Path::new(socket)),
        None => Evdev::open(Path::new(&path)),
    };
    let device =
        device.map_err(|source| DeviceError::Host { what: format!("take the input device {path}"), source })?;
    transport::build(context, spec(), |virtio| Input::new(virtio, device))
}

fn spec() -> VirtioSpec {
    VirtioSpec {
        name: "virtio-input",
        device: 0x1052,
        device_type: 0x1100,
        class: regs::class::INPUT_OTHER,
        config_size: CONFIG_SIZE as u32,
        queues: vec![QUEUE_SIZE; 2],
    }
}

/// What the driver has asked for.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Selection {
    select: u8,
    subselect: u8,
}

struct Input {
    device: Arc<Evdev>,
    selection: Mutex<Selection>,
    worker: Worker,
    stop: Arc<AtomicBool>,
    wake: Arc<Waker>,
    reader: Option<JoinHandle<()>>,
}

impl Input {
    fn new(context: Arc<VirtioContext>, device: Evdev) -> Result<Arc<Self>, DeviceError> {
        let failed = |source| DeviceError::Host { what: "start the threads of virtio-input".into(), source };
        let address = context.address();
        let name = format!("input-{}:{}", address.slot, address.func);
        let (device, stop) = (Arc::new(device), Arc::new(AtomicBool::new(false)));
        let wake = Arc::new(Waker::new().map_err(failed)?);
        let (status, lights) = (context.clone(), device.clone());
        let worker = Worker::spawn(name.clone(), move |_| take_status(&status, &lights)).map_err(failed)?;
        let (events, stopped, woken) = (device.clone(), stop.clone(), wake.clone());
        let reader = std::thread::Builder::new().name(name).spawn(move || {
            let mut group = Vec::new();
            while !stopped.load(Ordering::Acquire) && woken.wait(&events) {
                let Ok(more) = events.read() else { return };
                more.into_iter().for_each(|event| collect(&context, &mut group, event));
            }
        });
        let reader = Some(reader.map_err(failed)?);
        Ok(Arc::new(Self { device, selection: Mutex::default(), worker, stop, wake, reader }))
    }

    fn selection(&self) -> MutexGuard<'_, Selection> {
        self.selection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.wake.set();
        if let Some(reader) = self.reader.take() {
            // A panic of the thread has been reported by the panic hook; there is nothing to add.
            let _ = reader.join();
        }
    }
}

/// Adds an event to its group, and gives the guest the group when it is complete.
fn collect(context: &VirtioContext, group: &mut Vec<InputEvent>, event: InputEvent) {
    if group.len() < MAX_GROUP {
        group.push(event);
    }
    if (event.kind, event.code) == (0, 0) {
        deliver(context, &std::mem::take(group));
    }
}

/// Gives the guest a group of events, wholly or not at all: half of one would tell of a key that is never released.
fn deliver(context: &VirtioContext, group: &[InputEvent]) {
    let Some(queue) = context.queue(EVENTS) else { return };
    let chains: Vec<Chain> = group.iter().map_while(|_| context.pop(queue)).collect();
    let whole = chains.len() == group.len();
    if !whole {
        context.warn_once("the guest takes no input events; some are lost");
    }
    for (chain, event) in chains.into_iter().zip(group) {
        let ([a, b], [c, d], [e, f, g, h]) =
            (event.kind.to_le_bytes(), event.code.to_le_bytes(), event.value.to_le_bytes());
        // What was taken for half a group comes back as an end of a group, which says nothing.
        let bytes = if whole { [a, b, c, d, e, f, g, h] } else { [0; EVENT_LEN] };
        let written = chain.writable.write(context.memory(), &bytes).unwrap_or(0);
        context.complete(chain, written as u32);
    }
}

/// Passes on what the guest says to the device, such as about lights.
fn take_status(context: &VirtioContext, device: &Evdev) {
    let Some(queue) = context.queue(STATUS) else { return };
    context.drain(queue, |chain| {
        let mut bytes = [0; EVENT_LEN];
        // The chain's buffers were checked to be in RAM.
        if chain.readable.read(context.memory(), &mut bytes).is_ok_and(|len| len == EVENT_LEN) {
            let [a, b, c, d, e, f, g, h] = bytes;
            let (kind, code) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
            // A device that takes none has no lights.
            let _ = device.write(InputEvent { kind, code, value: u32::from_le_bytes([e, f, g, h]) });
        }
        context.complete(chain, 0);
    });
}

impl VirtioDevice for Input {
    fn features(&self) -> u64 {
        0
    }

    fn config_read(&self, offset: u32, bytes: &mut [u8]) {
        let selection = *self.selection();
        read_structure(&structure(self.device.info(), selection.select, selection.subselect), offset, bytes);
    }

    fn config_write(&self, offset: u32, bytes: &[u8]) {
        let mut selection = self.selection();
        for (at, byte) in (offset..).zip(bytes) {
            match at {
                0 => selection.select = *byte,
                1 => selection.subselect = *byte,
                _ => {}
            }
        }
    }

    fn notify(&self, index: u16) {
        if index == STATUS {
            self.worker.wake(index);
        }
    }
}

impl Persist for Input {
    fn kind(&self) -> &'static str {
        "virtio-input"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        self.worker.wait_idle();
        encode(self.kind(), &*self.selection())
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        *self.selection() = decode(self.kind(), self.version(), version, bytes)?;
        Ok(())
    }

    fn reset(&self) {
        *self.selection() = Selection::default();
    }
}

#[cfg(test)]
mod tests;
