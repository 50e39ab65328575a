//! The device's side of a queue against the driver's, in one thread.

use memory::MemoryOptions;
use testkit::random::Random;
use testkit::virtqueue::{Buffer, GuestQueue};

use super::*;

const SIZE: u16 = 8;
const RINGS: u64 = 0x4000;
const BUFFERS: u64 = 0x10000;

impl Chain {
    fn publish(&self, written: u32) -> Result<bool, QueueError> {
        self.queue.publish([(self, written)])
    }
}

struct Bench {
    ram: GuestMemory,
    queue: Arc<VirtQueue>,
    driver: GuestQueue,
}

impl Bench {
    fn new(features: u64) -> Self {
        let ram = GuestMemory::new(MemoryOptions { size: 0x20000, ..Default::default() }).unwrap();
        let queue = VirtQueue::new(ram.clone(), 0, SIZE);
        let driver = GuestQueue::new(ram.clone(), 0, RINGS, SIZE);
        let bench = Self { ram, queue, driver };
        bench.open(features);
        bench
    }

    fn open(&self, features: u64) {
        self.queue.configure(|state| {
            state.descriptors = self.driver.descriptors;
            state.available = self.driver.available;
            state.used = self.driver.used;
        });
        self.queue.open(features);
    }

    fn pop(&self) -> Chain {
        self.queue.pop().unwrap().expect("a chain")
    }

    /// One request and its answer; whether the device would interrupt.
    fn round(&mut self) -> bool {
        self.driver.push(&[Buffer::writable(BUFFERS, 4)]);
        let wants = self.pop().publish(4).unwrap();
        assert_eq!(self.driver.take_used().unwrap().1, 4);
        wants
    }
}

#[test]
fn chains_go_there_and_back_in_any_order() {
    let mut b = Bench::new(0);
    assert!(b.queue.pop().unwrap().is_none());
    let first = b.driver.push(&[Buffer::readable(BUFFERS, 16), Buffer::writable(BUFFERS + 0x100, 512)]);
    let second = b.driver.push(&[Buffer::readable(BUFFERS, 8)]);
    let (one, two) = (b.pop(), b.pop());
    assert_eq!((one.readable.len(), one.writable.len()), (16, 512));
    assert!(b.queue.pop().unwrap().is_none());
    two.publish(0).unwrap();
    one.publish(512).unwrap();
    assert_eq!(b.driver.take_used(), Some((second, 0)));
    assert_eq!(b.driver.take_used(), Some((first, 512)));
}

#[test]
fn indices_wrap() {
    let mut b = Bench::new(0);
    for _ in 0..70_000 {
        assert!(b.round());
    }
    assert_eq!(b.driver.used_index(), (70_000 % 65_536) as u16);
}

#[test]
fn the_flag_suppresses_interrupts() {
    let mut b = Bench::new(0);
    assert!(b.round());
    b.driver.set_available_flags(1);
    assert!(!b.round());
    b.driver.set_available_flags(0);
    assert!(b.round());
}

#[test]
fn notify_on_empty_overrides_suppression_when_nothing_is_left() {
    let mut b = Bench::new(feature::NOTIFY_ON_EMPTY);
    b.driver.set_available_flags(1);
    b.driver.push(&[Buffer::writable(BUFFERS, 4)]);
    b.driver.push(&[Buffer::writable(BUFFERS, 4)]);
    let (one, two) = (b.pop(), b.pop());
    assert!(!one.publish(0).unwrap(), "another request is under way");
    drop(one);
    assert!(two.publish(0).unwrap());
}

#[test]
fn the_used_event_chooses_when_to_interrupt() {
    let mut b = Bench::new(feature::EVENT_IDX);
    assert!(b.round(), "the first is always told");
    b.driver.set_used_event(3);
    assert!(!b.round());
    assert!(!b.round());
    assert!(b.round(), "the used index passed the event");
    assert!(!b.round());
    b.driver.set_used_event(b.driver.used_index());
    assert!(b.round());
    // Several at once: the event lies between the last decision and now.
    b.driver.set_used_event(b.driver.used_index() + 1);
    for _ in 0..3 {
        b.driver.push(&[Buffer::writable(BUFFERS, 4)]);
    }
    let told: Vec<bool> = (0..3).map(|_| b.pop().publish(0).unwrap()).collect();
    assert_eq!(told, [false, true, false]);
}

#[test]
fn doorbells_are_suppressed_while_the_device_is_awake() {
    let mut b = Bench::new(0);
    b.queue.suppress_notifications();
    assert_eq!(b.driver.used_flags(), 1);
    assert!(!b.queue.enable_notifications());
    assert_eq!(b.driver.used_flags(), 0);
    b.driver.push(&[Buffer::writable(BUFFERS, 4)]);
    assert!(b.queue.enable_notifications(), "a buffer came meanwhile");

    let mut b = Bench::new(feature::EVENT_IDX);
    b.round();
    assert!(!b.queue.enable_notifications());
    assert_eq!(b.driver.available_event(), 1);
    b.driver.push(&[Buffer::writable(BUFFERS, 4)]);
    assert!(b.queue.enable_notifications());
}

