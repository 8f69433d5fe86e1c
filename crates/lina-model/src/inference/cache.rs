//! Keys and values of the sequences that a rank serves, in pages.
//!
//! A sequence reserves its pages when it comes, for as long as it may become: it never has to be driven out again, and
//! memory is bounded. Pages need not lie together (Kwon et al., "PagedAttention", 2023).

use std::collections::HashMap;

use lina_kernels::{PAGE_TOKENS, page_elements};

use crate::config::ModelConfig;

/// The cache of one rank.
#[derive(Debug)]
pub struct KvCache {
    /// For each layer, `[pages, page_elements]`; none where a device has the memory. Memory is committed when a page is first
    /// written.
    layers: Vec<Vec<f32>>,
    free: Vec<u32>,
    pages: usize,
    sequences: HashMap<u32, CachedSequence>,
}

/// What the cache holds of one sequence.
#[derive(Debug)]
pub(crate) struct CachedSequence {
    pub pages: Vec<u32>,
    /// Tokens whose keys and values are there.
    pub tokens: usize,
}

impl KvCache {
    /// An empty cache of `pages` pages in each layer.
    pub fn new(config: &ModelConfig, pages: usize) -> Self {
        let elements = page_elements(config.kv_heads, config.head_dim);
        let layers = (0..config.layers).map(|_| vec![0.0; pages * elements]).collect();
        KvCache { layers, ..KvCache::without_memory(pages) }
    }

    /// Only says which sequence has which of `pages` pages: their memory is elsewhere.
    pub(crate) fn without_memory(pages: usize) -> Self {
        KvCache { layers: Vec::new(), free: (0..pages as u32).rev().collect(), pages, sequences: HashMap::new() }
    }

    /// Elements of one page of all layers.
    pub fn page_elements(config: &ModelConfig) -> usize {
        config.layers * page_elements(config.kv_heads, config.head_dim)
    }

    /// Pages that a sequence of `tokens` tokens needs.
    pub fn pages_for(tokens: usize) -> usize {
        tokens.div_ceil(PAGE_TOKENS)
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Pages that no sequence has reserved.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Reserves `pages` pages for a new sequence.
    ///
    /// # Panics
    /// If the sequence is there already, or there are fewer free pages: who admits sequences counts pages.
    pub fn admit(&mut self, id: u32, pages: usize) {
        assert!(pages <= self.free.len(), "{pages} pages for sequence {id}, {} are free", self.free.len());
        let pages = self.free.split_off(self.free.len() - pages);
        let before = self.sequences.insert(id, CachedSequence { pages, tokens: 0 });
        assert!(before.is_none(), "sequence {id} is there already");
    }

    /// Forgets a sequence.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn release(&mut self, id: u32) {
        let sequence = self.sequences.remove(&id).unwrap_or_else(|| panic!("no sequence {id}"));
        self.free.extend(sequence.pages);
    }

    /// Whether the sequence is there.
    pub fn holds(&self, id: u32) -> bool {
        self.sequences.contains_key(&id)
    }

    pub(crate) fn sequence(&self, id: u32) -> &CachedSequence {
        self.sequences.get(&id).unwrap_or_else(|| panic!("no sequence {id}"))
    }

    pub(crate) fn extend(&mut self, id: u32, tokens: usize) {
        self.sequences.get_mut(&id).unwrap_or_else(|| panic!("no sequence {id}")).tokens += tokens;
    }

    /// All sequences.
    #[cfg(feature = "cuda")]
    pub(crate) fn sequences(&self) -> &HashMap<u32, CachedSequence> {
        &self.sequences
    }

    /// A layer's pages, and the sequences that lie in them.
    pub(super) fn layer_mut(&mut self, layer: usize) -> (&mut [f32], &HashMap<u32, CachedSequence>) {
        (&mut self.layers[layer], &self.sequences)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ModelKind, Sizes};

    #[test]
    fn pages_come_back() {
        let sizes = Sizes { vocab: 9, hidden: 4, layers: 2, heads: 1, experts: 1, top_k: 1, expert_hidden: 4 };
        let mut cache = KvCache::new(&ModelConfig::family(ModelKind::Mixtral, sizes), 5);
        cache.admit(7, 3);
        cache.admit(8, 2);
        assert_eq!(cache.free_pages(), 0);
        cache.release(7);
        cache.admit(9, 3);
        let mut pages = [cache.sequence(8).pages.clone(), cache.sequence(9).pages.clone()].concat();
        pages.sort_unstable();
        assert_eq!(pages, [0, 1, 2, 3, 4]);
        assert_eq!((KvCache::pages_for(0), KvCache::pages_for(1), KvCache::pages_for(PAGE_TOKENS + 1)), (0, 1, 2));
    }
}
