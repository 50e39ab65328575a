use super::regs::*;
use super::*;
use crate::chipset::fixture::{Bytewise, Garbage, Lines, check_state};
use platform::Clock;
use testkit::clock::FakeClock;

const SECOND: u64 = 1_000_000_000;
const MS: u64 = 1_000_000;

struct Bench {
    rtc: Arc<Rtc>,
    clock: FakeClock,
    lines: Arc<Lines>,
}

/// A clock that starts on Sunday, 2001-09-09 at 01:46:40 UTC.
fn bench() -> Bench {
    bench_with(RtcConfig { local_time: false, low_memory: 1 << 30, high_memory: 0 })
}

fn bench_with(config: RtcConfig) -> Bench {
    let (clock, lines) = (FakeClock::new(), Lines::new());
    clock.set_local_offset_s(-5 * 3600);
    let rtc = Rtc::new(config, lines.line(8), Arc::new(clock.clone()));
    Bench { rtc, clock, lines }
}

impl Bench {
    fn get(&self, index: u8) -> u8 {
        self.rtc.outb(0, index);
        self.rtc.inb(1)
    }
    fn set(&self, index: u8, value: u8) {
        self.rtc.outb(0, index);
        self.rtc.outb(1, value);
    }
    /// Century to seconds, without the weekday.
    fn date(&self) -> [u8; 7] {
        [index::CENTURY, index::YEAR, index::MONTH, index::DAY, index::HOURS, index::MINUTES, index::SECONDS]
            .map(|register| self.get(register))
    }
    fn set_date(&self, date: [u8; 7]) {
        let registers =
            [index::CENTURY, index::YEAR, index::MONTH, index::DAY, index::HOURS, index::MINUTES, index::SECONDS];
        registers.into_iter().zip(date).for_each(|(register, value)| self.set(register, value));
    }
    /// Acknowledges, and tells what there was.
    fn flags(&self) -> u8 {
        self.get(index::C)
    }
}

#[test]
fn shows_the_hosts_time_in_every_format() {
    let b = bench();
    assert_eq!(b.date(), [0x20, 0x01, 0x09, 0x09, 0x01, 0x46, 0x40]);
    assert_eq!((b.get(index::WEEKDAY), b.get(index::D), b.get(index::A)), (1, VALID, a::DEFAULT));
    b.clock.advance(12 * 3600 * SECOND + 25 * SECOND);
    assert_eq!(b.date(), [0x20, 0x01, 0x09, 0x09, 0x13, 0x47, 0x05]);
    b.set(index::B, b::BINARY | b::HOURS_24);
    assert_eq!(b.date(), [20, 1, 9, 9, 13, 47, 5]);
    b.set(index::B, 0);
    assert_eq!(b.get(index::HOURS), PM | 0x01);
    assert_eq!(b.rtc.read(0, AccessSize::Byte), 0xff);
    b.rtc.write(0, AccessSize::Word, 0x5a40);
    assert_eq!(b.get(0x40), 0x5a, "index and data in one access");
}

#[test]
fn local_time_is_that_of_the_start() {
    let b = bench_with(RtcConfig { local_time: true, low_memory: 0, high_memory: 0 });
    assert_eq!(b.date(), [0x20, 0x01, 0x09, 0x08, 0x20, 0x46, 0x40]);
    b.clock.set_local_offset_s(3600);
    assert_eq!(b.get(index::HOURS), 0x20);
    b.rtc.reset();
    assert_eq!(b.get(index::HOURS), 0x20);
}

#[test]
fn nvram_tells_the_memory_size() {
    let b = bench_with(RtcConfig { local_time: false, low_memory: 3 << 30, high_memory: 0x12_3456_0000 });
    assert_eq!([0x34, 0x35].map(|index| b.get(index)), [0x00, 0xbf]);
    assert_eq!([0x5b, 0x5c, 0x5d].map(|index| b.get(index)), [0x56, 0x34, 0x12]);
    for (low, high, expected) in [(0, 0, [0; 5]), (u64::MAX, u64::MAX, [0xff; 5])] {
        let b = bench_with(RtcConfig { local_time: false, low_memory: low, high_memory: high });
        assert_eq!([0x34, 0x35, 0x5b, 0x5c, 0x5d].map(|index| b.get(index)), expected);
    }
}

#[test]
fn nvram_holds_114_bytes() {
    let b = bench();
    let nvram = (0x0e..0x80).filter(|&index| index != index::CENTURY);
    for index in nvram.clone() {
        b.set(0x80 | index, index ^ 0xa5);
    }
    b.rtc.reset();
    for index in nvram {
        assert_eq!(b.get(index), index ^ 0xa5);
        assert_eq!(b.rtc.nvram(index), Some(index ^ 0xa5));
    }
    assert!(b.rtc.set_nvram(0x7f, 1) && b.get(0x7f) == 1);
    for index in [0x00, 0x0d, index::CENTURY, 0x80, 0xff] {
        assert_eq!((b.rtc.nvram(index), b.rtc.set_nvram(index, 0)), (None, false));
    }
}

