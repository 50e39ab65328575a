//! The 8254 through its ports, against a clock moved by hand.

use platform::{Clock, IrqSink};
use testkit::clock::FakeClock;

use super::*;
use crate::test_support::Random;

/// Records the levels of line 0 with their moments.
struct Line(FakeClock, Mutex<Vec<(u64, bool)>>);

impl IrqSink for Line {
    fn set_level(&self, line: u32, asserted: bool) {
        assert_eq!(line, 0);
        self.1.lock().unwrap().push((self.0.now_ns(), asserted));
    }
}

struct Bench {
    clock: FakeClock,
    pit: Arc<Pit>,
    line: Arc<Line>,
    ports: Bus,
}

fn bench() -> Bench {
    let clock = FakeClock::new();
    let line = Arc::new(Line(clock.clone(), Mutex::default()));
    let pit = Pit::new(Arc::new(clock.clone()), IrqLine::new(line.clone(), 0));
    let ports = Bus::new("port");
    pit.map(&ports).unwrap();
    Bench { clock, pit, line, ports }
}

impl Bench {
    fn outb(&self, port: u64, value: u8) {
        assert!(self.ports.write(port, AccessSize::Byte, value.into()));
    }

    fn inb(&self, port: u64) -> u8 {
        self.ports.read(port, AccessSize::Byte).unwrap() as u8
    }

    /// Programs a counter in two-byte access with a mode and a count.
    fn program(&self, counter: u8, mode: u8, count: u16) {
        self.outb(0x43, counter << 6 | 0x30 | mode << 1);
        for byte in count.to_le_bytes() {
            self.outb(0x40 + u64::from(counter), byte);
        }
    }

    fn word(&self, counter: u8) -> u16 {
        let port = 0x40 + u64::from(counter);
        u16::from_le_bytes([self.inb(port), self.inb(port)])
    }

    fn latched(&self, counter: u8) -> u16 {
        self.outb(0x43, counter << 6);
        self.word(counter)
    }

    fn status(&self, counter: u8) -> u8 {
        self.outb(0x43, 0xe0 | 2 << counter);
        self.inb(0x40 + u64::from(counter))
    }

    fn output(&self, counter: u8) -> bool {
        self.status(counter) & 0x80 != 0
    }

    /// Moves the clock to the moment tick `tick` begins.
    fn to_tick(&self, tick: u64) {
        self.clock.advance(ticks_to_ns(tick, PIT_HZ) - self.clock.now_ns());
    }

    /// The moments of rising edges since the last call, in ticks.
    fn rises(&self) -> Vec<u64> {
        let changes = std::mem::take(&mut *self.line.1.lock().unwrap());
        changes.into_iter().filter(|change| change.1).map(|change| ns_to_ticks(change.0, PIT_HZ)).collect()
    }

    fn gate2(&self, level: bool) {
        self.outb(0x61, level.into());
    }
}

#[test]
fn mode_0_interrupts_once() {
    let bench = bench();
    bench.program(0, 0, 1000);
    assert!(!bench.output(0));
    bench.to_tick(501);
    assert_eq!(bench.latched(0), 500);
    bench.to_tick(3000);
    assert_eq!(bench.rises(), [1001], "the count is loaded by the tick after it is written");
    assert_eq!(bench.latched(0), (1000u16).wrapping_sub(2999), "counts on below zero");
    assert!(bench.output(0) && bench.clock.armed() == 0);
    bench.outb(0x43, 0x30);
    assert_eq!(bench.line.1.lock().unwrap().last(), Some(&(bench.clock.now_ns(), false)), "the control word clears it");
    bench.outb(0x40, 100);
    bench.to_tick(9000);
    assert!(!bench.output(0), "waits for the second byte");
    bench.outb(0x40, 0);
    bench.to_tick(9102);
    assert_eq!(bench.rises(), [9101]);
}

#[test]
fn mode_0_takes_a_new_count_at_once() {
    let bench = bench();
    bench.program(0, 0, 1000);
    bench.to_tick(500);
    bench.outb(0x40, 50);
    bench.outb(0x40, 0);
    bench.to_tick(2000);
    assert_eq!(bench.rises(), [551]);
}

#[test]
fn mode_2_is_periodic_and_does_not_drift() {
    let bench = bench();
    bench.program(0, 2, 1193);
    assert_eq!(bench.rises(), [0], "the output starts high");
    bench.to_tick(1193 * 1000 + 1);
    let rises = bench.rises();
    assert_eq!(rises, (1..=1000).map(|cycle| 1 + 1193 * cycle).collect::<Vec<_>>());
    bench.to_tick(1193 * 1000 + 1193);
    assert_eq!((bench.latched(0), bench.output(0)), (1, false), "low for one tick");
}

