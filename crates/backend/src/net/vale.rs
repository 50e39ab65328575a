//! A switch between the VMs of one user, named as the ports of FreeBSD's VALE switches: `valeX:PORT`.
//!
//! There is no process in the middle. Each port is a datagram socket, `PORT` in the switch's folder, which only the user
//! can enter. A sender learns from what it receives which port has which address, and sends to all others what it does
//! not know. A datagram is a packet behind its [`PacketHeader`]: work that the receiving guest does not take is done
//! at the receiver.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::options::NicOptions;
use super::{
    Abilities, Delivery, ETHERNET_HEADER, Frame, MAX_PACKET, NetBackend, NetDevice, NetError, Offloads, Packet,
    PacketHeader, Sending, offload,
};
use crate::tty::wake::{Wake, readable};

/// How long a packet may wait for room at its receiver. A receiver that has none for so long is not waited for again
/// for some time.
const PATIENCE: Duration = Duration::from_millis(50);
const PENALTY: Duration = Duration::from_secs(1);

/// Addresses that are remembered.
const MAX_ADDRESSES: usize = 1024;

/// Longest name of a switch or a port: a socket's path is short.
const MAX_NAME: usize = 32;

/// A port of a switch.
pub(super) struct Port {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    path: PathBuf,
    socket: UnixDatagram,
    device: OnceLock<Weak<dyn NetDevice>>,
    peers: Mutex<Peers>,
    offloads: AtomicU8,
    wake: Wake,
    stop: AtomicBool,
}

#[derive(Default)]
struct Peers {
    by_address: HashMap<[u8; 6], PathBuf>,
    /// Until when a port is not waited for.
    slow: HashMap<PathBuf, Instant>,
}

impl Port {
    /// Opens port `name`, which is `valeX:PORT`.
    pub(super) fn open(name: &str, options: &NicOptions) -> Result<Arc<Self>, NetError> {
        let wrong = || NetError::Value {
            option: "backend",
            value: name.into(),
            why: format!("write valeX:PORT; names are up to {MAX_NAME} letters, digits, \"-\" and \"_\""),
        };
        let fits = |part: &&str| {
            let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            (1..=MAX_NAME).contains(&part.len()) && part.bytes().all(good)
        };
        let (switch, port) = name.split_once(':').filter(|(a, b)| fits(a) && fits(b)).ok_or_else(wrong)?;
        let folder = folder().join(switch);
        let path = folder.join(port);
        let failed = |what, advice| {
            let path = path.clone();
            move |source: io::Error| NetError::Socket { what, path, advice, source }
        };
        prepare(&folder).map_err(failed("make the folder of", ""))?;
        let socket = bind(&path).map_err(|why| {
            let used = why.kind() == io::ErrorKind::AddrInUse;
            failed("make the port", if used { " (another VM is plugged in there)" } else { "" })(why)
        })?;
        socket.set_write_timeout(Some(PATIENCE)).map_err(failed("set up", ""))?;
        let wake = Wake::new().map_err(failed("wait for", ""))?;
        let shared = Arc::new(Shared {
            path: path.clone(),
            socket,
            device: OnceLock::new(),
            peers: Mutex::default(),
            offloads: AtomicU8::new(0),
            wake,
            stop: AtomicBool::new(false),
        });
        let theirs = shared.clone();
        let thread = thread::Builder::new().name(format!("{}-rx", options.name)).spawn(move || theirs.run());
        Ok(Arc::new(Self { shared, thread: Some(thread.map_err(failed("start a thread for", ""))?) }))
    }
}

/// Where a user's switches are.
fn folder() -> PathBuf {
    let user = rustix::process::geteuid().as_raw();
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder).join("bhyve-vale"),
        None => std::env::temp_dir().join(format!("bhyve-vale-{user}")),
    }
}

/// Makes a switch's folder, that of the user above it first. What is there already must be the user's alone.
fn prepare(folder: &Path) -> io::Result<()> {
    let own = folder.parent().unwrap_or(folder);
    for path in [own, folder] {
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(why) if why.kind() != io::ErrorKind::AlreadyExists => return Err(why),
            _ => {}
        }
        let metadata = fs::symlink_metadata(path)?;
        if !metadata.is_dir() || metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
            let why = format!("{} must be a folder that only this user can enter", path.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
    }
    Ok(())
}

/// Binds a port; what a process that is gone left there is replaced.
fn bind(path: &Path) -> io::Result<UnixDatagram> {
    match UnixDatagram::bind(path) {
        Err(why) if why.kind() == io::ErrorKind::AddrInUse => {
            if !fs::symlink_metadata(path)?.file_type().is_socket() {
                return Err(why);
            }
            match UnixDatagram::unbound()?.connect(path) {
                Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {}
                _ => return Err(why),
            }
            fs::remove_file(path)?;
            UnixDatagram::bind(path)
        }
        result => result,
    }
}

