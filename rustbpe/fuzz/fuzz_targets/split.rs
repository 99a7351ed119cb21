//! Every tier splits every text as the automaton does, for each digit group.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use rustbpe::split::{GPT4_PATTERN, Splitter, Tier};

use self::automaton::Automaton;

#[path = "../../src/split/automaton.rs"]
mod automaton;

const DIGITS: [&str; 3] = [r"\p{N}", r"\p{N}{1,2}", r"\p{N}{1,3}"];

thread_local! {
    static ENGINES: RefCell<Vec<(Automaton, Vec<Splitter>)>> = RefCell::new(DIGITS.map(engines).into());
}

fn engines(digits: &str) -> (Automaton, Vec<Splitter>) {
    let pattern = GPT4_PATTERN.replace(r"\p{N}{1,3}", digits);
    let splitters = Tier::available().map(|tier| Splitter::with_tier(&pattern, tier).expect("available"));
    (Automaton::new(digits), splitters.collect())
}

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    ENGINES.with_borrow_mut(|engines| {
        for (automaton, splitters) in engines {
            let mut expected = Vec::new();
            automaton.words(&text, |word| expected.push(word));
            for splitter in splitters {
                let mut words = Vec::new();
                splitter.words(&text, |word| words.push(word)).expect("a GPT-4 pattern cannot fail");
                assert_eq!(words, expected);
            }
        }
    });
});
