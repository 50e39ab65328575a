//! Fetching Debian packages as an ordinary user: apt-get with a state folder of its own. The
//! machine's proxies and credentials apply; its package lists, its installed packages and its hooks
//! do not. Signatures are checked against Debian's keys, which come with the repository because
//! only Debian machines have them.

use std::cell::Cell;
use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::deb::remove_folder;
use crate::layout::Arch;
use crate::process::{need_tool, output, run, say};
use crate::sources::Mirrors;

/// The release whose packages the guests are made of.
pub(crate) const RELEASE: &str = "bookworm";

/// Public keys that sign this release: archive, security archive, stable release.
const KEYS: &str = include_str!("../guest/keys/debian-bookworm.asc");

/// A private apt for one architecture.
pub(crate) struct Apt {
    arch: Arch,
    folder: PathBuf,
    config: PathBuf,
    updated: Cell<bool>,
}

impl Apt {
    /// Lays out the state in a folder, which may be there from before.
    pub(crate) fn open(folder: PathBuf, arch: Arch) -> Result<Self> {
        Self::open_kind(folder, arch, "deb")
    }

    /// As [`Apt::open`], for source packages.
    pub(crate) fn open_sources(folder: PathBuf, arch: Arch) -> Result<Self> {
        Self::open_kind(folder, arch, "deb-src")
    }

    fn open_kind(folder: PathBuf, arch: Arch, kind: &str) -> Result<Self> {
        for sub in ["lists/partial", "archives/partial", "sources.list.d"] {
            fs::create_dir_all(folder.join(sub))
                .with_context(|| format!("cannot make {}", folder.join(sub).display()))?;
        }
        let mirrors = match std::env::var("BHYVE_DEBIAN_MIRROR") {
            Ok(uri) if !uri.is_empty() => Mirrors::named(&uri),
            _ => Mirrors::of_machine(Path::new("/etc/apt")),
        };
        let write = |name: &str, content: &str| -> Result<PathBuf> {
            let file = folder.join(name);
            fs::write(&file, content).with_context(|| format!("cannot write {}", file.display()))?;
            Ok(file)
        };
        write("status", "")?;
        write("sources.list.d/debian.sources", &sources(&mirrors, arch, kind))?;
        let config = write("apt.conf", &configuration(&folder, arch))?;
        Ok(Self { arch, folder, config, updated: Cell::new(false) })
    }

    /// The package that a meta package stands for: its dependency whose name begins with `prefix`.
    pub(crate) fn resolve(&self, meta: &str, prefix: &str) -> Result<String> {
        self.update()?;
        dependency(&self.show(meta)?, prefix)
            .with_context(|| format!("Debian's {meta} depends on no package {prefix}*"))
    }

    /// The only sources, a file in apt's deb822 format.
    pub(crate) fn sources(&self) -> PathBuf {
        self.folder.join("sources.list.d/debian.sources")
    }

    /// Downloads a package unless it is there already; returns its file.
    pub(crate) fn download(&self, package: &str) -> Result<PathBuf> {
        let folder = self.folder.join("packages").join(package);
        if let Some(file) = find_deb(&folder) {
            return Ok(file);
        }
        self.update()?;
        let record = self.show(package)?;
        let size = field(&record, "Size").and_then(|size| size.parse::<u64>().ok());
        say(&format!(
            "downloading {package} {} for {} ({:.1} MB)",
            field(&record, "Version").unwrap_or_default(),
            self.arch,
            size.unwrap_or_default() as f64 / 1e6
        ));
        // What is left of an interrupted download must not be taken for a package.
        let partial = folder.with_file_name(format!("{package}.partial"));
        fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
        let mut command = self.command("apt-get")?;
        run(command.current_dir(&partial).arg("download").arg(package))
            .with_context(|| format!("cannot download the Debian package {package}"))?;
        remove_folder(&folder)?;
        fs::rename(&partial, &folder).with_context(|| format!("cannot make {}", folder.display()))?;
        find_deb(&folder).with_context(|| format!("apt-get left no package in {}", folder.display()))
    }

    /// Downloads a source package into a folder; returns the file that describes it.
    pub(crate) fn download_source(&self, package: &str, folder: &Path) -> Result<PathBuf> {
        self.update()?;
        say(&format!("downloading the source of {package}"));
        run(self.command("apt-get")?.current_dir(folder).args(["source", "--download-only", package]))
            .with_context(|| format!("cannot download the Debian source package {package}"))?;
        let files = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
        let mut files = files.flatten().map(|file| file.path());
        files
            .find(|file| file.extension().is_some_and(|e| e == "dsc"))
            .with_context(|| format!("apt-get left no source package in {}", folder.display()))
    }

