//! The process around a VM: exit codes, signals, title, terminal, serial backends.

use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use e2e::kernel::READY;
use e2e::{Bhyve, Console, PATIENCE, Terminal, Vm, files, host};
use rustix::process::Signal;

const STDIO: [&str; 2] = ["-l", "com1,stdio"];

#[test]
fn every_end_of_the_guest_has_its_exit_code() {
    let folder = files::scratch();
    for (command, code) in [("r", 0), ("p", 1), ("h", 2), ("t", 3)] {
        let mut vm = Bhyve::small(folder.path(), &STDIO).start();
        vm.wait_for(READY);
        vm.send(command);
        vm.expect_exit(code);
    }
}

#[test]
fn a_port_nobody_has_ends_the_vm_only_when_strict() {
    let folder = files::scratch();
    let mut vm = Bhyve::small(folder.path(), &STDIO).start();
    vm.wait_for(READY);
    vm.send("u");
    vm.wait_for("U");
    drop(vm);

    let mut vm = Bhyve::small(folder.path(), &["-e", "-l", "com1,stdio"]).start();
    vm.wait_for(READY);
    vm.send("u");
    let status = vm.wait();
    vm.check(status.signal() == Some(Signal::ABORT.as_raw()), &format!("it ended with {status}, not by SIGABRT"));
    vm.wait_for_error("Unhandled inb 0x0099 at 0x1");
    vm.wait_for_error("vm exit[0]");
    vm.check(vm.stderr().contains("rip"), "the report shows no registers");
    vm.check(!vm.stderr().contains("panicked"), "it panicked");
}

#[test]
fn standard_output_is_the_console_and_nothing_else() {
    let folder = files::scratch();
    let mut vm = Bhyve::small(folder.path(), &STDIO).start();
    vm.wait_for(READY);
    vm.send("xyzp");
    vm.expect_exit(1);
    let text = vm.transcript();
    vm.check(text.starts_with(&format!("{READY}\nxyz")), "the console shows something else");
}

#[test]
fn the_process_list_shows_the_name_of_the_vm_alone() {
    let folder = files::scratch();
    let mut vm = Bhyve::small(folder.path(), &STDIO).start();
    vm.wait_for(READY);
    assert_eq!(host::command_line(vm.pid()).trim_end_matches('\0'), "bhyve: small");
    assert_eq!(host::thread_name(vm.pid()), "bhyve");
}

#[test]
fn sigterm_kills_until_the_guest_enables_acpi_and_then_presses_the_button() {
    let folder = files::scratch();
    let mut vm = Bhyve::small(folder.path(), &STDIO).start();
    vm.wait_for(READY);
    vm.signal(Signal::TERM);
    let status = vm.wait();
    assert_eq!(status.signal(), Some(Signal::TERM.as_raw()));

    let mut vm = Bhyve::small(folder.path(), &STDIO).start();
    vm.wait_for(READY);
    vm.send("a");
    vm.wait_for("A");
    for _ in 0..2 {
        vm.signal(Signal::TERM);
        vm.wait_for("B");
    }
    vm.send("p");
    vm.expect_exit(1);
}

#[test]
fn the_terminal_is_raw_for_the_guest_and_as_before_after_every_end() {
    let folder = files::scratch();
    let bhyve = Bhyve::small(folder.path(), &["-e", "-l", "com1,stdio"]);
    for command in ["r", "p", "h", "t", "u"] {
        let terminal = Terminal::new();
        let before = terminal.modes();
        let mut vm = bhyve.start_on(&terminal);
        vm.wait_for(READY);
        vm.check(terminal.is_raw(), "the terminal is not raw while the guest runs");
        // ^C is a byte for the guest like any other.
        vm.send("\x03");
        vm.wait_for("\x03");
        vm.send(command);
        vm.wait();
        assert_eq!(terminal.modes(), before, "after the guest's {command}");
    }
}

#[test]
fn the_terminal_is_as_before_after_signals_that_end_the_process() {
    let folder = files::scratch();
    let bhyve = Bhyve::small(folder.path(), &STDIO);
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::ABORT, Signal::SEGV, Signal::BUS] {
        let terminal = Terminal::new();
        let before = terminal.modes();
        let mut vm = bhyve.start_on(&terminal);
        vm.wait_for(READY);
        vm.check(terminal.is_raw(), "the terminal is not raw while the guest runs");
        vm.signal(signal);
        let status = vm.wait();
        assert_eq!(status.signal(), Some(signal.as_raw()));
        assert_eq!(terminal.modes(), before, "after signal {signal:?}");
    }
}

