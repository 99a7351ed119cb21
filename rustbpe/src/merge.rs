//! Learning merges from word counts.
//!
//! The rule (that of nanochat's first trainer, and of every byte-level BPE since GPT-2): join the pair
//! of neighbouring tokens that occurs most often; among equals the one with the smaller left id, then
//! the smaller right id. A pair's count is the number of adjacent positions, overlapping ones
//! included ("aaa" holds (a, a) twice); joining goes greedily from left to right.
//!
//! Counts are kept exact merge by merge, at the cost of one subtraction for each pair that is born: when
//! `n` takes the place of `a b`, the pair (x, n) is born as often as the pair (x, a) is lost, and so on
//! the right. A pair's count only falls after the merge that gave birth to it, which is what the queue
//! and the lists build on.

use crate::Error;
use crate::count::Counts;

mod classes;
mod joining;
mod lists;
mod neighbours;
#[cfg(test)]
mod oracle;
mod progress;
mod queue;
mod table;
mod threads;
mod words;

use joining::{Joining, Stretch};
use lists::Lists;
use neighbours::Side;
use progress::Progress;
use table::{Place, key_of, pair_of};
use threads::side_by_side;
use words::{MOST_POSITIONS, Words};

/// Two neighbouring tokens. Ids 0–255 are the bytes, 256 + n is the n-th merge.
pub type Pair = (u32, u32);

/// Which of two pairs that occur equally often is joined first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ties {
    /// The one with the smaller left id, then the smaller right id.
    #[default]
    SmallestId,
    /// The same with the bytes in the order of Hugging Face's tokenizers: that of the characters which
    /// its ByteLevel alphabet writes them as.
    HuggingFace,
}

/// Places of a list that a thread looks at between two reports of progress.
const PLACES_AT_A_TIME: usize = 1 << 16;

/// Places of a list that are worth waking another thread for.
const PLACES_OF_A_THREAD: usize = 1 << 12;

/// Threads that share a list. Each has a table of the tokens it meets.
const MOST_THREADS: usize = 8;

