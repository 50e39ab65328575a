//! User-mode networking: the guest reaches the world through sockets of this process, without rights and without set-up.
//!
//! | address | who |
//! |---|---|
//! | 10.0.2.2, fec0::2 | the host: router, DHCP server; connections to it go to the host's loopback address |
//! | 10.0.2.3, fec0::3 | the name server: requests go to the host's |
//! | 10.0.2.15 on, fec0::/64 | the guest, by DHCP and by router advertisement |
//!
//! | module | what it does |
//! |---|---|
//! | `config` | options and addresses |
//! | `nat` | where packets go |
//! | `tcp`, `ring` | TCP connections |
//! | `udp`, `reassembly` | UDP and echo requests; packets in parts |
//! | `services`, `resolver` | ARP, DHCP, neighbour discovery, echo; the host's name server |
//! | `link` | packets for the guest |
//! | `table` | connections by ends and number |
//!
//! Everything happens under one lock: on the NIC's threads when the guest sends, on a thread of this module when the host
//! has news or something is due. That thread sleeps otherwise.

mod config;
mod link;
mod nat;
mod reassembly;
mod resolver;
mod ring;
mod services;
mod table;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventFlags};
use rustix::io::Errno;

use super::{Abilities, Frame, MacAddress, NetBackend, NetDevice, NetError, NicOptions, Offloads, Sending};
use crate::tty::wake::Wake;
use config::Forward;
use link::{Link, Plug};
use nat::{Access, Nat};

/// Largest IP packets without `mtu=`.
const MTU: u16 = 1500;
/// Events taken at once.
const EVENTS: usize = 64;

/// A user-mode network for one NIC.
pub(super) struct Slirp {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    plug: Arc<Plug>,
    nat: Mutex<Sleeper>,
    epoll: Arc<OwnedFd>,
    wake: Wake,
    room: AtomicBool,
    stop: AtomicBool,
}

/// The translation, and until when the thread sleeps.
struct Sleeper {
    nat: Nat,
    asleep_until: Option<Instant>,
}

impl Slirp {
    /// Opens the network and its forwarded ports.
    pub(super) fn open(options: &NicOptions) -> Result<Arc<Self>, NetError> {
        let forwards = config::parse_forwards(options.forwards.as_deref().unwrap_or_default())?;
        let dns = options.dns.as_deref().map(config::parse_dns).transpose()?;
        let access = Access { restricted: !options.open, dns };
        let (slirp, addresses) = Self::start(&options.name, options.mac, options.mtu, access, &forwards)?;
        for (forward, address) in forwards.iter().zip(addresses).filter(|(forward, _)| forward.host.port() == 0) {
            // Whoever asked for any free port wants to know which it is.
            let protocol = if forward.tcp { "tcp" } else { "udp" };
            eprintln!("bhyve: {}: {protocol} {address} leads to {} of the guest", options.name, forward.guest);
        }
        Ok(slirp)
    }

    fn start(
        name: &str,
        mac: MacAddress,
        mtu: Option<u16>,
        access: Access,
        forwards: &[Forward],
    ) -> Result<(Arc<Self>, Vec<SocketAddr>), NetError> {
        let failed = |what: String| move |source: io::Error| NetError::Host { what, source };
        let set_up = || failed(format!("set up user-mode networking for {name}"));
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC).map_err(|why| set_up()(why.into()))?);
        let wake = Wake::new().map_err(set_up())?;
        epoll::add(&*epoll, &wake, nat::WAKE, EventFlags::IN).map_err(|why| set_up()(why.into()))?;
        let plug = Arc::new(Plug::default());
        let mut nat = Nat::new(Link::new(plug.clone(), mtu.unwrap_or(MTU), mac.0), access, epoll.clone());
        let addresses = forwards.iter().map(|forward| {
            let protocol = if forward.tcp { "tcp" } else { "udp" };
            nat.listen(forward).map_err(failed(format!("listen on {protocol} {} for hostfwd", forward.host)))
        });
        let addresses = addresses.collect::<Result<Vec<_>, _>>()?;
        let shared = Arc::new(Shared {
            plug,
            nat: Mutex::new(Sleeper { nat, asleep_until: None }),
            epoll,
            wake,
            room: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let theirs = shared.clone();
        let thread = thread::Builder::new().name(format!("{name}-nat")).spawn(move || theirs.run());
        let thread = Some(thread.map_err(failed(format!("start a thread for {name}")))?);
        Ok((Arc::new(Self { shared, thread }), addresses))
    }
}

impl Shared {
    fn nat(&self) -> MutexGuard<'_, Sleeper> {
        self.nat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to the host's news and to what is due, until the network is closed.
    fn run(&self) {
        let mut events = Vec::with_capacity(EVENTS);
        let mut busy = false;
        while !self.stop.load(Ordering::Acquire) {
            let timeout = self.time_to_sleep(busy);
            events.clear();
            match epoll::wait(&*self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(why) => {
                    log::warn!("user-mode networking ends: {why}");
                    return;
                }
            }
            let now = Instant::now();
            let mut sleeper = self.nat();
            self.wake.clear();
            for event in &events {
                let (data, flags) = (event.data, event.flags);
                sleeper.nat.event(data, flags);
            }
            if self.room.swap(false, Ordering::SeqCst) {
                sleeper.nat.unblock();
            }
            sleeper.nat.tick(now);
            busy = sleeper.nat.work(now);
            // Awake, until it says otherwise.
            sleeper.asleep_until = Some(now);
        }
    }

    fn time_to_sleep(&self, busy: bool) -> Option<Timespec> {
        let mut sleeper = self.nat();
        let deadline = if busy { Some(Instant::now()) } else { sleeper.nat.next_deadline() };
        sleeper.asleep_until = deadline;
        deadline.map(|deadline| {
            let time = deadline.saturating_duration_since(Instant::now());
            Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() }
        })
    }
}

impl NetBackend for Slirp {
    fn abilities(&self) -> Abilities {
        let all = Offloads::CHECKSUM | Offloads::TCP4 | Offloads::TCP6;
        Abilities { send: all, receive: all }
    }

    fn link(&self) -> bool {
        true
    }

    fn attach(&self, device: Weak<dyn NetDevice>) {
        // A second NIC would be a mistake of ours; the first keeps the cable.
        let _ = self.shared.plug.device.set(device);
    }

    fn send(&self, queue: u16, frame: &Frame<'_>) -> Sending {
        self.shared.nat().nat.input(queue, frame);
        Sending::Taken
    }

    fn flush(&self, _: u16) {
        let mut sleeper = self.shared.nat();
        let busy = sleeper.nat.work(Instant::now());
        let sooner = match (sleeper.nat.next_deadline(), sleeper.asleep_until) {
            (Some(deadline), Some(until)) => deadline < until,
            (deadline, until) => deadline.is_some() && until.is_none(),
        };
        drop(sleeper);
        if busy || sooner {
            self.shared.wake.set();
        }
    }

    fn resume(&self, _: u16) {
        self.shared.room.store(true, Ordering::SeqCst);
        self.shared.wake.set();
    }

    fn set_offloads(&self, offloads: Offloads) {
        self.shared.plug.offloads.store(offloads.bits(), Ordering::Relaxed);
    }
}

impl Drop for Slirp {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.set();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            log::warn!("the thread of user-mode networking failed");
        }
    }
}
