//! `cp`: files into or out of a node, as scp does it. What was there stays until the whole has come.
//!
//! What comes out of a guest is never unpacked by a program: it is named here, file by file, and no set-user-ID bit leaves a
//! guest.

mod fetching;
mod sending;

use super::reach::{Way, quoted};
use crate::target::Target;
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;

/// What is kept and taken.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct How {
    /// Copy folders with all that is in them.
    #[arg(short, long)]
    recursive: bool,
    /// Keep times and modes as they are, whatever the umask.
    #[arg(short, long)]
    preserve: bool,
}

/// `ENV:NODE:PATH`, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Remote<'a> {
    environment: &'a str,
    node: &'a str,
    path: &'a str,
}

/// A path of a node; `None` of this machine. As with scp a slash before the first colon makes it one of here.
fn remote(text: &str) -> Result<Option<Remote<'_>>> {
    let Some((environment, rest)) = text.split_once(':').filter(|(environment, _)| !environment.contains('/')) else {
        return Ok(None);
    };
    let (node, path) = rest.split_once(':').with_context(|| format!("got {text:?}, want ENV:NODE:PATH (or ./{text})"))?;
    // As with scp, no path is the home folder, where a node's shell starts.
    Ok(Some(Remote { environment, node, path: if path.is_empty() { "." } else { path } }))
}

/// Copies: either all of `from` or `to` is `ENV:NODE:PATH`. One that cannot be copied does not keep the others.
pub(crate) fn copy(target: &Target, from: &[String], to: &str, how: How) -> Result<()> {
    let sources = from.iter().map(|from| remote(from)).collect::<Result<Vec<_>>>()?;
    let several = from.len() > 1;
    crate::signals::heed(fetching::end)?;
    let mut failed = 0;
    let mut note = |result: Result<()>| match result {
        Err(error) if several => {
            eprintln!("violin: {error:#}");
            failed += 1;
            Ok(())
        }
        result => result,
    };
    match remote(to)? {
        Some(to) if sources.iter().all(Option::is_none) => {
            let way = Way::open(target, &to.environment.parse()?)?;
            let node = Node { address: way.vm(Some(to.node))?.address, way: &way };
            for from in from {
                note(sending::send(&node, from, to.path, several, how).with_context(|| format!("{from} was not copied")))?;
            }
        }
        None if sources.iter().all(Option::is_some) => {
            if several && !Path::new(to).is_dir() {
                bail!("got {to}, want a folder that is there: several files were given");
            }
            for (text, from) in from.iter().zip(sources.into_iter().flatten()) {
                let way = Way::open(target, &from.environment.parse()?)?;
                let node = Node { address: way.vm(Some(from.node))?.address, way: &way };
                note(fetching::fetch(&node, from.path, Path::new(to), how).with_context(|| format!("{text} was not copied")))?;
            }
        }
        _ => bail!("got {} and {to:?}, want paths here and ENV:NODE:PATH, in either order", from.join(" ")),
    }
    if failed == 0 { Ok(()) } else { bail!("{failed} of {} not copied", from.len()) }
}

/// A node and the way to it.
#[derive(Debug)]
struct Node<'a> {
    way: &'a Way,
    address: std::net::Ipv4Addr,
}

impl Node<'_> {
    fn shell(&self, script: &str) -> Command {
        let mut command = self.way.ssh(self.address);
        command.arg(script);
        command
    }
}

/// A path in words of a node's shell, such that no tool takes it for an option.
fn at(path: &str) -> String {
    quoted(&if path.starts_with('/') { path.to_owned() } else { format!("./{path}") })
}

/// Last part of a path, by which a copy is called in a folder; of a folder without (`.`, `/`) what is in it is copied.
fn name(path: &str) -> Option<&str> {
    let name = path.trim_end_matches('/').rsplit('/').next()?;
    Some(name).filter(|name| !["", ".", ".."].contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slash_before_the_colon_makes_a_path_one_of_here() {
        let c1 = Remote { environment: "alpha", node: "c1", path: "/x:y" };
        assert_eq!(remote("alpha:c1:/x:y").unwrap(), Some(c1));
        assert_eq!(remote("alpha:c1:").unwrap(), Some(Remote { path: ".", ..c1 }));
        assert_eq!((remote("./a:b").unwrap(), remote("a").unwrap()), (None, None));
        assert!(remote("a:b").unwrap_err().to_string().contains("./a:b"));
    }

    #[test]
    fn what_has_no_name_of_its_own_is_its_content() {
        for (path, wanted) in [("/a/b", Some("b")), ("a/", Some("a")), (".", None), ("a/.", None), ("/", None), ("..", None)] {
            assert_eq!(name(path), wanted, "{path}");
        }
    }
}
