use super::*;
use violin_common::api::switch::NetworkSpec;
use violin_common::control::monitor::Role;
use violin_common::{MacAddr, Vni};

fn spec() -> VmSpec {
    VmSpec {
        vm: "alpha-c1".parse().unwrap(),
        environment: "alpha".parse().unwrap(),
        role: Role::Compute,
        network: NetworkSpec { vni: Vni::new(7).unwrap(), mtu: 1400, ageing_s: 300 },
        mac: MacAddr([0x52, 0x54, 0, 0, 0, 1]),
        address: [10, 0, 0, 1].into(),
        prefix_len: 24,
        vcpus: 1,
        memory_mib: 256,
        image: None,
        guest_config: String::new(),
    }
}

fn places(host: &str, cpu_group: Option<&str>) -> Places {
    Places {
        kernel: format!("/{host}/vmlinuz").into(),
        initrd: format!("/{host}/initrd").into(),
        root: format!("/{host}/root.img").into(),
        console: format!("/{host}/console/alpha-c1.log").into(),
        guest_config: format!("/{host}/guest/o'alpha-c1&").into(),
        interface: "vt-alpha-c1".into(),
        cpu_group: cpu_group.map(str::to_owned),
    }
}

#[test]
fn a_path_cannot_break_out_of_its_attribute() {
    let xml = describe(&spec(), &places("h1", None), Accel::Tcg);

    assert!(xml.contains("<entry name='opt/org.violin/guest' file='/h1/guest/o&apos;alpha-c1&amp;'/>"), "{xml}");
}

#[test]
fn a_retargeted_description_is_the_one_the_destination_would_write() {
    let here = describe(&spec(), &places("h1", Some("violin-h1")), Accel::Tcg);

    let there = retarget(&here, &places("h2", Some("violin-h2"))).unwrap();

    assert_eq!(there, describe(&spec(), &places("h2", Some("violin-h2")), Accel::Tcg));
}

#[test]
fn a_guest_is_told_the_mtu_of_its_network() {
    let network = NetworkSpec { mtu: 1300, ..spec().network };
    let xml = describe(&VmSpec { network, ..spec() }, &places("h1", None), Accel::Tcg);

    let (_, interface) = xml.split_once("<interface ").expect("an interface");
    let (interface, _) = interface.split_once("</interface>").expect("its end");
    assert!(interface.contains("<mtu size='1300'/>"), "{interface}");
}

#[test]
fn a_guest_hands_over_no_udp_to_be_cut_into_fragments() {
    let xml = describe(&spec(), &places("h1", None), Accel::Tcg);

    let (_, interface) = xml.split_once("<interface ").expect("an interface");
    assert!(interface.contains("<driver><host ufo='off'/></driver>"), "{interface}");
}

#[test]
fn the_memory_of_a_translated_guest_is_no_multiple_of_64_pages() {
    for mib in [1, 256, 1000, 4096] {
        let xml = describe(&VmSpec { memory_mib: mib, ..spec() }, &places("h1", None), Accel::Tcg);

        let (_, rest) = xml.split_once("memory-backend-ram,id=violin.ram,size=").expect("a block of its own");
        let bytes: u64 = rest.split_once('\'').unwrap().0.parse().unwrap();
        assert!(bytes >= mib << 20 && bytes.is_multiple_of(8192), "QEMU would round {bytes} up");
        assert!(!bytes.is_multiple_of(64 * 4096));
        assert!(xml.contains(&format!("<qemu:arg value='size={bytes}B'/>")), "{xml}");
    }
    assert!(!describe(&spec(), &places("h1", None), Accel::Kvm).contains("qemu:arg"));
}

#[test]
fn a_destination_without_a_cpu_group_gets_none() {
    let here = describe(&spec(), &places("h1", Some("violin-h1")), Accel::Tcg);

    let there = retarget(&here, &places("h2", None)).unwrap();

    assert!(!there.contains("partition"), "{there}");
}

#[test]
fn a_foreign_description_is_not_retargeted() {
    assert_eq!(retarget("<domain><name>x</name></domain>", &places("h2", None)), None);
}

#[test]
fn the_uuid_depends_on_the_name_alone() {
    let other = "alpha-c2".parse().unwrap();

    assert_eq!(uuid(&spec().vm), uuid(&spec().vm));
    assert_ne!(uuid(&spec().vm), uuid(&other));
    assert_eq!(uuid(&other)[6] >> 4, 8, "version 8 of RFC 9562");
}
