//! Sample paths: tokens that chose the same experts in the last few layers choose alike in the next one (section 5 of
//! the Lina paper).
//!
//! A *path* is the first choices of a token in the last l layers. For every path of the tokens that were profiled the
//! tables keep how often each expert was chosen next, all k choices counted. A path that was not seen backs off to its
//! longest suffix that was, in the end to the layer's overall distribution.
//!
//! Keys are numbers in base `experts`, the latest choice in the lowest digit, so a suffix is a remainder.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

/// Tables that cannot be, or that do not fit together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathError {
    /// Found and expected, one sentence.
    pub message: String,
}

impl PathError {
    fn new<T>(message: String) -> Result<T, Self> {
        Err(PathError { message })
    }
}

impl fmt::Display for PathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for PathError {}

/// Share of tokens that follow the tokens which chose the same expert in the layer before: whose first choice is the one
/// that most of them, or one of the two that most of them, make.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Following {
    /// Share that chooses the group's top expert.
    pub top_1: f64,
    /// Share that chooses one of the group's top two.
    pub top_2: f64,
}

/// What tokens choose next, by what they chose before.
#[derive(Clone, Debug, PartialEq)]
pub struct PathTables {
    layers: usize,
    experts: usize,
    top_k: usize,
    length: usize,
    /// Table of layer j and paths of m choices, m up to min(length, j): `keys[tables[t] .. tables[t + 1]]`, t counted
    /// over layers and, in each, over m.
    tables: Vec<u64>,
    /// First table of each layer.
    first_tables: Vec<usize>,
    /// Ascending in each table.
    keys: Vec<u64>,
    /// Entries of a key: `[entries[i] .. entries[i + 1]]` of `next` and `counts`, most frequent first.
    entries: Vec<u64>,
    next: Vec<u16>,
    counts: Vec<u32>,
    following: Vec<Following>,
}

/// [`PathTables`] as flat arrays, for storage.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PathArrays {
    /// Layers, experts, top_k, length.
    pub shape: [u64; 4],
    /// Where each table's keys begin and the last one's end.
    pub tables: Vec<u64>,
    /// Paths, as numbers in base `experts` with the latest choice in the lowest digit; ascending in each table.
    pub keys: Vec<u64>,
    /// Where each key's entries begin and the last one's end.
    pub entries: Vec<u64>,
    /// Experts chosen next, most frequent first.
    pub next: Vec<u16>,
    /// How often each was.
    pub counts: Vec<u32>,
    /// `[layers, 2]`: [`Following`] of each layer.
    pub following: Vec<f64>,
}

/// Counts what tokens choose.
#[derive(Clone, Debug)]
pub struct PathTablesBuilder {
    layers: usize,
    experts: usize,
    top_k: usize,
    length: usize,
    /// `[layers]`: by path of the longest length, how often each expert was chosen next.
    counts: Vec<HashMap<u64, Vec<(u16, u32)>>>,
    /// `[layers]`: by first choices here and in the layer before, the number of tokens.
    pairs: Vec<HashMap<(u16, u16), u64>>,
}

/// Whether paths of `length` choices among `experts` are numbers of 64 bits.
fn check_shape(layers: usize, experts: usize, top_k: usize, length: usize) -> Result<(), PathError> {
    if layers == 0 || experts == 0 || top_k == 0 {
        return PathError::new(format!(
            "{layers} layers of {experts} experts, of which a token chooses {top_k}: each must be at least 1"
        ));
    }
    if experts > u16::MAX as usize + 1 || top_k > experts {
        return PathError::new(format!(
            "{top_k} choices among {experts} experts: expected at most 65536 experts, and no more choices than experts"
        ));
    }
    if u32::try_from(length).ok().and_then(|length| (experts as u64).checked_pow(length)).is_none() {
        return PathError::new(format!(
            "paths of {length} choices among {experts} experts: expected experts to the power of the length below 2^64"
        ));
    }
    Ok(())
}

impl PathTables {
    /// Tables of paths of up to `length` layers, for `layers` MoE layers of `experts` experts of which a token chooses
    /// `top_k`.
    ///
    /// # Errors
    /// If a number is zero (the length may be), or if `experts` to the power of `length` is too large for a key.
    pub fn builder(layers: usize, experts: usize, top_k: usize, length: usize) -> Result<PathTablesBuilder, PathError> {
        check_shape(layers, experts, top_k, length)?;
        Ok(PathTablesBuilder {
            layers,
            experts,
            top_k,
            length,
            counts: vec![HashMap::new(); layers],
            pairs: vec![HashMap::new(); layers],
        })
    }

