//! What is wrong in a file is refused in words that name the key, what was got and what is wanted. Certificates are real.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use violin_tests::program;

/// What is wrong, the file's text, and what the refusal must say.
type Case<'a> = (&'a str, String, &'a [&'a str]);

/// A folder with certificates for h1 of d1 and a manager.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let members = ["h1", "adaptd"].map(|name| (name.parse().expect("a legal name"), "d1".parse().expect("a legal name")));
    violin_channel::pki::write_pki(folder.path(), "test", &members).expect("certificates are made");
    folder
}

/// A shipped example with the certificates of `folder`.
fn example(name: &str, folder: &Path) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs").join(name);
    let text = std::fs::read_to_string(path).expect("the example is there");
    text.replace("/etc/violin", folder.to_str().expect("a temporary folder's name is text"))
}

fn run(name: &str, words: &[&str], file: &Path) -> Output {
    Command::new(program(name)).args(words).arg(file).output().expect("the program runs")
}

/// Each case ends with a status other than zero, and with an error that says all its words.
fn refused(name: &str, words: &[&str], folder: &Path, cases: &[Case<'_>]) {
    let mut files: Vec<(&str, PathBuf, &[&str])> =
        vec![("no file at all", folder.join("no-such.toml"), &["no-such.toml", "No such file"])];
    for (index, (what, text, wanted)) in cases.iter().enumerate() {
        let path = folder.join(format!("{name}-wrong-{index}.toml"));
        std::fs::write(&path, text).expect("a file is written");
        files.push((what, path, wanted));
    }
    for (what, path, wanted) in files {
        let output = run(name, words, &path);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{name}: {what} was accepted");
        assert!(!said.contains("panicked"), "{name}: {what}: {said}");
        for word in wanted {
            assert!(said.contains(word), "{name}: {what}: {word:?} is not in {said:?}");
        }
    }
}

/// The text with `line`'s key set to another value, in the table the key is in.
fn with(text: &str, line: &str) -> String {
    let key = line.split('=').next().expect("a line").trim();
    let found = |known: &&str| known.trim_start_matches("# ").split('=').next().is_some_and(|known| known.trim() == key);
    let old = text.lines().find(found).unwrap_or_else(|| panic!("the example has no {key}"));
    text.replacen(old, line, 1)
}

#[test]
#[ignore = "needs root"]
fn a_wrong_switch_configuration_is_refused_with_key_got_and_wanted() {
    const A: &str = "02:00:00:00:00:0a";
    let folder = folder();
    let example = example("switchd.example.toml", folder.path());
    let (good, _) = example.split_once("[[network]]").expect("the example has a network");
    let network = "[[network]]\nvni = 7\n";
    let port = |mac: &str, interface: &str| {
        format!("[[port]]\nkind = \"packet\"\nvni = 7\ninterface = \"{interface}\"\nmac = \"{mac}\"\n")
    };
    let cases: [Case<'_>; 11] = [
        ("an unknown key", format!("colour = \"blue\"\n{good}"), &["colour"]),
        ("a wrong unit", format!("{good}[[network]]\nvni = 7\nageing = \"300\"\n"), &["ageing", "300", "unit"]),
        ("a VNI out of range", format!("{good}[[network]]\nvni = 16777216\n"), &["vni", "16777216", "16777215"]),
        ("an MTU out of range", format!("{good}[[network]]\nvni = 7\nmtu = 100\n"), &["network[0].mtu", "100", "576"]),
        ("a clashing MAC", format!("{good}{network}{}{}", port(A, "x1"), port(A, "x2")), &["port[1].mac", A, "once"]),
        (
            "a MAC of nobody",
            format!("{good}{network}{}", port("00:00:00:00:00:00", "x1")),
            &["port[0].mac", "00:00", "individual"],
        ),
        ("a network twice", format!("{good}{network}{network}"), &["network[1].vni", "7", "once"]),
        ("a port of no network", format!("{good}{}", port(A, "x1")), &["port[0].vni", "7"]),
        ("an address without port", with(good, "listen = \"192.0.2.11\""), &["listen", "192.0.2.11", "socket address"]),
        ("another host's certificate", with(good, "host = \"h2\""), &["h2", "h1", "certificate"]),
        ("a missing file", good.replace("h1.pem", "missing.pem"), &["missing.pem"]),
    ];

    assert!(run("switchd", &["--check", "--config"], &written(&folder, "good.toml", good)).status.success());
    refused("switchd", &["--config"], folder.path(), &cases);
}

fn written(folder: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, text).expect("a file is written");
    path
}

