//! What a request asks of the store.

use std::fmt;

use dysk::blob::{Range, SequenceNumber};

/// What a request asks.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    Put(Range),
    Clear(Range),
    Get(Range),
    Ranges(Range),
    Properties,
    Number(SequenceNumber),
    Acquire,
    Renew,
    Release,
    Break,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put(range) => write!(f, "put page {range}"),
            Self::Clear(range) => write!(f, "clear pages {range}"),
            Self::Get(range) => write!(f, "get blob {range}"),
            Self::Ranges(range) => write!(f, "get page ranges {range}"),
            Self::Properties => f.write_str("get blob properties"),
            Self::Number(SequenceNumber::Max(number)) => {
                write!(f, "set blob properties (max {number})")
            }
            Self::Number(_) => f.write_str("set blob properties (increment)"),
            Self::Acquire => f.write_str("acquire lease"),
            Self::Renew => f.write_str("renew lease"),
            Self::Release => f.write_str("release lease"),
            Self::Break => f.write_str("break lease"),
        }
    }
}
