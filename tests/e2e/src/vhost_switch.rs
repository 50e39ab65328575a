//! A switch of two ports that speaks vhost-user: what one NIC sends, the other receives.
//!
//! It is made of the published crates for such back ends, so that our side of the protocol is tried against another's.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Pairs of queues of each port.
pub const PAIRS: usize = 2;

/// Feature bits of virtio-net and of the transport: checksums are left to the receiver.
const FEATURES: u64 = 1 << 0 | 1 << 1 | 1 << 29 | 1 << 32;

/// Where the packets for each port go: its first receive queue, once it is known.
type Ports = [Option<(VringMutex, Memory)>; 2];

struct Port {
    number: usize,
    memory: Memory,
    ports: Arc<Mutex<Ports>>,
}

/// Starts the switch; a NIC each can connect to the sockets.
///
/// # Panics
/// The sockets cannot be made.
pub fn start(sockets: [&Path; 2]) {
    let ports: Arc<Mutex<Ports>> = Arc::default();
    for (number, socket) in sockets.into_iter().enumerate() {
        let mut listener = Listener::new(socket, true).expect("a socket");
        let memory = Memory::new(GuestMemoryMmap::new());
        let port = Port { number, memory: memory.clone(), ports: ports.clone() };
        let port = Arc::new(Mutex::new(port));
        let mut daemon = VhostUserDaemon::new(format!("port{number}"), port, memory).expect("a vhost-user back end");
        thread::spawn(move || {
            daemon.start(&mut listener).expect("a connection");
            // It ends with an error when the VM does.
            let _ = daemon.wait();
        });
    }
}

impl Port {
    /// Takes a packet off a transmit queue.
    fn take(&self, queue: &VringMutex) -> Option<Vec<u8>> {
        let memory = self.memory.memory();
        let chain = queue.get_mut().get_queue_mut().pop_descriptor_chain(memory.clone())?;
        let head = chain.head_index();
        let mut packet = Vec::new();
        chain.reader(&memory).expect("buffers in memory").read_to_end(&mut packet).expect("buffers in memory");
        queue.add_used(head, 0).expect("a used ring");
        Some(packet)
    }

    /// Puts a packet on the other port's receive queue; without room there it is lost, as networks may.
    fn forward(&self, packet: &[u8]) {
        let ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((queue, memory)) = &ports[1 - self.number] else { return };
        let memory = memory.memory();
        let Some(chain) = queue.get_mut().get_queue_mut().pop_descriptor_chain(memory.clone()) else { return };
        let head = chain.head_index();
        let mut packet = packet.to_vec();
        // One buffer holds the whole packet: `num_buffers` of the header.
        packet[10..12].copy_from_slice(&1u16.to_le_bytes());
        let written = chain.writer(&memory).expect("buffers in memory").write(&packet).unwrap_or(0);
        queue.add_used(head, written as u32).expect("a used ring");
        if queue.needs_notification().expect("a used ring") {
            queue.signal_used_queue().expect("an event");
        }
    }
}

impl VhostUserBackendMut for Port {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        2 * PAIRS
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    /// The queues know.
    fn set_event_idx(&mut self, _: bool) {}

    fn update_memory(&mut self, memory: Memory) -> std::io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn handle_event(&mut self, queue: u16, _: EventSet, queues: &[VringMutex], _: usize) -> std::io::Result<()> {
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        ports[self.number] = Some((queues[0].clone(), self.memory.clone()));
        drop(ports);
        // Odd ones are for transmission.
        let Some(queue) = queues.get(usize::from(queue)).filter(|_| queue % 2 == 1) else { return Ok(()) };
        loop {
            queue.disable_notification().expect("a used ring");
            while let Some(packet) = self.take(queue) {
                self.forward(&packet);
            }
            if queue.needs_notification().expect("a used ring") {
                queue.signal_used_queue()?;
            }
            if !queue.enable_notification().expect("a used ring") {
                return Ok(());
            }
        }
    }
}