#[test]
#[ignore = "needs root"]
fn a_wrong_monitor_configuration_is_refused_with_key_got_and_wanted() {
    let folder = folder();
    // Should a wrong one be taken after all, it is to leave nothing on this machine.
    let good = example("monitord.example.toml", folder.path()).replace("cpu-group =", "# cpu-group =");
    let set = |line: &str| with(&good, line);
    let cases: [Case<'_>; 18] = [
        ("an unknown key", format!("colour = \"blue\"\n{good}"), &["colour", "unknown"]),
        ("an unknown key of a table", good.replace("[capacity]", "[capacity]\ncolour = 1"), &["colour", "unknown"]),
        (
            "an unknown key of the driver",
            good.replace("[driver]\nkind = \"l", "[driver]\ncolour = 1\nkind = \"l"),
            &["colour", "unknown"],
        ),
        ("an unknown driver", set("kind = \"docker\""), &["docker", "libvirt", "sandbox"]),
        ("an unknown accelerator", set("accel = \"xen\""), &["xen", "kvm", "tcg"]),
        ("a span without unit", set("period = \"5\""), &["period", "\"5\"", "unit"]),
        ("a number for a span", set("period = 5"), &["period", "5", "string"]),
        ("a period out of range", set("period = \"1ms\""), &["`period`", "1ms", "100ms to 60s"]),
        ("a quota period out of range", set("quota-period = \"2s\""), &["`capacity.quota-period`", "2s", "10ms to 1s"]),
        ("no cores", set("cores = 0.0"), &["`capacity.cores`", "0", "more than 0"]),
        ("cores that are no number", set("cores = nan"), &["`capacity.cores`", "NaN", "at most 4096"]),
        ("a scale out of range", set("scale = -1.0"), &["`capacity.scale`", "-1", "more than 0"]),
        ("no memory", set("memory-mib = 0"), &["`capacity.memory-mib`", "0", "at least 1"]),
        ("a missing key", set("memory-mib = 1").replace("memory-mib = 1", ""), &["missing field `memory-mib`"]),
        ("an address for everybody", set("listen = \"0.0.0.0:7473\""), &["`listen`", "0.0.0.0:7473", "an address of this host"]),
        ("an address without port", set("manager = \"192.0.2.10\""), &["manager", "192.0.2.10", "socket address"]),
        ("another host's certificate", set("host = \"h2\""), &["h2", "h1", "certificate"]),
        ("a missing file", good.replace("h1.key", "missing.key"), &["missing.key"]),
    ];

    let checked = run("monitord", &["--check", "--config"], &written(&folder, "good.toml", &good));
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    refused("monitord", &["--config"], folder.path(), &cases);
}

