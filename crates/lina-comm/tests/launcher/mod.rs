//! Test programs that start themselves as the ranks of a job.
// Every test uses the part that is for its engine.
#![allow(dead_code)]

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Command, Output, Stdio};

/// Runs the test `program` of this very file on `ranks` ranks, with `settings` for [`setting`]; `None` where there is no
/// `mpirun`.
pub fn mpirun(ranks: usize, program: &str, settings: &[(&str, &str)]) -> Option<Output> {
    let asked = Command::new("mpirun").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !asked.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no mpirun on PATH (Debian and Ubuntu: openmpi-bin)");
        return None;
    }
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--bind-to", "none"]);
    command.args(["--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo"]);
    // Other interfaces may come and go meanwhile: those of a testbed.
    command.args(["--mca", "oob_tcp_if_include", "lo"]).env("PMIX_MCA_ptl_tcp_if_include", "lo");
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    for (name, value) in settings {
        command.env(variable(name), value);
    }
    // A launcher that loses a rank terminates the others, which are to speak first.
    command.args(["-np", &ranks.to_string(), "sh", "-c", "trap '' TERM; exec \"$0\" \"$@\""]);
    command.arg(std::env::current_exe().unwrap());
    Some(command.args(["--exact", program, "--nocapture", "--test-threads", "1"]).output().unwrap())
}

/// Starts the test `program` of this very file as `ranks` processes, with `settings` for [`setting`] and, for each rank, what
/// `variables` says besides. Returns what they have said when all have ended.
pub fn processes(
    ranks: usize,
    program: &str,
    settings: &[(&str, &str)],
    variables: impl Fn(usize) -> Vec<(String, String)>,
) -> Vec<Output> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", program, "--nocapture", "--test-threads", "1"]);
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", ranks.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        for (name, value) in settings {
            command.env(variable(name), value);
        }
        command.envs(variables(rank)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..ranks).map(start).collect();
    // All at once: a rank whose output nobody takes would stop.
    let waiting: Vec<_> =
        children.into_iter().map(|child| std::thread::spawn(move || child.wait_with_output().unwrap())).collect();
    waiting.into_iter().map(|thread| thread.join().unwrap()).collect()
}

/// What a rank was started with; `None` outside of a job.
pub fn setting(name: &str) -> Option<String> {
    std::env::var(variable(name)).ok()
}

fn variable(name: &str) -> String {
    format!("LINA_COMM_TEST_{name}")
}

/// A line of its own in one write: the ranks' outputs are merged, after what the test harness has begun.
pub fn say(line: &str) {
    std::io::stdout().write_all(format!("\n{line}\n").as_bytes()).unwrap();
}

/// The lines that ranks have said and that begin with one of `heads`, sorted.
pub fn lines(output: &Output, heads: &[&str]) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let wanted = |line: &&str| heads.iter().any(|head| line.starts_with(head));
    let mut lines: Vec<String> = text.lines().filter(wanted).map(str::to_owned).collect();
    lines.sort();
    lines
}
