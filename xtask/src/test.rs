//! `cargo xtask test`: everything that must hold before a change goes in.

use std::env;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::guests::Store;
use crate::process::{cargo, find_tool, output, run as run_to_end, run_watched, say};
use crate::{boot, firmware, layout};

/// Programs that the tests need, and the Debian packages that have them.
const TOOLS: &[(&str, &str)] = &[
    ("mke2fs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("dpkg-deb", "dpkg"),
    ("apt-get", "apt"),
    ("mmdebstrap", "mmdebstrap"),
    ("sfdisk", "fdisk"),
    ("mkfs.vfat", "dosfstools"),
    ("mcopy", "mtools"),
    ("xorriso", "xorriso"),
    ("qemu-img", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("swtpm", "swtpm"),
    ("iasl", "acpica-tools"),
    ("/usr/lib/qemu/virtiofsd", "qemu-system-common"),
    ("passt", "passt"),
    ("ip", "iproute2"),
];

/// How one step went, for the summary.
struct Step {
    name: &'static str,
    passed: bool,
    time: Duration,
}

/// Tests that ran, by cargo's own count.
#[derive(Debug, Default, PartialEq)]
struct Counts {
    passed: u64,
    failed: u64,
}

/// Runs all steps, also after one has failed, and ends with a summary.
pub(crate) fn run() -> Result<ExitCode> {
    let mut steps = Vec::new();
    let mut counts = Counts::default();
    let mut step = |name, work: &mut dyn FnMut() -> Result<()>| {
        say(&format!("==> {name}"));
        let start = Instant::now();
        let result = work();
        if let Err(error) = &result {
            say(&format!("{name}: {error:#}"));
        }
        steps.push(Step { name, passed: result.is_ok(), time: start.elapsed() });
    };
    step("tools", &mut install_tools);
    step("guests", &mut || Store::open()?.all().map(drop));
    step("format", &mut || run_to_end(cargo().args(["fmt", "--all", "--check"])));
    step("lints", &mut || run_to_end(cargo().args(CLIPPY)));
    step("other hosts", &mut check_other_hosts);
    step("release build", &mut || boot::build().map(drop));
    step("tests", &mut || run_tests(&mut counts));
    Ok(summary(&steps, &counts))
}

const CLIPPY: [&str; 6] = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];

/// A host without the translator, KVM for x86 guests and host instructions.
const OTHER_HOST: &str = "aarch64-unknown-linux-gnu";

/// Checks that the program builds for another architecture, where the interpreter alone runs.
fn check_other_hosts() -> Result<()> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let sysroot = output(Command::new(rustc).args(["--print", "sysroot"]))?;
    let library = Path::new(sysroot.trim()).join("lib/rustlib").join(OTHER_HOST);
    if !library.exists() {
        let rustup = find_tool("rustup").with_context(|| format!("Rust's library for {OTHER_HOST} is missing"))?;
        run_to_end(Command::new(rustup).args(["target", "add", OTHER_HOST]))?;
    }
    run_to_end(cargo().args(["check", "--package", "bhyve", "--target", OTHER_HOST]).env("RUSTFLAGS", "-D warnings"))
}

/// Gets what is missing where that needs no questions asked: rustup's components, and as root on
/// Debian the packages.
fn install_tools() -> Result<()> {
    for (command, component) in [("cargo-fmt", "rustfmt"), ("cargo-clippy", "clippy")] {
        if cargo().args([&command["cargo-".len()..], "--version"]).output().is_ok_and(|o| o.status.success()) {
            continue;
        }
        let rustup = find_tool("rustup")
            .with_context(|| format!("{command} is missing: install Rust's component {component}"))?;
        run_to_end(Command::new(rustup).args(["component", "add", component]))?;
    }
    let needed = || TOOLS.iter().chain(&firmware::BUILD_TOOLS);
    let missing = || needed().filter(|(tool, _)| find_tool(tool).is_none());
    let mut packages: Vec<_> = missing().map(|(_, package)| *package).collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    let apt = find_tool("apt-get").context("there is no apt-get: the guests come from Debian packages")?;
    if !rustix::process::geteuid().is_root() {
        bail!("missing programs: get them with \"sudo apt-get install {}\"", packages.join(" "));
    }
    install_packages(&apt, &packages)?;
    match missing().next() {
        Some((tool, package)) => bail!("{tool} is missing although {package} is installed"),
        None => Ok(()),
    }
}

fn install_packages(apt: &Path, packages: &[&str]) -> Result<()> {
    say(&format!("installing {}", packages.join(" ")));
    let apt_get = || {
        let mut command = Command::new(apt);
        command.env("DEBIAN_FRONTEND", "noninteractive").arg("-qq");
        command
    };
    run_to_end(apt_get().arg("update"))?;
    run_to_end(apt_get().args(["install", "--yes", "--no-install-recommends"]).args(packages))
}

/// All tests; those that boot guests find the program and the guests by the environment.
fn run_tests(counts: &mut Counts) -> Result<()> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    command.env("BHYVE_BIN", layout::release_program("bhyve"));
    command.env("BHYVE_GUESTS", layout::guests()?);
    if env::var_os("RUST_BACKTRACE").is_none() {
        command.env("RUST_BACKTRACE", "1");
    }
    let status = run_watched(&mut command, |line| counts.add(line))?;
    if !status.success() {
        bail!("{} tests failed ({status})", counts.failed);
    }
    if counts.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

impl Counts {
    /// Adds what a line "test result: ok. 3 passed; 0 failed; ..." says.
    fn add(&mut self, line: &str) {
        let Some((_, numbers)) = line.strip_prefix("test result: ").and_then(|l| l.split_once(". ")) else {
            return;
        };
        for number in numbers.split(';') {
            let mut words = number.split_whitespace();
            let count = words.next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            match words.next() {
                Some("passed") => self.passed += count,
                Some("failed") => self.failed += count,
                _ => {}
            }
        }
    }
}

fn summary(steps: &[Step], counts: &Counts) -> ExitCode {
    println!("\nSummary");
    for step in steps {
        let verdict = if step.passed { "ok" } else { "FAILED" };
        println!("  {verdict:<7} {:<14} {:>7.1} s", step.name, step.time.as_secs_f64());
    }
    let broken = steps.iter().filter(|step| !step.passed).count();
    // A step that could not run its tests counts as a failure of its own.
    let failed = if broken > 0 { counts.failed.max(1) } else { counts.failed };
    println!("{} passed, {failed} failed", counts.passed);
    if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_all_crates_add_up() {
        let mut counts = Counts::default();
        counts.add("test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s");
        counts.add("test result: FAILED. 40 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out");
        counts.add("running 3 tests");
        counts.add("test passed ... ok");
        assert_eq!(counts, Counts { passed: 43, failed: 2 });
    }
}
