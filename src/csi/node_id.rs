//! What the cluster calls a node: `NAME:TAG`, where the tag tells a machine
//! from another one of the same name. A node that was set up anew under an old
//! name is not the one that a volume was published to.

use std::fs;

use sha2::{Digest, Sha256};

/// Where a machine says which one it is, the best first: what a virtual
/// machine was given by its host (root alone may read it), and what the system
/// was given when it was installed (machine-id(5)).
const MACHINE: [&str; 2] = ["/sys/class/dmi/id/product_uuid", "/etc/machine-id"];
/// Hexadecimal digits of the tag.
const TAG: usize = 12;

/// The id of this machine, which the cluster calls `name`.
#[must_use]
pub fn of_this_machine(name: &str) -> String {
    let machine = MACHINE.into_iter().find_map(|path| {
        let text = fs::read_to_string(path).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    });
    id(name, machine.as_deref().unwrap_or_default())
}

fn id(name: &str, machine: &str) -> String {
    let mut digest = Sha256::new();
    // The machine's own id is not told to others, as machine-id(5) asks.
    digest.update(b"csi-dysk node\n");
    digest.update(name.as_bytes());
    digest.update(b"\n");
    digest.update(machine.as_bytes());
    let hex: String = digest
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    format!("{name}:{}", &hex[..TAG])
}

/// Whether `text` is the id of a node of this driver, as far as it can be seen
/// from the id: which nodes there are, the cluster alone knows.
#[must_use]
pub fn is_one(text: &str) -> bool {
    let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    text.rsplit_once(':')
        .is_some_and(|(name, tag)| !name.is_empty() && tag.len() == TAG && tag.bytes().all(digit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_of_one_name_are_told_apart() {
        let (one, other) = (id("node-1", "m1"), id("node-1", "m2"));
        assert_ne!(one, other);
        assert_eq!(one, id("node-1", "m1"));
        assert!(is_one(&one) && one.starts_with("node-1:") && !one.contains("m1"));
        assert!(is_one(&of_this_machine("a")));
        for text in [
            "",
            "node-1",
            ":0123456789ab",
            "node-1:0123456789aB",
            "node-1:0",
        ] {
            assert!(!is_one(text), "{text}");
        }
    }
}
