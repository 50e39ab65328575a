//! Small servers on the host for guests to talk to. All are on the loopback address, on ports that the kernel chooses, and
//! end with the test.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

/// Serves a file by HTTP, whatever is asked for, at `address`; returns the port.
///
/// # Panics
/// There is no such address here.
pub fn http(address: &str, file: &Path) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap_or_else(|why| panic!("cannot listen on {address}: {why}"));
    let port = listener.local_addr().expect("a bound socket has an address").port();
    let file = file.to_owned();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client may go away.
            let _ = answer_http(stream, &file);
        }
    });
    port
}

fn answer_http(mut stream: TcpStream, file: &Path) -> io::Result<()> {
    let mut request = Vec::new();
    let mut bytes = [0; 4096];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut bytes)? {
            0 => return Ok(()),
            count => request.extend_from_slice(&bytes[..count]),
        }
    }
    let mut file = fs::File::open(file)?;
    let len = file.metadata()?.len();
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n")?;
    io::copy(&mut file, &mut stream)?;
    Ok(())
}

/// A name server that knows one address for every name; returns its port.
///
/// # Panics
/// The host gives no port.
pub fn dns(address: Ipv4Addr) -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a port on the loopback address");
    let port = socket.local_addr().expect("a bound socket has an address").port();
    thread::spawn(move || {
        let mut bytes = [0; 1500];
        while let Ok((count, from)) = socket.recv_from(&mut bytes) {
            if let Some(answer) = answer_dns(&bytes[..count], address) {
                // A client may go away.
                let _ = socket.send_to(&answer, from);
            }
        }
    });
    port
}

/// The answer to a query with one question (RFC 1035, 4.1): the address, if an IPv4 address was asked for.
fn answer_dns(query: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let name = query.get(12..)?.iter().position(|byte| *byte == 0)? + 13;
    let question = query.get(12..name + 4)?;
    let is_address = query.get(name..name + 2)? == [0, 1];
    let mut answer = query.get(..2)?.to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
    answer.extend(question);
    if is_address {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}

/// Writes a file of `megabytes` that cannot be guessed into `folder`; returns it and its SHA-256 sum.
///
/// # Panics
/// There is no room, or no sha256sum.
pub fn noise(folder: &Path, megabytes: u64) -> (PathBuf, String) {
    let path = folder.join("noise");
    let random = fs::File::open("/dev/urandom").expect("cannot open /dev/urandom");
    let mut file = fs::File::create(&path).expect("cannot make a file");
    io::copy(&mut random.take(megabytes << 20), &mut file).expect("cannot write a file");
    let output = Command::new("sha256sum").arg(&path).output().expect("cannot run sha256sum");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let sum = text.split_whitespace().next().expect("sha256sum prints a sum").to_owned();
    (path, sum)
}
