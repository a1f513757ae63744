//! The guest's ssh server (dropbear) and the files ssh and mpirun find in root's home.

use crate::config::GuestConfig;
use anyhow::{Context, Result, bail};
use std::fs::{self, OpenOptions, Permissions};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Everything a node needs to reach the others without being asked anything.
const CLIENT: &str = "Host *
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  IdentityFile /root/.ssh/id_ed25519
  BatchMode yes
  ServerAliveInterval 0
";

/// Open MPI over the environment's own network only. Ranks are not bound to cores: a sandbox guest sees all of the host's,
/// and every guest would bind to the first.
const MPI: &str = "btl = tcp,self,vader
btl_tcp_if_include = eth0
oob_tcp_if_include = eth0
pml = ob1
hwloc_base_binding_policy = none
plm_rsh_agent = ssh
plm_rsh_no_tree_spawn = 1
";

/// What the server says, a line or two a connection.
const LOG: &str = "/run/violin/ssh.log";
const HOST_KEY: &str = "/run/violin/dropbear_ed25519_host_key";

/// Writes root's files.
///
/// Errors: a file cannot be written.
pub fn write_files(config: &GuestConfig) -> Result<()> {
    let ssh = Path::new("/root/.ssh");
    fs::create_dir_all(ssh)?;
    fs::create_dir_all("/root/.openmpi")?;
    fs::create_dir_all("/run/violin")?;
    fs::set_permissions("/root", Permissions::from_mode(0o700))?;
    fs::set_permissions(ssh, Permissions::from_mode(0o700))?;
    let files: [(&str, &[u8]); 4] = [
        ("/root/.ssh/authorized_keys", config.ssh_public.as_bytes()),
        ("/root/.ssh/id_ed25519", &config.ssh_private),
        ("/root/.ssh/config", CLIENT.as_bytes()),
        ("/root/.openmpi/mca-params.conf", MPI.as_bytes()),
    ];
    for (path, bytes) in files {
        let mut bytes = bytes.to_vec();
        if bytes.last() != Some(&b'\n') {
            bytes.push(b'\n');
        }
        fs::write(path, bytes).with_context(|| format!("cannot write {path}"))?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
    }
    Ok(())
}

/// Makes the server's own key unless there is one.
///
/// Errors: what dropbearkey says.
pub fn make_host_key() -> Result<()> {
    if Path::new(HOST_KEY).exists() {
        return Ok(());
    }
    let made = Command::new("dropbearkey")
        .args(["-t", "ed25519", "-f", HOST_KEY])
        .output()
        .context("cannot run dropbearkey (package dropbear-bin)")?;
    if !made.status.success() {
        bail!("dropbearkey failed: {}", String::from_utf8_lossy(&made.stderr).trim());
    }
    Ok(())
}

/// Starts the server; returns its process number. Its sessions inherit what lets mpirun run as the guest's root.
///
/// Errors: it cannot be run.
pub fn start() -> Result<u32> {
    let log = OpenOptions::new().create(true).append(true).open(LOG).with_context(|| format!("cannot write {LOG}"))?;
    let server = Command::new("dropbear")
        .args(["-F", "-E", "-e", "-s", "-m", "-p", "22", "-r", HOST_KEY, "-P", "/run/violin/dropbear.pid"])
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMP_NUM_THREADS", "1")
        .env("OPENBLAS_NUM_THREADS", "1")
        .current_dir("/root")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context("cannot run dropbear (package dropbear-bin)")?;
    Ok(server.id())
}

/// Waits until the server answers as one.
///
/// Errors: it does not within `limit`.
pub fn wait(limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        if answers() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let said = fs::read_to_string(LOG).unwrap_or_default();
            bail!("the ssh server does not answer on port 22 after {} s; it said: {}", limit.as_secs(), said.trim());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn answers() -> bool {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 22));
    let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_secs(5)) else { return false };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).is_ok() && line.starts_with("SSH-2.0-")
}
