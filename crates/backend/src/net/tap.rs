//! Linux tap devices (the kernel's Documentation/networking/tuntap.rst): a network interface of the host whose other end
//! is the guest's NIC. With the header of virtio in front of each packet, checksums and segmentation are left to
//! whoever is able.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, JoinHandle};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::options::NicOptions;
use super::{
    Abilities, Delivery, Frame, MAX_PACKET, NetBackend, NetDevice, NetError, Offloads, Packet, PacketHeader, Sending,
    sys,
};
use crate::tty::wake::{Wake, readable};

const CONTROL: &str = "/dev/net/tun";

/// `TUN_F_` flags.
const KERNEL_OFFLOADS: [(Offloads, u32); 4] =
    [(Offloads::CHECKSUM, 1), (Offloads::TCP4, 2), (Offloads::TCP6, 4), (Offloads::ECN, 8)];

/// A tap device.
pub(super) struct Tap {
    name: String,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    device: OnceLock<Weak<dyn NetDevice>>,
    queues: Vec<Queue>,
    stop: AtomicBool,
    offloads: AtomicU32,
}

struct Queue {
    file: File,
    /// Wakes the reader: there is a device, or room, or it shall end.
    wake: Wake,
}

impl Tap {
    /// Opens the interface `name`; makes it, puts it up and sets its MTU as far as that is needed and permitted.
    pub(super) fn open(name: &str, options: &NicOptions) -> Result<Arc<Self>, NetError> {
        let failed = |what, advice| move |source: io::Error| NetError::Tap { what, name: name.into(), advice, source };
        if name.len() > sys::MAX_INTERFACE_NAME || name.contains('/') {
            let why = format!("the name of an interface has at most {} characters", sys::MAX_INTERFACE_NAME);
            return Err(NetError::Value { option: "backend", value: name.into(), why });
        }
        let queues = (0..options.queues)
            .map(|_| {
                let mut open = OpenOptions::new();
                let file = open
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(CONTROL)
                    .map_err(|source| NetError::Host { what: format!("open {CONTROL} for {name}"), source })?;
                sys::tap_bind(file.as_fd(), name, options.queues > 1).map_err(|why| {
                    let advice = advice(&why);
                    failed("open or make", advice)(why)
                })?;
                sys::tap_header(file.as_fd(), PacketHeader::SIZE).map_err(failed("set up", ""))?;
                let wake = Wake::new().map_err(failed("wait for", ""))?;
                Ok(Queue { file, wake })
            })
            .collect::<Result<Vec<_>, NetError>>()?;
        configure(name, options.mtu);
        let shared = Arc::new(Shared {
            device: OnceLock::new(),
            queues,
            stop: AtomicBool::new(false),
            offloads: AtomicU32::new(0),
        });
        shared.set_offloads(Offloads::empty());
        let mut tap = Self { name: name.into(), shared, threads: Vec::new() };
        for index in 0..options.queues {
            let shared = tap.shared.clone();
            let thread = thread::Builder::new().name(format!("{name}-rx{index}")).spawn(move || shared.read_all(index));
            tap.threads.push(thread.map_err(failed("start a thread for", ""))?);
        }
        Ok(Arc::new(tap))
    }
}

/// What helps against a failure to bind to an interface.
fn advice(why: &io::Error) -> &'static str {
    match why.raw_os_error() {
        Some(libc::EPERM) => {
            " (make it for this user first: ip tuntap add NAME mode tap user USER; or use slirp, which needs no rights)"
        }
        Some(libc::EBUSY) => " (another program uses it)",
        Some(libc::EINVAL) => {
            " (an interface of that name is no tap device, or one made with another number of queues: multi_queue goes with queues=)"
        }
        _ => "",
    }
}