#[test]
fn the_terminal_is_as_before_when_the_start_is_interrupted() {
    let folder = files::scratch();
    let bhyve = Bhyve::small(folder.path(), &STDIO);
    for _ in 0..10 {
        let terminal = Terminal::new();
        let before = terminal.modes();
        let mut vm = bhyve.start_on(&terminal);
        while !terminal.is_raw() {
            let running = vm.is_running();
            vm.check(running, "it ended");
        }
        vm.signal(Signal::TERM);
        assert_eq!(vm.wait().signal(), Some(Signal::TERM.as_raw()));
        assert_eq!(terminal.modes(), before);
    }
}

#[test]
fn the_terminal_is_as_before_when_the_start_fails() {
    let folder = files::scratch();
    let terminal = Terminal::new();
    let before = terminal.modes();
    let failing = ["-s", "0,hostbridge", "-s", "31,lpc", "-l", "com1,stdio", "-o", "kernel.image=missing", "vm"];
    let mut vm = Bhyve::new(failing).in_folder(folder.path()).start_on(&terminal);
    vm.expect_exit(4);
    assert_eq!(terminal.modes(), before);
}

#[test]
fn the_console_can_be_another_terminal() {
    let folder = files::scratch();
    let terminal = Terminal::new();
    let before = terminal.modes();
    let backend = format!("com1,{}", terminal.path().display());
    let mut vm = Bhyve::small(folder.path(), &["-l", &backend]).start();
    vm.use_console(terminal.console());
    vm.wait_for(READY);
    vm.check(terminal.is_raw(), "the terminal is not raw while the guest runs");
    vm.send("xyz");
    vm.wait_for("xyz");
    vm.send("p");
    vm.expect_exit(1);
    assert_eq!(terminal.modes(), before);
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("cannot listen");
    listener.local_addr().expect("a listener has an address").port()
}

/// Connects to the console of `vm`, as soon as it listens.
fn connect(vm: &mut Vm, port: u16) -> TcpStream {
    loop {
        match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
            Ok(stream) => return stream,
            Err(why) => vm.check(vm.age() < PATIENCE, &format!("cannot connect to port {port}: {why}")),
        }
        let running = vm.is_running();
        vm.check(running, "it ended");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn console(stream: &TcpStream) -> Console {
    let clone = || stream.try_clone().expect("cannot duplicate a socket");
    Console::new(clone(), clone())
}

#[test]
fn the_console_can_be_a_tcp_port_with_one_client_at_a_time() {
    let folder = files::scratch();
    let port = free_port();
    let backend = format!("com1,tcp={port}");
    let mut vm = Bhyve::small(folder.path(), &["-l", &backend]).start();
    let first = connect(&mut vm, port);
    vm.use_console(console(&first));
    vm.send("x");
    vm.wait_for("x");
    let second = console(&connect(&mut vm, port));
    assert!(second.wait_for_end(PATIENCE), "a second client was not sent away");
    vm.send("y");
    vm.wait_for("y");

    // A client that goes does not take the VM with it, and makes place for the next.
    first.shutdown(Shutdown::Both).expect("the connection stands");
    let third = connect(&mut vm, port);
    vm.use_console(console(&third));
    vm.send("z");
    vm.wait_for("z");
    vm.send("p");
    vm.expect_exit(1);
}

#[test]
fn the_configuration_can_be_shown_instead_of_run() {
    let folder = files::scratch();
    let outcome = Bhyve::small(folder.path(), &["-c", "2", "-l", "com1,stdio", "-o", "config.dump=1"]).run();
    assert_eq!((outcome.status.code(), outcome.stderr.as_str()), (Some(1), ""));
    let lines: Vec<_> = outcome.stdout.lines().collect();
    let image = format!("kernel.image={}", folder.path().join("kernel").display());
    let wanted = [
        "cpus=2",
        "memory.size=16M",
        "lpc.com1.path=stdio",
        "name=small",
        "pci.0.0.0.device=hostbridge",
        "pci.0.31.0.device=lpc",
        &image,
    ];
    for line in wanted {
        assert!(lines.contains(&line), "no {line} in\n{}", outcome.stdout);
    }

    // What it shows is a configuration file that means the same.
    std::fs::write(folder.path().join("vm.conf"), outcome.stdout.replace("config.dump=1\n", "")).unwrap();
    let mut vm = Bhyve::new(["-k", "vm.conf"]).in_folder(folder.path()).start();
    vm.wait_for(READY);
    vm.send("p");
    vm.expect_exit(1);
}
