//! Laws of the policy on generated clusters: it never makes balance worse, every state on the way is legal, equal inputs
//! give equal decisions, and constant demand comes to rest.

use adaptd::check::check;
use adaptd::cycle::{Settling, cycle};
use adaptd::model::{Doing, Environment, Host, Snapshot, Standing, Vm};
use adaptd::plan::{Plan, Stamp};
use adaptd::policy::violin;
use adaptd::score::score;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::time::Duration;
use violin_common::Instant;
use violin_common::config::adapt::Policy;
use violin_common::control::monitor::{MigrationMode, Role};

const STAMP: Stamp = Stamp { generation: 1, number: 1, first_migration: 1, parallel: 1, mode: MigrationMode::PreCopy };

fn doing() -> impl Strategy<Value = Doing> {
    prop_oneof![12 => Just(Doing::Running), 1 => Just(Doing::Booting), 1 => Just(Doing::Halted)]
}

fn vm(hosts: usize) -> impl Strategy<Value = (usize, u32, u64, Option<f64>, Doing)> {
    let demand = prop_oneof![1 => Just(None), 6 => (0.0..1.0f64).prop_map(Some), 6 => (0.76..1.0f64).prop_map(Some)];
    (0..hosts, 1..3u32, prop_oneof![Just(256u64), Just(512)], demand, doing())
}

prop_compose! {
    fn cluster()(drains in prop_oneof![2 => Just(false), 1 => Just(true)], hosts in prop::collection::vec((0..3u8, 1..9u32, 1..9u64, 0..12u8), 1..8))
        (vms in prop::collection::vec(vm(hosts.len()), 0..30), hosts in Just(hosts), drains in Just(drains)) -> Snapshot {
        let mut snapshot = Snapshot::default();
        let name = |index: usize| format!("h{index}").parse().unwrap();
        for (index, (domain, cores, memory, standing)) in hosts.into_iter().enumerate() {
            let standing = if standing == 0 { Standing::Away } else { Standing::Live };
            let host = Host {
                domain: format!("d{domain}").parse().unwrap(),
                cores: cores.into(),
                memory_mib: memory * 1024,
                driver: "sandbox".into(),
                standing,
                draining: drains && index % 3 == 1,
            };
            snapshot.hosts.insert(name(index), host);
        }
        for (index, (at, vcpus, memory_mib, demand, doing)) in vms.into_iter().enumerate() {
            // Five VMs an environment; the first is its head and where it lies is home.
            let environment: violin_common::EnvironmentId = format!("e{}", index / 5).parse().unwrap();
            let role = if index % 5 == 0 { Role::Head } else { Role::Compute };
            let host: violin_common::HostId = name(at);
            if role == Role::Head {
                let home = snapshot.hosts[&host].domain.clone();
                snapshot.environments.insert(environment.clone(), Environment { home, rested: None, failed: BTreeMap::new() });
            }
            let vm = Vm { environment: environment.clone(), role, vcpus, memory_mib, host, demand, rising: false, high_for: None, doing, rested: None, failed: BTreeMap::new() };
            snapshot.vms.insert(format!("{environment}-n{index}").parse().unwrap(), vm);
        }
        snapshot
    }
}

fn decide(snapshot: &Snapshot) -> Option<Plan> {
    let policy = Policy { settle: 1, ..Policy::default() };
    let cycle = cycle(Instant(0), snapshot, &policy, &mut Settling::default(), STAMP);
    cycle.decision.map(|decision| decision.plan)
}

/// Whether what is decided is to empty a host.
fn empties(snapshot: &Snapshot) -> bool {
    violin::think(snapshot, &Policy::default()).drains
}

fn apply(snapshot: &Snapshot, plan: &Plan) -> Snapshot {
    plan.moves.iter().fold(snapshot.clone(), |moved, next| moved.with_move(&next.vm, &next.to))
}

