//! The manager as a process: environments, moves, gangs, and SIGKILL in the middle of all of them.

mod deployment;
mod strays;

use adaptd::io::journal::Journal;
use adaptd::records::{Record, RecordV1};
use deployment::Deployment;
use violin_common::Instant;
use violin_common::api::adapt::{AdaptReply, AdaptRequest, Event, Mode, Outcome};
use violin_common::api::switch::SwitchRequest;
use violin_common::config::environment::EnvironmentSpec;
use violin_common::control::monitor::VmState;

const ALPHA: [(&str, &str); 5] = [("head", "h1"), ("c1", "h1"), ("c2", "h1"), ("c3", "h2"), ("c4", "h2")];
const BETA: [(&str, &str); 5] = [("head", "h2"), ("c1", "h1"), ("c2", "h1"), ("c3", "h1"), ("c4", "h1")];
const RANKS: [&str; 4] = ["alpha-c1", "alpha-c2", "alpha-c3", "alpha-c4"];

/// Both environments up, alpha's job running, beta's first two VMs crowding h1.
async fn crowded(mode: &str) -> Deployment {
    let deployment = Deployment::new("observe").await;
    deployment.up("alpha", &ALPHA).await;
    deployment.up("beta", &BETA).await;
    deployment.busy(&RANKS);
    deployment.busy(&["beta-c1", "beta-c2"]);
    let mode = if mode == "act" { Mode::Act } else { Mode::DryRun };
    // Act on the whole picture only: the manager sees all demands before it may.
    deployment
        .until("demands are seen", |deployment| match deployment.ask_blocking(&AdaptRequest::VmList) {
            Ok(AdaptReply::Vms(vms)) => {
                vms.iter().filter(|vm| vm.smoothed_demand.is_some_and(|demand| demand > 0.75)).count() == 6
            }
            _ => false,
        })
        .await;
    deployment.ask(AdaptRequest::SetMode(mode)).await.unwrap();
    deployment
}

