//! What a launcher (`mpirun`, `mpiexec`, `srun`, `torchrun`) tells a process about its job, in environment variables: so that
//! a configuration can be checked against it and one rank alone speaks for the job before ranks have met.

/// A process of a job, as its launcher started it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// This process's rank, and number of ranks.
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
    /// This process's number among those of its host, and how many these are; `None` where the launcher does not say.
    pub(crate) local_rank: Option<usize>,
    pub(crate) ranks_here: Option<usize>,
}

/// Variables that say rank, number of ranks, and both on this host.
type Names = [&'static str; 4];

const TORCHRUN: Names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"];
/// Those of a step, which `srun` sets: a batch script has a rank and a number of tasks too.
const SLURM: Names = ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"];
const OPEN_MPI: Names =
    ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"];
const HYDRA: Names = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"];
/// Set where torchrun started this process. Without it, anybody may have set the variables that it sets, and those of another
/// launcher come first.
const BY_TORCHRUN: &str = "TORCHELASTIC_RUN_ID";

/// Number of ranks that were started together; `None` outside a launcher.
pub fn launched_ranks() -> Option<usize> {
    Some(place()?.ranks)
}

/// This process's rank among them; `None` outside a launcher.
pub fn launched_rank() -> Option<usize> {
    Some(place()?.rank)
}

/// How many of them run on this host; `None` where the launcher does not say.
pub fn launched_ranks_here() -> Option<usize> {
    place()?.ranks_here
}

fn place() -> Option<Place> {
    Place::read(&|name| std::env::var(name).ok())
}

impl Place {
    /// What the first launcher says that names both a rank and a number of ranks.
    pub(crate) fn read(variable: &dyn Fn(&str) -> Option<String>) -> Option<Place> {
        let launchers = match variable(BY_TORCHRUN) {
            Some(_) => [TORCHRUN, OPEN_MPI, HYDRA, SLURM],
            None => [OPEN_MPI, HYDRA, SLURM, TORCHRUN],
        };
        // Slurm's list of tasks, such as `4(x2),3`, is of all hosts; the first number is that of most of them.
        let number = |name: &str| variable(name)?.trim().split(|c: char| !c.is_ascii_digit()).next()?.parse().ok();
        let mut places = launchers.into_iter().filter_map(|[rank, ranks, local_rank, ranks_here]| {
            Some(Place {
                rank: number(rank)?,
                ranks: number(ranks)?,
                local_rank: number(local_rank),
                ranks_here: number(ranks_here),
            })
        });
        let mut place = places.next()?;
        // One launcher may start processes for another library's: it says the same, and more.
        for other in places.filter(|other| (other.rank, other.ranks) == (place.rank, place.ranks)) {
            place.local_rank = place.local_rank.or(other.local_rank);
            place.ranks_here = place.ranks_here.or(other.ranks_here);
        }
        Some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Option<Place> {
        Place::read(&|name| variables.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned()))
    }

    #[test]
    fn every_launcher_is_understood() {
        assert_eq!(of(&[]), None);
        let place = |rank, ranks, local_rank, ranks_here| Some(Place { rank, ranks, local_rank, ranks_here });
        let torchrun = [("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")];
        assert_eq!(of(&torchrun), place(5, 8, Some(1), Some(4)));
        let slurm = [
            ("SLURM_PROCID", "3"),
            ("SLURM_NTASKS", "9"),
            ("SLURM_STEP_NUM_TASKS", "7"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x3),1"),
        ];
        assert_eq!(of(&slurm), place(3, 7, Some(1), Some(2)));
        let open_mpi = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "4")];
        assert_eq!(of(&open_mpi), place(1, 4, None, None));
        let hydra = [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "0"), ("MPI_LOCALNRANKS", "2")];
        assert_eq!(of(&hydra), place(0, 2, Some(0), Some(2)));
    }

    #[test]
    fn what_one_launcher_does_not_say_another_may() {
        let local = [("SLURM_LOCALID", "1"), ("SLURM_STEP_TASKS_PER_NODE", "2(x3)")];
        let pmi2 = [("PMI_RANK", "3"), ("PMI_SIZE", "6"), ("SLURM_PROCID", "3"), ("SLURM_STEP_NUM_TASKS", "6")];
        let place = of(&[&pmi2[..], &local].concat()).unwrap();
        assert_eq!((place.local_rank, place.ranks_here), (Some(1), Some(2)));
        // Not of other ranks: `mpiexec` started as a task itself.
        let inside = [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")];
        let place = of(&[&inside[..], &local].concat()).unwrap();
        assert_eq!((place.rank, place.local_rank, place.ranks_here), (1, None, None));
    }

    #[test]
    fn one_launcher_comes_first() {
        let torchrun = [("RANK", "5"), ("WORLD_SIZE", "8")];
        // A batch script under Slurm, whose own rank is not that of a task.
        let batch = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")];
        assert_eq!(of(&batch), None);
        assert_eq!(of(&[&batch[..], &torchrun].concat()).unwrap().rank, 5);
        // `mpirun` where a container has set variables for PyTorch, and `torchrun` started by `mpirun`.
        let mpirun = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        let both = [&mpirun[..], &torchrun].concat();
        assert_eq!(of(&both).unwrap().rank, 1);
        assert_eq!(of(&[&both[..], &[(BY_TORCHRUN, "1")]].concat()).unwrap().rank, 5);
    }
}