impl Shared {
    fn peers(&self) -> std::sync::MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends to one port.
    fn send_to(&self, path: &Path, packet: &[u8]) {
        let now = Instant::now();
        let slow = self.peers().slow.get(path).is_some_and(|until| *until > now);
        // Without a wait there is only what fits at once.
        let flags = if slow { rustix::net::SendFlags::DONTWAIT } else { rustix::net::SendFlags::empty() };
        let Ok(address) = rustix::net::SocketAddrUnix::new(path) else { return };
        match rustix::net::sendto(&self.socket, packet, flags | rustix::net::SendFlags::NOSIGNAL, &address) {
            Err(rustix::io::Errno::AGAIN) if !slow => {
                let mut peers = self.peers();
                peers.slow.retain(|_, until| *until > now);
                peers.slow.insert(path.into(), now + PENALTY);
            }
            Err(rustix::io::Errno::CONNREFUSED | rustix::io::Errno::NOENT) => {
                // Its process is gone.
                self.peers().by_address.retain(|_, known| known != path);
            }
            _ => {}
        }
    }

    fn send_to_all(&self, packet: &[u8]) {
        let entries = self.path.parent().map(fs::read_dir);
        for entry in entries.into_iter().flatten().flatten().flatten() {
            let path = entry.path();
            if path != self.path {
                self.send_to(&path, packet);
            }
        }
    }

    fn run(&self) {
        let mut buffer = vec![0; PacketHeader::SIZE + MAX_PACKET];
        while !self.stop.load(Ordering::Acquire) {
            let Some(device) = self.device.get() else {
                readable(None, &self.wake);
                self.wake.clear();
                continue;
            };
            if !readable(Some(self.socket.as_fd()), &self.wake) {
                self.wake.clear();
                continue;
            }
            let Ok((count, from)) = self.socket.recv_from(&mut buffer) else { continue };
            let Some((header, packet)) = buffer[..count].split_first_chunk_mut::<{ PacketHeader::SIZE }>() else {
                continue;
            };
            if packet.len() < ETHERNET_HEADER {
                continue;
            }
            if let (Some(source), Some(path)) = (packet[6..].first_chunk::<6>(), from.as_pathname()) {
                self.learn(*source, path);
            }
            let taken = Offloads::from_bits_truncate(self.offloads.load(Ordering::Relaxed));
            let header = PacketHeader::decode(*header);
            offload::adapt(header, packet, taken, |header, packet| self.deliver(device, header, packet));
        }
    }

    fn learn(&self, address: [u8; 6], path: &Path) {
        let mut peers = self.peers();
        if peers.by_address.get(&address).is_some_and(|known| known == path) {
            return;
        }
        if address[0] & 1 == 0 && (peers.by_address.len() < MAX_ADDRESSES || peers.by_address.contains_key(&address)) {
            peers.by_address.insert(address, path.into());
        }
    }

    /// Hands over one packet, waiting for room.
    fn deliver(&self, device: &Weak<dyn NetDevice>, header: PacketHeader, packet: &[u8]) {
        while !self.stop.load(Ordering::Acquire) {
            let Some(device) = device.upgrade() else { return };
            if device.receive(0, &Packet { header, pieces: &[packet] }) == Delivery::Done {
                return;
            }
            drop(device);
            readable(None, &self.wake);
            self.wake.clear();
        }
    }
}

impl NetBackend for Port {
    fn abilities(&self) -> Abilities {
        Abilities { send: Offloads::all(), receive: Offloads::all() }
    }

    fn link(&self) -> bool {
        true
    }

    fn attach(&self, device: Weak<dyn NetDevice>) {
        // A second NIC would be a mistake of ours; the first keeps the port.
        let _ = self.shared.device.set(device);
        self.shared.wake.set();
    }

    fn send(&self, _: u16, frame: &Frame<'_>) -> Sending {
        let packet = [&frame.header.encode()[..], &frame.to_vec()].concat();
        let to = packet[PacketHeader::SIZE..].first_chunk::<6>().copied().unwrap_or([0xff; 6]);
        let known = self.shared.peers().by_address.get(&to).cloned();
        match known {
            Some(path) => self.shared.send_to(&path, &packet),
            None => self.shared.send_to_all(&packet),
        }
        Sending::Taken
    }

    fn resume(&self, _: u16) {
        self.shared.wake.set();
    }

    fn set_offloads(&self, offloads: Offloads) {
        self.shared.offloads.store(offloads.bits(), Ordering::Relaxed);
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.set();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            log::warn!("the thread of {} failed", self.shared.path.display());
        }
        // It may have been removed by somebody else.
        let _ = fs::remove_file(&self.shared.path);
    }
}
