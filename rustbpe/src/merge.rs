//! Learning merges from word counts.
//!
//! The rule (that of nanochat's first trainer, and of every byte-level BPE since GPT-2): join the pair
//! of neighbouring tokens that occurs most often; among equals the one with the smaller left id, then
//! the smaller right id. A pair's count is the number of adjacent positions, overlapping ones
//! included ("aaa" holds (a, a) twice); joining goes greedily from left to right.
//!
//! Counts of pairs are kept up to date merge by merge. A pair's count only falls after the merge that
//! gave birth to it, so a heap of counts as they once were is an upper bound: an entry that comes out
//! stale goes back with its present count.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::FxBuildHasher;

use crate::Error;

/// Two neighbouring tokens. Ids 0–255 are the bytes, 256 + n is the n-th merge.
pub type Pair = (u32, u32);

type Pairs = HashMap<Pair, Occurrences, FxBuildHasher>;

#[derive(Default)]
struct Occurrences {
    count: u64,
    /// Words that hold the pair, or held it; a word that lost it stays listed.
    words: Vec<u32>,
}

impl Occurrences {
    fn add(&mut self, word: u32, count: u64) {
        self.count += count;
        if self.words.last() != Some(&word) {
            self.words.push(word);
        }
    }
}

/// Words as tokens, one after another in one array. A word shrinks in place as its tokens merge.
struct Words {
    tokens: Vec<u32>,
    /// Where a word starts, how many tokens it has now, how often it occurs.
    spans: Vec<(usize, usize, u64)>,
}

