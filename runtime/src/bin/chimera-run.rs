//! The runtime command.
fn main() {}