#[test]
fn the_guest_sets_its_clock() {
    let b = bench();
    b.clock.advance(300 * MS);
    b.set(index::B, b::SET | b::HOURS_24);
    b.set_date([0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    b.clock.advance(10 * SECOND);
    assert_eq!(b.date(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59], "it stands while being set");
    b.set(index::B, b::HOURS_24);
    b.clock.advance(699 * MS);
    assert_eq!(b.get(index::SECONDS), 0x59, "the phase of the second stays");
    b.clock.advance(MS);
    assert_eq!(b.date(), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
    assert_eq!(b.rtc.time(), 946_684_800);
    // One register at a time, with the clock running.
    b.set(index::YEAR, 0x38);
    b.set(index::DAY, 0x19);
    assert_eq!(b.date(), [0x20, 0x38, 0x01, 0x19, 0x00, 0x00, 0x00]);
    b.rtc.set_time(0);
    assert_eq!(b.date(), [0x19, 0x70, 0x01, 0x01, 0x00, 0x00, 0x00]);
}

#[test]
fn the_way_linux_sets_it() {
    let b = bench();
    b.clock.advance(800 * MS);
    let (control, divider) = (b.get(index::B), b.get(index::A) & 0x7f);
    b.set(index::B, control | b::SET);
    b.set(index::A, divider | 0x70);
    b.set_date([0x20, 0x24, 0x02, 0x29, 0x12, 0x00, 0x00]);
    b.set(index::B, control);
    b.clock.advance(SECOND);
    b.set(index::A, divider);
    b.clock.advance(499 * MS);
    assert_eq!(b.get(index::SECONDS), 0x00);
    b.clock.advance(MS);
    assert_eq!(b.date(), [0x20, 0x24, 0x02, 0x29, 0x12, 0x00, 0x01], "half a second after the divider is let go");
}

#[test]
fn nonsense_is_not_taken() {
    let b = bench();
    for date in [[0x20, 0x23, 0x02, 0x29, 0, 0, 0], [0xff; 7], [0x20, 0x23, 0x13, 0x01, 0, 0, 0]] {
        b.set(index::B, b::SET | b::HOURS_24);
        b.set_date(date);
        assert_eq!(b.date(), date);
        b.set(index::B, b::HOURS_24);
        assert_eq!(b.date(), [0x20, 0x01, 0x09, 0x09, 0x01, 0x46, 0x40]);
    }
}

#[test]
fn an_update_is_announced() {
    let b = bench();
    let in_progress = || b.get(index::A) & a::UPDATE_IN_PROGRESS != 0;
    assert!(!in_progress());
    b.clock.advance(SECOND - UPDATE_NS - 1);
    assert!(!in_progress());
    b.clock.advance(1);
    assert!(in_progress());
    b.set(index::B, b::SET);
    assert!(!in_progress());
    b.set(index::B, 0);
    b.clock.advance(UPDATE_NS);
    assert!(!in_progress());
}

#[test]
fn update_interrupts() {
    let b = bench();
    b.clock.advance(1500 * MS);
    assert_eq!(b.clock.armed(), 0, "nothing runs that nobody asked for");
    assert_eq!(b.flags(), c::UPDATE | c::PERIODIC, "flags are up to date all the same");
    b.set(index::B, b::HOURS_24 | b::UPDATE_INTERRUPT);
    assert!(b.clock.advance_to_next());
    assert_eq!(b.clock.now_ns(), 2 * SECOND);
    assert_eq!(b.lines.take(), [(8, true)]);
    assert_eq!(b.clock.armed(), 0, "no second one before the first is acknowledged");
    b.clock.advance(5 * SECOND);
    assert_eq!(b.flags() & !c::PERIODIC, c::INTERRUPT | c::UPDATE);
    assert_eq!(b.lines.take(), [(8, false)]);
    b.clock.advance(SECOND);
    assert_eq!(b.lines.take(), [(8, true)]);
    b.set(index::B, b::HOURS_24 | b::UPDATE_INTERRUPT | b::SET);
    assert_eq!(b.lines.take(), [(8, false)]);
    assert_eq!(b.get(index::B), b::HOURS_24 | b::SET, "stopping the clock ends update interrupts");
    assert_eq!(b.clock.armed(), 0);
}

#[test]
fn periodic_interrupts_at_every_rate() {
    let b = bench();
    b.set(index::B, b::HOURS_24 | c::PERIODIC);
    for (rate, hz) in [(1, 256), (2, 128), (3, 8192), (6, 1024), (10, 64), (15, 2)] {
        b.set(index::A, a::DIVIDER_RUNS | rate);
        b.flags();
        b.lines.take();
        let start = b.clock.now_ns();
        let mut count = 0;
        while b.clock.advance_to_next() && b.clock.now_ns() <= start + 2 * SECOND {
            assert_eq!(b.lines.take(), [(8, true)]);
            assert_eq!(b.flags() & (c::INTERRUPT | c::PERIODIC), c::INTERRUPT | c::PERIODIC);
            assert_eq!(b.lines.take(), [(8, false)]);
            count += 1;
        }
        assert_eq!(count, 2 * hz);
    }
    b.set(index::A, a::DIVIDER_RUNS);
    assert_eq!(b.clock.armed(), 0);
}

#[test]
fn a_host_whose_clock_is_set_back() {
    let b = bench();
    b.set(index::B, b::HOURS_24 | c::PERIODIC | b::UPDATE_INTERRUPT);
    b.flags();
    b.clock.set_wall_ns(SECOND * 1000);
    for _ in 0..3 {
        assert!(b.clock.advance_to_next());
        assert_ne!(b.flags() & c::INTERRUPT, 0);
    }
    assert!(b.clock.now_ns() < 10 * MS, "periodic interrupts do not wait for it");
    assert_eq!(b.rtc.time(), 1000);
}

#[test]
fn alarms() {
    let b = bench();
    let at = |hour, minute, second| {
        b.set(index::HOURS_ALARM, hour);
        b.set(index::MINUTES_ALARM, minute);
        b.set(index::SECONDS_ALARM, second);
        b.flags();
    };
    b.set(index::B, b::HOURS_24 | c::ALARM);
    // It is 01:46:40; (alarm, seconds until then).
    for (alarm, expected) in [
        ([0x01, 0x46, 0x41], 1),
        ([0x01, 0x46, 0x40], 86_400),
        ([0x00, 0x00, 0x00], 22 * 3600 + 13 * 60 + 20),
        ([0xff, 0xff, 0xff], 1),
        ([0xc0, 0xc0, 0x30], 50),
        ([0xff, 0x00, 0x00], 13 * 60 + 20),
        ([0x03, 0xff, 0xff], 3600 + 13 * 60 + 20),
    ] {
        at(alarm[0], alarm[1], alarm[2]);
        let deadline = b.clock.next_deadline_ns().expect("an alarm");
        assert_eq!(deadline, b.clock.now_ns() + expected * SECOND, "{alarm:x?}");
    }
    at(0x24, 0x00, 0x00);
    assert_eq!(b.clock.armed(), 0, "an hour that does not exist");

    at(0x01, 0x47, 0x00);
    b.clock.advance(20 * SECOND - 1);
    assert_eq!(b.lines.take(), []);
    b.clock.advance(1);
    assert_eq!(b.lines.take(), [(8, true)]);
    assert_eq!(b.flags() & (c::INTERRUPT | c::ALARM), c::INTERRUPT | c::ALARM);
    // Missed while nobody looked, and without an interrupt.
    b.set(index::B, b::HOURS_24);
    b.clock.advance(86_400 * SECOND);
    assert_eq!(b.flags() & c::ALARM, c::ALARM);
    assert_eq!(b.flags(), 0);

    // In 12-hour binary.
    b.set(index::B, b::BINARY | c::ALARM);
    at(PM | 1, 47, 0);
    assert_eq!(b.clock.next_deadline_ns(), Some(b.clock.now_ns() + 12 * 3600 * SECOND));
}

#[test]
fn state_survives() {
    let b = bench();
    b.set(index::B, b::HOURS_24 | b::UPDATE_INTERRUPT);
    b.rtc.set_time(12);
    b.clock.advance(SECOND);
    let other = bench();
    other.clock.advance(SECOND);
    other.rtc.restore(VERSION, &b.rtc.save().unwrap()).unwrap();
    assert_eq!((other.rtc.time(), other.lines.take()), (13, vec![]));
    assert_ne!(other.flags() & c::INTERRUPT, 0);
    assert_eq!(other.lines.take(), [(8, false)]);
    assert_eq!(other.clock.armed(), 1);
    other.rtc.reset();
    assert_eq!((other.rtc.time(), other.clock.armed()), (13, 0));
}

#[test]
fn garbage() {
    let mut garbage = Garbage(2);
    let b = bench();
    for round in 0..30_000u64 {
        garbage.access(&*b.rtc, LENGTH);
        b.clock.advance(garbage.next() % (20 * MS));
        if round % 500 == 0 {
            b.clock.advance(garbage.next() % (1000 * SECOND));
            b.rtc.set_time(garbage.next() as i64);
            b.clock.set_wall_ns(garbage.next());
            check_state(&*b.rtc, &b.lines, &mut garbage);
        }
    }
}
