//! TPMs of the host: something that takes a command and gives a response.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Bytes of the header that commands and responses begin with: tag, size, code (TPM 2.0 Library, part 1, section 18).
pub const HEADER_SIZE: usize = 10;
/// The longest command or response that goes through.
pub const MAX_SIZE: usize = 4096;

/// Why a TPM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    /// No such type.
    #[error("unknown TPM type \"{0}\": use passthru or swtpm")]
    Type(String),
    /// Another version.
    #[error("unsupported TPM version \"{0}\": only 2.0 is there")]
    Version(String),
    /// Another register interface.
    #[error("unsupported TPM interface \"{0}\": only crb is there")]
    Interface(String),
    /// The host's device.
    #[error("cannot open the TPM device {path}: is it there, and does nobody else use it?")]
    Device {
        /// The device.
        path: String,
        /// What the host said.
        source: io::Error,
    },
    /// Something that is no device.
    #[error("{0} is no TPM device: a character device such as /dev/tpm0 is wanted")]
    NoDevice(String),
    /// swtpm's socket.
    #[error(
        "cannot connect to swtpm at {path}: is it running, as \"swtpm socket --tpm2 --server type=unixio,path={path}\"?"
    )]
    Socket {
        /// The socket.
        path: String,
        /// What the host said.
        source: io::Error,
    },
}

/// A TPM 2.0 of the host.
pub trait Tpm: Send {
    /// Has `command` executed and returns the response. Takes as long as the TPM does.
    ///
    /// # Errors
    /// The TPM does not answer, or not as one does.
    fn execute(&mut self, command: &[u8]) -> io::Result<Vec<u8>>;
}

/// Opens the TPM of a type (`passthru` or `swtpm`) at `path`.
///
/// # Errors
/// It cannot be opened, or there is no such type.
pub fn open(kind: &str, path: &str) -> Result<Box<dyn Tpm>, TpmError> {
    match kind {
        "passthru" => Ok(Box::new(Passthru::open(path)?)),
        "swtpm" => Ok(Box::new(Swtpm::connect(path)?)),
        _ => Err(TpmError::Type(kind.to_owned())),
    }
}

/// The host's own TPM: a character device that answers each write with one read.
struct Passthru(File);

impl Passthru {
    fn open(path: &str) -> Result<Self, TpmError> {
        let error = |source| TpmError::Device { path: path.to_owned(), source };
        // Looked at first: writing to another file would be a pity.
        let kind = Path::new(path).metadata().map_err(error)?.file_type();
        if !kind.is_char_device() {
            return Err(TpmError::NoDevice(path.to_owned()));
        }
        OpenOptions::new().read(true).write(true).open(path).map(Self).map_err(error)
    }
}

impl Tpm for Passthru {
    fn execute(&mut self, command: &[u8]) -> io::Result<Vec<u8>> {
        self.0.write_all(command)?;
        let mut response = vec![0; MAX_SIZE];
        let size = self.0.read(&mut response)?;
        response.truncate(size);
        check(&response)?;
        Ok(response)
    }
}

/// swtpm as a server on a Unix socket: commands and responses follow each other on the stream.
struct Swtpm(UnixStream);

impl Swtpm {
    fn connect(path: &str) -> Result<Self, TpmError> {
        let connected = UnixStream::connect(path);
        connected.map(Self).map_err(|source| TpmError::Socket { path: path.to_owned(), source })
    }
}

impl Tpm for Swtpm {
    fn execute(&mut self, command: &[u8]) -> io::Result<Vec<u8>> {
        self.0.write_all(command)?;
        let mut response = vec![0; HEADER_SIZE];
        self.0.read_exact(&mut response)?;
        let size = size_field(&response);
        if !(HEADER_SIZE..=MAX_SIZE).contains(&size) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a response of {size} bytes")));
        }
        response.resize(size, 0);
        self.0.read_exact(&mut response[HEADER_SIZE..])?;
        Ok(response)
    }
}

/// The size that the header of a command or response gives; 0 if there is no whole header.
pub fn size_field(bytes: &[u8]) -> usize {
    match bytes {
        [_, _, a, b, c, d, _, _, _, _, ..] => u32::from_be_bytes([*a, *b, *c, *d]) as usize,
        _ => 0,
    }
}

fn check(response: &[u8]) -> io::Result<()> {
    if size_field(response) == response.len() && !response.is_empty() {
        return Ok(());
    }
    let text = format!("a response of {} bytes that says it has {}", response.len(), size_field(response));
    Err(io::Error::new(io::ErrorKind::InvalidData, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A server that gives fixed answers, in pieces.
    fn server(answers: Vec<Vec<u8>>) -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tpm");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for answer in answers {
                let mut command = [0; HEADER_SIZE];
                if stream.read_exact(&mut command).is_err() {
                    return;
                }
                for piece in answer.chunks(7) {
                    stream.write_all(piece).unwrap();
                }
            }
        });
        (folder, path.display().to_string())
    }

    fn response(size: u32, len: usize) -> Vec<u8> {
        let mut bytes = vec![0x80, 1];
        bytes.extend(size.to_be_bytes());
        bytes.resize(len, 0);
        bytes
    }

    #[test]
    fn swtpm_answers_are_put_together() {
        let (_folder, path) = server(vec![response(10, 10), response(4096, 4096), response(4097, 10)]);
        let mut tpm = open("swtpm", &path).unwrap();
        let command = response(10, 10);
        assert_eq!(tpm.execute(&command).unwrap(), response(10, 10));
        assert_eq!(tpm.execute(&command).unwrap().len(), 4096);
        assert_eq!(tpm.execute(&command).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(tpm.execute(&command).is_err(), "it has gone");
    }

    #[test]
    fn what_is_no_tpm_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let file = file.display().to_string();
        let text = |kind, path: &str| open(kind, path).err().unwrap().to_string();
        assert!(text("passthru", &file).contains("is no TPM device"));
        assert!(text("passthru", "/nowhere/tpm").contains("cannot open the TPM device /nowhere/tpm"));
        assert!(text("swtpm", &file).contains("cannot connect to swtpm"));
        assert!(text("tis", &file).contains("unknown TPM type \"tis\""));
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(size_field(&[1, 2, 3]), 0);
        assert!(check(&[]).is_err() && check(&response(11, 10)).is_err() && check(&response(10, 10)).is_ok());
    }
}
