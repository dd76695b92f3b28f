//! The compiler command.
fn main() {}
