//! Random drivers of virtio devices: a fixed number of steps in tests, or for as long as one likes.
//!
//! | variable | meaning | otherwise |
//! |---|---|---|
//! | `BHYVE_FUZZ_SECONDS` | go on for so long, with other seeds each time | 100,000 steps, the same each time |
//! | `BHYVE_FUZZ_SEED` | the first seed | 0, or any with `BHYVE_FUZZ_SECONDS` |

use std::env;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use crate::conformance::{Subject, scribble};
use crate::random::Random;
use crate::virtqueue::{Buffer, GuestQueue, VirtioGuest};

/// Steps of one run, which has a seed and a device of its own.
const STEPS: u32 = 10_000;
/// A device that gives nothing back for so long has done all it can.
const STANDSTILL: Duration = Duration::from_millis(1);
/// Runs of a test.
const RUNS: u64 = 10;

/// Rings lie here, one after the other.
const RINGS: std::ops::Range<u64> = 0x1_0000..0xa_0000;
/// What devices read.
const HEADERS: std::ops::Range<u64> = 0xa_0000..0xb_0000;
/// Indirect tables.
const TABLES: std::ops::Range<u64> = 0xb_0000..0xc_0000;
/// What devices write.
const WINDOW: std::ops::Range<u64> = 0xc_0000..0xf_0000;

const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

/// What a device needs to be reached deeply.
pub struct Hostile<M, W, R> {
    /// Gives a fresh device, on a board with 1 MB of RAM.
    pub make: M,
    /// Brings the device into use from its state after a reset, and checks that it works.
    pub work: W,
    /// Bytes as a driver might begin a request with on a queue, good or bad.
    pub request: R,
}

/// Tells how to repeat a run that failed.
struct Witness(u64);

impl Drop for Witness {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("this was seed {}: BHYVE_FUZZ_SEED={} repeats it", self.0, self.0);
        }
    }
}

impl<M, W, R> Hostile<M, W, R>
where
    M: Fn() -> Subject,
    W: Fn(&Subject),
    R: Fn(&mut Random, u16) -> Vec<u8>,
{
    /// Runs random drivers as the environment says: no panic, no access outside guest memory, no endless wait, and after
    /// each reset the device works.
    ///
    /// # Panics
    /// The device breaks a rule.
    pub fn check(&self) {
        let (steps, served) = self.drive();
        assert!(served > steps / 1000, "hardly a request was good enough to be served");
    }

    /// The same for a device whose requests another process serves, which is not there.
    ///
    /// # Panics
    /// The device breaks a rule.
    pub fn check_unserved(&self) {
        self.drive();
    }

    /// Returns the number of steps, and how many requests were given back.
    fn drive(&self) -> (u64, u64) {
        let number = |name| env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let time = number("BHYVE_FUZZ_SECONDS").map(Duration::from_secs);
        let any = || if time.is_some() { RandomState::new().hash_one(0) >> 16 } else { 0 };
        let first = number("BHYVE_FUZZ_SEED").unwrap_or_else(any);
        let start = Instant::now();
        let (mut runs, mut served) = (0, 0);
        while time.map_or(runs < RUNS, |time| start.elapsed() < time) {
            served += self.run(first.wrapping_add(runs));
            runs += 1;
        }
        let steps = runs * u64::from(STEPS);
        println!(
            "{steps} steps from seed {first} on, {served} requests served, {:.1} s",
            start.elapsed().as_secs_f64()
        );
        (steps, served)
    }

    /// One run; returns how many requests were given back.
    fn run(&self, seed: u64) -> u64 {
        let _witness = Witness(seed);
        let mut random = Random::new(seed);
        let subject = (self.make)();
        let (mut steps, mut served) = (0, 0);
        while steps < STEPS {
            let count = 20 + random.below(400) as u32;
            subject.function().set_command(7);
            served += Session::begin(&subject, &mut random).run(count, &self.request);
            steps += count;
            subject.state.reset();
            if random.one_in(8) {
                (self.work)(&subject);
                subject.state.reset();
            }
        }
        (self.work)(&subject);
        served
    }
}

