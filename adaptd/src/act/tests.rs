//! Moves whose ends do not say what happened, until patience runs out.

use super::*;
use crate::plan::Origin;
use crate::records::{Keys, Record, State, StoredEnvironment};
use std::cell::Cell;
use std::collections::VecDeque;
use violin_common::config::environment::EnvironmentSpec;
use violin_common::control::monitor::{SourceFigures, VmSeen, VmState};

type Heard = Result<Answer, AskError>;

fn away() -> Heard {
    Err(AskError::Lost("away".into()))
}

fn lists(state: Option<VmState>) -> Heard {
    let vms = state.map(|state| VmSeen { vm: "alpha-c1".parse().unwrap(), state, leaving: false });
    Ok(Answer::Vms(vms.into_iter().collect()))
}

fn migrated() -> Heard {
    Ok(Answer::Migrated(SourceFigures::default()))
}

/// `alpha` up on h1.
fn up() -> State {
    let spec = EnvironmentSpec::parse(include_str!("../../../configs/environments/alpha.toml")).unwrap();
    let placement = spec.nodes().unwrap().into_iter().map(|node| (node.vm, "h1".parse().unwrap())).collect();
    let keys = Keys { public: "ssh-ed25519 AAAA violin-alpha".into(), private: "secret".into() };
    let stored = StoredEnvironment { spec, home: "d1".parse().unwrap(), image: None, placement, keys };
    let mut state = State::default();
    state.apply(&Record::V1(RecordV1::EnvironmentBegins(Box::new(stored))));
    state.apply(&Record::V1(RecordV1::EnvironmentReady("alpha".parse().unwrap())));
    state
}

fn announced() -> Migration {
    Migration {
        number: 1,
        vm: "alpha-c1".parse().unwrap(),
        from: "h1".parse().unwrap(),
        to: "h2".parse().unwrap(),
        from_domain: "d1".parse().unwrap(),
        to_domain: "d1".parse().unwrap(),
        gang: None,
        decision: None,
        reason: "because".into(),
        terms: Vec::new(),
        driver: "table".into(),
        announced: Instant(0),
        began: None,
        ended: None,
        outcome: Outcome::Running,
        demand_before: 0.0,
        source: None,
        destination: None,
    }
}

/// Moves `alpha-c1` from h1 to h2. From the answer to `Migrate` on, the source answers every question with `source`, the
/// destination with `destination`. Returns what the journal says at the end, and how long that took.
fn moved(migrate: fn() -> Heard, source: fn() -> Heard, destination: fn() -> Heard) -> (State, Duration) {
    let wanted = Move { vm: "alpha-c1".parse().unwrap(), from: "h1".parse().unwrap(), to: "h2".parse().unwrap() };
    let moves = vec![planned(&wanted, 1, MigrationMode::PreCopy)];
    let plan = Plan { generation: 1, number: 1, origin: Origin::Operator, gang: None, parallel: 1, moves };
    let under_way = Cell::new(false);
    let answer = |at: &str, ask: &Ask| match (at, ask) {
        ("h1", Ask::Migrate { .. }) => {
            under_way.set(true);
            migrate()
        }
        ("h1", _) if under_way.get() => source(),
        ("h2", _) if under_way.get() => destination(),
        ("h1", Ask::Look) => lists(Some(VmState::Running)),
        ("h2", Ask::Look) => lists(None),
        ("h2", Ask::Prepare) => Ok(Answer::Prepared { uri: "table".into() }),
        other => panic!("{other:?} was asked before the VM moved"),
    };
    let (mut state, mut now) = (up(), Instant(0));
    let (mut execution, first) = Execution::begin(now, plan, vec![announced()], Duration::ZERO);
    let mut effects = VecDeque::from(first);
    while !execution.has_ended() {
        effects.extend(execution.tick(now));
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Record(record) => state.apply(&Record::V1(*record)),
                Effect::Ask { migration, at, ask, .. } => {
                    effects.extend(execution.answered(now, migration, &at, &ask, answer(at.as_str(), &ask)));
                }
                Effect::Tell(_) => {}
            }
        }
        now = now + LOOK_AGAIN;
        assert!(now.since(Instant(0)) < PATIENCE * 3, "the move does not end");
    }
    (state, now.since(Instant(0)))
}

/// Hosts that are asked to stop the VM when its environment is ended now.
fn stopped_on(mut state: State) -> Vec<String> {
    state.apply(&Record::V1(RecordV1::EnvironmentEnds("alpha".parse().unwrap())));
    state.to_stop[&"alpha-c1".parse().unwrap()].iter().map(ToString::to_string).collect()
}

fn host(state: &State) -> &str {
    state.vms[&"alpha-c1".parse().unwrap()].host.as_str()
}

#[test]
fn a_vm_whose_source_said_that_it_has_gone_is_recorded_at_a_destination_that_cannot_be_asked() {
    let not_there: fn() -> Heard = || lists(None);
    for source in [not_there, away] {
        let (state, took) = moved(migrated, source, away);

        assert!(took >= PATIENCE);
        assert_eq!((&state.migrations[&1].outcome, host(&state)), (&Outcome::Done, "h2"));
        assert_eq!(stopped_on(state), ["h2"]);
    }
}

#[test]
fn a_vm_that_its_source_does_not_have_is_recorded_at_a_destination_that_cannot_be_asked() {
    let (state, took) = moved(away, || lists(None), away);

    assert!(took >= PATIENCE);
    assert_eq!((&state.migrations[&1].outcome, host(&state)), (&Outcome::Done, "h2"));
    assert_eq!(stopped_on(state), ["h2"]);
}

#[test]
fn a_vm_that_may_run_at_either_end_is_stopped_at_both() {
    let (state, took) = moved(away, away, away);

    assert!(took >= PATIENCE);
    assert!(matches!(&state.migrations[&1].outcome, Outcome::Undone(why) if why.contains("unknown at h1, unknown at h2")));
    assert_eq!(host(&state), "h1");
    assert_eq!(stopped_on(state.clone()), ["h1", "h2"]);
    let mut found = state;
    found.apply(&Record::V1(RecordV1::VmFound { vm: "alpha-c1".parse().unwrap(), host: "h2".parse().unwrap() }));
    assert_eq!(stopped_on(found), ["h2"]);
}

#[test]
fn a_vm_that_its_source_runs_is_in_no_doubt() {
    let (state, took) = moved(|| Err(AskError::Refused("no".into())), || lists(Some(VmState::Running)), away);

    assert!(took < PATIENCE);
    assert_eq!(host(&state), "h1");
    assert_eq!(stopped_on(state), ["h1"]);
}

#[test]
fn a_vm_that_neither_end_has_is_no_longer_looked_for_at_the_destination() {
    let (state, _) = moved(migrated, || lists(None), || lists(None));

    assert!(matches!(&state.migrations[&1].outcome, Outcome::Undone(why) if why.contains("not there at h1, not there at h2")));
    assert_eq!(stopped_on(state), ["h1"]);
}
