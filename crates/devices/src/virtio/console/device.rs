//! The device: all ports, configuration, state.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use backend::tty::SerialBackend;
use platform::state::{decode, encode};
use platform::{Persist, StateError};
use serde::{Deserialize, Serialize};

use super::control::{self, Event, Outbox};
use super::port::{Port, PortSpec, PortState};
use super::{CONTROL_IN, CONTROL_OUT, MAX_PORTS, input_queue};
use crate::factory::DeviceError;
use crate::virtio::worker::Worker;
use crate::virtio::{Chain, VirtioContext, VirtioDevice, read_structure};

/// Feature bits (5.3.3).
pub(super) mod feature {
    pub(in crate::virtio::console) const SIZE: u64 = 1;
    pub(in crate::virtio::console) const MULTIPORT: u64 = 2;
    pub(in crate::virtio::console) const EMERG_WRITE: u64 = 4;
}

/// Bytes of the configuration: columns, rows, ports, emergency write.
pub(super) const CONFIG_SIZE: usize = 12;
const EMERG_WRITE: u32 = 8;
/// Columns and rows of a console on nothing in particular.
const DEFAULT_SIZE: (u16, u16) = (80, 25);
/// Longest output of an earlier time that a state may hold.
const MAX_SAVED: usize = 1 << 20;

pub(super) struct Console {
    context: Arc<VirtioContext>,
    ports: Vec<Option<Arc<Port>>>,
    outbox: Mutex<Outbox>,
    worker: OnceLock<Worker>,
}

#[derive(Serialize, Deserialize)]
struct ConsoleState {
    ports: Vec<PortState>,
    outbox: Vec<Vec<u8>>,
}

impl Console {
    pub(super) fn new(context: Arc<VirtioContext>, ports: Vec<Option<PortSpec>>) -> Result<Arc<Self>, DeviceError> {
        let ports: Vec<_> =
            (0..).zip(ports).map(|(n, spec)| spec.map(|spec| Port::new(n, spec, context.clone()))).collect();
        let address = context.address();
        let console = Arc::new(Self { context, ports, outbox: Mutex::default(), worker: OnceLock::new() });
        let theirs = Arc::downgrade(&console);
        let work = move |queues| {
            if let Some(console) = theirs.upgrade() {
                console.serve(queues);
            }
        };
        let worker = Worker::spawn(format!("console-{}:{}", address.slot, address.func), work)
            .map_err(|source| DeviceError::Host { what: "start the thread of virtio-console".into(), source })?;
        // Set here and nowhere else.
        let _ = console.worker.set(worker);
        for port in console.ports.iter().flatten() {
            port.attach(Arc::downgrade(&console));
        }
        Ok(console)
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self, queue: u16) {
        if let Some(worker) = self.worker.get() {
            worker.wake(queue);
        }
    }

    fn wait_idle(&self) {
        if let Some(worker) = self.worker.get() {
            worker.wait_idle();
        }
    }

    fn port(&self, number: u32) -> Option<&Arc<Port>> {
        self.ports.get(usize::try_from(number).ok()?)?.as_ref()
    }

    /// A client came to a port or left it: tells a driver that knows the port.
    pub(super) fn port_changed(&self, port: &Port) {
        let mut state = port.state();
        let here = port.has_client();
        if state.ready && state.host_open != here {
            state.host_open = here;
            self.outbox().push(port.number, Event::PortOpen, here.into(), &[]);
            drop(state);
            self.wake(CONTROL_IN);
        }
    }

    /// A port's terminal has another size.
    pub(super) fn port_resized(&self, port: &Port, columns: u16, rows: u16) {
        if port.state().ready {
            self.outbox().push(port.number, Event::Resize, 0, &size_bytes((columns, rows)));
            self.wake(CONTROL_IN);
        }
        if port.number == 0 {
            self.context.config_changed();
        }
    }

    /// On the device's thread: looks at the queues whose bits are set.
    fn serve(&self, queues: u64) {
        let set = |queue: u16| queues & 1 << queue != 0;
        if set(CONTROL_OUT)
            && let Some(queue) = self.context.queue(CONTROL_OUT)
        {
            self.context.drain(queue, |chain| {
                self.control(&chain);
                self.context.complete(chain, 0);
            });
        }
        self.send_control();
        for port in self.ports.iter().flatten() {
            let input = input_queue(port.number);
            if set(input) {
                port.spec.tty.resume_input();
            }
            if set(input + 1) {
                port.take_output();
            }
        }
    }

