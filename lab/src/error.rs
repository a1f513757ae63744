//! What can go wrong with a lab, in words that say what to do.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use violin_common::config::ConfigError;

/// Result of this crate.
pub type Result<T, E = LabError> = std::result::Result<T, E>;

/// A lab could not be built, looked at or removed.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The lab file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A name was not one.
    #[error("{0}")]
    Name(String),
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] violin_channel::pki::PkiError),
    /// The system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program failed.
    #[error("`{command}` ended with {status}: {said}")]
    Command {
        /// Program and arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to its standard error.
        said: String,
    },
    /// A daemon ended before it was ready.
    #[error("{what} ended at once; the end of {}:\n{tail}", log.display())]
    Died {
        /// Which.
        what: String,
        /// Its log.
        log: PathBuf,
        /// Last lines of it.
        tail: String,
    },
    /// Something did not come about in time.
    #[error("waited {seconds} s for {what}, in vain{}", hint(log))]
    Timeout {
        /// What.
        what: String,
        /// How long.
        seconds: u64,
        /// Where to look.
        log: Option<PathBuf>,
    },
    /// A program or file that must be there is not.
    #[error("got no {}, want {wanted}", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// What it is and how it comes there.
        wanted: String,
    },
    /// A lab of that name stands.
    #[error("lab {name} is up (its owner, process {owner}, lives); end it with `violin lab down {name}` or give another --name")]
    AlreadyUp {
        /// Name.
        name: String,
        /// Process that owns it.
        owner: u32,
    },
    /// Somebody else is building or removing the lab.
    #[error("lab {0} is being built or removed by another process; wait for it or end it")]
    Busy(String),
    /// No lab of that name.
    #[error("there is no lab {0}; `violin lab list` shows those there are")]
    NoSuchLab(String),
    /// Something of the lab could not be removed.
    #[error("lab {name} is not all gone: {left}")]
    Left {
        /// Name.
        name: String,
        /// What stayed and why.
        left: String,
    },
    /// Interrupted by the operator.
    #[error("interrupted")]
    Cancelled,
}

fn hint(log: &Option<PathBuf>) -> String {
    log.as_ref().map(|log| format!("; see {}", log.display())).unwrap_or_default()
}

/// Turns an [`io::Error`] into a [`LabError`] that says what was done.
pub(crate) trait Doing<T> {
    /// Adds what was being done.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| LabError::Io { what: what(), source: error.into() })
    }
}

impl LabError {
    pub(crate) fn no_helper() -> Self {
        Self::Missing { path: "helper".into(), wanted: "the command of the lab's own helpers (UpOptions::helper)".to_owned() }
    }
}
