//! `%(path.to.key)` inside a value: replaced by that key's value when the value is read.
//!
//! Reading, not storing, is the moment: so the order of keys does not matter and later overrides take effect. Both
//! escapes in use are known: `%%` (the manual) and a backslash before any character (the code), the latter only in
//! values that contain a `%` at all.

use crate::tree::{Entry, Node};

/// How deep references may nest.
pub const MAX_NESTING: u32 = 16;

/// How many references one value may pull in. Sixteen levels of two references each stay below it; it stops a file
/// whose keys multiply each other from filling memory.
const MAX_REFERENCES: u32 = 1 << 17;

/// The longest text one value may expand to, in bytes.
const MAX_LENGTH: usize = 1 << 20;

/// How many warnings one value may give; a reference used many times is one mistake.
const MAX_WARNINGS: u32 = 8;

/// Expands `value` against the tree under `root`, telling `warn` what could not be replaced.
///
/// A reference that does not resolve leaves nothing behind; a `%` that starts no reference stays as it is.
pub fn expand(root: &Node, value: &str, warn: &dyn Fn(&str)) -> String {
    let mut expander = Expander { root, warn, references: 0, warnings: 0, out: String::new(), overflowed: false };
    expander.run(value, 0);
    expander.out
}

struct Expander<'a> {
    root: &'a Node,
    warn: &'a dyn Fn(&str),
    references: u32,
    warnings: u32,
    out: String,
    overflowed: bool,
}

