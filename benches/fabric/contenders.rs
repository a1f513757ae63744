//! Who is measured, and how each is set up: as its own documentation says, with no more than what the topology asks for.

use crate::site::{GUESTS, HOSTS, INNER_MTU, Site, WireKind};
use std::path::PathBuf;
use violin_common::{DomainId, HostId};
use violin_tests::netns::Netns;
use violin_tests::program;

/// A contender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contender {
    /// The wire alone: the limit.
    Veth,
    /// Kernel VXLAN, a bridge, and veth to the guest: the reference.
    Vxlan,
    /// Kernel VXLAN with the address on it.
    VxlanBare,
    /// This project, unsealed.
    ViolinPlain,
    /// This project as it comes.
    ViolinSealed,
    /// Kernel VXLAN and a bridge over a user-space WireGuard.
    VxlanWg,
    /// vpncloud.
    Vpncloud,
    /// fastd.
    Fastd,
    /// tinc.
    Tinc,
    /// OpenVPN, TAP.
    Openvpn,
    /// n2n.
    N2n,
}

impl Contender {
    pub(crate) const ALL: [Self; 11] = [
        Self::Veth,
        Self::Vxlan,
        Self::VxlanBare,
        Self::ViolinPlain,
        Self::ViolinSealed,
        Self::VxlanWg,
        Self::Vpncloud,
        Self::Fastd,
        Self::Tinc,
        Self::Openvpn,
        Self::N2n,
    ];
    /// Those that a quick run measures.
    pub(crate) const QUICK: [Self; 4] = [Self::Veth, Self::Vxlan, Self::ViolinPlain, Self::ViolinSealed];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Veth => "veth",
            Self::Vxlan => "vxlan",
            Self::VxlanBare => "vxlan-bare",
            Self::ViolinPlain => "violin-plain",
            Self::ViolinSealed => "violin-sealed",
            Self::VxlanWg => "vxlan-wg",
            Self::Vpncloud => "vpncloud",
            Self::Fastd => "fastd",
            Self::Tinc => "tinc",
            Self::Openvpn => "openvpn",
            Self::N2n => "n2n",
        }
    }

    /// Sets it up on a wire of its own. Errors: a program is missing.
    pub(crate) fn set_up(self, wire: WireKind) -> Result<Site, String> {
        self.set_up_over(wire, |_| ())
    }

    /// The same on hosts that were joined otherwise before anything starts.
    pub(crate) fn set_up_over(self, wire: WireKind, join: impl FnOnce(&Site)) -> Result<Site, String> {
        let mut site = match self {
            Self::Veth => Site::bare(wire),
            // VXLAN in WireGuard takes 110 bytes; so that guests keep their MTU unfragmented, its wire is a little wider.
            Self::VxlanWg => Site::new(wire, 20),
            _ => Site::new(wire, 0),
        };
        join(&site);
        match self {
            Self::Veth => {}
            Self::Vxlan => {
                vxlan(&site, &HOSTS);
                site.bridge("vx0");
            }
            Self::VxlanBare => {
                vxlan(&site, &HOSTS);
                for (host, address) in site.hosts.iter().zip(GUESTS) {
                    host.ip(&format!("link set vx0 mtu {INNER_MTU} up"));
                    host.ip(&format!("addr add {address}/24 dev vx0"));
                }
            }
            Self::ViolinPlain => violin(&mut site, wire, true),
            Self::ViolinSealed => violin(&mut site, wire, false),
            Self::VxlanWg => vxlan_wg(&mut site)?,
            Self::Vpncloud => vpncloud(&mut site)?,
            Self::Fastd => fastd(&mut site)?,
            Self::Tinc => tinc(&mut site)?,
            Self::Openvpn => openvpn(&mut site)?,
            Self::N2n => n2n(&mut site)?,
        }
        site.wait(self.name());
        Ok(site)
    }
}

fn vxlan(site: &Site, addresses: &[&str; 2]) {
    for (index, host) in site.hosts.iter().enumerate() {
        let (ours, theirs) = (addresses[index], addresses[1 - index]);
        host.ip(&format!("link add vx0 type vxlan id 7 local {ours} remote {theirs} dstport 4789"));
    }
}

