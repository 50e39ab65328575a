use super::regs::{config, timer};
use super::*;
use crate::chipset::fixture::{Garbage, Lines, Messages, check_state};
use platform::Clock;
use testkit::clock::FakeClock;

const SECOND: u64 = 1_000_000_000;
const MS: u64 = 1_000_000;
const ROUTES: u32 = 0xf0_0000;
const PIT: u32 = 100;
const RTC: u32 = 108;

struct Bench {
    hpet: Arc<Hpet>,
    clock: FakeClock,
    lines: Arc<Lines>,
    messages: Arc<Messages>,
    legacy: [Arc<LineSwitch>; 2],
}

fn bench() -> Bench {
    let (clock, lines, messages) = (FakeClock::new(), Lines::new(), Arc::new(Messages::default()));
    let legacy = [PIT, RTC].map(|n| LineSwitch::new(lines.line(n)));
    let wiring = HpetWiring { gsi: lines.clone(), routes: ROUTES, legacy: legacy.clone(), msi: messages.clone() };
    let hpet = Hpet::new(wiring, Arc::new(clock.clone()));
    Bench { hpet, clock, lines, messages, legacy }
}

fn at(n: u64, register: u64) -> u64 {
    offset::TIMERS + offset::TIMER_BYTES * n + register
}

fn route(gsi: u32) -> u32 {
    gsi << timer::ROUTE_SHIFT
}

impl Bench {
    fn get(&self, register: u64) -> u64 {
        self.hpet.read(register, AccessSize::Qword)
    }
    fn set(&self, register: u64, value: u64) {
        self.hpet.write(register, AccessSize::Dword, value);
    }
    fn counter(&self) -> u64 {
        self.get(offset::COUNTER)
    }
    fn start(&self) {
        self.set(offset::CONFIG, config::ENABLE);
    }
    /// Sets up timer `n`, to match at counter value `comparator`.
    fn one_shot(&self, n: u64, config: u32, comparator: u64) {
        self.set(at(n, offset::TIMER_CONFIG), config.into());
        self.set(at(n, offset::COMPARATOR), comparator);
    }
    /// Sets up timer `n` as Linux does.
    fn periodic(&self, n: u64, config: u32, first: u64, period: u64) {
        self.set(at(n, offset::TIMER_CONFIG), (config | timer::PERIODIC | timer::SET_VALUE).into());
        self.set(at(n, offset::COMPARATOR), first);
        self.set(at(n, offset::COMPARATOR), period);
    }
}

/// Nanoseconds that `ticks` take, rounded up.
fn ns(ticks: u64) -> u64 {
    platform::time::ticks_to_ns(ticks, FREQUENCY_HZ)
}

#[test]
fn identifies_itself() {
    let b = bench();
    let capabilities = b.get(offset::CAPABILITIES);
    assert_eq!(capabilities >> 32, 59_604_644, "femtoseconds per tick");
    assert_eq!(capabilities & 0xffff_ffff, 0x8086_8701);
    assert_eq!(b.hpet.read(4, AccessSize::Dword), 59_604_644);
    assert_eq!(b.hpet.read(2, AccessSize::Word), 0x8086);
    b.set(offset::CAPABILITIES, 0);
    assert_eq!(b.get(offset::CAPABILITIES), capabilities);
    for n in 0..8 {
        b.hpet.write(at(n, 0), AccessSize::Qword, u64::MAX);
        // Route 31 does not exist; SET_VALUE stays until the comparator is written.
        assert_eq!(b.get(at(n, 0)), u64::from(ROUTES) << 32 | 0xc05e);
        for gsi in 20..24 {
            b.set(at(n, 0), route(gsi).into());
            assert_eq!(b.get(at(n, 0)) as u32, route(gsi) | 0x8010);
        }
        assert_eq!(b.get(at(n, offset::COMPARATOR)), 0xffff_ffff);
    }
    assert_eq!((b.get(0x200), b.get(0x3f8), b.get(0x08)), (0, 0, 0));
}

#[test]
fn the_counter_runs_when_enabled() {
    let b = bench();
    b.clock.advance(SECOND);
    assert_eq!(b.counter(), 0);
    b.start();
    b.clock.advance(SECOND);
    assert_eq!(b.counter(), FREQUENCY_HZ);
    b.clock.advance(254 * SECOND);
    assert_eq!(b.counter(), 0xff00_0000);
    b.clock.advance(SECOND);
    assert_eq!(b.counter(), 0, "32 bits wide");
    b.clock.advance(SECOND / 2);
    b.set(offset::CONFIG, 0);
    b.clock.advance(SECOND);
    assert_eq!(b.counter(), FREQUENCY_HZ / 2);
    b.set(offset::COUNTER, 1000);
    b.set(offset::COUNTER + 4, 7);
    assert_eq!(b.counter(), 1000);
    b.start();
    b.clock.advance(SECOND);
    assert_eq!(b.counter(), FREQUENCY_HZ + 1000);
    assert_eq!(b.clock.armed(), 0, "a counter alone takes no timer");
}

