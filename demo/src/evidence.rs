//! What the daemons wrote, put beside the report before the lab goes; after a failed demo, too.

use crate::stage::Stage;
use anyhow::{Context, Result};
use std::path::Path;
use violin_common::api::adapt::{AdaptReply, AdaptRequest};

/// Keeps the manager's decisions, moves and journal, and all daemons' logs. What cannot be had is named and left out.
pub(crate) fn keep(stage: &Stage, evidence: &Path) {
    let listed = [
        ("decisions", AdaptRequest::DecisionList { last: u32::MAX }),
        ("migrations", AdaptRequest::MigrationList),
        ("vms", AdaptRequest::VmList),
    ];
    for (name, request) in listed {
        complain(name, list(stage, &request, &evidence.join(format!("{name}.json"))));
    }
    // A copy of a store in use; what the manager said of it is in the lists above.
    let journal = stage.lab.adaptd.dir.join("adaptd.redb");
    complain("the journal", copy(&journal, &evidence.join("adaptd.redb")));
    complain("the lab's logs", copy_logs(&stage.lab.dir, "lab", evidence));
    for host in &stage.lab.hosts {
        complain("a host's logs", copy_logs(&host.dir, host.host.as_str(), evidence));
    }
    if stage.lab.adaptd.dir != stage.lab.dir {
        complain("the manager's log", copy_logs(&stage.lab.adaptd.dir, "manager", evidence));
    }
}

fn complain(what: &str, result: Result<()>) {
    if let Err(error) = result {
        crate::shell::say(&format!("evidence lacks {what}: {error:#}"));
    }
}

fn list(stage: &Stage, request: &AdaptRequest, to: &Path) -> Result<()> {
    let text = match stage.ask(request)? {
        AdaptReply::Decisions(decisions) => serde_json::to_string_pretty(&decisions)?,
        AdaptReply::Migrations(migrations) => serde_json::to_string_pretty(&migrations)?,
        AdaptReply::Vms(vms) => serde_json::to_string_pretty(&vms)?,
        other => anyhow::bail!("got {other:?}, want a list"),
    };
    std::fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}", from.display()))
}

/// Copies `*.log` of a folder, `OWNER-` before each name.
fn copy_logs(folder: &Path, owner: &str, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if let (Some("log"), Some(name)) = (path.extension().and_then(|end| end.to_str()), path.file_name()) {
            copy(&path, &to.join(format!("{owner}-{}", name.to_string_lossy())))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_keep_their_owners_name() {
        let folder = std::env::temp_dir().join(format!("violin-demo-evidence-{}", std::process::id()));
        let (from, to) = (folder.join("h1"), folder.join("evidence"));
        std::fs::create_dir_all(&from).unwrap();
        std::fs::create_dir_all(&to).unwrap();
        std::fs::write(from.join("switchd.log"), "words").unwrap();
        std::fs::write(from.join("switchd.toml"), "").unwrap();
        copy_logs(&from, "h1", &to).unwrap();
        let kept: Vec<_> = std::fs::read_dir(&to).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(kept, ["h1-switchd.log"]);
        assert!(copy_logs(&folder.join("none"), "h2", &to).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
