//! What the command makes of a manager's answers.

mod fake;

use fake::{Manager, alpha, said};
use violin_common::api::Response;
use violin_common::api::adapt::{
    AdaptReply, AdaptRequest, Condition, EnvironmentLife, EnvironmentSeen, HostSeen, StraySeen, VmListed,
};
use violin_common::api::switch::{Counter, SwitchReply};

#[test]
fn an_access_namespace_of_another_machine_is_said_to_be_there() {
    let manager = Manager::of_alpha("/nowhere/va-alpha.h2");

    for words in [&["ssh", "alpha"][..], &["cp", "alpha:c1:/etc/hosts", "/dev/null"], &["run", "alpha", "--", "true"]] {
        let output = manager.violin(words).output().unwrap();

        assert_eq!(output.status.code(), Some(1), "{words:?}: {}", said(&output));
        assert!(said(&output).contains("run this on h2"), "{words:?}: {}", said(&output));
    }
}

fn host(name: &str, connected: bool) -> HostSeen {
    HostSeen {
        host: name.parse().unwrap(),
        domain: "d1".parse().unwrap(),
        connected,
        driver: "sandbox".into(),
        cores: 1.0,
        demand_cores: connected.then_some(0.0),
        score: connected.then_some(0.0),
        memory_mib: 64,
        memory_free_mib: connected.then_some(64),
        age_s: None,
        vms: Vec::new(),
        draining: false,
        staying: Vec::new(),
        troubles: Vec::new(),
    }
}

#[test]
fn a_host_whose_monitor_is_away_is_named_and_not_left_out() {
    let manager = Manager::new(|request| match request {
        AdaptRequest::HostList => Response::Ok(AdaptReply::Hosts(vec![host("h1", true), host("h2", false)])),
        AdaptRequest::Switch { host, .. } if host.as_str() == "h1" => {
            let counters = vec![Counter { name: "drop.own".into(), value: 7 }];
            Response::Ok(AdaptReply::Switch(SwitchReply::Counters(counters)))
        }
        other => Response::Error(format!("not connected: {other:?}")),
    });

    let output = manager.violin(&["counters"]).output().unwrap();

    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("no answer of h2; the others are above"), "{}", said(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("drop.own"));
}

#[test]
fn what_is_not_known_at_present_is_not_shown_as_it_was() {
    let manager = Manager::new(|request| match request {
        AdaptRequest::VmList => {
            let listed = VmListed {
                state: Condition::Unknown,
                seen_s: Some(8.2),
                run: None,
                wait: None,
                demand: None,
                smoothed_demand: None,
                ..alpha().vms[0].clone()
            };
            let never = VmListed { last_state: None, seen_s: None, ..listed.clone() };
            Response::Ok(AdaptReply::Vms(vec![listed, never]))
        }
        AdaptRequest::StrayList => Response::Ok(AdaptReply::Strays(Vec::new())),
        other => Response::Error(format!("got {other:?}")),
    });

    let table = manager.violin(&["vm", "list"]).output().unwrap();
    let json = manager.violin(&["--json", "vm", "list"]).output().unwrap();

    let rows: Vec<String> = String::from_utf8(table.stdout).unwrap().lines().skip(1).map(str::to_owned).collect();
    assert!(rows[0].contains("unknown (running 8 s ago)") && !rows[0].contains('%'), "{rows:?}");
    assert!(rows[1].contains("unknown") && !rows[1].contains("ago"), "{rows:?}");
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let known = (&json[0]["state"], &json[0]["last-state"], &json[0]["seen-s"], &json[0]["run"]);
    assert_eq!(known, (&"unknown".into(), &"running".into(), &8.2.into(), &serde_json::Value::Null));
}

#[test]
fn strays_are_shown_with_what_can_be_done_about_them() {
    let stray = |vm: &str, environment: Option<&str>| StraySeen {
        stray: true,
        vm: vm.parse().unwrap(),
        environment: environment.map(|name| name.parse().unwrap()),
        role: environment.map(|_| violin_common::control::monitor::Role::Head),
        address: None,
        vni: None,
        host: "h1".parse().unwrap(),
        state: Condition::Running,
    };
    let manager = Manager::new(move |request| match request {
        AdaptRequest::VmList => Response::Ok(AdaptReply::Vms(vec![alpha().vms[0].clone()])),
        AdaptRequest::EnvList => Response::Ok(AdaptReply::Environments(Vec::new())),
        AdaptRequest::StrayList => Response::Ok(AdaptReply::Strays(vec![stray("gg-head", Some("gg")), stray("old-c1", None)])),
        AdaptRequest::EnvDestroy { environment } => Response::Error(format!("{environment}-c1 was not ended on h2")),
        other => Response::Error(format!("got {other:?}")),
    });
    let out = |words: &[&str]| String::from_utf8(manager.violin(words).output().unwrap().stdout).unwrap();

    for words in [&["vm", "list"][..], &["env", "status"]] {
        let table = out(words);
        let row = table.lines().find(|line| line.trim_start().starts_with("gg-head")).unwrap_or_else(|| panic!("{table}"));
        assert!(row.contains("gg") && row.contains("head") && row.contains("h1") && row.contains("running"), "{row}");
        assert!(table.contains("violin env adopt gg; end it: violin env destroy gg"), "{table}");
        assert!(table.contains("of old-c1 nobody tells how it was started: end it on h1"), "{table}");
    }
    let json: serde_json::Value = serde_json::from_str(&out(&["--json", "vm", "list"])).unwrap();
    let kinds: Vec<_> = json.as_array().unwrap().iter().map(|vm| (vm["vm"].as_str().unwrap(), &vm["stray"])).collect();
    let yes = serde_json::Value::Bool(true);
    assert_eq!(kinds, [("alpha-head", &serde_json::Value::Null), ("gg-head", &yes), ("old-c1", &yes)]);
    let refused = manager.violin(&["env", "status", "gg"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("environment gg runs, but the manager's journal does not know it"), "{}", said(&refused));
    let left = manager.violin(&["env", "destroy", "gg"]).output().unwrap();
    assert_eq!((left.status.code(), String::from_utf8_lossy(&left.stdout).into_owned()), (Some(1), String::new()));
    assert!(said(&left).contains("gg-c1 was not ended on h2"));
}

#[test]
fn how_far_an_environment_is_is_shown() {
    let manager = Manager::new(|request| match request {
        AdaptRequest::EnvList => {
            let progress = Some("3 of 5 VMs run; alpha-c4 starts on h2".to_owned());
            let (life, progress_s) = (EnvironmentLife::Starting, Some(12.3));
            Response::Ok(AdaptReply::Environments(vec![EnvironmentSeen { life, progress, progress_s, ..alpha() }, alpha()]))
        }
        AdaptRequest::StrayList => Response::Ok(AdaptReply::Strays(Vec::new())),
        other => Response::Error(format!("got {other:?}")),
    });

    for words in [&["env", "status"][..], &["env", "list"]] {
        let output = manager.violin(words).output().unwrap();

        let text = String::from_utf8(output.stdout).unwrap();
        let told: Vec<_> = text.lines().filter(|line| line.contains("VMs run") || line.starts_with("ready")).collect();
        assert_eq!(told, ["starting for 12 s: 3 of 5 VMs run; alpha-c4 starts on h2"], "{text}");
    }
}
