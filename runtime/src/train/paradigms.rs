//! Schedules of training: how long rows are, which layers are trained, and which matrices stay as they were drawn (semantics 14).
//!
//! Invariant: every schedule is a function of its arguments, so that a resumed run finds itself where the uninterrupted one was.

use super::TrainError;
use super::driver::{Budget, Progress};
use super::step::Trainer;
use crate::rng::{STEP_INIT, Stream};
use std::cmp::Ordering;

/// Stages of growing rows: the share of the full length, and the share of the tokens that are trained on at that length.
const LENGTHS: [(f64, f64); 4] = [(0.125, 0.20), (0.25, 0.25), (0.5, 0.25), (1.0, 0.30)];
/// Rows are never shorter.
const SHORTEST: usize = 16;
/// Lengths are multiples of this.
const LENGTH_STEP: usize = 8;
/// Kinds of matrices of which a reservoir is made.
const RESERVOIR: [&str; 4] = ["a_proj", "b_proj", "fgate", "alpha_proj"];
/// Iterations that find the largest singular value of a reservoir matrix.
const POWER_ITERATIONS: usize = 50;
/// The greatest number of stages in which layers are unfrozen.
pub const MAX_THAWS: u16 = 64;

/// Where a run stands in its schedules. Each stage has a plan of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stage {
    /// Index of the length of rows; below 8.
    pub length: u16,
    /// Index of the set of trained layers; below [`MAX_THAWS`].
    pub thaw: u16,
}

impl Stage {
    /// One number, 0 for the first stage; for journals and checkpoints.
    pub fn code(self) -> u64 {
        u64::from(self.length) | u64::from(self.thaw) << 3
    }

    /// The stage of a number; nothing where it stands for none.
    pub fn of_code(code: u64) -> Option<Stage> {
        let thaw = u16::try_from(code >> 3).ok().filter(|&thaw| thaw < MAX_THAWS)?;
        Some(Stage { length: (code & 7) as u16, thaw })
    }

    /// The later of both in each schedule: a run goes forward, also when its budget grows.
    pub fn later(self, other: Stage) -> Stage {
        Stage { length: self.length.max(other.length), thaw: self.thaw.max(other.thaw) }
    }
}

/// Rows that grow from stage to stage at a constant number of tokens in a step (P1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    /// Tokens of a row in the end.
    pub seq_len: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// The number of rows is a multiple of this; at least 1.
    pub multiple: usize,
}

impl Growth {
    /// Rows and tokens of a row in a stage.
    pub fn shape(&self, length: u16) -> (usize, usize) {
        let (share, _) = LENGTHS[usize::from(length).min(LENGTHS.len() - 1)];
        let eighths = (share * self.seq_len as f64 / LENGTH_STEP as f64 + 0.5).floor() as usize;
        let tokens = SHORTEST.max(LENGTH_STEP * eighths);
        let rows = (self.tokens / tokens / self.multiple * self.multiple).max(self.multiple);
        (rows, tokens)
    }

    /// The stage when `seen` of `total` tokens are used; of stages with equal shapes the first.
    pub fn stage(&self, seen: f64, total: f64) -> u16 {
        let mut edge = 0.0;
        let reached = LENGTHS.iter().position(|(_, share)| {
            edge += share;
            seen < edge * total - 1e-9 * total
        });
        let reached = reached.unwrap_or(LENGTHS.len() - 1) as u16;
        (0..reached).find(|&earlier| self.shape(earlier) == self.shape(reached)).unwrap_or(reached)
    }
}

/// Layers that are unfrozen from the last to the first, in equal shares of the steps (P7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thaw {
    /// Stages, from 2 to [`MAX_THAWS`].
    pub stages: u16,
    /// Layers of the model.
    pub layers: usize,
    /// The first layer of the loop, where there is one.
    pub looped: Option<usize>,
}

impl Thaw {
    /// The first layer that is trained in a stage: `ceil(L (1 - (s+1)/S))`.
    pub fn first(&self, stage: u16) -> usize {
        let (stages, behind) = (usize::from(self.stages), usize::from(stage) + 1);
        (self.layers * stages.saturating_sub(behind)).div_ceil(stages)
    }

    /// The stage when `done` of `total` steps are done; of stages that train the same the first.
    pub fn stage(&self, done: f64, total: f64) -> u16 {
        let last = self.stages - 1;
        let reached = (done * f64::from(self.stages) / total).floor().clamp(0.0, f64::from(last)) as u16;
        let same = |&earlier: &u16| reached < last && self.first(earlier) == self.first(reached);
        (0..reached).find(same).unwrap_or(reached)
    }

    /// Whether a weight is trained in a stage. The final norm always is; what belongs to the loop is with its first layer; the embedding,
    /// which every layer reads, waits for the last stage.
    pub fn trains(&self, stage: u16, name: &str) -> bool {
        let first = self.first(stage);
        match name.strip_prefix("layers.").and_then(|rest| rest.split('.').next()) {
            Some(layer) => layer.parse().is_ok_and(|layer: usize| layer >= first),
            None if name.starts_with("loop.") => self.looped.is_some_and(|looped| first <= looped),
            None => name == "norm.weight" || stage + 1 >= self.stages,
        }
    }
}

