//! Times for people and programs elsewhere: the daemons' figures are of clocks that mean something on one machine only. What they
//! come to is told as UTC and as durations; the raw figures are left out.

use anyhow::Result;
use serde::Serialize;
use serde_json::{Map, Value};

/// The same as JSON, without times of any host's monotonic clock.
pub(crate) fn without_raw<T: Serialize>(value: &T) -> Result<Value> {
    let mut value = serde_json::to_value(value)?;
    walk(&mut value);
    Ok(value)
}

fn walk(value: &mut Value) {
    match value {
        Value::Array(all) => all.iter_mut().for_each(walk),
        Value::Object(fields) => {
            if fields.contains_key("announced-at") {
                migration(fields);
            } else if fields.contains_key("decided-at") {
                fields.remove("at");
            }
            // Of a port's traffic: a time of its host's clock.
            fields.remove("last-out");
            fields.values_mut().for_each(walk);
        }
        _ => {}
    }
}

/// A move: its own times stand beside as UTC, those of its two ends become durations on the clock that saw them.
fn migration(fields: &mut Map<String, Value>) {
    for raw in ["announced", "began", "ended"] {
        fields.remove(raw);
    }
    for (end, first) in [("source", "began"), ("destination", "resumed")] {
        let Some(Value::Object(figures)) = fields.get_mut(end) else { continue };
        let base = figures.remove(first).as_ref().and_then(Value::as_u64);
        for raw in ["granted", "stopped", "last-delivered", "done", "first-read"] {
            if let Some(at) = figures.remove(raw) {
                figures.insert(format!("{raw}-after-ms"), after(base, &at));
            }
        }
        if let Some(Value::Array(entered)) = figures.get_mut("fabric").and_then(|fabric| fabric.get_mut("entered")) {
            let first = entered.first().and_then(|state| state.get(1)).and_then(Value::as_u64);
            for at in entered.iter_mut().filter_map(|state| state.get_mut(1)) {
                *at = after(first, at);
            }
        }
    }
}

/// Milliseconds from `base` to `at`, both in nanoseconds of one clock.
#[allow(clippy::cast_precision_loss)] // Spans of moves: far below 2^52 ns.
fn after(base: Option<u64>, at: &Value) -> Value {
    let span = base.zip(at.as_u64()).map(|(base, at)| (i128::from(at) - i128::from(base)) as f64 / 1e6);
    span.map_or(Value::Null, Value::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_move_tells_durations_and_no_clock_of_any_host() {
        let told = json!([{ "ended": {
            "vm": "a-c1", "announced": 5, "began": 7_000_000, "ended": 9_000_000,
            "announced-at": null, "ended-at": "2026-11-27T02:13:50.120Z", "total-ms": 2.0,
            "source": { "began": 1_000_000_000, "granted": 1_001_000_000, "stopped": null,
                        "fabric": { "entered": [["owned", 1_002_000_000], ["granted", 1_003_000_000]] } },
            "destination": { "resumed": 70_000_000, "first-read": 71_500_000, "fabric": { "entered": [["prepared", 69_000_000]] } },
        } }]);

        let shown = without_raw(&told).unwrap();

        let wanted = json!([{ "ended": {
            "vm": "a-c1", "announced-at": null, "ended-at": "2026-11-27T02:13:50.120Z", "total-ms": 2.0,
            "source": { "granted-after-ms": 1.0, "stopped-after-ms": null, "fabric": { "entered": [["owned", 0.0], ["granted", 1.0]] } },
            "destination": { "first-read-after-ms": 1.5, "fabric": { "entered": [["prepared", 0.0]] } },
        } }]);
        assert_eq!(shown, wanted);
    }

    #[test]
    fn a_decision_and_a_port_lose_their_raw_times_and_nothing_else() {
        let told = json!([{ "number": 1, "at": 5, "decided-at": "2026-11-27T02:13:50.120Z" }, { "at": "h1", "traffic": { "last-out": 5 } }]);

        let shown = without_raw(&told).unwrap();

        assert_eq!(shown, json!([{ "number": 1, "decided-at": "2026-11-27T02:13:50.120Z" }, { "at": "h1", "traffic": {} }]));
    }
}
