//! `cargo xtask fuzz DEVICE [SECONDS]`: random drivers of virtio devices, with other seeds each time, for as long as asked.
//!
//! The drivers are those of the devices' tests (`testkit::hostile`), which run a fixed number of steps there.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::process::{cargo, run as run_to_end, say};

/// The folders of the devices.
const DEVICES: [&str; 11] =
    ["balloon", "blk", "console", "fs", "input", "net", "net/vhost", "p9", "rnd", "scsi", "vsock"];

/// What to run.
#[derive(Debug, PartialEq)]
pub(crate) struct Options {
    devices: Vec<&'static str>,
    seconds: u64,
    seed: Option<u64>,
}

impl Options {
    pub(crate) fn parse(args: Vec<OsString>) -> Result<Self> {
        use lexopt::prelude::*;
        let mut options = Self { devices: Vec::new(), seconds: 60, seed: None };
        let mut parser = lexopt::Parser::from_args(args);
        let mut words = Vec::new();
        while let Some(arg) = parser.next()? {
            match arg {
                Long("seed") => options.seed = Some(parser.value()?.parse()?),
                Value(word) => words.push(word.string()?),
                _ => return Err(arg.unexpected().into()),
            }
        }
        let mut words = words.into_iter();
        let name = words.next().unwrap_or_default();
        options.devices = DEVICES.into_iter().filter(|device| name == "all" || name == *device).collect();
        if options.devices.is_empty() {
            bail!("which device? One of {}, or all", DEVICES.join(", "));
        }
        if let Some(seconds) = words.next() {
            options.seconds = seconds.parse()?;
        }
        match words.next() {
            Some(word) => bail!("\"{word}\" is too much"),
            None => Ok(options),
        }
    }
}

/// Runs one device after the other; stops at the first that fails.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    for device in &options.devices {
        say(&format!("{device}: {} seconds", options.seconds));
        let mut command = cargo();
        command.args(["test", "--quiet", "--package", "devices", "--lib", "--", "--exact", "--nocapture"]);
        command.arg(format!("virtio::{}::tests::fuzz", device.replace('/', "::")));
        command.env("BHYVE_FUZZ_SECONDS", options.seconds.to_string());
        if let Some(seed) = options.seed {
            command.env("BHYVE_FUZZ_SEED", seed.to_string());
        }
        run_to_end(&mut command)?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Options> {
        Options::parse(words.split_whitespace().map(OsString::from).collect())
    }

    #[test]
    fn a_device_and_a_time() {
        assert_eq!(parse("blk").unwrap(), Options { devices: vec!["blk"], seconds: 60, seed: None });
        let options = parse("all 5 --seed 7").unwrap();
        assert_eq!((options.devices.len(), options.seconds, options.seed), (DEVICES.len(), 5, Some(7)));
        for words in ["", "disk", "blk x", "blk 5 6", "blk --speed"] {
            assert!(parse(words).is_err(), "{words}");
        }
    }

    #[test]
    fn every_device_has_its_test() {
        for device in DEVICES {
            let file = crate::layout::repository().join(format!("crates/devices/src/virtio/{device}/tests.rs"));
            assert!(std::fs::read_to_string(&file).unwrap().contains("\nfn fuzz() {"), "{}", file.display());
        }
    }
}
