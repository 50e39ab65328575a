//! The frame buffer: `fbuf,[rfb|tcp=[ADDR:]PORT][,w=W][,h=H][,vga=MODE][,wait][,password=PW]`.

use super::SyntaxError;
use crate::tree::Node;

const OPTIONS: [&str; 6] = ["rfb", "w", "h", "vga", "wait", "password"];

/// Stores the options; `tcp` is another word for `rfb`. Libvirt tries `password=` without a value to see whether
/// passwords are supported.
pub(super) fn parse(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    for token in conf.unwrap_or_default().split(',').filter(|token| !token.is_empty()) {
        let (name, value) = token.split_once('=').unwrap_or((token, "true"));
        let key = if name == "tcp" { "rfb" } else { name };
        if !OPTIONS.contains(&key) {
            return Err(SyntaxError::text(format!(
                "Invalid fbuf emulation option \"{token}\"\n\
                 fbuf: {{wait,}}{{vga=on|io|off,}}rfb={{ADDR:}}PORT{{,w=WIDTH}}{{,h=HEIGHT}}{{,password=PASSWORD}}"
            )));
        }
        node.set(key, value)?;
    }
    Ok(())
}
