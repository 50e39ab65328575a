//! A command line of bhyve and its running process.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, kill_process, pidfd_open, setrlimit};

use crate::console::Silence;
use crate::{Console, PATIENCE, Terminal, files, kernel};

/// A command line of bhyve.
pub struct Bhyve {
    program: PathBuf,
    args: Vec<OsString>,
    folder: Option<PathBuf>,
    user: Option<u32>,
}

/// What a program that has ended left behind.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Bhyve {
    /// The program under test with `args`.
    ///
    /// # Panics
    /// There is no program.
    pub fn new<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Self {
        let args = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        Self { program: files::program(), args, folder: None, user: None }
    }

    /// A VM with `args` and the kernel of [`kernel`], which lies in `folder`, the console on standard input and output.
    ///
    /// # Panics
    /// There is no program, or `folder` is not writable.
    pub fn small(folder: &Path, args: &[&str]) -> Self {
        let kernel = format!("kernel.image={}", kernel::write_to(folder).display());
        let board = ["-A", "-H", "-P", "-m", "16M", "-s", "0,hostbridge", "-s", "31,lpc", "-o", &kernel];
        Self::new(board.iter().chain(args)).arg("small").in_folder(folder)
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Starts it in `folder`, which is also where it is to put temporary files.
    pub fn in_folder(mut self, folder: &Path) -> Self {
        self.folder = Some(folder.to_owned());
        self
    }

    /// Runs another copy of the program.
    pub fn with_program(mut self, program: &Path) -> Self {
        program.clone_into(&mut self.program);
        self
    }

    /// Runs it as another user; needs root.
    pub fn as_user(mut self, user: u32) -> Self {
        self.user = Some(user);
        self
    }

    fn command(&self) -> Command {
        static NO_CORES: Once = Once::new();
        // Some tests make it abort.
        NO_CORES.call_once(|| {
            let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
        });
        let mut command = Command::new(&self.program);
        command.args(&self.args).env("RUST_BACKTRACE", "0");
        if let Some(folder) = &self.folder {
            command.current_dir(folder).env("TMPDIR", folder).env("XDG_RUNTIME_DIR", folder).env("HOME", folder);
        }
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command
    }

    fn spawn(&self, stdin: Stdio, stdout: Stdio) -> Child {
        let child = self.command().stdin(stdin).stdout(stdout).stderr(Stdio::piped()).spawn();
        child.unwrap_or_else(|why| panic!("cannot start {}: {why}", self.program.display()))
    }

    /// Runs it to its end, without input.
    ///
    /// # Panics
    /// It does not start or does not end.
    pub fn run(&self) -> Outcome {
        let mut vm = self.start_with(Stdio::null());
        let status = vm.wait();
        vm.console.wait_for_end(PATIENCE);
        Outcome { status, stdout: vm.console.transcript(), stderr: vm.stderr.transcript() }
    }

    /// Starts it with pipes.
    ///
    /// # Panics
    /// It does not start.
    pub fn start(&self) -> Vm {
        self.start_with(Stdio::piped())
    }

    fn start_with(&self, stdin: Stdio) -> Vm {
        let mut child = self.spawn(stdin, Stdio::piped());
        let output = child.stdout.take().expect("stdout is a pipe");
        let console = match child.stdin.take() {
            Some(input) => Console::new(output, input),
            None => Console::new(output, std::io::sink()),
        };
        Vm::new(child, console)
    }

    /// Starts it on `terminal`.
    ///
    /// # Panics
    /// It does not start.
    pub fn start_on(&self, terminal: &Terminal) -> Vm {
        let child = self.spawn(terminal.stdio(), terminal.stdio());
        Vm::new(child, terminal.console())
    }
}

/// A running bhyve. Dropping it kills it.
pub struct Vm {
    child: Child,
    console: Console,
    stderr: Console,
    status: Option<ExitStatus>,
    started: Instant,
}

