//! The tree: inner nodes with names, leaves that hold strings.
//!
//! A name holds either a value or further names, never both. Children keep the order in which they were added, and a
//! value that is replaced moves to the end: the dump of bhyve(8) shows it so, because the list it stands on can only
//! remove and append.

use thiserror::Error;

/// How many components a path may have. The keys of bhyve_config(5) have at most 7; the limit keeps walking and freeing a
/// tree, which recurse, within any stack.
pub const MAX_DEPTH: usize = 32;

/// Why a value could not be put into the tree.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TreeError {
    /// The path names an inner node, which cannot hold a value.
    #[error("Attempting to add value {value} to existing node {path}")]
    ValueOverNode {
        /// Path of the inner node.
        path: String,
        /// The value that was to be stored.
        value: String,
    },
    /// A component before the last one names a leaf, which cannot have children.
    #[error("Failed to create configuration node {path}: it is a child of existing variable {leaf}")]
    NodeUnderValue {
        /// Path of the node that was to be created.
        path: String,
        /// Path of the leaf in the way.
        leaf: String,
    },
    /// The path has no component at all.
    #[error("Invalid config node name '{path}': a key needs at least one letter")]
    EmptyPath {
        /// The path as given.
        path: String,
    },
    /// The path has more than [`MAX_DEPTH`] components.
    #[error("Invalid config node name '{path}': more than {MAX_DEPTH} parts")]
    TooDeep {
        /// The path as given, cut short.
        path: String,
    },
}

impl TreeError {
    /// The same error with paths made absolute, for a node that itself sits at `prefix`.
    #[must_use]
    pub fn below(mut self, prefix: &str) -> Self {
        match &mut self {
            Self::ValueOverNode { path, .. } | Self::EmptyPath { path } | Self::TooDeep { path } => {
                *path = format!("{prefix}.{path}");
            }
            Self::NodeUnderValue { path, leaf } => {
                *path = format!("{prefix}.{path}");
                *leaf = format!("{prefix}.{leaf}");
            }
        }
        self
    }
}

/// What a name stands for: a value or an inner node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A string, unexpanded.
    Value(String),
    /// Further names.
    Node(Node),
}

/// An inner node: names in the order in which they were added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    entries: Vec<(String, Entry)>,
}

impl Node {
    /// An empty node.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the node has no children.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The children in insertion order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// What stands at `path`, relative to this node. Empty components are skipped.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Entry> {
        let mut parts = components(path);
        let mut entry = self.entry(parts.next()?)?;
        for part in parts {
            match entry {
                Entry::Node(node) => entry = node.entry(part)?,
                Entry::Value(_) => return None,
            }
        }
        Some(entry)
    }

    /// The unexpanded value at `path`; `None` if nothing or an inner node is there.
    #[must_use]
    pub fn value(&self, path: &str) -> Option<&str> {
        match self.get(path)? {
            Entry::Value(value) => Some(value),
            Entry::Node(_) => None,
        }
    }

    /// The inner node at `path`; `None` if nothing or a value is there.
    #[must_use]
    pub fn node(&self, path: &str) -> Option<&Node> {
        match self.get(path)? {
            Entry::Node(node) => Some(node),
            Entry::Value(_) => None,
        }
    }

    /// Puts `value` at `path`, making the nodes on the way. A value that was there is replaced.
    ///
    /// # Errors
    /// The path is empty or too deep, names an inner node, or goes through a value.
    pub fn set(&mut self, path: &str, value: impl Into<String>) -> Result<(), TreeError> {
        let value = value.into();
        let parts = checked_components(path)?;
        let (last, above) = parts.split_last().expect("checked_components gives at least one");
        let parent = self.create_parts(above, path)?;
        match parent.position(last) {
            Some(at) if matches!(parent.entries[at].1, Entry::Node(_)) => {
                return Err(TreeError::ValueOverNode { path: path.into(), value });
            }
            Some(at) => drop(parent.entries.remove(at)),
            None => {}
        }
        parent.entries.push(((*last).into(), Entry::Value(value)));
        Ok(())
    }

    /// Like [`set`](Self::set), but keeps a value that is already there.
    ///
    /// # Errors
    /// As for [`set`](Self::set).
    pub fn set_default(&mut self, path: &str, value: impl Into<String>) -> Result<(), TreeError> {
        if self.value(path).is_some() { Ok(()) } else { self.set(path, value) }
    }

    /// The inner node at `path`, made if it is not there.
    ///
    /// # Errors
    /// The path is empty or too deep, or goes through a value.
    pub fn create(&mut self, path: &str) -> Result<&mut Node, TreeError> {
        let parts = checked_components(path)?;
        self.create_parts(&parts, path)
    }

    /// The whole tree as `path=value` lines: depth first, insertion order, values unexpanded.
    #[must_use]
    pub fn dump(&self) -> String {
        let mut out = String::new();
        self.dump_below("", &mut out);
        out
    }

    fn dump_below(&self, prefix: &str, out: &mut String) {
        for (name, entry) in &self.entries {
            match entry {
                Entry::Value(value) => {
                    for part in [prefix, name, "=", value, "\n"] {
                        out.push_str(part);
                    }
                }
                Entry::Node(node) => node.dump_below(&format!("{prefix}{name}."), out),
            }
        }
    }

    fn create_parts(&mut self, parts: &[&str], path: &str) -> Result<&mut Node, TreeError> {
        let mut node = self;
        for (depth, part) in parts.iter().enumerate() {
            let at = match node.position(part) {
                Some(at) => at,
                None => {
                    node.entries.push(((*part).into(), Entry::Node(Node::new())));
                    node.entries.len() - 1
                }
            };
            match &mut node.entries[at].1 {
                Entry::Node(child) => node = child,
                Entry::Value(_) => {
                    let leaf = parts[..=depth].join(".");
                    return Err(TreeError::NodeUnderValue { path: path.into(), leaf });
                }
            }
        }
        Ok(node)
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.position(name).map(|at| &self.entries[at].1)
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|(known, _)| known == name)
    }
}

