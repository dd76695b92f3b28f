//! What people and programs want to know about a model, its graphs and its plan.
//!
//! Every report is data: JSON through serde, text through `Display`, and all details with `{:#}`. Reports are functions of what they
//! describe and never change it.

mod dot;
mod entries;
mod graph;
mod groups;
mod kernels;
mod memory;
mod model;
mod summary;
mod table;
mod why;

pub use dot::dot;
pub use entries::{EntryReport, Port, Shared, entries};
pub use graph::{GraphReport, GraphStage, Stages};
pub use groups::{EntryGroups, GroupRow, groups};
pub use kernels::{Argument, KernelReport, KernelRow, UnknownKernel, find_kernel, kernels};
pub use memory::{EntryMemory, Living, MemoryReport, memory};
pub use model::{ClaimRow, ModelReport, NotYetRow, PartRow, StreamRow, model};
pub use summary::{Component, DecisionReport, DecisionRow, PlanReport, StateRow, decisions, summary};
pub use why::{CandidateRow, Choice, WhyReport, why};
