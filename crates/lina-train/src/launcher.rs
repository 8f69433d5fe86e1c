//! What a launcher (`mpirun`, `mpiexec`, `srun`, `torchrun`) tells a process about its job, before MPI itself starts: so that a
//! configuration can be checked against it and one rank alone speaks for the job.

/// Number of ranks that were started together; `None` outside a launcher.
pub fn launched_ranks() -> Option<usize> {
    number("WORLD_SIZE", &["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
}

/// This process's rank among them; `None` outside a launcher.
pub fn launched_rank() -> Option<usize> {
    number("RANK", &["OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"])
}

/// How many of them run on this host; `None` where the launcher does not say.
pub fn launched_ranks_here() -> Option<usize> {
    // Slurm's list, such as `4(x2),3`, is of all hosts; the first number is that of most of them.
    number("LOCAL_WORLD_SIZE", &["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_TASKS_PER_NODE"])
}

/// The number with which the first variable that is set begins: `torch` before the `others` where torchrun, which another
/// launcher may have started, started this process, and after them where anybody may have set it.
fn number(torch: &str, others: &[&str]) -> Option<usize> {
    let read = |variable: &str| std::env::var(variable).ok();
    let by_torchrun = read("TORCHELASTIC_RUN_ID").and_then(|_| read(torch));
    let value = by_torchrun.or_else(|| others.iter().copied().chain([torch]).find_map(read))?;
    let digits = value.trim().split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}
