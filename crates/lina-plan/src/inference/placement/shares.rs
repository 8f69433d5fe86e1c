//! Which replica computes which rows, exact to the row.

use super::{LayerLoads, PlacementCosts};

/// Consecutive rows of a source for an expert that one device computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The device that computes them.
    pub device: u32,
    /// Their number, at least 1.
    pub rows: u32,
}

/// For every source and expert: how the source's rows for the expert, in token order, are divided among the expert's
/// holders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenShares {
    devices: usize,
    experts: usize,
    /// Parts of source s and expert e: `parts[offsets[e·devices + s] .. offsets[e·devices + s + 1]]`.
    offsets: Vec<u32>,
    parts: Vec<Share>,
}

impl TokenShares {
    /// Divides every expert's rows among devices as `rows_of` lists them, (device, rows) by device ascending. A source
    /// keeps its own rows as far as its device is to have some.
    pub(crate) fn divide(loads: &LayerLoads, mut rows_of: impl FnMut(usize, &mut Vec<(u32, u64)>)) -> Self {
        let (devices, experts) = (loads.devices(), loads.experts());
        let mut offsets = Vec::with_capacity(devices * experts + 1);
        let mut parts = Vec::with_capacity(devices * experts + devices);
        let mut open: Vec<(u32, u64)> = Vec::with_capacity(devices);
        let mut kept = vec![0u64; devices];
        offsets.push(0);
        for expert in 0..experts {
            open.clear();
            rows_of(expert, &mut open);
            debug_assert_eq!(open.iter().map(|&(_, rows)| rows).sum::<u64>(), loads.rows(expert));
            for (device, rows) in &mut open {
                kept[*device as usize] = loads.assigned(*device as usize, expert).min(*rows);
                *rows -= kept[*device as usize];
            }
            // What a device is to have beyond its own rows is filled by the sources in order.
            let mut to = 0;
            for (source, kept) in kept.iter_mut().enumerate() {
                let mut left = loads.assigned(source, expert) - *kept;
                if *kept > 0 {
                    parts.push(Share { device: source as u32, rows: *kept as u32 });
                    *kept = 0;
                }
                while left > 0 {
                    let (device, room) = &mut open[to];
                    let moved = left.min(*room);
                    if moved > 0 {
                        parts.push(Share { device: *device, rows: moved as u32 });
                        left -= moved;
                        *room -= moved;
                    }
                    to += usize::from(*room == 0);
                }
                offsets.push(parts.len() as u32);
            }
        }
        TokenShares { devices, experts, offsets, parts }
    }

    /// Divides every expert's rows in proportion to `planned` `[experts]` of (device, rows); evenly among the devices
    /// that it lists where these have no rows.
    pub(crate) fn in_proportion(loads: &LayerLoads, planned: &[Vec<(u32, u64)>]) -> Self {
        TokenShares::divide(loads, |expert, rows| {
            let sum: u64 = planned[expert].iter().map(|&(_, rows)| rows).sum();
            let weight = |planned: u64| u128::from(if sum == 0 { 1 } else { planned });
            let weights: u128 = planned[expert].iter().map(|&(_, rows)| weight(rows)).sum();
            let (mut before, mut given) = (0u128, 0u64);
            for &(device, planned) in &planned[expert] {
                before += weight(planned);
                let until = (u128::from(loads.rows(expert)) * before / weights) as u64;
                rows.push((device, until - given));
                given = until;
            }
        })
    }

    /// Number of devices.
    pub fn devices(&self) -> usize {
        self.devices
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// How the rows of `source` for `expert` are divided: the first part takes the first rows.
    pub fn of(&self, source: usize, expert: usize) -> &[Share] {
        let i = expert * self.devices + source;
        &self.parts[self.offsets[i] as usize..self.offsets[i + 1] as usize]
    }

    /// Rows of `source` for `expert` that `device` computes.
    pub fn rows(&self, source: usize, expert: usize, device: usize) -> u32 {
        self.of(source, expert).iter().filter(|share| share.device as usize == device).map(|share| share.rows).sum()
    }

    /// Rows that each device computes.
    pub fn device_rows(&self) -> Vec<u64> {
        self.traffic().into_iter().map(|device| device.rows).collect()
    }

    /// Rows computed by the busiest device over the mean; 1 without rows.
    pub fn imbalance(&self) -> f64 {
        let rows = self.device_rows();
        let total: u64 = rows.iter().sum();
        if total == 0 {
            return 1.0;
        }
        rows.iter().copied().max().unwrap_or(0) as f64 * self.devices as f64 / total as f64
    }

    /// Time of the slowest device, in ns: its rows, and the larger of what it sends and receives, there and back.
    pub fn makespan_ns(&self, costs: &PlacementCosts) -> f64 {
        let time_ns = |device: &Traffic| {
            costs.row_ns * device.rows as f64 + 2.0 * costs.wire_row_ns * device.received.max(device.sent) as f64
        };
        self.traffic().iter().map(time_ns).fold(0.0, f64::max)
    }

    fn traffic(&self) -> Vec<Traffic> {
        let mut traffic = vec![Traffic::default(); self.devices];
        for expert in 0..self.experts {
            for source in 0..self.devices {
                for share in self.of(source, expert) {
                    let (device, rows) = (share.device as usize, u64::from(share.rows));
                    traffic[device].rows += rows;
                    if device != source {
                        traffic[device].received += rows;
                        traffic[source].sent += rows;
                    }
                }
            }
        }
        traffic
    }
}

/// Rows of one device.
#[derive(Clone, Copy, Default)]
struct Traffic {
    rows: u64,
    received: u64,
    sent: u64,
}
