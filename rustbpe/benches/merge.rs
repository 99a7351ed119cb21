//! Learning merges: this crate beside the plain implementation that its tests compare with.
//!
//! In this folder: `cargo bench --bench merge` takes made-up words. Real ones come from counts files, their paths separated
//! by colons: `BPE_COUNTS=a.counts:b.counts cargo bench --bench merge`. A part of a benchmark's name as an
//! argument picks it. Both must learn the same merges, or the benchmark ends.

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use criterion::{Criterion, criterion_group, criterion_main};
use rustbpe::{Error, counts_file, merge};

#[path = "../src/merge/oracle.rs"]
mod oracle;

type Counts = Vec<(Box<[u8]>, u64)>;

fn words() -> Counts {
    let Some(paths) = std::env::var_os("BPE_COUNTS") else {
        return made_up_words(100_000);
    };
    let paths: Vec<PathBuf> = std::env::split_paths(&paths).collect();
    let (_, counts) =
        counts_file::add_up(&paths, 1, &AtomicBool::new(false)).expect("BPE_COUNTS names counts files");
    counts.iter().map(|(word, count)| (word.into(), count)).collect()
}

/// Words of syllables; the n-th most frequent one has an n-th of the count.
fn made_up_words(words: u64) -> Counts {
    let mut state = 88_172_645_463_325_252_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let syllables: Vec<Vec<u8>> =
        (0..600).map(|_| (0..1 + random(4)).map(|_| b'a' + random(26) as u8).collect()).collect();
    let word = |rank| {
        let mut word = vec![b' '];
        for _ in 0..1 + random(4) {
            word.extend(&syllables[random(600).min(random(600)) as usize]);
        }
        (word.into(), 1 + 5_000_000 / rank)
    };
    (1..=words).map(word).collect()
}

fn learn(words: &Counts, merges: usize) -> Vec<merge::Pair> {
    merge::learn(&words[..], merges, |_| Ok::<(), Error>(())).expect("the counts add up")
}

fn learn_plainly(words: &Counts, merges: usize) -> Vec<merge::Pair> {
    oracle::learn(words.iter().map(|(word, count)| (word, *count)), merges)
}

fn merging(criterion: &mut Criterion) {
    let words = words();
    let mut group = criterion.benchmark_group("merge");
    group.sample_size(10);
    for merges in [10_000, 65_280] {
        assert!(learn(&words, merges) == learn_plainly(&words, merges), "the merges differ");
        group.bench_function(format!("crate {merges}"), |bencher| {
            bencher.iter(|| learn(black_box(&words), merges));
        });
        group.bench_function(format!("plain {merges}"), |bencher| {
            bencher.iter(|| learn_plainly(black_box(&words), merges));
        });
    }
    group.finish();
}

criterion_group!(benches, merging);
criterion_main!(benches);