impl Vm {
    fn new(mut child: Child, console: Console) -> Self {
        let stderr: Box<dyn Read + Send> = match child.stderr.take() {
            Some(pipe) => Box::new(pipe),
            None => Box::new(std::io::empty()),
        };
        let stderr = Console::new(stderr, std::io::sink());
        Self { child, console, stderr, status: None, started: Instant::now() }
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Time since the start.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// The guest's console becomes `console`: its serial port is not on standard input and output.
    pub fn use_console(&mut self, console: Console) {
        self.console = console;
    }

    /// Whether the process has not ended.
    ///
    /// # Panics
    /// It is no child of this one.
    pub fn is_running(&mut self) -> bool {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("a child can be waited for");
        }
        self.status.is_none()
    }

    /// Waits for `text` on the console, after what was found before; returns all text up to its end.
    ///
    /// # Panics
    /// It does not come.
    pub fn wait_for(&mut self, text: &str) -> String {
        let child = &mut self.child;
        let status = &mut self.status;
        let alive = || {
            *status = status.or_else(|| child.try_wait().ok().flatten());
            status.is_none()
        };
        match self.console.wait_for(text, PATIENCE, alive) {
            Ok(passed) => passed,
            Err(why) => {
                // Its end is known a moment after that of its output.
                let end = if why == Silence::Ended { self.end(PATIENCE) } else { None };
                self.fail(&format!("{text:?} did not come ({why:?}, process: {end:?})"))
            }
        }
    }

    /// Waits for `text` on the console or for the end of the process; returns whether the text came.
    pub fn shows(&mut self, text: &str) -> bool {
        let child = &mut self.child;
        self.console.wait_for(text, PATIENCE, || matches!(child.try_wait(), Ok(None))).is_ok()
    }

    /// Waits for `text` on standard error; returns all text up to its end.
    ///
    /// # Panics
    /// It does not come.
    pub fn wait_for_error(&mut self, text: &str) -> String {
        match self.stderr.wait_for(text, PATIENCE, || true) {
            Ok(passed) => passed,
            Err(why) => self.fail(&format!("{text:?} did not come on standard error ({why:?})")),
        }
    }

    /// Types `text`.
    ///
    /// # Panics
    /// Nobody listens.
    pub fn send(&mut self, text: &str) {
        if let Err(why) = self.console.send(text) {
            self.fail(&format!("cannot type {text:?}: {why}"));
        }
    }

    /// Sends a signal to the process.
    ///
    /// # Panics
    /// It has ended.
    pub fn signal(&mut self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        if !self.is_running() || kill_process(pid, signal).is_err() {
            self.fail(&format!("there is no process to send signal {signal:?} to"));
        }
    }

    fn end(&mut self, patience: Duration) -> Option<ExitStatus> {
        if self.is_running() {
            let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()).expect("a child has a pidfd");
            let limit = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: 0 };
            let _ = poll(&mut [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)], Some(&limit));
            self.is_running();
        }
        self.status
    }

    /// Waits for the end of the process and of its output.
    ///
    /// # Panics
    /// It does not end.
    pub fn wait(&mut self) -> ExitStatus {
        match self.end(PATIENCE) {
            Some(status) => {
                self.stderr.wait_for_end(PATIENCE);
                status
            }
            None => self.fail("it does not end"),
        }
    }

    /// Waits for the end and checks that the process exits with `code`.
    ///
    /// # Panics
    /// It does not.
    pub fn expect_exit(&mut self, code: i32) {
        let status = self.wait();
        if status.code() != Some(code) {
            self.fail(&format!("it ended with {status}, not with code {code}"));
        }
    }

    /// What came out on standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.transcript()
    }

    /// What came out on the console so far.
    pub fn transcript(&self) -> String {
        self.console.transcript()
    }

    /// Fails the test with `message` and everything that was printed.
    ///
    /// # Panics
    /// Always.
    pub fn fail(&self, message: &str) -> ! {
        panic!(
            "after {:.1} s: {message}\n--- console ---\n{}\n--- standard error ---\n{}\n---",
            self.age().as_secs_f64(),
            self.transcript(),
            self.stderr()
        )
    }

    /// Fails the test with `message`, unless `condition` holds.
    ///
    /// # Panics
    /// It does not hold.
    pub fn check(&self, condition: bool, message: &str) {
        if !condition {
            self.fail(message);
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
