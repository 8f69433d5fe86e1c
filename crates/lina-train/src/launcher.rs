//! What a launcher (`mpirun`, `mpiexec`, `srun`, `torchrun`) tells a process about its job, before MPI itself starts: so that a
//! configuration can be checked against it and one rank alone speaks for the job.

/// Number of ranks that were started together; `None` outside a launcher.
pub fn launched_ranks() -> Option<usize> {
    number(&["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
}

/// This process's rank among them; `None` outside a launcher.
pub fn launched_rank() -> Option<usize> {
    number(&["OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK", "SLURM_PROCID"])
}

/// How many of them run on this host.
pub(crate) fn launched_ranks_here() -> Option<usize> {
    // Slurm's list, such as `4(x2),3`, is of all hosts; the first number is that of most of them.
    number(&["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"])
}

/// The number with which the first variable that is set begins.
fn number(variables: &[&str]) -> Option<usize> {
    let value = variables.iter().find_map(|variable| std::env::var(variable).ok())?;
    let digits = value.trim().split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}