/// The schedules of a run; none of them is one stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stages {
    /// The length of rows.
    pub growth: Option<Growth>,
    /// The trained layers.
    pub thaw: Option<Thaw>,
}

impl Stages {
    /// The stage of the step that follows `progress`. Tokens and steps of a budget count, and the time where it has a limit.
    pub fn wanted(&self, progress: &Progress, budget: &Budget) -> Stage {
        let time = budget.seconds.map(|all| (progress.seconds, all));
        let of = |count: u64, all: Option<u64>, stage: &dyn Fn(f64, f64) -> u16| {
            let counted = all.map(|all| (count as f64, all.max(1) as f64));
            counted.into_iter().chain(time).map(|(at, all)| stage(at, all)).max().unwrap_or(0)
        };
        let tokens = |growth: &Growth| budget.steps.map(|n| n.saturating_mul(growth.tokens as u64));
        let length = self.growth.map_or(0, |g| of(progress.position, tokens(&g), &|at, all| g.stage(at, all)));
        let thaw = self.thaw.map_or(0, |t| of(progress.step, budget.steps, &|at, all| t.stage(at, all)));
        Stage { length, thaw }
    }

    /// Every stage that a run can come to, in any order.
    pub fn all(&self) -> Vec<Stage> {
        let lengths = if self.growth.is_some() { LENGTHS.len() as u16 } else { 1 };
        let thaws = self.thaw.map_or(1, |t| t.stages);
        (0..thaws).flat_map(|thaw| (0..lengths).map(move |length| Stage { length, thaw })).collect()
    }
}

/// Makes the trainer of a stage.
pub trait Replan: std::fmt::Debug {
    /// The trainer of a stage, all of its weights yet unset, and a sentence about the stage.
    ///
    /// # Errors
    /// When there is no plan for it.
    fn trainer(&mut self, stage: Stage) -> Result<(Trainer, String), TrainError>;
}

/// The names of a reservoir: of each kind of matrices in `names` the share `ratio`, evenly spread over the layers (P2).
pub fn reservoir_names<'a>(names: impl Iterator<Item = &'a str> + Clone, ratio: f64) -> Vec<&'a str> {
    let mut out = vec![];
    for kind in RESERVOIR {
        let of_kind = |name: &&str| name.strip_suffix(".weight").is_some_and(|n| n.rsplit('.').next() == Some(kind));
        let behind = |j: usize| (j as f64 * ratio).ceil();
        out.extend(names.clone().filter(of_kind).enumerate().filter(|(j, _)| behind(j + 1) > behind(*j)).map(|n| n.1));
    }
    out
}

