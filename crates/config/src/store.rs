//! [`Config`]: the tree with expansion, typed reading and warnings.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::error::ConfigError;
use crate::exit::PROGRAM;
use crate::expand::expand;
use crate::tree::{self, Entry, Node, TreeError};
use crate::value;

/// Names that are switches and have keys below them, and where the switch is stored. A name of the tree holds a value or
/// further names, never both, so the short form vanishes when it is stored, as the aliases of the command line do.
pub const SWITCHES: [(&str, &str); 1] = [("cpu.jit", "cpu.jit.enabled")];

/// Where the value of `path` is stored, if the path is a switch.
fn switch_of(path: &str) -> Option<&'static str> {
    let is = |known: &str| path.split('.').filter(|part| !part.is_empty()).eq(known.split('.'));
    SWITCHES.iter().find(|(short, _)| is(short)).map(|(_, stored)| *stored)
}

/// Where warnings go: what is odd about a configuration but does not stop it.
pub trait Warnings: Send + Sync {
    /// Takes one warning, a line without the program's name.
    fn warn(&self, text: &str);
}

/// Warnings on standard error with the program's name in front, as by warnx(3).
#[derive(Debug, Clone, Copy, Default)]
pub struct PrintWarnings;

impl Warnings for PrintWarnings {
    fn warn(&self, text: &str) {
        eprintln!("{PROGRAM}: {text}");
    }
}

/// Warnings nobody wants to see.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoWarnings;

impl Warnings for NoWarnings {
    fn warn(&self, _text: &str) {}
}

/// A blob for the guest's fw_cfg directory, from the `-f` option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FwcfgItem {
    /// The file name the guest sees, shorter than 56 bytes.
    pub name: String,
    /// The contents.
    pub data: Vec<u8>,
}

/// A configuration: the tree, and the few things of a command line that have no key.
#[derive(Clone)]
pub struct Config {
    root: Node,
    fwcfg: Vec<FwcfgItem>,
    warnings: Arc<dyn Warnings>,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config").field("root", &self.root).field("fwcfg", &self.fwcfg).finish_non_exhaustive()
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::new(PrintWarnings)
    }
}

impl Config {
    /// An empty configuration.
    pub fn new(warnings: impl Warnings + 'static) -> Self {
        Self { root: Node::new(), fwcfg: Vec::new(), warnings: Arc::new(warnings) }
    }

    /// A configuration with what bhyve(8) stores before it looks at its arguments.
    ///
    /// `cpus` is not among it: that the number of vCPUs was not given is what lets it follow from sockets, cores and
    /// threads. Other keys' defaults are applied where they are read.
    pub fn with_defaults(warnings: impl Warnings + 'static) -> Self {
        const DEFAULTS: [(&str, &str); 6] = [
            ("acpi_tables", "true"),
            ("acpi_tables_in_memory", "true"),
            ("memory.size", "256M"),
            ("x86.strictmsr", "true"),
            ("x86.verbosemsr", "false"),
            ("lpc.fwcfg", "bhyve"),
        ];
        let mut config = Self::new(warnings);
        for (path, value) in DEFAULTS {
            config.root.set(path, value).expect("the defaults fit an empty tree");
        }
        config
    }

    /// The tree itself, with unexpanded values.
    #[must_use]
    pub fn root(&self) -> &Node {
        &self.root
    }

    /// The tree itself, to be changed.
    pub fn root_mut(&mut self) -> &mut Node {
        &mut self.root
    }

    /// Items of the `-f` option, in the order given.
    #[must_use]
    pub fn fwcfg_items(&self) -> &[FwcfgItem] {
        &self.fwcfg
    }

    /// Adds an item for the guest's fw_cfg directory.
    pub fn add_fwcfg_item(&mut self, item: FwcfgItem) {
        self.fwcfg.push(item);
    }

    /// Tells the user about something odd.
    pub fn warn(&self, text: &str) {
        self.warnings.warn(text);
    }

    /// Stores a value. An empty component of the path is skipped with a warning. One of [`SWITCHES`] is stored under its own
    /// name, so that keys below it can be set too.
    ///
    /// # Errors
    /// The path is empty or too deep, names an inner node or goes through a value.
    pub fn set(&mut self, path: &str, value: impl Into<String>) -> Result<(), TreeError> {
        if tree::has_empty_component(path) {
            self.warn(&format!("Invalid configuration node: {path}"));
        }
        self.root.set(switch_of(path).unwrap_or(path), value)
    }

