//! What collectives do to data, between threads of one process, and whether the ranks' parts fit together: programs
//! that differ between ranks are a failure with a name, not a panic in whoever happens to move the data.

use crate::driver::Reduction;
use crate::{CommError, Exchange};

/// Whether the ranks' parts of an all-to-all fit together. `exchanges` are in rank order.
///
/// # Errors
/// The failure of the first rank that contradicts the others.
pub(crate) fn check_exchanges(exchanges: &[Exchange]) -> Result<(), CommError> {
    let kind = exchanges[0].kind;
    for (source, sender) in exchanges.iter().enumerate() {
        if sender.kind != kind {
            let reason = format!("it takes part in {} while rank 0 takes part in {kind}", sender.kind);
            return Err(CommError::RankFailed { rank: source, reason });
        }
        for (destination, receiver) in exchanges.iter().enumerate() {
            let (sent, expected) = (sender.send_elements[destination], receiver.recv_elements[source]);
            if sent != expected {
                let reason =
                    format!("{kind}: it sends {sent} elements to rank {destination}, which expects {expected}");
                return Err(CommError::RankFailed { rank: source, reason });
            }
        }
    }
    Ok(())
}

/// Whether the ranks' parts of an allreduce fit together; `parts` are in rank order.
///
/// # Errors
/// The failure of the first rank that contradicts the first one.
pub(crate) fn check_reductions<'a>(mut parts: impl Iterator<Item = (usize, &'a Reduction)>) -> Result<(), CommError> {
    let Some((first, expected)) = parts.next() else { return Ok(()) };
    for (rank, reduction) in parts {
        if (reduction.group, reduction.elements) != (expected.group, expected.elements) {
            let reason = format!(
                "allreduce {}: it reduces {} elements in group {} while rank {first} reduces {} in group {}",
                reduction.index, reduction.elements, reduction.group.0, expected.elements, expected.group.0
            );
            return Err(CommError::RankFailed { rank, reason });
        }
    }
    Ok(())
}

/// Copies every rank's pieces to where they go. `exchanges` are in rank order and fit together.
pub(crate) fn exchange_all(exchanges: &mut [Exchange]) {
    for destination in 0..exchanges.len() {
        let mut recv = std::mem::take(&mut exchanges[destination].recv);
        receive(exchanges, destination, &mut recv);
        exchanges[destination].recv = recv;
    }
}

/// Fills the receive buffer of rank `destination` from what all ranks send, in rank order.
pub(crate) fn receive(sends: &[Exchange], destination: usize, recv: &mut [f32]) {
    let mut received = 0;
    for exchange in sends {
        let n = exchange.send_elements[destination];
        let start: usize = exchange.send_elements[..destination].iter().sum();
        recv[received..received + n].copy_from_slice(&exchange.send[start..start + n]);
        received += n;
    }
}

/// Sums the members' pieces element by element, in rank order, into every member. `reductions` are in rank order and
/// fit together.
pub(crate) fn sum_pieces(reductions: &mut [Reduction]) {
    /// Elements summed at a time: small enough to stay in the first-level cache.
    const BLOCK: usize = 2048;
    let mut block = [0.0f32; BLOCK];
    let elements = reductions[0].elements;
    let mut done = 0;
    while done < elements {
        let n = BLOCK.min(elements - done);
        let sum = &mut block[..n];
        for (i, reduction) in reductions.iter().enumerate() {
            for_range(reduction, done, n, |offset, piece| {
                let sum = &mut sum[offset..offset + piece.len()];
                if i == 0 {
                    sum.copy_from_slice(piece);
                } else {
                    sum.iter_mut().zip(piece).for_each(|(sum, x)| *sum += x);
                }
            });
        }
        for reduction in reductions.iter_mut() {
            write_range(reduction, done, sum);
        }
        done += n;
    }
}

/// Calls `visit` with the slices that make up elements `[start, start + len)`, and their offset in it.
fn for_range(reduction: &Reduction, start: usize, len: usize, mut visit: impl FnMut(usize, &[f32])) {
    let mut base = 0;
    for piece in &reduction.pieces {
        let from = start.clamp(base, base + piece.len());
        let to = (start + len).clamp(base, base + piece.len());
        if from < to {
            visit(from - start, &piece.as_slice()[from - base..to - base]);
        }
        base += piece.len();
    }
}

fn write_range(reduction: &mut Reduction, start: usize, values: &[f32]) {
    let mut base = 0;
    for piece in &mut reduction.pieces {
        let len = piece.len();
        let from = start.clamp(base, base + len);
        let to = (start + values.len()).clamp(base, base + len);
        if from < to {
            piece.as_mut_slice()[from - base..to - base].copy_from_slice(&values[from - start..to - start]);
        }
        base += len;
    }
}

/// Sums small vectors; `parts` are in rank order.
///
/// # Errors
/// The failure of the first rank that brings another number of values than the first one.
pub(crate) fn sum_control(mut parts: impl Iterator<Item = (usize, Vec<f64>)>) -> Result<Vec<f64>, CommError> {
    let Some((first, mut sum)) = parts.next() else { return Ok(Vec::new()) };
    for (rank, part) in parts {
        if part.len() != sum.len() {
            let reason = format!("it sums {} values while rank {first} sums {}", part.len(), sum.len());
            return Err(CommError::RankFailed { rank, reason });
        }
        sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
    }
    Ok(sum)
}