/// Two switches with a packet port each: see docs/quickstart.md for the shortest configuration.
fn violin(site: &mut Site, wire: WireKind, plain: bool) {
    site.add_guests();
    let names: [HostId; 2] = ["a", "b"].map(|name| name.parse().expect("a legal name"));
    let domain: DomainId = "d1".parse().expect("a legal name");
    let pki = site.directory.path().join("pki");
    let members = names.clone().map(|name| (name, domain.clone()));
    violin_channel::pki::write_pki(&pki, "bench", &members).expect("certificates are made");
    for (index, name) in names.iter().enumerate() {
        let (tls, socket) = (violin_channel::pki::paths(&pki, name), site.directory.path().join(format!("{name}.sock")));
        let plain = if plain { "plain = [{ domain = \"d1\", interface = \"under\" }]\n" } else { "" };
        let text = format!(
            "host = \"{name}\"\ndomain = \"d1\"\nlisten = \"{}:7471\"\njoin = [\"{}:7471\"]\nsocket = {socket:?}\n\
             underlay-mtu = {}\n{plain}[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n[[network]]\nvni = 7\nmtu = {INNER_MTU}\n\
             [[port]]\nkind = \"packet\"\nvni = 7\ninterface = \"port\"\n",
            HOSTS[index],
            HOSTS[1 - index],
            wire.mtu(),
            tls.ca,
            tls.cert,
            tls.key,
        );
        let file = site.directory.path().join(format!("{name}.toml"));
        std::fs::write(&file, text).expect("a file is written");
        site.start(index, program("switchd"), &["--config", &file.to_string_lossy()], &[]);
    }
}

/// Where a rival's program is, from Debian or built as a crate.
fn rival(name: &str) -> Result<PathBuf, String> {
    let built = PathBuf::from("target/tools/rivals/bin").join(name);
    let places = ["/usr/sbin", "/usr/bin"].map(|place| PathBuf::from(place).join(name));
    let found = std::iter::once(built).chain(places).find(|path| path.exists());
    found.ok_or_else(|| format!("{name} is not installed: scripts/setup bench"))
}

/// The user-space WireGuards there are, fastest first as measured here; see benches/README.md.
pub(crate) const WIREGUARDS: [&str; 3] = ["gotatun", "boringtun-cli", "wireguard-go"];

fn vxlan_wg(site: &mut Site) -> Result<(), String> {
    let chosen = std::env::var("WIREGUARD").ok();
    let names: Vec<&str> = chosen.as_deref().map_or_else(|| WIREGUARDS.to_vec(), |name| vec![name]);
    let program = names.iter().find_map(|name| rival(name).ok()).ok_or("no user-space WireGuard: scripts/setup bench")?;
    let inner = ["10.98.0.1", "10.98.0.2"];
    let keys = [0, 1].map(|_| crate::site::shell("wg genkey").trim().to_owned());
    let public = [0, 1].map(|index| crate::site::shell(&format!("echo {} | wg pubkey", keys[index])).trim().to_owned());
    for index in 0..2 {
        let name = format!("wg{}{index}", std::process::id() % 100_000);
        site.start(index, &program, &["-f", &name], &[("WG_PROCESS_FOREGROUND", "1"), ("WG_SUDO", "1")]);
        let file = site.directory.path().join(format!("key{index}"));
        std::fs::write(&file, &keys[index]).expect("a file is written");
        let host = &site.hosts[index];
        violin_tests::eventually("WireGuard's interface is there", violin_tests::PATIENCE, || {
            host.run("wg", &format!("show {name}")).status.success()
        });
        let (theirs, endpoint) = (&public[1 - index], HOSTS[1 - index]);
        let words = format!(
            "set {name} private-key {} listen-port 51820 peer {theirs} allowed-ips 10.98.0.0/24 endpoint {endpoint}:51820",
            file.display()
        );
        let output = host.run("wg", &words);
        assert!(output.status.success(), "wg: {}", String::from_utf8_lossy(&output.stderr));
        host.ip(&format!("addr add {}/24 dev {name}", inner[index]));
        host.ip(&format!("link set {name} mtu {} up", INNER_MTU + 50));
    }
    vxlan(site, &inner);
    site.bridge("vx0");
    Ok(())
}

/// Starts a rival whose TAP is called `tap0`, and bridges it to the guest once it is there.
fn bridged(site: &mut Site) {
    for host in &site.hosts {
        wait_for(host, "tap0");
        host.ip("link set tap0 mtu 1400 up");
    }
    site.bridge("tap0");
}

fn wait_for(host: &Netns, interface: &str) {
    violin_tests::eventually(&format!("{interface} is there"), violin_tests::PATIENCE, || {
        host.run("ip", &format!("link show {interface}")).status.success()
    });
}

