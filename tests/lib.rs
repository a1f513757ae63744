//! What the tests of the whole share: hosts as network namespaces, real `switchd` processes, guests as raw sockets.
//!
//! Names carry the test process's id, so runs do not collide; whatever a killed run left is swept by the next.
#![allow(unsafe_code)]

pub mod fabric;
pub mod frames;
pub mod guests;
pub mod netns;
pub mod wire;

use std::time::{Duration, Instant};

/// Patience with what must come: a limit costs only when a test fails, and a machine with other work is several times slower.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Looks every 5 ms until `what` holds; panics in words after `limit`.
pub fn eventually(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {limit:?} until {what}, in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Where the programs under test are: `VIOLIN_BIN`, else target/release of this workspace.
pub fn program(name: &str) -> std::path::PathBuf {
    let folder = std::env::var_os("VIOLIN_BIN")
        .map_or_else(|| std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release"), Into::into);
    let path = folder.join(name);
    assert!(path.exists(), "got no {}, want the programs built: run `make build`", path.display());
    path
}
