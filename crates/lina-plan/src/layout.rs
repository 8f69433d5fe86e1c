//! Which rank holds which experts, and to which replica a rank sends its tokens.
//!
//! No divisibility rule: any number of experts on any number of ranks. With more slots than experts, experts are
//! replicated, and a group of ranks that together hold every expert serves its own members, which is how expert
//! packing removes traffic between groups.

use crate::operation::GroupId;
use crate::split::share_range;

/// A static placement of an MoE layer's experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertLayout {
    ranks: usize,
    experts: usize,
    /// Experts of each rank, ascending.
    held: Vec<Vec<usize>>,
    /// Ranks of each expert, ascending.
    holders: Vec<Vec<usize>>,
    /// Reduction group of each expert's gradients; `None` where one rank holds it.
    groups: Vec<Option<GroupId>>,
    /// Members of each group; group 0 is all ranks.
    members: Vec<Vec<usize>>,
}

/// A layout that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutError {
    /// Found and expected, one sentence.
    pub message: String,
}

impl std::fmt::Display for LayoutError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for LayoutError {}

impl ExpertLayout {
    /// Places `experts` on `ranks`.
    ///
    /// Without `per_rank`, each rank holds an even share and no expert twice; where experts are fewer than ranks,
    /// each rank holds one and experts have replicas. With `per_rank`, rank r holds the experts of slots
    /// `r·per_rank ..` of the endless sequence 0, 1, ..., experts-1, 0, 1, ...
    ///
    /// # Errors
    /// If there are no experts or ranks, if `per_rank` exceeds the number of experts, or if the slots do not
    /// suffice for all experts.
    pub fn new(experts: usize, ranks: usize, per_rank: Option<usize>) -> Result<Self, LayoutError> {
        let error = |message: String| Err(LayoutError { message });
        if experts == 0 || ranks == 0 {
            return error(format!("{experts} experts on {ranks} ranks: both must be at least 1"));
        }
        let per_rank = match per_rank {
            Some(p) if p > experts => {
                return error(format!("{p} experts a rank, but a layer has only {experts}"));
            }
            Some(p) if p * ranks < experts => {
                return error(format!(
                    "{p} experts a rank on {ranks} ranks hold {} experts, but a layer has {experts}",
                    p * ranks
                ));
            }
            None if experts < ranks => Some(1),
            other => other,
        };
        let held: Vec<Vec<usize>> = (0..ranks)
            .map(|rank| match per_rank {
                None => share_range(experts, ranks, rank).collect(),
                Some(p) => {
                    let mut held: Vec<usize> = (rank * p..(rank + 1) * p).map(|slot| slot % experts).collect();
                    held.sort_unstable();
                    held
                }
            })
            .collect();
        let holders: Vec<Vec<usize>> =
            (0..experts).map(|e| (0..ranks).filter(|&r| held[r].contains(&e)).collect()).collect();
        let mut members = vec![(0..ranks).collect::<Vec<_>>()];
        let groups = holders
            .iter()
            .map(|ranks| {
                (ranks.len() > 1).then(|| {
                    let id = members.iter().position(|group| group == ranks).unwrap_or_else(|| {
                        members.push(ranks.clone());
                        members.len() - 1
                    });
                    GroupId(id as u32)
                })
            })
            .collect();
        Ok(ExpertLayout { ranks, experts, held, holders, groups, members })
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Number of experts of the layer.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Experts that `rank` holds, ascending.
    pub fn held_by(&self, rank: usize) -> &[usize] {
        &self.held[rank]
    }

    /// Experts of the rank that holds most.
    pub fn most_per_rank(&self) -> usize {
        self.held.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Ranks that hold `expert`, ascending.
    pub fn holders(&self, expert: usize) -> &[usize] {
        &self.holders[expert]
    }

    /// The group that reduces `expert`'s gradients, or `None` if one rank holds it and nothing is to be reduced.
    pub fn group(&self, expert: usize) -> Option<GroupId> {
        self.groups[expert]
    }

    /// Ranks of every group, indexed by [`GroupId`]; group 0 is all ranks.
    pub fn groups(&self) -> &[Vec<usize>] {
        &self.members
    }

    /// The rank to which `source` sends its tokens for `expert`: itself if it holds the expert, else the replica
    /// of its own part of the cluster, so that replicas share the sources evenly.
    pub fn destination(&self, source: usize, expert: usize) -> usize {
        let holders = &self.holders[expert];
        if holders.binary_search(&source).is_ok() {
            return source;
        }
        holders[source * holders.len() / self.ranks]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn packing_twice_makes_groups_of_half_the_ranks() {
        let layout = ExpertLayout::new(8, 4, Some(4)).unwrap();
        assert_eq!(layout.held_by(0), [0, 1, 2, 3]);
        assert_eq!(layout.held_by(3), [4, 5, 6, 7]);
        assert_eq!(layout.holders(5), [1, 3]);
        // Ranks 0 and 1 serve each other, as do 2 and 3.
        assert_eq!((0..4).map(|source| layout.destination(source, 5)).collect::<Vec<_>>(), [1, 1, 3, 3]);
        assert_eq!(layout.groups(), [vec![0, 1, 2, 3], vec![0, 2], vec![1, 3]]);
    }

    #[test]
    fn fewer_experts_than_ranks_are_replicated() {
        let layout = ExpertLayout::new(3, 8, None).unwrap();
        assert_eq!(layout.holders(0), [0, 3, 6]);
        assert_eq!(layout.group(0), Some(GroupId(1)));
    }

    #[test]
    fn impossible_layouts_say_why() {
        let message = ExpertLayout::new(8, 2, Some(3)).unwrap_err().message;
        assert_eq!(message, "3 experts a rank on 2 ranks hold 6 experts, but a layer has 8");
        assert!(ExpertLayout::new(2, 2, Some(3)).is_err());
        assert!(ExpertLayout::new(0, 2, None).is_err());
    }

    proptest! {
        #[test]
        fn every_expert_is_held_and_reached(experts in 1usize..40, ranks in 1usize..20, packing in 0usize..4) {
            let per_rank = (packing > 0).then(|| (experts.div_ceil(ranks) * packing).min(experts));
            let layout = ExpertLayout::new(experts, ranks, per_rank).unwrap();
            for expert in 0..experts {
                prop_assert!(!layout.holders(expert).is_empty());
                for source in 0..ranks {
                    let destination = layout.destination(source, expert);
                    prop_assert!(layout.held_by(destination).contains(&expert));
                }
                if let Some(group) = layout.group(expert) {
                    prop_assert_eq!(&layout.groups()[group.0 as usize], layout.holders(expert));
                }
            }
        }
    }
}
