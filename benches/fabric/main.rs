//! The fabric against the kernel's own overlay, the bare wire and its rivals, in one run, interleaved.
//!
//! `bench-fabric [--out FOLDER] [--only NAME,NAME] [--wires WIRE,WIRE] [--rounds N] [--seconds S] [--no-extras]
//! [--no-goodput]`; `QUICK=1` measures the wire, the
//! kernel and both of ours. Progress goes to standard error, the table to standard output, `fabric.json` and `fabric.svg` to the folder.
//! The machine is shared and noisy: only ratios of one run mean something.

mod contenders;
mod extras;
mod report;
mod site;
mod tools;

use contenders::Contender;
use report::{Bar, Samples};
use serde_json::{Value, json};
use site::{Site, WireKind};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Debug)]
struct Options {
    out: PathBuf,
    contenders: Vec<Contender>,
    wires: Vec<WireKind>,
    rounds: usize,
    seconds: f64,
    /// What concerns our switch alone.
    extras: bool,
    /// Of that, the lossy path, which takes longest.
    goodput: bool,
}

impl Options {
    fn read() -> Result<Self, String> {
        let quick = std::env::var("QUICK").is_ok_and(|value| !value.is_empty() && value != "0");
        let contenders = if quick { Contender::QUICK.to_vec() } else { Contender::ALL.to_vec() };
        let (rounds, seconds) = if quick { (3, 1.0) } else { (5, 1.0) };
        let (out, wires) = (PathBuf::from("target/bench"), WireKind::ALL.to_vec());
        let mut options = Self { out, contenders, wires, rounds, seconds, extras: true, goodput: true };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--no-extras" => options.extras = false,
                "--no-goodput" => options.goodput = false,
                _ => {}
            }
            if argument.starts_with("--no-") {
                continue;
            }
            let value = arguments.next().ok_or_else(|| format!("got {argument} without a value"))?;
            match argument.as_str() {
                "--out" => options.out = value.into(),
                "--rounds" => options.rounds = value.parse().map_err(|_| format!("got --rounds {value}, want a number"))?,
                "--seconds" => options.seconds = value.parse().map_err(|_| format!("got --seconds {value}, want a number"))?,
                "--only" => options.contenders = chosen(&value, &Contender::ALL, Contender::name)?,
                "--wires" => options.wires = chosen(&value, &WireKind::ALL, WireKind::name)?,
                _ => {
                    return Err(format!(
                        "got {argument}, want --out, --only, --wires, --rounds, --seconds, --no-extras or --no-goodput"
                    ));
                }
            }
        }
        Ok(options)
    }
}

fn chosen<T: Copy>(names: &str, all: &[T], name: impl Fn(T) -> &'static str) -> Result<Vec<T>, String> {
    let one = |wanted: &str| all.iter().copied().find(|one| name(*one) == wanted);
    let known = all.iter().map(|one| name(*one)).collect::<Vec<_>>().join(", ");
    names.split(',').map(|wanted| one(wanted).ok_or_else(|| format!("got {wanted:?}, want some of {known}"))).collect()
}

/// What is said while it goes on, with the minutes it has taken.
fn say(began: Instant, words: &str) {
    eprintln!("[{:>5.1} min] {words}", began.elapsed().as_secs_f64() / 60.0);
}

