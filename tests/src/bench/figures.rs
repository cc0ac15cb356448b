//! Samples and what is said of them: median, least, most, and ratios of pairs.

use serde::{Deserialize, Serialize};

/// Figures that were measured one after the other under the same conditions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Samples {
    /// In the order they were measured.
    pub samples: Vec<f64>,
    /// The middle one; the mean of the two in the middle of an even number.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Samples {
    /// Samples with their summary; `None` if there are none.
    pub fn of(samples: &[f64]) -> Option<Self> {
        Some(Samples {
            median: percentile(samples, 50.0)?,
            min: percentile(samples, 0.0)?,
            max: percentile(samples, 100.0)?,
            samples: samples.to_vec(),
        })
    }

    /// One figure of each measurement.
    pub fn of_each<T>(found: &[T], figure: impl Fn(&T) -> f64) -> Option<Self> {
        Samples::of(&found.iter().map(figure).collect::<Vec<_>>())
    }

    /// The ratios of pairs measured in the same round, ours over theirs. Rounds that only one of
    /// the two has are left out, and so are zeros below the line.
    pub fn ratio(&self, below: &Samples) -> Option<Samples> {
        let pairs = self.samples.iter().zip(&below.samples);
        let ratios: Vec<f64> = pairs
            .filter(|(_, theirs)| **theirs > 0.0)
            .map(|(ours, theirs)| ours / theirs)
            .collect();
        Samples::of(&ratios)
    }
}

/// The value below which `percent` of the samples are, interpolated between neighbours.
pub fn percentile(samples: &[f64], percent: f64) -> Option<f64> {
    percentiles(samples, [percent]).map(|[value]| value)
}

/// Several of them; the samples are put in order once.
pub fn percentiles<const N: usize>(samples: &[f64], percents: [f64; N]) -> Option<[f64; N]> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    Some(percents.map(|percent| {
        let place = (percent / 100.0).clamp(0.0, 1.0) * last as f64;
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a place in the samples"
        )]
        let below = place as usize;
        let above = sorted[(below + 1).min(last)];
        sorted[below] + (above - sorted[below]) * (place - below as f64)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_sample_whatever_the_order() {
        let odd = Samples::of(&[5.0, 1.0, 3.0]).expect("there are samples");
        assert_eq!((odd.median, odd.min, odd.max), (3.0, 1.0, 5.0));
        assert_eq!(odd.samples, [5.0, 1.0, 3.0]);
        let even = Samples::of(&[4.0, 1.0, 3.0, 2.0]).expect("there are samples");
        assert!((even.median - 2.5).abs() < 1e-12);
        assert_eq!(Samples::of(&[]), None);
    }

    #[test]
    fn percentiles_lie_between_neighbours() {
        let samples = [10.0, 20.0, 30.0, 40.0, 50.0];
        assert_eq!(percentile(&samples, 0.0), Some(10.0));
        assert_eq!(percentile(&samples, 100.0), Some(50.0));
        assert_eq!(percentile(&samples, 25.0), Some(20.0));
        let ninety = percentile(&samples, 90.0).expect("there are samples");
        assert!((ninety - 46.0).abs() < 1e-9, "{ninety}");
    }

    #[test]
    fn a_ratio_is_that_of_pairs_and_not_of_medians() {
        let ours = Samples::of(&[2.0, 40.0, 9.0]).expect("there are samples");
        let theirs = Samples::of(&[1.0, 10.0, 3.0]).expect("there are samples");
        let ratio = ours.ratio(&theirs).expect("there are pairs");
        assert_eq!(ratio.samples, [2.0, 4.0, 3.0]);
        let short = Samples::of(&[0.0, 10.0]).expect("there are samples");
        let ratio = ours.ratio(&short).expect("there is a pair");
        assert_eq!(ratio.samples, [4.0]);
    }
}