    /// Number of MoE layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Number of experts of each layer.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Experts that a token chooses.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Length of the longest paths, in layers.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The experts that a token is expected to choose in MoE layer `layer`, likeliest first, into `top` (`top_k` long;
    /// fewer or more are filled alike). `path` are its first choices in the layers before, oldest first, as many as are
    /// known. An expert that does not exist makes a path unseen.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn predict(&self, layer: usize, path: &[u32], top: &mut [u32]) {
        let longest = self.length.min(layer).min(path.len());
        let mut filled = 0;
        for length in (0..=longest).rev() {
            let Some(entries) = self.find(layer, &path[path.len() - length..]) else { continue };
            for &expert in &self.next[entries] {
                if filled == top.len() {
                    return;
                }
                if !top[..filled].contains(&u32::from(expert)) {
                    top[filled] = u32::from(expert);
                    filled += 1;
                }
            }
        }
        // Only where almost nothing was profiled.
        let mut any = 0..self.experts as u32;
        while filled < top.len() {
            let Some(expert) = any.next() else { break };
            if !top[..filled].contains(&expert) {
                top[filled] = expert;
                filled += 1;
            }
        }
    }

    /// What tokens with exactly the last choices `path` (oldest first, at most [`PathTables::length`]) chose in `layer`:
    /// (expert, times), most frequent first; `None` if there were none.
    pub fn distribution(&self, layer: usize, path: &[u32]) -> Option<impl Iterator<Item = (u32, u32)>> {
        let entries = self.find(layer, path)?;
        let next = &self.next[entries.clone()];
        Some(next.iter().zip(&self.counts[entries]).map(|(&expert, &count)| (u32::from(expert), count)))
    }

    /// Entries of a path.
    fn find(&self, layer: usize, path: &[u32]) -> Option<std::ops::Range<usize>> {
        if path.len() > self.length.min(layer) {
            return None;
        }
        let mut key = 0u64;
        for &expert in path {
            if expert as usize >= self.experts {
                return None;
            }
            key = key * self.experts as u64 + u64::from(expert);
        }
        let table = self.first_tables[layer] + path.len();
        let (start, end) = (self.tables[table] as usize, self.tables[table + 1] as usize);
        let i = start + self.keys[start..end].binary_search(&key).ok()?;
        Some(self.entries[i] as usize..self.entries[i + 1] as usize)
    }

    /// How much tokens of the same expert keep together from the layer before `layer` to `layer`; `None` for the first
    /// layer.
    pub fn following(&self, layer: usize) -> Option<Following> {
        (layer > 0).then(|| self.following[layer])
    }

    /// Number of (path, expert) pairs.
    pub fn entries(&self) -> usize {
        self.next.len()
    }

    /// Number of paths, shorter ones included.
    pub fn paths(&self) -> usize {
        self.keys.len()
    }

    /// What the arrays take, in bytes.
    pub fn bytes(&self) -> usize {
        8 * (self.tables.len() + self.keys.len() + self.entries.len() + 2 * self.following.len())
            + 2 * self.next.len()
            + 4 * self.counts.len()
    }

    /// The tables as arrays.
    pub fn to_arrays(&self) -> PathArrays {
        PathArrays {
            shape: [self.layers, self.experts, self.top_k, self.length].map(|n| n as u64),
            tables: self.tables.clone(),
            keys: self.keys.clone(),
            entries: self.entries.clone(),
            next: self.next.clone(),
            counts: self.counts.clone(),
            following: self.following.iter().flat_map(|following| [following.top_1, following.top_2]).collect(),
        }
    }

    /// Tables from arrays that may have been damaged.
    ///
    /// # Errors
    /// If the arrays do not fit together.
    pub fn from_arrays(arrays: PathArrays) -> Result<Self, PathError> {
        let mut shape = [0usize; 4];
        for (shape, &stored) in shape.iter_mut().zip(&arrays.shape) {
            *shape = usize::try_from(stored).unwrap_or(usize::MAX);
        }
        let [layers, experts, top_k, length] = shape;
        check_shape(layers, experts, top_k, length)?;
        // A damaged number of layers may be huge; each has a table.
        let tables = (layers < arrays.tables.len()).then(|| (0..layers).map(|layer| length.min(layer) + 1).sum());
        if tables != arrays.tables.len().checked_sub(1) {
            return PathError::new(format!(
                "`tables` has {} numbers, expected one for each path length of {layers} layers and one more",
                arrays.tables.len()
            ));
        }
        check_offsets("tables", &arrays.tables, arrays.keys.len(), 0)?;
        if arrays.entries.len() != arrays.keys.len() + 1 {
            return PathError::new(format!(
                "`entries` has {} numbers for {} keys, expected one more than keys",
                arrays.entries.len(),
                arrays.keys.len()
            ));
        }
        check_offsets("entries", &arrays.entries, arrays.next.len(), 1)?;
        if arrays.counts.len() != arrays.next.len() {
            return PathError::new(format!(
                "`counts` has {} numbers for {} experts, expected as many",
                arrays.counts.len(),
                arrays.next.len()
            ));
        }
        if let Some(expert) = arrays.next.iter().find(|&&expert| usize::from(expert) >= experts) {
            return PathError::new(format!("`next` names expert {expert}, but a layer has {experts}"));
        }
        let first_tables = first_tables(layers, length);
        for (layer, &first) in first_tables.iter().enumerate() {
            for m in 0..=length.min(layer) {
                let keys = &arrays.keys[arrays.tables[first + m] as usize..arrays.tables[first + m + 1] as usize];
                let end = (experts as u64).pow(m as u32);
                if keys.windows(2).any(|pair| pair[0] >= pair[1]) || keys.last().is_some_and(|&last| last >= end) {
                    return PathError::new(format!(
                        "`keys` of layer {layer} and paths of {m} choices are not ascending numbers below {end}"
                    ));
                }
            }
        }
        if arrays.following.len() != 2 * layers || arrays.following.iter().any(|share| !(0.0..=1.0).contains(share)) {
            return PathError::new(format!("`following` is expected to have {} shares between 0 and 1", 2 * layers));
        }
        let following = arrays.following.chunks_exact(2).map(|pair| Following { top_1: pair[0], top_2: pair[1] });
        Ok(PathTables {
            layers,
            experts,
            top_k,
            length,
            first_tables,
            following: following.collect(),
            tables: arrays.tables,
            keys: arrays.keys,
            entries: arrays.entries,
            next: arrays.next,
            counts: arrays.counts,
        })
    }
}

