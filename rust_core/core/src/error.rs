//! The crate's one error enum. The binding maps it to Python exceptions in one place.

use std::fmt;

/// Errors, by whose fault they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The caller's value is out of range; the message names it. Becomes `ValueError`.
    InvalidArgument(String),
    /// An invariant of the core is broken; the message names it. Becomes `RuntimeError`.
    Integrity(String),
    /// A panic was caught at the boundary. Becomes `RuntimeError`.
    Panic(String),
}

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::InvalidArgument`] from anything printable.
    pub fn invalid(message: impl Into<String>) -> Self {
        Error::InvalidArgument(message.into())
    }

    /// An [`Error::Integrity`] from anything printable.
    pub fn integrity(message: impl Into<String>) -> Self {
        Error::Integrity(message.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::InvalidArgument(message) => f.write_str(message),
            Error::Integrity(message) => write!(f, "broken invariant: {message}"),
            Error::Panic(message) => write!(f, "internal error: {message}"),
        }
    }
}

impl std::error::Error for Error {}
