//! A whole sandbox guest: namespaces, private files, its ssh server, and a job in it.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PROBE: &str = env!("CARGO_BIN_EXE_violin-probe");

/// A guest in namespaces of its own, reachable from a namespace with 10.9.1.254. Undone when dropped.
struct Guest {
    names: [String; 2],
    folder: tempfile::TempDir,
    process: Child,
}

fn ip(words: &str) {
    let done = Command::new("ip").args(words.split_whitespace()).output().unwrap();
    assert!(done.status.success(), "ip {words}: {}", String::from_utf8_lossy(&done.stderr));
}

fn wait_for(what: &str, mut look: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(180);
    while !look() {
        assert!(Instant::now() < deadline, "waited 30 s for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Guest {
    fn start() -> Self {
        let names = ["outside", "guest"].map(|end| format!("vguest-{}-{end}", std::process::id()));
        for name in &names {
            ip(&format!("netns add {name}"));
        }
        ip(&format!("-n {} link add eth0 type veth peer name eth0 netns {}", names[1], names[0]));
        ip(&format!("-n {} link set eth0 up", names[0]));
        ip(&format!("-n {} address add 10.9.1.254/24 dev eth0", names[0]));
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("key");
        let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status().unwrap();
        assert!(made.success());
        let coded = Command::new("base64").arg("-w0").arg(&key).output().unwrap().stdout;
        let config = format!(
            "VIOLIN_NAME=c1\nVIOLIN_VM=alpha-c1\nVIOLIN_ENVIRONMENT=alpha\nVIOLIN_ADDRESS=10.9.1.1/24\n\
             VIOLIN_MAC=52:54:00:09:01:01\nVIOLIN_MTU=1400\nVIOLIN_HOSTS=10.9.1.1 c1\nVIOLIN_CANARY=7\n\
             VIOLIN_SSH_PUBLIC={}\nVIOLIN_SSH_PRIVATE={}\n",
            fs::read_to_string(key.with_extension("pub")).unwrap().trim(),
            String::from_utf8(coded).unwrap(),
        );
        let path = folder.path().join("guest.conf");
        fs::write(&path, config).unwrap();
        let console = fs::File::create(folder.path().join("console")).unwrap();
        let process = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", names[1]))
            .args(["unshare", "-muipf", "--kill-child", "--mount-proc", PROBE, "guest", "--config"])
            .arg(&path)
            .env("VIOLIN_SANDBOX", "1")
            .stdin(Stdio::null())
            .stdout(console.try_clone().unwrap())
            .stderr(console)
            .spawn()
            .unwrap();
        let guest = Self { names, folder, process };
        wait_for("the guest", || guest.console().lines().any(|line| line == "violin-guest: ready"));
        guest
    }

    fn console(&self) -> String {
        fs::read_to_string(self.folder.path().join("console")).unwrap()
    }

    /// What a command in the guest says, by ssh.
    fn ssh(&self, command: &str) -> Result<String, String> {
        let done = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.names[0]))
            .args(["ssh", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-i"])
            .arg(self.folder.path().join("key"))
            .args(["root@10.9.1.1", command])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&done.stdout).trim().to_owned();
        if done.status.success() { Ok(text) } else { Err(String::from_utf8_lossy(&done.stderr).into_owned()) }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

#[test]
#[ignore = "needs root, dropbear-bin, openmpi-bin and hpcc"]
fn a_sandbox_guest_keeps_the_contract() {
    let hosts = fs::read_to_string("/etc/hosts").unwrap();
    let guest = Guest::start();

    assert_eq!(guest.ssh("hostname"), Ok("c1".into()));
    assert_eq!(guest.ssh("cat /etc/hosts"), Ok("127.0.0.1 localhost\n10.9.1.1 c1".into()));
    assert_eq!(guest.ssh("stat -c %a /root/.ssh/id_ed25519"), Ok("600".into()));
    let link = guest.ssh("ip link show eth0").unwrap();
    assert!(link.contains("mtu 1400") && link.contains("52:54:00:09:01:01"), "{link}");
    assert_eq!(guest.ssh("ssh c1 hostname"), Ok("c1".into()), "nodes reach each other without being asked");

    // What it writes stays its own.
    guest.ssh("touch /root/mark /tmp/mark-of-guest /run/mark").unwrap();
    assert!(
        !fs::exists("/root/mark").unwrap() && !fs::exists("/tmp/mark-of-guest").unwrap() && !fs::exists("/run/mark").unwrap()
    );
    assert_eq!(fs::read_to_string("/etc/hosts").unwrap(), hosts);

    let counts = guest.ssh("violin-probe counts").unwrap();
    assert!(counts.contains("\"foreign\":0"), "{counts}");

    let result = guest.ssh("mpirun -np 2 --host c1:2 violin-probe hpl --n 200 --p 1 --q 2").unwrap();
    let result: serde_json::Value = serde_json::from_str(result.lines().last().unwrap()).unwrap();
    assert_eq!((&result["passed"], &result["n"]), (&serde_json::Value::Bool(true), &serde_json::json!(200)), "{result}");

    guest.ssh("kill $(cat /run/violin/dropbear.pid)").unwrap();
    wait_for("the ssh server to be started again", || guest.ssh("true").is_ok());
}