/// Fails unless `offsets` go from 0 to `end` in steps of `least` or more.
fn check_offsets(name: &str, offsets: &[u64], end: usize, least: u64) -> Result<(), PathError> {
    let ascending = offsets.windows(2).all(|pair| pair[1] >= pair[0] && pair[1] - pair[0] >= least);
    if offsets.first() != Some(&0) || offsets.last() != Some(&(end as u64)) || !ascending {
        return PathError::new(format!("`{name}` are not ascending positions from 0 to {end}"));
    }
    Ok(())
}

/// The first table of each layer.
fn first_tables(layers: usize, length: usize) -> Vec<usize> {
    let mut next = 0;
    (0..layers)
        .map(|layer| {
            let first = next;
            next += length.min(layer) + 1;
            first
        })
        .collect()
}

impl PathTablesBuilder {
    /// A token's `choices` `[layers, top_k]`, first choices first.
    ///
    /// # Errors
    /// If there are more or fewer, or one is not an expert.
    pub fn add(&mut self, choices: &[u32]) -> Result<(), PathError> {
        if choices.len() != self.layers * self.top_k {
            return PathError::new(format!(
                "{} choices of a token, expected {} in each of {} layers",
                choices.len(),
                self.top_k,
                self.layers
            ));
        }
        if let Some(expert) = choices.iter().find(|&&expert| expert as usize >= self.experts) {
            return PathError::new(format!("a token chose expert {expert}, but a layer has {}", self.experts));
        }
        let modulus = (self.experts as u64).pow(self.length as u32);
        let (mut key, mut before) = (0u64, None);
        for (layer, choices) in choices.chunks_exact(self.top_k).enumerate() {
            let counts = self.counts[layer].entry(key).or_default();
            for &expert in choices {
                match counts.iter_mut().find(|(counted, _)| u32::from(*counted) == expert) {
                    Some((_, count)) => *count = count.saturating_add(1),
                    None => counts.push((expert as u16, 1)),
                }
            }
            let first = choices[0] as u16;
            if let Some(before) = before {
                *self.pairs[layer].entry((before, first)).or_default() += 1;
            }
            before = Some(first);
            // The product may exceed 64 bits where the modulus is close to them.
            key = ((u128::from(key) * self.experts as u128 + u128::from(first)) % u128::from(modulus)) as u64;
        }
        Ok(())
    }

