//! A small job under `mpirun`, seen from outside.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Steps of about a quarter of a second, as an emulated device takes them: a third forward, the rest backward.
const RUN: &str = r#"
[model]
kind = "mixtral"
hidden = 64
layers = 2
heads = 2
experts = 4
expert_hidden = 64

[data]
files = ["text.txt"]

[train]
steps = 100000
sequence_tokens = 16
batch_sequences = 8
warmup_steps = 1
min_learning_rate_ratio = 1 # the same steps whatever their number
eval_every = 0
eval_sequences = 2
checkpoint_every = 4

[cluster]
engine = "mpi"
threads = 1
device = { gflops = 0.1 }
timeout_s = 20
"#;

/// What a rank says of another that was killed.
pub(crate) fn killed(rank: usize) -> String {
    format!("error: rank {rank} failed: its process has died or was killed\n")
}

/// The program under test.
pub(crate) fn lina() -> &'static str {
    env!("CARGO_BIN_EXE_lina")
}

/// A folder with `run.toml` and its data, and the jobs that run in it.
pub(crate) struct Place {
    _temporary: TempDir,
    pub(crate) path: PathBuf,
}

impl Place {
    pub(crate) fn new() -> Self {
        let temporary = TempDir::new().unwrap();
        // As the system names it for a process that works there.
        let path = temporary.path().canonicalize().unwrap();
        fs::write(path.join("run.toml"), RUN).unwrap();
        let text: String = (0..400).map(|line| format!("line {line} of a text that is long enough\n")).collect();
        fs::write(path.join("text.txt"), text).unwrap();
        Place { _temporary: temporary, path }
    }

    /// `mpirun` with `arguments` in this folder; `None` where there is none.
    pub(crate) fn mpirun(&self, arguments: &[&str]) -> Option<Child> {
        let child = Command::new("mpirun")
            .args(["--bind-to", "none", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo"])
            // Other interfaces may come and go meanwhile: those of a testbed.
            .args(["--mca", "oob_tcp_if_include", "lo"])
            .args(arguments)
            .env("PMIX_MCA_ptl_tcp_if_include", "lo")
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .current_dir(&self.path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        if child.is_err() {
            eprintln!("skipped: no mpirun on PATH (Debian and Ubuntu: openmpi-bin)");
        }
        child.ok()
    }

    /// `lina` on the testbed's hosts, with the testbed's variables; `None` where it cannot be.
    pub(crate) fn testbed(&self, hosts: &str, variable: (&str, &str), arguments: &[&str]) -> Option<Output> {
        let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/testbed.sh"))
            .args([&[hosts, "200mbit"], arguments].concat())
            .env("LINA", lina())
            .env(variable.0, variable.1)
            .current_dir(&self.path)
            .output()
            .unwrap();
        let text = said(&output);
        let refusal = text.lines().find(|line| line.starts_with("testbed: "));
        if let Some(reason) = refusal.filter(|_| output.status.code() == Some(2)) {
            eprintln!("skipped: {reason}");
            return None;
        }
        Some(output)
    }

    /// Runs `lina` by itself in this folder.
    pub(crate) fn alone(&self, arguments: &[&str]) -> Output {
        Command::new(lina()).args(arguments).current_dir(&self.path).output().unwrap()
    }

    /// Processes of `lina` that work in this folder: their ranks and identifiers.
    pub(crate) fn ranks(&self) -> Vec<(usize, u32)> {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter_map(|pid| Some((self.rank(pid)?, pid))).collect()
    }

    fn rank(&self, pid: u32) -> Option<usize> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let link = |name: &str| fs::read_link(process.join(name)).ok();
        if link("exe")? != Path::new(lina()).canonicalize().unwrap() || link("cwd")? != self.path {
            return None;
        }
        let environment = fs::read(process.join("environ")).ok()?;
        let variables = String::from_utf8_lossy(&environment).into_owned();
        variables.split('\0').find_map(|line| line.strip_prefix("OMPI_COMM_WORLD_RANK=")?.parse().ok())
    }

    /// Sends a signal to the process of `rank`.
    pub(crate) fn signal(&self, signal: &str, rank: usize) {
        let (_, pid) = self.ranks().into_iter().find(|(other, _)| *other == rank).unwrap();
        assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
    }

    /// What the folder of a run has written of each step so far.
    pub(crate) fn steps(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path.join(run).join("metrics.jsonl")).unwrap_or_default();
        // The last line may be half written.
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Whether a file or folder is there.
    pub(crate) fn has(&self, path: &str) -> bool {
        self.path.join(path).exists()
    }
}

/// Patience with a loaded machine.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What was said on stderr.
pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