fn vpncloud(site: &mut Site) -> Result<(), String> {
    let program = rival("vpncloud")?;
    for index in 0..2 {
        let (ours, theirs) = (HOSTS[index], format!("{}:3210", HOSTS[1 - index]));
        // It asks for a way out before it starts.
        site.hosts[index].ip(&format!("route add default dev under src {ours}"));
        let arguments = [
            "--no-port-forwarding",
            "--type",
            "tap",
            "--device",
            "tap0",
            "--mode",
            "switch",
            "--password",
            "bench",
            "--listen",
            "3210",
            "--peer",
            &theirs,
        ];
        site.start(index, &program, &arguments, &[]);
    }
    bridged(site);
    Ok(())
}

fn fastd(site: &mut Site) -> Result<(), String> {
    let program = rival("fastd")?;
    let keys = [0, 1].map(|_| {
        let text = crate::site::shell(&format!("{} --generate-key 2>/dev/null", program.display()));
        let key = |word: &str| text.lines().find_map(|line| line.strip_prefix(word)).unwrap_or_default().trim().to_owned();
        (key("Secret: "), key("Public: "))
    });
    for index in 0..2 {
        let text = format!(
            "mode tap;\ninterface \"tap0\";\nmethod \"salsa2012+umac\";\nmtu 1400;\nbind {}:10000;\nsecret \"{}\";\n\
             peer \"other\" {{ key \"{}\"; remote {}:10000; }}\n",
            HOSTS[index],
            keys[index].0,
            keys[1 - index].1,
            HOSTS[1 - index]
        );
        let file = site.directory.path().join(format!("fastd{index}.conf"));
        std::fs::write(&file, text).expect("a file is written");
        site.start(index, &program, &["-c", &file.to_string_lossy()], &[]);
    }
    bridged(site);
    Ok(())
}

fn tinc(site: &mut Site) -> Result<(), String> {
    let program = rival("tincd")?;
    let directories = [0, 1].map(|index| site.directory.path().join(format!("tinc{index}")));
    for (index, directory) in directories.iter().enumerate() {
        std::fs::create_dir_all(directory.join("hosts")).expect("a folder");
        let text = format!("Name = n{index}\nConnectTo = n{}\nMode = switch\nDeviceType = tap\nInterface = tap0\n", 1 - index);
        std::fs::write(directory.join("tinc.conf"), text).expect("a file is written");
        let host = format!("Address = {}\nPort = 655\nCipher = aes-256-cbc\nDigest = sha256\n", HOSTS[index]);
        std::fs::write(directory.join(format!("hosts/n{index}")), host).expect("a file is written");
        crate::site::shell(&format!("{} -c {} -K2048 </dev/null >/dev/null 2>&1", program.display(), directory.display()));
    }
    for (index, directory) in directories.iter().enumerate() {
        let other = 1 - index;
        std::fs::copy(directories[other].join(format!("hosts/n{other}")), directory.join(format!("hosts/n{other}")))
            .expect("a file is copied");
    }
    for (index, directory) in directories.iter().enumerate() {
        let pid = directory.join("pid");
        let arguments = ["-D", "-c", &directory.to_string_lossy(), &format!("--pidfile={}", pid.display())];
        site.start(index, &program, &arguments, &[]);
    }
    bridged(site);
    Ok(())
}

fn openvpn(site: &mut Site) -> Result<(), String> {
    let program = rival("openvpn")?;
    let key = site.directory.path().join("static.key");
    crate::site::shell(&format!("{} --genkey secret {}", program.display(), key.display()));
    for index in 0..2 {
        let arguments = format!(
            "--dev tap0 --dev-type tap --proto udp --port 1194 --local {} --remote {} 1194 --secret {} --cipher AES-256-CBC \
             --allow-deprecated-insecure-static-crypto --auth SHA256 --sndbuf 1048576 --rcvbuf 1048576 --fast-io --verb 1",
            HOSTS[index],
            HOSTS[1 - index],
            key.display()
        );
        let arguments: Vec<&str> = arguments.split_whitespace().collect();
        site.start(index, &program, &arguments, &[]);
    }
    bridged(site);
    Ok(())
}

fn n2n(site: &mut Site) -> Result<(), String> {
    let (edge, supernode) = (rival("edge")?, rival("supernode")?);
    site.start(0, supernode, &["-l", "7777", "-f"], &[]);
    for index in 0..2 {
        let (address, mac) = (format!("10.97.0.{}", index + 1), format!("02:00:00:00:97:0{index}"));
        let at = format!("{}:7777", HOSTS[0]);
        let arguments =
            ["-d", "tap0", "-a", &address, "-c", "bench", "-k", "bench", "-l", &at, "-m", &mac, "-M", "1400", "-r", "-E", "-f"];
        site.start(index, &edge, &arguments, &[]);
    }
    bridged(site);
    Ok(())
}
