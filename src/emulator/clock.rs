//! Time as the service keeps and prints it: ticks of 100 ns since 1970, HTTP
//! dates, ISO 8601 stamps.

use std::cell::RefCell;
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::header::HeaderValue;

/// Ticks (of 100 ns) in a second.
pub(super) const TICKS_PER_SECOND: u64 = 10_000_000;

/// Ticks from the year 1 to 1970: entity tags count from there, as Azure's do.
pub(super) const TICKS_BEFORE_EPOCH: u64 = 621_355_968_000_000_000;

/// Ticks since 1970.
pub(super) fn now() -> u64 {
    let elapsed = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    elapsed.as_secs() * TICKS_PER_SECOND + u64::from(elapsed.subsec_nanos() / 100)
}

/// Seconds since 1970, moved by `skew` seconds.
pub(super) fn skewed_seconds(skew: i64) -> i64 {
    i64::try_from(now() / TICKS_PER_SECOND)
        .unwrap_or(i64::MAX)
        .saturating_add(skew)
}

thread_local! {
    /// The HTTP dates printed last; formatting one costs more than all other
    /// headers of an answer together, and the same few seconds recur.
    static PRINTED: RefCell<[(i64, HeaderValue); 8]> =
        RefCell::new(std::array::from_fn(|_| (i64::MIN, HeaderValue::from_static(""))));
}

/// `seconds` since 1970 as an HTTP date (RFC 9110, IMF-fixdate).
pub(super) fn http_date(seconds: i64) -> HeaderValue {
    PRINTED.with_borrow_mut(|printed| {
        let slot = usize::try_from(seconds.rem_euclid(8)).unwrap_or(0);
        if printed[slot].0 != seconds {
            printed[slot] = (seconds, print_http_date(seconds));
        }
        printed[slot].1.clone()
    })
}

/// As [`http_date`], of a time in ticks.
pub(super) fn http_date_of(ticks: u64) -> HeaderValue {
    http_date(i64::try_from(ticks / TICKS_PER_SECOND).unwrap_or(i64::MAX))
}

fn print_http_date(seconds: i64) -> HeaderValue {
    jiff::Timestamp::from_second(seconds)
        .ok()
        .and_then(|time| {
            jiff::fmt::rfc2822::DateTimePrinter::new()
                .timestamp_to_rfc9110_string(&time)
                .ok()
        })
        .and_then(|text| HeaderValue::from_str(&text).ok())
        .unwrap_or(HeaderValue::from_static("Thu, 01 Jan 1970 00:00:00 GMT"))
}

/// An HTTP date as seconds since 1970.
pub(super) fn parse_http_date(text: &str) -> Option<i64> {
    jiff::fmt::rfc2822::DateTimeParser::new()
        .relaxed_weekday(true)
        .parse_timestamp(text)
        .ok()
        .map(jiff::Timestamp::as_second)
}

/// `2026-01-02T03:04:05.1234567Z`, the form of snapshot times.
pub(super) fn iso(ticks: u64) -> String {
    let seconds = i64::try_from(ticks / TICKS_PER_SECOND).unwrap_or(i64::MAX);
    let time = jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    format!(
        "{}.{:07}Z",
        time.strftime("%Y-%m-%dT%H:%M:%S"),
        ticks % TICKS_PER_SECOND
    )
}

/// The times a SAS may carry: `2026-01-02`, `2026-01-02T03:04Z`,
/// `2026-01-02T03:04:05Z` and fractions, as seconds since 1970.
pub(super) fn parse_iso(text: &str) -> Option<i64> {
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Some(time.as_second());
    }
    let date: jiff::civil::Date = text.parse().ok()?;
    date.to_zoned(jiff::tz::TimeZone::UTC)
        .ok()
        .map(|zoned| zoned.timestamp().as_second())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses_dates() {
        assert_eq!(http_date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
        assert_eq!(http_date(1_700_000_000), "Tue, 14 Nov 2023 22:13:20 GMT");
        assert_eq!(
            parse_http_date("Tue, 14 Nov 2023 22:13:20 GMT"),
            Some(1_700_000_000)
        );
        assert_eq!(parse_http_date("yesterday"), None);
        assert_eq!(
            iso(1_700_000_000 * TICKS_PER_SECOND + 42),
            "2023-11-14T22:13:20.0000042Z"
        );
        for text in [
            "2023-11-14T22:13:20Z",
            "2023-11-14T22:13:20.123Z",
            "2023-11-14T22:13:20.0000000Z",
        ] {
            assert_eq!(parse_iso(text), Some(1_700_000_000), "{text}");
        }
        assert_eq!(parse_iso("2023-11-14T22:13Z"), Some(1_700_000_000 - 20));
        assert_eq!(parse_iso("2023-11-14"), Some(1_699_920_000));
        assert_eq!(parse_iso("soon"), None);
    }
}