/// A driver from its set-up to a reset.
struct Session<'a> {
    subject: &'a Subject,
    random: &'a mut Random,
    guest: VirtioGuest,
    queues: Vec<Rings>,
    /// It also writes registers at random.
    scribbles: bool,
    /// It also breaks its rings.
    breaks: bool,
}

struct Rings {
    queue: GuestQueue,
    announced: u16,
}

impl<'a> Session<'a> {
    fn begin(subject: &'a Subject, random: &'a mut Random) -> Self {
        let make = if random.one_in(2) { VirtioGuest::modern } else { VirtioGuest::legacy };
        let mut guest = make(subject.function(), subject.ram.clone());
        let any = random.bits();
        guest.negotiate(random.pick(&[0, u64::MAX, u64::MAX, !(1 << 29), !(1 << 28), any]));
        if random.one_in(4) {
            subject.function().enable_msix(0x40);
        }
        let mut queues = Vec::new();
        let mut at = RINGS.start;
        for index in 0..guest.queue_count() {
            // Rings as large as any: 1024 entries take 0x7000 bytes.
            if at + 0x8000 > RINGS.end {
                break;
            }
            if random.one_in(30) {
                continue;
            }
            let queue = guest.open_queue(index, at);
            at = queue.end().next_multiple_of(0x1000);
            queues.push(Rings { queue, announced: 0 });
        }
        if !random.one_in(20) {
            guest.driver_ok();
        }
        let (scribbles, breaks) = (random.one_in(3), random.one_in(3));
        Self { subject, random, guest, queues, scribbles, breaks }
    }

    fn run(mut self, steps: u32, request: &impl Fn(&mut Random, u16) -> Vec<u8>) -> u64 {
        for _ in 0..steps {
            match self.random.below(16) {
                0..10 => self.offer(request),
                10 => self.guest.notify(self.random.below(40) as u16),
                11 => drop(self.guest.isr()),
                12 if self.breaks => self.break_rings(),
                13 if self.scribbles => scribble(self.subject, self.random, 2),
                14 if self.random.one_in(20) => self.reset_queue(),
                15 if self.random.one_in(30) => drop(self.subject.state.save()),
                _ => self.event(),
            }
        }
        // The others are reset while requests are under way.
        if self.random.one_in(2) {
            self.let_it_work();
        }
        self.served()
    }

    /// Requests that were given back.
    fn served(&self) -> u64 {
        self.queues.iter().map(|rings| u64::from(rings.queue.used_index())).sum()
    }

    /// Waits until the device has done what it can.
    fn let_it_work(&self) {
        let (mut served, mut last) = (self.served(), Instant::now());
        while last.elapsed() < STANDSTILL {
            std::thread::yield_now();
            let now = self.served();
            if now != served {
                (served, last) = (now, Instant::now());
            }
        }
    }

    /// Makes a request available on some queue.
    fn offer(&mut self, request: &impl Fn(&mut Random, u16) -> Vec<u8>) {
        if self.queues.is_empty() {
            return;
        }
        let which = self.random.below(self.queues.len() as u64) as usize;
        let index = self.queues[which].queue.index;
        let bytes = request(self.random, index);
        let chain = self.chain(&bytes);
        let Self { random, queues, .. } = self;
        let Rings { queue, announced } = &mut queues[which];
        if announced.wrapping_sub(queue.used_index()) >= queue.size && !random.one_in(200) {
            self.guest.notify(index);
            std::thread::yield_now();
            return;
        }
        let head = random.below(queue.size.into()) as u16;
        if random.one_in(4) {
            let table = TABLES.start + 16 * random.below((TABLES.end - TABLES.start) / 16 - 16);
            let all = place(queue, Some(table), 0, &chain);
            let len = if random.one_in(100) { random.nasty() as u32 } else { 16 * u32::from(all) };
            queue.write_descriptor(queue.descriptors, head, Buffer::readable(table, len), INDIRECT, 0);
        } else {
            place(queue, None, head, &chain);
        }
        queue.announce(if random.one_in(500) { random.nasty() as u16 } else { head });
        *announced = announced.wrapping_add(1);
        if !random.one_in(3) {
            self.guest.notify(index);
        }
    }

