//! A real libvirtd on every host of a lab.

mod support;

use std::collections::BTreeSet;
use std::fs;
use support::{Standing, THREE, config, name, options, relay_entry as relay, remains};
use violin_lab::{Layers, netns};

#[test]
#[ignore = "not a test: the relay of the lab below"]
fn relay_entry() {
    relay();
}

#[test]
#[ignore = "needs root"]
fn each_hosts_libvirtd_answers_from_everywhere_and_sees_its_own_host() {
    let lab = Standing::up(&config(&name("virt"), THREE), &options(Layers::Libvirt));
    let virsh = |from: &str, uri: &str, words: &[&str]| {
        let began = std::time::Instant::now();
        let said = netns::run(netns::spawn_in(from, "virsh").unwrap().args(["--connect", uri]).args(words)).unwrap();
        eprintln!("virsh {}: {:?}", words.join(" "), began.elapsed());
        said
    };

    let mut uuids = BTreeSet::new();
    for host in &lab.0.hosts {
        // From the first host, over the WAN for the last.
        let uri = host.libvirt_uri.clone().unwrap();
        assert!(virsh(&lab.0.hosts[0].netns, &uri, &["list", "--all"]).contains("Name"));
        assert_eq!(virsh(&host.netns, "qemu+tcp://127.0.0.1/system", &["hostname"]).trim(), host.host.as_str());
        let daemon = fs::read_to_string(host.dir.join("libvirt/etc/libvirtd.conf")).unwrap();
        uuids.insert(daemon.lines().find(|line| line.starts_with("host_uuid")).unwrap().to_owned());
        assert!(virsh(&host.netns, &uri, &["domcapabilities", "--virttype", "qemu"]).contains("<domain>qemu</domain>"));

        // What its QEMU would see of the lab: this host's folder, and no other's.
        let pid = host.libvirtd.unwrap().pid;
        let seen = fs::read_dir(format!("/proc/{pid}/root/run/violin-lab/{}", lab.0.name)).unwrap().flatten();
        assert_eq!(seen.map(|entry| entry.file_name()).collect::<Vec<_>>(), [host.host.as_str()]);
        let images = format!("/proc/{pid}/root{}", host.dir.join("images").display());
        fs::write(host.dir.join("images/mark"), "").unwrap();
        assert!(fs::exists(format!("{images}/mark")).unwrap());
    }

    // A VM of the first host lies in its guests' control group, and goes with the lab.
    let first = &lab.0.hosts[0];
    let file = first.dir.join("run/vm.xml");
    let vm = format!(
        "<domain type='qemu'><name>t</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>\
         <resource><partition>/{}</partition></resource><os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <devices><serial type='file'><source path='{}'/></serial></devices></domain>",
        first.cpu_group,
        first.dir.join("run/t.console").display()
    );
    fs::write(&file, vm).unwrap();
    virsh(&first.netns, &first.libvirt_uri.clone().unwrap(), &["create", &file.to_string_lossy()]);
    let places = violin_lab::cgroup::places(&format!("{}.partition", first.cpu_group));
    let mut members = places.iter().filter_map(|place| fs::read_dir(place).ok()).flatten().flatten();
    assert!(members.any(|entry| entry.file_name().to_string_lossy().starts_with("qemu")), "QEMU is below none of {places:?}");
    assert!(first.dir.join("run/t.console").exists());

    assert_eq!(uuids.len(), 3, "hosts share a UUID: {uuids:?}");
    let name = lab.0.name.clone();
    lab.down();
    assert_eq!(remains(&name), BTreeSet::new());
}