impl Expander<'_> {
    fn run(&mut self, value: &str, depth: u32) {
        if !value.contains('%') {
            self.push(value);
            return;
        }
        let mut rest = value;
        while let Some(at) = rest.find(['%', '\\']) {
            if self.overflowed {
                return;
            }
            self.push(&rest[..at]);
            rest = &rest[at..];
            rest = match rest.strip_prefix('\\') {
                Some(after) => self.escaped(after, value),
                None => self.percent(rest, value, depth),
            };
        }
        self.push(rest);
    }

    /// The character after a backslash stands for itself. Returns what follows it.
    fn escaped<'v>(&mut self, after: &'v str, value: &str) -> &'v str {
        match after.chars().next() {
            Some(c) => {
                let (literal, rest) = after.split_at(c.len_utf8());
                self.push(literal);
                rest
            }
            None => {
                self.warning(&format!("Trailing \\ in configuration value \"{value}\""));
                ""
            }
        }
    }

    /// Handles the `%` that `rest` begins with. Returns what follows.
    fn percent<'v>(&mut self, rest: &'v str, value: &str, depth: u32) -> &'v str {
        if let Some(after) = rest.strip_prefix("%%") {
            self.push("%");
            return after;
        }
        if depth >= MAX_NESTING {
            self.warning("Too many recursive references in configuration value");
            self.push("%");
            return &rest[1..];
        }
        let Some((path, after)) = rest.strip_prefix("%(").and_then(|inner| inner.split_once(')')) else {
            self.warning(&format!("Invalid reference in configuration value \"{value}\""));
            self.push("%");
            return &rest[1..];
        };
        if path.is_empty() {
            self.warning(&format!("Empty reference in configuration value \"{value}\""));
        } else {
            self.reference(path, depth);
        }
        after
    }

    fn reference(&mut self, path: &str, depth: u32) {
        self.references += 1;
        if self.references > MAX_REFERENCES {
            self.overflow();
            return;
        }
        match self.root.get(path) {
            Some(Entry::Value(value)) => self.run(value, depth + 1),
            Some(Entry::Node(_)) | None => {
                self.warning(&format!("Failed to fetch referenced configuration variable {path}"));
            }
        }
    }

    fn push(&mut self, text: &str) {
        if self.out.len() + text.len() > MAX_LENGTH {
            self.overflow();
        } else if !self.overflowed {
            self.out.push_str(text);
        }
    }

    fn overflow(&mut self) {
        if !self.overflowed {
            self.overflowed = true;
            (self.warn)("A configuration value became too long when its references were replaced; it is cut short");
        }
    }

    fn warning(&mut self, text: &str) {
        self.warnings += 1;
        if self.warnings <= MAX_WARNINGS {
            (self.warn)(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn expanded(keys: &[(&str, &str)], value: &str) -> (String, Vec<String>) {
        let mut root = Node::new();
        for (key, value) in keys {
            root.set(key, *value).unwrap();
        }
        let warnings = RefCell::new(Vec::new());
        let out = expand(&root, value, &|text| warnings.borrow_mut().push(text.into()));
        (out, warnings.into_inner())
    }

    fn quiet(keys: &[(&str, &str)], value: &str) -> String {
        let (out, warnings) = expanded(keys, value);
        assert!(warnings.is_empty(), "{warnings:?}");
        out
    }

    #[test]
    fn references_are_replaced_also_nested() {
        let keys = [("name", "vm0"), ("dir", "/vm/%(name)"), ("pci.0.4.0.path", "%(dir)/disk.img")];
        assert_eq!(quiet(&keys, "%(pci.0.4.0.path)"), "/vm/vm0/disk.img");
        assert_eq!(quiet(&keys, "/dev/nmdm-%(name)A"), "/dev/nmdm-vm0A");
        assert_eq!(quiet(&keys, "no reference \\ here"), "no reference \\ here");
    }

    #[test]
    fn both_escapes_work() {
        let keys = [("name", "vm0")];
        assert_eq!(quiet(&keys, "100%%"), "100%");
        assert_eq!(quiet(&keys, "%%(name)"), "%(name)");
        assert_eq!(quiet(&keys, "\\%(name)-%(name)"), "%(name)-vm0");
        assert_eq!(quiet(&keys, "a\\\\b%(name)"), "a\\bvm0");
        assert_eq!(quiet(&keys, "\\ü%(name)"), "üvm0");
    }

    #[test]
    fn what_is_no_reference_stays_with_a_warning() {
        for value in ["50%", "%name", "%(name", "%("] {
            let (out, warnings) = expanded(&[("name", "vm0")], value);
            assert_eq!(out, value);
            assert_eq!(warnings, [format!("Invalid reference in configuration value \"{value}\"")]);
        }
        let (out, warnings) = expanded(&[], "a%()b");
        assert_eq!((out.as_str(), warnings.len()), ("ab", 1));
        let (out, warnings) = expanded(&[], "%%\\");
        assert_eq!((out.as_str(), warnings.len()), ("%", 1));
    }

    #[test]
    fn unknown_keys_and_nodes_give_nothing_and_a_warning() {
        for path in ["nothing", "pci", "pci.0.x.y"] {
            let (out, warnings) = expanded(&[("pci.0.x", "1")], &format!("<%({path})>"));
            assert_eq!(out, "<>");
            assert_eq!(warnings, [format!("Failed to fetch referenced configuration variable {path}")]);
        }
    }

    #[test]
    fn sixteen_levels_resolve_and_a_loop_ends() {
        let chain: Vec<(String, String)> = (1..=16)
            .map(|n| (format!("k{n}"), if n == 16 { "end".into() } else { format!("%(k{})", n + 1) }))
            .collect();
        let keys: Vec<(&str, &str)> = chain.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(quiet(&keys, "%(k1)"), "end");

        let (out, warnings) = expanded(&[("a", "%(b)"), ("b", "%(a)")], "%(a)");
        assert!(out.starts_with('%'));
        assert_eq!(warnings, ["Too many recursive references in configuration value"]);
    }

    #[test]
    fn multiplying_references_are_cut_short() {
        let many = "%(next)".repeat(1000);
        let chain: Vec<(String, String)> =
            (0..16).map(|n| (format!("k{n}"), many.replace("next", &format!("k{}", n + 1)))).collect();
        let keys: Vec<(&str, &str)> = chain.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let (out, warnings) = expanded(&keys, "%(k0)");
        assert!(out.len() <= MAX_LENGTH);
        assert!(warnings.iter().any(|w| w.contains("cut short")), "{warnings:?}");
        assert!(warnings.len() <= MAX_WARNINGS as usize + 1);
    }
}
