//! Which Debian mirrors this machine uses, read from its apt configuration (sources.list(5)), so
//! that a machine that reaches only a mirror of its own gets its guests there.

use std::fs;
use std::path::Path;

/// Debian's releases and their aliases: an entry for one of these is for Debian, not for Ubuntu.
const SUITES: [&str; 11] = [
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "oldstable",
    "stable",
    "testing",
    "unstable",
    "oldoldstable",
];

/// The addresses of the main archive and of the security archive.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mirrors {
    pub(crate) main: String,
    pub(crate) security: Option<String>,
    /// False where the machine's own entry says so, as those for snapshots of the archive must.
    pub(crate) check_valid_until: bool,
}

/// One source of packages, in either of the two formats.
#[derive(Debug, Default)]
struct Entry {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: String,
    check_valid_until: bool,
}

impl Mirrors {
    /// The mirrors that the apt configuration in a folder (`/etc/apt`) names, with Debian's own for
    /// those that it does not name.
    pub(crate) fn of_machine(etc_apt: &Path) -> Self {
        let mut entries = read(&etc_apt.join("sources.list"));
        let mut parts: Vec<_> = fs::read_dir(etc_apt.join("sources.list.d"))
            .map(|folder| folder.flatten().map(|file| file.path()).collect())
            .unwrap_or_default();
        parts.sort();
        entries.extend(parts.iter().flat_map(|file| read(file)));
        Self::from_entries(&entries)
    }

    /// One mirror named by the user, who may reach no security archive.
    pub(crate) fn named(main: &str) -> Self {
        Self { main: main.to_owned(), security: None, check_valid_until: true }
    }

    fn from_entries(entries: &[Entry]) -> Self {
        let find = |security| {
            entries.iter().filter(|entry| entry.is_debian(security)).find_map(|entry| {
                let uri = entry.uris.iter().find(|uri| is_debian_uri(uri))?;
                Some((uri.clone(), entry.check_valid_until))
            })
        };
        let default = |uri: &str| (uri.to_owned(), true);
        let (main, check_main) = find(false).unwrap_or_else(|| default("http://deb.debian.org/debian"));
        let (security, check_security) = find(true).unwrap_or_else(|| default("http://deb.debian.org/debian-security"));
        Self { main, security: Some(security), check_valid_until: check_main && check_security }
    }
}

impl Entry {
    /// Whether the entry is for Debian's main archive or (`security`) for its security archive.
    /// Other archives name their suites after Debian's too, but have other signing keys.
    fn is_debian(&self, security: bool) -> bool {
        let signer = self.signed_by.rsplit('/').next().unwrap_or_default();
        let suite = |suite: &String| {
            let (name, kind) = suite.split_once(['-', '/']).unwrap_or((suite, ""));
            SUITES.contains(&name) && kind == if security { "security" } else { "" }
        };
        (signer.is_empty() || signer.starts_with("debian-archive"))
            && self.components.iter().any(|c| c == "main")
            && self.suites.iter().any(suite)
    }
}

fn is_debian_uri(uri: &str) -> bool {
    let last = uri.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    !uri.starts_with("cdrom:") && last.contains("debian")
}

fn read(file: &Path) -> Vec<Entry> {
    let text = fs::read_to_string(file).unwrap_or_default();
    match file.extension().and_then(|e| e.to_str()) {
        Some("list") => text.lines().filter_map(one_line).collect(),
        Some("sources") => stanzas(&text),
        _ => Vec::new(),
    }
}

/// `deb [ OPTION=VALUE ... ] URI SUITE COMPONENT...`
fn one_line(line: &str) -> Option<Entry> {
    let line = line.split('#').next()?.trim().strip_prefix("deb")?;
    let rest = line.strip_prefix([' ', '\t'])?.trim();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inside) => inside.split_once(']')?,
        None => ("", rest),
    };
    let option = |name: &str| {
        let mut words = options.split_whitespace();
        words.find_map(|w| w.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default().to_owned()
    };
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Entry {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by: option("signed-by"),
        check_valid_until: option("check-valid-until") != "no",
    })
}

/// The deb822 format: `Field: value` lines, stanzas set apart by empty lines.
fn stanzas(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            let mut lines = stanza.lines().filter(|line| !line.starts_with('#'));
            let value = lines.find_map(|line| {
                let (field, value) = line.split_once(':')?;
                field.trim().eq_ignore_ascii_case(name).then(|| value.trim())
            });
            value.unwrap_or_default()
        };
        let words = |name| field(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        if !words("Types").contains(&"deb".to_owned()) || field("Enabled") == "no" {
            continue;
        }
        entries.push(Entry {
            uris: words("URIs"),
            suites: words("Suites"),
            components: words("Components"),
            signed_by: field("Signed-By").to_owned(),
            check_valid_until: field("Check-Valid-Until") != "no",
        });
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirrors(list: &str, deb822: &str) -> Mirrors {
        let mut entries: Vec<_> = list.lines().filter_map(one_line).collect();
        entries.extend(stanzas(deb822));
        Mirrors::from_entries(&entries)
    }

    fn debian() -> Mirrors {
        mirrors("", "")
    }

    #[test]
    fn one_line_entries_are_understood() {
        let got = mirrors(
            "# deb http://no.example/debian bookworm main\n\
             deb-src http://src.example/debian bookworm main\n\
             deb [arch=amd64 check-valid-until=no] http://a.example/debian/ trixie main contrib # main\n\
             deb http://b.example/debian-security trixie-security main\n",
            "",
        );
        assert_eq!(got.main, "http://a.example/debian/");
        assert_eq!(got.security.as_deref(), Some("http://b.example/debian-security"));
        assert!(!got.check_valid_until);
    }

    #[test]
    fn stanzas_are_understood() {
        let got = mirrors(
            "",
            "Types: deb\n# comment: no\nURIs: https://a.example/debian\nSuites: bookworm bookworm-updates\n\
             Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
             Types: deb deb-src\nURIs: https://a.example/debian-security\nSuites: bookworm-security\n\
             Components: main\n",
        );
        assert_eq!(got.main, "https://a.example/debian");
        assert_eq!(got.security.as_deref(), Some("https://a.example/debian-security"));
        assert!(got.check_valid_until);
    }

    #[test]
    fn other_archives_are_left_alone() {
        let list = "deb http://archive.ubuntu.com/ubuntu noble main universe\n\
                    deb cdrom:[Debian GNU/Linux 12]/debian bookworm main\n\
                    deb [signed-by=/etc/apt/keyrings/other.gpg] https://c.example/builds/debian bookworm main\n\
                    deb https://d.example/chrome/deb stable main\n\
                    deb [arch=amd64 https://broken.example/debian bookworm main\n";
        let deb822 = "Types: deb\nEnabled: no\nURIs: http://e.example/debian\nSuites: bookworm\nComponents: main\n";
        assert_eq!(mirrors(list, deb822), debian());
    }

    #[test]
    fn a_missing_configuration_gives_debians_own_addresses() {
        assert_eq!(Mirrors::of_machine(Path::new("/nonexistent")), debian());
    }
}
