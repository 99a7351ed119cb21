//! Tokens of a text.
//!
//! The rule is tiktoken's. A word whose spelling is a token is that token. Any other word starts as its
//! bytes; of all neighbours whose joined spelling is a token those of the lowest rank are joined, the
//! leftmost of equals, until no joined spelling is a token. A token's rank is its id.
//!
//! `pairs` joins the parts of one word, `cache` remembers what words became, `encoder` takes whole texts
//! through the splitter and both, `batch` does many texts on many threads, `special` finds the tokens
//! that stand outside the vocabulary.

mod batch;
mod cache;
mod encoder;
mod pairs;
mod special;

use std::collections::HashMap;
use std::sync::OnceLock;

use rustc_hash::FxBuildHasher;

use crate::Error;
use crate::merge::Pair;
use pairs::Pairs;

pub use batch::Encoders;
pub use encoder::{Encoder, WordEncoder};
pub use special::SpecialTokens;

/// Ids of a vocabulary are below this: the tables are as long as the highest id.
const ID_LIMIT: u32 = 1 << 24;

/// Every token's bytes by id. What encoding needs is made when it first encodes.
pub struct Vocabulary {
    /// By id. An id that no token has is empty.
    tokens: Vec<Box<[u8]>>,
    pairs: OnceLock<Pairs>,
}

impl Default for Vocabulary {
    fn default() -> Self {
        Self::from_merges(&[])
    }
}

impl Vocabulary {
    /// The 256 bytes, then the merges in order.
    pub fn from_merges(merges: &[Pair]) -> Self {
        let mut tokens: Vec<Box<[u8]>> = (0..=255_u8).map(|byte| Box::from([byte])).collect();
        for &(left, right) in merges {
            let joined = [&*tokens[left as usize], &*tokens[right as usize]].concat();
            tokens.push(joined.into());
        }
        Self { tokens, pairs: OnceLock::new() }
    }

    /// Tokens with their ids, in any order. Ids may leave gaps.
    ///
    /// Fails when two tokens have one id or one spelling, or one of the 256 bytes is no token.
    pub fn from_ranks(ranks: impl IntoIterator<Item = (Vec<u8>, u32)>) -> Result<Self, Error> {
        let mut tokens: Vec<Box<[u8]>> = Vec::new();
        let mut ids: HashMap<Box<[u8]>, u32, FxBuildHasher> = HashMap::default();
        for (token, id) in ranks {
            let shown = token.escape_ascii();
            if token.is_empty() {
                return Err(Error::Invalid(format!("token {id} is empty")));
            }
            if id >= ID_LIMIT {
                return Err(Error::Invalid(format!("token {id} (b'{shown}'): ids must be below {ID_LIMIT}")));
            }
            if let Some(other) = ids.get(&*token) {
                return Err(Error::Invalid(format!("tokens {other} and {id} are both spelled b'{shown}'")));
            }
            let at = id as usize;
            if tokens.len() <= at {
                tokens.resize_with(at + 1, Box::default);
            }
            if !tokens[at].is_empty() {
                let other = tokens[at].escape_ascii();
                return Err(Error::Invalid(format!(
                    "id {id} is that of two tokens: b'{other}' and b'{shown}'"
                )));
            }
            ids.insert(token.as_slice().into(), id);
            tokens[at] = token.into();
        }
        if let Some(byte) = (0..=255_u8).find(|byte| !ids.contains_key([*byte].as_slice())) {
            return Err(Error::Invalid(format!(
                "the byte 0x{byte:02x} is no token: text that holds it could not be encoded"
            )));
        }
        Ok(Self { tokens, pairs: OnceLock::new() })
    }

    /// Every token's bytes by id. An id that no token has is empty.
    pub fn tokens(&self) -> &[Box<[u8]>] {
        &self.tokens
    }

    /// The bytes of a token.
    pub fn token(&self, id: u32) -> Option<&[u8]> {
        self.tokens.get(id as usize).map(|token| &**token).filter(|token| !token.is_empty())
    }

    /// (left, right, joined): the two tokens that each token is joined from, by id. A token that no
    /// joining reaches is left out: it is met as a whole word only.
    pub fn merges(&self) -> Vec<(u32, u32, u32)> {
        self.pairs().sorted()
    }

