//! The policy's story on readable clusters: a calm one rests, a crowded host sheds one VM, a full domain a whole environment.

use adaptd::cycle::{Cycle, Settling, cycle};
use adaptd::model::Snapshot;
use adaptd::plan::Stamp;
use std::time::Duration;
use violin_common::Instant;
use violin_common::config::adapt::Policy;
use violin_common::control::monitor::MigrationMode;

const HOSTS: &str = "
host h1 d1 cores 3
host h2 d1 cores 3
host h3 d2 cores 4
env alpha home d1
env beta home d1
vm alpha-head head h1
vm beta-head head h2
";

/// Two alpha ranks busy on each host of d1; beta idles on h1.
const CALM: &str = "
vm alpha-c1 compute h1 demand 0.97
vm alpha-c2 compute h1 demand 0.96
vm alpha-c3 compute h2 demand 0.95
vm alpha-c4 compute h2 demand 0.97
";

const STAMP: Stamp = Stamp { generation: 1, number: 1, first_migration: 1, parallel: 1, mode: MigrationMode::PreCopy };

/// Thinks as often as a picture needs to settle.
fn settled(text: &str) -> Cycle {
    let snapshot: Snapshot = text.parse().unwrap();
    let policy = Policy::default();
    let mut settling = Settling::default();
    let mut last = None;
    for second in 0..policy.settle {
        let now = Instant(0) + Duration::from_secs(second.into());
        last = Some(cycle(now, &snapshot, &policy, &mut settling, STAMP));
    }
    last.unwrap()
}

fn moves(cycle: &Cycle) -> Vec<String> {
    let Some(decision) = &cycle.decision else { return Vec::new() };
    decision.proposal.moves.iter().map(|moved| format!("{} {} {}", moved.vm, moved.from, moved.to)).collect()
}

#[test]
fn a_calm_cluster_yields_no_move() {
    let text = format!(
        "{HOSTS}{CALM}
        vm beta-c1 compute h1
        vm beta-c2 compute h1
        vm beta-c3 compute h1
        vm beta-c4 compute h1"
    );

    assert_eq!(moves(&settled(&text)), Vec::<String>::new());
}

#[test]
fn two_busy_vms_too_many_yield_one_move_inside_the_domain() {
    let text = format!(
        "{HOSTS}{CALM}
        vm beta-c1 compute h1 demand 0.99
        vm beta-c2 compute h1 demand 0.99
        vm beta-c3 compute h1 demand 0.15   # carries traffic
        vm beta-c4 compute h1 demand 0.15"
    );

    assert_eq!(moves(&settled(&text)), ["beta-c1 h1 h2"]);
}

#[test]
fn of_equals_the_vm_that_came_to_high_demand_last_moves() {
    let text = format!(
        "{HOSTS}
        vm alpha-c1 compute h1 demand 1.0 high-for 90
        vm alpha-c2 compute h1 demand 1.0 high-for 90
        vm alpha-c3 compute h2 demand 1.0 high-for 90
        vm alpha-c4 compute h2 demand 1.0 high-for 90
        vm beta-c1 compute h1 demand 0.8 high-for 8
        vm beta-c2 compute h1 demand 0.8 high-for 5"
    );

    assert_eq!(moves(&settled(&text)), ["beta-c1 h1 h2"]);
}

#[test]
fn after_that_move_the_cluster_rests() {
    let text = format!(
        "{HOSTS}{CALM}
        vm beta-c1 compute h2 demand 0.99 rested 100
        vm beta-c2 compute h1 demand 0.99
        vm beta-c3 compute h1 demand 0.15
        vm beta-c4 compute h1 demand 0.15"
    );

    assert_eq!(moves(&settled(&text)), Vec::<String>::new());
}

#[test]
fn two_more_in_a_full_domain_send_the_environment_away_as_a_gang() {
    let text = format!(
        "{HOSTS}{CALM}
        vm beta-c1 compute h2 demand 0.99 rested 5
        vm beta-c2 compute h1 demand 0.99
        vm beta-c3 compute h1 demand 0.99
        vm beta-c4 compute h1 demand 0.99"
    );

    let cycle = settled(&text);

    assert_eq!(moves(&cycle), ["beta-c1 h2 h3", "beta-c2 h1 h3", "beta-c3 h1 h3", "beta-c4 h1 h3"]);
    assert_eq!(cycle.decision.unwrap().plan.gang, Some("beta".parse().unwrap()));
}