/// Whether a path has an empty component (`a..b`, `.a`, `a.`), which readers and writers skip.
#[must_use]
pub fn has_empty_component(path: &str) -> bool {
    path.split('.').any(str::is_empty)
}

fn components(path: &str) -> impl Iterator<Item = &str> {
    path.split('.').filter(|part| !part.is_empty())
}

fn checked_components(path: &str) -> Result<Vec<&str>, TreeError> {
    let parts: Vec<&str> = components(path).take(MAX_DEPTH + 1).collect();
    match parts.len() {
        0 => Err(TreeError::EmptyPath { path: path.into() }),
        n if n > MAX_DEPTH => Err(TreeError::TooDeep { path: path.chars().take(60).chain("...".chars()).collect() }),
        _ => Ok(parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_and_keep_their_order() {
        let mut root = Node::new();
        root.set("cpus", "2").unwrap();
        root.set("pci.0.3.0.device", "nvme").unwrap();
        root.set("memory.size", "1G").unwrap();
        root.set("pci.0.3.0.path", "/a=b").unwrap();
        root.set("pci.0.1.0.device", "lpc").unwrap();
        assert_eq!(root.value("pci.0.3.0.device"), Some("nvme"));
        assert_eq!(
            root.dump(),
            "cpus=2\npci.0.3.0.device=nvme\npci.0.3.0.path=/a=b\npci.0.1.0.device=lpc\nmemory.size=1G\n"
        );
    }

    #[test]
    fn a_replaced_value_moves_to_the_end_of_its_node() {
        let mut root = Node::new();
        for (key, value) in [("a", "1"), ("n.x", "1"), ("n.y", "2"), ("b", "2"), ("a", "3"), ("n.x", "9")] {
            root.set(key, value).unwrap();
        }
        assert_eq!(root.dump(), "n.y=2\nn.x=9\nb=2\na=3\n");
    }

    #[test]
    fn a_name_is_a_value_or_a_node_but_not_both() {
        let mut root = Node::new();
        root.set("a.b", "1").unwrap();
        let error = root.set("a", "2").unwrap_err();
        assert_eq!(error.to_string(), "Attempting to add value 2 to existing node a");
        let error = root.set("a.b.c.d", "2").unwrap_err();
        assert_eq!(error, TreeError::NodeUnderValue { path: "a.b.c.d".into(), leaf: "a.b".into() });
        assert_eq!(
            error.below("pci.0").to_string(),
            "Failed to create configuration node pci.0.a.b.c.d: it is a child of existing variable pci.0.a.b"
        );
        assert_eq!(root.dump(), "a.b=1\n", "a failed write leaves the tree as it was");
    }

    #[test]
    fn empty_components_are_skipped_and_an_empty_path_is_refused() {
        let mut root = Node::new();
        root.set(".a..b.", "1").unwrap();
        assert_eq!(root.value("a.b"), Some("1"));
        assert!(has_empty_component("a..b") && !has_empty_component("a.b"));
        assert!(matches!(root.set("..", "1"), Err(TreeError::EmptyPath { .. })));
        assert!(root.get("").is_none());
    }

    #[test]
    fn depth_is_limited() {
        let deep = vec!["a"; 100_000].join(".");
        assert!(matches!(Node::new().set(&deep, "1"), Err(TreeError::TooDeep { .. })));
        let allowed = vec!["a"; MAX_DEPTH].join(".");
        Node::new().set(&allowed, "1").unwrap();
    }

    #[test]
    fn defaults_do_not_replace() {
        let mut root = Node::new();
        root.set("version", "1.2").unwrap();
        root.set_default("version", "2.0").unwrap();
        root.set_default("intf", "crb").unwrap();
        assert_eq!(root.dump(), "version=1.2\nintf=crb\n");
    }
}
