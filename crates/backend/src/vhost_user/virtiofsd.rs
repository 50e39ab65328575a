//! A virtiofsd of our own: started for one device, ended with it.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::VhostError;

/// Where virtiofsd is, outside the search path: that of QEMU's sources in Debian, that written in Rust, in distributions.
const PLACES: [&str; 4] =
    ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/local/libexec/virtiofsd"];

/// How long a process may take to end.
const MOMENT: Duration = Duration::from_secs(2);

/// A running virtiofsd; it ends with the value.
pub struct Virtiofsd {
    child: Child,
    program: PathBuf,
}

impl Virtiofsd {
    /// Starts one that shares `folder`, and connects to it. Without a `program`, the one that is installed.
    ///
    /// # Errors
    /// There is no such folder or program, or the host refuses.
    pub fn start(program: Option<&Path>, folder: &Path) -> Result<(Self, UnixStream), VhostError> {
        let no_folder = |source| VhostError::Folder { path: folder.to_owned(), source };
        let folder = folder.canonicalize().map_err(no_folder)?;
        std::fs::read_dir(&folder).map_err(no_folder)?;
        let program = program.map(Path::to_owned).or_else(installed).ok_or(VhostError::NoVirtiofsd)?;
        let failed = |source| VhostError::Start { program: program.clone(), source };
        let (listener, stream) = sockets().map_err(failed)?;
        let mut source = std::ffi::OsString::from("source=");
        source.push(&folder);
        let mut command = Command::new(&program);
        // Both kinds take a listening socket and, the newer one for the sake of the older, this way to name the folder.
        // Ctrl-C at the terminal is not meant for it.
        command.arg("--fd=0").arg("-o").arg(source).process_group(0);
        let child = command.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener))).stdout(Stdio::null()).spawn();
        Ok((Self { child: child.map_err(failed)?, program }, stream))
    }

    /// Its end, if it has ended or is about to: a connection breaks a little earlier.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let start = Instant::now();
        loop {
            // Fails only for a process that is none of ours.
            let status = self.child.try_wait().ok().flatten();
            if status.is_some() || start.elapsed() > MOMENT {
                return status;
            }
            std::thread::sleep(MOMENT / 100);
        }
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        // It may have ended by itself, as it does when the connection is closed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program where it usually is.
fn installed() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("virtiofsd"));
    found.chain(PLACES.map(PathBuf::from)).find(|place| place.is_file())
}

/// A listening socket, and a connection to it that waits to be accepted. Nobody else can connect.
fn sockets() -> io::Result<(UnixListener, UnixStream)> {
    let mut random = [0; 16];
    rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::empty())?;
    let name: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = std::env::temp_dir().join(format!("bhyve-fs-{name}"));
    let listener = UnixListener::bind(&path)?;
    let stream = UnixStream::connect(&path);
    std::fs::remove_file(&path)?;
    Ok((listener, stream?))
}
