//! What can go wrong, said for the person who must act.

use std::fmt;
use std::io;
use std::path::PathBuf;

#[derive(Debug)]
pub enum Error {
    /// The file system refused.
    Io { path: PathBuf, source: io::Error },
    /// An argument or the content of a file cannot be used; the message is complete.
    Invalid(String),
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { path, source } => write!(formatter, "{}: {source}", path.display()),
            Error::Invalid(message) => formatter.write_str(message),
        }
    }
}

impl std::error::Error for Error {}
