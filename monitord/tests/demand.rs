//! Demand of real processes behind a real quota. Needs root; `make test` runs it.
#![cfg(feature = "io")]

mod world;

use monitord::demand::{Load, demands};
use monitord::hypervisor::Hypervisor;
use monitord::io::clock;
use monitord::sample::{At, cpu};
use std::time::Duration;
use world::World;

const CORES: f64 = 3.0;
const SCALE: f64 = 0.11;

#[test]
#[ignore = "needs root"]
fn on_a_full_host_a_guest_that_merely_wakes_wants_little_and_starved_ones_all() {
    let world = World::new("dmmon");
    world.group("h1").set_quota(Some(CORES * SCALE)).unwrap();
    let driver = world.driver("h1");
    let busy = "while :; do :; done\n";
    let waking = "exec perl -e 'while (1) { select(undef, undef, undef, 0.002) }'\n";
    let specs = [busy, busy, busy, waking].into_iter().enumerate().map(|(number, program)| {
        let mut spec = world.spec();
        spec.vm = format!("dmmon-c{number}").parse().unwrap();
        spec.guest_config = program.into();
        spec
    });
    let specs: Vec<_> = specs.collect();
    for spec in &specs {
        let interface = driver.make_interface(spec, false).unwrap();
        driver.start(spec, &interface, None).unwrap();
    }
    let read = || specs.iter().map(|spec| At { at: clock::now(), value: driver.usage(&spec.vm).unwrap() }).collect::<Vec<_>>();
    // Time to run is what is measured here: let start-up be over, then take three seconds of it.
    std::thread::sleep(Duration::from_secs(1));
    let before = read();
    std::thread::sleep(Duration::from_secs(3));
    let after = read();

    let loads: Vec<_> = before
        .into_iter()
        .zip(after)
        .map(|(before, after)| {
            let (run, wait) = cpu(before, after).unwrap();
            Load { vcpus: 1, run: run / SCALE, wait }
        })
        .collect();
    let demands = demands(CORES, &loads.iter().map(|load| (*load, *load)).collect::<Vec<_>>());
    specs.iter().for_each(|spec| driver.stop(&spec.vm).unwrap());

    println!("{loads:#?}\n{demands:#?}");
    assert!(demands[..3].iter().all(|demand| demand.demand > 0.75), "{demands:?}");
    assert!(demands[3].demand < 0.25, "{demands:?}");
    assert!(loads[3].wait > 0.5, "the host was not full, so this proved nothing: {loads:?}");
}