/// Learn `merges` merges, or as many as there are pairs to join. `counts` holds each word once; their order
/// makes no difference.
///
/// `check` is called with the number of merges so far, often; its error ends the training. Fails too when
/// the counts add up to more than 64 bits hold, or the words to more than about 2^32 bytes.
pub fn learn<C: Counts + ?Sized, E: From<Error>>(
    counts: &C,
    merges: usize,
    check: impl FnMut(usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    learn_with(counts, merges, check, Ties::default())
}

/// `learn` with a choice of what decides between pairs that occur equally often.
///
/// Whatever that is, the ids in the result are the bytes and the merges in their order.
pub fn learn_with<C: Counts + ?Sized, E: From<Error>>(
    counts: &C,
    merges: usize,
    mut check: impl FnMut(usize) -> Result<(), E>,
    ties: Ties,
) -> Result<Vec<Pair>, E> {
    let mut progress = Progress::new(&mut check);
    let byte_of = ties.byte_order();
    let mut symbol_of = [0; 256];
    for (symbol, byte) in (0..=255_u8).zip(byte_of) {
        symbol_of[usize::from(byte)] = symbol;
    }
    let words = Words::new(counts, &symbol_of, MOST_POSITIONS, &mut progress)?;
    let least = words.count_at(merges.saturating_add(merges / 5));
    let learned = learn_from(words, merges, least, &mut progress)?;
    let id_of = |id: u32| byte_of.get(id as usize).map_or(id, |byte| u32::from(*byte));
    Ok(learned.into_iter().map(|(left, right)| (id_of(left), id_of(right))).collect())
}

impl Ties {
    /// The bytes, those first that win.
    fn byte_order(self) -> [u8; 256] {
        let mut bytes = std::array::from_fn(|byte| byte as u8);
        if self == Ties::HuggingFace {
            // ByteLevel writes these bytes as the characters they are in Latin-1, the others as characters
            // from U+0100 on.
            let as_itself = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
            bytes.sort_by_key(|byte| !as_itself(byte));
        }
        bytes
    }
}

/// Learn from words in order. `least` is a guess at the count of the last merge, at least 1: a wrong one
/// takes longer.
fn learn_from<E>(
    words: Words,
    merges: usize,
    least: u64,
    progress: &mut Progress<'_, E>,
) -> Result<Vec<Pair>, E> {
    let mut learned = Vec::new();
    let mut trainer = Trainer::new(words, least, progress)?;
    while learned.len() < merges {
        progress.reach(learned.len())?;
        match trainer.join_next(progress)? {
            Some(pair) => learned.push(pair),
            None if trainer.lists.least() > 1 => trainer.look_further(progress)?,
            None => break,
        }
    }
    Ok(learned)
}

struct Trainer {
    words: Words,
    /// In bytes, by id.
    token_lengths: Vec<u32>,
    lists: Lists,
    left: Side,
    right: Side,
    threads: usize,
}

impl Trainer {
    fn new<E>(words: Words, least: u64, progress: &mut Progress<'_, E>) -> Result<Self, E> {
        let lists = Lists::of_bytes(&words, least, progress)?;
        let threads = rayon::current_num_threads().min(MOST_THREADS);
        let (left, right) = (Side::new(threads), Side::new(threads));
        Ok(Self { words, token_lengths: vec![1; 256], lists, left, right, threads })
    }

    /// List pairs that occur less often than those so far.
    fn look_further<E>(&mut self, progress: &mut Progress<'_, E>) -> Result<(), E> {
        let least = (self.lists.least() / 4).max(1);
        self.lists.clear(); // not in memory twice
        self.lists = Lists::of_tokens(&self.words, &self.token_lengths, least, progress)?;
        Ok(())
    }

    /// Join the next pair everywhere. `None` if no pair is listed any more.
    fn join_next<E>(&mut self, progress: &mut Progress<'_, E>) -> Result<Option<Pair>, E> {
        let Some((key, place)) = self.lists.pop() else {
            return Ok(None);
        };
        let pair = pair_of(key);
        let joined = self.token_lengths.len() as u32;
        let length = self.token_lengths[pair.0 as usize] + self.token_lengths[pair.1 as usize];
        self.token_lengths.push(length);

        let twins = self.join(pair, joined, place, progress)?;
        self.subtract_lost(pair, joined, twins);
        self.left.move_to(&mut self.lists, |left| key_of((left, joined)));
        self.right.move_to(&mut self.lists, |right| key_of((joined, right)));
        Ok(Some(pair))
    }

    /// Join `pair` at its places, and note what stands beside them. Returns how often the joined token now
    /// follows itself.
    fn join<E>(
        &mut self,
        pair: Pair,
        joined: u32,
        place: Place,
        progress: &mut Progress<'_, E>,
    ) -> Result<u64, E> {
        let token_lengths = self.token_lengths.as_slice();
        let list = self.lists.occurrences(place);
        let (symbols, parts, frequent) = self.words.split();
        let threads = (list.len() / PLACES_OF_A_THREAD).clamp(1, self.threads);
        let left = self.left.start(threads, token_lengths.len());
        let right = self.right.start(threads, token_lengths.len());
        let neighbours = left.iter_mut().zip(right);
        let mut stretches = Stretch::divide(symbols, parts, list, neighbours);
        let joining = Joining { pair, joined, token_lengths, frequent };
        let mut places = list.len();
        while stretches.iter().any(|stretch| !stretch.is_done()) {
            side_by_side(&mut stretches, |stretch| stretch.join(PLACES_AT_A_TIME, &joining));
            progress.spend(places.min(threads * PLACES_AT_A_TIME))?;
            places = places.saturating_sub(threads * PLACES_AT_A_TIME);
        }
        let twins = stretches.iter().map(|stretch| stretch.twins).sum();
        self.left.add_up(token_lengths.len());
        self.right.add_up(token_lengths.len());
        Ok(twins)
    }

    /// Subtract the pairs that are gone from around the places of `pair`: as many as were born.
    fn subtract_lost(&mut self, pair: Pair, joined: u32, twins: u64) {
        let table = &mut self.lists.table;
        let lost_left = |(left, weight)| (left != joined).then_some(((left, pair.0), weight));
        let lost_right = |(right, weight)| ((pair.1, right), weight);
        let lost = || {
            let left = self.left.weights().filter_map(lost_left);
            let right = self.right.weights().map(lost_right);
            left.chain(right).chain([((pair.1, pair.0), twins)]).filter(|(lost, _)| *lost != pair)
        };
        lost().for_each(|(lost, _)| table.prefetch(key_of(lost)));
        lost().for_each(|(lost, weight)| table.subtract(key_of(lost), weight));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cmp::Reverse;
    use std::collections::BTreeMap;

    type Counts = Vec<(Vec<u8>, u64)>;

    fn learn_all<W: AsRef<[u8]> + Clone>(counts: &[(W, u64)], merges: usize) -> Vec<Pair> {
        learn(counts, merges, |_| Ok::<(), Error>(())).unwrap()
    }

    fn learn_guessing(counts: &Counts, merges: usize, least: u64) -> Vec<Pair> {
        let mut check = |_| Ok::<(), Error>(());
        let mut progress = Progress::new(&mut check);
        let symbol_of = Ties::SmallestId.byte_order();
        let words = Words::new(&counts[..], &symbol_of, MOST_POSITIONS, &mut progress).unwrap();
        learn_from(words, merges, least, &mut progress).unwrap()
    }

    /// The rule word for word: recount everything before each merge.
    fn learn_slowly(counts: &Counts, merges: usize, sort_key: impl Fn(u32) -> u32) -> Vec<Pair> {
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
            let rank = |(pair, count): &(Pair, u64)| (*count, Reverse((sort_key(pair.0), sort_key(pair.1))));
            let Some((pair, _)) = pairs.into_iter().filter(|(_, count)| *count > 0).max_by_key(rank) else {
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

    /// Numbers below a bound, the same ones in every run (Marsaglia's xorshift).
    fn random_numbers() -> impl FnMut(u64) -> u64 {
        let mut state = 88_172_645_463_325_252_u64;
        move |below| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        }
    }

    /// Few letters and long words: many ties, many overlaps, many repeats.
    fn random_words(random: &mut impl FnMut(u64) -> u64, counts: &[u64]) -> Counts {
        let letters = 1 + random(4);
        (0..1 + random(12))
            .map(|_| {
                let run = 1 + random(9);
                let mut word = Vec::new();
                for _ in 0..random(24) {
                    let letter = b'a' + random(letters) as u8;
                    let times = if random(8) == 0 { run } else { 1 };
                    word.extend((0..times).map(|_| letter));
                }
                (word, counts[random(counts.len() as u64) as usize])
            })
            .collect()
    }

    /// Words of syllables, counted as in a text: the n-th most frequent one has an n-th of the count.
    fn words_as_in_a_text(words: usize) -> Counts {
        let mut random = random_numbers();
        let syllables: Vec<Vec<u8>> = (0..300)
            .map(|_| (0..1 + random(4)).map(|_| b'a' + random(26).min(random(26)) as u8).collect())
            .collect();
        let mut counts = BTreeMap::new();
        for rank in 1..=words as u64 {
            let parts = 1 + random(5);
            let parts = (0..parts).map(|_| syllables[random(300).min(random(300)) as usize].as_slice());
            let word: Vec<u8> = std::iter::once(&b" "[..]).chain(parts).flatten().copied().collect();
            counts.insert(word, 5_000_000 / rank);
        }
        counts.into_iter().collect()
    }

    const SMALL_COUNTS: [u64; 4] = [1, 2, 3, 4];

    #[test]
    fn the_most_frequent_pair_comes_first() {
        let (b, c, d) = (u32::from(b'b'), u32::from(b'c'), u32::from(b'd'));
        assert_eq!(learn_all(&[("bcd", 5), ("cd", 1)], 2), [(c, d), (b, 256)]);
    }

    #[test]
    fn ties_go_to_the_smaller_left_id_then_the_smaller_right_id() {
        let id = u32::from;
        let words = [("zx", 2), ("bz", 2), ("by", 2), ("ca", 2)];
        assert_eq!(
            learn_all(&words, 9),
            [(id(b'b'), id(b'y')), (id(b'b'), id(b'z')), (id(b'c'), id(b'a')), (id(b'z'), id(b'x'))]
        );
    }

    #[test]
    fn overlapping_positions_count_and_joining_is_greedy_from_the_left() {
        let a = u32::from(b'a');
        // "aaaaa" holds (a, a) four times, which beats three of (b, c).
        assert_eq!(learn_all(&[("aaaaa", 1), ("bc", 3)], 1), [(a, a)]);
        // aaaaa → AA AA a → the pair (AA, AA) before (AA, a) by its smaller right id? 97 is smaller.
        assert_eq!(learn_all(&[("aaaaa", 1)], 3), [(a, a), (256, a), (256, 257)]);
    }

    #[test]
    fn counts_around_31_32_and_33_bits_are_exact() {
        for bits in [31, 32, 33, 45] {
            for (more, first) in [(0, b'a'), (1, b'c')] {
                let words = [("ab", 1 << bits), ("cd", (1 << bits) + more)];
                assert_eq!(learn_all(&words, 1), [(u32::from(first), u32::from(first) + 1)]);
                // The same with sums that pass the limit.
                let words = [("ab", (1 << bits) - 5), ("abe", 5), ("cd", 7), ("xcd", (1 << bits) - 7 + more)];
                assert_eq!(learn_all(&words, 1), [(u32::from(first), u32::from(first) + 1)]);
            }
        }
    }

    #[test]
    fn one_word_may_have_nearly_all_of_64_bits() {
        let words = vec![(b"abababa".to_vec(), u64::MAX / 8), (b"ba".to_vec(), u64::MAX / 16)];
        assert_eq!(learn_all(&words, 9), learn_slowly(&words, 9, |id| id));
    }

    #[test]
    fn counts_beyond_64_bits_are_refused() {
        let counts: [(&[u8], u64); 1] = [(b"ab", u64::MAX)];
        let error = learn(&counts[..], 1, |_| Ok::<(), Error>(())).unwrap_err();
        assert!(error.to_string().contains("64 bits"));
    }

    #[test]
    fn training_ends_when_there_is_nothing_left_to_join() {
        assert_eq!(learn_all(&[("ab", 1)], 10).len(), 1);
        assert_eq!(learn_all(&[("ab", 1)], usize::MAX).len(), 1);
        assert_eq!(learn_all(&[("a", 1)], 10).len(), 0);
        assert_eq!(learn_all(&[("ab", 0)], 10).len(), 0);
        assert_eq!(learn_all::<&str>(&[], 10).len(), 0);
    }

    #[test]
    fn an_error_of_the_check_ends_the_training() {
        let stop = |done| {
            if done == 1 { Err(Error::Invalid("stop".to_owned())) } else { Ok(()) }
        };
        assert!(learn(&[(b"abcd", 1_u64)][..], 10, stop).is_err());
    }

    #[test]
    fn the_check_is_called_while_words_are_prepared_and_within_a_merge() {
        let words: Vec<(Vec<u8>, u64)> =
            (0..100_000_u32).map(|number| ([&number.to_le_bytes()[..], b"xy"].concat(), 1)).collect();
        let mut calls = [0, 0];
        let count_call = |done: usize| {
            calls[done.min(1)] += 1;
            Ok::<(), Error>(())
        };
        learn(&words[..], 2, count_call).unwrap();
        // 700,000 positions are gathered; symbols, counts and lists take a round of threads each, at least.
        assert!(calls[0] >= 13, "{calls:?}");
        assert!(calls[1] >= 2, "{calls:?}");
    }

    #[test]
    fn the_order_of_words_makes_no_difference() {
        let words = words_as_in_a_text(2_000);
        let backwards: Counts = words.iter().rev().cloned().collect();
        assert_eq!(learn_all(&words, 500), learn_all(&backwards, 500));
    }

    fn learn_on_threads(threads: usize, counts: &Counts, merges: usize) -> Vec<Pair> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| learn_all(counts, merges))
    }

    #[test]
    fn any_number_of_threads_learns_the_same() {
        // Several parts of words, and lists of more than `PLACES_OF_A_THREAD` places for each of eight.
        let mut words = words_as_in_a_text(60_000);
        let mut random = random_numbers();
        for number in 0..40_000_u32 {
            let word = [&number.to_be_bytes()[1..], &b"abab".repeat(1 + random(3) as usize)].concat();
            words.push((word, 1 + random(3)));
        }
        let expected = learn_on_threads(1, &words, 1_500);
        assert_eq!(expected, oracle::learn(words.iter().cloned(), 1_500));
        for threads in [2, 3, 8] {
            assert_eq!(learn_on_threads(threads, &words, 1_500), expected, "{threads} threads");
        }
    }

    #[test]
    fn exact_counts_learn_what_recounting_everything_learns() {
        let mut random = random_numbers();
        for _ in 0..400 {
            let words = random_words(&mut random, &SMALL_COUNTS);
            assert_eq!(learn_all(&words, 60), learn_slowly(&words, 60, |id| id), "{words:?}");
        }
    }

    #[test]
    fn thousands_of_small_trainings_learn_what_the_oracle_learns() {
        let big = [0, 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, 1 << 50];
        let mut random = random_numbers();
        for round in 0..6_000 {
            let counts: &[u64] = if round % 2 == 0 { &SMALL_COUNTS } else { &big };
            let words = random_words(&mut random, counts);
            let learned = learn_all(&words, 100);
            assert_eq!(learned, oracle::learn(words.iter().cloned(), 100), "{words:?}");
        }
    }

    #[test]
    fn thousands_of_merges_of_a_text_are_those_of_the_oracle() {
        let words = words_as_in_a_text(20_000);
        let learned = learn_all(&words, 5_000);
        assert_eq!(learned.len(), 5_000);
        assert_eq!(learned, oracle::learn(words, 5_000));
    }

    #[test]
    fn any_guess_at_the_last_count_learns_the_same() {
        let mut random = random_numbers();
        for _ in 0..300 {
            let words = random_words(&mut random, &SMALL_COUNTS);
            let expected = oracle::learn(words.iter().cloned(), 60);
            for least in [1, 2, 3, 5, 17, 1 << 40] {
                assert_eq!(learn_guessing(&words, 60, least), expected, "{least} {words:?}");
            }
        }
        let words = words_as_in_a_text(5_000);
        let expected = oracle::learn(words.iter().cloned(), 2_000);
        for least in [1, 1_000, 100_000, u64::MAX] {
            assert_eq!(learn_guessing(&words, 2_000, least), expected, "{least}");
        }
    }

    #[test]
    fn ties_as_in_hugging_face_go_by_the_characters_that_stand_for_bytes() {
        let words: [(&[u8], u64); 6] =
            [(b" a", 2), (b"!a", 2), (b"\xada", 2), (b"\xaea", 2), (b"\x7fa", 2), (b"\xffa", 2)];
        let left_ids = |ties| -> Vec<u32> {
            let learned = learn_with(&words[..], 6, |_| Ok::<(), Error>(()), ties).unwrap();
            learned.into_iter().map(|(left, _)| left).collect()
        };
        assert_eq!(left_ids(Ties::SmallestId), [32, 33, 127, 173, 174, 255]);
        assert_eq!(left_ids(Ties::HuggingFace), [33, 174, 255, 32, 127, 173]);
    }

    #[test]
    fn ties_as_in_hugging_face_change_nothing_but_ties() {
        let order = Ties::HuggingFace.byte_order();
        let rank =
            |id: u32| order.iter().position(|byte| u32::from(*byte) == id).map_or(id, |rank| rank as u32);
        let mut random = random_numbers();
        for _ in 0..200 {
            let mut words = random_words(&mut random, &SMALL_COUNTS);
            // Letters become bytes on both sides of the order.
            for byte in words.iter_mut().flat_map(|(word, _)| word) {
                *byte = [b' ', b'a', 0xad, 0xff][usize::from(*byte - b'a')];
            }
            let check = |_| Ok::<(), Error>(());
            let learned = learn_with(&words[..], 60, check, Ties::HuggingFace).unwrap();
            assert_eq!(learned, learn_slowly(&words, 60, rank), "{words:?}");
        }
    }
}