#[test]
fn one_shot_edge() {
    let b = bench();
    b.start();
    b.one_shot(2, timer::INTERRUPT | route(20), FREQUENCY_HZ);
    assert_eq!(b.clock.next_deadline_ns(), Some(SECOND));
    b.clock.advance(SECOND);
    assert_eq!(b.lines.take(), [(20, true), (20, false)]);
    assert_eq!(b.get(offset::STATUS), 0);
    assert_eq!(b.clock.next_deadline_ns(), Some(257 * SECOND), "the counter comes round to it");
    b.set(at(2, offset::COMPARATOR), b.counter());
    assert_eq!(b.lines.take(), [(20, true), (20, false)], "set to this very moment");
    b.set(at(2, offset::TIMER_CONFIG), route(20).into());
    assert_eq!(b.clock.armed(), 0);
    b.set(at(2, offset::TIMER_CONFIG), (timer::INTERRUPT | route(20)).into());
    b.set(offset::CONFIG, 0);
    assert_eq!(b.clock.armed(), 0, "a counter that stands matches nothing");
}

#[test]
fn a_standing_counter_is_scheduled_when_started() {
    let b = bench();
    b.one_shot(0, timer::INTERRUPT | route(21), 500);
    b.set(offset::COUNTER, 400);
    b.clock.advance(SECOND);
    b.start();
    b.clock.advance(ns(100) - 1);
    assert_eq!(b.lines.take(), []);
    b.clock.advance(1);
    assert_eq!(b.lines.take(), [(21, true), (21, false)]);
    assert_eq!(b.counter(), 500);
}

#[test]
fn periodic() {
    let b = bench();
    b.start();
    b.clock.advance(MS);
    let period = FREQUENCY_HZ / 1000;
    let first = b.counter() + period;
    b.periodic(0, timer::INTERRUPT | route(23), first, period);
    assert_eq!(b.get(at(0, offset::COMPARATOR)), first);
    assert_eq!(b.get(at(0, 0)) as u32 & timer::SET_VALUE, 0);
    for _ in 0..300_000 {
        assert!(b.clock.advance_to_next());
        assert_eq!(b.lines.take(), [(23, true), (23, false)]);
    }
    let expected = MS + ns(period * 300_000);
    assert!(b.clock.now_ns().abs_diff(expected) <= 120, "no drift, also past a wrap: {} {expected}", b.clock.now_ns());
    let next = b.get(at(0, offset::COMPARATOR));
    assert_eq!(next, (first + period * 300_000) & 0xffff_ffff, "the comparator shows the next match");
    // Changing only the period leaves the next match alone.
    b.set(at(0, offset::COMPARATOR), 2 * period);
    assert_eq!(b.get(at(0, offset::COMPARATOR)), next);
    b.clock.advance_to_next();
    assert_eq!(b.get(at(0, offset::COMPARATOR)), (next + 2 * period) & 0xffff_ffff);
}

#[test]
fn matches_faster_than_the_host_become_one() {
    let b = bench();
    b.start();
    b.periodic(1, timer::INTERRUPT | route(20), 1, 1);
    let count = (0..).take_while(|_| b.clock.advance_to_next() && b.clock.now_ns() < SECOND).count() as u64;
    assert_eq!(count, SECOND / SHORTEST_NS - 1);
    b.set(at(1, offset::COMPARATOR), 0);
    b.clock.advance(MS);
    b.lines.take();
    b.clock.advance(100 * SECOND);
    assert_eq!(b.lines.take(), [], "a period of 0 is none");
}

#[test]
fn level_waits_for_acknowledgement() {
    let b = bench();
    b.start();
    b.periodic(3, timer::INTERRUPT | timer::LEVEL | route(22), 1000, 1000);
    b.one_shot(4, timer::INTERRUPT | timer::LEVEL | route(22), 1500);
    b.clock.advance(SECOND);
    assert_eq!(b.lines.take(), [(22, true)], "two timers hold one line");
    assert_eq!(b.get(offset::STATUS), 0x18);
    assert_eq!(b.clock.armed(), 0);
    b.set(offset::STATUS, 0x08);
    assert_eq!((b.get(offset::STATUS), b.lines.take()), (0x10, vec![]));
    b.set(offset::STATUS, 0x10);
    assert_eq!((b.get(offset::STATUS), b.lines.take()), (0, vec![(22, false)]));
    b.clock.advance(MS);
    assert_eq!(b.lines.take(), [(22, true)]);
    b.set(at(3, 0), (timer::INTERRUPT | timer::LEVEL | route(21)).into());
    assert_eq!(b.lines.take(), [(21, true), (22, false)], "re-routed while held");
    b.set(at(3, 0), (timer::LEVEL | route(21)).into());
    assert_eq!(b.lines.take(), [(21, false)]);
    b.set(at(3, 0), route(21).into());
    assert_eq!(b.get(offset::STATUS), 0);
}

