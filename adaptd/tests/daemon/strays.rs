//! VMs that run though the journal knows nothing of them.

use crate::deployment::Deployment;
use crate::{ALPHA, BETA, RANKS, down};
use violin_common::api::adapt::{AdaptReply, AdaptRequest, Condition, StraySeen};
use violin_common::config::environment::EnvironmentSpec;

fn strays(deployment: &Deployment) -> Vec<StraySeen> {
    match deployment.ask_blocking(&AdaptRequest::StrayList) {
        Ok(AdaptReply::Strays(strays)) => strays,
        other => panic!("{other:?}"),
    }
}

fn told(deployment: &Deployment, what: &str) -> usize {
    deployment.table.lock().unwrap().log.iter().filter(|told| told.contains(what)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_does_not_take_an_emptied_journal_for_a_new_one() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    deployment.kill();
    std::fs::write(deployment.journal(), "").unwrap();

    let output = std::process::Command::new(env!("CARGO_BIN_EXE_adaptd"))
        .arg("--config")
        .arg(deployment.directory.path().join("adaptd.toml"))
        .output()
        .unwrap();

    let words = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && words.contains("move it away") && words.contains("violin env adopt"), "{words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_journal_knew_runs_on_and_keeps_its_names_and_network_until_it_is_taken_up() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    let key = deployment.directory.path().join("keys/alpha");
    let secret = std::fs::read(&key).unwrap();
    std::fs::remove_file(&key).unwrap();

    deployment.lose_the_journal().await;
    let same_name = deployment.try_up("alpha", &[]).await.unwrap_err();
    let same_network = deployment.try_up_as("alpha", "gamma", |text| text).await.unwrap_err();

    let way = "take it up with `violin env adopt alpha`, end it with `violin env destroy alpha`";
    assert!(
        same_name.contains("`name`: got alpha, but alpha-c1 of an environment alpha") && same_name.contains(way),
        "{same_name}"
    );
    assert!(same_network.contains("`network.vni`: got 7001, but alpha-c1") && same_network.contains(way), "{same_network}");
    let seen = strays(&deployment);
    let of = |seen: &StraySeen| {
        format!("{} of {:?} on {}: {}", seen.vm, seen.environment.as_ref().unwrap().as_str(), seen.host, seen.state)
    };
    assert_eq!(
        seen.iter().map(of).collect::<Vec<_>>()[..2],
        ["alpha-c1 of \"alpha\" on h1: running", "alpha-c2 of \"alpha\" on h1: running"]
    );
    assert_eq!(seen.len(), 5);
    // Another network and other names are free.
    deployment.up("beta", &BETA).await;

    let words = deployment.ask(AdaptRequest::EnvAdopt { environment: "alpha".parse().unwrap() }).await.unwrap();

    assert_eq!(words, AdaptReply::Words("environment alpha is taken up: 5 VMs".into()));
    assert_eq!((strays(&deployment), told(&deployment, " stop ")), (vec![], 0));
    assert_eq!(std::fs::read(&key).unwrap(), secret);
    // It is one like any other, also over a restart: moved, ended, and started anew as the next incarnation.
    deployment.kill();
    deployment.start();
    deployment.until("all are back", |deployment| deployment.connected() == 3).await;
    let runs = |deployment: &Deployment| match deployment.ask_blocking(&AdaptRequest::VmList) {
        Ok(AdaptReply::Vms(vms)) => vms.iter().filter(|vm| vm.state == Condition::Running).count() == 10,
        _ => false,
    };
    deployment.until("all are known to run", runs).await;
    deployment.ask(AdaptRequest::VmMigrate { vm: "alpha-c1".parse().unwrap(), to: "h2".parse().unwrap() }).await.unwrap();
    assert_eq!(deployment.running("alpha-c1"), ["h2"]);
    deployment.ask(down("alpha")).await.unwrap();
    assert!(ALPHA.iter().all(|(node, _)| deployment.running(&format!("alpha-{node}")).is_empty()));
    deployment.up("alpha", &ALPHA).await;
    let epoch = deployment.table.lock().unwrap().specs[&"alpha-c1".parse().unwrap()].1;
    assert_eq!(epoch.incarnation, violin_common::Epoch::FIRST.incarnation + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_journal_knew_is_ended_by_an_explicit_word_only() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    deployment.up("beta", &BETA).await;
    deployment.lose_the_journal().await;
    deployment.until("they are seen", |deployment| strays(deployment).len() == 10).await;
    let destroy = |name: &str| AdaptRequest::EnvDestroy { environment: name.parse().unwrap() };
    let adopt = |name: &str| AdaptRequest::EnvAdopt { environment: name.parse().unwrap() };

    let words = deployment.ask(destroy("gamma")).await.unwrap_err();
    assert!(words.contains("got environment gamma") && words.contains("alpha beta"), "{words}");
    assert!(deployment.ask(down("alpha")).await.unwrap_err().contains("violin env destroy alpha"));
    deployment.kill_monitor("h2");
    deployment.until("it is gone", |deployment| deployment.connected() == 2).await;
    // What is away can neither be ended nor taken up; what was ended stays so.
    let words = deployment.ask(adopt("alpha")).await.unwrap_err();
    assert!(words.contains("the monitor of h2") && words.contains("is away"), "{words}");
    let words = deployment.ask(destroy("alpha")).await.unwrap_err();
    assert!(words.contains("alpha-c3 was not ended on h2") && words.contains("alpha-c4"), "{words}");
    assert_eq!(deployment.running("alpha-c1"), [""; 0]);
    deployment.start_monitor("h2");
    deployment.until("it is back", |deployment| deployment.connected() == 3).await;
    let words = deployment.ask(adopt("alpha")).await.unwrap_err();
    assert!(words.contains("alpha-head (10.77.0.1), alpha-c1 (10.77.0.2)"), "{words}");

    deployment.ask(destroy("alpha")).await.unwrap();

    assert!(RANKS.iter().all(|vm| deployment.running(vm).is_empty()));
    assert_eq!(strays(&deployment).len(), 5);
    assert_eq!((told(&deployment, "stop beta"), told(&deployment, "remove network 7002")), (0, 0));
    deployment.up("alpha", &ALPHA).await;
    let words = deployment.ask(destroy("alpha")).await.unwrap_err();
    assert!(words.contains("violin env down alpha"), "{words}");
    assert_eq!(deployment.running("alpha-c1"), ["h1"]);
}

/// Its monitor is of an earlier version; its VM is told of by its name alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_stray_of_which_nothing_is_told_keeps_its_name() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &ALPHA).await;
    deployment.table.lock().unwrap().old.extend(["h1", "h2"].map(|host| host.parse().unwrap()));
    deployment.lose_the_journal().await;

    let words = deployment.try_up("alpha", &[]).await.unwrap_err();

    assert!(words.contains("`name`: got alpha, but alpha-c1"), "{words}");
    assert!(strays(&deployment).iter().all(|seen| seen.environment.is_none()));
    assert_eq!(told(&deployment, " stop "), 0);
}

/// Before a host has said what runs there, nothing starts that it might clash with.
#[tokio::test(flavor = "multi_thread")]
async fn an_environment_starts_after_all_hosts_have_listed_their_vms() {
    let mut deployment = Deployment::new("act").await;
    deployment.up("alpha", &["head", "c1", "c2", "c3", "c4"].map(|node| (node, "h2"))).await;
    deployment.hold("h2", "list");
    deployment.kill();
    std::fs::remove_file(deployment.journal()).unwrap();
    deployment.start();
    deployment.until_reached("h2", "list").await;
    deployment.until("all are back", |deployment| deployment.connected() == 3).await;
    let spec = EnvironmentSpec::parse(
        &std::fs::read_to_string(format!("{}/../configs/environments/alpha.toml", env!("CARGO_MANIFEST_DIR"))).unwrap(),
    );
    let mut spec = spec.unwrap();
    spec.network.vni = violin_common::Vni::new(9).unwrap();
    let asking = deployment.spawn_ask(AdaptRequest::EnvUp { spec, placement: std::collections::BTreeMap::new(), image: None });

    deployment.release();

    let words = asking.await.unwrap().unwrap_err();
    assert!(words.contains("got alpha, but alpha-c1") && words.contains("runs on h2"), "{words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_does_not_list_its_vms_takes_none() {
    let mut deployment = Deployment::new("act").await;
    deployment.hold("h3", "list");
    deployment.kill();
    deployment.start();
    deployment.until("all are back", |deployment| deployment.connected() == 3).await;
    deployment.until_reached("h3", "list").await;

    let words = deployment.try_up("alpha", &[("c1", "h3")]).await.unwrap_err();

    assert!(words.contains("got host h3, whose monitor does not tell what runs there"), "{words}");
    deployment.release();
    deployment.up("alpha", &[("c1", "h3")]).await;
}
