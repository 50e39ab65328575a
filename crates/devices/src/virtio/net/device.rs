//! The NIC behind the transport. Each pair of queues has a thread for what the guest sends; what it receives comes on the
//! back end's threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use backend::net::{Delivery, NetBackend, NetDevice, NicOptions, Offloads, Packet, PacketHeader};
use platform::state::{decode, encode};
use platform::{Persist, StateError};

use super::bit;
use super::filter::NetState;
use super::receive::Room;
use crate::factory::DeviceError;
use crate::virtio::worker::Worker;
use crate::virtio::{VirtioContext, VirtioDevice, feature, read_structure};

/// Bytes of the configuration structure (5.1.4).
pub(super) const CONFIG_SIZE: usize = 12;

const LINK_UP: u8 = 1;

/// Features for the driver's work, by what the back end can do.
const SEND: [(Offloads, u64); 4] = [
    (Offloads::CHECKSUM, bit::CSUM),
    (Offloads::TCP4, bit::HOST_TSO4),
    (Offloads::TCP6, bit::HOST_TSO6),
    (Offloads::ECN, bit::HOST_ECN),
];
const RECEIVE: [(Offloads, u64); 4] = [
    (Offloads::CHECKSUM, bit::GUEST_CSUM),
    (Offloads::TCP4, bit::GUEST_TSO4),
    (Offloads::TCP6, bit::GUEST_TSO6),
    (Offloads::ECN, bit::GUEST_ECN),
];

/// What a queue is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    Receive(u16),
    Transmit(u16),
    Control,
}

pub(super) struct Net {
    pub(super) context: Arc<VirtioContext>,
    pub(super) backend: Option<Arc<dyn NetBackend>>,
    pub(super) max_pairs: u16,
    mtu: Option<u16>,
    power_on: NetState,
    state: Mutex<NetState>,
    /// Copy of the state's link, for the way of each packet.
    link: AtomicBool,
    /// For each pair, the buffers being filled; the lock is held while they are.
    pub(super) room: Vec<Mutex<Room>>,
    workers: OnceLock<Vec<Worker>>,
}

impl Net {
    pub(super) fn new(
        context: Arc<VirtioContext>,
        backend: Option<Arc<dyn NetBackend>>,
        options: &NicOptions,
    ) -> Result<Arc<Self>, DeviceError> {
        let link = backend.as_ref().is_some_and(|backend| backend.link());
        let power_on = NetState::new(options.mac, link);
        let net = Arc::new(Self {
            context,
            backend,
            max_pairs: options.queues,
            mtu: options.mtu,
            state: Mutex::new(power_on.clone()),
            power_on,
            link: AtomicBool::new(link),
            room: (0..options.queues).map(|_| Mutex::default()).collect(),
            workers: OnceLock::new(),
        });
        let workers = (0..options.queues).map(|pair| spawn(&net, &format!("{}-tx{pair}", options.name)));
        // The cell was empty: it was made a moment ago.
        let _ = net.workers.set(workers.collect::<Result<_, _>>()?);
        if let Some(backend) = &net.backend {
            let device: Arc<dyn NetDevice> = net.clone();
            backend.attach(Arc::downgrade(&device));
        }
        Ok(net)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, NetState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has_link(&self) -> bool {
        self.link.load(Ordering::Relaxed)
    }

    /// Whether a driver is there to receive.
    pub(super) fn is_started(&self) -> bool {
        self.has_link() && self.context.is_driver_ok()
    }

    /// Bytes of the header before each packet (5.1.6.1).
    pub(super) fn header_len(&self) -> usize {
        let features = self.context.features();
        PacketHeader::SIZE + if features & (feature::VERSION_1 | bit::MRG_RXBUF) != 0 { 2 } else { 0 }
    }

    /// The pair whose queue takes a packet from the back end's queue `queue`; `None` if the driver does not want it.
    pub(super) fn pair_for(&self, queue: u16, start: &[u8]) -> Option<u16> {
        let state = self.state();
        let pair = if queue < state.pairs { queue } else { 0 };
        state.accepts(start, self.context.has(bit::CTRL_VLAN)).then_some(pair)
    }

    /// Without multi-queue, the control queue comes right after the first pair (5.1.2).
    pub(super) fn role(&self, index: u16) -> Option<Role> {
        let pairs = if self.context.has(bit::MQ) { self.max_pairs } else { 1 };
        match index {
            _ if index == 2 * pairs => Some(Role::Control),
            _ if index > 2 * pairs => None,
            _ if index.is_multiple_of(2) => Some(Role::Receive(index / 2)),
            _ => Some(Role::Transmit(index / 2)),
        }
    }

    /// On a worker's thread.
    fn serve(&self, queues: u64) {
        for index in (0..64).filter(|index| queues & 1 << index != 0) {
            match self.role(index) {
                Some(Role::Transmit(pair)) => self.transmit(index, pair),
                Some(Role::Control) => self.serve_control(index),
                Some(Role::Receive(_)) | None => {}
            }
        }
    }

    fn wake(&self, worker: u16, index: u16) {
        if let Some(worker) = self.workers.get().and_then(|workers| workers.get(usize::from(worker))) {
            worker.wake(index);
        }
    }

    /// Tells the back end what the driver takes.
    pub(super) fn tell_offloads(&self) {
        let Some(backend) = &self.backend else { return };
        let features = self.context.features();
        let taken = self.state().offloads.map_or(features, |offloads| features & offloads);
        let taken =
            RECEIVE.iter().filter(|(_, bit)| taken & bit != 0).fold(Offloads::empty(), |all, (one, _)| all | *one);
        backend.set_offloads(taken);
    }

    fn structure(&self) -> [u8; CONFIG_SIZE] {
        let state = self.state();
        structure(state.mac, state.link, self.max_pairs, self.mtu)
    }
}

/// The configuration structure.
pub(super) fn structure(mac: [u8; 6], link: bool, max_pairs: u16, mtu: Option<u16>) -> [u8; CONFIG_SIZE] {
    let [a, b, c, d, e, f] = mac;
    let [pairs_low, pairs_high] = max_pairs.to_le_bytes();
    let [mtu_low, mtu_high] = mtu.unwrap_or(0).to_le_bytes();
    [a, b, c, d, e, f, u8::from(link) * LINK_UP, 0, pairs_low, pairs_high, mtu_low, mtu_high]
}

fn spawn(net: &Arc<Net>, name: &str) -> Result<Worker, DeviceError> {
    let net = Arc::downgrade(net);
    let serve = move |queues| {
        if let Some(net) = Weak::upgrade(&net) {
            net.serve(queues);
        }
    };
    Worker::spawn(name.into(), serve)
        .map_err(|source| DeviceError::Host { what: format!("start thread {name} of virtio-net"), source })
}

impl NetDevice for Net {
    fn receive(&self, queue: u16, packet: &Packet<'_>) -> Delivery {
        self.deliver(queue, packet)
    }

