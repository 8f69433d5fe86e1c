//! The server over real connections, with a stand-in for the model behind a real engine.

mod answers;
mod client;
mod errors;
mod fuzz;
mod limits;
mod pages;
mod stand_in;