    /// Buffers that begin with the request, in pieces, and end with room for an answer.
    fn chain(&mut self, request: &[u8]) -> Vec<Buffer> {
        let random = &mut *self.random;
        let at = HEADERS.start + random.below(HEADERS.end - HEADERS.start - 0x2000);
        let request = &request[..request.len().min(0x2000)];
        self.subject.ram.write(at, request).expect("inside RAM");
        let mut chain = Vec::new();
        let mut done = 0;
        while done < request.len() {
            let rest = request.len() - done;
            let here = if random.one_in(3) { 1 + random.below(rest as u64) as usize } else { rest };
            chain.push(Buffer::readable(at + done as u64, here as u32));
            done += here;
            if chain.len() == 4 {
                break;
            }
        }
        for _ in 0..random.below(4) {
            let any = random.below(0x3000) as u32;
            let len = random.pick(&[0, 1, 4, 8, 16, 44, 108, 512, 512, 1526, 4096, any]);
            chain.push(Buffer::writable(WINDOW.start + random.below(WINDOW.end - WINDOW.start - 0x3000), len));
        }
        if chain.is_empty() {
            chain.push(Buffer::writable(WINDOW.start, 1));
        }
        if self.breaks && random.one_in(50) {
            let which = random.below(chain.len() as u64) as usize;
            match random.below(3) {
                0 => chain[which].address = random.nasty(),
                1 => chain[which].len = random.nasty() as u32,
                _ => chain[which].device_writes ^= true,
            }
        }
        chain
    }

    fn break_rings(&mut self) {
        if self.queues.is_empty() {
            return;
        }
        let which = self.random.below(self.queues.len() as u64) as usize;
        let queue = &mut self.queues[which].queue;
        if self.random.one_in(20) {
            queue.set_available_index(self.random.nasty() as u16);
        } else {
            let at = queue.descriptors + self.random.below(queue.end() - queue.descriptors - 8);
            // Rings are inside RAM.
            self.subject.ram.write_u16(at & !1, self.random.nasty() as u16).expect("inside RAM");
        }
    }

    fn reset_queue(&mut self) {
        if self.queues.is_empty() {
            return;
        }
        let which = self.random.below(self.queues.len() as u64) as usize;
        self.guest.reset_queue(self.queues[which].queue.index);
    }

    /// Where and whether the driver wants to be interrupted.
    fn event(&mut self) {
        if self.queues.is_empty() {
            return;
        }
        let which = self.random.below(self.queues.len() as u64) as usize;
        let queue = &self.queues[which].queue;
        queue.set_used_event(self.random.nasty() as u16);
        queue.set_available_flags(self.random.below(2) as u16);
        let vector = self.random.nasty() as u16;
        if self.random.one_in(10) {
            self.guest.set_queue_vector(queue.index, vector);
        }
    }
}

/// Writes a chain as descriptors from `first` of a table on (the queue's own without `table`); returns how many.
fn place(queue: &GuestQueue, table: Option<u64>, first: u16, chain: &[Buffer]) -> u16 {
    let wrap = |index: u16| if table.is_some() { index } else { index % queue.size };
    let mut index = wrap(first);
    for (n, buffer) in chain.iter().enumerate() {
        let next = wrap(index + 1);
        let flags = if n + 1 < chain.len() { NEXT } else { 0 };
        queue.write_descriptor(table.unwrap_or(queue.descriptors), index, *buffer, flags, next);
        index = next;
    }
    chain.len() as u16
}
