//! Brings what ranks measured to rank 0, where ranks are processes of their own.

use lina_comm::{AllToAllKind, Comm, CommError, Direction, Exchange, Leg, Span};

use crate::bench::Sample;

/// Every rank's spans, on rank 0; a rank's own elsewhere. All ranks call it together, between steps.
pub(crate) fn gather_spans(comm: &mut Comm, own: Vec<Span>) -> Result<Vec<Span>, CommError> {
    let words: Vec<Vec<u64>> = own.iter().map(Span::to_words).collect();
    Ok(gather(comm, &words)?.iter().flatten().map(|words| Span::from_words(words)).collect())
}

/// Every rank's samples, by rank, on rank 0; a rank's own elsewhere. All ranks call it together, between steps.
pub(crate) fn gather_samples(comm: &mut Comm, own: Vec<Sample>) -> Result<Vec<Vec<Sample>>, CommError> {
    let words: Vec<Vec<u64>> = own.iter().map(Sample::words).collect();
    let all = gather(comm, &words)?;
    Ok(all.into_iter().map(|records| records.iter().map(|words| Sample::from_words(words)).collect()).collect())
}

/// Every rank's records, by rank, on rank 0; a rank's own elsewhere.
fn gather(comm: &mut Comm, own: &[Vec<u64>]) -> Result<Vec<Vec<Vec<u64>>>, CommError> {
    let (rank, ranks) = (comm.rank(), comm.ranks());
    // A record is its length and its words; a word travels as the bits of two `f32`.
    let words = own.iter().flat_map(|record| std::iter::once(record.len() as u64).chain(record.iter().copied()));
    let send: Vec<f32> = words.flat_map(|word| [word as u32, (word >> 32) as u32]).map(f32::from_bits).collect();
    let mut lengths = vec![0.0; ranks];
    lengths[rank] = send.len() as f64;
    comm.begin_evaluation(0)?;
    comm.sum(&mut lengths)?;
    let mut send_elements = vec![0; ranks];
    send_elements[0] = send.len();
    let here = |length: &f64| if rank == 0 { *length as usize } else { 0 };
    let recv_elements: Vec<usize> = lengths.iter().map(here).collect();
    let recv = vec![0.0; recv_elements.iter().sum()];
    let kind = AllToAllKind { direction: Direction::Forward, leg: Leg::Parameters, layer: 0, chunk: 0, chunks: 1 };
    let ticket = comm.all_to_all(Exchange { kind, send, send_elements, recv, recv_elements })?;
    let Exchange { recv, recv_elements, .. } = comm.wait(ticket)?;
    comm.sum(&mut [0.0])?;
    comm.end_step();
    if rank > 0 {
        return Ok(vec![own.to_vec()]);
    }
    let mut rest = recv.as_slice();
    Ok(recv_elements
        .into_iter()
        .map(|elements| {
            let (mine, after) = rest.split_at(elements);
            rest = after;
            let mut words = mine.chunks_exact(2).map(|x| u64::from(x[0].to_bits()) | u64::from(x[1].to_bits()) << 32);
            let mut records = Vec::new();
            while let Some(len) = words.next() {
                records.push(words.by_ref().take(len as usize).collect());
            }
            records
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use lina_comm::Lane;
    use lina_comm::local::{LocalConfig, LocalJob};
    use lina_plan::{Policy, PolicyRules, PolicySettings};

    #[test]
    fn rank_0_gets_everything_of_everybody() {
        let groups = vec![vec![0, 1, 2]];
        let timeout = Duration::from_secs(20);
        let config = LocalConfig { ranks: 3, groups, timeout, delays: None, log_launches: false };
        let rules = PolicyRules::new(Policy::Fair, &PolicySettings::default());
        let (_job, comms) = LocalJob::start(config, rules).unwrap();
        let span = |rank: u32, number: u64| Span {
            rank,
            lane: if number.is_multiple_of(2) { Lane::Compute } else { Lane::AllToAll },
            name: if number.is_multiple_of(2) { "router" } else { "combine backward" },
            step: 7,
            layer: (number > 1).then_some(3),
            part: (number as u32, 4),
            start: u64::MAX - number,
            end: u64::MAX,
            bytes: 1 << 40,
        };
        let spans = move |rank: u32| (0..u64::from(rank) + 2).map(move |number| span(rank, number)).collect::<Vec<_>>();
        let threads: Vec<_> = (comms.into_iter().enumerate())
            .map(|(rank, mut comm)| std::thread::spawn(move || gather_spans(&mut comm, spans(rank as u32)).unwrap()))
            .collect();
        let all: Vec<Vec<Span>> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(all[0], [spans(0), spans(1), spans(2)].concat());
        assert_eq!(all[1], spans(1));
    }
}
