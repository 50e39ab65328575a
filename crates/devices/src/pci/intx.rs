//! Interrupt pins: from INTA#–INTD# of a slot to an input of the I/O APIC and, through the PIRQ registers of the LPC
//! bridge, to an input of the 8259 pair.
//!
//! ```text
//!   function ── pin of its slot ──┬── GSI (fixed at start) ─────────────────► I/O APIC
//!                                 └── PIRQ link A–H ── PIRQ register ──► IRQ ► 8259
//! ```
//!
//! Every stage is a wired OR. With a boot ROM the routing follows a fixed formula, because the firmware's own tables
//! rely on it; without one, pins take the least used link and the next GSI in turn.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use config::pci::PciAddress;
use platform::IrqSink;

/// Number of PIRQ links.
pub const LINKS: usize = 8;
/// First I/O APIC input that serves PCI.
pub const FIRST_GSI: u32 = 16;

/// PIRQ register: the link is not routed to an IRQ.
const DISABLED: u8 = 0x80;
/// PIRQ register: bits a guest can set.
const WRITABLE: u8 = 0x8f;
/// IRQs that a PIRQ may be routed to: 3–7, 9–12, 14, 15.
const PERMITTED_IRQS: u16 = 0xdef8;

/// IRQs that the board's own devices keep for themselves: the serial ports and the mouse.
const ISA_IRQS: [usize; 3] = [3, 4, 12];
/// IRQ of the ACPI SCI, which is level-triggered and may be shared.
const SCI: usize = 9;

/// How a pin of a slot is wired: what ACPI's `_PRT` and the MP table tell the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PinRoute {
    /// Bus of the slot.
    pub bus: u8,
    /// The slot.
    pub slot: u8,
    /// 0 for INTA# to 3 for INTD#.
    pub pin: u8,
    /// Input of the I/O APIC.
    pub gsi: u32,
    /// PIRQ link: 0 for A to 7 for H.
    pub link: u8,
}

/// How pins get their routes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Routing {
    /// By the formula that firmware knows: link and GSI follow from slot and pin.
    Fixed,
    /// Least used link, next GSI in turn.
    RoundRobin {
        /// Inputs of the I/O APIC, beginning with GSI 0.
        gsis: u32,
    },
}

/// A function's connection to a pin of its slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PinUser {
    index: usize,
    /// 1 for INTA# to 4 for INTD#, as in the interrupt pin register.
    pub(crate) pin: u8,
}

#[derive(Clone, Copy)]
struct User {
    address: PciAddress,
    pin: u8,
    asserted: bool,
}

#[derive(Clone, Copy)]
struct Link {
    register: u8,
    initial: u8,
    users: u32,
}

/// Routes the pins of all functions.
pub struct IntxRouter {
    pic: Arc<dyn IrqSink>,
    ioapic: Arc<dyn IrqSink>,
    state: Mutex<State>,
}

struct State {
    routing: Routing,
    next_gsi: u32,
    links: [Link; LINKS],
    /// Uses of each IRQ; `None`: not for PCI.
    irqs: [Option<u32>; 16],
    level_triggered: u16,
    users: Vec<User>,
    routes: BTreeMap<(u8, u8, u8), PinRoute>,
    /// What the sinks were last told.
    gsi_levels: u64,
    irq_levels: u16,
}