#[test]
fn a_driver_that_announces_too_much_is_found_out() {
    let mut b = Bench::new(0);
    b.driver.set_available_index(SIZE + 1);
    assert!(matches!(b.queue.pop(), Err(QueueError::Index(9, 8))));
    b.driver.set_available_index(0u16.wrapping_sub(1));
    assert!(matches!(b.queue.pop(), Err(QueueError::Index(0xffff, 8))));
}

#[test]
fn rings_outside_memory_are_found_out() {
    for (field, address) in [(0, 0x1_f000), (1, 0x2_0000), (2, u64::MAX - 3), (1, u64::MAX - 1), (1, RINGS + 1)] {
        let b = Bench::new(0);
        b.queue.close();
        b.queue.configure(|state| {
            state.descriptors = b.driver.descriptors;
            state.available = b.driver.available;
            state.used = b.driver.used;
            *[&mut state.descriptors, &mut state.available, &mut state.used][field] = address;
        });
        b.queue.open(feature::EVENT_IDX);
        let mut driver = b.driver;
        driver.push(&[Buffer::writable(BUFFERS, 4)]);
        b.queue.suppress_notifications();
        b.queue.enable_notifications();
        match b.queue.pop() {
            Err(QueueError::Ring(_)) => assert_eq!(field, 1),
            Err(other) => panic!("{other}"),
            Ok(None) => assert_eq!(field, 1),
            Ok(Some(chain)) => assert!(field == 0 || matches!(chain.publish(4), Err(QueueError::Ring(_)))),
        }
    }
}

#[test]
fn closing_makes_chains_stale_and_waits_for_them() {
    let mut b = Bench::new(0);
    b.driver.push(&[Buffer::writable(BUFFERS, 4)]);
    let chain = b.pop();
    b.queue.close();
    assert!(!b.queue.is_ready() && b.queue.pop().unwrap().is_none());
    let queue = b.queue.clone();
    let waiter = std::thread::spawn(move || queue.wait_idle());
    assert!(!chain.publish(4).unwrap(), "a stale chain goes nowhere");
    assert_eq!(b.driver.used_index(), 0);
    assert!(!waiter.is_finished(), "the chain is still out");
    drop(chain);
    waiter.join().unwrap();

    // Reopened, it starts from the beginning, and what was popped before stays stale.
    b.driver = GuestQueue::new(b.ram.clone(), 0, RINGS, SIZE);
    b.open(0);
    assert!(b.round());
}

#[test]
fn a_queue_in_use_cannot_be_reconfigured() {
    let b = Bench::new(0);
    b.queue.configure(|state| state.used = 0);
    assert_eq!(b.queue.state().used, b.driver.used);
    b.queue.open(feature::EVENT_IDX);
    assert_eq!(b.queue.ring().features, 0);
}

#[test]
fn restored_state_is_checked() {
    let mut b = Bench::new(0);
    b.round();
    let saved = b.queue.state();
    let other = VirtQueue::new(b.ram.clone(), 0, SIZE);
    other.restore(saved, 0).unwrap();
    assert_eq!(other.state(), saved);
    b.queue = other;
    assert!(b.round(), "goes on where it was");
    for size in [0, 3, 16] {
        assert!(b.queue.restore(QueueState { size, ..saved }, 0).is_err());
    }
}

#[test]
fn random_rings_never_reach_outside() {
    let mut random = Random::new(3);
    let mut b = Bench::new(0);
    let mut popped = 0;
    for _ in 0..100_000 {
        let features = random.pick(&[0, feature::INDIRECT_DESC, feature::EVENT_IDX, u64::MAX]);
        if random.one_in(50) || !b.queue.is_ready() && random.one_in(2) {
            b.queue.close();
            b.open(features);
        }
        for _ in 0..random.below(2) {
            let at = RINGS + random.below(0x1400);
            b.ram.write_u16(at, random.nasty() as u16).unwrap();
        }
        let (index, next) = (random.below(8) as u16, random.below(10) as u16);
        let buffer = Buffer {
            address: if random.one_in(8) { random.nasty() } else { random.below(0x20000) },
            len: if random.one_in(8) { random.nasty() as u32 } else { 16 * random.below(64) as u32 },
            device_writes: random.one_in(2),
        };
        b.driver.write_descriptor(RINGS, index, buffer, random.below(8) as u16 & 5, next);
        let ahead = random.below(12) as u16;
        b.driver.set_available_index(b.queue.state().next_available.wrapping_add(ahead));
        match b.queue.pop() {
            Ok(Some(chain)) => {
                for range in chain.readable.ranges().iter().chain(chain.writable.ranges()) {
                    assert!(b.ram.is_ram(range.start.0, range.size));
                }
                popped += 1;
                // Publishing may find the rings moved outside; it must only say so.
                let _ = chain.publish(random.nasty() as u32);
            }
            Ok(None) => {}
            Err(_) => b.queue.set_broken(),
        }
    }
    assert!(popped > 1000, "the garbage was all refused at the door: {popped}");
}
