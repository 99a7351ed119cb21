//! Bytes split per second, one thread: every tier of this processor, and the automaton of
//! regex-automata that they replaced.
//!
//! In this folder: `cargo bench --bench split`; `RUSTBPE_BENCH_TEXT=FILE` adds a text of one's own.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rustbpe::split::{GPT4_PATTERN, Splitter, Tier};

use self::automaton::Automaton;

#[path = "../src/split/automaton.rs"]
mod automaton;

const ENGLISH: &str = "The harbour was quiet at six o'clock; only the gulls, who didn't care for the \
    cold, walked along the wall. \"We'll wait,\" she said, \"until the 17:40 boat comes in.\"\n\n\
    It came at 18:05, with 230 people on board and no mail.\n";

const MULTILINGUAL: &str = "Der Hafen war früh um sechs ruhig; nur die Möwen störte die Kälte nicht. \
    Le port était calme à six heures, et l'été n'était pas loin. В шесть часов утра в гавани было тихо, \
    только чайки ходили по стене. Στις έξι το πρωί το λιμάνι ήταν ήσυχο. 早上六点，港口很安静，只有海鸥在墙上走。\
    朝の六時、港は静かで、カモメだけが壁の上を歩いていた。 아침 여섯 시, 항구는 조용했다. كان الميناء هادئا في السادسة صباحا. \
    सुबह छह बजे बंदरगाह शांत था।\n";

fn count(splitter: &mut Splitter, text: &str) -> usize {
    let mut words = 0;
    splitter.words(text, |word| words += usize::from(!black_box(word).is_empty())).expect("no limit");
    words
}

fn benchmark(criterion: &mut Criterion) {
    let mut texts = vec![("english", ENGLISH.repeat(4000)), ("multilingual", MULTILINGUAL.repeat(1000))];
    if let Some(path) = std::env::var_os("RUSTBPE_BENCH_TEXT") {
        texts.push(("file", std::fs::read_to_string(path).expect("RUSTBPE_BENCH_TEXT is a UTF-8 file")));
    }
    for (name, text) in texts {
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(text.len() as u64)).sample_size(10);
        for tier in Tier::available() {
            let mut splitter = Splitter::with_tier(GPT4_PATTERN, tier).expect("an available tier");
            group.bench_function(tier.name(), |bencher| bencher.iter(|| count(&mut splitter, &text)));
        }
        let mut automaton = Automaton::new(r"\p{N}{1,3}");
        group.bench_function("automaton", |bencher| {
            bencher.iter(|| {
                automaton.words(&text, |word| {
                    black_box(word);
                })
            });
        });
        group.finish();
    }
}

criterion_group!(benches, benchmark);
criterion_main!(benches);
