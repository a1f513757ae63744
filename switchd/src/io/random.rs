//! Numbers from the operating system's random source: nobody can guess them, and no two starts draw the same.

use crate::switch::Drawn;
use std::io;

/// 64 random bits. Errors: the kernel has no random source, as in a chroot without one before Linux 3.17.
pub fn number() -> io::Result<u64> {
    getrandom::u64().map_err(io::Error::other)
}

/// What a new connection needs.
pub fn drawn() -> io::Result<Drawn> {
    Ok(Drawn { index: getrandom::u32().map_err(io::Error::other)?, cookie: number()? })
}
