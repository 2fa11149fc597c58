//! Opening a volume: at most four sequential store round trips.
//!
//! | trip | plain | `break_lease` |
//! |---|---|---|
//! | 1 | Get Properties | Get Properties |
//! | 2 | acquire, if the ETag still matches | break, if the ETag still matches |
//! | 3 | raise the sequence number, beside it read the last page | acquire, if the ETag still matches |
//! | 4 | | raise, beside it read the last page |
//!
//! A lease that is waited for adds a look a second. An opening that resumes an
//! earlier daemon's lease renews it, then looks, then raises; one that finds
//! unflushed writes looks at the number before it raises it.
//!
//! The last page's answer names the blob's size once more: read after the
//! lease was taken, it settles the size that Get Properties, which came before
//! the acquire, may have seen too early.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::cache::{self, Cache};
use super::copy;
use super::hold::Hold;
use super::intent::{self, Intent};
use super::io::Io;
use super::keeper::{self, HeldLease, Keeper, LEASE_SECONDS};
use super::load;
use super::moment::Moment;
use super::pace::Cap;
use super::patience::patiently;
use super::standing::{RUN_AHEAD, Standing};
use super::stats::Sent;
use super::store::PageStore;
use super::trouble::Trouble;
use super::unwritten::Unwritten;
use super::{OpenError, OpenOptions, Volume};
use crate::blob::vhd::{self, Layout};
use crate::blob::{
    Advice, BlobType, Checksum, Conditions, Effect, LeaseState, Properties, Range, SequenceNumber,
    StorageError,
};
use crate::device::PAGE;

/// Between two looks at somebody else's lease: what a dead node's disk is away
/// for beyond its lease.
const WAIT_PAUSE: Duration = Duration::from_millis(250);
/// Looks at a blob that changes between look and acquire, before that counts
/// as somebody else's lease.
const MOST_LOOKS: u32 = 3;

/// What opening learned.
struct Learned {
    blob_size: u64,
    layout: Layout,
    number: u64,
    cache: Option<Arc<Cache>>,
}

pub(super) async fn open<S: PageStore>(
    blob: S,
    options: OpenOptions,
) -> Result<Arc<Volume<S>>, OpenError> {
    if options.read_only {
        return open_read_only(blob, &options).await;
    }
    let runtime = match options.keeper.clone() {
        Some(runtime) => runtime,
        None => keeper::runtime().map_err(|error| {
            unusable(
                &blob,
                format!("cannot start the lease keeper's thread: {error}"),
            )
        })?,
    };
    // From here on a lease may exist: whatever ends this function early, also
    // its future being dropped, releases it.
    // A lease that is resumed is another daemon's until that has succeeded.
    let new = if options.resume {
        HeldLease::of_an_earlier_daemon
    } else {
        HeldLease::new
    };
    let lease = new(runtime, blob.isolated(2), options.lease.clone());
    let asked = Moment::now();
    let held = Held::default();
    match take(&blob, &options, &held).await {
        Ok(learned) => {
            let standing = Arc::new(Standing::new(learned.number, asked));
            let keeper = Keeper::start(lease.resumed(), Arc::clone(&standing));
            Ok(volume(blob, &options, &learned, standing, Some(keeper)))
        }
        Err(error) => {
            match held.0.load(Ordering::Relaxed) {
                _ if options.resume => lease.forget(),
                NOT_HELD => lease.forget(),
                // Whoever reads the error finds the lease gone.
                HELD => {
                    if let Err(left) = lease.release().await {
                        tracing::warn!("{left}: the lease ends by itself within {LEASE_SECONDS} s");
                    }
                }
                _ => drop(lease),
            }
            Err(error)
        }
    }
}

/// Whether this opening holds the lease: one of the three below.
#[derive(Default)]
struct Held(AtomicU8);

const NOT_HELD: u8 = 0;
const PERHAPS_HELD: u8 = 1;
const HELD: u8 = 2;

