//! Networks: an installed Debian, the host, and other guests. Nothing leaves the host.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use e2e::linux::Guest;
use e2e::{Debian, PATIENCE, debian, files, servers};

/// The port of the host that leads to the guest, as bhyve said.
fn forwarded(guest: &Guest, protocol: &str) -> u16 {
    let text = guest.stderr();
    let port = text.lines().find_map(|line| {
        let (_, rest) = line.split_once(&format!("{protocol} 127.0.0.1:"))?;
        rest.split_once(" leads to ")?.0.parse().ok()
    });
    port.unwrap_or_else(|| guest.fail("it does not say which port leads to the guest"))
}

/// Waits until the guest has an address.
fn wait_for_address(guest: &mut Guest, address: &str) {
    guest.shell(&format!(
        "for try in $(seq 1 200); do ip -4 -o addr show | grep -q ' {address}/' && break; sleep 0.2; done; \
         ip -4 -o addr show | grep ' {address}/'"
    ));
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
    wait_for_address(&mut guest, "10.0.2.15");

    download(&mut guest, &format!("http://10.0.2.2:{port}/"), &sum);
    if TcpListener::bind("[::1]:0").is_ok() {
        let folder = files::scratch();
        let (small, sum) = servers::noise(folder.path(), 4);
        let port = servers::http("::1", &small);
        download(&mut guest, &format!("http://[fec0::2]:{port}/"), &sum);
    }
    guest.shell("ping -c 3 -i 0.2 -W 5 10.0.2.2");
    let name = guest.shell("python3 -c 'import socket; print(socket.gethostbyname(\"any.example\"))'");
    assert_eq!(name.trim(), "192.0.2.77");
    let (_, status) = guest.shell_status("curl -s --max-time 20 http://10.0.2.2:1/");
    guest.check(status == 7, &format!("a port where nobody listens: curl ended with {status}"));

    // From the host into the guest, which answers with what it got when it has got all of it.
    guest.shell(
        "{ socat -u TCP-LISTEN:7777,reuseaddr OPEN:/tmp/got,creat,trunc; sha256sum /tmp/got; } >/tmp/sum 2>&1 & true",
    );
    guest.shell("for try in $(seq 1 100); do ss -ltn | grep -q :7777 && break; sleep 0.1; done");
    let bytes = std::fs::read(&noise).unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", forwarded(&guest, "tcp"))).unwrap();
    stream.write_all(&bytes[..20 << 20]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the guest closes too");
    std::fs::write(&noise, &bytes[..20 << 20]).unwrap();
    let output = Command::new("sha256sum").arg(&noise).output().unwrap();
    let sum = String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap().to_owned();
    guest.shell(&format!(
        "for try in $(seq 1 100); do grep -q . /tmp/sum && break; sleep 0.1; done; cat /tmp/sum; grep {sum} /tmp/sum"
    ));
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
    wait_for_address(&mut guest, "10.0.2.15");
    let (_, status) = guest.shell_status(&format!("curl -s --max-time 20 http://10.0.2.2:{port}/"));
    guest.check(status == 7, &format!("curl ended with {status}"));
    guest.shell("ping -c 1 -W 5 10.0.2.2");
    let card = guest.shell("cd /sys/class/net/en*; cat address mtu carrier; ls queues | wc -l; ls queues; cd /");
    guest.check(card.starts_with(&format!("{mac}\n4000\n1\n")), "address, MTU or carrier");
    guest.check(["rx-0", "rx-1", "tx-0", "tx-1"].iter().all(|queue| card.contains(queue)), "two pairs of queues");
    debian::power_off(&mut guest);
}

#[test]
fn two_guests_on_a_switch() {
    let folder = files::scratch();
    let switch = format!("vale{}", folder.path().file_name().unwrap().to_string_lossy().replace(['.', '/'], "-"));
    let switch = &switch[..switch.len().min(32)];
    let machine = |port: &str| Debian::amd64().args(&["-s", &format!("6,virtio-net,{switch}:{port}")]).build();
    let (first, second) = (machine("a"), machine("b"));
    let (mut one, mut two) = (first.boot(), second.boot());
    for (guest, address) in [(&mut one, "192.168.77.1"), (&mut two, "192.168.77.2")] {
        guest.shell("systemctl stop systemd-networkd.socket systemd-networkd");
        guest.shell(&format!(
            "card=$(basename /sys/class/net/en*); ip link set $card up; ip addr add {address}/24 dev $card"
        ));
    }
    one.shell("ping -c 3 -i 0.2 -W 5 192.168.77.2");
    two.shell("socat -u TCP-LISTEN:7777,reuseaddr OPEN:/tmp/got,creat,trunc >/tmp/log 2>&1 & true");
    two.shell("for try in $(seq 1 100); do ss -ltn | grep -q :7777 && break; sleep 0.1; done");
    let sum = one.shell("dd if=/dev/urandom of=/tmp/noise bs=1M count=30 status=none; sha256sum </tmp/noise");
    one.shell("socat -u OPEN:/tmp/noise TCP:192.168.77.2:7777");
    let got = two.shell(
        "wait; for try in $(seq 1 100); do pidof socat >/dev/null || break; sleep 0.1; done; sha256sum </tmp/got",
    );
    two.check(got == sum, "what arrived is not what was sent");
    debian::power_off(&mut one);
    debian::power_off(&mut two);
}

/// passt in the foreground, ended with the test.
struct Passt(Child);

impl Drop for Passt {
    fn drop(&mut self) {
        // It ends by itself when its VM does.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn passt() {
    let (folder, noise) = (files::scratch(), files::scratch());
    let (file, sum) = servers::noise(noise.path(), 20);
    let port = servers::http("127.0.0.1", &file);
    // As root it becomes another user, who has to reach the socket.
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let socket = folder.path().join("passt.socket");
    let mut command = Command::new("passt");
    command.args(["--foreground", "--quiet", "--one-off", "--socket"]).arg(&socket);
    command.args(["--address", "10.9.8.2", "--netmask", "24", "--gateway", "10.9.8.1", "--mtu", "1500"]);
    let mut passt = Passt(command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("passt is not installed"));
    let start = Instant::now();
    while !socket.exists() {
        if let Some(status) = passt.0.try_wait().unwrap() {
            let mut text = String::new();
            passt.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
            panic!("passt: {status}: {text}");
        }
        assert!(start.elapsed() < PATIENCE, "passt makes no socket");
        std::thread::yield_now();
    }
    let nic = format!("6,virtio-net,unix:{}", socket.display());
    let machine = Debian::amd64().args(&["-s", &nic]).build();
    let mut guest = machine.boot();
    wait_for_address(&mut guest, "10.9.8.2");
    // Its gateway address stands for the host's loopback address.
    download(&mut guest, &format!("http://10.9.8.1:{port}/"), &sum);
    // Without the other end there is no link.
    drop(passt);
    guest.shell(
        "for try in $(seq 1 200); do [ $(cat /sys/class/net/en*/carrier) = 0 ] && break; sleep 0.1; done; \
                 [ $(cat /sys/class/net/en*/carrier) = 0 ]",
    );
    debian::power_off(&mut guest);
}

/// Moves this thread, and what it starts from now on, into a new network namespace.
fn enter_new_network() {
    let name = format!("bhyve-e2e-{}", std::process::id());
    let ip = |args: &[&str]| {
        let status = Command::new("ip").args(args).status().expect("cannot run ip");
        assert!(status.success(), "ip {args:?}: {status}");
    };
    ip(&["netns", "add", &name]);
    let entered = std::fs::File::open(format!("/run/netns/{name}")).map(|file| {
        let kind = Some(rustix::thread::LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), kind)
    });
    // It lives as long as somebody is in it.
    ip(&["netns", "delete", &name]);
    entered.unwrap().unwrap();
    ip(&["link", "set", "lo", "up"]);
}

/// Needs root, who alone can make network namespaces; others see in the unit tests what they can.
#[test]
fn a_tap_device() {
    if !rustix::process::geteuid().is_root() {
        println!("not root: no tap device can be made");
        return;
    }
    enter_new_network();
    let machine = Debian::amd64().args(&["-s", "6,virtio-net,tap7,mtu=3000,queues=2"]).cpus(2).build();
    let mut guest = machine.boot();
    let status = Command::new("ip").args(["addr", "add", "192.168.78.1/24", "dev", "tap7"]).status().unwrap();
    assert!(status.success());
    let mtu = std::process::Command::new("ip").args(["-o", "link", "show", "tap7"]).output().unwrap();
    assert!(String::from_utf8_lossy(&mtu.stdout).contains("mtu 3000"), "{mtu:?}");
    guest.shell("systemctl stop systemd-networkd.socket systemd-networkd");
    guest.shell("card=$(basename /sys/class/net/en*); ip link set $card up; ip addr add 192.168.78.2/24 dev $card");
    guest.shell("ping -c 3 -i 0.2 -W 5 192.168.78.1");
    let folder = files::scratch();
    let (noise, sum) = servers::noise(folder.path(), 50);
    let port = servers::http("192.168.78.1", &noise);
    download(&mut guest, &format!("http://192.168.78.1:{port}/"), &sum);

    let listener = TcpListener::bind("192.168.78.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut bytes).unwrap();
        bytes
    });
    guest.shell("head -c 20M /dev/urandom >/tmp/noise");
    guest.shell(&format!("socat -u OPEN:/tmp/noise TCP:192.168.78.1:{port}"));
    std::fs::write(&noise, reader.join().unwrap()).unwrap();
    let output = Command::new("sha256sum").arg(&noise).output().unwrap();
    let sum = String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap().to_owned();
    guest.shell(&format!("sha256sum /tmp/noise | grep {sum}"));
    debian::power_off(&mut guest);
}
