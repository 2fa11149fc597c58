//! Where an account's blob service is: Azure's clouds, and endpoints as people
//! write them.

/// The endpoint of `account` in the cloud `realm`.
#[must_use]
pub fn endpoint(account: &str, realm: Option<&str>) -> String {
    let suffix = match realm {
        None | Some("public") => "core.windows.net",
        Some("china") => "core.chinacloudapi.cn",
        Some("usgov") => "core.usgovcloudapi.net",
        Some(suffix) => suffix.trim_matches('.').trim_start_matches("blob."),
    };
    format!("https://{account}.blob.{suffix}")
}

/// `url` with the account's path segment, where the host cannot carry the
/// account (an address, or a name without a dot) and no path is given.
#[must_use]
pub fn complete(url: &str, account: &str) -> String {
    let bare = url.trim_end_matches('/');
    match url::Url::parse(bare) {
        Ok(parsed) if parsed.path() == "/" && needs_path(&parsed) => format!("{bare}/{account}"),
        _ => bare.to_owned(),
    }
}

fn needs_path(url: &url::Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => !name.contains('.'),
        Some(_) => true,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_of_every_cloud() {
        for (realm, expected) in [
            (None, "https://acct.blob.core.windows.net"),
            (Some("china"), "https://acct.blob.core.chinacloudapi.cn"),
            (Some("usgov"), "https://acct.blob.core.usgovcloudapi.net"),
            (
                Some("core.example.net"),
                "https://acct.blob.core.example.net",
            ),
            (
                Some("blob.core.example.net"),
                "https://acct.blob.core.example.net",
            ),
        ] {
            assert_eq!(endpoint("acct", realm), expected);
        }
    }

    #[test]
    fn completes_addresses_and_short_names_only() {
        for (url, expected) in [
            ("http://127.0.0.1:10000", "http://127.0.0.1:10000/acct"),
            ("http://127.0.0.1:10000/", "http://127.0.0.1:10000/acct"),
            ("http://[::1]:1", "http://[::1]:1/acct"),
            ("http://azurite:10000", "http://azurite:10000/acct"),
            ("http://127.0.0.1:10000/acct", "http://127.0.0.1:10000/acct"),
            ("https://blob.example.org", "https://blob.example.org"),
        ] {
            assert_eq!(complete(url, "acct"), expected);
        }
    }
}