/// Takes the lease and learns what the volume is.
async fn take<S: PageStore>(
    blob: &S,
    options: &OpenOptions,
    held: &Held,
) -> Result<Learned, OpenError> {
    let deadline = options.attempt_deadline;
    let seen = if options.resume {
        renew(blob, options).await?;
        properties(blob, deadline).await?
    } else {
        let mut seen = properties(blob, deadline).await?;
        if options.break_lease {
            seen = break_lease(blob, seen, deadline).await?;
        }
        acquire(blob, options, seen, held).await?
    };
    // After the lease is ours, before the number is raised.
    let adopted = cache::adopt(blob, options).await?;
    let mut learned = learn(blob, options, &seen).await?;
    learned.cache = cache::start(blob.address(), options, learned.number, adopted).await?;
    Ok(learned)
}

/// Renews the lease of an earlier daemon: the store does so only if nobody has
/// held the blob since.
async fn renew<S: PageStore>(blob: &S, options: &OpenOptions) -> Result<(), OpenError> {
    let deadline = options.attempt_deadline;
    let Err(error) = patiently!(blob.renew_lease(&options.lease, deadline)) else {
        return Ok(());
    };
    if !matches!(error.status(), Some(404 | 409 | 412)) {
        return Err(error.into());
    }
    let mut reason = error.to_string();
    if let Ok(seen) = blob.properties(deadline).await {
        reason = format!("{}: {reason}", keeper::whose(seen.lease_state));
    }
    if let Some(aside) = cache::withdraw(blob.address(), options).await {
        let (bytes, path) = (aside.dirty_bytes, aside.path.display());
        reason = format!("{reason}: {bytes} bytes of unflushed writes kept in {path}");
    }
    Err(OpenError::Fenced {
        object: blob.address().to_string(),
        reason,
    })
}

/// Acquires the lease, waiting for somebody else's to end for as long as the
/// options say. Gives back the properties under which it was acquired.
///
/// An acquire may come late: after this volume lost its lease to another node,
/// which then gave it back. It would make a holder again of one that missed
/// what was written meanwhile. So it hangs on the ETag, which the raise at the
/// end of opening changes.
async fn acquire<S: PageStore>(
    blob: &S,
    options: &OpenOptions,
    mut seen: Properties,
    held: &Held,
) -> Result<Properties, OpenError> {
    let give_up = Instant::now() + options.wait;
    let mut looks = 0;
    let mut told = false;
    loop {
        let Err(error) = acquire_now(blob, options, &seen, held).await else {
            options.tell_waiting(false);
            return Ok(seen);
        };
        let changed = error.status() == Some(412) && error.code() == "ConditionNotMet";
        if !changed && !error.is_leased_elsewhere() {
            return Err(error.into());
        }
        looks += 1;
        // Changed since it was looked at: by the last holder's last write, or
        // by one that goes on writing.
        if !changed || looks > MOST_LOOKS {
            if Instant::now() + WAIT_PAUSE > give_up {
                return Err(OpenError::Leased {
                    object: blob.address().to_string(),
                    remedy: "detach it where it is attached, or take it over with --break-lease"
                        .into(),
                });
            }
            if !told {
                let wait = options.wait;
                tracing::info!(
                    "{}: leased elsewhere, waiting up to {wait:?}",
                    blob.address()
                );
                options.tell_waiting(true);
                told = true;
            }
            tokio::time::sleep(WAIT_PAUSE).await;
        }
        seen = properties(blob, options.attempt_deadline).await?;
    }
}

async fn acquire_now<S: PageStore>(
    blob: &S,
    options: &OpenOptions,
    seen: &Properties,
    held: &Held,
) -> Result<(), StorageError> {
    let conditions = Conditions {
        if_match: Some(seen.etag.clone()),
        ..Conditions::default()
    };
    // Repeating an acquire with one id is safe: it finds its own lease.
    patiently!(async {
        let deadline = options.attempt_deadline;
        let acquired = blob
            .acquire_lease(&options.lease, LEASE_SECONDS, &conditions, deadline)
            .await;
        match &acquired {
            Ok(()) => held.0.store(HELD, Ordering::Relaxed),
            Err(error) if error.effect() != Effect::NotApplied => {
                held.0.store(PERHAPS_HELD, Ordering::Relaxed);
            }
            Err(_) => {}
        }
        acquired
    })
}