/// Learn `merges` merges, or as many as there are pairs to join. `counts` holds each word once.
///
/// `check` is called with the number of merges so far, often; its error ends the training.
pub fn learn<W: AsRef<[u8]>, E: From<Error>>(
    counts: impl IntoIterator<Item = (W, u64)>,
    merges: usize,
    mut check: impl FnMut(usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    let mut words = Words::new(counts)?;
    let mut pairs = Pairs::default();
    for word in 0..words.spans.len() {
        if word % 65_536 == 0 {
            check(0)?;
        }
        let (start, length, count) = words.spans[word];
        for pair in words.tokens[start..start + length].windows(2) {
            pairs.entry((pair[0], pair[1])).or_default().add(word as u32, count);
        }
    }
    let mut heap: BinaryHeap<(u64, Reverse<Pair>)> =
        pairs.iter().map(|(pair, found)| (found.count, Reverse(*pair))).collect();

    let mut learned = Vec::new();
    while learned.len() < merges {
        check(learned.len())?;
        let Some((count, Reverse(pair))) = heap.pop() else {
            break;
        };
        let present = pairs[&pair].count;
        if present == 0 {
            pairs.remove(&pair);
            continue;
        }
        if present < count {
            heap.push((present, Reverse(pair)));
            continue;
        }
        let joined = 256 + learned.len() as u32;
        let places = pairs.remove(&pair).map(|found| found.words).unwrap_or_default();
        let mut born = Pairs::default();
        for word in places {
            words.join(word, pair, joined, &mut pairs, &mut born);
        }
        for (pair, found) in born {
            if found.count > 0 {
                heap.push((found.count, Reverse(pair)));
                pairs.insert(pair, found);
            }
        }
        learned.push(pair);
    }
    Ok(learned)
}

impl Words {
    fn new<W: AsRef<[u8]>>(counts: impl IntoIterator<Item = (W, u64)>) -> Result<Self, Error> {
        let mut words = Words { tokens: Vec::new(), spans: Vec::new() };
        let mut positions = 0_u64;
        for (word, count) in counts {
            let bytes = word.as_ref();
            // No pair occurs more often than there are positions: this sum is the only place where
            // 64 bits could be too few.
            positions = (bytes.len() as u64)
                .checked_mul(count)
                .and_then(|here| positions.checked_add(here))
                .ok_or_else(|| {
                    Error::Invalid(
                        "the word counts add up to more than 64 bits hold; one of the counts \
                                    files is wrong: count its shard again"
                            .to_owned(),
                    )
                })?;
            words.spans.push((words.tokens.len(), bytes.len(), count));
            words.tokens.extend(bytes.iter().map(|byte| u32::from(*byte)));
        }
        if u32::try_from(words.spans.len()).is_err() {
            return Err(Error::Invalid(format!(
                "{} different words are more than 2^32; train on fewer shards",
                words.spans.len()
            )));
        }
        Ok(words)
    }

    /// Replace `pair` by `joined` in one word, and keep the counts of the pairs around it exact.
    fn join(&mut self, word: u32, pair: Pair, joined: u32, pairs: &mut Pairs, born: &mut Pairs) {
        let (start, length, count) = self.spans[word as usize];
        let tokens = &mut self.tokens[start..start + length];
        let (mut read, mut write) = (0, 0);
        while read < length {
            if read + 1 < length && (tokens[read], tokens[read + 1]) == pair {
                if write > 0 {
                    let left = tokens[write - 1];
                    let lost = (left, pair.0);
                    take(if left == joined { &mut *born } else { &mut *pairs }, lost, count);
                    born.entry((left, joined)).or_default().add(word, count);
                }
                if read + 2 < length {
                    let right = tokens[read + 2];
                    take(pairs, (pair.1, right), count);
                    born.entry((joined, right)).or_default().add(word, count);
                }
                tokens[write] = joined;
                read += 2;
            } else {
                tokens[write] = tokens[read];
                read += 1;
            }
            write += 1;
        }
        self.spans[word as usize].1 = write;
    }
}

/// `count` occurrences of `pair` are gone. The pair being joined is in no table any more.
fn take(pairs: &mut Pairs, pair: Pair, count: u64) {
    if let Some(found) = pairs.get_mut(&pair) {
        found.count -= count;
        if found.count == 0 {
            found.words = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn learn_all(counts: &[(&[u8], u64)], merges: usize) -> Vec<Pair> {
        learn(counts.iter().copied(), merges, |_| Ok::<(), Error>(())).unwrap()
    }

    /// The rule word for word: recount everything before each merge.
    fn learn_slowly(counts: &[(&[u8], u64)], merges: usize) -> Vec<Pair> {
        let mut words: Vec<(Vec<u32>, u64)> = counts
            .iter()
            .map(|(word, count)| (word.iter().map(|byte| u32::from(*byte)).collect(), *count))
            .collect();
        let mut learned = Vec::new();
        while learned.len() < merges {
            let mut pairs: BTreeMap<Pair, u64> = BTreeMap::new();
            for (tokens, count) in &words {
                for pair in tokens.windows(2) {
                    *pairs.entry((pair[0], pair[1])).or_default() += count;
                }
            }
            let Some((pair, _)) = pairs.into_iter().max_by_key(|(pair, count)| (*count, Reverse(*pair)))
            else {
                break;
            };
            let joined = 256 + learned.len() as u32;
            for (tokens, _) in &mut words {
                let mut merged = Vec::new();
                let mut at = 0;
                while at < tokens.len() {
                    if at + 1 < tokens.len() && (tokens[at], tokens[at + 1]) == pair {
                        merged.push(joined);
                        at += 2;
                    } else {
                        merged.push(tokens[at]);
                        at += 1;
                    }
                }
                *tokens = merged;
            }
            learned.push(pair);
        }
        learned
    }

    #[test]
    fn the_most_frequent_pair_comes_first() {
        let (b, c, d) = (u32::from(b'b'), u32::from(b'c'), u32::from(b'd'));
        assert_eq!(learn_all(&[(b"bcd", 5), (b"cd", 1)], 2), [(c, d), (b, 256)]);
    }

    #[test]
    fn ties_go_to_the_smaller_left_id_then_the_smaller_right_id() {
        let id = u32::from;
        let words: [(&[u8], u64); 4] = [(b"zx", 2), (b"bz", 2), (b"by", 2), (b"ca", 2)];
        assert_eq!(
            learn_all(&words, 9),
            [(id(b'b'), id(b'y')), (id(b'b'), id(b'z')), (id(b'c'), id(b'a')), (id(b'z'), id(b'x'))]
        );
    }

    #[test]
    fn overlapping_positions_count_and_joining_is_greedy_from_the_left() {
        let a = u32::from(b'a');
        // "aaaaa" holds (a, a) four times, which beats three of (b, c).
        assert_eq!(learn_all(&[(b"aaaaa", 1), (b"bc", 3)], 1), [(a, a)]);
        // aaaaa → AA AA a → the pair (AA, AA) before (AA, a) by its smaller right id? 97 is smaller.
        assert_eq!(learn_all(&[(b"aaaaa", 1)], 3), [(a, a), (256, a), (256, 257)]);
    }

    #[test]
    fn counts_beyond_32_bits_are_counted() {
        let words: [(&[u8], u64); 2] = [(b"ab", 1 << 33), (b"cd", (1 << 33) + 1)];
        assert_eq!(learn_all(&words, 1), [(u32::from(b'c'), u32::from(b'd'))]);
    }

    #[test]
    fn counts_beyond_64_bits_are_refused() {
        let counts: [(&[u8], u64); 1] = [(b"ab", u64::MAX)];
        let error = learn(counts, 1, |_| Ok::<(), Error>(())).unwrap_err();
        assert!(error.to_string().contains("64 bits"));
    }

    #[test]
    fn training_ends_when_there_is_nothing_left_to_join() {
        assert_eq!(learn_all(&[(b"ab", 1)], 10).len(), 1);
        assert_eq!(learn_all(&[(b"a", 1)], 10).len(), 0);
        assert_eq!(learn_all(&[], 10).len(), 0);
    }

    #[test]
    fn an_error_of_the_check_ends_the_training() {
        let stop = |done| {
            if done == 1 { Err(Error::Invalid("stop".to_owned())) } else { Ok(()) }
        };
        assert!(learn([(b"abcd", 1_u64)], 10, stop).is_err());
    }

    #[test]
    fn incremental_counting_learns_what_recounting_everything_learns() {
        let mut state = 88_172_645_463_325_252_u64;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for round in 0..300 {
            // Few letters and long words: many ties, many overlaps, many repeats.
            let letters = 1 + round % 4;
            let words: Vec<(Vec<u8>, u64)> = (0..1 + random(12))
                .map(|_| {
                    let word = (0..1 + random(24)).map(|_| b'a' + random(letters) as u8).collect();
                    (word, 1 + random(4))
                })
                .collect();
            let words: Vec<(&[u8], u64)> =
                words.iter().map(|(word, count)| (word.as_slice(), *count)).collect();
            assert_eq!(learn_all(&words, 40), learn_slowly(&words, 40), "{words:?}");
        }
    }
}
