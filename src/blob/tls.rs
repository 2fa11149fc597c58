//! The TLS side of a connection: whom to trust, and what a failed handshake
//! means for a person.

use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{CertificateError, ClientConfig, RootCertStore};

use super::account::ConfigError;

/// The system's authorities, read once: parsing them takes tens of milliseconds.
fn system_roots() -> &'static RootCertStore {
    static ROOTS: OnceLock<RootCertStore> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!("cannot read a system certificate: {error}");
        }
        let mut roots = RootCertStore::empty();
        let (_, refused) = roots.add_parsable_certificates(found.certs);
        if refused > 0 {
            tracing::debug!(refused, "system certificates that cannot be authorities");
        }
        roots
    })
}

/// A client configuration that trusts the system's authorities and those in
/// `ca_file`. Sessions are resumed across the connections that share it.
pub(super) fn client_config(
    endpoint: &str,
    ca_file: Option<&Path>,
) -> Result<Arc<ClientConfig>, ConfigError> {
    let mut roots = system_roots().clone();
    if let Some(path) = ca_file {
        add_file(&mut roots, path).map_err(|reason| ConfigError::CaFile {
            path: path.to_owned(),
            reason,
        })?;
    }
    let refuse = |reason: String| ConfigError::Endpoint {
        endpoint: endpoint.to_owned(),
        reason,
    };
    if roots.is_empty() {
        return Err(refuse(
            "this system trusts no certificate authority: install ca-certificates or give --ca-file"
                .into(),
        ));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| refuse(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn add_file(roots: &mut RootCertStore, path: &Path) -> Result<(), String> {
    let text = std::fs::read(path).map_err(|error| error.to_string())?;
    let mut found = 0;
    for certificate in CertificateDer::pem_slice_iter(&text) {
        let certificate = certificate.map_err(|error| format!("not PEM: {error}"))?;
        roots
            .add(certificate)
            .map_err(|error| format!("a certificate in it cannot be an authority: {error}"))?;
        found += 1;
    }
    if found == 0 {
        return Err("it holds no certificate; it must be PEM (BEGIN CERTIFICATE)".into());
    }
    Ok(())
}

/// Why a handshake failed and what to do about it.
pub(super) fn explain(error: &io::Error) -> String {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let remedy = match tls {
        Some(rustls::Error::InvalidCertificate(certificate)) => match certificate {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "; this system does not trust who signed the certificate: give that authority with --ca-file"
            }
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => {
                "; check this machine's clock, then the certificate"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "; the endpoint's host name is not the certificate's"
            }
            _ => "; a private authority is given with --ca-file",
        },
        Some(rustls::Error::InvalidMessage(_)) => {
            "; the server does not speak TLS on this port: is the endpoint http?"
        }
        _ => "",
    };
    format!("{error}{remedy}")
}
