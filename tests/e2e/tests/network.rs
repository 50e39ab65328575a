//! Networks: an installed Debian, the host, and other guests. Nothing leaves the host.

use std::net::TcpListener;
use std::time::Instant;

use e2e::linux::Guest;
use e2e::{Debian, debian, files, servers};

/// Waits until the guest has an address that begins with `prefix` and may be used (duplicate address detection is
/// over).
fn wait_for_address(guest: &mut Guest, prefix: &str) {
    let address = format!("ip -o addr show -tentative | grep ' inet6* {prefix}'");
    guest.shell(&format!("for try in $(seq 1 300); do {address} && break; sleep 0.2; done; {address}"));
}

/// Downloads from the host and compares sums.
fn download(guest: &mut Guest, url: &str, sum: &str) {
    let start = Instant::now();
    let output = guest.shell(&format!("curl -s -g {url} | sha256sum"));
    guest.check(output.contains(sum), &format!("{url} came damaged: {output:?} instead of {sum}"));
    println!("{url}: {:.1} s", start.elapsed().as_secs_f64());
}

#[test]
fn user_mode_networking() {
    let folder = files::scratch();
    let (noise, sum) = servers::noise(folder.path(), 100);
    let port = servers::http("127.0.0.1", &noise);
    let dns = servers::dns([192, 0, 2, 77].into());
    let nic = format!("6,virtio-net,slirp,open,hostfwd=tcp:127.0.0.1:0-:7777,dns=127.0.0.1:{dns}");
    let machine = Debian::amd64().args(&["-s", &nic]).build();
    let mut guest = machine.boot();
    wait_for_address(&mut guest, "10.0.2.15/");

    download(&mut guest, &format!("http://10.0.2.2:{port}/"), &sum);
    if TcpListener::bind("[::1]:0").is_ok() {
        let folder = files::scratch();
        let (small, sum) = servers::noise(folder.path(), 4);
        let port = servers::http("::1", &small);
        wait_for_address(&mut guest, "fec0:");
        download(&mut guest, &format!("http://[fec0::2]:{port}/"), &sum);
    }
    guest.shell("ping -c 3 -i 0.2 -W 5 10.0.2.2");
    let name = guest.shell("python3 -c 'import socket; print(socket.gethostbyname(\"any.example\"))'");
    assert_eq!(name.trim(), "192.0.2.77");
    let (_, status) = guest.shell_status("curl -s --max-time 20 http://10.0.2.2:1/");
    guest.check(status == 7, &format!("a port where nobody listens: curl ended with {status}"));
    debian::power_off(&mut guest);
}

/// A guest in a restricted network reaches nobody, and the network answers so at once.
#[test]
fn restricted_user_mode_networking_and_the_guests_offloads() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mac = "02:11:22:33:44:55";
    let nic = format!("6,virtio-net,slirp,mac={mac},mtu=4000,queues=2");
    let machine = Debian::amd64().cpus(2).args(&["-s", &nic]).build();
    let mut guest = machine.boot();
    wait_for_address(&mut guest, "10.0.2.15/");
    let (_, status) = guest.shell_status(&format!("curl -s --max-time 20 http://10.0.2.2:{port}/"));
    guest.check(status == 7, &format!("curl ended with {status}"));
    guest.shell("ping -c 1 -W 5 10.0.2.2");
    let card = guest.shell("cd /sys/class/net/en*; cat address mtu carrier; ls queues | wc -l; ls queues; cd /");
    guest.check(card.starts_with(&format!("{mac}\n4000\n1\n")), "address, MTU or carrier");
    guest.check(["rx-0", "rx-1", "tx-0", "tx-1"].iter().all(|queue| card.contains(queue)), "two pairs of queues");
    debian::power_off(&mut guest);
}
