//! Order statistics and their uncertainty. Pure functions; the random numbers have a fixed seed, so that the same samples
//! always give the same report.

use serde::Serialize;

/// How many times the samples are drawn anew.
const RESAMPLES: usize = 2000;
/// Any number; it is the same in every report.
const SEED: u64 = 0x6d69_6372_6f76_6d21;

/// The value below which the share `p` (0 to 1) of the values lies, interpolated between neighbours (type 7 of Hyndman and
/// Fan, R's own). `None`: there are no values.
#[must_use]
pub fn quantile(values: &[f64], p: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let place = p.clamp(0.0, 1.0) * last as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    Some(sorted[below] + (sorted[above] - sorted[below]) * (place - place.floor()))
}

/// The middle value.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

/// What is told of a series of measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The least.
    pub min: f64,
    /// The middle.
    pub median: f64,
    /// 95 % lie below.
    pub p95: f64,
}

impl Summary {
    /// `None`: there are no values.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        Some(Self { min: quantile(values, 0.0)?, median: median(values)?, p95: quantile(values, 0.95)? })
    }
}

/// How many times as much one series is as another.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Of the medians.
    pub value: f64,
    /// The lower end of its 95 % interval.
    pub low: f64,
    /// The upper one.
    pub high: f64,
}

impl Ratio {
    /// The ratio of two series that were measured in turn. The interval is a bootstrap's: rounds, each a value of both
    /// series, are drawn with replacement, and of the ratios that come out the middle 95 % are it. `None`: the series are
    /// empty or not of one length, or the base's median is zero.
    #[must_use]
    pub fn of(values: &[f64], base: &[f64]) -> Option<Self> {
        if values.len() != base.len() {
            return None;
        }
        let ratio = |values: &[f64], base: &[f64]| {
            let base = median(base)?;
            (base > 0.0).then_some(median(values)? / base)
        };
        let value = ratio(values, base)?;
        let mut random = Random(SEED);
        let (mut drawn, mut drawn_base) = (values.to_vec(), base.to_vec());
        let mut ratios = Vec::with_capacity(RESAMPLES);
        for _ in 0..RESAMPLES {
            for place in 0..values.len() {
                let round = random.below(values.len());
                (drawn[place], drawn_base[place]) = (values[round], base[round]);
            }
            ratios.extend(ratio(&drawn, &drawn_base));
        }
        Some(Self { value, low: quantile(&ratios, 0.025)?, high: quantile(&ratios, 0.975)? })
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014): enough to draw with.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to `bound` - 1.
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_rs() {
        // R: quantile(c(15, 20, 35, 40, 50), c(0, .05, .3, .4, .5, .95, 1))
        let values = [35.0, 20.0, 15.0, 50.0, 40.0];
        for (p, expected) in
            [(0.0, 15.0), (0.05, 16.0), (0.3, 23.0), (0.4, 29.0), (0.5, 35.0), (0.95, 48.0), (1.0, 50.0)]
        {
            let found = quantile(&values, p).unwrap();
            assert!((found - expected).abs() < 1e-9, "{p}: {found}");
        }
        assert_eq!(quantile(&[7.0], 0.95), Some(7.0));
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn a_summary_has_the_ends() {
        let values: Vec<_> = (0..=100).map(f64::from).collect();
        assert_eq!(Summary::of(&values), Some(Summary { min: 0.0, median: 50.0, p95: 95.0 }));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn a_constant_ratio_has_no_spread() {
        let base: Vec<_> = (1..=10).map(f64::from).collect();
        let values: Vec<_> = base.iter().map(|_| 6.0).collect();
        let ones = vec![2.0; 10];
        assert_eq!(Ratio::of(&values, &ones), Some(Ratio { value: 3.0, low: 3.0, high: 3.0 }));
        let ratio = Ratio::of(&values, &base).unwrap();
        assert!(ratio.low < ratio.value && ratio.value < ratio.high, "{ratio:?}");
        assert_eq!(Ratio::of(&values, &base), Some(ratio), "the same samples, the same interval");
    }

    #[test]
    fn rounds_stay_together() {
        // Both series vary by a factor of 100, always together: drawn apart, their ratio would spread.
        let base: Vec<_> = (0..20).map(|n| if n % 2 == 0 { 1.0 } else { 100.0 }).collect();
        let values: Vec<_> = base.iter().map(|b| b * 2.0).collect();
        assert_eq!(Ratio::of(&values, &base), Some(Ratio { value: 2.0, low: 2.0, high: 2.0 }));
    }

    #[test]
    fn the_interval_covers_the_truth() {
        // 200 comparisons of noise with a true ratio of 1: 95 % of the intervals should have 1 in them. A median's
        // bootstrap is known to be a little wide or narrow with few samples.
        let mut random = Random(1);
        let mut noise = |n| (0..n).map(|_| 100.0 + random.below(1000) as f64 / 50.0).collect::<Vec<_>>();
        let covered = (0..200)
            .filter(|_| {
                let ratio = Ratio::of(&noise(15), &noise(15)).unwrap();
                ratio.low <= 1.0 && 1.0 <= ratio.high
            })
            .count();
        assert!((176..=200).contains(&covered), "{covered}");
    }

    #[test]
    fn nothing_is_compared_with_nothing() {
        assert_eq!(Ratio::of(&[], &[]), None);
        assert_eq!(Ratio::of(&[1.0], &[0.0]), None);
        assert_eq!(Ratio::of(&[1.0, 2.0], &[1.0]), None);
    }

    #[test]
    fn random_numbers_are_splitmixs() {
        // The reference implementation's first numbers for seed 1234567.
        let mut random = Random(1_234_567);
        assert_eq!([random.next(), random.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }
}
