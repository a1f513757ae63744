//! What the command makes of a manager's answers.

mod fake;

use fake::{Manager, alpha, said};
use violin_common::api::Response;
use violin_common::api::adapt::{AdaptReply, AdaptRequest, Condition, HostSeen, VmListed};
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