    /// A message of the driver.
    fn control(&self, chain: &Chain) {
        let mut bytes = [0; control::LEN];
        let whole = chain.readable.read(self.context.memory(), &mut bytes).is_ok_and(|len| len == control::LEN);
        let Some((number, event, value)) = control::parse(bytes).filter(|_| whole) else { return };
        match (event, self.port(number)) {
            (Event::DeviceReady, _) if value != 0 => {
                let mut outbox = self.outbox();
                self.ports.iter().flatten().for_each(|port| outbox.push(port.number, Event::PortAdd, 0, &[]));
            }
            (Event::PortReady, Some(port)) if value != 0 => self.introduce(port),
            (Event::PortOpen, Some(port)) => {
                port.state().guest_open = value != 0;
                if value != 0 {
                    port.spec.tty.resume_input();
                }
            }
            _ => {}
        }
    }

    /// Tells the driver what there is to know of a port.
    fn introduce(&self, port: &Port) {
        let mut state = port.state();
        state.ready = true;
        state.host_open = port.has_client();
        let mut outbox = self.outbox();
        if port.spec.terminal {
            outbox.push(port.number, Event::ConsolePort, 1, &[]);
            if let Some(size) = state.size {
                outbox.push(port.number, Event::Resize, 0, &size_bytes(size));
            }
        }
        if !port.spec.name.is_empty() {
            // Linux wants the terminating NUL, and cuts it off.
            outbox.push(port.number, Event::PortName, 1, &[port.spec.name.as_bytes(), &[0]].concat());
        }
        if state.host_open {
            outbox.push(port.number, Event::PortOpen, 1, &[]);
        }
    }

    /// Gives the driver the messages for which it has room.
    fn send_control(&self) {
        let Some(queue) = self.context.queue(CONTROL_IN) else { return };
        let mut outbox = self.outbox();
        while !outbox.0.is_empty() {
            let Some(chain) = self.context.pop(queue) else {
                if queue.enable_notifications() {
                    continue;
                }
                return;
            };
            let message = outbox.0.pop_front().unwrap_or_default();
            let written = chain.writable.write(self.context.memory(), &message).unwrap_or(0);
            self.context.complete(chain, written as u32);
        }
    }

    fn size(&self) -> (u16, u16) {
        self.port(0).and_then(|port| port.state().size).unwrap_or(DEFAULT_SIZE)
    }
}

/// A size as the driver wants it in a message.
fn size_bytes((columns, rows): (u16, u16)) -> [u8; 4] {
    let ([a, b], [c, d]) = (columns.to_le_bytes(), rows.to_le_bytes());
    [a, b, c, d]
}

impl VirtioDevice for Console {
    fn features(&self) -> u64 {
        feature::SIZE | feature::MULTIPORT | feature::EMERG_WRITE
    }

    fn config_read(&self, offset: u32, bytes: &mut [u8]) {
        let mut structure = [0; CONFIG_SIZE];
        structure[..4].copy_from_slice(&size_bytes(self.size()));
        structure[4] = MAX_PORTS as u8;
        read_structure(&structure, offset, bytes);
    }

    fn config_write(&self, offset: u32, bytes: &[u8]) {
        if let (EMERG_WRITE, Some(byte), Some(port)) = (offset, bytes.first(), self.port(0)) {
            // For the last words of a guest in trouble; what does not fit is lost.
            port.spec.tty.send(&[*byte]);
        }
    }

    fn notify(&self, index: u16) {
        self.wake(index);
    }
}

impl Persist for Console {
    fn kind(&self) -> &'static str {
        "virtio-console"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        self.wait_idle();
        let ports =
            self.ports.iter().map(|port| port.as_ref().map_or_else(PortState::default, |port| port.state().clone()));
        let state = ConsoleState { ports: ports.collect(), outbox: self.outbox().0.iter().cloned().collect() };
        encode(self.kind(), &state)
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let state: ConsoleState = decode(self.kind(), self.version(), version, bytes)?;
        let too_long = state.ports.iter().any(|port| port.output.len() > MAX_SAVED)
            || state.outbox.iter().any(|message| message.len() > MAX_SAVED);
        if state.ports.len() != MAX_PORTS || too_long {
            return Err(StateError::Invalid { kind: self.kind(), why: "not the ports of this device".into() });
        }
        for (port, saved) in self.ports.iter().zip(state.ports) {
            if let Some(port) = port {
                let size = port.state().size.or(saved.size);
                *port.state() = PortState { size, ..saved };
            }
        }
        self.outbox().0 = state.outbox.into();
        // Who is at the other ends now may be others than then.
        self.ports.iter().flatten().for_each(|port| self.port_changed(port));
        Ok(())
    }

    fn reset(&self) {
        self.wait_idle();
        self.outbox().0.clear();
        for port in self.ports.iter().flatten() {
            let mut state = port.state();
            *state = PortState { size: state.size, ..PortState::default() };
        }
    }
}