pub(super) async fn properties<S: PageStore>(
    blob: &S,
    deadline: Duration,
) -> Result<Properties, OpenError> {
    let properties = patiently!(blob.properties(deadline))?;
    if properties.blob_type != BlobType::Page {
        return Err(unusable(
            blob,
            "not a page blob: only page blobs can be disks".into(),
        ));
    }
    if properties.size == 0 || !properties.size.is_multiple_of(PAGE) {
        return Err(unusable(
            blob,
            format!(
                "{} bytes are no disk: resize or recreate it",
                properties.size
            ),
        ));
    }
    if let Some(reason) = copy::incomplete(&properties) {
        return Err(unusable(blob, reason));
    }
    Ok(properties)
}

/// Break Lease names no lease: a late one could break the very lease that is
/// acquired next. So it hangs on the ETag, which the raise at the end of
/// opening changes; a holder that writes all the while changes it too, and
/// after a few tries the break goes without. Should that one come late, it
/// fences this opening and harms no data.
///
/// Gives back the properties seen last.
async fn break_lease<S: PageStore>(
    blob: &S,
    mut seen: Properties,
    deadline: Duration,
) -> Result<Properties, OpenError> {
    for last in [false, false, false, true] {
        if !matches!(seen.lease_state, LeaseState::Leased | LeaseState::Breaking) {
            return Ok(seen);
        }
        let if_match = (!last).then(|| seen.etag.clone());
        let conditions = Conditions {
            if_match,
            ..Conditions::default()
        };
        let Err(error) = blob.break_lease(Some(0), &conditions, deadline).await else {
            return Ok(seen);
        };
        let again = error.status() == Some(412)
            || error.code() == "LeaseNotPresentWithLeaseOperation"
            || error.advice() != Advice::GiveUp;
        if last || !again {
            return Err(error.into());
        }
        seen = properties(blob, deadline).await?;
    }
    unreachable!("the last try returns")
}

/// Raises the sequence number under the new lease, and reads the last page.
///
/// The raise is an increment, not a `max`: every opening must end up with a
/// number that no earlier holder had, and `seen` may be older than the last
/// holder's own raise. One that is lost and comes late raises the number once
/// more, which the first write refused by it finds out.
///
/// An opening that resumes has the lease id of the writes that the dead daemon
/// left on their way: the number alone keeps them out. They may run ahead of
/// it by [`RUN_AHEAD`], so it is raised past that; `seen` was read after the
/// last of them was sent.
async fn learn<S: PageStore>(
    blob: &S,
    options: &OpenOptions,
    seen: &Properties,
) -> Result<Learned, OpenError> {
    let deadline = options.attempt_deadline;
    let conditions = Conditions::lease(&options.lease);
    let raise = async {
        let action = match options.resume {
            true => SequenceNumber::Max(seen.sequence_number + RUN_AHEAD + 2),
            false => SequenceNumber::Increment,
        };
        patiently!(blob.set_sequence_number(action, &conditions, deadline))
    };
    let (raised, end) = tokio::join!(raise, last_page(blob, seen.size, deadline));
    let number = raised?.sequence_number;
    let end = end?;
    let mut layout = end.layout;
    if let Some(intent) = end.unfinished(seen) {
        let fenced = intent::fenced(&options.lease, number);
        intent::complete(blob, &intent, &fenced, deadline).await?;
        tracing::info!("{}: completed an interrupted resize", blob.address());
        layout = intent.layout;
    }
    check_usable(blob, layout, end.blob_size)?;
    Ok(Learned {
        blob_size: end.blob_size,
        layout,
        number,
        cache: None,
    })
}

/// The end of a blob, where its footer is.
pub(super) struct End {
    /// Bytes in the blob, footer included.
    pub blob_size: u64,
    /// What the last page says.
    pub layout: Layout,
    /// The last page.
    pub page: [u8; vhd::FOOTER],
}

impl End {
    /// What has yet to be done to the blob that was `seen`.
    pub fn unfinished(&self, seen: &Properties) -> Option<Intent> {
        Intent::unfinished(&seen.metadata, self.blob_size, &self.page)
    }

