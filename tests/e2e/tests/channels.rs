//! Ways between programs of the guest and of the host: consoles, named ports, the guest agent, sockets.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use e2e::linux::Guest;
use e2e::{Debian, PATIENCE, debian};

/// Reads until `text` has come.
fn read_until(stream: &mut impl Read, text: &str) -> String {
    let mut all = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&all).ends_with(text) {
        match stream.read(&mut byte) {
            Ok(1) => all.push(byte[0]),
            other => panic!("{other:?} after {:?}, not {text:?}", String::from_utf8_lossy(&all)),
        }
    }
    String::from_utf8_lossy(&all).into_owned()
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap_or_else(|why| panic!("{}: {why}", path.display()));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn guest_agent(agent: &Path) {
    let mut stream = connect(agent);
    stream.write_all(b"{\"execute\":\"guest-ping\"}\n").unwrap();
    assert_eq!(read_until(&mut stream, "\n").trim(), "{\"return\": {}}");
    stream.write_all(b"{\"execute\":\"guest-get-host-name\"}\n").unwrap();
    assert!(read_until(&mut stream, "\n").contains("\"debian\""));
    // A second client after the first.
    drop(stream);
    let mut stream = connect(agent);
    stream.write_all(b"{\"execute\":\"guest-sync\",\"arguments\":{\"id\":4711}}\n").unwrap();
    read_until(&mut stream, "{\"return\": 4711}\n");
}

fn named_port(guest: &mut Guest, path: &Path) {
    let mut stream = connect(path);
    guest.send("exec 4<>/dev/virtio-ports/org.example.0; head -n 1 <&4; echo from the guest >&4; exec 4>&-\n");
    stream.write_all(b"from the host\n").unwrap();
    guest.wait_for("\nfrom the host");
    guest.wait_for(e2e::linux::PROMPT);
    read_until(&mut stream, "from the guest\n");
}

fn console(path: &Path) {
    let mut terminal = File::options().read(true).write(true).open(path).unwrap();
    terminal.write_all(b"\r").unwrap();
    read_until(&mut terminal, "login: ");
}

fn sockets(guest: &mut Guest, folder: &Path) {
    // From the host to the guest.
    guest.shell(
        "socat -t60 VSOCK-LISTEN:5000,fork EXEC:cat >/dev/null 2>&1 & \
         until ss -l --vsock | grep -q 5000; do sleep 0.2; done",
    );
    let mut stream = connect(&folder.join("vsock"));
    stream.write_all(b"CONNECT 5000\n").unwrap();
    assert!(read_until(&mut stream, "\n").starts_with("OK "));
    let text: Vec<u8> = (0..1_000_000u32).map(|n| (n.wrapping_mul(n) >> 8) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let sent = text.clone();
    let thread = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut echo = Vec::new();
    stream.read_to_end(&mut echo).unwrap();
    thread.join().unwrap();
    assert!(echo == text, "{} bytes came back, or others", echo.len());
    let mut nobody = connect(&folder.join("vsock"));
    nobody.write_all(b"CONNECT 5001\n").unwrap();
    assert_eq!(nobody.read(&mut [0; 8]).unwrap_or(0), 0, "nobody listens there");
    // From the guest to the host.
    let listener = UnixListener::bind(folder.join("vsock_6000")).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    guest.shell("head -c 10000000 /dev/urandom >/tmp/noise && socat -u FILE:/tmp/noise VSOCK-CONNECT:2:6000");
    let sum = guest.shell("sha256sum </tmp/noise");
    let file = folder.join("noise");
    std::fs::write(&file, thread.join().unwrap()).unwrap();
    let here = std::process::Command::new("sha256sum").stdin(File::open(&file).unwrap()).output().unwrap();
    assert_eq!(sum.trim(), String::from_utf8_lossy(&here.stdout).trim());
    let (_, status) = guest.shell_status("socat -u /dev/null VSOCK-CONNECT:2:6001");
    guest.check(status != 0, "connected to nobody");
}

#[test]
fn agent_ports_console_and_sockets_of_debian() {
    let machine = Debian::amd64().cpus(2).args(&[
        "-s",
        "6,virtio-console,console=pty:pty,org.qemu.guest_agent.0=agent.sock,org.example.0=./port",
        "-s",
        "7,virtio-vsock,./vsock,cid=77",
    ]);
    let machine = machine.build();
    let folder = machine.folder().to_owned();
    let mut guest = machine.boot();
    guest.shell("systemctl start qemu-guest-agent && systemctl is-active qemu-guest-agent");
    guest_agent(&folder.join("agent.sock"));
    named_port(&mut guest, &folder.join("port"));
    guest.shell("systemctl start serial-getty@hvc0");
    console(&folder.join("pty"));
    sockets(&mut guest, &folder);
    debian::power_off(&mut guest);
    assert!(!folder.join("port").exists() && !folder.join("vsock").exists(), "sockets go with the VM");
}
