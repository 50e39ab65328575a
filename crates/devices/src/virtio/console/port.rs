//! One port: queues on one side, a host end on the other.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use backend::tty::{SerialBackend, SerialDevice, Tty};
use serde::{Deserialize, Serialize};

use super::device::Console;
use super::input_queue;
use crate::virtio::{Chain, VirtioContext};

/// Output of one buffer, at most; Linux sends 32 KiB at a time.
const MAX_OUTPUT: usize = 1 << 20;

/// What a port is made of.
pub(super) struct PortSpec {
    pub(super) name: String,
    /// Whether the guest makes it a console.
    pub(super) terminal: bool,
    pub(super) tty: Arc<Tty>,
}

/// What of a port survives a snapshot.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct PortState {
    /// The driver is ready to hear of the port.
    pub(super) ready: bool,
    /// A program in the guest has it open.
    pub(super) guest_open: bool,
    /// What the driver knows of clients on the host.
    pub(super) host_open: bool,
    /// Output that the host has not taken yet.
    pub(super) output: Vec<u8>,
    /// Columns and rows.
    pub(super) size: Option<(u16, u16)>,
}

/// A port in use. Lock order: port, then outbox, then queue.
pub(super) struct Port {
    pub(super) number: usize,
    pub(super) spec: PortSpec,
    pub(super) state: Mutex<PortState>,
    /// Whether the host's end has somebody at it, as far as it has told.
    pub(super) client: Mutex<bool>,
    context: Arc<VirtioContext>,
    console: OnceLock<Weak<Console>>,
}

impl Port {
    pub(super) fn new(number: usize, spec: PortSpec, context: Arc<VirtioContext>) -> Arc<Self> {
        let client = Mutex::new(!spec.tty.has_clients());
        Arc::new(Self { number, spec, state: Mutex::default(), client, context, console: OnceLock::new() })
    }

    /// Lets the host's end begin.
    pub(super) fn attach(self: &Arc<Self>, console: Weak<Console>) {
        // Once, by the device that has just been made.
        let _ = self.console.set(console);
        let device: Arc<dyn SerialDevice> = self.clone();
        self.spec.tty.attach(Arc::downgrade(&device));
    }

    pub(super) fn state(&self) -> MutexGuard<'_, PortState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has_client(&self) -> bool {
        *self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn console(&self) -> Option<Arc<Console>> {
        self.console.get().and_then(Weak::upgrade)
    }

    /// Takes output from the driver, as long as the host takes it.
    pub(super) fn take_output(&self) {
        let Some(queue) = self.context.queue(input_queue(self.number) + 1) else { return };
        let mut state = self.state();
        loop {
            if !self.pass_on(&mut state.output) {
                return;
            }
            let Some(chain) = self.context.pop(queue) else {
                if queue.enable_notifications() {
                    continue;
                }
                return;
            };
            state.output = self.bytes_of(&chain);
            self.context.complete(chain, 0);
        }
    }

    /// Gives output to the host; whether it took all.
    fn pass_on(&self, output: &mut Vec<u8>) -> bool {
        let taken = if output.is_empty() { 0 } else { self.spec.tty.send(output) };
        output.drain(..taken.min(output.len()));
        output.is_empty()
    }

    fn bytes_of(&self, chain: &Chain) -> Vec<u8> {
        let len = usize::try_from(chain.readable.len()).unwrap_or(usize::MAX);
        if len > MAX_OUTPUT {
            self.context.warn_once("output of more than a megabyte in one buffer is cut");
        }
        let mut bytes = vec![0; len.min(MAX_OUTPUT)];
        // The chain's buffers were checked to be in RAM.
        let read = chain.readable.read(self.context.memory(), &mut bytes).unwrap_or(0);
        bytes.truncate(read);
        bytes
    }

    /// Whether input is wanted: a port that no program has open loses it, but for a console.
    fn wants_input(&self) -> bool {
        let multiport = self.context.has(super::device::feature::MULTIPORT);
        !multiport && self.number == 0 || self.spec.terminal || self.state().guest_open
    }
}

impl SerialDevice for Port {
    fn receive(&self, bytes: &[u8]) -> usize {
        let Some(queue) = self.context.queue(input_queue(self.number)) else { return bytes.len() };
        if !self.wants_input() {
            return 0;
        }
        let mut taken = 0;
        while let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty()) {
            match self.context.pop(queue) {
                Some(chain) => {
                    let written = chain.writable.write(self.context.memory(), rest).unwrap_or(0);
                    self.context.complete(chain, written as u32);
                    taken += written;
                }
                None if queue.enable_notifications() => {}
                None => break,
            }
        }
        taken
    }

    fn output_ready(&self) {
        if let Some(console) = self.console() {
            console.wake(input_queue(self.number) + 1);
        }
    }

    fn client(&self, here: bool) {
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = here;
        if let Some(console) = self.console() {
            console.port_changed(self);
        }
    }

    fn resized(&self, columns: u16, rows: u16) {
        self.state().size = Some((columns, rows));
        if let Some(console) = self.console() {
            console.port_resized(self, columns, rows);
        }
    }
}
