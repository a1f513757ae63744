//! Settings of the kernel under `/proc/sys`.

use std::fs;
use std::io;
use std::path::Path;

/// Gives a setting a value if it has another. In many containers `/proc/sys` cannot be written, and mostly need not be.
///
/// `name` is its path there, such as `net/ipv6/conf/eth0/disable_ipv6`.
///
/// *Errors*: NotFound where the kernel has no such setting, or what it belongs to has gone; otherwise what it is and what is wanted.
pub fn set(name: &str, value: &str) -> io::Result<()> {
    set_file(&Path::new("/proc/sys").join(name), value)
}

fn set_file(file: &Path, value: &str) -> io::Result<()> {
    let is = fs::read_to_string(file)?;
    if is.trim() == value {
        return Ok(());
    }
    fs::write(file, value).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => error,
        kind => {
            let (file, is) = (file.display(), is.trim());
            io::Error::new(kind, format!("{file} is {is} and cannot be written ({error}): want it set to {value} from outside"))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("setting");
        fs::write(&file, "1\n").unwrap();

        set_file(&file, "1").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "1\n");
        set_file(&file, "0").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "0");
        assert_eq!(set("net/no/such/setting", "1").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