    /// The tables of all tokens so far.
    pub fn finish(self) -> PathTables {
        let mut tables = PathTables {
            layers: self.layers,
            experts: self.experts,
            top_k: self.top_k,
            length: self.length,
            tables: vec![0],
            first_tables: first_tables(self.layers, self.length),
            keys: Vec::new(),
            entries: vec![0],
            next: Vec::new(),
            counts: Vec::new(),
            following: self.pairs.iter().map(following).collect(),
        };
        for (layer, longest) in self.counts.into_iter().enumerate() {
            for length in 0..=self.length.min(layer) {
                let modulus = (self.experts as u64).pow(length as u32);
                let mut by_suffix: BTreeMap<u64, BTreeMap<u16, u32>> = BTreeMap::new();
                for (key, counts) in &longest {
                    let sums = by_suffix.entry(key % modulus).or_default();
                    for &(expert, count) in counts {
                        let sum = sums.entry(expert).or_default();
                        *sum = sum.saturating_add(count);
                    }
                }
                for (key, counts) in by_suffix {
                    let mut counts: Vec<(u16, u32)> = counts.into_iter().collect();
                    counts.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
                    tables.keys.push(key);
                    tables.next.extend(counts.iter().map(|&(expert, _)| expert));
                    tables.counts.extend(counts.iter().map(|&(_, count)| count));
                    tables.entries.push(tables.next.len() as u64);
                }
                tables.tables.push(tables.keys.len() as u64);
            }
        }
        tables
    }
}

