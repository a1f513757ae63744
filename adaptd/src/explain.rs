//! Why a VM is where it is, in words, from the journal's state alone.

use crate::policy::Refusal;
use crate::records::State;
use std::fmt::Write as _;
use std::time::Duration;
use violin_common::api::adapt::{Migration, Outcome};
use violin_common::{Instant, Utc, VmId};

/// Whether it is known at present how a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sight {
    /// Its host tells.
    Known,
    /// Not, since this long; none: not since the manager started.
    Lost(Option<Duration>),
}

/// Why `vm` is where it is. Errors: there is no such VM.
pub fn why(state: &State, vm: &VmId, sight: Sight, refusals: &[Refusal], now: Instant) -> Result<String, String> {
    let Some(known) = state.vms.get(vm) else {
        let all = state.vms.keys().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        return Err(format!("got VM {vm}, want one of: {}", if all.is_empty() { "(there is none)" } else { &all }));
    };
    let host = &known.host;
    let nothing = format!("nothing is known of it now, {host} does not tell");
    let mut text = match sight {
        Sight::Known => format!("{vm} is on {host}.\n"),
        Sight::Lost(Some(age)) => format!("{vm} was on {host} {} s ago; {nothing}.\n", age.as_secs()),
        Sight::Lost(None) => format!("{vm} is recorded on {host}; {nothing}.\n"),
    };
    let moves: Vec<&Migration> = state.migrations.values().filter(|migration| migration.vm == *vm).collect();
    let environment = state.environments.get(&known.environment);
    if let Some(first) = environment.and_then(|environment| environment.stored.placement.get(vm)) {
        let _ = writeln!(text, "It was started on {first} when {} came up.", known.environment);
    }
    if moves.is_empty() {
        text.push_str("It was never moved.\n");
    }
    for migration in moves.iter().rev().take(5).rev() {
        tell(&mut text, state, migration, now);
    }
    let name = vm.as_str();
    let last = state.decisions.iter().rev().filter(|decision| decision.refusals.iter().any(|words| mentions(words, name)));
    for decision in last.take(1) {
        let at = state.told_decision(decision).decided_at;
        let _ = writeln!(text, "Decision {} ({}) refused:", decision.number, when(state, now, at));
        for words in decision.refusals.iter().filter(|words| mentions(words, name)).take(5) {
            let _ = writeln!(text, "  {words}");
        }
    }
    let current: Vec<_> = refusals.iter().map(ToString::to_string).filter(|words| mentions(words, name)).collect();
    if !current.is_empty() {
        text.push_str("The last cycle refused:\n");
        for words in current.iter().take(5) {
            let _ = writeln!(text, "  {words}");
        }
    }
    Ok(text)
}

fn tell(text: &mut String, state: &State, migration: &Migration, now: Instant) {
    let told = state.told(migration);
    let gang = migration.gang.as_ref().map_or_else(String::new, |gang| format!(" with the compute nodes of {gang}"));
    let by = migration.decision.map_or_else(|| "an operator".into(), |number| format!("decision {number}"));
    let how = match &migration.outcome {
        Outcome::Running => "is under way".into(),
        Outcome::Done => "done".into(),
        Outcome::Undone(why) => format!("undone: {why}"),
    };
    let _ = writeln!(
        text,
        "Move {} ({}), {} to {}{gang}, wanted by {by}, {how}.\n  Why: {}.",
        migration.number,
        when(state, now, told.ended_at.or(told.announced_at)),
        migration.from,
        migration.to,
        migration.reason,
    );
    for term in &migration.terms {
        let _ = writeln!(text, "  {}: {:.3} → {:.3} {}", term.name, term.before, term.after, term.unit);
    }
}

/// When something was, and how long ago that is.
fn when(state: &State, now: Instant, then: Option<Utc>) -> String {
    let Some(then) = then else { return "recorded by an earlier version, which did not say when".into() };
    let ago = state.times.utc(now).map(|now| Duration::from_nanos(now.0.saturating_sub(then.0)).as_secs());
    match ago.unwrap_or(0) {
        0 => format!("{then}, just now"),
        ago => format!("{then}, {:?} ago", Duration::from_secs(ago)),
    }
}

/// Whether a text names a VM, and not one whose name merely begins alike.
fn mentions(text: &str, name: &str) -> bool {
    let part = |c: char| !(c.is_ascii_alphanumeric() || c == '-');
    text.split(part).any(|word| word == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_not_found_inside_a_longer_one() {
        assert!(mentions("alpha-c1 from h1 to h2: no", "alpha-c1"));
        assert!(!mentions("alpha-c11 from h1", "alpha-c1"));
    }
}
