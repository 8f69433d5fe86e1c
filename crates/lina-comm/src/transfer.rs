//! What collectives do to data, between threads of one process.

use crate::Exchange;
use crate::driver::Reduction;

/// Copies every rank's pieces to where they go. `exchanges` are in rank order.
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
    for (source, exchange) in sends.iter().enumerate() {
        let n = exchange.send_elements[destination];
        let expected = sends[destination].recv_elements[source];
        let kind = exchange.kind;
        assert_eq!(n, expected, "{kind}: rank {source} sends rank {destination} another number of elements");
        let start: usize = exchange.send_elements[..destination].iter().sum();
        recv[received..received + n].copy_from_slice(&exchange.send[start..start + n]);
        received += n;
    }
}

/// Sums the members' pieces element by element, in rank order, into every member. `reductions` are in rank order.
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

/// Sums small vectors in rank order.
pub(crate) fn sum_control(parts: impl Iterator<Item = Vec<f64>>) -> Vec<f64> {
    parts
        .reduce(|mut sum, part| {
            assert_eq!(sum.len(), part.len(), "all ranks agree on as many values");
            sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
            sum
        })
        .unwrap_or_default()
}
