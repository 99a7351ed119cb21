//! MB/s of one thread from text to ids: `cargo bench --bench encode -- TEXT_FILE [VOCABULARY_SIZE]`.
//!
//! The vocabulary is learned from the file itself. "cold" starts with an empty cache, "warm" has seen
//! the text; "words" is what is left to do when the text is split already.

use std::collections::HashMap;
use std::fs;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustbpe::Error;
use rustbpe::encode::{Encoder, Vocabulary, WordEncoder};
use rustbpe::merge;
use rustbpe::split::{GPT4_PATTERN, Splitter};

const ROUNDS: usize = 7;

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let Some(path) = arguments.next() else {
        println!("give a text file to encode, and perhaps a vocabulary size");
        return Ok(());
    };
    let size = arguments.next().and_then(|size| size.parse().ok()).unwrap_or(65_536);
    let text = fs::read_to_string(&path).map_err(|source| Error::Io { path: path.into(), source })?;
    let megabytes = text.len() as f64 / 1e6;
    let mut words = Vec::new();
    Splitter::new(GPT4_PATTERN)?.words(&text, |word| words.push(word))?;
    let vocabulary = Arc::new(learn(&words, size)?);

    let started = Instant::now();
    vocabulary.merges();
    println!("{:8.1} ms to make the tables of {size} tokens", started.elapsed().as_secs_f64() * 1e3);

    let mut ids = Vec::with_capacity(text.len());
    let mut encoder = Encoder::new(Arc::clone(&vocabulary), GPT4_PATTERN)?;
    let mut word_encoder = WordEncoder::new(Arc::clone(&vocabulary));
    let mut splitter = Splitter::new(GPT4_PATTERN)?;
    let mut best = [Duration::MAX; 5];
    for _ in 0..ROUNDS {
        let mut cold = Encoder::new(Arc::clone(&vocabulary), GPT4_PATTERN)?;
        let mut cold_words = WordEncoder::new(Arc::clone(&vocabulary));
        let mut encode_words = |encoder: &mut WordEncoder| {
            ids.clear();
            words.iter().for_each(|word| encoder.add(&text, word, &mut ids));
            encoder.finish(&mut ids);
        };
        best[0] = best[0].min(time(|| encode_words(&mut cold_words)));
        best[1] = best[1].min(time(|| encode_words(&mut word_encoder)));
        let mut encode = |encoder: &mut Encoder| {
            ids.clear();
            encoder.encode(&text, &mut ids).expect("the pattern gives up on no text");
        };
        best[2] = best[2].min(time(|| encode(&mut cold)));
        best[3] = best[3].min(time(|| encode(&mut encoder)));
        best[4] = best[4].min(time(|| {
            let mut count = 0;
            splitter.words(&text, |_| count += 1).expect("the pattern gives up on no text");
            black_box(count);
        }));
    }
    for (name, best) in
        ["words, cold", "words, warm", "text, cold", "text, warm", "split alone"].iter().zip(best)
    {
        println!("{:8.1} MB/s {name}", megabytes / best.as_secs_f64());
    }
    println!("{:8.3} bytes a token", text.len() as f64 / ids.len() as f64);
    Ok(())
}

fn learn(words: &[&str], size: usize) -> Result<Vocabulary, Error> {
    let mut counts: HashMap<&str, u64> = HashMap::new();
    words.iter().for_each(|word| *counts.entry(word).or_default() += 1);
    let counts: Vec<(&str, u64)> = counts.into_iter().collect();
    let learned = merge::learn(&counts[..], size - 256, |_| Ok::<(), Error>(()))?;
    Ok(Vocabulary::from_merges(&learned))
}

fn time(work: impl FnOnce()) -> Duration {
    let started = Instant::now();
    work();
    started.elapsed()
}
