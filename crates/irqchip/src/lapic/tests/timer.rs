//! The timer against a clock moved by hand.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use platform::{Clock, TimeSource};

use crate::test_support::{Board, TSC_HZ};

const ONE_SHOT: u32 = 0x30;
const PERIODIC: u32 = 0x2_0030;
const TSC_DEADLINE: u32 = 0x4_0030;
const MASKED: u32 = 0x1_0000;
/// One second of the undivided bus clock.
const SECOND: u32 = 1 << 27;

/// An enabled APIC with its timer undivided and in a mode.
fn board(mode: u32) -> Board {
    let board = Board::new(1);
    board.apic(0).enable();
    board.apic(0).put(0x3e0, 0xb);
    board.apic(0).put(0x320, mode);
    board
}

#[test]
fn one_shot_runs_out_once_at_its_moment() {
    let board = board(ONE_SHOT);
    let apic = board.apic(0);
    apic.put(0x380, SECOND);
    board.clock.advance(500_000_000);
    assert_eq!(apic.get(0x390), SECOND / 2);
    board.clock.advance(499_999_999);
    assert_eq!((apic.serve(), apic.get(0x390)), (None, 1));
    board.clock.advance(1);
    assert_eq!((apic.serve(), apic.get(0x390), apic.get(0x380)), (Some(0x30), 0, SECOND));
    board.clock.advance(10_000_000_000);
    assert_eq!((apic.serve(), board.clock.armed()), (None, 0));
}

#[test]
fn the_divider_divides() {
    let board = board(ONE_SHOT);
    let apic = board.apic(0);
    apic.put(0x3e0, 0x3);
    apic.put(0x380, SECOND / 16);
    board.clock.advance(999_999_999);
    assert_eq!(apic.serve(), None);
    board.clock.advance(1);
    assert_eq!(apic.serve(), Some(0x30));
}

#[test]
fn periodic_does_not_drift() {
    let board = board(PERIODIC);
    let apic = board.apic(0);
    // 1000 Hz cannot be had exactly: 134,217 ticks are 999.99... us.
    apic.put(0x380, SECOND / 1000);
    let mut ticks = 0;
    while board.clock.now_ns() < 10_000_000_000 {
        assert!(board.clock.advance_to_next());
        ticks += u64::from(apic.serve().is_some());
    }
    let exact = 10 * u64::from(SECOND) / u64::from(SECOND / 1000);
    assert!(ticks.abs_diff(exact) <= 1, "{ticks} instead of {exact}");
}

#[test]
fn a_hostile_period_does_not_storm_the_host() {
    let board = board(PERIODIC);
    board.apic(0).put(0x380, 1);
    let mut wakeups = 0;
    while board.clock.now_ns() < 10_000_000 {
        board.clock.advance_to_next();
        wakeups += 1;
        assert_eq!(board.apic(0).serve(), Some(0x30));
    }
    assert!(wakeups <= 101, "{wakeups} wake-ups in 10 ms");
}

#[test]
fn changing_between_one_shot_and_periodic_keeps_the_count() {
    let board = board(ONE_SHOT);
    let apic = board.apic(0);
    apic.put(0x380, 1000);
    board.clock.advance(5_000);
    let count = apic.get(0x390);
    assert!(count < 400);
    apic.put(0x320, PERIODIC);
    assert_eq!(apic.get(0x390), count);
    board.clock.advance(5_000);
    assert_eq!(apic.serve(), Some(0x30));
    assert!(apic.get(0x390) > 500, "reloaded");
    apic.put(0x320, ONE_SHOT);
    board.clock.advance(5_000);
    assert_eq!((apic.serve(), apic.get(0x390)), (Some(0x30), 0));
    apic.put(0x320, PERIODIC);
    board.clock.advance(50_000);
    assert_eq!((apic.serve(), apic.get(0x390)), (None, 0), "a stopped counter stays stopped");
}

#[test]
fn a_masked_timer_counts_but_wakes_nobody() {
    let board = board(PERIODIC | MASKED);
    let apic = board.apic(0);
    apic.put(0x380, SECOND);
    assert_eq!(board.clock.armed(), 0);
    board.clock.advance(2_250_000_000);
    assert_eq!(apic.get(0x390), SECOND / 4 * 3);
    apic.put(0x320, PERIODIC);
    assert_eq!(apic.serve(), None, "what ran out while masked is lost");
    board.clock.advance(749_999_999);
    assert_eq!(apic.serve(), None);
    board.clock.advance(1);
    assert_eq!(apic.serve(), Some(0x30));
}

