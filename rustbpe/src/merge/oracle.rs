//! The same rule without the cleverness: words as short arrays that shrink, for every pair the words that
//! hold it. What the tests and the benchmark compare with.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::FxBuildHasher;

type Pair = (u32, u32);

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
pub fn learn<W: AsRef<[u8]>>(counts: impl IntoIterator<Item = (W, u64)>, merges: usize) -> Vec<Pair> {
    let mut words = Words::new(counts);
    let mut pairs = Pairs::default();
    for word in 0..words.spans.len() {
        let (start, length, count) = words.spans[word];
        for pair in words.tokens[start..start + length].windows(2) {
            pairs.entry((pair[0], pair[1])).or_default().add(word as u32, count);
        }
    }
    let mut heap: BinaryHeap<(u64, Reverse<Pair>)> =
        pairs.iter().map(|(pair, found)| (found.count, Reverse(*pair))).collect();

    let mut learned = Vec::new();
    while learned.len() < merges {
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
    learned
}

impl Words {
    fn new<W: AsRef<[u8]>>(counts: impl IntoIterator<Item = (W, u64)>) -> Self {
        let mut words = Words { tokens: Vec::new(), spans: Vec::new() };
        for (word, count) in counts {
            let bytes = word.as_ref();
            words.spans.push((words.tokens.len(), bytes.len(), count));
            words.tokens.extend(bytes.iter().map(|byte| u32::from(*byte)));
        }
        words
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
