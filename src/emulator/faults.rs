//! Faults on demand: rules that say which requests meet which trouble.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::config::Span;
use super::dice::Dice;
use super::operation::Operation;
use super::request::Request;

/// What befalls a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "kind",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase",
    deny_unknown_fields
)]
pub enum Effect {
    /// An error is answered.
    Status {
        /// HTTP status.
        status: u16,
        /// `x-ms-error-code`; none is sent when empty.
        #[serde(default)]
        code: String,
        /// `Retry-After` in seconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_after: Option<u64>,
        /// Whether the request is executed before the error is answered.
        #[serde(default)]
        applied: bool,
    },
    /// The connection is reset; the request is never executed.
    ResetBefore,
    /// The request is executed, then the connection is reset without an answer.
    ResetAfter,
    /// The connection is reset at once; the request is executed after `delay`,
    /// and all its conditions are judged only then.
    Late {
        /// How much later.
        delay: Span,
    },
    /// The request is held.
    Stall {
        /// For how long.
        delay: Span,
        /// After it was executed instead of before.
        #[serde(default)]
        after: bool,
    },
    /// The request is held, and then executed without its `If-*` conditions: for
    /// tests to show what would happen if nobody had set them.
    Unconditional {
        /// For how long it is held.
        #[serde(default = "at_once")]
        delay: Span,
    },
    /// Bytes of the answer's body are flipped; checksum headers are those of
    /// the true data.
    Corrupt {
        /// How many bytes.
        #[serde(default = "one")]
        bytes: u32,
    },
    /// The body breaks off, and the connection with it.
    Truncate {
        /// After this many bytes; half of them when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keep: Option<u64>,
    },
    /// Another latency than the set one.
    Latency {
        /// The latency.
        latency: Span,
    },
}

fn one() -> u32 {
    1
}

fn at_once() -> Span {
    Span(Duration::ZERO)
}

impl Effect {
    /// `late` by `delay`.
    #[must_use]
    pub fn late(delay: Duration) -> Self {
        Self::Late { delay: Span(delay) }
    }

    /// An error answered without executing the request.
    #[must_use]
    pub fn status(status: u16, code: &str) -> Self {
        Self::Status {
            status,
            code: code.into(),
            retry_after: None,
            applied: false,
        }
    }

    /// The name in statistics.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Status { .. } => "status",
            Self::ResetBefore => "reset-before",
            Self::ResetAfter => "reset-after",
            Self::Late { .. } => "late",
            Self::Stall { .. } => "stall",
            Self::Unconditional { .. } => "unconditional",
            Self::Corrupt { .. } => "corrupt",
            Self::Truncate { .. } => "truncate",
            Self::Latency { .. } => "latency",
        }
    }
}

/// Which requests meet an effect. The first rule that matches and whose dice
/// fall strikes; later ones are not asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// The operation; `any` (or nothing) is all of them.
    #[serde(
        default,
        serialize_with = "write_operation",
        deserialize_with = "read_operation"
    )]
    pub operation: Option<Operation>,
    /// Only in this container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// Only this blob.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blob: Option<String>,
    /// Only requests whose byte range overlaps `start..end`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<Range<u64>>,
    /// How likely it strikes, 0 to 1.
    #[serde(default = "certain")]
    pub probability: f64,
    /// Lets this many matching requests pass first.
    #[serde(default)]
    pub skip: u64,
    /// Strikes at most this many times.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// Seed of this rule's dice; the emulator's seed and the rule's place in
    /// the list when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// What happens.
    pub effect: Effect,
}

fn certain() -> f64 {
    1.0
}

fn write_operation<S: Serializer>(
    operation: &Option<Operation>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match operation {
        Some(operation) => operation.serialize(serializer),
        None => serializer.serialize_str("any"),
    }
}

fn read_operation<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Operation>, D::Error> {
    let name = String::deserialize(deserializer)?;
    if name == "any" {
        return Ok(None);
    }
    let name = serde::de::value::StringDeserializer::<D::Error>::new(name);
    Operation::deserialize(name).map(Some)
}

impl Rule {
    /// `effect` on every request for `operation`.
    #[must_use]
    pub fn on(operation: Operation, effect: Effect) -> Self {
        Self {
            operation: Some(operation),
            ..Self::any(effect)
        }
    }

    /// `effect` on every request.
    #[must_use]
    pub fn any(effect: Effect) -> Self {
        Self {
            operation: None,
            container: None,
            blob: None,
            range: None,
            probability: 1.0,
            skip: 0,
            count: None,
            seed: None,
            effect,
        }
    }

    /// At most `count` times.
    #[must_use]
    pub fn times(self, count: u64) -> Self {
        Self {
            count: Some(count),
            ..self
        }
    }

