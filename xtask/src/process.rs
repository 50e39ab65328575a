//! Running other programs, and telling what is going on.

use std::env;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

/// Says on stderr what is done next, so that a slow step does not look like a hang.
pub(crate) fn say(what: &str) {
    eprintln!("xtask: {what}");
}

/// Finds a program in PATH and in the administrator's folders, which an ordinary user's PATH lacks.
pub(crate) fn find_tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let admin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(admin).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Finds a program or says which Debian package has it.
pub(crate) fn need_tool(name: &str, package: &str) -> Result<PathBuf> {
    find_tool(name).with_context(|| format!("{name} is not installed: get it with \"sudo apt-get install {package}\""))
}

/// Runs a command to its end, with this program's stdout and stderr; its failure is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status =
        command.stdin(Stdio::null()).status().with_context(|| format!("cannot start {}", describe(command)))?;
    success(command, status)
}

/// Runs a command and returns what it prints on stdout; its stderr is part of the error if it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {}", describe(command)))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        bail!("{} failed ({}): {}", describe(command), out.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Runs a command, passes its stdout on as it comes and shows each line of it to `see`.
pub(crate) fn run_watched(command: &mut Command, mut see: impl FnMut(&str)) -> Result<ExitStatus> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", describe(command)))?;
    if let Some(stdout) = child.stdout.take() {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? != 0 {
            let mut out = std::io::stdout().lock();
            out.write_all(&line)?;
            out.flush()?;
            see(String::from_utf8_lossy(&line).trim_end());
            line.clear();
        }
    }
    Ok(child.wait()?)
}

fn success(command: &Command, status: ExitStatus) -> Result<()> {
    if !status.success() {
        bail!("{} failed ({status})", describe(command));
    }
    Ok(())
}

/// The command as one would type it.
pub(crate) fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// The cargo that runs this program.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::layout::repository());
    command
}