#[test]
#[ignore = "needs root"]
fn a_wrong_manager_configuration_is_refused_with_key_got_and_wanted() {
    let folder = folder();
    let good = with(&example("adaptd.example.toml", folder.path()), "journal = \"/nowhere/adaptd.redb\"");
    let set = |line: &str| with(&good, line);
    let cases: [Case<'_>; 16] = [
        ("an unknown key", format!("colour = \"blue\"\n{good}"), &["colour", "unknown"]),
        (
            "an unknown key of the policy",
            good.replace("[policy]", "[policy]\nhigh_demand = 0.5"),
            &["high_demand", "high-demand"],
        ),
        ("an unknown mode", set("mode = \"sometimes\""), &["sometimes", "act", "dry-run", "observe"]),
        ("an unknown migration", set("migration = \"fast\""), &["fast", "pre-copy"]),
        ("a span without unit", set("cooldown = \"60\""), &["cooldown", "\"60\"", "unit"]),
        ("a number for a span", set("half-life = 5"), &["half-life", "5", "string"]),
        ("a period out of range", set("period = \"1ms\""), &["`period`", "1ms", "100ms to 1h"]),
        ("a time-out out of range", set("ready-timeout = \"2h\""), &["`ready-timeout`", "2h", "1s to 1h"]),
        ("too many at once", set("parallel = 9"), &["`parallel`", "9", "1 to 8"]),
        ("a demand out of range", set("high-demand = 7.5"), &["`policy.high-demand`", "7.5", "at most 1"]),
        ("low above high", set("low-demand = 0.8"), &["`policy.low-demand`", "0.8", "below high-demand"]),
        ("a gain of nothing", set("min-gain = 0.0"), &["`policy.min-gain`", "0", "more than 0"]),
        ("no settling", set("settle = 0"), &["`policy.settle`", "0", "1 to 1000"]),
        ("a part above the whole", set("overcommit = 1.5"), &["`policy.overcommit`", "1.5", "0 to 1"]),
        ("an address without port", set("listen = \"0.0.0.0\""), &["listen", "0.0.0.0", "socket address"]),
        ("a missing file", good.replace("adaptd.pem", "missing.pem"), &["missing.pem"]),
    ];

    let checked = run("adaptd", &["--check", "--config"], &written(&folder, "good.toml", &good));
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    refused("adaptd", &["--config"], folder.path(), &cases);
    refused("adaptd", &["--check", "--config"], folder.path(), &cases);
}

#[test]
#[ignore = "needs root"]
fn a_wrong_environment_is_refused_with_key_got_and_wanted() {
    let folder = folder();
    let good = example("environments/alpha.toml", folder.path());
    let set = |line: &str| with(&good, line);
    let cases: [Case<'_>; 14] = [
        ("an unknown key", format!("colour = \"blue\"\n{good}"), &["colour", "unknown"]),
        ("VNI 0", set("vni = 0"), &["vni", "0", "16777215"]),
        ("a VNI out of range", set("vni = 16777216"), &["vni", "16777216", "16777215"]),
        ("an MTU out of range", set("mtu = 100"), &["`network.mtu`", "100", "576 to 9000"]),
        ("a prefix too long", set("prefix-len = 30"), &["`network.prefix-len`", "30", "16 to 29"]),
        ("an address within a network", set("address = \"10.77.0.9\""), &["`network.address`", "10.77.0.9", "first address"]),
        ("half a MAC", set("first-mac = \"52:54:00\""), &["first-mac", "52:54:00"]),
        ("a group's MAC", set("first-mac = \"01:00:5e:00:00:01\""), &["`network.first-mac`", "01:00:5e:00:00:01", "individual"]),
        (
            "a MAC of nobody",
            set("first-mac = \"00:00:00:00:00:00\""),
            &["`network.first-mac`", "00:00:00:00:00:00", "individual"],
        ),
        ("MACs that would run over", set("first-mac = \"52:54:00:77:00:fd\""), &["`group[1].count`", "4", "first-mac"]),
        ("a name twice", good.replace("name = \"head\"", "name = \"c2\""), &["`group[1].name`", "c2", "once"]),
        ("no head", good.replace("role = \"head\"", "role = \"compute\""), &["role", "0 head nodes", "exactly one"]),
        ("an unknown role", good.replace("role = \"head\"", "role = \"boss\""), &["boss", "head", "compute"]),
        ("no memory", set("memory-mib = 0"), &["`group[0].memory-mib`", "0", "at least 1"]),
    ];

    let words = ["--socket", "/nowhere/adaptd.sock", "env", "up"];
    let reached = run("violin", &words, &written(&folder, "good.toml", &good));
    assert!(String::from_utf8_lossy(&reached.stderr).contains("/nowhere/adaptd.sock"), "a good file gets as far as the manager");
    refused("violin", &words, folder.path(), &cases);
}
