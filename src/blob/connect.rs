//! Making a connection: host name, TCP, TLS, each with its own kind of failure.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use super::connection::Connection;
use super::endpoint::Endpoint;
use super::error::Failure;

/// A connection that could not be made: nothing was sent.
#[derive(Debug)]
pub(super) struct ConnectError {
    /// [`Failure::Dns`], [`Failure::Connect`] or [`Failure::Tls`].
    pub failure: Failure,
    /// Which host or address, and what to do.
    pub detail: String,
}

/// Makes connections to one endpoint.
pub(super) struct Connector {
    /// Where to.
    pub endpoint: Endpoint,
    /// How to speak TLS; `None` for plain HTTP.
    pub tls: Option<Arc<ClientConfig>>,
    /// Bound on one connection, handshake included.
    pub timeout: Duration,
}

impl Connector {
    /// Resolves the host anew, then tries its addresses one after the other;
    /// the time left is shared out among the addresses left.
    pub async fn connect(&self) -> Result<Box<Connection>, ConnectError> {
        let deadline = Instant::now() + self.timeout;
        let addresses = self.resolve(deadline).await?;
        let mut failed = Vec::new();
        for (index, &address) in addresses.iter().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            let rest = u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
            let until = Instant::now() + left / rest;
            match self.open(address, until).await {
                Ok(connection) => return Ok(connection),
                Err(error) => failed.push(error),
            }
        }
        // The first address speaks for all; a failed handshake says more than
        // a refused connection.
        let several = failed.len();
        let worst = failed
            .iter()
            .position(|error| error.failure == Failure::Tls)
            .unwrap_or(0);
        let mut error = failed.swap_remove(worst);
        if several > 1 {
            error.detail = format!("{} (nor to {} others)", error.detail, several - 1);
        }
        Err(error)
    }

    /// At least one address.
    async fn resolve(&self, deadline: Instant) -> Result<Vec<SocketAddr>, ConnectError> {
        let host = self.endpoint.host.as_str();
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, self.endpoint.port)]);
        }
        let fail = |reason: String| ConnectError {
            failure: Failure::Dns,
            detail: format!(
                ": {host}: {reason}; check the account's name, the endpoint and this machine's dns"
            ),
        };
        let looked_up = timeout_at(
            deadline,
            tokio::net::lookup_host((host, self.endpoint.port)),
        )
        .await;
        match looked_up {
            Ok(Ok(found)) => {
                let addresses: Vec<_> = found.collect();
                if addresses.is_empty() {
                    return Err(fail("it has no address".into()));
                }
                Ok(addresses)
            }
            Ok(Err(error)) => Err(fail(error.to_string())),
            Err(_) => Err(fail(format!("no answer within {:?}", self.timeout))),
        }
    }

    async fn open(
        &self,
        address: SocketAddr,
        until: Instant,
    ) -> Result<Box<Connection>, ConnectError> {
        let refuse = |failure: Failure, text: String| ConnectError {
            failure,
            detail: format!(": {address}: {text}"),
        };
        let unreachable = |text: String| {
            refuse(
                Failure::Connect,
                format!(
                    "{text}; check that the store listens there and that no firewall stands between"
                ),
            )
        };
        let socket = match timeout_at(until, TcpStream::connect(address)).await {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) => return Err(unreachable(error.to_string())),
            Err(_) => return Err(unreachable("no answer in time".into())),
        };
        socket
            .set_nodelay(true)
            .map_err(|error| refuse(Failure::Connect, error.to_string()))?;
        let opened = match &self.tls {
            None => Connection::plain(socket, address).await,
            Some(config) => {
                let name = ServerName::try_from(self.endpoint.host.clone()).map_err(|error| {
                    refuse(Failure::Tls, format!("{}: {error}", self.endpoint.host))
                })?;
                let handshake = TlsConnector::from(config.clone()).connect(name, socket);
                let session = match timeout_at(until, handshake).await {
                    Ok(Ok(session)) => session,
                    Ok(Err(error)) => {
                        return Err(refuse(Failure::Tls, super::tls::explain(&error)));
                    }
                    Err(_) => return Err(refuse(Failure::Tls, "no answer in time".into())),
                };
                Connection::tls(session, address).await
            }
        };
        opened.map_err(|error| refuse(Failure::Connect, error.to_string()))
    }
}
