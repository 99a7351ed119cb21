//! Which instructions find the words: all tiers find the same ones.

use std::sync::OnceLock;

use super::MaxDigits;
use super::scalar;
use super::words::WordEnds;
use crate::Error;

/// The environment variable that chooses a tier by its name.
const VARIABLE: &str = "RUSTBPE_SIMD";

/// A set of instructions, the fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// x86-64 with AVX-512BW.
    Avx512,
    /// x86-64 with AVX2.
    Avx2,
    /// 64-bit Arm.
    Neon,
    /// Any processor.
    Scalar,
}

/// Find words from a start on until the buffer is full or the text ends, as `blocks::find_ends`.
pub(super) type FindEnds = fn(&[u8], usize, MaxDigits, &mut WordEnds);

impl Tier {
    const ALL: [Tier; 4] = [Tier::Avx512, Tier::Avx2, Tier::Neon, Tier::Scalar];

    /// The tiers that this processor can run, the fastest first.
    pub fn available() -> impl Iterator<Item = Tier> {
        Self::ALL.into_iter().filter(|tier| tier.find_ends().is_some())
    }

    /// The tier that `RUSTBPE_SIMD` names, else the fastest. The variable is read once.
    ///
    /// Fails when the variable names no tier that this processor can run.
    pub fn chosen() -> Result<Self, Error> {
        static CHOSEN: OnceLock<Result<Tier, String>> = OnceLock::new();
        let chosen = CHOSEN.get_or_init(|| match std::env::var_os(VARIABLE) {
            Some(name) => Self::named(&name.to_string_lossy()),
            None => Ok(Self::available().next().unwrap_or(Tier::Scalar)),
        });
        chosen.clone().map_err(Error::Invalid)
    }

    pub fn name(self) -> &'static str {
        match self {
            Tier::Avx512 => "avx512",
            Tier::Avx2 => "avx2",
            Tier::Neon => "neon",
            Tier::Scalar => "scalar",
        }
    }

    /// Fails with a message that names what there is.
    fn named(name: &str) -> Result<Self, String> {
        Self::available().find(|tier| tier.name() == name).ok_or_else(|| {
            format!(
                "{VARIABLE}={name}: this processor has {}; set one of these or nothing",
                available_names()
            )
        })
    }

    pub(super) fn missing(self) -> Error {
        Error::Invalid(format!(
            "this processor cannot split with {}; it has {}",
            self.name(),
            available_names()
        ))
    }

    /// `None` where this processor cannot run it.
    pub(super) fn find_ends(self) -> Option<FindEnds> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 => super::x86::avx512(),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => super::x86::avx2(),
            #[cfg(target_arch = "aarch64")]
            Tier::Neon => super::neon::neon(),
            Tier::Scalar => Some(find_ends_by_bytes),
            #[allow(unreachable_patterns)]
            _ => None,
        }
    }
}

fn available_names() -> String {
    Tier::available().map(Tier::name).collect::<Vec<_>>().join(", ")
}

fn find_ends_by_bytes(text: &[u8], start: usize, max_digits: MaxDigits, ends: &mut WordEnds) {
    let mut at = start;
    while at < text.len() && ends.has_room() {
        at = scalar::word_end(text, at, max_digits);
        ends.push(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_available_tier_is_found_by_its_name() {
        for tier in Tier::available() {
            assert_eq!(Tier::named(tier.name()), Ok(tier));
        }
        assert!(Tier::available().any(|tier| tier == Tier::Scalar));
    }

    #[test]
    fn an_unknown_or_missing_tier_is_an_error_that_names_what_there_is() {
        let missing = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
        for name in ["", "sse9", "AVX2", missing] {
            let message = Tier::named(name).unwrap_err();
            assert!(
                message.starts_with(&format!("RUSTBPE_SIMD={name}: ")) && message.contains("scalar"),
                "{message}"
            );
        }
    }
}