/// Of tokens by (choice before, choice now): how many make their group's choice.
fn following(pairs: &HashMap<(u16, u16), u64>) -> Following {
    let mut groups: HashMap<u16, (u64, u64)> = HashMap::new();
    let mut total = 0u64;
    for (&(before, _), &tokens) in pairs {
        let (first, second) = groups.entry(before).or_default();
        if tokens > *first {
            (*first, *second) = (tokens, *first);
        } else {
            *second = tokens.max(*second);
        }
        total += tokens;
    }
    if total == 0 {
        return Following::default();
    }
    let (first, second) = groups.values().fold((0, 0), |sums, group| (sums.0 + group.0, sums.1 + group.1));
    Following { top_1: first as f64 / total as f64, top_2: (first + second) as f64 / total as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tables(tokens: &[Vec<u32>], layers: usize, experts: usize, top_k: usize, length: usize) -> PathTables {
        let mut builder = PathTables::builder(layers, experts, top_k, length).unwrap();
        tokens.iter().for_each(|token| builder.add(token).unwrap());
        builder.finish()
    }

    #[test]
    fn a_path_says_more_than_its_end_and_backs_off_to_it() {
        // Three layers, top-1: what a token chooses in the last one depends on the first.
        let tokens = [[0, 0, 1], [0, 0, 1], [1, 0, 2], [1, 0, 2], [1, 0, 2], [2, 3, 3]].map(|token| token.to_vec());
        let tables = tables(&tokens, 3, 4, 1, 2);
        let predict = |path: &[u32]| {
            let mut top = [9];
            tables.predict(2, path, &mut top);
            top[0]
        };
        assert_eq!((predict(&[0, 0]), predict(&[1, 0])), (1, 2));
        // Unseen, then known by its end, then by nothing.
        assert_eq!((predict(&[3, 0]), predict(&[0, 3]), predict(&[0, 1]), predict(&[])), (2, 3, 2, 2));
        assert_eq!(predict(&[7, 7]), 2, "experts that do not exist are unseen");
        let distribution: Vec<_> = tables.distribution(2, &[0]).unwrap().collect();
        assert_eq!(distribution, [(2, 3), (1, 2)]);
        assert!(tables.distribution(2, &[1]).is_none());
        // After expert 0 in layer 1, 3 of 5 choose 2 and 2 of 5 choose 1; after 3, the only one chooses 3.
        assert_eq!(tables.following(2), Some(Following { top_1: 4.0 / 6.0, top_2: 1.0 }));
        assert_eq!(tables.following(0), None);
    }

    #[test]
    fn what_a_path_lacks_is_filled_by_shorter_ones() {
        let tables = tables(&[vec![0, 1, 2, 3], vec![1, 0, 2, 0]], 2, 4, 2, 1);
        let mut top = [9; 4];
        tables.predict(1, &[0], &mut top);
        assert_eq!(top, [2, 3, 0, 1]);
    }

    #[test]
    fn shapes_and_choices_that_do_not_fit_are_refused() {
        let message =
            |layers, experts, top_k, length| PathTables::builder(layers, experts, top_k, length).unwrap_err().message;
        assert!(message(0, 4, 1, 3).contains("each must be at least 1"));
        assert!(message(2, 4, 5, 3).contains("no more choices than experts"));
        assert!(message(2, 65536, 1, 4).contains("below 2^64"));
        let mut builder = PathTables::builder(2, 65536, 1, 3).unwrap();
        builder.add(&[65535, 65535]).unwrap();
        assert_eq!(builder.add(&[1]).unwrap_err().message, "1 choices of a token, expected 1 in each of 2 layers");
        let mut builder = PathTables::builder(1, 4, 1, 3).unwrap();
        assert_eq!(builder.add(&[4]).unwrap_err().message, "a token chose expert 4, but a layer has 4");
    }

    /// Tokens of `layers` layers, top-k choices of which are different.
    fn profile() -> impl Strategy<Value = (Vec<Vec<u32>>, usize, usize, usize, usize)> {
        (1usize..5, 1usize..5, 0usize..4).prop_flat_map(|(layers, experts, length)| {
            (1..=experts).prop_flat_map(move |top_k| {
                let order = Just((0..experts as u32).collect::<Vec<_>>()).prop_shuffle();
                let token = prop::collection::vec(order, layers).prop_map(move |layers| {
                    layers.iter().flat_map(|order| order[..top_k].to_vec()).collect::<Vec<u32>>()
                });
                (prop::collection::vec(token, 0..40), Just((layers, experts, top_k, length)))
                    .prop_map(|(tokens, (layers, experts, top_k, length))| (tokens, layers, experts, top_k, length))
            })
        })
    }

    proptest! {
        #[test]
        fn predictions_are_those_of_counting((tokens, layers, experts, top_k, length) in profile()) {
            let tables = tables(&tokens, layers, experts, top_k, length);
            prop_assert_eq!(&PathTables::from_arrays(tables.to_arrays()).unwrap(), &tables);
            for token in &tokens {
                let firsts: Vec<u32> = token.chunks_exact(top_k).map(|choices| choices[0]).collect();
                for layer in 0..layers {
                    let suffix = length.min(layer);
                    let path = &firsts[layer - suffix..layer];
                    let mut counts = vec![0u32; experts];
                    for other in &tokens {
                        let same = (0..suffix).all(|i| other[(layer - suffix + i) * top_k] == path[i]);
                        let choices = &other[layer * top_k..(layer + 1) * top_k];
                        choices.iter().filter(|_| same).for_each(|&expert| counts[expert as usize] += 1);
                    }
                    let mut expected: Vec<u32> = (0..experts as u32).collect();
                    expected.sort_by_key(|&expert| std::cmp::Reverse(counts[expert as usize]));
                    let mut top = vec![0; top_k];
                    tables.predict(layer, &firsts[..layer], &mut top);
                    prop_assert_eq!(&top[..], &expected[..top_k]);
                }
            }
        }

        #[test]
        fn damaged_arrays_are_refused_or_used_without_panic(
            (tokens, layers, experts, top_k, length) in profile(),
            array in 0usize..7, position in any::<prop::sample::Index>(),
            value in prop_oneof![any::<u64>(), 0u64..70], cut in any::<bool>(),
        ) {
            let mut arrays = tables(&tokens, layers, experts, top_k, length).to_arrays();
            macro_rules! damage {
                ($array:expr, $value:expr) => {
                    if !$array.is_empty() {
                        let i = position.index($array.len());
                        if cut { $array.truncate(i) } else { $array[i] = $value }
                    }
                };
            }
            match array {
                0 => arrays.shape[position.index(4)] = value,
                1 => damage!(arrays.tables, value),
                2 => damage!(arrays.keys, value),
                3 => damage!(arrays.entries, value),
                4 => damage!(arrays.next, value as u16),
                5 => damage!(arrays.counts, value as u32),
                _ => damage!(arrays.following, f64::from_bits(value)),
            }
            if let Ok(tables) = PathTables::from_arrays(arrays) {
                let mut top = [0; 3];
                for layer in 0..tables.layers() {
                    tables.predict(layer, &[0, 1, 2, 3], &mut top);
                    prop_assert!(top.iter().all(|&expert| (expert as usize) < tables.experts()));
                }
            }
        }
    }
}
