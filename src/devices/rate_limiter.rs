//! Limits of operations and bytes per second: token buckets in whole numbers, exact over any time.

use std::time::{Duration, Instant};

/// A second in the unit of the clock.
const SECOND: u128 = 1_000_000_000;
/// A bucket holds what comes in a tenth of a second: the most that is above the rate in any window of time.
const BURST: u128 = SECOND / 10;

/// One limit. A token is counted as 10⁹ parts, so that each nanosecond adds a whole number of them: `rate`.
#[derive(Debug)]
struct Bucket {
    rate: u64,
    capacity: i128,
    parts: i128,
}

impl Bucket {
    /// `rate` tokens a second, at least 1; full at first.
    fn new(rate: u64) -> Self {
        let rate = rate.max(1);
        // At least one token, so that one per hour-long second comes, too. Below 2⁹⁴.
        let capacity = (u128::from(rate) * BURST).max(SECOND) as i128;
        Self { rate, capacity, parts: capacity }
    }

    fn refill(&mut self, nanoseconds: u64) {
        // Below 2¹²⁸ as a product of two 64-bit numbers; what passes 2¹²⁷ is more than any bucket holds.
        let added = u128::from(nanoseconds) * u128::from(self.rate);
        let added = i128::try_from(added).unwrap_or(i128::MAX);
        self.parts = self.parts.saturating_add(added).min(self.capacity);
    }

    fn parts_of(tokens: u64) -> i128 {
        i128::from(tokens) * SECOND as i128
    }

    /// Nanoseconds until `tokens` may be taken: until there is one. The bucket owes the rest, for which all wait alike:
    /// who waited for the whole of a large request would wait for ever where others take small ones as they come.
    fn wait(&self, tokens: u64) -> u64 {
        let missing = Self::parts_of(tokens.min(1)).saturating_sub(self.parts);
        let missing = u128::try_from(missing).unwrap_or(0);
        u64::try_from(missing.div_ceil(self.rate.into())).unwrap_or(u64::MAX)
    }

    fn take(&mut self, tokens: u64) {
        self.parts = self.parts.saturating_sub(Self::parts_of(tokens));
    }
}

/// A limit of operations, of bytes, of both or of neither.
#[derive(Debug)]
pub struct RateLimiter {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
    start: Instant,
    /// Time since `start` up to which the buckets were filled, in nanoseconds.
    filled: u64,
}

impl RateLimiter {
    /// So many operations and bytes a second; `None`: any number. 0 is taken for 1, as nothing would ever pass.
    #[must_use]
    pub fn new(operations: Option<u64>, bytes: Option<u64>) -> Self {
        let (operations, bytes) = (operations.map(Bucket::new), bytes.map(Bucket::new));
        Self { operations, bytes, start: Instant::now(), filled: 0 }
    }

    /// Operations and bytes a second, where they are limited.
    #[must_use]
    pub fn rates(&self) -> (Option<u64>, Option<u64>) {
        let rate = |bucket: &Option<Bucket>| bucket.as_ref().map(|b| b.rate);
        (rate(&self.operations), rate(&self.bytes))
    }

