//! The interconnect between interrupt sources and local APICs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use platform::{MsiMessage, MsiSink};

use crate::lapic::Inbox;
use crate::message::{DeliveryMode, Destination, Message, MessageSink};

/// Carries messages to local APICs. Takes no lock, so any thread may send while holding its own.
pub struct ApicBus {
    inboxes: Box<[Arc<Inbox>]>,
    extended_ids: bool,
    /// Where the search for the lowest priority begins, so that equals take turns.
    turn: AtomicUsize,
}

impl ApicBus {
    pub(crate) fn new(inboxes: Vec<Arc<Inbox>>, extended_ids: bool) -> Self {
        Self { inboxes: inboxes.into(), extended_ids, turn: AtomicUsize::new(0) }
    }

    /// Sends a message to whom it is addressed; returns whether any local APIC took it.
    pub(crate) fn route(&self, message: &Message) -> bool {
        if message.mode == DeliveryMode::LowestPriority {
            let lowest = self.lowest(|inbox| inbox.is_addressed(message.destination));
            return lowest.is_some_and(|inbox| inbox.accept(message));
        }
        match message.destination {
            Destination::Physical(id) => self.find(id).is_some_and(|inbox| inbox.accept(message)),
            destination => {
                let mut taken = false;
                for inbox in self.inboxes.iter().filter(|inbox| inbox.is_addressed(destination)) {
                    taken |= inbox.accept(message);
                }
                taken
            }
        }
    }

    /// Sends a message to all local APICs.
    pub(crate) fn send_all(&self, message: &Message) {
        self.route(&Message { destination: Destination::Broadcast, ..*message });
    }

    /// Sends a message to all local APICs but the one with ID `sender`.
    pub(crate) fn send_others(&self, message: &Message, sender: u32) {
        let is_other = |inbox: &Inbox| inbox.id() != sender;
        if message.mode == DeliveryMode::LowestPriority {
            if let Some(inbox) = self.lowest(is_other) {
                inbox.accept(message);
            }
            return;
        }
        for inbox in self.inboxes.iter().filter(|inbox| is_other(inbox)) {
            inbox.accept(message);
        }
    }

    /// The 8259 pair's output rose; it is wired to every LINT0.
    pub(crate) fn pic_rose(&self) {
        for inbox in &self.inboxes {
            inbox.lint0_rose();
        }
    }

    fn find(&self, id: u32) -> Option<&Arc<Inbox>> {
        // IDs mostly are the numbers of the vCPUs.
        let guess = usize::try_from(id).ok().and_then(|index| self.inboxes.get(index));
        guess.filter(|inbox| inbox.id() == id).or_else(|| self.inboxes.iter().find(|inbox| inbox.id() == id))
    }

    fn lowest(&self, is_candidate: impl Fn(&Inbox) -> bool) -> Option<&Arc<Inbox>> {
        let start = self.turn.fetch_add(1, Ordering::Relaxed) % self.inboxes.len().max(1);
        let (before, after) = self.inboxes.split_at(start);
        after
            .iter()
            .chain(before)
            .filter(|inbox| inbox.accepts_fixed() && is_candidate(inbox))
            .min_by_key(|inbox| inbox.priority() >> 4)
    }
}

impl MessageSink for ApicBus {
    fn deliver(&self, message: &Message) -> bool {
        self.route(message)
    }
}

impl MsiSink for ApicBus {
    fn send(&self, message: MsiMessage) {
        if let Some(message) = Message::from_msi(message, self.extended_ids) {
            self.deliver(&message);
        }
    }
}
