//! How the program ends before a guest runs: exit code and text, text for stdout and stderr kept apart.

use std::error::Error;
use std::fmt::{self, Display};
use std::io::{self, Write};

/// The name in front of messages; other programs search for it.
pub const PROGRAM: &str = "bhyve";

/// Success; for bhyve(8) it also means that the guest rebooted.
pub const OK: u8 = 0;
/// Usage errors and `config.dump=1`; for bhyve(8) it also means that the guest powered off.
pub const POWEROFF: u8 = 1;
/// Usage errors: the same number as [`POWEROFF`].
pub const USAGE: u8 = 1;
/// Every vCPU of the guest halted with interrupts disabled.
pub const HALT: u8 = 2;
/// The guest ended in a triple fault.
pub const TRIPLE_FAULT: u8 = 3;
/// bhyve ended because of an error.
pub const ERROR: u8 = 4;
/// `EX_USAGE` of sysexits(3): an option's argument that does not parse.
pub const EX_USAGE: u8 = 64;
/// `EX_OSERR` of sysexits(3): the host refused something.
pub const EX_OSERR: u8 = 71;

/// The program is to end now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// The exit code.
    pub code: u8,
    /// What to write to standard output.
    pub stdout: String,
    /// What to write to standard error.
    pub stderr: String,
}

impl Exit {
    /// Ends with `text` on standard output.
    pub fn with_stdout(code: u8, text: impl Into<String>) -> Self {
        Self { code, stdout: text.into(), stderr: String::new() }
    }

    /// Ends with `text` as it is on standard error.
    pub fn with_stderr(code: u8, text: impl Into<String>) -> Self {
        Self { code, stdout: String::new(), stderr: text.into() }
    }

    /// Ends with one line on standard error, the program's name in front, as by errx(3).
    pub fn message(code: u8, text: impl Display) -> Self {
        Self::with_stderr(code, format!("{PROGRAM}: {text}\n"))
    }

    /// Ends with an error and its causes as one line on standard error.
    #[must_use]
    pub fn from_error(code: u8, error: &dyn Error) -> Self {
        Self::message(code, Chain(error))
    }

    /// Puts a line before the text for standard error.
    #[must_use]
    pub fn preceded_by(mut self, line: impl Display) -> Self {
        self.stderr = format!("{line}\n{}", self.stderr);
        self
    }

    /// Writes the texts where they belong.
    ///
    /// # Errors
    /// A stream could not be written.
    pub fn write_to(&self, stdout: &mut dyn Write, stderr: &mut dyn Write) -> io::Result<()> {
        stdout.write_all(self.stdout.as_bytes())?;
        stdout.flush()?;
        stderr.write_all(self.stderr.as_bytes())
    }
}

/// An error followed by its causes, separated by colons.
struct Chain<'a>(&'a dyn Error);

impl Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_kept_apart() {
        let exit = Exit::message(EX_USAGE, "invalid memsize 'x'").preceded_by("first");
        let (mut out, mut err) = (Vec::new(), Vec::new());
        exit.write_to(&mut out, &mut err).unwrap();
        assert!(out.is_empty());
        assert_eq!(err, b"first\nbhyve: invalid memsize 'x'\n");
        Exit::with_stdout(OK, "list\n").write_to(&mut out, &mut Vec::new()).unwrap();
        assert_eq!(out, b"list\n");
    }
}