#[tokio::test(flavor = "multi_thread")]
async fn an_environment_comes_up_as_a_whole_and_goes_without_a_trace() {
    use std::os::unix::fs::PermissionsExt;
    let mut deployment = Deployment::new("act").await;

    deployment.up("alpha", &[]).await;

    let key = deployment.directory.path().join("keys/alpha");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let secret = std::fs::read_to_string(&key).unwrap();
    assert!(secret.contains("OPENSSH PRIVATE KEY"));
    let secret = secret.lines().nth(2).unwrap().to_owned();
    assert_eq!(deployment.files_with(&secret), ["journal.redb.keys/alpha", "keys/alpha"]);
    let AdaptReply::Environments(list) = deployment.ask_blocking(&AdaptRequest::EnvList).unwrap() else { panic!() };
    assert_eq!(list[0].vms.len(), 5);
    let access = deployment.ask(AdaptRequest::Access { environment: "alpha".parse().unwrap() }).await.unwrap();
    assert!(matches!(access, AdaptReply::Access { host, .. } if host == *list[0].vms[4].host.as_ref().unwrap()));
    deployment.ask(AdaptRequest::EnvDown { environment: "alpha".parse().unwrap() }).await.unwrap();
    assert!(deployment.table.lock().unwrap().vms.values().all(std::collections::BTreeMap::is_empty));
    // Neither in the journal nor anywhere else, the log included; nor once the next manager has read it.
    assert_eq!(deployment.files_with(&secret), [""; 0]);
    assert!(deployment.terminate(), "{}", deployment.log());
    deployment.start();
    deployment.until("all are back", |deployment| deployment.connected() == 3).await;
    assert_eq!(deployment.files_with(&secret), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_manager_knows_the_keys_of_its_environments_again() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    let (key, beside) =
        (deployment.directory.path().join("keys/alpha"), deployment.directory.path().join("journal.redb.keys/alpha"));
    let secret = std::fs::read(&key).unwrap();

    deployment.kill();
    std::fs::remove_file(&key).unwrap();
    deployment.start();
    deployment.until("all are back", |deployment| deployment.connected() == 3).await;

    assert_eq!(std::fs::read(&key).unwrap(), secret);
    // What moves is told the same again.
    deployment.ask(AdaptRequest::VmMigrate { vm: "alpha-c1".parse().unwrap(), to: "h3".parse().unwrap() }).await.unwrap();
    let specs = deployment.table.lock().unwrap().specs.clone();
    let told = |vm: &str| {
        specs[&vm.parse().unwrap()].0.guest_config.lines().find(|line| line.contains("SSH_PRIVATE")).unwrap().to_owned()
    };
    assert_eq!(told("alpha-c1"), told("alpha-c2"));
    // Lost: it says so and what to do, and all else goes on.
    deployment.kill();
    std::fs::remove_file(&beside).unwrap();
    deployment.start();
    deployment.until("all are back", |deployment| deployment.connected() == 3).await;
    assert!(deployment.log().contains("the private key of environment alpha is missing: want it in"), "{}", deployment.log());
    deployment.ask(down("alpha")).await.unwrap();
    assert!(!key.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_goes_nowhere_neither_ends_nor_holds_up_the_manager() {
    let mut deployment = Deployment::new("observe").await;
    assert!(deployment.terminate(), "{}", deployment.log());

    deployment.start_logging(std::fs::File::options().write(true).open("/dev/full").unwrap().into());
    deployment.until("three hosts are connected", |deployment| deployment.connected() == 3).await;
    let AdaptReply::Status(status) = deployment.ask(AdaptRequest::Status).await.unwrap() else { panic!() };
    assert!(status.log_lines_lost > 0, "{status:?}");
    assert!(deployment.terminate(), "its end is a clean one");

    let (_reader, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, &[b'\n'; 1 << 16]).unwrap(); // as much as a pipe takes
    deployment.start_logging(writer.into());
    deployment.until("three hosts are connected", |deployment| deployment.connected() == 3).await;
    deployment.up("alpha", &[]).await;
    assert!(deployment.terminate(), "its end is a clean one");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_environment_that_cannot_start_whole_does_not_start() {
    let deployment = Deployment::new("act").await;
    deployment.fail("h1", "start", "alpha-c2");
    let text = std::fs::read_to_string(format!("{}/../configs/environments/alpha.toml", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let spec = EnvironmentSpec::parse(&text).unwrap();
    let placement = ALPHA.iter().map(|(node, host)| ((*node).to_owned(), host.parse().unwrap())).collect();

    let words = deployment.ask(AdaptRequest::EnvUp { spec, placement, image: None }).await.unwrap_err();

    assert!(words.contains("alpha-c2 was not started on h1: start of alpha-c2 was made to fail"), "{words}");
    assert!(deployment.table.lock().unwrap().vms.values().all(std::collections::BTreeMap::is_empty));
    assert_eq!(deployment.ask_blocking(&AdaptRequest::EnvList), Ok(AdaptReply::Environments(Vec::new())));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_environment_whose_vm_has_the_name_of_another_s_is_refused() {
    let deployment = Deployment::new("act").await;
    // Both have an x-y-c1: `x` by its group `y-c`, `x-y` by its group `c`.
    deployment.try_up_as("alpha", "x", |text| text.replace("name = \"c\"", "name = \"y-c\"")).await.unwrap();

    let words = deployment.try_up_as("beta", "x-y", |text| text).await.unwrap_err();

    assert!(words.contains("node c1 of environment x-y") && words.contains("x-y-c1, which environment x has on h"), "{words}");
    assert_eq!(deployment.running("x-y-c1").len(), 1);
    let log = deployment.table.lock().unwrap().log.clone();
    assert!(log.iter().all(|told| !told.contains(" stop ")), "{log:?}");
}

/// The first `env up` waits for a guest that does not boot; nobody hears it any more.
#[tokio::test(flavor = "multi_thread")]
async fn an_env_up_that_was_given_up_does_not_end_a_later_environment_of_its_name() {
    let deployment = Deployment::new("act").await;
    let here = |deployment: &Deployment| ALPHA.iter().all(|(node, host)| deployment.running(&format!("alpha-{node}")) == [*host]);
    deployment.table.lock().unwrap().blind.insert("h2".parse().unwrap());
    let text = std::fs::read_to_string(format!("{}/../configs/environments/alpha.toml", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let spec = EnvironmentSpec::parse(&text).unwrap();
    let placement = ALPHA.iter().map(|(node, host)| ((*node).to_owned(), host.parse().unwrap())).collect();
    // Hangs up after the first line, as an interrupted `violin env up` does.
    deployment.spawn_ask(AdaptRequest::EnvUp { spec, placement, image: None }).await.unwrap().unwrap();
    deployment.until("all are started", here).await;

    deployment.ask(AdaptRequest::EnvDown { environment: "alpha".parse().unwrap() }).await.unwrap();
    deployment.table.lock().unwrap().blind.clear();
    deployment.up("alpha", &ALPHA).await;

    deployment.until("the first one has ended", |deployment| deployment.log().contains("was ended by another command")).await;
    let AdaptReply::Environments(list) = deployment.ask_blocking(&AdaptRequest::EnvList).unwrap() else { panic!() };
    assert_eq!(list.len(), 1);
    assert!(here(&deployment), "{}", deployment.log());
    assert!(!deployment.log().contains("ending what was started"), "{}", deployment.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowded_host_sheds_one_vm_and_a_full_domain_an_environment() {
    let deployment = crowded("act").await;
    let mut watch = violin_channel::local::watch::<_, AdaptReply>(&deployment.socket(), &AdaptRequest::Watch).await.unwrap();

    deployment.until("one move is done", |deployment| deployment.moved().len() == 1 && deployment.nothing_moves()).await;
    assert_eq!(deployment.moved(), ["beta-c1 h1 h2"]);
    deployment.busy(&["beta-c3", "beta-c4"]);
    deployment.until("the gang has moved", |deployment| deployment.moved().len() == 5 && deployment.nothing_moves()).await;

    let moves = ["beta-c1 h1 h2", "beta-c1 h2 h3", "beta-c2 h1 h3", "beta-c3 h1 h3", "beta-c4 h1 h3"];
    assert_eq!(deployment.moved(), moves);
    let migrations = deployment.migrations();
    assert!(migrations[1..].iter().all(|seen| seen.gang.as_ref().is_some_and(|gang| gang.as_str() == "beta")));
    assert!(migrations.iter().all(|seen| seen.decision.is_some() && !seen.terms.is_empty() && seen.source.is_some()));
    let mut told = Vec::new();
    while told.len() < 4 {
        match watch.next().await {
            Some(Ok(AdaptReply::Event(Event::Decided(seen)))) if !seen.moves.is_empty() => told.push("decided"),
            Some(Ok(AdaptReply::Event(Event::Announced(seen)))) => {
                assert_eq!(seen.vm.as_str(), "beta-c1");
                told.push("announced");
            }
            Some(Ok(AdaptReply::Event(Event::Began(_)))) => told.push("began"),
            Some(Ok(AdaptReply::Event(Event::Ended(_)))) => told.push("ended"),
            Some(Ok(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(told, ["decided", "announced", "began", "ended"]);
    let AdaptReply::Words(why) = deployment.ask_blocking(&AdaptRequest::Why { vm: "beta-c1".parse().unwrap() }).unwrap() else {
        panic!()
    };
    assert!(why.contains("beta-c1 is on h3") && why.contains("spread of host scores"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_decides_and_moves_nothing() {
    let deployment = crowded("dry-run").await;

    deployment
        .until("a decision", |deployment| match deployment.ask_blocking(&AdaptRequest::DecisionList { last: 9 }) {
            Ok(AdaptReply::Decisions(list)) => list.iter().any(|seen| seen.moves == ["beta-c1 from h1 to h2"]),
            _ => false,
        })
        .await;

    assert!(deployment.migrations().is_empty());
    assert_eq!(deployment.running("beta-c1"), ["h1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_manager_starts_again_in_the_mode_an_operator_set() {
    let mut deployment = Deployment::new("act").await;
    deployment.ask(AdaptRequest::SetMode(Mode::DryRun)).await.unwrap();
    let mode = |deployment: &Deployment| match deployment.ask_blocking(&AdaptRequest::Status) {
        Ok(AdaptReply::Status(status)) => Some(status.mode),
        _ => None,
    };

    deployment.kill();
    deployment.start();

    deployment.until("it answers again", |deployment| mode(deployment).is_some()).await;
    assert_eq!(mode(&deployment), Some(Mode::DryRun));
    assert!(deployment.log().contains("set by `violin mode` before this start"), "{}", deployment.log());
}

/// Kills the manager while a command is being carried out, in each state of a move.
#[tokio::test(flavor = "multi_thread")]
async fn a_manager_killed_in_any_state_finishes_or_undoes_the_move() {
    for (host, kind) in [("h2", "prepare"), ("h1", "migrate"), ("h2", "finish")] {
        let mut deployment = crowded("act").await;
        deployment.hold(host, kind);
        deployment.until_reached(host, kind).await;
        // This move is looked at, not those the next manager would think of.
        deployment.ask(AdaptRequest::SetMode(Mode::Observe)).await.unwrap();

        deployment.kill();
        deployment.release();
        deployment.start();
        deployment
            .until("the move has ended", |deployment| {
                !deployment.migrations().is_empty() && deployment.nothing_moves() && deployment.halves().is_empty()
            })
            .await;

        assert_eq!(deployment.running("beta-c1").len(), 1, "killed at {kind}: {}", deployment.log());
        let seen = &deployment.migrations()[0];
        let there = deployment.running("beta-c1") == ["h2"];
        assert_eq!(seen.outcome == Outcome::Done, there, "killed at {kind}: {seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_killed_between_the_moves_of_a_gang_goes_on_with_it() {
    let mut deployment = crowded("act").await;
    deployment.ask(AdaptRequest::SetMode(Mode::Observe)).await.unwrap();
    deployment.until("nothing moves", |deployment| deployment.nothing_moves()).await;
    deployment.hold("h1", "migrate");
    let request = AdaptRequest::EnvMove { environment: "beta".parse().unwrap(), to: "d2".parse().unwrap() };
    let asking = deployment.spawn_ask(request);
    deployment.until_reached("h1", "migrate").await;

    deployment.kill();
    deployment.release();
    deployment.start();
    deployment.until("the gang is there", |deployment| deployment.nothing_moves() && deployment.halves().is_empty()).await;

    let _ = asking.await;
    assert_gang_at_h3(&deployment);
}

fn assert_gang_at_h3(deployment: &Deployment) {
    for vm in ["beta-c1", "beta-c2", "beta-c3", "beta-c4"] {
        assert_eq!(deployment.running(vm), ["h3"], "{}", deployment.log());
    }
}

/// No command is under way: the next move is about to be checked, and all monitors come back later than the manager.
#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_ends_between_two_moves_of_a_gang_goes_on_with_it_when_its_monitors_are_back() {
    for clean in [false, true] {
        let mut deployment = Deployment::new("observe").await;
        deployment.up("beta", &BETA).await;
        deployment.hold("h1", "migrate");
        let request = AdaptRequest::EnvMove { environment: "beta".parse().unwrap(), to: "d2".parse().unwrap() };
        let asking = deployment.spawn_ask(request);
        deployment.until_reached("h1", "migrate").await;
        deployment.hold("h1", "list");
        deployment.release_one("h1", "migrate");
        deployment.until_reached("h1", "list").await;
        assert_eq!(deployment.moved(), ["beta-c1 h1 h3"]);

        if clean {
            assert!(deployment.terminate(), "{}", deployment.log());
        } else {
            deployment.kill();
        }
        let hosts = ["h1", "h2", "h3"];
        hosts.iter().for_each(|host| deployment.kill_monitor(host));
        deployment.release();
        deployment.start();
        deployment.until("the gang is taken up", |deployment| deployment.log().matches("is not connected").count() >= 2).await;
        hosts.iter().for_each(|host| deployment.start_monitor(host));
        deployment.until("the gang is there", |deployment| deployment.nothing_moves() && deployment.halves().is_empty()).await;

        let _ = asking.await;
        assert_gang_at_h3(&deployment);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_end_leaves_a_move_to_the_next_manager() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    deployment.hold("h3", "prepare");
    let request = AdaptRequest::VmMigrate { vm: "alpha-c1".parse().unwrap(), to: "h3".parse().unwrap() };
    let asking = deployment.spawn_ask(request);
    deployment.until_reached("h3", "prepare").await;

    assert!(deployment.terminate(), "{}", deployment.log());
    deployment.release();
    deployment.start();
    deployment
        .until("the move has ended", |deployment| {
            !deployment.migrations().is_empty() && deployment.nothing_moves() && deployment.halves().is_empty()
        })
        .await;

    let _ = asking.await;
    let seen = &deployment.migrations()[0];
    assert!(matches!(&seen.outcome, Outcome::Undone(why) if why.contains("restarted")), "{seen:?}");
    assert_eq!(deployment.running("alpha-c1"), ["h1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_that_fails_half_way_returns() {
    let deployment = crowded("act").await;
    deployment.ask(AdaptRequest::SetMode(Mode::Observe)).await.unwrap();
    deployment.until("nothing moves", |deployment| deployment.nothing_moves()).await;
    let was: Vec<_> = RANKS.map(|vm| deployment.running(vm)).to_vec();
    deployment.fail("h3", "prepare", "alpha-c3");

    let request = AdaptRequest::EnvMove { environment: "alpha".parse().unwrap(), to: "d2".parse().unwrap() };
    let AdaptReply::Migrations(list) = deployment.ask(request).await.unwrap() else { panic!() };

    assert_eq!(RANKS.map(|vm| deployment.running(vm)).to_vec(), was);
    assert!(deployment.halves().is_empty());
    let told: Vec<_> = list
        .iter()
        .map(|seen| {
            format!("{} {} {} {}", seen.vm, seen.from, seen.to, if seen.outcome == Outcome::Done { "done" } else { "undone" })
        })
        .collect();
    assert_eq!(
        told,
        [
            "alpha-c1 h1 h3 done",
            "alpha-c2 h1 h3 done",
            "alpha-c3 h2 h3 undone",
            "alpha-c4 h2 h3 undone",
            "alpha-c1 h3 h1 done",
            "alpha-c2 h3 h1 done",
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_migration_leaves_the_vm_where_it_was_and_nothing_at_the_destination() {
    let deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    deployment.fail("h1", "migrate", "alpha-c1");

    let request = AdaptRequest::VmMigrate { vm: "alpha-c1".parse().unwrap(), to: "h3".parse().unwrap() };
    let AdaptReply::Migrations(list) = deployment.ask(request).await.unwrap() else { panic!() };

    assert!(matches!(&list[0].outcome, Outcome::Undone(why) if why.contains("made to fail")), "{list:?}");
    assert_eq!(deployment.running("alpha-c1"), ["h1"]);
    assert!(deployment.halves().is_empty());
}

/// The destination is away, or says nothing, when the move is given up.
#[tokio::test(flavor = "multi_thread")]
async fn an_arrival_prepared_in_vain_is_cancelled_when_its_host_can_be_asked_again() {
    for away in [true, false] {
        let mut deployment = Deployment::new("act").await;
        deployment.up("alpha", &ALPHA).await;
        deployment.hold("h1", "migrate");
        deployment.fail("h1", "migrate", "alpha-c1");
        let request = AdaptRequest::VmMigrate { vm: "alpha-c1".parse().unwrap(), to: "h3".parse().unwrap() };
        let asking = deployment.spawn_ask(request);
        deployment.until_reached("h1", "migrate").await;

        if away {
            deployment.kill_monitor("h3");
            deployment.until("it is gone", |deployment| deployment.connected() == 2).await;
        } else {
            deployment.hold("h3", "list");
        }
        deployment.release_one("h1", "migrate");
        deployment
            .until("the move has ended", |deployment| !deployment.migrations().is_empty() && deployment.nothing_moves())
            .await;
        assert_eq!(deployment.halves(), ["alpha-c1 on h3: Arriving, leaving: false"], "{}", deployment.log());
        if away {
            deployment.start_monitor("h3");
        }
        deployment.release();

        deployment.until("it is cancelled", |deployment| deployment.halves().is_empty()).await;
        let _ = asking.await;
        assert_eq!(deployment.running("alpha-c1"), ["h1"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_lost_in_the_middle_of_a_move_is_asked_when_it_is_back() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    deployment.hold("h1", "migrate");
    let socket = deployment.socket();
    let request = AdaptRequest::VmMigrate { vm: "alpha-c1".parse().unwrap(), to: "h3".parse().unwrap() };
    let asking = tokio::spawn(async move {
        let mut lines = violin_channel::local::watch::<_, AdaptReply>(&socket, &request).await.unwrap();
        while let Some(line) = lines.next().await {
            if let Ok(AdaptReply::Migrations(list)) = line {
                return list;
            }
        }
        panic!("no answer");
    });
    deployment.until_reached("h1", "migrate").await;

    deployment.kill_monitor("h1");
    deployment.release();
    deployment.start_monitor("h1");
    let list = asking.await.unwrap();

    assert_eq!(list[0].outcome, Outcome::Done, "{}", deployment.log());
    assert_eq!(deployment.running("alpha-c1"), ["h3"]);
    assert!(deployment.halves().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_environment_half_started_by_a_killed_manager_is_ended() {
    let mut deployment = Deployment::new("act").await;
    deployment.hold("h2", "start");
    let text = std::fs::read_to_string(format!("{}/../configs/environments/alpha.toml", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let spec = EnvironmentSpec::parse(&text).unwrap();
    let placement = ALPHA.iter().map(|(node, host)| ((*node).to_owned(), host.parse().unwrap())).collect();
    let request = AdaptRequest::EnvUp { spec, placement, image: None };
    let asking = deployment.spawn_ask(request);
    deployment.until_reached("h2", "start").await;
    // Meanwhile the policy is off, and says so.
    deployment
        .until("it is told", |deployment| match deployment.ask_blocking(&AdaptRequest::DecisionList { last: 9 }) {
            Ok(AdaptReply::Decisions(list)) => {
                list.iter().any(|seen| seen.refusals == ["nothing is decided: alpha is being started"])
            }
            _ => false,
        })
        .await;

    deployment.kill();
    deployment.release();
    deployment.start();
    deployment
        .until("nothing is left of it", |deployment| {
            let table = deployment.table.lock().unwrap();
            let none = table.vms.values().all(std::collections::BTreeMap::is_empty);
            drop(table);
            none && deployment.ask_blocking(&AdaptRequest::EnvList) == Ok(AdaptReply::Environments(Vec::new()))
        })
        .await;

    let _ = asking.await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_could_not_be_stopped_is_not_started_a_second_time() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &[("c1", "h3")]).await;
    deployment.kill_monitor("h3");
    deployment.until("it is gone", |deployment| deployment.connected() == 2).await;
    let words = deployment.ask(down("alpha")).await.unwrap_err();
    assert!(words.contains("alpha-c1 may still run on h3, whose monitor is away"), "{words}");
    // Also after a restart: it is on record.
    deployment.kill();
    deployment.start();
    deployment.until("the others are back", |deployment| deployment.connected() == 2).await;

    let words = deployment.try_up("alpha", &[("c1", "h1")]).await.unwrap_err();

    assert!(words.contains("alpha-c1") && words.contains("h3, whose monitor is away"), "{words}");
    assert_eq!(deployment.running("alpha-c1"), ["h3"]);
    deployment.start_monitor("h3");
    deployment.until("it is stopped", |deployment| deployment.running("alpha-c1").is_empty()).await;
    let removed = |told: &String| told.starts_with("h3 remove network");
    deployment.until("so is its network", |deployment| deployment.table.lock().unwrap().log.iter().any(removed)).await;
    deployment.until("it is off the record", |deployment| environments(deployment).is_empty()).await;
    deployment.up("alpha", &[("c1", "h1")]).await;
    assert_eq!(deployment.running("alpha-c1"), ["h1"]);
}

fn down(name: &str) -> AdaptRequest {
    AdaptRequest::EnvDown { environment: name.parse().unwrap() }
}

/// Environments on record, and their VMs.
fn environments(deployment: &Deployment) -> Vec<(String, Vec<String>)> {
    let AdaptReply::Environments(list) = deployment.ask_blocking(&AdaptRequest::EnvList).unwrap() else { panic!() };
    let vms = |seen: &violin_common::api::adapt::EnvironmentSeen| seen.vms.iter().map(|vm| vm.vm.to_string()).collect();
    list.iter().map(|seen| (seen.spec.name.to_string(), vms(seen))).collect()
}

/// Its monitor is dead; its guests and its switch go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_network_is_free_only_when_nothing_of_it_can_still_run() {
    for back in [true, false] {
        let mut deployment = Deployment::new("act").await;
        deployment.up("alpha", &[("c1", "h3"), ("head", "h2")]).await;
        deployment.kill_monitor("h3");
        deployment.until("it is gone", |deployment| deployment.connected() == 2).await;

        let words = deployment.ask(down("alpha")).await.unwrap_err();

        assert!(words.contains("alpha-c1 may still run on h3") && words.contains("violin host forget h3"), "{words}");
        assert_eq!(environments(&deployment), [("alpha".to_owned(), vec!["alpha-c1".to_owned()])]);
        let AdaptReply::Environments(list) = deployment.ask_blocking(&AdaptRequest::EnvList).unwrap() else { panic!() };
        assert_eq!(list[0].life, violin_common::api::adapt::EnvironmentLife::Ending);
        let progress = list[0].progress.clone().unwrap();
        assert_eq!(progress, "4 of 5 VMs are stopped: alpha-c1 may still run on h3, whose monitor is away");
        let refused = deployment.try_up_as("alpha", "gamma", |text| text).await.unwrap_err();
        assert!(refused.contains("`network.vni`: got 7001, of environment alpha, which is still being ended"), "{refused}");
        let refused = deployment.try_up("alpha", &[]).await.unwrap_err();
        assert!(refused.contains("`name`: got alpha, which is still being ended"), "{refused}");
        assert!(deployment.ask(down("alpha")).await.unwrap_err().contains("alpha-c1 may still run on h3"));
        // Others are cared for meanwhile.
        deployment.up("beta", &BETA).await;
        deployment.busy(&["beta-c1", "beta-c2", "beta-c3", "beta-c4"]);
        deployment.until("the policy acts", |deployment| !deployment.moved().is_empty()).await;

        if back {
            deployment.start_monitor("h3");
        } else {
            deployment.ask(AdaptRequest::HostForget { host: "h3".parse().unwrap(), vms_are_lost: true }).await.unwrap();
        }

        deployment.until("it is off the record", |deployment| environments(deployment).len() == 1).await;
        deployment.try_up_as("alpha", "gamma", |text| text).await.unwrap();
        assert_eq!(deployment.running("alpha-c1").is_empty(), back);
    }
}

/// Managers of earlier versions wrote that an environment is gone as soon as it was to be ended.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_older_journal_calls_gone_though_it_may_run_keeps_its_name_and_network() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &[("c1", "h3")]).await;
    deployment.kill_monitor("h3");
    deployment.until("it is gone", |deployment| deployment.connected() == 2).await;
    deployment.ask(down("alpha")).await.unwrap_err();
    deployment.kill();
    {
        let (mut journal, _) = Journal::open(&deployment.journal(), Instant(0)).unwrap();
        journal.append(&Record::V1(RecordV1::EnvironmentGone("alpha".parse().unwrap()))).unwrap();
    }
    deployment.start();
    deployment.until("the others are back", |deployment| deployment.connected() == 2).await;

    let same_name = deployment.try_up("alpha", &[]).await.unwrap_err();
    let same_network = deployment.try_up_as("alpha", "gamma", |text| text).await.unwrap_err();

    assert!(same_name.contains("alpha-c1 of an ended environment may still run on h3"), "{same_name}");
    assert!(same_network.contains("`network.vni`: got 7001, in which alpha-c1 of an ended"), "{same_network}");
    deployment.start_monitor("h3");
    deployment.until("it is stopped", |deployment| deployment.running("alpha-c1").is_empty()).await;
}

/// `env down` asks the hosts on record only, and waits for one of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_left_on_another_host_is_stopped_while_its_environment_is_being_ended() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    let down = AdaptRequest::EnvDown { environment: "alpha".parse().unwrap() };
    deployment.hold("h2", "stop");
    let asking = deployment.spawn_ask(down);
    deployment.until_reached("h2", "stop").await;
    deployment.kill_monitor("h3");
    let left = (VmState::Arriving, false);
    deployment.table.lock().unwrap().vms.get_mut(&"h3".parse().unwrap()).unwrap().insert("alpha-c1".parse().unwrap(), left);

    deployment.start_monitor("h3");

    deployment.until("it is stopped", |deployment| deployment.halves().is_empty()).await;
    deployment.release();
    asking.await.unwrap().unwrap();
    assert!(deployment.table.lock().unwrap().vms.values().all(std::collections::BTreeMap::is_empty));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_access_namespace_that_could_not_be_closed_is_closed_when_its_monitor_is_back() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &[("c1", "h1"), ("c2", "h1"), ("head", "h2"), ("c3", "h1"), ("c4", "h1")]).await;
    deployment.ask(AdaptRequest::Access { environment: "alpha".parse().unwrap() }).await.unwrap();
    let moved = AdaptRequest::VmMigrate { vm: "alpha-head".parse().unwrap(), to: "h1".parse().unwrap() };
    deployment.ask(moved).await.unwrap();
    deployment.kill_monitor("h2");
    deployment.until("it is gone", |deployment| deployment.connected() == 2).await;
    let words = deployment.ask(down("alpha")).await.unwrap_err();
    assert!(words.contains("its access namespace may still be on h2, whose monitor is away"), "{words}");

    let words = deployment.try_up_as("alpha", "gamma", |text| text).await.unwrap_err();

    assert!(words.contains("network.vni") && words.contains("may still be on h2"), "{words}");
    deployment.start_monitor("h2");
    deployment
        .until("it is closed", |deployment| deployment.table.lock().unwrap().log.iter().any(|told| told == "h2 close alpha"))
        .await;
    deployment.until("it is off the record", |deployment| environments(deployment).is_empty()).await;
    deployment.up("alpha", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_runs_twice_is_told_and_stays_on_record_where_it_was() {
    let deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    let vm: violin_common::VmId = "alpha-c1".parse().unwrap();

    deployment.table.lock().unwrap().vms.get_mut(&"h3".parse().unwrap()).unwrap().insert(vm.clone(), (VmState::Running, false));
    deployment
        .until("it is told", |deployment| match deployment.ask_blocking(&AdaptRequest::Why { vm: vm.clone() }) {
            Ok(AdaptReply::Words(words)) => words.contains("alpha-c1 is on h1") && words.contains("it runs on h3 too"),
            _ => false,
        })
        .await;

    assert!(deployment.log().contains("alpha-c1 runs on h3 and on h1"), "{}", deployment.log());
    deployment.table.lock().unwrap().vms.get_mut(&"h3".parse().unwrap()).unwrap().remove(&vm);
    deployment
        .until("it is no longer told", |deployment| match deployment.ask_blocking(&AdaptRequest::Why { vm: vm.clone() }) {
            Ok(AdaptReply::Words(words)) => words.contains("alpha-c1 is on h1") && !words.contains("The last cycle refused"),
            _ => false,
        })
        .await;
    assert!(!deployment.log().contains("taking note"), "{}", deployment.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_does_not_answer_is_not_asked_for_the_same_again_and_again() {
    let deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    let h3: violin_common::HostId = "h3".parse().unwrap();
    deployment.hold("h3", "list");
    let stray = (VmState::Running, false);
    deployment.table.lock().unwrap().vms.get_mut(&h3).unwrap().insert("alpha-c1".parse().unwrap(), stray);
    deployment.until_reached("h3", "list").await;
    let lists = |deployment: &Deployment| deployment.table.lock().unwrap().log.iter().filter(|told| *told == "h3 list").count();
    let (before, observed) = (lists(&deployment), deployment.table.lock().unwrap().observed[&h3]);

    // One in 50 ms at most: longer than the least time between two comparisons.
    let later = |deployment: &Deployment| deployment.table.lock().unwrap().observed[&h3] > observed + 100;
    deployment.until("the stray is seen for 5 s", later).await;

    assert_eq!(lists(&deployment), before);
    deployment.release();
    deployment.until("it is told", |deployment| deployment.log().contains("alpha-c1 runs on h3 and on h1")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_takes_no_vm_for_which_it_has_no_memory_really_free() {
    let deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;

    deployment.table.lock().unwrap().memory_free_mib.insert("h3".parse().unwrap(), 255);
    deployment
        .until("it is known", |deployment| match deployment.ask_blocking(&AdaptRequest::HostList) {
            Ok(AdaptReply::Hosts(hosts)) => hosts.iter().any(|host| host.memory_free_mib == Some(255)),
            _ => false,
        })
        .await;
    let migrate = AdaptRequest::VmMigrate { vm: "alpha-c1".parse().unwrap(), to: "h3".parse().unwrap() };
    let words = deployment.ask(migrate).await.unwrap_err();

    assert!(words.contains("h3 would hold 256 MiB of 255 MiB"), "{words}");
}

/// Observations come once a period: those held back here are of before the end of the VMs.
#[tokio::test(flavor = "multi_thread")]
async fn memory_that_an_ended_environment_had_is_free_at_once() {
    let mut deployment = Deployment::new("act").await;
    deployment.with_setting("max-age = \"3s\"", "max-age = \"600s\"").await;
    let hosts: Vec<violin_common::HostId> = ["h1", "h2", "h3"].map(|host| host.parse().unwrap()).to_vec();
    let full = |deployment: &Deployment, free: Option<u64>| match deployment.ask_blocking(&AdaptRequest::HostList) {
        Ok(AdaptReply::Hosts(seen)) => seen.iter().all(|host| host.memory_free_mib == free),
        _ => false,
    };
    deployment.up("alpha", &ALPHA).await;
    deployment.table.lock().unwrap().memory_free_mib.extend(hosts.iter().map(|host| (host.clone(), 100)));
    deployment.until("all are full", |deployment| full(deployment, Some(100))).await;
    deployment.table.lock().unwrap().mute.extend(hosts);
    deployment.ask(down("alpha")).await.unwrap();

    let text = std::fs::read_to_string(format!("{}/../configs/environments/alpha.toml", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let spec = EnvironmentSpec::parse(&text).unwrap();
    let placement = ALPHA.iter().map(|(node, host)| ((*node).to_owned(), host.parse().unwrap())).collect();
    let asking = deployment.spawn_ask(AdaptRequest::EnvUp { spec, placement, image: None });

    let answer = asking.await.unwrap();
    assert!(matches!(&answer, Ok(AdaptReply::Progress(words)) if words.contains("starts on")), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn demand_that_is_no_longer_observed_is_not_believed() {
    let deployment = crowded("dry-run").await;
    let score = |deployment: &Deployment| match deployment.ask_blocking(&AdaptRequest::HostList) {
        Ok(AdaptReply::Hosts(hosts)) => hosts.iter().find(|host| host.host.as_str() == "h1").and_then(|host| host.score),
        _ => None,
    };
    deployment.until("h1 is crowded", |deployment| score(deployment).is_some_and(|score| score > 1.0)).await;

    deployment.table.lock().unwrap().blind.insert("h1".parse().unwrap());

    deployment.until("nothing is known of its VMs", |deployment| score(deployment) == Some(0.0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_moved_is_refused_in_words() {
    let deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    let migrate = |vm: &str, to: &str| AdaptRequest::VmMigrate { vm: vm.parse().unwrap(), to: to.parse().unwrap() };

    for (request, wanted) in [
        (migrate("alpha-head", "h3"), "home domain"),
        (migrate("alpha-c9", "h3"), "alpha-c9"),
        (migrate("alpha-c1", "h9"), "no host h9"),
        (migrate("alpha-c1", "h1"), "on h1 already"),
        (AdaptRequest::EnvMove { environment: "gamma".parse().unwrap(), to: "d2".parse().unwrap() }, "gamma"),
        (
            AdaptRequest::EnvMove { environment: "alpha".parse().unwrap(), to: "d9".parse().unwrap() },
            "got domain d9, want one of: d1 d2",
        ),
        (
            AdaptRequest::Switch { host: "h9".parse().unwrap(), request: SwitchRequest::PortList },
            "got host h9, want one whose monitor has called since this manager started: h1 h2 h3",
        ),
        (AdaptRequest::EnvDown { environment: "gamma".parse().unwrap() }, "gamma"),
    ] {
        let words = deployment.ask(request).await.unwrap_err();
        assert!(words.contains(wanted), "{words}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_manager_on_the_same_journal_does_not_start() {
    let deployment = Deployment::new("act").await;

    let output = std::process::Command::new(env!("CARGO_BIN_EXE_adaptd"))
        .arg("--config")
        .arg(deployment.directory.path().join("adaptd.toml"))
        .output()
        .unwrap();

    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("journal"), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The monitor is dead, or the hypervisor below it, or it is connected and says nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_last_known_is_not_told_as_how_it_is() {
    let json = |value: &AdaptReply| serde_json::to_value(value).unwrap();
    let of_c1 = |deployment: &Deployment| {
        let vms = json(&deployment.ask_blocking(&AdaptRequest::VmList).unwrap());
        vms["vms"].as_array().unwrap().iter().find(|vm| vm["vm"] == "alpha-c1").unwrap().clone()
    };
    for lost in ["monitor", "hypervisor", "observations"] {
        let mut deployment = Deployment::new("act").await;
        deployment.up("alpha", &ALPHA).await;
        assert_eq!(of_c1(&deployment)["state"], "running");

        match lost {
            "monitor" => deployment.kill_monitor("h1"),
            "hypervisor" => drop(deployment.table.lock().unwrap().blind.insert("h1".parse().unwrap())),
            _ => drop(deployment.table.lock().unwrap().mute.insert("h1".parse().unwrap())),
        }

        deployment.until(&format!("nothing is known ({lost})"), |deployment| of_c1(deployment)["state"] == "unknown").await;
        let seen = of_c1(&deployment);
        assert_eq!(
            (&seen["last-state"], &seen["run"], &seen["host"]),
            (&"running".into(), &serde_json::Value::Null, &"h1".into())
        );
        assert!(seen["seen-s"].as_f64().is_some_and(|age| age > 0.0), "{seen}");
        let why = deployment.ask_blocking(&AdaptRequest::Why { vm: "alpha-c1".parse().unwrap() }).unwrap();
        assert!(matches!(&why, AdaptReply::Words(words) if words.contains("alpha-c1 was on h1")), "{why:?}");
        let hosts = json(&deployment.ask_blocking(&AdaptRequest::HostList).unwrap());
        let known = hosts["hosts"][0]["demand-cores"].is_number();
        assert_eq!(known, lost == "hypervisor", "{hosts}");
        // Those of other hosts are known as before.
        let vms = json(&deployment.ask_blocking(&AdaptRequest::VmList).unwrap());
        let running = vms["vms"].as_array().unwrap().iter().filter(|vm| vm["state"] == "running").count();
        assert_eq!(running, 2, "{vms}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_has_heard_nothing_yet_calls_no_vm_booting() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;

    deployment.kill();
    ["h1", "h2", "h3"].iter().for_each(|host| deployment.kill_monitor(host));
    deployment.start();
    deployment.until("it answers again", |deployment| deployment.ask_blocking(&AdaptRequest::Status).is_ok()).await;

    let vms = serde_json::to_value(deployment.ask_blocking(&AdaptRequest::VmList).unwrap()).unwrap();
    let states: Vec<_> = vms["vms"].as_array().unwrap().iter().map(|vm| &vm["state"]).collect();
    assert_eq!(states, ["unknown"; 5]);
}

fn of_host(deployment: &Deployment, host: &str) -> Option<violin_common::api::adapt::HostSeen> {
    match deployment.ask_blocking(&AdaptRequest::HostList) {
        Ok(AdaptReply::Hosts(hosts)) => hosts.into_iter().find(|seen| seen.host.as_str() == host),
        _ => None,
    }
}

fn drain(host: &str) -> AdaptRequest {
    AdaptRequest::HostDrain { host: host.parse().unwrap() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_host_is_emptied_and_stays_empty_over_a_restart_until_it_is_undrained() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;

    let words = deployment.ask_blocking(&drain("h1")).unwrap();
    assert!(matches!(&words, AdaptReply::Words(words) if words.contains("3 VMs leave")), "{words:?}");
    let empty = |deployment: &Deployment| of_host(deployment, "h1").is_some_and(|seen| seen.draining && seen.vms.is_empty());
    deployment.until("it is empty", |deployment| empty(deployment) && deployment.nothing_moves()).await;
    let on_h2 = ["head", "c1", "c2", "c3", "c4"].iter().all(|node| deployment.running(&format!("alpha-{node}")) == ["h2"]);
    assert!(on_h2 && deployment.halves().is_empty(), "{}", deployment.log());

    deployment.kill();
    deployment.start();
    deployment.until("all are back", |deployment| deployment.connected() == 3).await;
    assert!(empty(&deployment));
    let migrate = AdaptRequest::VmMigrate { vm: "alpha-c1".parse().unwrap(), to: "h1".parse().unwrap() };
    deployment
        .until("the VM is known to run", |deployment| {
            matches!(deployment.ask_blocking(&AdaptRequest::Why { vm: "alpha-c1".parse().unwrap() }),
                Ok(AdaptReply::Words(words)) if words.contains("alpha-c1 is on h2"))
        })
        .await;
    let refused = deployment.ask(migrate.clone()).await.unwrap_err();
    assert!(refused.contains("h1 is being drained"), "{refused}");
    let refused = deployment.try_up("beta", &[("c1", "h1")]).await.unwrap_err();
    assert!(refused.contains("h1, which is being drained"), "{refused}");
    deployment.up("beta", &[]).await;
    assert!(of_host(&deployment, "h1").unwrap().vms.is_empty());

    deployment.ask(AdaptRequest::HostUndrain { host: "h1".parse().unwrap() }).await.unwrap();
    deployment.ask(migrate).await.unwrap();
    assert_eq!(deployment.running("alpha-c1"), ["h1"], "{}", deployment.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_draining_host_from_being_empty_is_told() {
    let deployment = Deployment::new("act").await;
    deployment.table.lock().unwrap().memory_free_mib.insert("h2".parse().unwrap(), 100);
    deployment.up("alpha", &[("head", "h1"), ("c1", "h3"), ("c2", "h3"), ("c3", "h3"), ("c4", "h3")]).await;

    deployment.ask(drain("h1")).await.unwrap();

    let told = |deployment: &Deployment| of_host(deployment, "h1").is_some_and(|seen| !seen.staying.is_empty());
    deployment.until("it is told", told).await;
    let seen = of_host(&deployment, "h1").unwrap();
    assert_eq!(
        seen.staying,
        ["alpha-head cannot leave h1, which is being drained: h2 has 100 MiB free, alpha-head needs 256 MiB"]
    );
    assert!(seen.draining && seen.vms.len() == 1, "{seen:?}");
    assert!(deployment.ask(drain("h9")).await.unwrap_err().contains("got host h9"));
}

/// The host comes back all the same, what ran there with it, while a VM of that name runs elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_host_that_comes_back_runs_nothing_a_second_time() {
    let forget = |lost| AdaptRequest::HostForget { host: "h3".parse().unwrap(), vms_are_lost: lost };
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &[("head", "h1"), ("c1", "h3"), ("c2", "h3"), ("c3", "h1"), ("c4", "h2")]).await;
    assert!(deployment.ask(forget(true)).await.unwrap_err().contains("whose monitor is connected"));
    deployment.kill_monitor("h3");
    deployment.until("it is gone", |deployment| deployment.connected() == 2).await;

    let words = deployment.ask(forget(false)).await.unwrap_err();
    assert!(words.contains("alpha-c1, alpha-c2") && words.contains("--vms-are-lost"), "{words}");
    deployment.ask(forget(true)).await.unwrap();
    assert_eq!(of_host(&deployment, "h3"), None);
    // Over a restart, too.
    deployment.kill();
    deployment.start();
    deployment.until("the others are back", |deployment| deployment.connected() == 2).await;
    let AdaptReply::Environments(list) = deployment.ask_blocking(&AdaptRequest::EnvList).unwrap() else { panic!() };
    assert_eq!(list[0].vms.len(), 3);
    deployment.ask(AdaptRequest::EnvDown { environment: "alpha".parse().unwrap() }).await.unwrap();
    deployment.up("alpha", &[("c1", "h1"), ("c2", "h2")]).await;
    assert_eq!(deployment.running("alpha-c1"), ["h1", "h3"]);

    deployment.start_monitor("h3");

    deployment.until("what it had is ended", |deployment| deployment.running("alpha-c1") == ["h1"]).await;
    deployment.until("the other too", |deployment| deployment.running("alpha-c2") == ["h2"]).await;
    deployment.until("it is a host again", |deployment| of_host(deployment, "h3").is_some_and(|seen| !seen.draining)).await;
    assert!(!deployment.log().contains("taking note"), "{}", deployment.log());
    assert!(ALPHA.iter().all(|(node, _)| deployment.running(&format!("alpha-{node}")).len() == 1));
}

fn of_environment(deployment: &Deployment, name: &str) -> Option<violin_common::api::adapt::EnvironmentSeen> {
    match deployment.ask_blocking(&AdaptRequest::EnvList) {
        Ok(AdaptReply::Environments(list)) => list.into_iter().find(|seen| seen.spec.name.as_str() == name),
        _ => None,
    }
}

/// Whoever asked for it has hung up, as an interrupted `violin env up` or `down` does.
#[tokio::test(flavor = "multi_thread")]
async fn how_far_an_environment_is_that_comes_or_goes_is_listed_for_everybody() {
    use violin_common::api::adapt::EnvironmentLife;
    let deployment = Deployment::new("act").await;
    let told = |deployment: &Deployment, life: EnvironmentLife, words: &str| {
        of_environment(deployment, "alpha").is_some_and(|seen| {
            seen.life == life && seen.progress.is_some_and(|told| told.starts_with(words)) && seen.progress_s.is_some()
        })
    };
    deployment.hold("h2", "start");
    // Hangs up after the first line.
    deployment.spawn_ask(deployment.env_up("alpha", &ALPHA)).await.unwrap().unwrap();

    deployment.until("it is told", |deployment| told(deployment, EnvironmentLife::Starting, "3 of 5 VMs run")).await;
    deployment.release();
    let ready =
        |deployment: &Deployment| of_environment(deployment, "alpha").is_some_and(|seen| seen.life == EnvironmentLife::Ready);
    deployment.until("it is up", ready).await;
    deployment.until("nothing is under way", |deployment| of_environment(deployment, "alpha").unwrap().progress.is_none()).await;

    deployment.hold("h1", "stop");
    let down = deployment.spawn_ask(AdaptRequest::EnvDown { environment: "alpha".parse().unwrap() });
    deployment.until_reached("h1", "stop").await;
    down.abort();
    deployment.until("it is told", |deployment| told(deployment, EnvironmentLife::Ending, "2 of 5 VMs are stopped")).await;
    deployment.release();
    deployment.until("it is gone", |deployment| of_environment(deployment, "alpha").is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_calls_for_one_environment_one_starts_it_and_the_others_are_told_so() {
    let deployment = Deployment::new("act").await;
    // None comes to its end before all have been answered.
    deployment.hold("h2", "start");

    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (socket, request) = (deployment.socket(), deployment.env_up("alpha", &ALPHA));
        calls.spawn(async move { deployment::last_answer(&socket, &request).await });
    }
    let mut refused = Vec::new();
    while refused.len() < 7 {
        refused.push(calls.join_next().await.unwrap().unwrap().unwrap_err());
    }
    deployment.release();

    assert!(refused.iter().all(|words| words.starts_with("environment alpha is being started by another call")), "{refused:#?}");
    assert_eq!(calls.join_next().await.unwrap().unwrap(), Ok(AdaptReply::Done));
    let keys = std::fs::read_dir(deployment.directory.path().join("keys")).unwrap();
    assert_eq!(keys.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>(), ["alpha"]);
    // It can be entered with the key its guests were told.
    let key = deployment.directory.path().join("keys/alpha");
    let public = std::process::Command::new("ssh-keygen").arg("-y").arg("-f").arg(key).output().unwrap();
    let public = String::from_utf8(public.stdout).unwrap();
    let told = deployment.table.lock().unwrap().specs.clone();
    assert!(told.len() == 5 && told.values().all(|(spec, _)| spec.guest_config.contains(public.trim())), "{public}\n{told:#?}");
}

/// Its destination does not answer, or is taking the VM in already.
#[tokio::test(flavor = "multi_thread")]
async fn an_order_to_give_up_a_move_is_answered_while_the_move_waits_for_a_host() {
    let deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    let vm = || "alpha-c1".parse::<violin_common::VmId>().unwrap();
    let migrate = AdaptRequest::VmMigrate { vm: vm(), to: "h3".parse().unwrap() };
    deployment.hold("h3", "prepare");
    let asking = deployment.spawn_ask(migrate.clone());
    deployment.until_reached("h3", "prepare").await;

    // For ever held up, if it waited for that host.
    let answer = deployment.ask(AdaptRequest::VmAbort { vm: vm() });
    let answer = tokio::time::timeout(std::time::Duration::from_secs(20), answer).await.expect("an answer, h3 held up");

    let Ok(AdaptReply::Migrations(list)) = answer else { panic!("{answer:?}") };
    assert_eq!(list[0].outcome, Outcome::Running);
    let listed = deployment.ask_blocking(&AdaptRequest::VmList).unwrap();
    let AdaptReply::Vms(listed) = listed else { panic!("{listed:?}") };
    assert!(listed.iter().all(|seen| seen.giving_up == (seen.vm == vm())), "{listed:#?}");
    let AdaptReply::Words(why) = deployment.ask_blocking(&AdaptRequest::Why { vm: vm() }).unwrap() else { panic!() };
    assert!(why.contains("is being given up: h3 is preparing for it"), "{why}");
    deployment.release();
    let ended = |deployment: &Deployment| deployment.nothing_moves() && deployment.halves().is_empty();
    deployment.until("it has ended", ended).await;
    assert!(matches!(&deployment.migrations()[0].outcome, Outcome::Undone(why) if why.contains("given up")));
    assert_eq!(deployment.running("alpha-c1"), ["h1"]);
    let _ = asking.await;

    deployment.hold("h3", "finish");
    let asking = deployment.spawn_ask(migrate);
    deployment.until_reached("h3", "finish").await;
    let words = deployment.ask(AdaptRequest::VmAbort { vm: vm() }).await.unwrap_err();
    assert!(words.contains("too late: alpha-c1 has left h1"), "{words}");
    deployment.release();
    deployment.until("it is there", |deployment| deployment.moved() == ["alpha-c1 h1 h3"]).await;
    let _ = asking.await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_monitor_with_one_certificate_is_refused_and_the_first_stays() {
    let mut deployment = Deployment::new("observe").await;
    let gone = deployment.log().matches("monitor gone").count();

    deployment.start_second_monitor("h1");

    let troubles = |deployment: &Deployment| of_host(deployment, "h1").map(|host| host.troubles).unwrap_or_default();
    let calls = |words: &str| words.contains("calls from 127.0.0.1 and is refused") && !words.contains(" 1 calls");
    deployment.until("it is refused more than once", |deployment| troubles(deployment).iter().any(|words| calls(words))).await;
    assert!(of_host(&deployment, "h1").unwrap().connected);
    let log = deployment.log();
    assert_eq!(log.matches("two monitors use the certificate of h1").count(), 1, "{log}");
    assert_eq!(log.matches("monitor gone").count(), gone, "{log}");

    // Its place is free: the second one may have it.
    deployment.kill_monitor("h1");
    let back = |deployment: &Deployment| deployment.log().matches("monitor connected host=h1").count() == 2;
    deployment.until("the second one takes the place", back).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_started_anew_is_taken_although_the_connection_of_the_old_one_still_stands() {
    let mut deployment = Deployment::new("observe").await;
    let came = |count| move |deployment: &Deployment| deployment.log().matches("monitor connected host=h1").count() == count;
    let freeze = deployment.freeze_monitor("h1");
    deployment.until("it is connected again", came(2)).await;
    freeze.send(()).unwrap();

    deployment.start_monitor("h1");

    deployment.until("the new one is taken", came(3)).await;
    assert_eq!(deployment.log().matches("two monitors").count(), 0);
}
