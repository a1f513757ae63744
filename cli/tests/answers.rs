//! What the command makes of a manager's answers.

mod fake;

use fake::{Manager, said};
use violin_common::api::Response;
use violin_common::api::adapt::{AdaptReply, AdaptRequest, HostSeen};
use violin_common::api::switch::{Counter, SwitchReply};

#[test]
fn an_access_namespace_of_another_machine_is_said_to_be_there() {
    let manager = Manager::of_alpha("/nowhere/va-alpha.h2");

    for words in [&["ssh", "alpha"][..], &["cp", "alpha:c1:/etc/hosts", "/dev/null"], &["run", "alpha", "--", "true"]] {
        let output = manager.violin(words).output().unwrap();

        assert_eq!(output.status.code(), Some(1), "{words:?}: {}", said(&output));
        assert!(said(&output).contains("run this on h2"), "{words:?}: {}", said(&output));
    }
}
