//! Memory that the guest gives back.

use std::time::Instant;

use e2e::linux::Guest;
use e2e::{Linux, PATIENCE, host};

/// Waits until the process holds less than `limit` bytes of memory.
fn wait_for_less_than(guest: &mut Guest, limit: u64) {
    let start = Instant::now();
    loop {
        let resident = host::resident_memory(guest.pid());
        if resident < limit {
            return;
        }
        guest.check(start.elapsed() < PATIENCE, &format!("{} MB are still resident", resident >> 20));
        guest.shell("sleep 1");
    }
}

#[test]
fn free_pages_go_back_to_the_host() {
    let mut guest = Linux::generic().memory("1G").device("6,virtio-balloon").boot();
    guest.shell("mount -o remount,size=600M /tmp && dd if=/dev/urandom of=/tmp/file bs=1M count=400 2>/dev/null");
    let full = host::resident_memory(guest.pid());
    guest.check(full > 400 << 20, &format!("only {} MB are resident", full >> 20));
    guest.shell("rm /tmp/file");
    wait_for_less_than(&mut guest, full - (300 << 20));
    guest
        .shell("dd if=/dev/zero of=/tmp/file bs=1M count=100 2>/dev/null && [ $(tr -d '\\0' </tmp/file | wc -c) = 0 ]");
    guest.send("poweroff\n");
    guest.expect_exit(1);
}

#[test]
fn a_balloon_takes_memory_from_the_guest() {
    let mut guest = Linux::generic().memory("1G").device("6,virtio-balloon,size=512M").boot();
    let start = Instant::now();
    loop {
        let free = guest.shell("grep MemTotal /proc/meminfo");
        let kilobytes: u64 = free.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
        if kilobytes < 520 << 10 {
            break;
        }
        guest.check(start.elapsed() < PATIENCE, &format!("the guest still has {kilobytes} kB"));
        guest.shell("sleep 1");
    }
    guest.send("poweroff\n");
    guest.expect_exit(1);
}
