//! Option parsing as getopt(3) of BSD does it.
//!
//! Flags bundle (`-AHP`), an argument may be glued to its option (`-c2`), parsing stops at the first word that is no
//! option, and `--` ends the options. Libraries for Rust permute operands or give `=` a meaning; front ends rely on
//! neither.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// One option.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opt {
    /// A letter without argument.
    Flag(u8),
    /// A letter and its argument.
    Argument(u8, OsString),
}

/// A word that cannot be understood.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum OptError {
    /// No such letter.
    Illegal(u8),
    /// The letter needs an argument and the command line ends.
    MissingArgument(u8),
}

/// The options at the beginning of a list of arguments.
pub(super) struct GetOpt<'a, I: Iterator> {
    args: std::iter::Peekable<I>,
    flags: &'a [u8],
    with_argument: &'a [u8],
    /// The current word of bundled options, last letter first.
    bundle: Vec<u8>,
}

impl<'a, I: Iterator<Item = OsString>> GetOpt<'a, I> {
    /// `args` without the program's name.
    pub(super) fn new(args: I, flags: &'a [u8], with_argument: &'a [u8]) -> Self {
        Self { args: args.peekable(), flags, with_argument, bundle: Vec::new() }
    }

    /// The next option; `None` at the end of the options.
    pub(super) fn next_option(&mut self) -> Option<Result<Opt, OptError>> {
        if self.bundle.is_empty() {
            let word = self.args.next_if(|arg| is_option(arg))?;
            if word == "--" {
                return None;
            }
            self.bundle = word.as_bytes()[1..].iter().rev().copied().collect();
        }
        let letter = self.bundle.pop()?;
        if self.flags.contains(&letter) {
            Some(Ok(Opt::Flag(letter)))
        } else if self.with_argument.contains(&letter) {
            Some(self.argument(letter))
        } else {
            Some(Err(OptError::Illegal(letter)))
        }
    }

    fn argument(&mut self, letter: u8) -> Result<Opt, OptError> {
        let glued: Vec<u8> = std::mem::take(&mut self.bundle).into_iter().rev().collect();
        let argument = if glued.is_empty() {
            self.args.next().ok_or(OptError::MissingArgument(letter))?
        } else {
            OsString::from_vec(glued)
        };
        Ok(Opt::Argument(letter, argument))
    }

    /// What follows the options.
    pub(super) fn operands(self) -> impl Iterator<Item = OsString> {
        self.args
    }
}

/// A lone `-` is no option.
fn is_option(arg: &OsStr) -> bool {
    arg.len() > 1 && arg.as_bytes()[0] == b'-'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> (Vec<Result<Opt, OptError>>, Vec<OsString>) {
        let args = words.iter().map(OsString::from).collect::<Vec<_>>().into_iter();
        let mut options = GetOpt::new(args, b"AHPw", b"cl");
        let mut found = Vec::new();
        while let Some(option) = options.next_option() {
            found.push(option);
        }
        (found, options.operands().collect())
    }

    fn flag(letter: u8) -> Result<Opt, OptError> {
        Ok(Opt::Flag(letter))
    }

    fn argument(letter: u8, text: &str) -> Result<Opt, OptError> {
        Ok(Opt::Argument(letter, text.into()))
    }

    #[test]
    fn flags_bundle_and_arguments_may_be_glued() {
        let (options, operands) = parsed(&["-AHPww", "-c2", "-wl", "bootrom,x", "-Pc", "4", "vm0"]);
        let expected = [
            flag(b'A'),
            flag(b'H'),
            flag(b'P'),
            flag(b'w'),
            flag(b'w'),
            argument(b'c', "2"),
            flag(b'w'),
            argument(b'l', "bootrom,x"),
            flag(b'P'),
            argument(b'c', "4"),
        ];
        assert_eq!(options, expected);
        assert_eq!(operands, ["vm0"]);
    }

    #[test]
    fn options_end_at_the_first_operand() {
        let (options, operands) = parsed(&["-A", "vm0", "-H"]);
        assert_eq!(options, [flag(b'A')]);
        assert_eq!(operands, ["vm0", "-H"]);
        let (options, operands) = parsed(&["-A", "--", "-H"]);
        assert_eq!(options, [flag(b'A')]);
        assert_eq!(operands, ["-H"]);
        let (options, operands) = parsed(&["-", "-A"]);
        assert!(options.is_empty());
        assert_eq!(operands, ["-", "-A"]);
    }

    #[test]
    fn an_argument_may_look_like_an_option() {
        assert_eq!(parsed(&["-c", "-A"]).0, [argument(b'c', "-A")]);
        assert_eq!(parsed(&["-c", "--", "vm0"]).0, [argument(b'c', "--")]);
        assert_eq!(parsed(&["-c", "", "vm0"]).0, [argument(b'c', "")]);
    }

    #[test]
    fn mistakes_are_told() {
        assert_eq!(parsed(&["-Az"]).0, [flag(b'A'), Err(OptError::Illegal(b'z'))]);
        assert_eq!(parsed(&["-Ac"]).0, [flag(b'A'), Err(OptError::MissingArgument(b'c'))]);
        assert_eq!(parsed(&["--help"]).0[0], Err(OptError::Illegal(b'-')));
    }
}