    /// Whether there is any limit.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.operations.is_some() || self.bytes.is_some()
    }

    /// Takes what some operations of so many bytes in all cost.
    ///
    /// # Errors
    /// Nothing is taken: how long to wait before asking again.
    pub fn take(&mut self, operations: u64, bytes: u64) -> Result<(), Duration> {
        if !self.is_limited() {
            return Ok(());
        }
        self.take_at(self.start.elapsed(), operations, bytes)
    }

    /// As [`RateLimiter::take`], at `now` since the start.
    fn take_at(&mut self, now: Duration, operations: u64, bytes: u64) -> Result<(), Duration> {
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        // Another thread may have read the clock later and come first.
        let passed = now.saturating_sub(self.filled);
        self.filled = self.filled.max(now);
        let mut buckets = [(&mut self.operations, operations), (&mut self.bytes, bytes)];
        let mut wait = 0;
        for (bucket, tokens) in &mut buckets {
            if let Some(bucket) = bucket {
                bucket.refill(passed);
                wait = wait.max(bucket.wait(*tokens));
            }
        }
        if wait > 0 {
            return Err(Duration::from_nanos(wait));
        }
        for (bucket, tokens) in buckets {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Takes operations one by one as fast as it lets us, with a fake clock, and returns how many until `end`.
    fn run(limiter: &mut RateLimiter, end: Duration, bytes: u64) -> u64 {
        let (mut now, mut count) = (Duration::ZERO, 0);
        while now <= end {
            match limiter.take_at(now, 1, bytes) {
                Ok(()) => count += 1,
                Err(wait) => now += wait,
            }
        }
        count
    }

    #[test]
    fn ten_a_second_are_ten_a_second() {
        // A bucket of one, full at first: one more than the rate in any time.
        assert_eq!(run(&mut RateLimiter::new(Some(10), None), Duration::from_secs(60), 0), 601);
        assert_eq!(run(&mut RateLimiter::new(Some(1000), None), Duration::from_secs(60), 0), 60_100);
    }

    #[test]
    fn bytes_are_exact_however_large_the_requests() {
        // 1 MiB each at 64 KiB a second: one every 16 seconds.
        let count = run(&mut RateLimiter::new(None, Some(64 << 10)), Duration::from_secs(1600), 1 << 20);
        assert!((100..=101).contains(&count), "{count}");
    }

    #[test]
    fn without_limits_everything_passes() {
        let mut limiter = RateLimiter::new(None, None);
        assert!(!limiter.is_limited());
        assert_eq!(limiter.take(u64::MAX, u64::MAX), Ok(()));
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let mut limiter = RateLimiter::new(Some(u64::MAX), Some(u64::MAX));
        let mut now = Duration::ZERO;
        for _ in 0..100 {
            if let Err(wait) = limiter.take_at(now, u64::MAX, u64::MAX) {
                now = now.saturating_add(wait);
            }
        }
        assert!(limiter.take_at(Duration::MAX, 1, 1).is_ok());
    }

    #[test]
    fn a_large_request_is_not_held_up_by_small_ones_for_ever() {
        // Two queues of one disk: one asks for 4 KiB as soon as there are as many, the other for 1 MiB.
        let mut limiter = RateLimiter::new(None, Some(1 << 20));
        let (mut small, mut large) = (Duration::ZERO, Duration::from_millis(200));
        while small < Duration::from_secs(60) {
            if large <= small {
                match limiter.take_at(large, 1, 1 << 20) {
                    Ok(()) => return,
                    Err(wait) => large += wait,
                }
            } else if let Err(wait) = limiter.take_at(small, 1, 4096) {
                small += wait;
            }
        }
        panic!("the large one waits after a minute");
    }

    proptest! {
        /// Never more than the burst above the rate, and never less than the rate while somebody waits.
        #[test]
        fn exact_over_time(rate in 1u64..100_000, sizes in prop::collection::vec(1u64..5000, 1..200)) {
            let mut limiter = RateLimiter::new(None, Some(rate));
            let (mut now, mut taken) = (Duration::ZERO, 0u128);
            let burst = u128::from(rate / 10).max(1);
            for size in sizes {
                while let Err(wait) = limiter.take_at(now, 1, size) {
                    prop_assert!(wait > Duration::ZERO);
                    now += wait;
                }
                // What came before this one was within burst and rate; this one may owe.
                prop_assert!(taken * SECOND <= burst * SECOND + now.as_nanos() * u128::from(rate));
                taken += u128::from(size);
            }
            // Somebody waited all the time, so nothing was lost but the rounding of each wait.
            let most = now.as_nanos() * u128::from(rate);
            prop_assert!(taken * SECOND + 200 * u128::from(rate) + SECOND >= most);
        }

        #[test]
        fn a_refusal_takes_nothing(rate in 1u64..1000, bytes in 1u64..1000) {
            let mut limiter = RateLimiter::new(Some(rate), Some(bytes));
            while limiter.take_at(Duration::ZERO, 1, 1).is_ok() {}
            let wait = limiter.take_at(Duration::ZERO, 1, 1);
            prop_assert_eq!(wait, limiter.take_at(Duration::ZERO, 1, 1));
            prop_assert!(limiter.take_at(wait.unwrap_err(), 1, 1).is_ok());
        }
    }
}