#[test]
fn the_host_timer_is_set_lazily() {
    let board = board(ONE_SHOT);
    let apic = board.apic(0);
    apic.put(0x380, 0);
    assert_eq!((apic.get(0x390), board.clock.armed()), (0, 0));
    apic.put(0x380, SECOND);
    // The deadline moves later: the early wake-up must do nothing but set the timer again.
    board.clock.advance(750_000_000);
    apic.put(0x380, SECOND);
    assert_eq!(board.clock.next_deadline_ns(), Some(1_000_000_000));
    board.clock.advance(250_000_000);
    assert_eq!(apic.serve(), None);
    assert_eq!(board.clock.next_deadline_ns(), Some(1_750_000_000));
    // Earlier: the timer moves at once.
    apic.put(0x380, SECOND / 4);
    assert_eq!(board.clock.next_deadline_ns(), Some(1_250_000_000));
    board.clock.advance(250_000_000);
    assert_eq!(apic.serve(), Some(0x30));
}

#[test]
fn a_late_wake_up_is_noticed_by_reading() {
    let board = board(ONE_SHOT);
    let apic = board.chip.local_apics()[0].clone();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    // Armed first, so it runs before the timer's own callback at the same moment.
    let witness = board.clock.timer(Box::new(move || log.lock().unwrap().push((apic.get(0x390), apic.serve()))));
    witness.arm(1_000_000_000);
    board.apic(0).put(0x380, SECOND);
    board.clock.advance(1_000_000_000);
    assert_eq!(*seen.lock().unwrap(), [(0, Some(0x30))]);
    assert_eq!(board.apic(0).serve(), None, "the wake-up itself finds it done");
}

#[test]
fn tsc_deadline() {
    let board = board(TSC_DEADLINE);
    let apic = board.apic(0);
    apic.write_msr(0x6e0, TSC_HZ).unwrap();
    assert_eq!(apic.read_msr(0x6e0), Ok(TSC_HZ));
    apic.put(0x380, 1000);
    assert_eq!((apic.get(0x380), apic.get(0x390)), (0, 0), "the counter is out of use");
    board.clock.advance(999_999_999);
    assert_eq!(apic.serve(), None);
    board.clock.advance(1);
    assert_eq!((apic.serve(), apic.read_msr(0x6e0)), (Some(0x30), Ok(0)));
    apic.write_msr(0x6e0, 1).unwrap();
    assert_eq!((apic.serve(), apic.read_msr(0x6e0)), (Some(0x30), Ok(0)), "the past runs out at once");
    apic.write_msr(0x6e0, u64::MAX).unwrap();
    let deadline = board.clock.next_deadline_ns().unwrap();
    assert!(deadline < 1 << 43, "no absurd host deadlines");
    apic.write_msr(0x6e0, 0).unwrap();
    board.clock.advance(1 << 43);
    assert_eq!((apic.serve(), board.clock.armed()), (None, 0), "disarmed");
}

#[test]
fn leaving_tsc_deadline_mode_disarms() {
    let board = board(TSC_DEADLINE);
    let apic = board.apic(0);
    apic.write_msr(0x6e0, TSC_HZ).unwrap();
    apic.put(0x320, ONE_SHOT);
    assert_eq!(apic.read_msr(0x6e0), Ok(0));
    apic.write_msr(0x6e0, 5).unwrap();
    apic.put(0x320, TSC_DEADLINE);
    assert_eq!(apic.read_msr(0x6e0), Ok(0), "writes outside the mode are ignored");
    board.clock.advance(2_000_000_000);
    assert_eq!(apic.serve(), None);
}

#[test]
fn a_deadline_follows_the_guests_tsc() {
    let board = board(TSC_DEADLINE);
    let apic = board.apic(0);
    apic.write_msr(0x6e0, TSC_HZ).unwrap();
    board.tsc.offset.store(TSC_HZ / 2, Ordering::Relaxed);
    apic.tsc_changed();
    board.clock.advance(499_999_999);
    assert_eq!(apic.serve(), None);
    board.clock.advance(1);
    assert_eq!(apic.serve(), Some(0x30));
    apic.write_msr(0x6e0, 2 * TSC_HZ).unwrap();
    board.tsc.offset.store(0, Ordering::Relaxed);
    apic.tsc_changed();
    board.clock.advance(1_499_999_999);
    assert_eq!(apic.serve(), None, "moved later");
    board.clock.advance(1);
    assert_eq!(apic.serve(), Some(0x30));
}