fn round(site: &Site, wire: WireKind, name: &'static str, options: &Options, turn: usize, samples: &mut Samples) -> Vec<String> {
    // Both directions, by turns.
    let pair = if turn.is_multiple_of(2) { site.pair() } else { site.pair().turned() };
    let seconds = options.seconds;
    let mut troubles = Vec::new();
    let mut note = |what: &str, result: Result<(), String>| troubles.extend(result.err().map(|why| format!("{what}: {why}")));
    note(
        "tcp1",
        tools::tcp(pair, 1, seconds).map(|bulk| {
            samples.add(wire, name, "tcp1_gbps", bulk.gbps);
            samples.add(wire, name, "cpu_s_per_gb", bulk.cpu_s_per_gb);
        }),
    );
    note("tcp4", tools::tcp(pair, 4, seconds).map(|bulk| samples.add(wire, name, "tcp4_gbps", bulk.gbps)));
    note(
        "udp64",
        tools::small(pair, seconds).map(|small| {
            samples.add(wire, name, "udp64_kpps", small.kpps);
            samples.add(wire, name, "reordered", small.reordered as f64);
        }),
    );
    note(
        "rtt",
        tools::rtt(pair, seconds).map(|rtt| {
            samples.add(wire, name, "rtt_p50_us", rtt.p50);
            samples.add(wire, name, "rtt_p99_us", rtt.p99);
        }),
    );
    note("loaded rtt", tools::loaded_rtt(pair, seconds).map(|rtt| samples.add(wire, name, "rtt_p99_loaded_us", rtt.p99)));
    troubles
}

fn bars(samples: &Samples, switchd: &Value, seal_tax: &Value) -> Vec<Bar> {
    use WireKind::{Jumbo, Segmented, Whole};
    let (plain, sealed) = ("violin-plain", "violin-sealed");
    let mut all = Vec::new();
    let mut bar = |name: &str, got: Option<f64>, want: f64, aim: f64, more: bool| {
        all.push(Bar { name: name.to_owned(), got, want, aim, more });
    };
    bar("plain whole tcp1", samples.ratio(Whole, plain, "tcp1_gbps"), 0.6, 0.75, true);
    bar("plain whole tcp4", samples.ratio(Whole, plain, "tcp4_gbps"), 0.65, 0.85, true);
    bar("plain segmented tcp1", samples.ratio(Segmented, plain, "tcp1_gbps"), 0.85, 1.0, true);
    bar("sealed whole tcp1", samples.ratio(Whole, sealed, "tcp1_gbps"), 0.4, 0.5, true);
    bar("sealed segmented tcp1", samples.ratio(Segmented, sealed, "tcp1_gbps"), 0.6, 0.7, true);
    let of = |wire, name| samples.of(wire, name, "tcp1_gbps");
    let jumbo = of(Jumbo, sealed).zip(of(Segmented, sealed)).map(|(jumbo, segmented)| jumbo / segmented);
    bar("sealed jumbo tcp1 / its own segmented", jumbo, 1.5, 1.5, true);
    for wire in WireKind::ALL {
        let against = |rival| of(wire, sealed).zip(of(wire, rival)).map(|(ours, theirs)| ours / theirs);
        bar(&format!("sealed {} tcp1 / vxlan-wg", wire.name()), against("vxlan-wg"), 1.5, 1.5, true);
        let rivals = ["vpncloud", "fastd", "tinc", "openvpn", "n2n"].into_iter().filter_map(against);
        let fastest = rivals.reduce(f64::min);
        bar(&format!("sealed {} tcp1 / fastest other rival", wire.name()), fastest, 5.0, 5.0, true);
    }
    for name in [plain, sealed] {
        bar(&format!("{name} whole 64-byte"), samples.ratio(Whole, name, "udp64_kpps"), 1.0, 1.0, true);
        bar(&format!("{name} whole rtt p50"), samples.ratio(Whole, name, "rtt_p50_us"), 1.35, 1.2, false);
    }
    bar("seal tax / the AEAD alone", seal_tax["ratio"].as_f64(), 1.2, 1.2, false);
    bar("idle, % of a core", switchd["idle_cpu_percent"].as_f64(), 0.2, 0.2, false);
    bar("resident, MiB", switchd["rss_mib"].as_f64(), 40.0, 40.0, false);
    bar("reordered within a flow", switchd["reordered"].as_f64(), 0.0, 0.0, false);
    all
}

