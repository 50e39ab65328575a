//! Memory that the guest gives back.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use e2e::linux::Guest;
use e2e::{Linux, PATIENCE, files, host};

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

/// What a program of the host is told.
fn talk(stream: &mut BufReader<UnixStream>, line: &str) -> String {
    writeln!(stream.get_mut(), "{line}").unwrap();
    let mut answer = String::new();
    stream.read_line(&mut answer).unwrap();
    answer.trim_end().to_owned()
}

/// A number of the balloon's statistics.
fn number(stream: &mut BufReader<UnixStream>, name: &str) -> u64 {
    let answer = talk(stream, "stats");
    let value = answer.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {answer:?}"))
}

/// Waits until the guest has given up so much.
fn wait_for_size(stream: &mut BufReader<UnixStream>, size: u64) {
    let start = Instant::now();
    while number(stream, "actual") != size {
        assert!(start.elapsed() < PATIENCE, "the balloon does not become {size} bytes large");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_balloon_takes_memory_from_the_guest_and_gives_it_back() {
    let folder = files::scratch();
    let path = folder.path().join("balloon");
    let device = format!("6,virtio-balloon,size=512M,control={}", path.display());
    let mut guest = Linux::generic().memory("1G").device(&device).boot();
    let stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = BufReader::new(stream);
    wait_for_size(&mut stream, 512 << 20);
    let total = number(&mut stream, "total");
    guest.check(total < 512 << 20, &format!("the guest still has {total} bytes"));
    let resident = host::resident_memory(guest.pid());
    assert_eq!(talk(&mut stream, "size 700M"), "OK");
    wait_for_size(&mut stream, 700 << 20);
    guest.check(number(&mut stream, "free") < total - (150 << 20), "the guest has as much free memory as before");
    assert_eq!(talk(&mut stream, "size 0"), "OK");
    wait_for_size(&mut stream, 0);
    guest.shell("mount -o remount,size=600M /tmp && dd if=/dev/urandom of=/tmp/file bs=1M count=400 2>/dev/null");
    guest.check(host::resident_memory(guest.pid()) > resident + (300 << 20), "the guest has got no memory back");
    guest.send("poweroff\n");
    guest.expect_exit(1);
    assert!(!path.exists(), "the socket goes with the VM");
}
