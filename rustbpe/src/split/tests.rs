use super::automaton::Automaton;
use super::*;

const GPT4_DIGITS: [&str; 3] = [r"\p{N}", r"\p{N}{1,2}", r"\p{N}{1,3}"];

/// The characters at which the alternatives meet: apostrophes, case folding (ſ), digits and spaces of
/// several scripts, every kind of line end, combining marks, letters that blocks know by their lead byte
/// and their neighbours that are none, beyond the first plane.
#[rustfmt::skip]
const ALPHABET: [&str; 72] = [
    "'", "'", "'s", "'S", "'ſ", "ſ", "'ll", "'lL", "'v", "'ve", "'re", "s", "l", "e", "r", "R", "ab", "Z", "@",
    "[", "`", "{", "é", "×", "÷", "ÿ", "ʿ", "ˀ", "e\u{301}", "\u{301}", "я", "\u{483}", "ω", "϶", "א", "ع", "日",
    "\u{4dbf}", "䷀", "한", "\u{d7a4}", "ক", "ি", "0", "7", "12", "/", ":", "٣", "Ⅷ", "½", "²", " ", " ", "  ", "\t",
    "\n", "\n", "\r", "\r\n", "\u{b}", "\u{1c}", "\u{85}", "\u{a0}", "\u{2028}", "\u{3000}", "\u{200b}", "!", "—",
    "😀", "\u{1d400}", "\u{10ffff}",
];

/// What a block is filled with before and after the place of interest.
const FILLERS: [&str; 12] = [" ", "a", "1", "!", "\n", "'", "é", "日", "—", "\u{2028}", "𐐀", "a "];

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }

    fn one_of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.below(choices.len())]
    }

    /// Up to several blocks, of one of four kinds.
    fn text(&mut self) -> String {
        let pieces = match self.below(8) {
            0 => self.below(300),
            1..4 => self.below(60),
            _ => self.below(14),
        };
        // A few signs make patterns within a block likely; all of them, meetings of any two.
        let few: Vec<&str> = (0..1 + self.below(6)).map(|_| self.one_of(&ALPHABET)).collect();
        let kind = self.below(4);
        let mut text = String::new();
        for _ in 0..pieces {
            match kind {
                0 => text += self.one_of(&ALPHABET),
                1 => text += self.one_of(&few),
                2 => text += &self.one_of(&ALPHABET).repeat(1 + self.below(9)),
                _ => text.push(self.character()),
            }
        }
        if self.below(4) == 0 {
            let filler = self.one_of(&FILLERS).repeat(self.below(70));
            text.insert_str(0, &filler);
            text += &"x".repeat(self.below(70));
        }
        text
    }

    /// Half of them ASCII, a quarter in the first plane, a quarter anywhere.
    fn character(&mut self) -> char {
        let limit = [0x80, 0x80, 0x1_0000, 0x11_0000][self.below(4)];
        char::from_u32(self.below(limit) as u32).unwrap_or('\u{fffd}')
    }
}

/// All engines for one digit group.
struct Engines {
    automaton: Automaton,
    backtracking: Regex,
    splitters: Vec<(Tier, Splitter)>,
}

impl Engines {
    fn new(digits: &str) -> Self {
        let pattern = gpt4(digits);
        Self {
            automaton: Automaton::new(digits),
            backtracking: Regex::new(&pattern).unwrap(),
            splitters: Tier::available()
                .map(|tier| (tier, Splitter::with_tier(&pattern, tier).unwrap()))
                .collect(),
        }
    }

    fn all() -> [Self; 3] {
        GPT4_DIGITS.map(Self::new)
    }

    fn assert_that_tiers_split_as_the_automaton(&mut self, text: &str) {
        let mut expected = Vec::new();
        self.automaton.words(text, |word| expected.push(word));
        for (tier, splitter) in &mut self.splitters {
            let mut words = Vec::new();
            splitter.words(text, |word| words.push(word)).unwrap();
            if words != expected {
                let at = words.iter().zip(&expected).take_while(|(word, right)| word == right).count();
                let (before, words, right) =
                    (&words[at.saturating_sub(3)..at], &words[at..], &expected[at..]);
                panic!(
                    "{tier:?} splits {:?} as {:?} after {before:?}, not as {:?}",
                    text.get(..400).unwrap_or(text),
                    &words[..words.len().min(5)],
                    &right[..right.len().min(5)]
                );
            }
        }
    }

    fn assert_that_all_split_alike(&mut self, text: &str) {
        let mut words = Vec::new();
        self.automaton.words(text, |word| words.push(word));
        let expected: Vec<&str> =
            self.backtracking.find_iter(text).map(|found| found.unwrap().as_str()).collect();
        assert_eq!(words, expected, "the automaton splits {text:?}");
        self.assert_that_tiers_split_as_the_automaton(text);
    }
}

fn split(pattern: &str, text: &str) -> Vec<String> {
    let mut words = Vec::new();
    Splitter::new(pattern).unwrap().words(text, |word| words.push(word.to_owned())).unwrap();
    words
}

fn gpt4(digits: &str) -> String {
    format!("{GPT4_BEFORE_DIGITS}{digits}{GPT4_AFTER_DIGITS}")
}