    /// The tree as `key=value` lines; see [`Node::dump`].
    #[must_use]
    pub fn dump(&self) -> String {
        self.root.dump()
    }

    /// The inner node at `path`.
    #[must_use]
    pub fn node(&self, path: &str) -> Option<NodeRef<'_>> {
        let node = self.root.node(path)?;
        Some(NodeRef { config: self, node, path: path.into() })
    }

    /// The expanded value of a key, if it is set.
    #[must_use]
    pub fn get_str(&self, path: &str) -> Option<String> {
        match self.root.get(path)? {
            Entry::Value(value) => Some(self.expand(value)),
            Entry::Node(_) => {
                self.warn(&format!("Attempting to fetch value of node {path}"));
                None
            }
        }
    }

    /// The expanded value of a key that must be set.
    ///
    /// # Errors
    /// It is not set.
    pub fn require_str(&self, path: &str) -> Result<String, ConfigError> {
        self.get_str(path).ok_or_else(|| ConfigError::Missing { path: path.into() })
    }

    /// A boolean key, if it is set.
    ///
    /// # Errors
    /// The value is no boolean.
    pub fn get_bool(&self, path: &str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.get_str(path) else { return Ok(None) };
        match value::parse_bool(&value) {
            Some(value) => Ok(Some(value)),
            None => Err(ConfigError::Bool { path: path.into(), value }),
        }
    }

    /// A boolean key, or `default` if it is not set.
    ///
    /// # Errors
    /// The value is no boolean.
    pub fn bool_or(&self, path: &str, default: bool) -> Result<bool, ConfigError> {
        Ok(self.get_bool(path)?.unwrap_or(default))
    }

    /// An integer key within `range`, if it is set.
    ///
    /// # Errors
    /// The value is no number, or outside the range.
    pub fn get_int<T>(&self, path: &str, range: RangeInclusive<T>) -> Result<Option<T>, ConfigError>
    where
        T: TryFrom<i128> + PartialOrd + fmt::Display,
    {
        let Some(value) = self.get_str(path) else { return Ok(None) };
        match value::parse_integer(&value).and_then(|number| T::try_from(number).ok()) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let reason = format!("give a whole number from {} to {}", range.start(), range.end());
                Err(ConfigError::Value { path: path.into(), value, reason })
            }
        }
    }

    /// An integer key within `range`, or `default` if it is not set.
    ///
    /// # Errors
    /// The value is no number, or outside the range.
    pub fn int_or<T>(&self, path: &str, range: RangeInclusive<T>, default: T) -> Result<T, ConfigError>
    where
        T: TryFrom<i128> + PartialOrd + fmt::Display,
    {
        Ok(self.get_int(path, range)?.unwrap_or(default))
    }

    /// A key that holds a size in the form of `-m`, in bytes, if it is set.
    ///
    /// # Errors
    /// The value is no size.
    pub fn get_size(&self, path: &str) -> Result<Option<u64>, ConfigError> {
        let Some(value) = self.get_str(path) else { return Ok(None) };
        match value::parse_size(&value) {
            Ok(size) => Ok(Some(size)),
            Err(reason) => Err(ConfigError::Value { path: path.into(), value, reason: reason.into() }),
        }
    }

    /// A key that holds one of a few words, if it is set: the position of its value among `words`.
    ///
    /// # Errors
    /// The value is none of the words.
    pub fn get_word(&self, path: &str, words: &[&str]) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get_str(path) else { return Ok(None) };
        match words.iter().position(|word| *word == value) {
            Some(at) => Ok(Some(at)),
            None => {
                let reason = format!("give one of: {}", words.join(", "));
                Err(ConfigError::Value { path: path.into(), value, reason })
            }
        }
    }

    fn expand(&self, value: &str) -> String {
        if value.contains('%') { expand(&self.root, value, &|text| self.warn(text)) } else { value.to_owned() }
    }
}

/// An inner node together with its place in the tree: the part of a configuration that belongs to one device.
///
/// Keys are relative to the node; errors name the full path.
#[derive(Debug, Clone)]
pub struct NodeRef<'a> {
    config: &'a Config,
    node: &'a Node,
    path: String,
}

