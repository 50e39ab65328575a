//! The command line of bhyve(8).
//!
//! Options act in order of appearance on one tree, so that a later option replaces an earlier value: `-k base.cfg -o
//! cpus=4` overrides the file and the other order lets the file win. The one operand is the VM's name.
//!
//! Parsing creates nothing. Front ends call the program without a name to see what it supports; they get the messages
//! of this module and the usage text, at once.

mod cpu;
mod fwcfg;
mod getopt;
mod lpc;
mod slot;
mod usage;

#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};

use crate::error::ConfigError;
use crate::exit::{self, Exit};
use crate::file;
use crate::legacy::{self, DeviceSyntax};
use crate::settings;
use crate::store::{Config, Warnings};
use getopt::{GetOpt, Opt, OptError};
use usage::usage;

/// Letters without argument, and the value they store. `-h` is not among them.
const FLAGS: [(u8, Option<(&str, &str)>); 15] = [
    (b'a', Some(("x86.x2apic", "false"))),
    (b'A', None), // ACPI tables are always made
    (b'C', Some(("memory.guest_in_core", "true"))),
    (b'D', Some(("destroy_on_poweroff", "true"))),
    (b'e', Some(("x86.strictio", "true"))),
    (b'H', Some(("x86.vmexit_on_hlt", "true"))),
    (b'I', None), // there is always an I/O APIC
    (b'M', Some(("monitor", "true"))),
    (b'P', Some(("x86.vmexit_on_pause", "true"))),
    (b'S', Some(("memory.wired", "true"))),
    (b'u', Some(("rtc.use_localtime", "false"))),
    (b'W', Some(("virtio_msix", "false"))),
    (b'w', Some(("x86.strictmsr", "false"))),
    (b'x', Some(("x86.x2apic", "true"))),
    (b'Y', Some(("x86.mptable", "false"))),
];

/// Letters with an argument.
const WITH_ARGUMENT: &[u8] = b"cfGKklmnoprsU";

/// Reads a command line, without the program's name, into a configuration.
///
/// `devices` is what `-s` accepts; warnings come out as they arise.
///
/// # Errors
/// The program is to end now, with the code and texts given: mistakes, help, and `config.dump=1`.
pub fn parse_command_line<I>(
    args: I,
    devices: &[DeviceSyntax],
    warnings: impl Warnings + 'static,
) -> Result<Config, Exit>
where
    I: IntoIterator<Item = OsString>,
{
    let mut line = CommandLine { config: Config::with_defaults(warnings), devices, restore: None };
    let mut flags: Vec<u8> = FLAGS.iter().map(|(letter, _)| *letter).collect();
    flags.push(b'h');
    let mut options = GetOpt::new(args.into_iter(), &flags, WITH_ARGUMENT);
    while let Some(option) = options.next_option() {
        match option {
            Ok(Opt::Flag(letter)) => line.flag(letter)?,
            Ok(Opt::Argument(letter, argument)) => line.option(letter, &argument)?,
            Err(error) => return Err(bad_option(&error)),
        }
    }
    line.finish(options.operands())
}

fn bad_option(error: &OptError) -> Exit {
    let text = match error {
        OptError::Illegal(letter) => format!("illegal option -- {}", letter.escape_ascii()),
        OptError::MissingArgument(letter) => format!("option requires an argument -- {}", letter.escape_ascii()),
    };
    usage(exit::USAGE).preceded_by(format!("{}: {text}", exit::PROGRAM))
}

/// What the options seen so far amount to.
struct CommandLine<'a> {
    config: Config,
    devices: &'a [DeviceSyntax],
    restore: Option<String>,
}

impl CommandLine<'_> {
    fn flag(&mut self, letter: u8) -> Result<(), Exit> {
        let known = FLAGS.iter().find(|(known, _)| *known == letter);
        match known {
            Some((_, Some((path, value)))) => self.set(path, *value),
            Some((_, None)) => Ok(()),
            None => Err(usage(exit::OK)),
        }
    }

    fn option(&mut self, letter: u8, argument: &OsStr) -> Result<(), Exit> {
        if letter == b'k' {
            return Ok(file::load(&mut self.config, argument.as_ref())?);
        }
        let argument = utf8(argument, || format!("the argument of -{}", letter as char))?;
        match letter {
            b'c' => cpu::topology(self, argument),
            b'f' => fwcfg::item(self, argument),
            b'G' => self.debug_server(argument),
            b'K' => self.set("keyboard.layout", argument),
            b'l' => lpc::device(self, argument),
            b'm' => self.set("memory.size", argument),
            b'n' => cpu::numa_domain(self, argument),
            b'o' => self.assignment(argument),
            b'p' => cpu::pinning(self, argument),
            b'r' => {
                self.restore = Some(argument.into());
                Ok(())
            }
            b's' => slot::function(self, argument),
            b'U' => self.set("uuid", argument),
            _ => Err(usage(exit::USAGE)),
        }
    }

    fn finish(mut self, mut operands: impl Iterator<Item = OsString>) -> Result<Config, Exit> {
        let name = operands.next();
        if operands.next().is_some() {
            return Err(usage(exit::USAGE));
        }
        settings::apply_old_spellings(&mut self.config)?;
        if let Some(file) = self.restore {
            return Err(Exit::message(
                exit::USAGE,
                format!("cannot restore from '{file}': this version has no snapshots yet; start the guest without -r"),
            ));
        }
        if let Some(name) = name {
            let name = utf8(&name, || "the VM's name".into())?.to_owned();
            self.set("name", name)?;
        }
        if self.config.get_str("name").is_none_or(|name| name.is_empty()) {
            return Err(usage(exit::USAGE));
        }
        if self.config.bool_or("config.dump", false)? {
            return Err(Exit::with_stdout(exit::POWEROFF, self.config.dump()));
        }
        Ok(self.config)
    }

    fn set(&mut self, path: &str, value: impl Into<String>) -> Result<(), Exit> {
        self.config.set(path, value).map_err(|error| ConfigError::from(error).into())
    }

    /// `-o key=value`.
    fn assignment(&mut self, argument: &str) -> Result<(), Exit> {
        match file::split_option(argument) {
            Some((key, value)) => self.set(key, value),
            None => Err(invalid("configuration option", argument)),
        }
    }

    /// `-G [w][address:]port`. The last colon is the one that counts: there may be more in the address.
    fn debug_server(&mut self, argument: &str) -> Result<(), Exit> {
        let argument = match argument.strip_prefix('w') {
            Some(rest) => {
                self.set("gdb.wait", "true")?;
                rest
            }
            None => argument,
        };
        let port = match argument.rsplit_once(':') {
            Some((address, port)) => {
                self.set("gdb.address", address)?;
                port
            }
            None => argument,
        };
        if port.is_empty() { Ok(()) } else { self.set("gdb.port", port) }
    }
}

/// Ends because an option's argument does not parse.
fn invalid(what: &str, argument: &str) -> Exit {
    Exit::message(exit::EX_USAGE, format!("invalid {what} '{argument}'"))
}

/// Whether a `-s` or `-l` argument asks for the list: any beginning of the word, even nothing.
fn asks_for_help(argument: &str) -> bool {
    "help".starts_with(argument)
}

fn utf8(text: &OsStr, what: impl FnOnce() -> String) -> Result<&str, Exit> {
    text.to_str().ok_or_else(|| {
        Exit::message(exit::EX_USAGE, format!("{} is not valid UTF-8: '{}'", what(), text.to_string_lossy()))
    })
}