/// Puts the interface up and sets its MTU. Both may be somebody else's task: then what is wrong is only said.
fn configure(name: &str, mtu: Option<u16>) {
    let Ok(socket) = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None) else { return };
    if let Some(mtu) = mtu
        && let Err(why) = sys::set_interface_mtu(socket.as_fd(), name, mtu)
    {
        log::warn!("{name}: cannot set the MTU to {mtu}: {why}");
    }
    let up = libc::IFF_UP as i16;
    match sys::interface_flags(socket.as_fd(), name) {
        Ok(flags) if flags & up == 0 => {
            if let Err(why) = sys::set_interface_flags(socket.as_fd(), name, flags | up) {
                log::warn!("{name} is down and cannot be put up: {why}");
            }
        }
        _ => {}
    }
}

impl Shared {
    fn set_offloads(&self, offloads: Offloads) {
        let flags =
            KERNEL_OFFLOADS.iter().filter(|(bit, _)| offloads.contains(*bit)).fold(0, |flags, (_, flag)| flags | flag);
        self.offloads.store(flags, Ordering::Relaxed);
        for queue in &self.queues {
            if let Err(why) = sys::tap_offloads(queue.file.as_fd(), flags) {
                log::warn!("a tap device refuses offloads {flags:#x}: {why}");
            }
        }
    }

    /// Hands packets to the device until the back end or the interface ends.
    fn read_all(&self, index: u16) {
        let Some(queue) = self.queues.get(usize::from(index)) else { return };
        let mut buffer = vec![0; PacketHeader::SIZE + MAX_PACKET];
        while !self.stop.load(Ordering::Acquire) {
            let Some(device) = self.device.get() else {
                readable(None, &queue.wake);
                queue.wake.clear();
                continue;
            };
            match (&queue.file).read(&mut buffer) {
                Ok(count) if count > PacketHeader::SIZE => self.deliver(queue, index, device, &buffer[..count]),
                Ok(_) => {}
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => {
                    if !readable(Some(queue.file.as_fd()), &queue.wake) {
                        queue.wake.clear();
                    }
                }
                Err(_) => {
                    // The interface was deleted.
                    if let Some(device) = device.upgrade() {
                        device.set_link(false);
                    }
                    return;
                }
            }
        }
    }

    /// Hands over one packet, waiting for room.
    fn deliver(&self, queue: &Queue, index: u16, device: &Weak<dyn NetDevice>, bytes: &[u8]) {
        let mut header = [0; PacketHeader::SIZE];
        let (front, packet) = bytes.split_at(PacketHeader::SIZE);
        header.copy_from_slice(front);
        let packet = Packet { header: PacketHeader::decode(header), pieces: &[packet] };
        while !self.stop.load(Ordering::Acquire) {
            let Some(device) = device.upgrade() else { return };
            if device.receive(index, &packet) == Delivery::Done {
                return;
            }
            drop(device);
            readable(None, &queue.wake);
            queue.wake.clear();
        }
    }
}

impl NetBackend for Tap {
    fn abilities(&self) -> Abilities {
        Abilities { send: Offloads::all(), receive: Offloads::all() }
    }

    fn link(&self) -> bool {
        true
    }

    fn attach(&self, device: Weak<dyn NetDevice>) {
        if self.shared.device.set(device).is_ok() {
            self.shared.queues.iter().for_each(|queue| queue.wake.set());
        }
    }

    fn send(&self, queue: u16, frame: &Frame<'_>) -> Sending {
        if let Some(queue) = self.shared.queues.get(usize::from(queue)) {
            let header = frame.header.encode();
            // The kernel takes a packet whole or refuses it: one that is nonsense, or any while the interface is down.
            let _ = frame.send(queue.file.as_fd(), sys::Way::Device, &header, (0, MAX_PACKET));
        }
        Sending::Taken
    }

    fn resume(&self, queue: u16) {
        if let Some(queue) = self.shared.queues.get(usize::from(queue)) {
            queue.wake.set();
        }
    }

    fn set_offloads(&self, offloads: Offloads) {
        self.shared.set_offloads(offloads);
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.queues.iter().for_each(|queue| queue.wake.set());
        for thread in self.threads.drain(..).filter(|thread| thread.thread().id() != thread::current().id()) {
            if thread.join().is_err() {
                log::warn!("a thread of {} failed", self.name);
            }
        }
    }
}