#[test]
fn status_shows_matches_without_interrupts() {
    let b = bench();
    b.start();
    b.one_shot(7, timer::LEVEL, 1000);
    assert_eq!(b.clock.armed(), 0);
    b.clock.advance(SECOND);
    assert_eq!(b.get(offset::STATUS), 0x80);
    assert_eq!(b.lines.take(), []);
}

#[test]
fn messages() {
    let b = bench();
    b.start();
    b.hpet.write(at(5, offset::FSB_ROUTE), AccessSize::Qword, 0xfee0_1000_0000_4041);
    b.one_shot(5, timer::INTERRUPT | timer::FSB | route(20), 1000);
    b.clock.advance(SECOND);
    assert_eq!(b.messages.take(), [MsiMessage { address: 0xfee0_1000, data: 0x4041 }]);
    assert_eq!(b.lines.take(), []);
    b.set(at(5, offset::FSB_ROUTE), 0x99);
    assert_eq!(b.get(at(5, offset::FSB_ROUTE)), 0xfee0_1000_0000_0099);
}

#[test]
fn legacy_replacement() {
    let b = bench();
    b.legacy[0].first().pulse();
    assert_eq!(b.lines.take(), [(PIT, true), (PIT, false)]);
    b.set(offset::CONFIG, config::ENABLE | config::LEGACY);
    assert!(b.hpet.replaces_legacy());
    b.legacy[0].first().pulse();
    b.legacy[1].first().pulse();
    assert_eq!(b.lines.take(), [], "8254 and real-time clock are cut off");
    b.one_shot(0, timer::INTERRUPT | route(20), 1000);
    b.one_shot(1, timer::INTERRUPT | timer::FSB, 2000);
    b.one_shot(2, timer::INTERRUPT | route(20), 3000);
    b.clock.advance(SECOND);
    assert_eq!(b.lines.take(), [(PIT, true), (PIT, false), (RTC, true), (RTC, false), (20, true), (20, false)]);
    b.hpet.reset();
    assert!(!b.hpet.replaces_legacy());
    b.legacy[0].first().pulse();
    assert_eq!(b.lines.take(), [(PIT, true), (PIT, false)]);
}

#[test]
fn narrow_and_unaligned_writes_are_ignored() {
    let b = bench();
    b.hpet.write(offset::CONFIG, AccessSize::Byte, 1);
    b.hpet.write(offset::CONFIG, AccessSize::Word, 1);
    b.hpet.write(offset::CONFIG - 2, AccessSize::Dword, 0xffff_ffff);
    b.hpet.write(offset::CONFIG - 4, AccessSize::Qword, u64::MAX);
    assert_eq!(b.get(offset::CONFIG), 0);
}

#[test]
fn state_survives_in_another_process() {
    let b = bench();
    b.clock.advance(1000 * SECOND);
    b.start();
    b.one_shot(2, timer::INTERRUPT | route(20), FREQUENCY_HZ);
    b.one_shot(3, timer::INTERRUPT | timer::LEVEL | route(21), 10);
    b.clock.advance(SECOND / 2);
    let other = bench();
    other.hpet.restore(VERSION, &b.hpet.save().unwrap()).unwrap();
    assert_eq!(other.counter(), FREQUENCY_HZ / 2);
    assert_eq!(other.lines.take(), []);
    other.clock.advance(SECOND / 2);
    assert_eq!(other.lines.take(), [(20, true), (20, false)]);
    other.set(offset::STATUS, 0x08);
    assert_eq!(other.lines.take(), [(21, false)]);
}

#[test]
fn garbage() {
    let mut garbage = Garbage(3);
    let b = bench();
    for round in 0..30_000u64 {
        garbage.access(&*b.hpet, LENGTH);
        // Half of the accesses go to where something happens.
        let register = [offset::CONFIG, offset::STATUS, offset::COUNTER, at(round % 8, 0), at(round % 8, 8)];
        b.set(register[(garbage.next() % 5) as usize], garbage.next() & 0xffff_ffff);
        b.clock.advance(garbage.next() % MS);
        if round % 500 == 0 {
            b.clock.advance(garbage.next() % SECOND);
            check_state(&*b.hpet, &b.lines, &mut garbage);
        }
    }
}
