//! Other credentials for an attachment that is there: tried, recorded, and
//! taken into use, in this order.

use std::sync::Arc;

use super::account::{self, ATTEMPT_DEADLINE};
use super::api::{Attachment, CredentialChange, ErrorCode};
use super::detach::blocking;
use super::entry::Phase;
use super::error::NodeError;
use super::name::AttachmentName;
use super::registry::Registry;
use crate::blob::{Advice, Conditions};

impl Registry {
    /// Replaces an attachment's credentials, now and for the daemons to come.
    ///
    /// # Errors
    /// No such attachment, or one that is on its way in or out; a source that
    /// cannot be read; the store refuses what it holds. The old ones then stay.
    pub async fn replace_credential(
        &self,
        name: &AttachmentName,
        change: CredentialChange,
    ) -> Result<Attachment, NodeError> {
        let entry = self.entry(name)?;
        let volume = match &entry.phase {
            Phase::Attached(parts) => parts.volume.clone(),
            Phase::Recovering(recovering) => recovering.parts.volume.clone(),
            _ => {
                let state = entry.view().state;
                return Err(NodeError::new(
                    ErrorCode::Busy,
                    format!("{name} is {state}: its credential cannot be replaced now"),
                ));
            }
        };
        let mut request = (*entry.request).clone();
        request.account.credential = change.credential;
        let (_, blob) =
            account::open_blob(&request.account, &request.container, &request.blob).await?;
        let none = Conditions::default();
        match blob.properties(&none, ATTEMPT_DEADLINE).await {
            Err(error) if error.advice() == Advice::Reauthenticate && !error.clock => {
                return Err(NodeError::new(
                    ErrorCode::StoreRefused,
                    format!("the credential of {name} stays as it was: {error}"),
                ));
            }
            // It says nothing against the credential.
            Err(error) => tracing::warn!(%name, %error, "could not try the new credential"),
            Ok(_) => {}
        }
        let (records, recorded, of) = (self.0.records.clone(), request.clone(), name.clone());
        blocking(move || records.change(&of, |record| record.request = recorded))
            .await
            .map_err(|error| NodeError::internal(format!("cannot change the record: {error}")))?;
        let account = request.account.clone();
        if !self.set_request(name, &entry.id, Arc::new(request)) {
            // Detached meanwhile: what was written is nobody's.
            let (records, gone) = (self.0.records.clone(), name.clone());
            blocking(move || records.remove(&gone))
                .await
                .map_err(|error| NodeError::internal(format!("cannot remove a record: {error}")))?;
            return self.get(name);
        }
        if let Some(volume) = volume {
            account::replace_credential(volume.account(), &account).await?;
        }
        tracing::info!(%name, "credential replaced");
        self.get(name)
    }
}
