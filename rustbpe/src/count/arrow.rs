//! Documents of an Arrow text array, without a copy.

/// The width of an Arrow array's offsets into its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offsets {
    /// 32 bits: Arrow's `string`.
    Narrow,
    /// 64 bits: Arrow's `large_string`.
    Wide,
}

/// What keeps an array from being a list of documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The offsets buffer is shorter than the array.
    Offsets,
    /// This document, from 0, is not valid UTF-8, or its offsets point outside of the text.
    Document(usize),
}

/// The `length` documents from `start` on. `offsets` are numbers in native order, one more than there
/// are documents, that point into `text`. Validates.
pub fn documents<'t>(
    width: Offsets,
    offsets: &[u8],
    text: &'t [u8],
    start: usize,
    length: usize,
) -> Result<Vec<&'t str>, Fault> {
    match width {
        Offsets::Narrow => cut(offsets, text, start, length, |bytes| i32::from_ne_bytes(bytes).into()),
        Offsets::Wide => cut(offsets, text, start, length, i64::from_ne_bytes),
    }
}

fn cut<'t, const N: usize>(
    offsets: &[u8],
    text: &'t [u8],
    start: usize,
    length: usize,
    number: impl Fn([u8; N]) -> i64,
) -> Result<Vec<&'t str>, Fault> {
    if length == 0 {
        return Ok(Vec::new()); // Arrow lets an empty array have no offsets
    }
    let end = start.checked_add(length).and_then(|last| last.checked_add(1)?.checked_mul(N));
    let offsets = end.and_then(|end| offsets.get(start * N..end)).ok_or(Fault::Offsets)?;
    let offset = |at: usize| {
        let bytes = offsets[at * N..(at + 1) * N].try_into().expect("a slice of N bytes");
        usize::try_from(number(bytes)).ok()
    };
    let document = |at: usize| {
        let bytes = text.get(offset(at)?..offset(at + 1)?)?;
        simdutf8::basic::from_utf8(bytes).ok()
    };
    (0..length).map(|at| document(at).ok_or(Fault::Document(at))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn narrow(offsets: &[i32]) -> Vec<u8> {
        offsets.iter().flat_map(|offset| offset.to_ne_bytes()).collect()
    }

    #[test]
    fn documents_are_cut_at_offsets_of_both_widths() {
        let text = "abcéd".as_bytes();
        let wide: Vec<u8> = [0_i64, 2, 2, 5, 6].iter().flat_map(|offset| offset.to_ne_bytes()).collect();
        let expected = vec!["ab", "", "cé", "d"];
        assert_eq!(documents(Offsets::Narrow, &narrow(&[0, 2, 2, 5, 6]), text, 0, 4), Ok(expected.clone()));
        assert_eq!(documents(Offsets::Wide, &wide, text, 0, 4), Ok(expected));
        assert_eq!(documents(Offsets::Wide, &wide, text, 2, 1), Ok(vec!["cé"]));
        assert_eq!(documents(Offsets::Wide, &[], &[], 0, 0), Ok(vec![]));
    }

    #[test]
    fn what_cannot_be_cut_is_named() {
        let fault = |offsets: &[i32], text: &[u8], length| {
            documents(Offsets::Narrow, &narrow(offsets), text, 0, length).unwrap_err()
        };
        assert_eq!(fault(&[0, 1], b"a", 2), Fault::Offsets);
        assert_eq!(fault(&[0, 1, 2, 3], b"a\xff\xff", 3), Fault::Document(1));
        assert_eq!(fault(&[0, 1, 9], b"ab", 2), Fault::Document(1));
        assert_eq!(fault(&[0, 1, -1], b"ab", 2), Fault::Document(1));
        assert_eq!(fault(&[2, 1], b"ab", 1), Fault::Document(0));
        assert_eq!(fault(&[0, 2, 3], "aé".as_bytes(), 2), Fault::Document(0));
    }
}
