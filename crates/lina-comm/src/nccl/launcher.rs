//! Where the processes that a launcher has started meet: `torchrun` and everybody who sets its variables, `mpirun`, `srun`.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::launcher::Place;

/// This process as its launcher started it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// This process's rank.
    pub rank: usize,
    /// Number of ranks.
    pub ranks: usize,
    /// Its number among the ranks of its host.
    pub local_rank: usize,
    /// Where rank 0 listens, or which variables would say so.
    pub(super) meeting_place: Result<(String, u16), String>,
}

/// Variables whose text is one for all ranks of a job and another one for every job of a host.
const JOBS: [&str; 3] = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_PORT"];
/// The port where `MASTER_ADDR` comes without `MASTER_PORT`, as in PyTorch.
const USUAL_PORT: u16 = 29500;
/// Ports that follow from a job's name: below those that systems give to connections.
const FIRST_PORT: u16 = 15_000;
const PORTS: u64 = 15_000;

/// What the launcher says of this process; `None` without one.
pub fn launched() -> Option<Launched> {
    read(&|name| std::env::var(name).ok())
}

fn read(variable: &dyn Fn(&str) -> Option<String>) -> Option<Launched> {
    let Place { rank, ranks, local_rank, ranks_here } = Place::read(variable)?;
    let meeting_place = meeting_place(variable, ranks_here == Some(ranks));
    Some(Launched { rank, ranks, local_rank: local_rank.unwrap_or(rank), meeting_place })
}

fn meeting_place(variable: &dyn Fn(&str) -> Option<String>, all_here: bool) -> Result<(String, u16), String> {
    if let Some(host) = variable("MASTER_ADDR") {
        let port = match variable("MASTER_PORT") {
            None => USUAL_PORT,
            Some(text) => {
                text.trim().parse().map_err(|_| format!("MASTER_PORT is {text}, expected a number from 1 to 65535"))?
            }
        };
        // The port itself is taken: torchrun's agent serves its own store there.
        let taken = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|text| text.eq_ignore_ascii_case("true"));
        return Ok((host, if taken { port.wrapping_add(1).max(1) } else { port }));
    }
    if let Some(job) = variable("SLURM_JOB_ID")
        && let Some(nodes) = variable("SLURM_STEP_NODELIST").or_else(|| variable("SLURM_JOB_NODELIST"))
    {
        let step = variable("SLURM_STEP_ID").unwrap_or_default();
        return Ok((first_host(&nodes), port_of(&format!("{job}.{step}"))));
    }
    if all_here && let Some(job) = JOBS.iter().find_map(|name| variable(name)) {
        return Ok(("127.0.0.1".to_owned(), port_of(&job)));
    }
    Err("it is not known where ranks meet: MASTER_ADDR is not set, expected the name or address of rank 0's host, and \
         MASTER_PORT a free port there"
        .to_owned())
}

/// A port that follows from a job's name.
fn port_of(job: &str) -> u16 {
    let mut hasher = DefaultHasher::new();
    job.hash(&mut hasher);
    FIRST_PORT + (hasher.finish() % PORTS) as u16
}

/// The first host of a Slurm list such as `gpu[03-05,9]-ib,login`.
fn first_host(nodes: &str) -> String {
    let end = {
        let mut depth = 0;
        nodes.find(|letter| {
            depth += i32::from(letter == '[') - i32::from(letter == ']');
            letter == ',' && depth == 0
        })
    };
    let first = &nodes[..end.unwrap_or(nodes.len())];
    let Some((head, rest)) = first.split_once('[') else { return first.to_owned() };
    let (numbers, tail) = rest.split_once(']').unwrap_or((rest, ""));
    let number = numbers.split([',', '-']).next().unwrap_or_default();
    first_host(&format!("{head}{number}{tail}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Option<Launched> {
        read(&|name| variables.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned()))
    }

    #[test]
    fn every_launcher_is_understood() {
        assert_eq!(of(&[]), None);
        let torchrun = [
            ("RANK", "5"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "gpu1"),
            ("MASTER_PORT", "400"),
            ("OMPI_COMM_WORLD_RANK", "0"),
        ];
        let place = |host: &str, port| Ok((host.to_owned(), port));
        let expected = Launched { rank: 5, ranks: 8, local_rank: 1, meeting_place: place("gpu1", 400) };
        assert_eq!(of(&torchrun), Some(expected));
        let agent = [&torchrun[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert_eq!(of(&agent).unwrap().meeting_place, place("gpu1", 401));

        let slurm = [
            ("SLURM_PROCID", "3"),
            ("SLURM_STEP_NUM_TASKS", "4"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_JOB_ID", "77"),
            ("SLURM_JOB_NODELIST", "gpu[03-05,9]-ib,login"),
        ];
        let found = of(&slurm).unwrap();
        assert_eq!((found.rank, found.ranks, found.local_rank), (3, 4, 1));
        let (host, port) = found.meeting_place.unwrap();
        assert_eq!(host, "gpu03-ib");
        assert!((15_000..30_000).contains(&port));

        let mpirun = |local: &'static str| {
            [
                ("OMPI_COMM_WORLD_RANK", "1"),
                ("OMPI_COMM_WORLD_SIZE", "4"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
                ("OMPI_COMM_WORLD_LOCAL_SIZE", local),
                ("PMIX_NAMESPACE", "2733441025"),
            ]
        };
        assert_eq!(of(&mpirun("4")).unwrap().meeting_place.unwrap().0, "127.0.0.1");
        let unknown = of(&mpirun("2")).unwrap().meeting_place.unwrap_err();
        assert!(unknown.contains("MASTER_ADDR is not set"), "{unknown}");
    }

    #[test]
    fn the_first_host_of_a_list() {
        for (nodes, first) in
            [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[007,9],m", "n007"), ("r[2]n[5-6]", "r2n5")]
        {
            assert_eq!(first_host(nodes), first);
        }
    }
}
