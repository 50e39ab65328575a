//! Ways between programs of the guest and of the host: consoles, named ports, the guest agent, sockets.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use e2e::linux::Guest;
use e2e::{Console, Debian, Linux, PATIENCE, Terminal, debian, files};

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

/// An event as the kernel's devices send it, on 64-bit hosts.
fn input_event(kind: u16, code: u16, value: u32) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[16..18].copy_from_slice(&kind.to_le_bytes());
    bytes[18..20].copy_from_slice(&code.to_le_bytes());
    bytes[20..].copy_from_slice(&value.to_le_bytes());
    bytes
}

/// A keyboard that the test plays: a key is seen in the guest, a light on the host.
fn keyboard(guest: &mut Guest, stream: &mut UnixStream) {
    let card = guest.shell("grep -lx 'E2E keyboard' /sys/class/input/event*/device/name");
    let card = card.split('/').nth(4).unwrap_or_else(|| guest.fail("the guest has no keyboard")).to_owned();
    guest.shell(&format!("cat /sys/class/input/{card}/device/id/vendor | grep -x 1234 && exec 7<>/dev/input/{card}"));
    for (kind, code, value) in [(1, 30, 1), (0, 0, 0)] {
        stream.write_all(&input_event(kind, code, value)).unwrap();
    }
    // Type, code and value come behind the time.
    let events = guest.shell("dd bs=24 count=2 <&7 2>/dev/null | od -An -v -tu2 -w24");
    let events: Vec<Vec<_>> = events.lines().map(|line| line.split_whitespace().skip(8).collect()).collect();
    assert!(events.ends_with(&[vec!["1", "30", "1", "0"], vec!["0", "0", "0", "0"]]), "{events:?}");
    let light = input_event(17, 1, 1);
    let octal: String = light.iter().map(|byte| format!("\\{byte:03o}")).collect();
    guest.shell(&format!("printf '{octal}' >&7"));
    // The kernel may have set others before.
    let mut bytes = [0; 24];
    while bytes[16..] != light[16..] {
        stream.read_exact(&mut bytes).unwrap();
    }
}

#[test]
fn a_keyboard_and_serial_ports() {
    let folder = files::scratch();
    let path = |name: &str| folder.path().join(name);
    let listener = UnixListener::bind(path("keyboard")).unwrap();
    let linux = Linux::generic()
        .device(&format!("6,virtio-input,unix:{}", path("keyboard").display()))
        .key(&format!("lpc.com2.path=file:{}", path("log").display()))
        .key(&format!("lpc.com3.path=unix:{}", path("serial").display()));
    let far_side = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let codes = "B: 01 00 00 00 40\nB: 11 07\n";
        write!(stream, "N: E2E keyboard\nI: 0003 1234 5678 0111\n{codes}\n").unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    });
    let mut guest = linux.boot();
    let mut stream = far_side.join().unwrap();
    keyboard(&mut guest, &mut stream);
    // Output goes to the file at once, and both ways to whoever has connected.
    guest.shell("stty -F /dev/ttyS1 raw && echo to the file >/dev/ttyS1");
    let start = std::time::Instant::now();
    while !std::fs::read_to_string(path("log")).is_ok_and(|text| text == "to the file\n") {
        guest.check(start.elapsed() < PATIENCE, "nothing comes into the file");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let mut serial = connect(&path("serial"));
    guest.shell("stty -F /dev/ttyS2 raw -echo && exec 6<>/dev/ttyS2");
    serial.write_all(b"from the host\n").unwrap();
    guest.shell("read line <&6 && [ \"$line\" = 'from the host' ] && echo from the guest >&6");
    read_until(&mut serial, "from the guest\n");
    guest.send("poweroff\n");
    guest.expect_exit(1);
}

/// A console on bhyve's own terminal: the guest hears when its size changes.
#[test]
fn the_size_of_a_console_follows_the_terminal() {
    let folder = files::scratch();
    let serial = folder.path().join("serial");
    let linux = Linux::generic()
        .device("6,virtio-console,console=stdio")
        .key(&format!("lpc.com1.path=unix:{}", serial.display()));
    let terminal = Terminal::new();
    terminal.set_size(100, 30);
    let mut vm = linux.bhyve().start_on(&terminal);
    let start = std::time::Instant::now();
    while !serial.exists() {
        vm.check(start.elapsed() < PATIENCE, "there is no serial port");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let stream = connect(&serial);
    vm.use_console(Console::new(stream.try_clone().unwrap(), stream));
    vm.wait_for(e2e::linux::PROMPT);
    for (columns, rows) in [(100, 30), (77, 22)] {
        terminal.set_size(columns, rows);
        // The kernel tells the processes of a terminal's session, to which this one does not belong.
        vm.signal(rustix::process::Signal::WINCH);
        let test = format!("[ \"$(stty -F /dev/hvc0 size)\" = '{rows} {columns}' ]");
        vm.send(&format!(
            "for try in $(seq 1 300); do {test} && break; sleep 0.1; done; {test} && echo SIZE\"\"-{columns}\n"
        ));
        vm.wait_for(&format!("SIZE-{columns}"));
    }
    vm.send("poweroff\n");
    vm.expect_exit(1);
}
