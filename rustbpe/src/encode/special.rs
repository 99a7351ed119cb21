//! Tokens that stand outside the vocabulary: no text becomes one unless the caller allows it.

use std::cmp::Reverse;

use super::{Encoder, Vocabulary};
use crate::Error;

/// Names with their ids, by id.
#[derive(Clone, Debug, Default)]
pub struct SpecialTokens {
    tokens: Vec<(String, u32)>,
}

impl SpecialTokens {
    /// Fails when a name is empty or two are the same, or an id is taken.
    pub fn new(mut tokens: Vec<(String, u32)>, vocabulary: &Vocabulary) -> Result<Self, Error> {
        tokens.sort_by_key(|(_, id)| *id);
        for (number, (name, id)) in tokens.iter().enumerate() {
            let problem = if name.is_empty() {
                "has no name".to_owned()
            } else if let Some(token) = vocabulary.token(*id) {
                format!("has the id of the token b'{}'", token.escape_ascii())
            } else if let Some((other, _)) = tokens[..number].iter().find(|(_, other)| other == id) {
                format!("has the id of {other:?}")
            } else if tokens[..number].iter().any(|(other, _)| other == name) {
                "is there twice".to_owned()
            } else {
                continue;
            };
            return Err(Error::Invalid(format!("special token {name:?} with id {id} {problem}")));
        }
        Ok(Self { tokens })
    }

    /// (name, id), by id.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        self.tokens.iter().map(|(name, id)| (&**name, *id))
    }

    pub fn id(&self, name: &str) -> Option<u32> {
        self.iter().find(|(other, _)| *other == name).map(|(_, id)| id)
    }

    pub fn name(&self, id: u32) -> Option<&str> {
        self.tokens.binary_search_by_key(&id, |(_, id)| *id).ok().map(|at| &*self.tokens[at].0)
    }
}

impl Encoder {
    /// Append the ids of `text`, in which the names `allowed` are their tokens. The leftmost comes
    /// first, the longest of those that start there; the text between is encoded as if it stood alone.
    pub fn encode_with_special(
        &mut self,
        text: &str,
        allowed: &[(&str, u32)],
        ids: &mut Vec<u32>,
    ) -> Result<(), Error> {
        // Where each name occurs next, so that a name is looked for once along the text.
        let next = |name: &str, from: usize| text[from..].find(name).map(|found| from + found);
        let mut found: Vec<Option<usize>> = allowed.iter().map(|(name, _)| next(name, 0)).collect();
        let mut at = 0;
        loop {
            let places =
                found.iter().zip(allowed).filter_map(|(place, token)| Some((*place.as_ref()?, token)));
            let Some((place, (name, id))) =
                places.min_by_key(|(place, (name, _))| (*place, Reverse(name.len())))
            else {
                return self.encode(&text[at..], ids);
            };
            self.encode(&text[at..place], ids)?;
            ids.push(*id);
            at = place + name.len();
            for (place, (name, _)) in found.iter_mut().zip(allowed) {
                if place.is_some_and(|place| place < at) {
                    *place = next(name, at);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn special(tokens: &[(&str, u32)]) -> Result<SpecialTokens, Error> {
        let tokens = tokens.iter().map(|(name, id)| ((*name).to_owned(), *id)).collect();
        SpecialTokens::new(tokens, &Vocabulary::default())
    }

    fn encode(text: &str, allowed: &[(&str, u32)]) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut encoder = Encoder::new(Arc::new(Vocabulary::default()), r"[^x]+").unwrap();
        encoder.encode_with_special(text, allowed, &mut ids).unwrap();
        ids
    }

    #[test]
    fn allowed_names_are_tokens_and_the_rest_is_text() {
        assert_eq!(encode("<a>b<a><a>", &[("<a>", 300)]), [300, 98, 300, 300]);
        assert_eq!(encode("<a>", &[]), [60, 97, 62]);
        assert_eq!(encode("<b><a", &[("<a>", 300)]), [60, 98, 62, 60, 97]);
    }

    #[test]
    fn of_names_that_overlap_the_leftmost_wins_then_the_longest() {
        let allowed = [("<a", 300), ("<a>", 301), (">b", 302)];
        assert_eq!(encode("<a>b<a?>b", &allowed), [301, 98, 300, 63, 302]);
    }

    #[test]
    fn names_and_ids_must_be_free() {
        for (tokens, complaint) in [
            ([("", 300)].as_slice(), "special token \"\" with id 300 has no name"),
            (&[("<a>", 97)], "\"<a>\" with id 97 has the id of the token b'a'"),
            (&[("<a>", 300), ("<b>", 300)], "\"<b>\" with id 300 has the id of \"<a>\""),
            (&[("<a>", 300), ("<a>", 301)], "\"<a>\" with id 301 is there twice"),
        ] {
            let error = special(tokens).unwrap_err().to_string();
            assert!(error.contains(complaint), "{error}");
        }
        let tokens = special(&[("<b>", 301), ("<a>", 300)]).unwrap();
        assert_eq!(tokens.iter().collect::<Vec<_>>(), [("<a>", 300), ("<b>", 301)]);
        assert_eq!((tokens.id("<b>"), tokens.name(301), tokens.name(302)), (Some(301), Some("<b>"), None));
    }
}