    /// Layout, and the blob size that holds the disk as it is now: of an
    /// unfinished resize the old one, of an unfinished creation none.
    pub fn as_is(&self, seen: &Properties) -> (Layout, u64) {
        match self.unfinished(seen) {
            Some(intent) => (intent.layout, intent.old),
            None => (self.layout, self.blob_size),
        }
    }
}

/// Reads the end of the blob.
pub(super) async fn last_page<S: PageStore>(
    blob: &S,
    seen_size: u64,
    deadline: Duration,
) -> Result<End, OpenError> {
    let mut size = seen_size;
    loop {
        let range = Range {
            start: size - PAGE,
            end: size,
        };
        let none = Conditions::default();
        let read = patiently!(blob.get_range(range, Checksum::Off, &none, deadline))?;
        if read.blob_size != size {
            size = read.blob_size;
            continue;
        }
        let mut page = [0; vhd::FOOTER];
        let mut at = 0;
        for piece in &read.pieces {
            page[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
        }
        let layout = vhd::detect(&page, size).map_err(|reason| unusable(blob, reason))?;
        return Ok(End {
            blob_size: size,
            layout,
            page,
        });
    }
}

fn check_usable<S: PageStore>(blob: &S, layout: Layout, blob_size: u64) -> Result<(), OpenError> {
    if layout.usable(blob_size) == 0 {
        return Err(unusable(
            blob,
            "it holds a VHD footer and nothing else: recreate it".into(),
        ));
    }
    Ok(())
}

async fn open_read_only<S: PageStore>(
    blob: S,
    options: &OpenOptions,
) -> Result<Arc<Volume<S>>, OpenError> {
    let seen = properties(&blob, options.attempt_deadline).await?;
    let end = last_page(&blob, seen.size, options.attempt_deadline).await?;
    let (layout, blob_size) = end.as_is(&seen);
    check_usable(&blob, layout, blob_size)?;
    let learned = Learned {
        blob_size,
        layout,
        number: seen.sequence_number,
        cache: None,
    };
    let standing = Arc::new(Standing::new(learned.number, Moment::now()));
    Ok(volume(blob, options, &learned, standing, None))
}

pub(super) fn fenced<S: PageStore>(
    blob: S,
    options: &OpenOptions,
    (size, layout): (u64, Layout),
    reason: String,
) -> Arc<Volume<S>> {
    let standing = Arc::new(Standing::new(0, Moment::now()));
    standing.fence(reason);
    let io = io(blob, options, standing);
    Arc::new(Volume::new(io, layout, size, None, None))
}

fn io<S: PageStore>(blob: S, options: &OpenOptions, standing: Arc<Standing>) -> Io<S> {
    Io {
        blob,
        lease: (!options.read_only).then(|| options.lease.clone()),
        standing,
        attempt_deadline: options.attempt_deadline,
        io_deadline: options.io_deadline,
        integrity: options.integrity,
        requests: AtomicU64::new(0),
        hold: Hold::default(),
        sent: Sent::default(),
        unwritten: (options.allocation_map && !options.read_only).then(Unwritten::default),
        trouble: Trouble::default(),
        cap: Cap::new(options.limits),
        pace: options.pace.clone().unwrap_or_default().join(),
    }
}

fn volume<S: PageStore>(
    blob: S,
    options: &OpenOptions,
    learned: &Learned,
    standing: Arc<Standing>,
    keeper: Option<Keeper<S>>,
) -> Arc<Volume<S>> {
    let io = io(blob, options, standing);
    let volume = Arc::new(Volume::new(
        io,
        learned.layout,
        learned.layout.usable(learned.blob_size),
        learned.cache.clone(),
        keeper,
    ));
    if !options.hold_back {
        cache::run(&volume);
    }
    if volume.io.unwritten.is_some() {
        load::start(&volume);
    }
    volume
}

pub(super) fn unusable<S: PageStore>(blob: &S, reason: String) -> OpenError {
    OpenError::Unusable {
        object: blob.address().to_string(),
        reason,
    }
}