#[test]
fn the_gpt4_pattern_splits_as_published() {
    assert_eq!(
        split(GPT4_PATTERN, "Hello world, it's 12345!\n\n  x = 1"),
        ["Hello", " world", ",", " it", "'s", " ", "123", "45", "!\n\n", " ", " x", " =", " ", "1"]
    );
    assert_eq!(split(&gpt4(r"\p{N}{1,2}"), "12345"), ["12", "34", "5"]);
    assert_eq!(split(&gpt4(r"\p{N}"), "123"), ["1", "2", "3"]);
}

#[test]
fn the_known_patterns_are_split_by_hand_and_others_are_not() {
    for digits in GPT4_DIGITS {
        assert!(matches!(Splitter::new(&gpt4(digits)).unwrap().engine, Engine::Gpt4 { .. }));
    }
    assert!(matches!(Splitter::new(&gpt4(r"\p{N}{1,4}")).unwrap().engine, Engine::Any(_)));
}

/// `RUSTBPE_FUZZ` is the number of texts for a longer run.
#[test]
fn every_tier_splits_random_texts_exactly_as_both_engines() {
    let rounds = std::env::var("RUSTBPE_FUZZ").map_or(80_000, |rounds| rounds.parse().unwrap());
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ rounds);
    let mut engines = Engines::all();
    for round in 0..rounds {
        engines[(round % 3) as usize].assert_that_all_split_alike(&random.text());
    }
}

#[test]
fn every_meeting_of_signs_splits_alike_at_every_offset_from_a_block_border() {
    #[rustfmt::skip]
    let places = [
        "'s", "'st", "'ll", "'llx", "'ſx", " 's", "!'re", "''ve", "a'mb", "12345678", "1é2", "\n  \u{2028}x",
        "\n  x", "\n \n\t\ty", "  \r\n  \r\n ", " \u{a0}x", "\t!", " !\n\n  a", "?!\r\n\r\nb", "—日", " —日", "—— я",
        "é×", "日、本", "\u{3000}日", "½12", "12½", "٣٣٣٣", "e\u{301}a", "😀z", " 😀\n", "𐐀𐐀 𐐀",
    ];
    let mut engines = Engines::all();
    let mut texts = 0;
    for place in places {
        for filler in FILLERS {
            for count in 0..=132 / filler.len() {
                let tail = FILLERS[texts % FILLERS.len()].repeat(texts % 71);
                let text = format!("{}{place}{tail}", filler.repeat(count));
                engines[texts % 3].assert_that_all_split_alike(&text);
                texts += 1;
            }
        }
    }
    assert!(texts > 20_000);
}

#[test]
fn texts_of_every_length_split_alike() {
    let mut engines = Engines::all();
    let mut random = Random(2);
    for length in 0..=260 {
        for round in 0..60 {
            let few: Vec<&str> = (0..2 + round % 7).map(|_| random.one_of(&ALPHABET)).collect();
            let mut text = String::new();
            while text.len() < length {
                text += random.one_of(&few);
            }
            while !text.is_char_boundary(length) {
                text.insert(0, 'q');
            }
            engines[round % 3].assert_that_all_split_alike(&text[..length]);
        }
    }
}

#[test]
fn every_character_splits_alike_between_neighbours_of_every_class() {
    let mut engines = Engines::all();
    for (round, (before, after)) in
        [("", ""), ("a", "b"), ("'", "s"), (" ", " "), ("1", "2"), ("\n ", "\n"), ("!", "x"), ("  ", "é")]
            .into_iter()
            .enumerate()
    {
        let mut text = String::new();
        for character in '\0'..=char::MAX {
            text += before;
            text.push(character);
            text += after;
        }
        engines[round % 3].assert_that_tiers_split_as_the_automaton(&text);
    }
}

#[test]
fn any_other_pattern_is_taken_at_its_word_and_empty_matches_are_no_words() {
    assert_eq!(split(r"[a-z]*", "ab1cd"), ["ab", "cd"]);
    assert_eq!(split(r"\w+(?=!)", "yes! no"), ["yes"]);
}

#[test]
fn long_runs_neither_fail_nor_take_forever() {
    for tier in Tier::available() {
        let mut splitter = Splitter::with_tier(GPT4_PATTERN, tier).unwrap();
        for filler in [" ", "\n", "a", "1", "!", "é", "\n  ", "'s"] {
            let text = format!("{}x", filler.repeat(2_000_000));
            let mut bytes = 0;
            splitter.words(&text, |word| bytes += word.len()).unwrap();
            assert_eq!(bytes, text.len());
        }
    }
}

#[test]
fn a_tier_that_the_processor_lacks_is_an_error_that_names_what_there_is() {
    let missing = if cfg!(target_arch = "x86_64") { Tier::Neon } else { Tier::Avx2 };
    let error = Splitter::with_tier(GPT4_PATTERN, missing).err().unwrap().to_string();
    assert!(error.contains(missing.name()) && error.contains("scalar"), "{error}");
}

#[test]
fn a_bad_pattern_is_an_error_that_shows_it() {
    let error = Splitter::new("(").err().unwrap().to_string();
    assert!(error.contains("not a regular expression") && error.ends_with("pattern: ("), "{error}");
}

#[test]
fn a_pattern_that_backtracks_too_far_is_an_error() {
    let text = format!("{}x", " ".repeat(2_000_000));
    let pattern = r"\S+|\s*[\r\n]|\s+(?!\S)|\s+";
    let error = Splitter::new(pattern).unwrap().words(&text, |_| ()).err();
    assert!(error.unwrap().to_string().contains("gave up"));
}