    /// Append the tokens of one word.
    pub fn encode_word(&self, word: &[u8], ids: &mut Vec<u32>) {
        let pairs = self.pairs();
        match pairs.unreached(word) {
            Some(id) => ids.push(id),
            None => pairs.join(word, ids),
        }
    }

    pub(super) fn pairs(&self) -> &Pairs {
        self.pairs.get_or_init(|| Pairs::of(&self.tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(vocabulary: &Vocabulary, word: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        vocabulary.encode_word(word.as_bytes(), &mut ids);
        ids
    }

    fn spelled(vocabulary: &Vocabulary, ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|id| vocabulary.tokens()[*id as usize].to_vec()).collect()
    }

    fn with_bytes(tokens: &[(&str, u32)]) -> Result<Vocabulary, Error> {
        let bytes = (0..=255_u8).map(|byte| (vec![byte], u32::from(byte)));
        Vocabulary::from_ranks(bytes.chain(tokens.iter().map(|(token, id)| (token.as_bytes().to_vec(), *id))))
    }

    #[test]
    fn without_merges_a_word_is_its_bytes() {
        assert_eq!(encode(&Vocabulary::default(), "aé"), [97, 0xc3, 0xa9]);
        assert_eq!(encode(&Vocabulary::default(), ""), [] as [u32; 0]);
    }

    #[test]
    fn lower_ranks_join_first_and_the_leftmost_of_equals() {
        let (a, b, c) = (97, 98, 99);
        // 256 = bc, 257 = ab, 258 = aa, 259 = aa·aa
        let vocabulary = Vocabulary::from_merges(&[(b, c), (a, b), (a, a), (258, 258)]);
        assert_eq!(encode(&vocabulary, "abc"), [a, 256]);
        assert_eq!(encode(&vocabulary, "abab"), [257, 257]);
        assert_eq!(encode(&vocabulary, "aaaaaaa"), [259, 258, a]);
        assert_eq!(vocabulary.merges(), [(b, c, 256), (a, b, 257), (a, a, 258), (258, 258, 259)]);
    }

    #[test]
    fn a_long_word_is_encoded_whole() {
        let vocabulary = Vocabulary::from_merges(&[(97, 97), (256, 256)]);
        let word = "a".repeat(100_001);
        let ids = encode(&vocabulary, &word);
        assert_eq!(ids.len(), 25_001);
        assert_eq!(spelled(&vocabulary, &ids), word.as_bytes());
    }

    #[test]
    fn a_token_that_joining_cannot_reach_is_met_as_a_whole_word_only() {
        // No two letters of "xyz" are a token.
        let vocabulary = with_bytes(&[("bc", 256), ("abc", 257), ("xyz", 300)]).unwrap();
        assert_eq!(encode(&vocabulary, "abcabc"), [257, 257]);
        assert_eq!(encode(&vocabulary, "xyz"), [300]);
        assert_eq!(encode(&vocabulary, "xyz!"), [120, 121, 122, 33]);
        assert_eq!(vocabulary.merges(), [(98, 99, 256), (97, 256, 257)]);
        assert_eq!(vocabulary.token(299), None);
    }

    #[test]
    fn a_token_may_have_a_lower_rank_than_its_parts() {
        let vocabulary = with_bytes(&[("abcd", 256), ("ab", 257), ("cd", 258), ("bc", 259)]).unwrap();
        assert_eq!(encode(&vocabulary, "abcdabcx"), [256, 257, 99, 120]);
    }

    #[test]
    fn ranks_that_make_no_vocabulary_are_refused() {
        for (tokens, complaint) in [
            ([("ab", 256), ("ab", 257)].as_slice(), "tokens 256 and 257 are both spelled b'ab'"),
            (&[("ab", 256), ("cd", 256)], "id 256 is that of two tokens: b'ab' and b'cd'"),
            (&[("", 256)], "token 256 is empty"),
            (&[("ab", 1 << 24)], "ids must be below"),
        ] {
            let error = with_bytes(tokens).err().unwrap().to_string();
            assert!(error.contains(complaint), "{error}");
        }
        let error = Vocabulary::from_ranks([(b"a".to_vec(), 0)]).err().unwrap().to_string();
        assert!(error.contains("the byte 0x00 is no token"), "{error}");
    }
}
