//! The class of a character, as far as the GPT-4 patterns tell characters apart.
//!
//! The tables are those of the regular-expression engine, so a text splits alike with and without
//! it; a test compares them for every code point. To take over a new Unicode version of the engine:
//! `cargo test write_the_tables -- --ignored`.

mod tables;

pub use tables::UNICODE_VERSION;
use tables::{PAGES, SIGNS};

/// Characters in a page: those that differ only in the last byte of their UTF-8.
const PAGE: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s` other than a newline
    Blank,
    /// `\r` or `\n`
    Newline,
    /// None of these: punctuation, symbols, marks, control characters, unassigned code points.
    Other,
}

const fn class_of_sign(sign: u8) -> Class {
    match sign {
        b'L' => Class::Letter,
        b'N' => Class::Number,
        b'b' => Class::Blank,
        b'n' => Class::Newline,
        _ => Class::Other,
    }
}

static CLASSES: [[Class; PAGE]; SIGNS.len()] = {
    let mut classes = [[Class::Other; PAGE]; SIGNS.len()];
    let mut at = 0;
    while at < SIGNS.len() * PAGE {
        classes[at / PAGE][at % PAGE] = class_of_sign(SIGNS[at / PAGE][at % PAGE]);
        at += 1;
    }
    classes
};

static ASCII: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut code = 0;
    while code < classes.len() {
        classes[code] = CLASSES[PAGES[code / PAGE] as usize][code % PAGE];
        code += 1;
    }
    classes
};

/// The class of `code`, a Unicode code point.
#[inline]
pub fn class(code: u32) -> Class {
    let code = code as usize;
    match PAGES.get(code / PAGE) {
        Some(page) => CLASSES[usize::from(*page)][code % PAGE],
        None => Class::Other,
    }
}

/// The class and the length in bytes of the character that starts at `at`; `None` where `text` ends
/// before the character does. `text` is UTF-8 but for a cut at its end.
#[inline(always)]
pub fn class_at(text: &[u8], at: usize) -> Option<(Class, usize)> {
    let lead = *text.get(at)?;
    match ASCII.get(usize::from(lead)) {
        Some(class) => Some((*class, 1)),
        None => class_beyond_ascii(text, at, lead),
    }
}

#[inline]
fn class_beyond_ascii(text: &[u8], at: usize, lead: u8) -> Option<(Class, usize)> {
    let low = |behind: usize| text.get(at + behind).map(|byte| u32::from(byte & 0x3f));
    let lead = u32::from(lead);
    Some(match lead {
        0xc0..0xe0 => (class((lead & 0x1f) << 6 | low(1)?), 2),
        0xe0..0xf0 => (class((lead & 0x0f) << 12 | low(1)? << 6 | low(2)?), 3),
        _ => (class((lead & 0x07) << 18 | low(1)? << 12 | low(2)? << 6 | low(3)?), 4),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fmt::Write as _;

    use super::*;

    const CODES: u32 = 0x11_0000;

    /// The code points that the engine's class `pattern` holds. Surrogates are none.
    fn engine_class(pattern: &str) -> Vec<bool> {
        let parsed = regex_syntax::parse(pattern).unwrap();
        let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(class)) = parsed.kind()
        else {
            panic!("{pattern} is no class");
        };
        let mut holds = vec![false; CODES as usize];
        for range in class.ranges() {
            holds[range.start() as usize..=range.end() as usize].fill(true);
        }
        holds
    }

    /// The sign of each code point's class, from the engine.
    fn engine_signs() -> Vec<u8> {
        let classes = [(r"\p{L}", b'L'), (r"\p{N}", b'N'), (r"\s", b'b'), (r"[\r\n]", b'n')];
        let mut signs = vec![b'.'; CODES as usize];
        for (pattern, sign) in classes {
            for (code, _) in engine_class(pattern).iter().enumerate().filter(|(_, holds)| **holds) {
                signs[code] = sign;
            }
        }
        signs
    }

    #[test]
    fn every_code_point_has_the_class_that_the_engine_gives_it() {
        let signs = engine_signs();
        for code in 0..CODES {
            assert_eq!(class(code), class_of_sign(signs[code as usize]), "U+{code:04X}");
        }
    }

    #[test]
    fn every_character_is_read_from_its_bytes() {
        for character in (0..CODES).filter_map(char::from_u32) {
            let mut bytes = [b'x'; 6];
            let length = character.encode_utf8(&mut bytes[1..]).len();
            assert_eq!(class_at(&bytes, 1), Some((class(character as u32), length)), "{character:?}");
            assert_eq!(class_at(&bytes[..length], 1), None, "{character:?} cut short");
        }
    }

    #[test]
    fn the_stated_unicode_version_is_the_engines_newest() {
        let knows =
            |(major, minor): (u32, u32)| regex_syntax::parse(&format!(r"\p{{Age={major}.{minor}}}")).is_ok();
        let (major, minor) = UNICODE_VERSION;
        assert!(knows((major, minor)));
        assert!(!knows((major, minor + 1)) && !knows((major + 1, 0)));
    }

    #[test]
    #[ignore = "rewrites src/unicode/tables.rs"]
    fn write_the_tables() {
        let signs = engine_signs();
        let used = signs.iter().rposition(|sign| *sign != b'.').unwrap() + 1;
        let mut numbers: HashMap<&[u8], usize> = HashMap::new();
        let (mut pages, mut rows) = (String::new(), String::new());
        for (at, page) in signs[..used.next_multiple_of(PAGE)].chunks(PAGE).enumerate() {
            let next = numbers.len();
            let number = *numbers.entry(page).or_insert_with(|| {
                writeln!(rows, "    *b\"{}\",", std::str::from_utf8(page).unwrap()).unwrap();
                next
            });
            pages += if at % 24 == 0 { "\n    " } else { " " };
            write!(pages, "{number},").unwrap();
        }
        let version = (1..100)
            .flat_map(|major| (0..10).map(move |minor| (major, minor)))
            .filter(|(major, minor)| regex_syntax::parse(&format!(r"\p{{Age={major}.{minor}}}")).is_ok())
            .max()
            .unwrap();
        let source = format!(
            "//! Generated by the test `write_the_tables`; not to be edited.\n\n\
             /// Major and minor version of Unicode.\npub const UNICODE_VERSION: (u32, u32) = {version:?};\n\n\
             /// For each 64 code points their row in `SIGNS`; code points beyond have no class.\n\
             #[rustfmt::skip]\npub(super) static PAGES: [u16; {}] = [{pages}\n];\n\n\
             /// L letter, N number, b blank, n newline, . other.\n\
             #[rustfmt::skip]\npub(super) static SIGNS: [[u8; 64]; {}] = [\n{rows}];\n",
            used.div_ceil(PAGE),
            numbers.len(),
        );
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/src/unicode/tables.rs"), source).unwrap();
    }
}
