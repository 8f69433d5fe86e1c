//! How much work a layer's experts have, and where its rows come from.

use std::borrow::Cow;

/// Rows of one layer in one batch, by source device and expert.
#[derive(Clone, Debug)]
pub struct LayerLoads<'a> {
    devices: usize,
    experts: usize,
    /// `[devices, experts]`.
    assigned: Cow<'a, [u32]>,
    /// `[experts]`.
    rows: Vec<u64>,
    /// `[devices]`: rows that come from each.
    sourced: Vec<u64>,
    /// Rows here for one real row: estimates are fractions of rows.
    scale: f64,
}

/// What an estimate's rows are scaled to: fine enough for popularities, small enough for exact sums.
const ESTIMATE_ROWS: f64 = (1 << 22) as f64;

impl<'a> LayerLoads<'a> {
    /// What the gates have chosen: `assigned` `[devices, experts]`.
    ///
    /// # Panics
    /// If `assigned` is not a multiple of `devices` long.
    pub fn measured(assigned: &'a [u32], devices: usize) -> Self {
        assert!(devices > 0 && assigned.len().is_multiple_of(devices), "one number for every device and expert");
        LayerLoads::new(Cow::Borrowed(assigned), devices, 1.0)
    }

    fn new(assigned: Cow<'a, [u32]>, devices: usize, scale: f64) -> Self {
        let experts = assigned.len() / devices;
        let mut rows = vec![0u64; experts];
        let mut sourced = vec![0u64; devices];
        if experts > 0 {
            for (from, sourced) in assigned.chunks_exact(experts).zip(&mut sourced) {
                for (&assigned, rows) in from.iter().zip(&mut rows) {
                    *rows += u64::from(assigned);
                    *sourced += u64::from(assigned);
                }
            }
        }
        LayerLoads { devices, experts, assigned, rows, sourced, scale }
    }

    /// What is expected: `rows` `[experts]`, fractions allowed, from every source alike. What is not a positive number
    /// counts as nothing.
    pub fn estimated(rows: &[f64], devices: usize) -> LayerLoads<'static> {
        let valid = |rows: f64| if rows.is_finite() && rows > 0.0 { rows } else { 0.0 };
        let total: f64 = rows.iter().map(|&rows| valid(rows)).sum();
        let scale = if total > 0.0 { ESTIMATE_ROWS.max(devices as f64) / total } else { 1.0 };
        let mut assigned = Vec::with_capacity(devices * rows.len());
        for _ in 0..devices {
            assigned.extend(rows.iter().map(|&rows| (valid(rows) * scale / devices as f64).round() as u32));
        }
        LayerLoads::new(Cow::Owned(assigned), devices, scale)
    }

    /// Number of devices.
    pub fn devices(&self) -> usize {
        self.devices
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Rows of `expert`, from all sources.
    pub fn rows(&self, expert: usize) -> u64 {
        self.rows[expert]
    }

    /// Rows of each expert.
    pub(crate) fn by_expert(&self) -> &[u64] {
        &self.rows
    }

    /// Rows that come from `device`.
    pub fn sourced(&self, device: usize) -> u64 {
        self.sourced[device]
    }

    /// Rows that `source` routes to `expert`.
    pub fn assigned(&self, source: usize, expert: usize) -> u64 {
        u64::from(self.assigned[source * self.experts + expert])
    }

    /// Rows here for one real row.
    pub(crate) fn scale(&self) -> f64 {
        self.scale
    }
}
