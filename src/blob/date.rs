//! HTTP dates (RFC 9110, IMF-fixdate), as `x-ms-date` and `Last-Modified` carry them.

use std::cell::RefCell;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::header::HeaderValue;
use jiff::Timestamp;
use jiff::fmt::rfc2822::{DateTimeParser, DateTimePrinter};

static PRINTER: DateTimePrinter = DateTimePrinter::new();
static PARSER: DateTimeParser = DateTimeParser::new();

thread_local! {
    /// The second it stands for and its text; one request in thousands formats.
    static NOW: RefCell<(u64, HeaderValue)> =
        const { RefCell::new((0, HeaderValue::from_static(""))) };
}

/// The current time as `x-ms-date` wants it; formatted once a second and thread.
pub(super) fn now() -> HeaderValue {
    let time = SystemTime::now();
    let second = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    NOW.with_borrow_mut(|(at, text)| {
        if *at != second {
            if let Ok(value) = HeaderValue::from_str(&format(time)) {
                *text = value;
            }
            *at = second;
        }
        text.clone()
    })
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`. Times that no such date can name (before
/// year 0, after 9999) come out as the epoch.
pub(super) fn format(time: SystemTime) -> String {
    Timestamp::try_from(time)
        .and_then(|stamp| PRINTER.timestamp_to_rfc9110_string(&stamp))
        .unwrap_or_else(|_| "Thu, 01 Jan 1970 00:00:00 GMT".into())
}

/// Parses an HTTP date; `None` when it is none.
pub(super) fn parse(text: &str) -> Option<SystemTime> {
    let stamp = PARSER.parse_timestamp(text.trim()).ok()?;
    Some(SystemTime::from(stamp))
}

/// How far `other` is ahead of (`true`) or behind this machine's clock.
pub(super) fn skew(other: SystemTime) -> (bool, Duration) {
    match other.duration_since(SystemTime::now()) {
        Ok(ahead) => (true, ahead),
        Err(behind) => (false, behind.duration()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn speaks_imf_fixdate() {
        let time = UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(format(time), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:37 GMT"), Some(time));
        assert_eq!(parse("yesterday"), None);
    }

    proptest! {
        #[test]
        fn round_trips(seconds in 0u64..253_402_300_000) {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            prop_assert_eq!(parse(&format(time)), Some(time));
        }

        #[test]
        fn never_panics(text in ".*") {
            parse(&text);
        }
    }
}
