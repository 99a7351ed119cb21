//! Byte-pair encoding over bytes: split text into words, count them, learn merges, encode.
//!
//! The path of a training is `split` → `count` → (`counts_file`) → `merge`. Counts are exactly
//! additive, so shards can be counted anywhere and at any time, and training from their counts
//! files equals training on the files at once. `python` is the Python module (feature `python`).

pub mod count;
pub mod counts_file;
pub mod encode;
pub mod error;
mod memory;
pub mod merge;
#[cfg(feature = "python")]
mod python;
pub mod split;
pub mod unicode;

pub use error::Error;
