//! The CSI driver `csi-dysk`. So far it knows its version and nothing else.

use std::ffi::OsString;

/// What `csi-dysk` prints for these arguments (without the program's name).
///
/// # Errors
/// One line that says why they are refused.
pub fn run(arguments: &[OsString]) -> Result<String, String> {
    match arguments {
        [word] if word == "version" || word == "--version" => {
            Ok(format!("csi-dysk {}", env!("CARGO_PKG_VERSION")))
        }
        _ => Err("this version has no csi driver yet: it only takes --version".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_its_version_and_refuses_the_rest() {
        let run =
            |arguments: &[&str]| run(&arguments.iter().map(OsString::from).collect::<Vec<_>>());
        let version = format!("csi-dysk {}", env!("CARGO_PKG_VERSION"));
        assert_eq!(run(&["--version"]), Ok(version.clone()));
        assert_eq!(run(&["version"]), Ok(version));
        for refused in [&[][..], &["node"], &["--version", "x"]] {
            assert!(run(refused).is_err(), "{refused:?}");
        }
    }
}
