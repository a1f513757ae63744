//! Ports wait, quietly, for whatever they need. Needs root.
#![cfg(feature = "io")]

mod support;

use support::site::Site;
use support::{Namespace, run, until, vni};
use violin_common::api::switch::{PortCondition, PortKind, PortSpec, SwitchRequest};

/// A network namespace of that name, deleted with the value.
fn namespace(name: &str) -> Namespace {
    run(&format!("ip netns add {name}"));
    Namespace(name.into())
}

fn attached(site: &Site) -> usize {
    site.conditions(1).iter().filter(|seen| seen.condition == PortCondition::Attached).count()
}

/// Lines of the log about a port.
fn lines(site: &Site, port: u32) -> Vec<String> {
    let port = format!("port=p{port}");
    site.log(1).lines().filter(|line| line.contains(&port)).map(str::to_owned).collect()
}

#[test]
#[ignore = "needs root"]
fn a_port_waits_for_whatever_is_missing_and_says_for_what() {
    let late = format!("vsw-{}-late", std::process::id());
    let mut site = Site::new(1);
    let config = format!(
        "[[network]]\nvni = 5\n[[port]]\nkind = \"tap\"\nvni = 5\ninterface = \"t5\"\nnetns = \"/run/netns/{late}\"\n\
         [[port]]\nkind = \"vxlan\"\nvni = 5\nlocal = \"10.71.0.77:4789\"\nremote = \"10.71.0.78:4789\"\nremote-vni = 6\n\
         [[port]]\nkind = \"packet\"\nvni = 5\ninterface = \"late\"\n"
    );
    site.start_with(1, "pki", &config);
    let what = |site: &Site| site.conditions(1).into_iter().map(|seen| (seen.condition, seen.what)).collect::<Vec<_>>();
    let waiting = |what: &str| (PortCondition::Waiting, Some(what.to_owned()));

    until("all wait", || site.conditions(1).len() == 3);
    assert_eq!(
        what(&site),
        [waiting(&format!("network namespace /run/netns/{late}")), waiting("address 10.71.0.77"), waiting("interface late")]
    );
    // Longer than they are looked for, many times.
    until("how long they wait is told", || site.conditions(1).iter().all(|seen| seen.since_s >= 1));
    let kind = PortKind::Tap { interface: "t6".into(), netns: Some(format!("/run/netns/{late}")) };
    let asked = site.ask(1, SwitchRequest::PortAdd(PortSpec { vni: vni(5), kind, owned: None })).unwrap_err();
    assert!(asked.contains(&format!("network namespace /run/netns/{late} is not there")), "{asked}");

    let first = namespace(&late);
    until("the TAP is there", || first.try_run("ip link show t5").status.success() && attached(&site) == 1);
    site.hosts[&1].run("ip addr add 10.71.0.77/24 dev u0");
    until("the gateway is there", || attached(&site) == 2);
    site.hosts[&1].run("ip link add late type veth peer name far");
    until("all are there", || attached(&site) == 3);
    for port in 1..=3 {
        let lines = lines(&site, port);
        assert!(lines.len() == 2 && lines[0].contains("waiting: ") && lines[1].contains("is there: attached"), "{lines:#?}");
    }

    drop(first);
    until("the TAP is missed", || attached(&site) == 2);
    let second = namespace(&late);
    until("the TAP is there again", || second.try_run("ip link show t5").status.success() && attached(&site) == 3);
    // As somebody does who deletes and makes it in one go.
    run(&format!("ip netns del {late} && ip netns add {late}"));
    until("and again", || second.try_run("ip link show t5").status.success());
}