    /// Only on this blob.
    #[must_use]
    pub fn blob(self, blob: impl Into<String>) -> Self {
        Self {
            blob: Some(blob.into()),
            ..self
        }
    }

    /// With this probability, by dice of this seed.
    #[must_use]
    pub fn chance(self, probability: f64, seed: u64) -> Self {
        Self {
            probability,
            seed: Some(seed),
            ..self
        }
    }

    fn matches(&self, operation: Operation, request: &Request) -> bool {
        let is =
            |wanted: &Option<String>, own: &str| wanted.as_ref().is_none_or(|wanted| wanted == own);
        self.operation.is_none_or(|wanted| wanted == operation)
            && is(&self.container, &request.target.container)
            && is(&self.blob, &request.target.blob)
            && self.range.as_ref().is_none_or(|range| {
                request.range().is_ok_and(|own| {
                    own.is_some_and(|(first, last)| {
                        first < range.end && last.is_none_or(|last| last >= range.start)
                    })
                })
            })
    }
}

/// A rule at work.
#[derive(Clone, Debug, Serialize)]
pub struct RuleReport {
    /// The rule.
    #[serde(flatten)]
    pub rule: Rule,
    /// Requests it matched.
    pub matched: u64,
    /// How often it struck.
    pub struck: u64,
}

#[derive(Debug)]
struct Active {
    report: RuleReport,
    dice: Dice,
}

/// The fault plan: the rules in force.
#[derive(Debug)]
pub struct FaultPlan {
    seed: u64,
    any: AtomicBool,
    rules: Mutex<Vec<Active>>,
}

impl FaultPlan {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed,
            any: AtomicBool::new(false),
            rules: Mutex::default(),
        }
    }

    fn rules(&self) -> std::sync::MutexGuard<'_, Vec<Active>> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces all rules.
    pub fn set(&self, rules: Vec<Rule>) {
        let active: Vec<Active> = (1u64..)
            .zip(rules)
            .map(|(place, rule)| Active {
                dice: Dice::new(rule.seed.unwrap_or(self.seed.wrapping_add(place))),
                report: RuleReport {
                    rule,
                    matched: 0,
                    struck: 0,
                },
            })
            .collect();
        let mut rules = self.rules();
        self.any.store(!active.is_empty(), Ordering::Release);
        *rules = active;
    }

    /// Takes all rules away.
    pub fn clear(&self) {
        self.set(Vec::new());
    }

    /// The rules and what they did.
    #[must_use]
    pub fn report(&self) -> Vec<RuleReport> {
        self.rules()
            .iter()
            .map(|active| active.report.clone())
            .collect()
    }

    /// What befalls `request`, and a number for its details.
    pub(super) fn strike(&self, operation: Operation, request: &Request) -> Option<(Effect, u64)> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        for active in self.rules().iter_mut() {
            let report = &mut active.report;
            let rule = &report.rule;
            if !rule.matches(operation, request) {
                continue;
            }
            report.matched += 1;
            if report.matched <= rule.skip
                || rule.count.is_some_and(|count| report.struck >= count)
                || !active.dice.falls(rule.probability)
            {
                continue;
            }
            report.struck += 1;
            return Some((report.rule.effect.clone(), active.dice.next()));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_read_as_documented() {
        let text = r#"[
            {"operation":"put-page","blob":"v.vhd","range":{"start":0,"end":4096},
             "probability":0.5,"count":3,"seed":7,"effect":{"kind":"late","delay":"500ms"}},
            {"operation":"any","effect":{"kind":"status","status":503,"code":"ServerBusy","retryAfter":1}},
            {"effect":{"kind":"reset-after"}},
            {"effect":{"kind":"stall","delay":20,"after":true}},
            {"effect":{"kind":"truncate"}},
            {"effect":{"kind":"unconditional","delay":"1s"}},
            {"effect":{"kind":"corrupt"}}
        ]"#;
        let rules: Vec<Rule> = serde_json::from_str(text).expect("rules");
        assert_eq!(rules[0].operation, Some(Operation::PutPage));
        assert_eq!(rules[0].effect, Effect::late(Duration::from_millis(500)));
        assert_eq!(rules[1].operation, None);
        let again = serde_json::to_string(&rules).expect("json");
        assert_eq!(
            serde_json::from_str::<Vec<Rule>>(&again).expect("rules"),
            rules
        );
        for bad in [
            r#"{"operation":"put-pages","effect":{"kind":"reset-after"}}"#,
            r#"{"effect":{"kind":"explode"}}"#,
            r#"{"effects":{"kind":"reset-after"}}"#,
        ] {
            assert!(serde_json::from_str::<Rule>(bad).is_err(), "{bad}");
        }
    }
}