#[test]
fn after_the_gang_the_cluster_rests() {
    let text = format!(
        "{HOSTS}{CALM}
        vm beta-c1 compute h3 demand 0.99
        vm beta-c2 compute h3 demand 0.99
        vm beta-c3 compute h3 demand 0.99
        vm beta-c4 compute h3 demand 0.99"
    );

    assert_eq!(moves(&settled(&text)), Vec::<String>::new());
}

#[test]
fn the_story_holds_for_ranks_that_wait_for_messages() {
    let text = format!(
        "{HOSTS}
        vm alpha-c1 compute h1 demand 0.80
        vm alpha-c2 compute h1 demand 0.81
        vm alpha-c3 compute h2 demand 0.79
        vm alpha-c4 compute h2 demand 0.83
        vm beta-c1 compute h1 demand 0.93
        vm beta-c2 compute h1 demand 0.90
        vm beta-c3 compute h1 demand 0.2
        vm beta-c4 compute h1 demand 0.2"
    );

    assert_eq!(moves(&settled(&text)), ["beta-c1 h1 h2"]);
}

#[test]
fn nothing_is_decided_while_a_vm_moves() {
    let text = format!(
        "{HOSTS}{CALM}
        vm beta-c1 compute h1 demand 0.99 moving h2
        vm beta-c2 compute h1 demand 0.99
        vm beta-c3 compute h1 demand 0.99
        vm beta-c4 compute h1 demand 0.99"
    );

    assert_eq!(moves(&settled(&text)), Vec::<String>::new());
}

#[test]
fn a_booting_vm_reserves_its_cores_at_its_host() {
    let text = format!(
        "{HOSTS}{CALM}
        vm beta-c1 compute h1 demand 0.99
        vm beta-c2 compute h1 demand 0.99
        vm beta-c3 compute h2 unknown booting"
    );

    let cycle = settled(&text);

    assert!(moves(&cycle).iter().all(|moved| !moved.ends_with("h2")), "{:?}", moves(&cycle));
}

#[test]
fn nothing_moves_from_or_to_a_host_that_is_not_observed() {
    let crowd = "
        vm beta-c1 compute h1 demand 0.99
        vm beta-c2 compute h1 demand 0.99";
    for (host, stale) in [("h1", "host h1 d1 cores 3 stale"), ("h2", "host h2 d1 cores 3 away")] {
        let hosts = HOSTS.replace(&format!("host {host} d1 cores 3"), stale);

        let cycle = settled(&format!("{hosts}{CALM}{crowd}"));

        assert!(moves(&cycle).iter().all(|moved| !moved.contains(host)), "{:?}", moves(&cycle));
        assert!(cycle.thought.refusals.iter().any(|refusal| refusal.to_string().contains(host)));
    }
}

#[test]
fn a_vm_that_just_moved_stays() {
    let text = format!(
        "{HOSTS}{CALM}
        vm beta-c1 compute h1 demand 0.99 rested 5
        vm beta-c2 compute h1 demand 0.99"
    );

    assert_eq!(moves(&settled(&text)), ["beta-c2 h1 h2"]);
}

#[test]
fn what_was_undone_again_and_again_is_tried_less_and_less_often() {
    let one = |failed: &str| {
        let text = format!(
            "{HOSTS}{CALM}
            vm beta-c1 compute h1 demand 0.99 {failed}
            vm beta-c2 compute h1 demand 0.99"
        );
        settled(&text)
    };
    // The cooldown is 60 s: after 4 times it is 480 s, after very many an hour.
    assert_eq!(moves(&one("failed h2 1 60")), ["beta-c1 h1 h2"]);
    assert_eq!(moves(&one("failed h2 4 481")), ["beta-c1 h1 h2"]);
    assert_eq!(moves(&one("failed h2 99 3600")), ["beta-c1 h1 h2"]);
    assert_eq!(moves(&one("failed h3 4 1")), ["beta-c1 h1 h2"]);
    let refused = one("failed h2 4 479");
    assert_eq!(moves(&refused), ["beta-c2 h1 h2"]);
    let words: Vec<_> = refused.thought.refusals.iter().map(ToString::to_string).collect();
    let wanted = "beta-c1 from h1 to h2 was undone 4 times in a row; it is tried again 480s after the last time";
    assert!(words.iter().any(|words| words == wanted), "{words:?}");

    let gang = |failed: &str| {
        let hosts = HOSTS.replace("env beta home d1", &format!("env beta home d1 {failed}"));
        let text = format!(
            "{hosts}{CALM}
            vm beta-c1 compute h2 demand 0.99
            vm beta-c2 compute h1 demand 0.99
            vm beta-c3 compute h1 demand 0.99
            vm beta-c4 compute h1 demand 0.99"
        );
        moves(&settled(&text)).iter().filter(|moved| moved.starts_with("beta")).count()
    };
    assert_eq!((gang("failed d2 2 119"), gang("failed d2 2 120")), (0, 4));
}

