//! Engine `mpi` as its users see it: jobs that `mpirun` starts and that lose a rank, lose a network, or are told
//! something wrong. Where there is no `mpirun`, a test says so and passes.

mod bad_input;
mod decisions;
mod doctor;
mod inference;
mod job;
mod killed;
mod network;