#[test]
fn mode_2_takes_a_new_count_at_the_end_of_the_cycle() {
    let bench = bench();
    bench.program(0, 2, 1000);
    bench.to_tick(501);
    bench.rises();
    bench.outb(0x40, 200);
    bench.outb(0x40, 0);
    assert_eq!((bench.latched(0), bench.status(0) & 0x40), (500, 0x40), "null count until then");
    bench.to_tick(1402);
    assert_eq!(bench.rises(), [1001, 1201, 1401]);
    assert_eq!(bench.status(0) & 0x40, 0);
}

#[test]
fn mode_3_is_a_square_wave() {
    let bench = bench();
    bench.program(0, 3, 1001);
    bench.rises();
    for (tick, output, count) in
        [(1, true, 1000), (2, true, 998), (501, true, 0), (502, false, 1000), (1001, false, 2), (1002, true, 1000)]
    {
        bench.to_tick(tick);
        assert_eq!((bench.output(0), bench.latched(0)), (output, count), "tick {tick}");
    }
    bench.to_tick(3005);
    assert_eq!(bench.rises(), [1002, 2003, 3004]);
    let bench = self::bench();
    bench.program(0, 3, 0);
    bench.to_tick(1 + 65536 * 3);
    assert_eq!(bench.rises(), [0, 65537, 131_073, 196_609], "0 is 65,536");
}

#[test]
fn mode_3_takes_a_new_count_at_the_end_of_the_half() {
    let bench = bench();
    bench.program(0, 3, 1000);
    bench.to_tick(101);
    bench.rises();
    bench.outb(0x40, 200);
    bench.outb(0x40, 0);
    bench.to_tick(1050);
    assert_eq!(bench.rises(), [601, 801, 1001], "low half of the new count from tick 501");
    bench.to_tick(1110);
    bench.outb(0x40, 0);
    bench.outb(0x40, 1);
    bench.to_tick(1500);
    assert_eq!(bench.rises(), [1201, 1457], "written in the low half, which ends at 1201");
}

#[test]
fn mode_4_strobes_once() {
    let bench = bench();
    bench.program(0, 4, 100);
    bench.rises();
    bench.to_tick(101);
    assert!(!bench.output(0));
    bench.to_tick(102);
    assert!(bench.output(0));
    bench.to_tick(1_000_000);
    assert_eq!(bench.rises(), [102]);
}

#[test]
fn modes_1_and_5_wait_for_the_gate() {
    let bench = bench();
    bench.gate2(false);
    bench.program(2, 1, 100);
    bench.to_tick(1000);
    assert!(bench.output(2), "not triggered");
    bench.gate2(true);
    bench.to_tick(1100);
    assert!(!bench.output(2));
    bench.gate2(false);
    bench.gate2(true);
    bench.to_tick(1200);
    assert!(!bench.output(2), "triggered again");
    bench.to_tick(1201);
    assert!(bench.output(2));
    bench.gate2(false);
    bench.program(2, 5, 100);
    bench.to_tick(2000);
    bench.gate2(true);
    bench.to_tick(2100);
    assert!(bench.output(2));
    bench.to_tick(2101);
    assert!(!bench.output(2));
    bench.to_tick(2102);
    assert!(bench.output(2));
}

#[test]
fn port_61_gates_and_shows_counter_2() {
    let bench = bench();
    assert_eq!(bench.inb(0x61) & 3, 0);
    bench.outb(0x61, 0xff);
    assert_eq!(bench.inb(0x61) & 0xcf, 3, "only two bits can be written");
    assert_ne!(bench.inb(0x61) & 0x10, bench.inb(0x61) & 0x10);
    bench.gate2(true);
    bench.program(2, 0, 11931);
    assert_eq!(bench.inb(0x61) & 0x20, 0);
    bench.to_tick(5000);
    bench.gate2(false);
    let count = bench.latched(2);
    bench.to_tick(6000);
    assert_eq!(bench.latched(2), count, "the gate stops it");
    bench.gate2(true);
    bench.to_tick(11931 + 1000);
    assert_eq!(bench.inb(0x61) & 0x20, 0);
    bench.to_tick(11932 + 1000);
    assert_eq!(bench.inb(0x61) & 0x23, 0x21);
    assert!(bench.rises().is_empty(), "counter 2 is no interrupt");
}

#[test]
fn a_periodic_counter_restarts_with_the_gate() {
    let bench = bench();
    bench.gate2(true);
    bench.program(2, 3, 100);
    bench.to_tick(61);
    assert!(!bench.output(2));
    bench.gate2(false);
    assert!(bench.output(2), "high while stopped");
    bench.to_tick(1000);
    assert_eq!(bench.latched(2), 80, "where it stopped: 10 ticks into the second half");
    bench.gate2(true);
    bench.to_tick(1001);
    assert_eq!((bench.latched(2), bench.output(2)), (100, true));
}

