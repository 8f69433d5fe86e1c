//! How a rank starts: it finds out which one it is, meets the others, and all compare their GPUs before NCCL does.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;

use lina_cuda::Device;
use lina_cuda::cudarc::driver::result::device as driver;

use super::launcher::launched;
use super::library::Nccl;
use super::star::Star;
use super::{NcclConfig, NcclStartError};
use crate::processes::heartbeat::Heartbeat;
use crate::processes::meeting::{Expectations, Met, Refusal, gather_text, meet};
use crate::processes::{Assembly, Fault};
use crate::threaded::Mailbox;

/// Bytes in which a rank says what it has.
const FACTS_BYTES: usize = 1024;
/// Variables that let NCCL accept two ranks on one GPU.
const SHARING: [&str; 2] = ["NCCL_HOSTID", "NCCL_MULTI_RANK_GPU_ENABLE"];

/// A rank that has met the others.
pub(super) struct Started {
    pub(super) rank: usize,
    pub(super) device: Device,
    /// Whether any ranks have the same GPU: the same on all ranks.
    pub(super) shared: bool,
    pub(super) nccl: &'static Nccl,
    pub(super) star: Star,
    pub(super) heartbeat: Heartbeat,
    /// What to add to this rank's nanoseconds since its epoch for rank 0's.
    pub(super) clock_offset: i64,
}

impl From<Fault> for NcclStartError {
    fn from(Fault(sentence): Fault) -> Self {
        NcclStartError::Broken(sentence)
    }
}

impl From<Refusal> for NcclStartError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Broken(sentence) => NcclStartError::Broken(sentence),
            Refusal::OtherRanks { found, expected } => NcclStartError::OtherRanks { found, expected },
            Refusal::Differs { rank, difference } => NcclStartError::Differs { rank, difference },
        }
    }
}

impl Started {
    pub(super) fn new(config: &NcclConfig, epoch: Instant, mailbox: Arc<Mailbox>) -> Result<Self, NcclStartError> {
        let launched = launched().ok_or(NcclStartError::NoLauncher)?;
        let (found, expected) = (launched.ranks, config.ranks);
        if found != expected || launched.rank >= found {
            return Err(NcclStartError::OtherRanks { found, expected });
        }
        // A rank whose GPU or library is missing meets the others too, so that all say why.
        let mine = equipment(launched.local_rank);
        let place = launched.meeting_place.map_err(NcclStartError::Broken);
        let place = if found > 1 { place? } else { ("127.0.0.1".to_owned(), 0) };
        let mut star = Star::meet(launched.rank, found, &place)?;
        let &NcclConfig { ranks, timeout, last_words, .. } = config;
        let told = Expectations { ranks, identity: &config.identity, timeout, last_words };
        let Met { heartbeat, clock_offset } = meet(&mut star, &told, epoch, mailbox)?;
        let facts = match &mine {
            Ok((_, _, facts)) => format!("has\n{facts}"),
            Err(sentence) => format!("lacks\n{sentence}"),
        };
        let all = gather_text(&mut star, &facts, FACTS_BYTES)?;
        check(&all)?;
        let (device, nccl, _) = mine.map_err(NcclStartError::Broken)?;
        let shared = any_share(&all);
        Ok(Started { rank: star.rank(), device, shared, nccl, star, heartbeat, clock_offset })
    }
}

/// This rank's GPU and library, and what all ranks are told of them, in lines: the model, NCCL's version, the GPU's own
/// number, and whether it may be shared.
fn equipment(local_rank: usize) -> Result<(Device, &'static Nccl, String), String> {
    let nccl = Nccl::get()?;
    let count = Device::count().map_err(|error| error.to_string())?;
    let device = Device::open(local_rank % count.max(1)).map_err(|error| error.to_string())?;
    let facts = device.facts();
    let number = driver::get(facts.ordinal as i32).and_then(driver::get_uuid);
    let number = number.map_err(|error| format!("a GPU has no number of its own: {error}"))?;
    let number = number.bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{:02x}", *byte as u8);
        text
    });
    let ((major, minor), (nccl_major, nccl_minor, nccl_patch)) = (facts.compute_capability, nccl.version);
    let shared = SHARING.iter().any(|name| std::env::var_os(name).is_some());
    let text = format!(
        "{} (compute capability {major}.{minor})\nNCCL {nccl_major}.{nccl_minor}.{nccl_patch}\n{number}\n{shared}",
        facts.name
    );
    Ok((device, nccl, text))
}

/// Whether any two ranks have the same GPU, where their GPUs fit together: alike in model and version, they then have the
/// same facts.
fn any_share(all: &[String]) -> bool {
    (1..all.len()).any(|rank| all[..rank].contains(&all[rank]))
}

/// Whether the ranks' GPUs fit together.
fn check(all: &[String]) -> Result<(), NcclStartError> {
    let broken = |sentence: String| Err(NcclStartError::Broken(sentence));
    let lines: Vec<Vec<&str>> = all.iter().map(|text| text.lines().collect()).collect();
    let line = |rank: usize, number: usize| lines[rank].get(number).copied().unwrap_or_default();
    if let Some(rank) = (0..all.len()).find(|&rank| line(rank, 0) != "has") {
        return broken(format!("on rank {rank}, {}", line(rank, 1)));
    }
    for rank in 1..all.len() {
        for (number, what) in [(1, "GPU"), (2, "library")] {
            let (mine, first) = (line(rank, number), line(0, number));
            if mine != first {
                return broken(format!("rank {rank} has {mine} where rank 0 has {first}, expected the same {what}"));
            }
        }
        if let Some(other) = (0..rank).find(|&other| line(other, 3) == line(rank, 3))
            && (line(rank, 4) != "true" || line(other, 4) != "true")
        {
            return broken(format!(
                "ranks {other} and {rank} have the same GPU, which NCCL does not accept unless \
                 NCCL_MULTI_RANK_GPU_ENABLE=1 is set (NCCL 2.30 or later) or every rank has an NCCL_HOSTID of its own; \
                 expected a GPU for every rank"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ranks_lack_and_where_they_differ_is_one_sentence() {
        let has = |model: &str, number: u32, shared: bool| format!("has\n{model}\nNCCL 2.28.9\n{number}\n{shared}");
        let said = |all: &[String]| check(all).unwrap_err().to_string();
        assert_eq!(check(&[has("H100", 1, false), has("H100", 2, false)]), Ok(()));
        assert_eq!(check(&[has("H100", 1, true), has("H100", 1, true)]), Ok(()));
        let [first, second] = [1, 2].map(|number| has("H100", number, true));
        assert!(!any_share(&[first.clone(), second.clone()]) && any_share(&[first.clone(), second, first]));
        let lacks = said(&[has("H100", 1, false), "lacks\nGPU 0 is not there".to_owned()]);
        assert_eq!(lacks, "engine nccl cannot start: on rank 1, GPU 0 is not there");
        let differs = said(&[has("H100", 1, false), has("H200", 2, false)]);
        assert!(differs.ends_with("rank 1 has H200 where rank 0 has H100, expected the same GPU"), "{differs}");
        let shared = said(&[has("H100", 1, true), has("H100", 2, true), has("H100", 1, false)]);
        assert!(shared.contains("ranks 0 and 2 have the same GPU"), "{shared}");
    }
}
