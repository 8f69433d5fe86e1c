//! Which shared libraries and programs are installed.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Folders in which CUDA's installers put libraries without telling the loader.
const CUDA_FOLDERS: [&str; 2] = ["/usr/local/cuda/lib64", "/usr/local/nvidia/lib64"];

/// Paths of the shared libraries that a program can load by name.
#[derive(Debug)]
pub(super) struct Installed {
    libraries: Vec<PathBuf>,
}

impl Installed {
    /// What the loader's cache, `LD_LIBRARY_PATH` and CUDA's usual folders have.
    pub(super) fn list() -> Self {
        let mut libraries = Vec::new();
        let folders = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        for folder in env::split_paths(&folders).chain(CUDA_FOLDERS.map(PathBuf::from)) {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            libraries.extend(entries.map(|entry| entry.path()));
        }
        libraries.extend(loader_cache());
        Installed { libraries }
    }

    /// The first library whose file is `name`, alone or with a version after it.
    pub(super) fn library(&self, name: &str) -> Option<&PathBuf> {
        self.libraries.iter().find(|path| is_library(path, name))
    }
}

/// Whether the file at `path` is the library `name`, alone or with a version after it.
pub(super) fn is_library(path: &Path, name: &str) -> bool {
    let rest = path.file_name().and_then(|file| file.to_str()).and_then(|file| file.strip_prefix(name));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The loader's cache, whose program is often not on a user's `PATH`.
fn loader_cache() -> Vec<PathBuf> {
    let listing = ["ldconfig", "/sbin/ldconfig"].into_iter().find_map(|program| output(program, "-p"));
    // A line is `libname.so.1 (libc6,x86-64) => /path/libname.so.1`.
    listing
        .iter()
        .flat_map(|listing| listing.lines())
        .filter_map(|line| line.split_once(" => "))
        .map(|(_, path)| PathBuf::from(path.trim()))
        .collect()
}

/// Where `PATH` finds a program.
pub(super) fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// What a program prints on stdout, if it runs and succeeds.
pub(super) fn output(program: &str, argument: &str) -> Option<String> {
    let output = Command::new(program).arg(argument).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_has_a_version_or_none_but_no_other_name() {
        let installed = Installed { libraries: ["/a/libmpi_cxx.so.40", "/b/libmpi.so.40"].map(PathBuf::from).to_vec() };
        assert_eq!(installed.library("libmpi.so"), Some(&PathBuf::from("/b/libmpi.so.40")));
        assert_eq!(installed.library("libmp.so"), None);
    }
}