/// The values of a reservoir matrix of `rows` by `columns`, row-major: -1, 0 and 1 with equal probability, divided by the largest singular
/// value.
pub fn reservoir(name: &str, rows: usize, columns: usize, seed: u64) -> Vec<f32> {
    let mut w = vec![0f32; rows * columns];
    Stream::new(&format!("{name}#reservoir"), STEP_INIT, 0, seed).fill_ternary_uniform(0, &mut w);
    let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let forth = |v: &[f64]| -> Vec<f64> {
        w.chunks(columns).map(|row| row.iter().zip(v).map(|(&a, b)| f64::from(a) * b).sum()).collect()
    };
    let mut v = vec![(columns as f64).powf(-0.5); columns];
    for _ in 0..POWER_ITERATIONS {
        let u = forth(&v);
        let mut back = vec![0f64; columns];
        for (row, u) in w.chunks(columns).zip(&u) {
            back.iter_mut().zip(row).for_each(|(sum, &a)| *sum += f64::from(a) * u);
        }
        let length = norm(&back);
        if length.partial_cmp(&0.0) != Some(Ordering::Greater) {
            // A vector without an image says nothing of the largest singular value; at most the whole norm.
            break;
        }
        v = back.into_iter().map(|x| x / length).collect();
    }
    let found = norm(&forth(&v));
    let whole = w.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let largest = if found > 0.0 { found } else { whole.max(1.0) };
    w.iter().map(|&x| (f64::from(x) / largest) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::safetensors::SafeTensors;
    use serde_json::Value;
    use std::path::Path;

    fn golden() -> (SafeTensors, Value) {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/schedules.safetensors");
        let file = SafeTensors::open(Path::new(path)).expect("the committed golden file opens");
        let config = serde_json::from_str(&file.metadata()["config"]).expect("JSON");
        (file, config)
    }

    #[test]
    fn rows_grow_as_in_the_golden_file() {
        let (file, _) = golden();
        let bytes = file.require("exact.grow_length").expect("rows").bytes();
        let words: Vec<i64> = bytes.chunks_exact(8).map(|w| i64::from_le_bytes(w.try_into().expect("8"))).collect();
        let growth = Growth { seq_len: 250, tokens: 2048, multiple: 1 };
        let mut lengths = std::collections::BTreeSet::new();
        for row in words.chunks(3) {
            let (rows, tokens) = growth.shape(growth.stage(row[0] as f64, 100_000.0));
            assert_eq!([tokens as i64, rows as i64], row[1..], "behind {} tokens", row[0]);
            lengths.insert(tokens);
        }
        assert_eq!(lengths.len(), 4);
    }

    #[test]
    fn stages_of_one_shape_are_one_stage() {
        let short = Growth { seq_len: 16, tokens: 64, multiple: 1 };
        assert_eq!((0..4).map(|i| short.stage(f64::from(i), 4.0)).max(), Some(0));
        let grouped = Growth { seq_len: 64, tokens: 5 * 64, multiple: 4 };
        assert_eq!((0..4).map(|s| grouped.shape(s)).collect::<Vec<_>>(), [(20, 16), (20, 16), (8, 32), (4, 64)]);
        assert_eq!(grouped.stage(0.3, 1.0), 0);
        let thaw = Thaw { stages: 8, layers: 4, looped: None };
        assert_eq!((0..8).map(|s| thaw.stage(f64::from(s), 8.0)).collect::<Vec<_>>(), [0, 1, 1, 3, 3, 5, 5, 7]);
    }

    #[test]
    fn layers_are_unfrozen_as_in_the_golden_file() {
        let (_, config) = golden();
        // The model of the golden files has 8 layers, of which 2 to 5 are looped.
        let of = |stage: u16| -> Vec<&str> {
            let names = config["unfrozen"][format!("stage{stage}")].as_array().expect("a list");
            names.iter().map(|n| n.as_str().expect("a name")).collect()
        };
        let all = of(3);
        let thaw = Thaw { stages: 4, layers: 8, looped: Some(2) };
        for stage in 0..4 {
            let trained: Vec<&str> = all.iter().copied().filter(|name| thaw.trains(stage, name)).collect();
            assert_eq!(trained, of(stage), "stage {stage}");
        }
        assert!(!of(2).contains(&"embed.weight") && of(0).contains(&"norm.weight"));
        assert_eq!((0..8).map(|s| thaw.stage(f64::from(s), 8.0)).collect::<Vec<_>>(), [0, 0, 1, 1, 2, 2, 3, 3]);
        assert_eq!(thaw.stage(9.0, 8.0), 3);
    }

    #[test]
    fn reservoirs_are_those_of_the_golden_file() {
        let (file, config) = golden();
        let names: Vec<&str> =
            config["unfrozen"]["stage3"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
        let chosen = reservoir_names(names.iter().copied(), 0.5);
        let mut expected: Vec<&str> = file.names().filter_map(|n| n.strip_prefix("out.reservoir.")).collect();
        let mut sorted = chosen.clone();
        sorted.sort_unstable();
        expected.sort_unstable();
        assert_eq!(sorted, expected);
        for name in chosen {
            let want = file.require(&format!("out.reservoir.{name}")).expect("values").to_f32();
            let found = reservoir(name, 2, 128, 3);
            assert!(found.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-6), "{name}");
        }
        assert_eq!(reservoir_names(names.iter().copied(), 0.0).len(), 0);
        assert!(reservoir("x", 1, 1, 1).iter().all(|x| x.is_finite()));
    }

    #[test]
    fn stages_follow_budgets_and_never_go_back() {
        let stages = Stages {
            growth: Some(Growth { seq_len: 128, tokens: 256, multiple: 1 }),
            thaw: Some(Thaw { stages: 4, layers: 8, looped: None }),
        };
        let at = |step, position, seconds| Progress { step, position, seconds, ..Progress::default() };
        let steps = Budget { steps: Some(100), seconds: None };
        assert_eq!(stages.wanted(&at(0, 0, 9.0), &steps), Stage::default());
        assert_eq!(stages.wanted(&at(50, 25_600 / 2, 0.0), &steps), Stage { length: 2, thaw: 2 });
        let time = Budget { steps: None, seconds: Some(10.0) };
        assert_eq!(stages.wanted(&at(1, 1, 9.9), &time), Stage { length: 3, thaw: 3 });
        assert_eq!(stages.wanted(&at(9, 9, 9.9), &Budget { steps: None, seconds: None }), Stage::default());
        assert_eq!(Stages::default().wanted(&at(50, 9, 9.0), &steps), Stage::default());
        assert_eq!((stages.all().len(), Stages::default().all()), (16, vec![Stage::default()]));
        let (a, b) = (Stage { length: 2, thaw: 0 }, Stage { length: 1, thaw: 3 });
        assert_eq!(a.later(b), Stage { length: 2, thaw: 3 });
        assert!(stages.all().iter().all(|s| Stage::of_code(s.code()) == Some(*s)));
        assert_eq!((Stage::of_code(8 * 64), Stage::of_code(u64::MAX)), (None, None));
    }
}