#[test]
fn access_modes_and_latches() {
    let bench = bench();
    bench.outb(0x43, 0x54);
    bench.outb(0x41, 200);
    bench.to_tick(51);
    assert_eq!((bench.inb(0x41), bench.status(1)), (150, 0x94));
    bench.outb(0x43, 0x64);
    bench.outb(0x41, 2);
    bench.to_tick(151);
    assert_eq!(bench.inb(0x41), 1, "high byte of 412");
    bench.program(1, 2, 0x1234);
    bench.to_tick(152);
    bench.outb(0x43, 0x40);
    bench.to_tick(400);
    bench.outb(0x43, 0x40);
    assert_eq!(bench.word(1), 0x1234, "the second latch command was ignored");
    assert_eq!(bench.word(1), 0x1234 - 248);
    bench.outb(0x43, 0xc0 | 1 << 2);
    assert_eq!(bench.inb(0x41), 0xb4, "status first");
    assert_eq!(bench.word(1), 0x1234 - 248);
    assert_eq!(bench.inb(0x43), 0xff);
    bench.outb(0x43, 0x7c);
    assert_eq!(bench.status(1) & 0x0e, 2 << 1, "mode 6 is mode 2");
}

#[test]
fn bcd_counting() {
    let bench = bench();
    bench.outb(0x43, 0x35);
    bench.outb(0x40, 0x00);
    bench.outb(0x40, 0x10);
    bench.to_tick(2);
    assert_eq!(bench.latched(0), 0x0999);
    bench.to_tick(1001);
    assert_eq!(bench.rises(), [0, 1001]);
    bench.outb(0x43, 0x31);
    bench.outb(0x40, 0);
    bench.outb(0x40, 0);
    bench.to_tick(1002);
    assert_eq!(bench.latched(0), 0, "10,000");
    bench.to_tick(1003);
    assert_eq!(bench.latched(0), 0x9999);
    bench.to_tick(11_003);
    assert_eq!(bench.rises(), [11_002]);
}

#[test]
fn a_hostile_period_does_not_storm_the_host() {
    let bench = bench();
    bench.program(0, 2, 2);
    let mut wakeups = 0;
    while bench.clock.now_ns() < 10_000_000 {
        bench.clock.advance_to_next();
        wakeups += 1;
    }
    assert!(wakeups <= 101, "{wakeups} wake-ups in 10 ms");
    assert_eq!(bench.rises().len(), wakeups + 1);
}

#[test]
fn state_round_trip() {
    let one = bench();
    one.program(0, 2, 1000);
    one.gate2(true);
    one.program(2, 3, 5000);
    one.to_tick(2501);
    one.outb(0x43, 0x80);
    one.outb(0x42, 7);
    let bytes = one.pit.save().unwrap();
    let two = bench();
    two.to_tick(77);
    two.pit.restore(1, &bytes).unwrap();
    assert_eq!(two.pit.save().unwrap(), bytes);
    assert!(two.rises().is_empty(), "silently");
    assert_eq!((two.latched(0), two.word(2)), (500, 5000), "counting goes on; the latch is kept");
    two.to_tick(1577);
    assert_eq!(two.rises(), [577, 1577]);
    assert!(two.pit.restore(1, &bytes[1..]).is_err());
    two.pit.reset();
    assert_eq!((two.clock.armed(), two.inb(0x61) & 3), (0, 0));
}

#[test]
fn impossible_states_are_refused() {
    let bench = bench();
    let refused = |counter: fn(&mut Counter)| {
        let mut state = State::power_on();
        counter(&mut state.counters[0]);
        assert!(bench.pit.restore(1, &encode(KIND, &state).unwrap()).is_err());
    };
    refused(|counter| counter.force(6, 1, None));
    refused(|counter| counter.force(2, 0x1_0001, None));
    refused(|counter| counter.force(2, 0, Some(ORIGIN)));
    refused(|counter| counter.force(2, 5, Some(u64::MAX)));
    refused(|counter| counter.force(2, 5, Some(0)));
    bench.pit.restore(1, &encode(KIND, &State::power_on()).unwrap()).unwrap();
}

#[test]
fn random_traffic() {
    for seed in 0..8 {
        let (bench, mut random) = (bench(), Random(seed));
        for _ in 0..10_000 {
            match random.below(8) {
                0 => bench.clock.advance(random.below(3_000_000)),
                1 => bench.clock.advance(random.below(2_000)),
                2 => bench.outb(0x61, random.next() as u8),
                3 => bench.outb(0x43, random.next() as u8),
                4 => {
                    bench.inb([0x40, 0x41, 0x42, 0x43, 0x61][random.below(5) as usize]);
                }
                5 => {
                    bench.ports.read(0x40 + random.below(4), random.size());
                }
                _ => bench.outb(0x40 + random.below(3), random.next() as u8 & random.next() as u8),
            }
            let bytes = bench.pit.save().unwrap();
            if random.below(10) == 0 {
                bench.pit.restore(1, &bytes).expect("a state it was in is one it can be in");
                assert_eq!(bench.pit.save().unwrap(), bytes);
            }
        }
        let mut last = None;
        for (_, level) in std::mem::take(&mut *bench.line.1.lock().unwrap()) {
            assert!(last != Some(level) || !level, "two rising edges need a fall between them");
            last = Some(level);
        }
    }
}
