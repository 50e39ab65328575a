//! The process around the VM: its title, its signals, and a terminal that is usable afterwards whatever happens.
#![allow(unsafe_code)]

use std::io;
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use backend::tty::restore_terminals;

/// Makes every way out of the process restore the terminal: fatal signals and panics. A panic in any thread ends the process by
/// abort(3), because a VM with a thread missing must not go on.
pub(crate) fn guard_terminal() {
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT] {
        // SAFETY: the structure is plain data, zero is a valid start, and the handler is async-signal-safe: restore_terminals
        // only calls tcsetattr.
        unsafe {
            let mut action = std::mem::zeroed::<libc::sigaction>();
            action.sa_sigaction = on_fatal_signal as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESETHAND | libc::SA_ONSTACK;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore_terminals();
        report(info);
        std::process::abort();
    }));
}

extern "C" fn on_fatal_signal(signal: libc::c_int) {
    restore_terminals();
    // The signal may have come from another process: then returning alone would go on as if nothing had happened.
    // SAFETY: raise(3) is async-signal-safe. The signal takes effect when this handler returns, where the thread was
    // interrupted, and by its default action (SA_RESETHAND).
    unsafe { libc::raise(signal) };
}

/// Prints warnings of the parts on standard error.
struct Log;

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }
    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            eprintln!("bhyve: {}", record.args());
        }
    }
    fn flush(&self) {}
}

/// Sends warnings to standard error. A second call changes nothing.
pub(crate) fn log_to_stderr() {
    if log::set_logger(&Log).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

/// What SIGTERM does while the guest listens to its power button.
pub(crate) trait PowerButton: Send + Sync {
    /// Whether the guest has enabled ACPI.
    fn is_connected(&self) -> bool;
    /// Presses the button.
    fn press(&self);
}

/// The thread that takes signals.
pub(crate) struct SignalThread(Arc<OnceLock<Arc<dyn PowerButton>>>);

impl SignalThread {
    /// From now on SIGTERM presses `button`, if the guest listens to it.
    pub(crate) fn connect(&self, button: Arc<dyn PowerButton>) {
        // There is one VM, so this is the first button.
        let _ = self.0.set(button);
    }
}

/// Starts the thread that takes signals: SIGTERM presses the power button once the guest has enabled ACPI; until then, and for
/// the other signals that end a process, the default action follows after the terminal is restored. To be called before
/// the terminal is made raw.
///
/// # Errors
/// The host refused a signal handler or the thread.
pub(crate) fn handle_signals() -> io::Result<SignalThread> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT])?;
    let button = Arc::<OnceLock<Arc<dyn PowerButton>>>::default();
    let thread = SignalThread(button.clone());
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            if signal == SIGTERM
                && let Some(button) = button.get().filter(|button| button.is_connected())
            {
                button.press();
                continue;
            }
            restore_terminals();
            // Never returns for these signals.
            let _ = emulate_default_handler(signal);
        }
    })?;
    Ok(thread)
}

/// Makes the process list show `bhyve: NAME` and nothing else as the command line, as front ends expect.
///
/// The kernel shows the memory where the arguments were at start. If its last byte is not NUL it shows only the text up
/// to the first NUL: the convention of setproctitle(3).
pub(crate) fn set_title(name: &str) {
    let title = format!("bhyve: {name}");
    let _ = rustix::thread::set_name(c"bhyve");
    let Some((start, end)) = argument_area() else { return };
    let room = end - start;
    if room < 2 {
        return;
    }
    let mut area = vec![0u8; room];
    let shown = title.len().min(room - 2);
    area[..shown].copy_from_slice(&title.as_bytes()[..shown]);
    area[room - 1] = b'.';
    // SAFETY: the kernel says that the arguments lie here; the memory is this process's own stack, writable, and Rust's standard
    // library has copied what it needs before main (this program reads its arguments once, at the start).
    unsafe { std::ptr::copy_nonoverlapping(area.as_ptr(), start as *mut u8, room) };
}

/// Start and end of the arguments in memory (proc(5), /proc/pid/stat, fields 48 and 49).
fn argument_area() -> Option<(usize, usize)> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is in parentheses and may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let start: usize = fields.nth(48 - 3)?.parse().ok()?;
    let end: usize = fields.next()?.parse().ok()?;
    (start != 0 && end > start).then_some((start, end))
}
