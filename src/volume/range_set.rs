//! A bounded set of byte ranges that may forget, but never claims too much.

use std::collections::BTreeMap;

use crate::blob::Range;

/// Disjoint ranges that do not touch, most of them as short as [`RangeSet::new`]
/// says. When there would be too many the shortest are forgotten, and from then
/// on no shorter ones are taken.
#[derive(Debug)]
pub struct RangeSet {
    /// Ends by starts.
    ranges: BTreeMap<u64, u64>,
    most: usize,
    /// Nothing shorter is kept, in bytes.
    least: u64,
}

impl RangeSet {
    /// An empty set of at most `most` ranges.
    pub fn new(most: usize) -> Self {
        Self {
            ranges: BTreeMap::new(),
            most,
            least: 1,
        }
    }

    /// It has never forgotten anything.
    pub fn is_whole(&self) -> bool {
        self.least == 1
    }

    /// Adds `range`, or nothing.
    pub fn insert(&mut self, range: Range) {
        let (mut start, mut end) = (range.start, range.end);
        if start >= end {
            return;
        }
        // Whatever it overlaps or touches becomes one with it.
        while let Some((&from, &to)) = self.ranges.range(..=end).next_back()
            && to >= start
        {
            self.ranges.remove(&from);
            (start, end) = (start.min(from), end.max(to));
        }
        self.keep(start, end);
    }

    fn keep(&mut self, start: u64, end: u64) {
        if end - start < self.least {
            return;
        }
        self.ranges.insert(start, end);
        while self.ranges.len() > self.most {
            self.least *= 2;
            let least = self.least;
            self.ranges.retain(|start, end| *end - *start >= least);
        }
    }

    /// Takes `range` out.
    pub fn remove(&mut self, range: Range) {
        if range.is_empty() {
            return;
        }
        while let Some((&from, &to)) = self.ranges.range(..range.end).next_back()
            && to > range.start
        {
            self.ranges.remove(&from);
            if from < range.start {
                self.keep(from, range.start);
            }
            if to > range.end {
                self.keep(range.end, to);
            }
        }
    }

    /// `range` without what of its two ends is in the set: nothing, if all of
    /// it is.
    pub fn trimmed(&self, range: Range) -> Option<Range> {
        let Range { mut start, mut end } = range;
        if let Some((_, &to)) = self.ranges.range(..=start).next_back() {
            start = start.max(to);
        }
        if start >= end {
            return None;
        }
        if let Some((&from, &to)) = self.ranges.range(..end).next_back()
            && to >= end
        {
            end = end.min(from);
        }
        debug_assert!(start < end);
        Some(Range { start, end })
    }

    /// Its ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Range> {
        let ranges = self.ranges.iter();
        ranges.map(|(&start, &end)| Range { start, end })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SPAN: u64 = 64;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Insert(Range),
        Remove(Range),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..SPAN, 0..16u64).prop_map(|(start, len)| Range {
            start,
            end: (start + len).min(SPAN),
        });
        (any::<bool>(), range).prop_map(|(insert, range)| match insert {
            true => Step::Insert(range),
            false => Step::Remove(range),
        })
    }

    /// Carries the steps out; the set, and what it should hold.
    fn run(most: usize, steps: &[Step]) -> (RangeSet, Vec<bool>) {
        let (mut set, mut model) = (RangeSet::new(most), vec![false; 64]);
        for step in steps {
            let (range, there) = match *step {
                Step::Insert(range) => (range, true),
                Step::Remove(range) => (range, false),
            };
            match there {
                true => set.insert(range),
                false => set.remove(range),
            }
            for byte in range.start..range.end {
                model[usize::try_from(byte).unwrap()] = there;
            }
        }
        (set, model)
    }

    fn held(set: &RangeSet) -> Vec<bool> {
        let mut held = vec![false; 64];
        for range in set.iter() {
            for byte in range.start..range.end {
                held[usize::try_from(byte).unwrap()] = true;
            }
        }
        held
    }

    proptest! {
        #[test]
        fn with_room_it_is_exact(steps in proptest::collection::vec(step(), 0..40)) {
            let (set, model) = run(1000, &steps);
            prop_assert!(set.is_whole());
            prop_assert_eq!(held(&set), model);
            let ranges: Vec<Range> = set.iter().collect();
            prop_assert!(ranges.windows(2).all(|two| two[0].end < two[1].start));
        }

        #[test]
        fn without_room_it_claims_no_more_than_is_there(
            most in 0usize..4,
            steps in proptest::collection::vec(step(), 0..40),
        ) {
            let (set, model) = run(most, &steps);
            prop_assert!(set.iter().count() <= most);
            for (held, there) in held(&set).into_iter().zip(model) {
                prop_assert!(there || !held);
            }
        }

        #[test]
        fn trimming_leaves_what_is_not_in_it(
            steps in proptest::collection::vec(step(), 0..40),
            start in 0..SPAN, len in 1..SPAN,
        ) {
            let (set, model) = run(1000, &steps);
            let range = Range { start, end: (start + len).min(SPAN) };
            let missing: Vec<u64> = (range.start..range.end)
                .filter(|byte| !model[usize::try_from(*byte).unwrap()])
                .collect();
            let expected = missing.first().map(|first| Range {
                start: *first,
                end: missing[missing.len() - 1] + 1,
            });
            prop_assert_eq!(set.trimmed(range), expected);
        }
    }
}
