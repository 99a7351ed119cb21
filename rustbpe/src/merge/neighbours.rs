//! What stands beside the places where a pair is joined, grouped by token.

use super::lists::Lists;
use super::words::Occurrence;

/// The neighbours on one side. Reused from merge to merge.
#[derive(Default)]
pub struct Neighbours {
    /// By token id; all zero but for the ids in `met`.
    groups: Vec<Group>,
    met: Vec<u32>,
    found: Vec<(u32, Occurrence)>,
}

#[derive(Clone, Copy, Default)]
struct Group {
    /// Sum of the counts of the words.
    weight: u64,
    occurrences: u32,
    /// Where in the arena the next occurrence goes.
    next: usize,
}

impl Neighbours {
    /// Make room for token ids below `ids`.
    pub fn reserve(&mut self, ids: usize) {
        self.groups.resize(ids, Group::default());
    }

    /// The token `id` stands here; `occurrence` is that of the pair which it makes with the joined token.
    #[inline]
    pub fn add(&mut self, id: u32, occurrence: Occurrence, weight: u64) {
        let group = &mut self.groups[id as usize];
        if group.occurrences == 0 {
            self.met.push(id);
        }
        group.occurrences += 1;
        group.weight += weight;
        self.found.push((id, occurrence));
    }

    /// The tokens that stand here, each once, with how often they do.
    pub fn weights(&self) -> impl Iterator<Item = (u32, u64)> {
        self.met.iter().map(|id| (*id, self.groups[*id as usize].weight))
    }

    /// Make the lists of the pairs of these tokens with the joined token, and forget the tokens.
    pub fn move_to(&mut self, lists: &mut Lists, key_with: impl Fn(u32) -> u64) {
        let least = lists.least();
        for id in &self.met {
            let group = &mut self.groups[*id as usize];
            if group.weight >= least {
                group.next = lists.add(key_with(*id), group.weight, group.occurrences as usize);
            }
        }
        for (id, occurrence) in self.found.drain(..) {
            let group = &mut self.groups[id as usize];
            if group.weight >= least {
                lists.arena[group.next] = occurrence;
                group.next += 1;
            }
        }
        for id in self.met.drain(..) {
            self.groups[id as usize] = Group::default();
        }
    }
}