impl IntxRouter {
    /// A router that drives `pic` by IRQ number (0–15) and `ioapic` by input number. Levels given to either are those
    /// of PCI alone: where other devices share an input, the sink ORs them. The IRQs of the board's ISA devices are never
    /// given to PCI at start; a guest may still route a link there.
    pub fn new(routing: Routing, pic: Arc<dyn IrqSink>, ioapic: Arc<dyn IrqSink>) -> Self {
        let irqs = std::array::from_fn(|irq| {
            let free = PERMITTED_IRQS >> irq & 1 != 0 && !ISA_IRQS.contains(&irq);
            free.then_some(u32::from(irq == SCI))
        });
        let state = State {
            routing,
            next_gsi: 0,
            links: [Link { register: DISABLED, initial: DISABLED, users: 0 }; LINKS],
            irqs,
            level_triggered: 0,
            users: Vec::new(),
            routes: BTreeMap::new(),
            gsi_levels: 0,
            irq_levels: 0,
        };
        Self { pic, ioapic, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects a function to the least used pin of its slot.
    pub(crate) fn connect(&self, address: PciAddress) -> PinUser {
        let mut state = self.state();
        let mut uses = [0; 4];
        for user in
            state.users.iter().filter(|user| (user.address.bus, user.address.slot) == (address.bus, address.slot))
        {
            uses[usize::from(user.pin - 1)] += 1;
        }
        let pin = (1..).zip(uses).min_by_key(|(_, count)| *count).map_or(1, |(pin, _)| pin);
        state.users.push(User { address, pin, asserted: false });
        PinUser { index: state.users.len() - 1, pin }
    }

    /// Gives every connected pin its link and GSI, and every link in use an IRQ. Call once, when all functions are there.
    pub fn route_all(&self) {
        let mut state = self.state();
        for user in state.users.clone() {
            state.route(user.address, user.pin);
        }
    }

    /// The IRQ a pin's link is routed to at power-on, for the interrupt line register; 0xff: none.
    pub(crate) fn initial_irq(&self, user: PinUser) -> u8 {
        let state = self.state();
        let register = state
            .users
            .get(user.index)
            .and_then(|user| state.route_of(user))
            .map_or(DISABLED, |route| state.links[usize::from(route.link)].initial);
        if valid(register) { register } else { 0xff }
    }

    /// All routes, ordered by bus, slot and pin.
    pub fn routes(&self) -> Vec<PinRoute> {
        self.state().routes.values().copied().collect()
    }

    /// IRQs (as bits) that PIRQ links were given at start: their ELCR bits are to be set.
    pub fn level_triggered_irqs(&self) -> u16 {
        self.state().level_triggered
    }

    /// Sets a function's contribution to its pin.
    pub(crate) fn set(&self, user: PinUser, asserted: bool) {
        let mut state = self.state();
        if let Some(user) = state.users.get_mut(user.index) {
            user.asserted = asserted;
            self.push(&mut state);
        }
    }

    /// Takes over a restored level without telling the chips, which restore their own view of it.
    pub(crate) fn restore_level(&self, user: PinUser, asserted: bool) {
        let mut state = self.state();
        if let Some(user) = state.users.get_mut(user.index) {
            user.asserted = asserted;
            (state.gsi_levels, state.irq_levels) = state.levels();
        }
    }

    /// The PIRQ register of a link.
    pub(crate) fn register(&self, link: usize) -> u8 {
        self.state().links.get(link).map_or(0xff, |link| link.register)
    }

    /// Writes the PIRQ register of a link; an asserted line moves to the new IRQ.
    pub(crate) fn set_register(&self, link: usize, value: u8) {
        let mut state = self.state();
        if let Some(link) = state.links.get_mut(link) {
            link.register = value & WRITABLE;
            self.push(&mut state);
        }
    }

    /// The PIRQ registers, A to H.
    pub(crate) fn registers(&self) -> [u8; LINKS] {
        self.state().links.map(|link| link.register)
    }

    /// Takes over restored registers without telling the chips.
    pub(crate) fn restore_registers(&self, registers: [u8; LINKS]) {
        let mut state = self.state();
        for (link, value) in state.links.iter_mut().zip(registers) {
            link.register = value & WRITABLE;
        }
        (state.gsi_levels, state.irq_levels) = state.levels();
    }

    /// Puts the PIRQ registers back to what they were at power-on.
    pub(crate) fn reset_registers(&self) {
        let mut state = self.state();
        for link in &mut state.links {
            link.register = link.initial;
        }
        self.push(&mut state);
    }

    /// Tells the chips which lines changed. The lock is held, so that two changes arrive in their order.
    fn push(&self, state: &mut State) {
        let (gsis, irqs) = state.levels();
        let changed = gsis ^ state.gsi_levels;
        for gsi in (0..u64::BITS).filter(|gsi| changed >> gsi & 1 != 0) {
            self.ioapic.set_level(gsi, gsis >> gsi & 1 != 0);
        }
        let changed = irqs ^ state.irq_levels;
        for irq in (0..u16::BITS).filter(|irq| changed >> irq & 1 != 0) {
            self.pic.set_level(irq, irqs >> irq & 1 != 0);
        }
        (state.gsi_levels, state.irq_levels) = (gsis, irqs);
    }
}

fn valid(register: u8) -> bool {
    register & DISABLED == 0 && PERMITTED_IRQS >> (register & 0xf) & 1 != 0
}

impl State {
    fn route_of(&self, user: &User) -> Option<PinRoute> {
        self.routes.get(&(user.address.bus, user.address.slot, user.pin - 1)).copied()
    }

    /// Levels of all GSIs and IRQs, as bits.
    fn levels(&self) -> (u64, u16) {
        let (mut gsis, mut irqs) = (0, 0);
        for route in self.users.iter().filter(|user| user.asserted).filter_map(|user| self.route_of(user)) {
            gsis |= 1 << route.gsi;
            let register = self.links[usize::from(route.link)].register;
            if valid(register) {
                irqs |= 1 << (register & 0xf);
            }
        }
        (gsis, irqs)
    }

    fn route(&mut self, PciAddress { bus, slot, .. }: PciAddress, pin: u8) {
        let key = (bus, slot, pin - 1);
        if self.routes.contains_key(&key) {
            return;
        }
        let (gsi, link) = match self.routing {
            Routing::Fixed => {
                let n = (4 + slot + pin) % 8;
                (FIRST_GSI + u32::from(n), n)
            }
            Routing::RoundRobin { gsis } => {
                let gsi = FIRST_GSI + self.next_gsi % gsis.clamp(FIRST_GSI + 1, u64::BITS).saturating_sub(FIRST_GSI);
                self.next_gsi += 1;
                let least = (0..).zip(&self.links).min_by_key(|(_, link)| link.users).map_or(0, |(n, _)| n);
                (gsi, least)
            }
        };
        self.routes.insert(key, PinRoute { bus, slot, pin: pin - 1, gsi, link });
        self.give_irq(usize::from(link));
    }

    /// A link that is used for the first time gets the least used IRQ.
    fn give_irq(&mut self, link: usize) {
        let link = &mut self.links[link];
        link.users += 1;
        if link.register != DISABLED {
            return;
        }
        let candidates =
            (0u8..).zip(&mut self.irqs).filter_map(|(irq, count)| count.as_mut().map(|count| (irq, count)));
        if let Some((irq, count)) = candidates.min_by_key(|(_, count)| **count) {
            *count += 1;
            link.register = irq;
            link.initial = irq;
            self.level_triggered |= 1 << irq;
        }
    }
}

#[cfg(test)]
mod tests {
    use testkit::irq::RecordingIrq;

    use super::*;

    struct Bench {
        router: IntxRouter,
        pic: Arc<RecordingIrq>,
        ioapic: Arc<RecordingIrq>,
    }

    fn bench(routing: Routing) -> Bench {
        let (pic, ioapic) = (Arc::new(RecordingIrq::default()), Arc::new(RecordingIrq::default()));
        Bench { router: IntxRouter::new(routing, pic.clone(), ioapic.clone()), pic, ioapic }
    }

    fn address(slot: u8, func: u8) -> PciAddress {
        PciAddress::new(0, slot, func).unwrap()
    }

    #[test]
    fn functions_of_a_slot_spread_over_its_pins() {
        let b = bench(Routing::Fixed);
        let pins: Vec<u8> = (0..6).map(|func| b.router.connect(address(3, func)).pin).collect();
        assert_eq!(pins, [1, 2, 3, 4, 1, 2]);
        assert_eq!(b.router.connect(address(4, 0)).pin, 1);
    }

    #[test]
    fn with_a_boot_rom_the_formula_decides() {
        let b = bench(Routing::Fixed);
        for slot in [0, 1, 3, 31] {
            b.router.connect(address(slot, 0));
        }
        b.router.connect(address(3, 1));
        b.router.route_all();
        let routes: Vec<_> = b.router.routes().iter().map(|r| (r.slot, r.pin, r.gsi, r.link)).collect();
        // Slot 0 INTA# is LNKF, GSI 21.
        assert_eq!(routes, [(0, 0, 21, 5), (1, 0, 22, 6), (3, 0, 16, 0), (3, 1, 17, 1), (31, 0, 20, 4)]);
    }

    #[test]
    fn without_one_links_and_gsis_go_round() {
        let b = bench(Routing::RoundRobin { gsis: 24 });
        let users: Vec<PinUser> = (1..=10).map(|slot| b.router.connect(address(slot, 0))).collect();
        b.router.route_all();
        let routes: Vec<_> = b.router.routes().iter().map(|r| (r.gsi, r.link)).collect();
        let expected: Vec<(u32, u8)> = (0..10).map(|n| (16 + n % 8, n as u8 % 8)).collect();
        assert_eq!(routes, expected);
        let irqs: Vec<u8> = users.iter().map(|user| b.router.initial_irq(*user)).collect();
        assert_eq!(irqs, [5, 6, 7, 10, 11, 14, 15, 5, 5, 6], "9 has a user already, 3, 4 and 12 are taken");
        assert_eq!(b.router.level_triggered_irqs(), 0xcce0);
    }

    #[test]
    fn shared_lines_are_a_wired_or() {
        let b = bench(Routing::Fixed);
        // Slots 3 and 11 share link A and GSI 16.
        let (one, two) = (b.router.connect(address(3, 0)), b.router.connect(address(11, 0)));
        b.router.route_all();
        let irq = u32::from(b.router.initial_irq(one));
        b.router.set(one, true);
        b.router.set(two, true);
        b.router.set(one, false);
        assert!(b.ioapic.level(16) && b.pic.level(irq));
        b.router.set(two, false);
        assert_eq!(b.ioapic.take(), [(16, true), (16, false)], "no edge in between");
        assert_eq!(b.pic.take(), [(irq, true), (irq, false)]);
    }

    #[test]
    fn an_asserted_line_follows_its_pirq_register() {
        let b = bench(Routing::Fixed);
        let user = b.router.connect(address(3, 0));
        b.router.route_all();
        b.router.set(user, true);
        b.pic.take();
        b.router.set_register(0, 11);
        assert_eq!(b.pic.take(), [(5, false), (11, true)]);
        b.router.set_register(0, 13);
        assert_eq!(b.pic.take(), [(11, false)], "IRQ 13 is not for PCI");
        b.router.set_register(0, 10);
        b.router.set_register(0, 0xff);
        assert_eq!(b.router.register(0), 0x8f);
        assert_eq!(b.pic.take(), [(10, true), (10, false)]);
        assert!(b.ioapic.level(16), "the I/O APIC's input does not depend on the register");
        b.router.reset_registers();
        assert_eq!(b.pic.take(), [(5, true)]);
    }

    #[test]
    fn restoring_makes_no_edges() {
        let b = bench(Routing::Fixed);
        let user = b.router.connect(address(3, 0));
        b.router.route_all();
        b.router.restore_level(user, true);
        b.router.restore_registers([11; LINKS]);
        assert!(b.pic.take().is_empty() && b.ioapic.take().is_empty());
        b.router.set(user, false);
        assert_eq!(b.ioapic.take(), [(16, false)], "the next real change does");
        assert_eq!(b.pic.take(), [(11, false)]);
    }
}
