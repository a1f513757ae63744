//! Load that really computes.

use super::signal;
use serde::Serialize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Order of the matrices: three of them fit into the second-level cache.
const ORDER: usize = 64;

/// How long to compute.
#[derive(Debug, Clone, Default)]
pub struct Until {
    /// At most so long.
    pub span: Option<Duration>,
    /// Until this file exists.
    pub file: Option<PathBuf>,
}

/// What was computed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Burned {
    /// Products of two matrices.
    pub iterations: u64,
    /// Time it took.
    pub seconds: f64,
    /// Billions of floating-point operations per second.
    pub gflops: f64,
    /// Depends on every product, so none can be left out.
    pub checksum: f64,
}

/// Multiplies matrices until told to stop.
pub fn burn(until: &Until) -> Burned {
    let begun = Instant::now();
    let factor: Vec<f64> = (0..ORDER * ORDER).map(|index| ((index * 7919) % 1000) as f64 / 64_000.0).collect();
    let mut left = factor.clone();
    let mut iterations = 0u64;
    let over = || {
        signal::stopped()
            || until.span.is_some_and(|span| begun.elapsed() >= span)
            || until.file.as_ref().is_some_and(|file| file.exists())
    };
    while !over() {
        for _ in 0..16 {
            left = multiply(&left, &factor);
            iterations += 1;
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let operations = iterations as f64 * 2.0 * (ORDER * ORDER * ORDER) as f64;
    Burned { iterations, seconds, gflops: operations / seconds.max(1e-9) / 1e9, checksum: left.iter().sum() }
}

/// The product, scaled so that repeated products neither vanish nor overflow.
fn multiply(left: &[f64], right: &[f64]) -> Vec<f64> {
    let mut product = vec![0.0; ORDER * ORDER];
    for (row, out) in product.chunks_exact_mut(ORDER).enumerate() {
        for (middle, factors) in right.chunks_exact(ORDER).enumerate() {
            let value = left[row * ORDER + middle];
            for (place, factor) in out.iter_mut().zip(factors) {
                *place += value * factor;
            }
        }
    }
    let largest = product.iter().fold(1e-300, |largest: f64, value| largest.max(value.abs()));
    for value in &mut product {
        *value /= largest;
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burning_really_computes_and_stays_finite() {
        let burned = burn(&Until { span: Some(Duration::from_millis(100)), file: None });
        assert!(burned.iterations >= 16 && burned.gflops > 0.0);
        assert!(burned.checksum.is_finite() && burned.checksum > 1.0, "{}", burned.checksum);
    }
}