fn run(options: &Options) -> Result<bool, String> {
    let began = Instant::now();
    let (mut samples, mut why_not) = (Samples::default(), BTreeMap::new());
    for &wire in &options.wires {
        let mut sites = Vec::new();
        for &contender in &options.contenders {
            say(began, &format!("{}: setting up {}", wire.name(), contender.name()));
            match contender.set_up(wire) {
                Ok(site) => sites.push((contender, site)),
                Err(why) => {
                    say(began, &format!("{} is left out: {why}", contender.name()));
                    why_not.insert(contender.name(), why);
                }
            }
        }
        for turn in 0..options.rounds {
            for (contender, site) in &sites {
                let name = contender.name();
                let troubles = round(site, wire, name, options, turn, &mut samples);
                let tcp = samples.of(wire, name, "tcp1_gbps").unwrap_or(f64::NAN);
                let words =
                    format!("{}, round {} of {}: {name}: tcp1 {tcp:.2} Gbit/s so far", wire.name(), turn + 1, options.rounds);
                say(began, &words);
                troubles.iter().for_each(|trouble| say(began, &format!("  {name}: {trouble}")));
            }
        }
    }
    let mut switchd = json!({});
    let (mut flood, mut goodput) = (json!("not_run"), Vec::new());
    if options.extras {
        say(began, "an idle switch with three peers");
        switchd = extras::idle(10);
        say(began, "a guest that floods, and its neighbours");
        flood = extras::flood(3.0).unwrap_or_else(|why| json!({ "failed": why }));
        let quick = options.contenders.len() <= Contender::QUICK.len();
        let over = [Contender::Vxlan, Contender::ViolinPlain, Contender::ViolinSealed];
        let (losses, rounds) = (&[0.0, 0.1, 1.0][..], if quick { 1 } else { 5 });
        goodput = extras::goodput(&over, losses, rounds, 4.0, |words| say(began, words));
    }
    let reordered: f64 = WireKind::ALL
        .iter()
        .flat_map(|wire| ["violin-plain", "violin-sealed"].map(|name| samples.sum(*wire, name, "reordered")))
        .sum();
    switchd["reordered"] = json!(reordered);
    let (aead, ideal) = extras::aead_seconds_per_gb();
    let cpu = |name| samples.of(WireKind::Segmented, name, "cpu_s_per_gb");
    let tax = cpu("violin-sealed").zip(cpu("violin-plain")).map(|(sealed, plain)| sealed - plain);
    let seal_tax = json!({ "s_per_gb": tax, "aead": aead, "ratio": tax.map(|tax| tax / ideal) });

    let names = Contender::ALL.map(Contender::name);
    let bars = bars(&samples, &switchd, &seal_tax);
    println!("{}", samples.table(&names));
    bars.iter().for_each(|bar| println!("{}", bar.line()));
    let result = json!({
        "wires": samples.json(&names, &why_not), "switchd": switchd, "flood_rtt_p99_ms": flood["flood_rtt_p99_ms"], "flood": flood,
        "goodput": goodput, "seal_tax": seal_tax, "bars": bars.iter().map(Bar::json).collect::<Vec<_>>(),
        "rounds": options.rounds, "seconds": options.seconds, "minutes": began.elapsed().as_secs_f64() / 60.0,
        "inner_mtu": site::INNER_MTU, "wireguard": contenders::WIREGUARDS,
    });
    let write = |name: &str, text: String| {
        std::fs::create_dir_all(&options.out)
            .and_then(|()| std::fs::write(options.out.join(name), text))
            .map_err(|error| format!("{}: {error}", options.out.join(name).display()))
    };
    write("fabric.json", serde_json::to_string_pretty(&result).map_err(|error| error.to_string())?)?;
    write("fabric.svg", samples.svg(&names))?;
    say(began, &format!("written to {}", options.out.display()));
    Ok(bars.iter().all(|bar| bar.holds() != Some(false)))
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some("relay") {
        let plan = PathBuf::from(arguments.next().unwrap_or_default());
        return match violin_lab::relay::run(&plan) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("relay: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let options = match Options::read() {
        Ok(options) => options,
        Err(why) => {
            eprintln!("bench-fabric: {why}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("bench-fabric: some bars are missed");
            ExitCode::FAILURE
        }
        Err(why) => {
            eprintln!("bench-fabric: {why}");
            ExitCode::from(2)
        }
    }
}
