//! Networks: an installed Debian, the host, and other guests. Nothing leaves the host.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use e2e::linux::Guest;
use e2e::{Debian, Linux, PATIENCE, debian, files, servers, vhost_switch};

/// Waits until the guest has an address that begins with `prefix` and may be used (duplicate address detection is
/// over).
fn wait_for_address(guest: &mut Guest, prefix: &str) {
    let address = format!("ip -o addr show -tentative | grep ' inet6* {prefix}'");
    guest.shell(&format!("for try in $(seq 1 300); do {address} && break; sleep 0.2; done; {address}"));
}

/// Waits until a card of the guest has a link, or has none.
fn wait_for_carrier(guest: &mut Guest, card: &str, carrier: u8) {
    let test = format!("[ $(cat /sys/class/net/{card}/carrier) = {carrier} ]");
    guest.shell(&format!("for try in $(seq 1 300); do {test} && break; sleep 0.1; done; {test}"));
}

/// Downloads from the host and compares sums.
fn download(guest: &mut Guest, url: &str, sum: &str) {
    let start = Instant::now();
    let output = guest.shell(&format!("curl -s -g {url} | sha256sum"));
    guest.check(output.contains(sum), &format!("{url} came damaged: {output:?} instead of {sum}"));
    println!("{url}: {:.1} s", start.elapsed().as_secs_f64());
}

fn sha256(bytes: &[u8]) -> String {
    let folder = files::scratch();
    let file = folder.path().join("bytes");
    fs::write(&file, bytes).unwrap();
    let output = Command::new("sha256sum").arg(&file).output().expect("cannot run sha256sum");
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().expect("sha256sum prints a sum").to_owned()
}

/// The port of the host that leads to the guest, as bhyve said.
fn forwarded(guest: &Guest, protocol: &str) -> u16 {
    let text = guest.stderr();
    let port = text.lines().find_map(|line| {
        let (_, rest) = line.split_once(&format!("{protocol} 127.0.0.1:"))?;
        rest.split_once(" leads to ")?.0.parse().ok()
    });
    port.unwrap_or_else(|| guest.fail("it does not say which port leads to the guest"))
}

/// From the host into the guest, which answers with the sum of what it got when it has got all of it.
fn send_to_guest(guest: &mut Guest, bytes: &[u8]) {
    guest.shell(
        "printf '#!/bin/sh\\nsha256sum\\n' >/tmp/sum && chmod +x /tmp/sum && \
         { socat -t 60 TCP-LISTEN:7777,reuseaddr EXEC:/tmp/sum >/tmp/log 2>&1 & true; }",
    );
    guest.shell("for try in $(seq 1 100); do ss -ltn | grep -q :7777 && break; sleep 0.1; done");
    let mut stream = TcpStream::connect(("127.0.0.1", forwarded(guest, "tcp"))).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    guest.check(answer.contains(&sha256(bytes)), &format!("the guest got something else: {answer:?}"));
}

/// passt in the foreground, ended with the test.
struct Passt(Child);