#[test]
fn an_environment_that_just_moved_as_a_gang_stays() {
    let text = format!(
        "{}{CALM}
        vm beta-c1 compute h2 demand 0.99
        vm beta-c2 compute h1 demand 0.99
        vm beta-c3 compute h1 demand 0.99
        vm beta-c4 compute h1 demand 0.99",
        HOSTS.replace("env beta home d1", "env beta home d1 rested 5")
    );

    let cycle = settled(&text);

    assert_ne!(cycle.decision.and_then(|decision| decision.plan.gang), Some("beta".parse().unwrap()));
}

#[test]
fn a_head_node_never_leaves_its_domain() {
    // The head node is the only busy VM that could relieve h1, and h2 is full.
    let text = "
        host h1 d1 cores 1
        host h2 d1 cores 1
        host h3 d2 cores 4
        env alpha home d1
        env gamma home d1
        vm alpha-head head h1 demand 0.99
        vm gamma-head head h1 demand 0.98
        vm alpha-c1 compute h2 demand 0.99";

    let cycle = settled(text);

    assert!(moves(&cycle).iter().all(|moved| !moved.contains("head")), "{:?}", moves(&cycle));
}

#[test]
fn memory_is_a_hard_limit() {
    let text = format!(
        "{}{CALM}
        vm beta-c1 compute h1 demand 0.99
        vm beta-c2 compute h1 demand 0.99",
        HOSTS.replace("host h2 d1 cores 3", "host h2 d1 cores 3 memory 800")
    );

    let cycle = settled(&text);

    assert!(moves(&cycle).iter().all(|moved| !moved.ends_with("h2")));
    assert!(cycle.thought.refusals.iter().any(|refusal| refusal.to_string().contains("MiB free")));
}

#[test]
fn a_picture_that_still_changes_yields_no_move() {
    let busy = |second: &str| -> Snapshot {
        format!("{HOSTS}{CALM} \n vm beta-c1 compute h1 demand 0.99 \n vm beta-c2 compute h1 demand 0.99 \n {second}")
            .parse()
            .unwrap()
    };
    let policy = Policy::default();
    let mut settling = Settling::default();
    let mut decide = |second: u64, snapshot: &Snapshot| {
        moves(&cycle(Instant(0) + Duration::from_secs(second), snapshot, &policy, &mut settling, STAMP))
    };

    // The third one is on its way up: wait for it, though the first two would be decided on by now.
    for second in 0..6 {
        assert!(decide(second, &busy("vm beta-c3 compute h1 demand 0.6 rising")).is_empty());
    }
    // It has come: the picture starts anew.
    assert!(decide(6, &busy("vm beta-c3 compute h1 demand 0.8")).is_empty());
    assert!(decide(7, &busy("vm beta-c3 compute h1 demand 0.8")).is_empty());
    assert!(!decide(8, &busy("vm beta-c3 compute h1 demand 0.8")).is_empty());
}

#[test]
fn a_vm_of_many_spikes_holds_up_a_decision_for_two_half_lives_only() {
    let text = format!(
        "{HOSTS}{CALM}
        vm beta-c1 compute h1 demand 0.99
        vm beta-c2 compute h1 demand 0.99
        vm beta-c3 compute h1 demand 0.4 rising"
    );
    let snapshot: Snapshot = text.parse().unwrap();
    let policy = Policy::default();
    let mut settling = Settling::default();

    let first = (0..60).find(|second| {
        let now = Instant(0) + Duration::from_secs(*second);
        cycle(now, &snapshot, &policy, &mut settling, STAMP).decision.is_some()
    });

    assert_eq!(first, Some(20));
}

#[test]
fn a_snapshot_reads_back_what_it_prints() {
    let snapshot: Snapshot =
        format!("{HOSTS}{CALM} env gamma home d1 failed d2 1 5 \n vm beta-c1 compute h1 moving h2 \n vm beta-c2 compute h1 unknown booting \n vm beta-c3 compute h1 failed h2 3 7")
            .parse()
            .unwrap();

    let mut again: Snapshot = snapshot.to_string().parse().unwrap();

    // An unknown demand prints as nothing and reads as idle.
    again.vms.get_mut(&"beta-c2".parse().unwrap()).unwrap().demand = None;
    assert_eq!(again, snapshot);
}