    /// Gets the package lists, once in this process.
    fn update(&self) -> Result<()> {
        if self.updated.get() {
            return Ok(());
        }
        say(&format!("getting Debian's package lists ({RELEASE}, {})", self.arch));
        let hint = "cannot get Debian's package lists; is the network up? \
                    Another mirror: BHYVE_DEBIAN_MIRROR=http://HOST/debian";
        run(self.command("apt-get")?.arg("update")).context(hint)?;
        self.updated.set(true);
        Ok(())
    }

    fn show(&self, package: &str) -> Result<String> {
        let record = output(self.command("apt-cache")?.args(["show", "--no-all-versions", package]))
            .with_context(|| format!("Debian {RELEASE} has no package {package}, says the mirror"))?;
        if field(&record, "Version").is_none() {
            bail!("Debian {RELEASE} has no package {package}, says the mirror");
        }
        Ok(record)
    }

    fn command(&self, program: &str) -> Result<Command> {
        let mut command = Command::new(need_tool(program, "apt")?);
        command.arg("-c").arg(&self.config).env("LC_ALL", "C");
        if program == "apt-get" && !std::io::stderr().is_terminal() {
            command.arg("-qq");
        }
        Ok(command)
    }
}

/// The only sources, in apt's deb822 format, which takes keys in place and no other ones then.
/// The security archive serves no i386 lists that apt accepts.
fn sources(mirrors: &Mirrors, arch: Arch, kind: &str) -> String {
    let targets = if kind == "deb" { "Packages" } else { "Sources" };
    let valid = if mirrors.check_valid_until { "yes" } else { "no" };
    let keys: Vec<_> = KEYS.lines().map(|line| if line.is_empty() { "." } else { line }).collect();
    let source = |uri: &str, suite: &str| {
        format!(
            "Types: {kind}\nURIs: {uri}\nSuites: {suite}\nComponents: main\nArchitectures: {arch}\n\
             Targets: {targets}\nCheck-Valid-Until: {valid}\nSigned-By:\n {}\n\n",
            keys.join("\n ")
        )
    };
    let mut all = source(&mirrors.main, RELEASE);
    if let (Arch::Amd64, Some(security)) = (arch, &mirrors.security) {
        all += &source(security, &format!("{RELEASE}-security"));
    }
    all
}

/// Read by apt after the machine's own configuration, so this has the last word.
fn configuration(folder: &Path, arch: Arch) -> String {
    let at = |name: &str| folder.join(name).display().to_string();
    format!(
        r#"Dir::State "{state}";
Dir::State::lists "{lists}";
Dir::State::status "{status}";
Dir::Cache "{state}";
Dir::Cache::archives "{archives}";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{sources}";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
#clear APT::Architectures;
APT::Architecture "{arch}";
APT::Architectures {{ "{arch}"; }};
APT::Default-Release "";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Acquire::Languages "none";
Acquire::Retries "3";
"#,
        state = folder.display(),
        lists = at("lists"),
        status = at("status"),
        archives = at("archives"),
        sources = at("sources.list.d"),
    )
}

/// A field of a package's record, as `apt-cache show` prints it.
fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

fn dependency(record: &str, prefix: &str) -> Option<String> {
    let depends = field(record, "Depends")?;
    let names = depends.split([',', '|']).filter_map(|d| d.split_whitespace().next());
    names.map(str::to_owned).find(|name| name.starts_with(prefix))
}

fn find_deb(folder: &Path) -> Option<PathBuf> {
    let files = fs::read_dir(folder).ok()?.flatten().map(|file| file.path());
    files.into_iter().find(|file| file.extension().is_some_and(|e| e == "deb"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nSize: 1504\n\
        Depends: initramfs-tools | dracut, linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n";

    #[test]
    fn meta_packages_resolve() {
        let found = dependency(RECORD, "linux-image-");
        assert_eq!(found.as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(dependency(RECORD, "busybox"), None);
        assert_eq!(field(RECORD, "Version"), Some("6.1.192-2"));
        assert_eq!(field(RECORD, "Ver"), None);
    }

    #[test]
    fn only_amd64_uses_the_security_archive() {
        let mirrors =
            Mirrors { security: Some("http://s.example/s".into()), ..Mirrors::named("http://a.example/debian") };
        let text = sources(&mirrors, Arch::Amd64, "deb");
        assert!(text.contains("\nURIs: http://a.example/debian\nSuites: bookworm\n"));
        assert!(text.contains("\nSuites: bookworm-security\n"));
        assert!(!sources(&mirrors, Arch::I386, "deb").contains("bookworm-security"));
    }

    #[test]
    fn keys_are_folded_into_their_field() {
        let text = sources(&Mirrors::named("http://a.example/debian"), Arch::I386, "deb");
        let (_, keys) = text.split_once("Signed-By:\n").unwrap();
        assert!(keys.starts_with(" -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n"));
        assert!(keys.trim_end().lines().all(|line| line.starts_with(' ') && line.len() > 1));
    }
}