impl Passt {
    /// Starts it, and waits until VMs can connect to `socket`. The guest is 10.9.8.2; its gateway 10.9.8.1 stands for
    /// the host's loopback address.
    fn start(socket: &Path) -> Self {
        // It does not replace the socket of another.
        let _ = fs::remove_file(socket);
        let mut command = Command::new("passt");
        command.args(["--foreground", "--quiet", "--socket"]).arg(socket);
        command.args(["--address", "10.9.8.2", "--netmask", "24", "--gateway", "10.9.8.1", "--mtu", "1500"]);
        let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut passt = Self(child.expect("passt is not installed"));
        let start = Instant::now();
        while !socket.exists() {
            if let Some(status) = passt.0.try_wait().unwrap() {
                let mut text = String::new();
                passt.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
                panic!("passt: {status}: {text}");
            }
            assert!(start.elapsed() < PATIENCE, "passt makes no socket");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        passt
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It ends by itself when its VM does.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn user_mode_networking_and_passt() {
    let (folder, noise) = (files::scratch(), files::scratch());
    let (noise, sum) = servers::noise(noise.path(), 100);
    let port = servers::http("127.0.0.1", &noise);
    let dns = servers::dns([192, 0, 2, 77].into());
    // passt becomes another user where root starts it, who has to reach the socket.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let socket = folder.path().join("passt.socket");
    let passt = Passt::start(&socket);
    let slirp = format!("6,virtio-net,slirp,open,hostfwd=tcp:127.0.0.1:0-:7777,dns=127.0.0.1:{dns}");
    let machine = Debian::amd64().args(&["-s", &slirp, "-s", &format!("7,virtio-net,unix:{}", socket.display())]);
    let machine = machine.build();
    let mut guest = machine.boot();
    wait_for_address(&mut guest, "10.0.2.15/");

    download(&mut guest, &format!("http://10.0.2.2:{port}/"), &sum);
    let small = files::scratch();
    let (small, small_sum) = servers::noise(small.path(), 4);
    if TcpListener::bind("[::1]:0").is_ok() {
        let port = servers::http("::1", &small);
        wait_for_address(&mut guest, "fec0:");
        download(&mut guest, &format!("http://[fec0::2]:{port}/"), &small_sum);
    }
    guest.shell("ping -c 3 -i 0.2 -W 5 10.0.2.2");
    let name = guest.shell("python3 -c 'import socket; print(socket.gethostbyname(\"any.example\"))'");
    assert_eq!(name.trim(), "192.0.2.77");
    let (_, status) = guest.shell_status("curl -s --max-time 20 http://10.0.2.2:1/");
    guest.check(status == 7, &format!("a port where nobody listens: curl ended with {status}"));
    send_to_guest(&mut guest, &fs::read(&noise).unwrap()[..20 << 20]);

    wait_for_address(&mut guest, "10.9.8.2/");
    let port = servers::http("127.0.0.1", &small);
    download(&mut guest, &format!("http://10.9.8.1:{port}/"), &small_sum);
    // Without the other end there is no link; with another one it comes back.
    drop(passt);
    wait_for_carrier(&mut guest, "enp0s7", 0);
    let passt = Passt::start(&socket);
    wait_for_carrier(&mut guest, "enp0s7", 1);
    wait_for_address(&mut guest, "10.9.8.2/");
    download(&mut guest, &format!("http://10.9.8.1:{port}/"), &small_sum);
    drop(passt);
    debian::power_off(&mut guest);
}

/// Moves this thread, and what it starts from now on, into a new network namespace; `false` if the host does not let us.
fn enter_new_network() -> bool {
    if !rustix::process::geteuid().is_root() {
        println!("not root: no tap device can be made");
        return false;
    }
    let name = format!("bhyve-e2e-{}", std::process::id());
    let ip = |args: &[&str]| {
        let output = Command::new("ip").args(args).output().expect("cannot run ip");
        let text = String::from_utf8_lossy(&output.stderr);
        (output.status.success(), format!("ip {args:?}: {}: {}", output.status, text.trim()))
    };
    let (made, why) = ip(&["netns", "add", &name]);
    if !made || fs::File::open("/dev/net/tun").is_err() {
        println!("the host has no tap devices for us: {why}");
        return false;
    }
    let entered = fs::File::open(format!("/run/netns/{name}")).map(|file| {
        let kind = Some(rustix::thread::LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(file.as_fd(), kind)
    });
    // It lives as long as somebody is in it.
    ip(&["netns", "delete", &name]);
    entered.expect("a network namespace that was made").expect("root may enter network namespaces");
    let (up, why) = ip(&["link", "set", "lo", "up"]);
    assert!(up, "{why}");
    true
}

/// Both ways over the tap device that bhyve has made.
fn use_tap(guest: &mut Guest) {
    let output = Command::new("ip").args(["addr", "add", "192.168.78.1/24", "dev", "tap7"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let mtu = Command::new("ip").args(["-o", "link", "show", "tap7"]).output().unwrap();
    assert!(String::from_utf8_lossy(&mtu.stdout).contains("mtu 3000"), "{mtu:?}");
    guest.shell("networkctl -q down enp0s7; ip addr add 192.168.78.2/24 dev enp0s7; ip link set enp0s7 up");
    guest.shell("ping -c 3 -i 0.2 -W 5 -s 2900 -M do 192.168.78.1");
    let folder = files::scratch();
    let (noise, sum) = servers::noise(folder.path(), 50);
    let port = servers::http("192.168.78.1", &noise);
    download(guest, &format!("http://192.168.78.1:{port}/"), &sum);

    let listener = TcpListener::bind("192.168.78.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut bytes).unwrap();
        bytes
    });
    guest.shell("head -c 20M /dev/urandom >/tmp/noise");
    guest.shell(&format!("socat -u OPEN:/tmp/noise TCP:192.168.78.1:{port}"));
    let sum = sha256(&reader.join().unwrap());
    guest.shell(&format!("sha256sum /tmp/noise | grep {sum}"));
    // The link follows the host's.
    let output = Command::new("ip").args(["link", "set", "tap7", "down"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let (_, status) = guest.shell_status("ping -c 1 -W 1 192.168.78.1");
    guest.check(status != 0, "the network works although the tap device is down");
    let output = Command::new("ip").args(["link", "set", "tap7", "up"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    guest.shell("ping -c 3 -i 0.2 -W 5 192.168.78.1");
}

/// A guest in a restricted network reaches nobody, and the network answers so at once. Beside it a tap device, where the
/// host lets us make one.
#[test]
fn restricted_user_mode_networking_tap_and_the_guests_offloads() {
    let has_tap = enter_new_network();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mac = "02:11:22:33:44:55";
    let nic = format!("6,virtio-net,slirp,mac={mac},mtu=4000,queues=2");
    let mut args = vec!["-s", &nic];
    if has_tap {
        args.extend(["-s", "7,virtio-net,tap7,mtu=3000,queues=2"]);
    }
    let machine = Debian::amd64().cpus(2).args(&args).build();
    let mut guest = machine.boot();
    wait_for_address(&mut guest, "10.0.2.15/");
    let (_, status) = guest.shell_status(&format!("curl -s --max-time 20 http://10.0.2.2:{port}/"));
    guest.check(status == 7, &format!("curl ended with {status}"));
    guest.shell("ping -c 1 -W 5 10.0.2.2");
    let card = guest.shell("cd /sys/class/net/enp0s6; cat address mtu carrier; ls queues | wc -l; ls queues; cd /");
    guest.check(card.starts_with(&format!("{mac}\n4000\n1\n")), "address, MTU or carrier");
    guest.check(["rx-0", "rx-1", "tx-0", "tx-1"].iter().all(|queue| card.contains(queue)), "two pairs of queues");
    if has_tap {
        use_tap(&mut guest);
    }
    debian::power_off(&mut guest);
}

/// What two guests have between them: ports of a switch, a unix socket, a vhost-user switch, and a
/// null-modem cable.
#[test]
fn two_guests() {
    let folder = files::scratch();
    let ports = ["A", "B"].map(|side| folder.path().join(format!("switch{side}")));
    vhost_switch::start([&ports[0], &ports[1]]);
    let cable = format!("nmdm-e2e-{}", std::process::id());
    let start = |side: &str, listen: &str, cpus, permit| {
        let socket = folder.path().join("cable").display().to_string();
        let linux = Linux::generic()
            .cpus(cpus)
            .device(&format!("6,virtio-net,vale0:{side}"))
            .device(&format!("7,virtio-net,unix:{socket}{listen}"))
            .device(&format!("8,virtio-net,vhost-user:{}/switch{side},queues=2", folder.path().display()))
            .key(&format!("lpc.com2.path=/dev/{cable}{side}"));
        let mut guest = Guest::start(&linux.bhyve().in_folder(folder.path()), permit);
        guest.wait_for(e2e::linux::PROMPT);
        guest
    };
    let mut one = start("A", ",listen", 2, 3);
    wait_for_carrier(&mut one, "eth0", 1);
    wait_for_carrier(&mut one, "eth1", 0);
    let mut two = start("B", "", 1, 0);
    wait_for_carrier(&mut one, "eth1", 1);
    // The echo of a long command goes over several lines.
    let sum_in =
        |output: String| output.split_whitespace().find(|word| word.len() == 64).unwrap_or_default().to_owned();
    let sum = sum_in(one.shell("head -c 20000000 /dev/urandom >/tmp/noise; sha256sum </tmp/noise"));
    for (card, network) in [("eth0", "192.168.77"), ("eth1", "192.168.78"), ("eth2", "192.168.79")] {
        for (guest, host) in [(&mut one, 1), (&mut two, 2)] {
            guest.shell(&format!("ip link set {card} up && ip addr add {network}.{host}/24 dev {card}"));
        }
        one.shell(&format!("ping -c 3 -W 5 {network}.2 && httpd -p {network}.1:8{} -h /tmp", &network[9..]));
        let got = two.shell(&format!("wget -q -O - http://{network}.1:8{}/noise | sha256sum", &network[9..]));
        two.check(sum_in(got) == sum, "what arrived is not what was sent");
    }
    one.shell("[ $(ls /sys/class/net/eth2/queues | wc -l) = 4 ]");
    for guest in [&mut one, &mut two] {
        guest.shell("stty -F /dev/ttyS1 raw -echo && exec 6<>/dev/ttyS1");
    }
    one.shell("echo from one >&6");
    two.shell("read line <&6 && [ \"$line\" = 'from one' ] && echo from two >&6");
    one.shell("read line <&6 && [ \"$line\" = 'from two' ]");
    for mut guest in [one, two] {
        guest.send("poweroff\n");
        guest.expect_exit(1);
    }
}