/// One cycle: an operator who waits for an empty host does not wait for balance to settle.
fn once(text: &str) -> Cycle {
    cycle(Instant(0), &text.parse().unwrap(), &Policy::default(), &mut Settling::default(), STAMP)
}

const DRAINING: &str = "
host h1 d1 cores 3 draining
host h2 d1 cores 3
host h3 d2 cores 4
env alpha home d1
env beta home d1
";

#[test]
fn a_draining_host_sheds_its_vms_head_nodes_too_to_its_own_domain_first() {
    let all = "vm alpha-head head h1 rested 1\nvm alpha-c1 compute h1 demand 0.9\nvm beta-c1 compute h2";
    let first = once(&format!("{DRAINING}{all}"));
    let rest = once(&format!("{DRAINING}{}", all.replace("alpha-c1 compute h1", "alpha-c1 compute h2")));
    let empty = once(&format!("{DRAINING}{}", all.replace(" h1 ", " h2 ")));

    assert_eq!(moves(&first), ["alpha-c1 h1 h2"]);
    assert_eq!(moves(&rest), ["alpha-head h1 h2"]);
    assert_eq!(moves(&empty), Vec::<String>::new());
    assert!(!empty.thought.drains);
}

#[test]
fn without_room_at_home_the_environment_leaves_a_draining_host_as_a_whole() {
    let full = DRAINING.replace("h2 d1 cores 3", "h2 d1 cores 3 memory 256");

    let cycle = once(&format!(
        "{full}vm alpha-head head h1\nvm alpha-c1 compute h1\nvm alpha-c2 compute h2\nvm beta-c1 compute h2 halted memory 1"
    ));

    assert_eq!(moves(&cycle), ["alpha-c1 h1 h3", "alpha-c2 h2 h3"]);
    assert_eq!(cycle.decision.unwrap().plan.gang, Some("alpha".parse().unwrap()));
}

#[test]
fn no_environment_leaves_its_domain_because_a_demand_is_not_known_yet() {
    let full = DRAINING.replace("h2 d1 cores 3", "h2 d1 cores 1");
    let vms = "vm alpha-c1 compute h1 demand 0.9\nvm alpha-c2 compute h2 unknown";

    let cycle = once(&format!("{full}{vms}"));

    assert_eq!(moves(&cycle), Vec::<String>::new());
    assert!(cycle.thought.refusals.iter().any(|refusal| refusal.to_string().contains("not known yet")));
    assert_eq!(moves(&once(&format!("{full}{}", vms.replace("unknown", "demand 0.9")))), ["alpha-c1 h1 h3", "alpha-c2 h2 h3"]);
}

#[test]
fn what_cannot_leave_a_draining_host_is_told_with_the_reason() {
    let full = DRAINING.replace("h2 d1 cores 3", "h2 d1 cores 3 memory 100").replace("h3 d2 cores 4", "h3 d2 cores 4 away");
    let said = |cluster: &str, vm: &str| {
        let cycle = once(&format!("{cluster}{vm}"));
        assert_eq!(cycle.decision, None);
        let told = cycle.thought.refusals.iter().map(ToString::to_string);
        told.filter(|words| words.starts_with("alpha-")).collect::<Vec<_>>().join("\n")
    };

    let head = said(&full, "vm alpha-head head h1");
    assert_eq!(head, "alpha-head cannot leave h1, which is being drained: h2 has 100 MiB free, alpha-head needs 256 MiB");
    let compute = said(&full, "vm alpha-c1 compute h1");
    assert!(
        compute.contains("h2 has 100 MiB free") && compute.contains("d2 cannot take all compute nodes of alpha"),
        "{compute}"
    );
    assert!(said(DRAINING, "vm alpha-c1 compute h1 halted").contains("it does not run"));
    let away = DRAINING.replace("cores 3 draining", "cores 3 draining away");
    assert!(said(&away, "vm alpha-c1 compute h1").contains("its monitor is away"));
    let both = DRAINING.replace("cores 3\n", "cores 3 draining\n").replace("cores 4", "cores 4 draining");
    assert!(said(&both, "vm alpha-c1 compute h1").contains("h2 is being drained"));
}

#[test]
fn balance_brings_nothing_to_a_draining_host() {
    let text = format!(
        "{}{CALM}
        vm beta-c1 compute h1 demand 0.99
        vm beta-c2 compute h1 demand 0.99",
        HOSTS.replace("h2 d1 cores 3", "h2 d1 cores 3 draining").replace("head h2", "head h1")
    )
    .replace("compute h2", "compute h3");

    assert!(moves(&settled(&text)).iter().all(|moved| !moved.ends_with(" h2")), "{:?}", moves(&settled(&text)));
}
