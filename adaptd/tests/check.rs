//! The second opinion: what a policy must never propose is refused though it did. And the shipped files.

use adaptd::check::check;
use adaptd::model::Snapshot;
use adaptd::plan::{Origin, Plan, planned};
use adaptd::policy::Move;
use violin_common::config::adapt::{AdaptConfig, Policy};
use violin_common::config::environment::EnvironmentSpec;
use violin_common::control::monitor::MigrationMode;

const CLUSTER: &str = "
host h1 d1 cores 3
host h2 d1 cores 3 memory 600
host h3 d2 cores 4
host h4 d2 cores 4 away
host h5 d1 cores 3 driver libvirt
env alpha home d1
vm alpha-head head h1
vm alpha-c1 compute h1 demand 0.95
vm alpha-c2 compute h1 demand 0.95
vm alpha-c3 compute h2 demand 0.95
vm alpha-c4 compute h2 demand 0.95 booting
";

fn verdict(moves: &[(&str, &str, &str)], origin: Origin, gang: bool) -> Result<(), String> {
    let snapshot: Snapshot = CLUSTER.parse().unwrap();
    let moves = moves.iter().zip(1..).map(|((vm, from, to), number)| {
        let moved = Move { vm: vm.parse().unwrap(), from: from.parse().unwrap(), to: to.parse().unwrap() };
        planned(&moved, number, MigrationMode::PreCopy)
    });
    let gang = gang.then(|| "alpha".parse().unwrap());
    let plan = Plan { generation: 1, number: 1, origin, gang, parallel: 1, moves: moves.collect() };
    check(&snapshot, &Policy::default(), &plan).map_err(|violation| violation.to_string())
}

#[test]
fn a_legal_move_passes() {
    assert_eq!(verdict(&[("alpha-c1", "h1", "h3")], Origin::Policy, false), Ok(()));
}

#[test]
fn what_is_illegal_is_refused_by_name() {
    for (moves, wanted) in [
        (vec![("alpha-c9", "h1", "h3")], "no such VM"),
        (vec![("alpha-c1", "h2", "h3")], "not on h2"),
        (vec![("alpha-c1", "h1", "h1")], "on h1 already"),
        (vec![("alpha-c1", "h1", "h4")], "h4 is away, want a host whose monitor tells of it"),
        (vec![("alpha-c1", "h1", "h9")], "no host h9"),
        (vec![("alpha-c1", "h1", "h5")], "runs libvirt"),
        (vec![("alpha-head", "h1", "h3")], "home domain"),
        (vec![("alpha-c4", "h2", "h3")], "does not run"),
        (vec![("alpha-c1", "h1", "h2")], "768 MiB of 600 MiB"),
        (vec![("alpha-c1", "h1", "h3"), ("alpha-c1", "h1", "h3")], "moved twice"),
    ] {
        let words = verdict(&moves, Origin::Operator, false).unwrap_err();
        assert!(words.contains(wanted), "{moves:?}: {words}");
    }
}

#[test]
fn a_gang_that_leaves_a_node_behind_is_refused() {
    let words = verdict(&[("alpha-c1", "h1", "h3"), ("alpha-c2", "h1", "h3")], Origin::Policy, true).unwrap_err();

    assert!(words.contains("leaves it behind"), "{words}");
}

#[test]
fn cores_bind_the_policy_and_not_an_operator() {
    let small = CLUSTER.replace("host h3 d2 cores 4", "host h3 d2 cores 0.5");
    let snapshot: Snapshot = small.parse().unwrap();
    let moved = Move { vm: "alpha-c1".parse().unwrap(), from: "h1".parse().unwrap(), to: "h3".parse().unwrap() };
    let plan = |origin| Plan {
        generation: 1,
        number: 1,
        origin,
        gang: None,
        parallel: 1,
        moves: vec![planned(&moved, 1, MigrationMode::PreCopy)],
    };

    assert!(check(&snapshot, &Policy::default(), &plan(Origin::Policy)).is_err());
    assert_eq!(check(&snapshot, &Policy::default(), &plan(Origin::Operator)), Ok(()));
}

#[test]
fn a_plan_with_steps_left_out_is_refused() {
    let snapshot: Snapshot = CLUSTER.parse().unwrap();
    let moved = Move { vm: "alpha-c1".parse().unwrap(), from: "h1".parse().unwrap(), to: "h3".parse().unwrap() };
    let mut short = planned(&moved, 1, MigrationMode::PreCopy);
    short.steps.pop();
    let plan = Plan { generation: 1, number: 1, origin: Origin::Policy, gang: None, parallel: 1, moves: vec![short] };

    assert!(check(&snapshot, &Policy::default(), &plan).unwrap_err().to_string().contains("steps"));
}

const EXAMPLE: &str = include_str!("../../configs/adaptd.example.toml");

#[test]
fn the_example_shows_every_default() {
    let set: String = EXAMPLE
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest) if rest.split_once(" = ").is_some_and(|(key, _)| !key.contains(' ')) => format!("{rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect();

    assert_eq!(AdaptConfig::parse(&set).unwrap(), AdaptConfig::parse(EXAMPLE).unwrap());
    let AdaptConfig { policy, .. } = AdaptConfig::parse(EXAMPLE).unwrap();
    assert_eq!(policy, Policy::default());
    // Every key of the policy is there.
    let keys = toml::to_string(&Policy::default()).unwrap();
    for key in keys.lines().filter_map(|line| line.split_once(" = ").map(|(key, _)| key)) {
        assert!(set.lines().any(|line| line.starts_with(&format!("{key} = "))), "{key} is not in the example");
    }
}

#[test]
fn a_wrong_configuration_is_refused_by_key() {
    for (from, to, wanted) in [
        ("[policy]", "[policy]\nhigh_demand = 0.5", "high_demand"),
        ("[policy]", "[policy]\nhigh-demand = 7.5", "policy.high-demand"),
        ("[policy]", "[policy]\nsettle = 0", "policy.settle"),
        ("[policy]", "[policy]\nhalf-life = 5", "half-life"),
        ("[tls]", "parallel = 9\n[tls]", "parallel"),
        ("[tls]", "period = \"1ms\"\n[tls]", "period"),
    ] {
        let words = AdaptConfig::parse(&EXAMPLE.replace(from, to)).unwrap_err().to_string();
        assert!(words.contains(wanted), "{words}");
    }
}

#[test]
fn both_shipped_environments_use_the_same_addresses_in_different_networks() {
    let alpha = EnvironmentSpec::parse(include_str!("../../configs/environments/alpha.toml")).unwrap();
    let beta = EnvironmentSpec::parse(include_str!("../../configs/environments/beta.toml")).unwrap();
    let places = |spec: &EnvironmentSpec| spec.nodes().unwrap().iter().map(|node| (node.mac, node.address)).collect::<Vec<_>>();

    assert_eq!(places(&alpha), places(&beta));
    assert_eq!(places(&alpha).len(), 5);
    assert_ne!(alpha.network.vni, beta.network.vni);
}