    fn send_ready(&self, queue: u16) {
        self.wake(queue, 2 * queue + 1);
    }

    fn set_link(&self, up: bool) {
        let mut state = self.state();
        let changed = std::mem::replace(&mut state.link, up) != up;
        self.link.store(up, Ordering::Relaxed);
        drop(state);
        if changed {
            self.context.config_changed();
        }
    }
}

impl VirtioDevice for Net {
    fn features(&self) -> u64 {
        let several = if self.max_pairs > 1 { bit::MQ } else { 0 };
        self.legacy_features() | several
    }

    fn legacy_features(&self) -> u64 {
        let mut features = bit::MAC | bit::STATUS | bit::MRG_RXBUF;
        features |= bit::CTRL_VQ | bit::CTRL_RX | bit::CTRL_RX_EXTRA | bit::CTRL_VLAN | bit::CTRL_MAC_ADDR;
        if self.mtu.is_some() {
            features |= bit::MTU;
        }
        let abilities = self.backend.as_ref().map(|backend| backend.abilities()).unwrap_or_default();
        for (offloads, table) in [(abilities.send, SEND), (abilities.receive, RECEIVE)] {
            for (_, bit) in table.iter().filter(|(ability, _)| offloads.contains(*ability)) {
                features |= bit;
            }
        }
        if abilities.receive.is_empty() { features } else { features | bit::CTRL_GUEST_OFFLOADS }
    }

    fn config_read(&self, offset: u32, bytes: &mut [u8]) {
        read_structure(&self.structure(), offset, bytes);
    }

    /// Only the address can be written, and only by legacy drivers (5.1.4.3); others use the control queue.
    fn config_write(&self, offset: u32, bytes: &[u8]) {
        if self.context.has(feature::VERSION_1) {
            return;
        }
        let mut state = self.state();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, byte) in state.mac.iter_mut().skip(from).zip(bytes) {
            *to = *byte;
        }
    }

    fn start(&self) {
        self.tell_offloads();
    }

    fn notify(&self, index: u16) {
        match self.role(index) {
            Some(Role::Transmit(pair)) => self.wake(pair, index),
            Some(Role::Control) => self.wake(0, index),
            Some(Role::Receive(pair)) => {
                let (Some(queue), Some(backend)) = (self.context.queue(index), &self.backend) else { return };
                // In this order: whoever finds no room from here on asks for another doorbell.
                queue.suppress_notifications();
                backend.resume(pair);
                if pair == 0 {
                    // The first pair stands in for those that are not in use.
                    let used = self.state().pairs;
                    (used..self.max_pairs).for_each(|pair| backend.resume(pair));
                }
            }
            None => {}
        }
    }
}

impl Persist for Net {
    fn kind(&self) -> &'static str {
        "virtio-net"
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        self.workers.get().into_iter().flatten().for_each(Worker::wait_idle);
        encode(self.kind(), &*self.state())
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let state: NetState = decode(self.kind(), self.version(), version, bytes)?;
        if !state.is_valid(self.max_pairs) {
            return Err(StateError::Invalid { kind: self.kind(), why: "lists or queues beyond the device's".into() });
        }
        // The link is that of this host.
        let link = self.has_link();
        *self.state() = NetState { link, ..state };
        Ok(())
    }

    fn reset(&self) {
        let mut state = self.state();
        *state = NetState { link: state.link, ..self.power_on.clone() };
        drop(state);
        if let Some(backend) = &self.backend {
            backend.set_offloads(Offloads::empty());
        }
    }
}