/// Memory in use by host, counted here anew.
fn memory(snapshot: &Snapshot) -> impl Iterator<Item = (u64, u64, &violin_common::HostId)> {
    snapshot.hosts.iter().map(|(name, host)| {
        let used = snapshot.vms.values().filter(|vm| vm.host == *name).map(|vm| vm.memory_mib).sum();
        (used, host.memory_mib, name)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_plan_raises_the_spread(snapshot in cluster()) {
        let policy = Policy::default();
        // To empty a host is worth more than balance.
        if let Some(plan) = decide(&snapshot).filter(|plan| !snapshot.hosts[&plan.moves[0].from].draining && !empties(&snapshot)) {
            let (before, after) = (score(&snapshot, &policy).spread, score(&apply(&snapshot, &plan), &policy).spread);
            prop_assert!(after <= before - policy.min_gain + 1e-3, "{before} → {after}\n{snapshot}{plan:?}");
        }
    }

    #[test]
    fn every_prefix_of_a_plan_is_legal(snapshot in cluster()) {
        let Some(plan) = decide(&snapshot) else { return Ok(()) };

        prop_assert_eq!(check(&snapshot, &Policy::default(), &plan), Ok(()));

        let mut now = snapshot.clone();
        for moved in &plan.moves {
            let vm = &snapshot.vms[&moved.vm];
            prop_assert_eq!(&vm.doing, &Doing::Running);
            prop_assert!(snapshot.hosts[&moved.from].standing == Standing::Live && snapshot.hosts[&moved.to].standing == Standing::Live);
            let head_leaves = vm.role == Role::Head && snapshot.hosts[&moved.to].domain != snapshot.environments[&vm.environment].home;
            prop_assert!(!head_leaves);
            now = now.with_move(&moved.vm, &moved.to);
            for (used, has, host) in memory(&now) {
                prop_assert!(used <= has || *host != moved.to, "{host} holds {used} of {has} MiB");
            }
        }
    }

    #[test]
    fn nothing_goes_to_a_draining_host_and_each_move_empties_it_further(snapshot in cluster()) {
        let on = |snapshot: &Snapshot| snapshot.vms.values().filter(|vm| snapshot.hosts[&vm.host].draining).count();
        if let Some(plan) = decide(&snapshot) {
            prop_assert!(plan.moves.iter().all(|moved| !snapshot.hosts[&moved.to].draining), "{snapshot}{plan:?}");
            prop_assert!(on(&apply(&snapshot, &plan)) <= on(&snapshot));
            if empties(&snapshot) {
                prop_assert!(on(&apply(&snapshot, &plan)) < on(&snapshot), "{snapshot}{plan:?}");
            }
        }
    }

    #[test]
    fn equal_snapshots_give_equal_decisions(snapshot in cluster()) {
        let again: Snapshot = snapshot.clone();

        prop_assert_eq!(decide(&snapshot), decide(&again));
    }

    #[test]
    fn constant_demand_comes_to_rest(snapshot in cluster()) {
        // Each plan lowers the spread by the least gain, so there can be no more of them than the spread has gains.
        // Before that come those that empty a host, at most one for each VM there; after them the spread may be any.
        let drained = snapshot.vms.values().filter(|vm| snapshot.hosts[&vm.host].draining).count();
        let spread = if drained == 0 { score(&snapshot, &Policy::default()).spread } else { 30.0 };
        #[allow(clippy::cast_precision_loss)]
        let most = (spread / Policy::default().min_gain).ceil() + drained as f64;
        let mut now = snapshot;
        let mut plans = 0.0;
        while let Some(plan) = decide(&now) {
            now = apply(&now, &plan);
            plans += 1.0;
            prop_assert!(plans <= most, "{plans} plans and no rest:\n{now}");
        }
    }

    #[test]
    fn a_rested_policy_decides_nothing_new_after_more_cycles(snapshot in cluster()) {
        let policy = Policy::default();
        let mut settling = Settling::default();
        let mut decisions = Vec::new();
        for second in 0..8 {
            let now = Instant(0) + Duration::from_secs(second);
            decisions.push(cycle(now, &snapshot, &policy, &mut settling, STAMP).decision);
        }

        let first = decisions.iter().flatten().next();
        prop_assert!(decisions.iter().flatten().all(|decision| Some(decision) == first));
    }
}

#[test]
fn the_laws_are_not_empty() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let plans: Vec<_> = (0..400)
        .filter_map(|_| decide(&cluster().new_tree(&mut runner).unwrap().current()))
        .map(|plan| plan.moves.len())
        .collect();

    assert!(plans.len() > 40, "only {} of 400 clusters led to a plan", plans.len());
    assert!(plans.iter().any(|count| *count > 1), "no cluster led to a gang");
}