impl<'a> NodeRef<'a> {
    /// The node's path from the root.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The configuration the node belongs to.
    #[must_use]
    pub fn config(&self) -> &'a Config {
        self.config
    }

    /// The raw node.
    #[must_use]
    pub fn raw(&self) -> &'a Node {
        self.node
    }

    /// The inner node `key` below this one.
    #[must_use]
    pub fn node(&self, key: &str) -> Option<NodeRef<'a>> {
        let node = self.node.node(key)?;
        Some(NodeRef { config: self.config, node, path: self.absolute(key) })
    }

    /// All inner nodes directly below this one, with their names, in insertion order.
    pub fn nodes(&self) -> impl Iterator<Item = (&'a str, NodeRef<'a>)> + '_ {
        self.node.iter().filter_map(|(name, entry)| match entry {
            Entry::Node(node) => Some((name, NodeRef { config: self.config, node, path: self.absolute(name) })),
            Entry::Value(_) => None,
        })
    }

    /// The names of all values directly below this node, in insertion order.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> + '_ {
        self.node.iter().filter(|(_, entry)| matches!(entry, Entry::Value(_))).map(|(name, _)| name)
    }

    /// The full path of `key`, for messages.
    #[must_use]
    pub fn absolute(&self, key: &str) -> String {
        format!("{}.{key}", self.path)
    }

    /// See [`Config::get_str`].
    #[must_use]
    pub fn get_str(&self, key: &str) -> Option<String> {
        self.config.get_str(&self.absolute(key))
    }

    /// See [`Config::require_str`].
    ///
    /// # Errors
    /// The key is not set.
    pub fn require_str(&self, key: &str) -> Result<String, ConfigError> {
        self.config.require_str(&self.absolute(key))
    }

    /// See [`Config::get_bool`].
    ///
    /// # Errors
    /// The value is no boolean.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.config.get_bool(&self.absolute(key))
    }

    /// See [`Config::bool_or`].
    ///
    /// # Errors
    /// The value is no boolean.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        self.config.bool_or(&self.absolute(key), default)
    }

    /// See [`Config::get_int`].
    ///
    /// # Errors
    /// The value is no number, or outside the range.
    pub fn get_int<T>(&self, key: &str, range: RangeInclusive<T>) -> Result<Option<T>, ConfigError>
    where
        T: TryFrom<i128> + PartialOrd + fmt::Display,
    {
        self.config.get_int(&self.absolute(key), range)
    }

    /// See [`Config::int_or`].
    ///
    /// # Errors
    /// The value is no number, or outside the range.
    pub fn int_or<T>(&self, key: &str, range: RangeInclusive<T>, default: T) -> Result<T, ConfigError>
    where
        T: TryFrom<i128> + PartialOrd + fmt::Display,
    {
        self.config.int_or(&self.absolute(key), range, default)
    }

    /// See [`Config::get_size`].
    ///
    /// # Errors
    /// The value is no size.
    pub fn get_size(&self, key: &str) -> Result<Option<u64>, ConfigError> {
        self.config.get_size(&self.absolute(key))
    }

    /// See [`Config::get_word`].
    ///
    /// # Errors
    /// The value is none of the words.
    pub fn get_word(&self, key: &str, words: &[&str]) -> Result<Option<usize>, ConfigError> {
        self.config.get_word(&self.absolute(key), words)
    }

    /// An error about the value of `key`.
    #[must_use]
    pub fn invalid(&self, key: &str, reason: impl Into<String>) -> ConfigError {
        let value = self.get_str(key).unwrap_or_default();
        ConfigError::Value { path: self.absolute(key), value, reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Collect(Arc<Mutex<Vec<String>>>);

    impl Warnings for Collect {
        fn warn(&self, text: &str) {
            self.0.lock().unwrap().push(text.into());
        }
    }

    fn config(keys: &[(&str, &str)]) -> (Config, Collect) {
        let warnings = Collect::default();
        let mut config = Config::new(warnings.clone());
        for (key, value) in keys {
            config.set(key, *value).unwrap();
        }
        (config, warnings)
    }

    #[test]
    fn values_are_expanded_when_they_are_read() {
        let (mut config, _) = config(&[("path", "/vm/%(name)/disk")]);
        config.set("name", "one").unwrap();
        assert_eq!(config.get_str("path").as_deref(), Some("/vm/one/disk"));
        config.set("name", "two").unwrap();
        assert_eq!(config.get_str("path").as_deref(), Some("/vm/two/disk"));
        assert_eq!(config.root().value("path"), Some("/vm/%(name)/disk"));
    }

    #[test]
    fn a_switch_may_have_keys_below_it() {
        for keys in [
            [("cpu.jit", "false"), ("cpu.jit.check", "1"), ("cpu.jit.cache", "8M")],
            [("cpu.jit.check", "1"), ("cpu.jit.cache", "8M"), ("cpu..jit", "false")],
        ] {
            let (config, _) = config(&keys);
            assert_eq!(config.get_bool("cpu.jit.enabled").unwrap(), Some(false));
            assert_eq!(config.get_int("cpu.jit.check", 0..=9u32).unwrap(), Some(1));
            assert_eq!(config.get_size("cpu.jit.cache").unwrap(), Some(8 << 20));
            let (mut again, _) = self::config(&[]);
            for (key, value) in config.dump().lines().filter_map(|line| line.split_once('=')) {
                again.set(key, value).unwrap();
            }
            assert_eq!(again.root(), config.root(), "a dump can be read back");
        }
    }

    #[test]
    fn typed_reading_names_the_key() {
        let (config, _) = config(&[("pci.0.4.0.ro", "maybe"), ("pci.0.4.0.qsz", "0x800"), ("pci.0.4.0.maxq", "70000")]);
        let node = config.node("pci.0.4.0").unwrap();
        assert_eq!(
            node.bool_or("ro", false).unwrap_err().to_string(),
            "Invalid value maybe for boolean variable pci.0.4.0.ro: say true, on, yes or 1, or else false, off, no or 0"
        );
        assert_eq!(node.get_int("qsz", 2..=4096u16).unwrap(), Some(0x800));
        assert_eq!(
            node.get_int("maxq", 1..=65535u16).unwrap_err().to_string(),
            "Invalid value for pci.0.4.0.maxq: '70000': give a whole number from 1 to 65535"
        );
        assert_eq!(node.int_or("ioslots", 1..=64u32, 8).unwrap(), 8);
        assert!(!node.bool_or("nocache", false).unwrap());
        assert_eq!(node.require_str("path").unwrap_err().to_string(), "pci.0.4.0.path is not set");
        let error = node.get_word("ro", &["yes", "no"]).unwrap_err();
        assert_eq!(error.to_string(), "Invalid value for pci.0.4.0.ro: 'maybe': give one of: yes, no");
        assert_eq!(node.get_word("qsz", &["0x800"]).unwrap(), Some(0));
        assert!(node.get_size("ro").is_err());
    }

    #[test]
    fn odd_reading_and_writing_warns() {
        let (config, warnings) = config(&[("a..b", "1"), ("c", "%(nowhere)")]);
        assert_eq!(config.get_str("a"), None);
        assert_eq!(config.get_str("c").as_deref(), Some(""));
        assert_eq!(
            *warnings.0.lock().unwrap(),
            [
                "Invalid configuration node: a..b",
                "Attempting to fetch value of node a",
                "Failed to fetch referenced configuration variable nowhere"
            ]
        );
    }

    #[test]
    fn nodes_know_their_place() {
        let (config, _) = config(&[("port.0.type", "hd"), ("port.2.type", "cd"), ("port.extra", "1")]);
        let ports = config.node("port").unwrap();
        let found: Vec<_> = ports.nodes().map(|(name, node)| (name, node.path().to_owned())).collect();
        assert_eq!(found, [("0", "port.0".to_owned()), ("2", "port.2".to_owned())]);
        assert_eq!(ports.keys().collect::<Vec<_>>(), ["extra"]);
        assert_eq!(ports.node("2").unwrap().get_str("type").as_deref(), Some("cd"));
        assert!(ports.node("extra").is_none());
        assert_eq!(
            ports.node("0").unwrap().invalid("type", "use cd").to_string(),
            "Invalid value for port.0.type: 'hd': use cd"
        );
    }

    #[test]
    fn defaults_stand_in_bhyves_order() {
        assert_eq!(
            Config::with_defaults(NoWarnings).dump(),
            "acpi_tables=true\nacpi_tables_in_memory=true\nmemory.size=256M\nx86.strictmsr=true\n\
             x86.verbosemsr=false\nlpc.fwcfg=bhyve\n"
        );
    }
}
