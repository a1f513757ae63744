//! Samples become medians and ratios: a table, JSON and a picture.

use crate::site::WireKind;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What is measured of every contender, and whether more is better.
pub(crate) const METRICS: [(&str, bool); 7] = [
    ("tcp1_gbps", true),
    ("tcp4_gbps", true),
    ("udp64_kpps", true),
    ("rtt_p50_us", false),
    ("rtt_p99_us", false),
    ("rtt_p99_loaded_us", false),
    ("cpu_s_per_gb", false),
];
/// What ratios are to.
pub(crate) const REFERENCE: &str = "vxlan";

/// Samples by wire, contender and metric.
#[derive(Debug, Default)]
pub(crate) struct Samples(BTreeMap<(&'static str, &'static str, &'static str), Vec<f64>>);

/// The middle one, or the mean of the two.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (half, last) = (sorted.len() / 2, sorted.len().checked_sub(1)?);
    Some(if sorted.len() % 2 == 1 { sorted[half] } else { f64::midpoint(sorted[half - 1], sorted[last.min(half)]) })
}

impl Samples {
    pub(crate) fn add(&mut self, wire: WireKind, contender: &'static str, metric: &'static str, value: f64) {
        self.0.entry((wire.name(), contender, metric)).or_default().push(value);
    }

    pub(crate) fn sum(&self, wire: WireKind, contender: &'static str, metric: &'static str) -> f64 {
        self.0.get(&(wire.name(), contender, metric)).map_or(0.0, |samples| samples.iter().sum())
    }

    pub(crate) fn of(&self, wire: WireKind, contender: &'static str, metric: &'static str) -> Option<f64> {
        median(self.0.get(&(wire.name(), contender, metric))?)
    }

    /// Against the reference on the same wire.
    pub(crate) fn ratio(&self, wire: WireKind, contender: &'static str, metric: &'static str) -> Option<f64> {
        Some(self.of(wire, contender, metric)? / self.of(wire, REFERENCE, metric)?)
    }

    /// `wires.WIRE.NAME.METRIC = {samples, median, ratio}`; who was not measured is `"not_run"`, with the reason where it failed.
    pub(crate) fn json(&self, names: &[&'static str], why_not: &BTreeMap<&'static str, String>) -> Value {
        let of = |wire: WireKind, name: &'static str| {
            let metric = |(metric, _): (&'static str, bool)| {
                let samples = self.0.get(&(wire.name(), name, metric))?;
                let value = json!({
                    "samples": samples, "median": median(samples), "ratio": self.ratio(wire, name, metric),
                });
                Some((metric.to_owned(), value))
            };
            let metrics: Map<_, _> = METRICS.into_iter().filter_map(metric).collect();
            match (metrics.is_empty(), why_not.get(name)) {
                (false, _) => Value::Object(metrics),
                (true, Some(why)) => json!({ "failed": why }),
                (true, None) => json!("not_run"),
            }
        };
        let wires = WireKind::ALL.map(|wire| {
            let all: Map<_, _> = names.iter().map(|name| ((*name).to_owned(), of(wire, name))).collect();
            (wire.name().to_owned(), Value::Object(all))
        });
        Value::Object(wires.into_iter().collect())
    }

    /// For people: medians, and ratios to the reference in brackets.
    pub(crate) fn table(&self, names: &[&'static str]) -> String {
        let mut out = String::new();
        for wire in WireKind::ALL {
            let _ = write!(out, "\n{:<15}", wire.name());
            METRICS.iter().for_each(|(metric, _)| _ = write!(out, "{metric:>20}"));
            for name in names.iter().filter(|name| self.of(wire, name, "tcp1_gbps").is_some()) {
                let _ = write!(out, "\n{name:<15}");
                for (metric, _) in METRICS {
                    let cell = match (self.of(wire, name, metric), self.ratio(wire, name, metric)) {
                        (Some(value), Some(ratio)) => format!("{value:.2} ({ratio:.2})"),
                        (Some(value), None) => format!("{value:.2}"),
                        _ => "-".to_owned(),
                    };
                    let _ = write!(out, "{cell:>20}");
                }
            }
            out.push('\n');
        }
        out
    }

    /// Bars: ratios to the reference of one TCP stream, on each wire.
    pub(crate) fn svg(&self, names: &[&'static str]) -> String {
        let (row, left, width) = (18, 130, 420.0);
        let mut rows = String::new();
        let mut y = 10;
        for wire in WireKind::ALL {
            y += row;
            let _ = write!(
                rows,
                "<text x=\"10\" y=\"{y}\" font-weight=\"bold\">{}: one TCP stream, × kernel VXLAN</text>",
                wire.name()
            );
            for name in names {
                let Some(ratio) = self.ratio(wire, name, "tcp1_gbps") else { continue };
                y += row;
                let (bar, text) = ((ratio / 2.0).min(1.0) * width, y - 4);
                let colour = if name.starts_with("violin") { "#6a3d9a" } else { "#a6a6a6" };
                let _ = write!(
                    rows,
                    "<text x=\"10\" y=\"{text}\">{name}</text><rect x=\"{left}\" y=\"{}\" width=\"{bar:.1}\" height=\"12\" \
                     fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{text}\">{ratio:.2}</text>",
                    y - 14,
                    f64::from(left) + bar + 5.0
                );
            }
            y += row / 2;
        }
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"640\" height=\"{}\" font-family=\"sans-serif\" font-size=\"12\">\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>{rows}</svg>\n",
            y + 20
        )
    }
}

/// One bar that the project holds itself to.
#[derive(Debug)]
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) got: Option<f64>,
    pub(crate) want: f64,
    pub(crate) aim: f64,
    /// Whether more is better.
    pub(crate) more: bool,
}

impl Bar {
    pub(crate) fn holds(&self) -> Option<bool> {
        self.got.map(|got| if self.more { got >= self.want } else { got <= self.want })
    }

    pub(crate) fn json(&self) -> Value {
        json!({ "bar": self.name, "got": self.got, "want": self.want, "aim": self.aim, "holds": self.holds() })
    }

    pub(crate) fn line(&self) -> String {
        let verdict = match self.holds() {
            Some(true) => "holds",
            Some(false) => "MISSED",
            None => "not measured",
        };
        let (sign, got) = (if self.more { "≥" } else { "≤" }, self.got.map_or_else(|| "-".to_owned(), |got| format!("{got:.2}")));
        format!("{:<40} {got:>8} {sign} {:<6} (aim {:<5}) {verdict}", self.name, self.want, self.aim)
    }
}
