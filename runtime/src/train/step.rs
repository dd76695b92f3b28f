//! One step of an estimator: probe or differentiate, compare, update.
//!
//! Invariant: a step changes weights only after every loss of its probes was found finite.

use super::TrainError;
use super::backprop::{self, BACKWARD};
use super::codes::Codes;
use super::compare;
use super::head::HEAD;
use super::paradigms::{Replan, Stage};
use super::prefix::{self, Keeping, PREFIX, Prefix};
use super::weights::WeightFile;
use super::{carried, checkpoint, quantiser};
use crate::exec::{EntryId, Executable};
use crate::rng::poisson_depth;
use crate::text::{Batch, HeldOut, LossTally, Vocab};
use chimera_ir::plan::{Comparison, MASK_REFRESH, Plan};
use chimera_ir::{DType, Type};

/// The entry point that evaluates all probes.
const DUAL_LOSS: &str = "dual_loss";
/// The entry point that moves the weights.
const UPDATE: &str = "update";
/// The entry point that chooses what is probed, where that lasts some steps.
const MASK: &str = "mask";
/// The entry point that measures.
const LOSS: &str = "loss";
/// The port that takes a loop depth for every sequence.
pub(super) const DEPTH: &str = "depth";
/// The port that takes the log-probability of every row under the reference, where rows are compared.
pub(super) const REFERENCE: &str = "reference";
/// Ports with the load of the experts begin so.
const LOAD: &str = "load.";

/// How often looped layers run in a step, drawn for every sequence: Poisson, clamped (semantics 9.2).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Depths {
    /// Mean before clamping.
    pub mean: f64,
    /// Least iterations, at least 1.
    pub least: u32,
    /// Most iterations.
    pub most: u32,
}

impl Depths {
    /// The depth of every sequence of a batch of `rows` in a step.
    fn draw(self, rows: usize, step: u32, seed: u64) -> Vec<i32> {
        let one = |row| poisson_depth(self.mean, self.least, self.most, step, row, seed) as i32;
        (0..rows as u32).map(one).collect()
    }
}

/// The losses of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Probed {
    /// Loss of every positive probe: one for each sequence or direction; none along a gradient.
    pub plus: Vec<f64>,
    /// Loss of every negative probe, in the same order.
    pub minus: Vec<f64>,
    /// The scalars that the update is given; along a gradient its norm, and the share of the weight decay that counts; at the end the norm of
    /// the gradient of final norm and head, where they follow it.
    pub c: Vec<f32>,
    /// The loads of all routers that the update is given, one behind the other.
    pub loads: Vec<i32>,
    /// Mean over both signs of all probes, weighted by counted labels, in nats per token.
    pub loss: f64,
}

impl Probed {
    /// Root mean square of the differences between both signs, in nats: what the estimate has to go by.
    pub fn spread(&self) -> f64 {
        let squares = self.plus.iter().zip(&self.minus).map(|(p, m)| (p - m) * (p - m));
        (squares.sum::<f64>() / self.plus.len().max(1) as f64).sqrt()
    }
}

/// The entry points of one training plan.
#[derive(Debug)]
pub struct Trainer {
    pub(super) exec: Executable,
    /// How losses of probes are compared; nothing along a gradient.
    comparison: Option<Comparison>,
    seed: u64,
    dual: EntryId,
    update: EntryId,
    /// The entry point that chooses, and how many steps a choice lasts.
    mask: Option<(EntryId, u64)>,
    loss: EntryId,
    rows: usize,
    tokens: usize,
    /// Directions.
    members: usize,
    /// Rows that the measuring entry point takes.
    measured_rows: usize,
    measured_tokens: usize,
    /// Ports that carry the load of experts from the probes to the update.
    loads: Vec<String>,
    depths: Option<Depths>,
    /// Parts in which a batch goes through the model.
    parts: usize,
    /// Who makes the trainers of other stages, and the stage of this one.
    replan: Option<Box<dyn Replan>>,
    stage: Stage,
    /// Whether the stage has just begun: what is probed is then chosen anew.
    fresh: bool,
    /// What goes into the first layer that a step changes, where the plan begins there.
    prefix: Option<Prefix>,
    /// Rows that earlier stages found, of those that they asked for.
    found: (u64, u64),
    /// Codes before an update, where they are counted.
    pub(super) codes: Option<Box<Codes>>,
    /// Whether final norm and head follow their gradient.
    pub(super) head: bool,
}

impl Trainer {
    /// A trainer over the entry points `dual_loss` or `backward`, `update` and `loss` of a plan whose weights are set.
    ///
    /// # Errors
    /// When the plan lacks one of them, or their shapes do not fit together.
    pub fn new(exec: Executable, seed: u64) -> Result<Trainer, TrainError> {
        let plan = exec.plan();
        let (comparison, first) = match backprop::has_gradients(plan) {
            true => (None, BACKWARD),
            false => (Some(compare::of(plan)?), DUAL_LOSS),
        };
        let absent = |name: &str| TrainError::Plan(format!("it has no entry point `{name}`; compile one for training"));
        for name in [first, UPDATE, LOSS] {
            plan.entry(name).ok_or_else(|| absent(name))?;
        }
        let [rows, tokens] = matrix(plan, first, "tokens")?;
        let [measured_rows, measured_tokens] = matrix(plan, LOSS, "tokens")?;
        let members = input_type(plan, UPDATE, "c")?.numel();
        let (dual, update, loss) = (exec.entry(first)?, exec.entry(UPDATE)?, exec.entry(LOSS)?);
        let probes = exec.output_type(dual, "losses")?.numel();
        let expected = comparison.map_or((backprop::SCALARS, rows), |how| compare::sizes(how, members, rows));
        let uneven = comparison == Some(Comparison::PerSequence) && !rows.is_multiple_of(members.max(1));
        if (members, probes) != expected || uneven {
            return Err(TrainError::Plan(format!(
                "found {members} coefficients and {probes} losses for {rows} rows, expected {} and {}; compile it again",
                expected.0, expected.1
            )));
        }
        let mask = match plan.option(MASK_REFRESH) {
            None => None,
            Some(text) => {
                let steps = text.parse().ok().filter(|&n: &u64| n > 0);
                let steps = steps.filter(|_| plan.entry(MASK).is_some()).ok_or_else(|| absent(MASK))?;
                Some((exec.entry(MASK)?, steps))
            }
        };
        let ports = plan.entry(UPDATE).map_or(&[][..], |e| &e.inputs);
        let loads = ports.iter().filter(|p| p.0.starts_with(LOAD)).map(|p| p.0.clone()).collect();
        let head = comparison.is_some() && plan.entry(HEAD).is_some();
        Ok(Trainer {
            exec,
            comparison,
            seed,
            dual,
            update,
            mask,
            loss,
            rows,
            tokens,
            members,
            measured_rows,
            measured_tokens,
            loads,
            depths: None,
            parts: 1,
            replan: None,
            stage: Stage::default(),
            fresh: false,
            prefix: None,
            found: (0, 0),
            codes: None,
            head,
        })
    }

    /// As before, with loop depths drawn in this way where the plan takes a depth for every sequence.
    pub fn with_depths(self, depths: Option<Depths>) -> Trainer {
        Trainer { depths, ..self }
    }

    /// As before, with batches of so many times the rows of the plan, along a gradient.
    pub fn in_parts(self, parts: usize) -> Trainer {
        Trainer { parts: parts.max(1), ..self }
    }

    /// As before, for `stage` of a run whose other stages `replan` makes.
    pub fn in_stages(self, replan: Box<dyn Replan>, stage: Stage) -> Trainer {
        Trainer { replan: Some(replan), stage, ..self }
    }

    /// As before, and where the plan begins behind layers that stay as they are, with as much of what these give as `keeping` says.
    ///
    /// # Errors
    /// A plan whose shapes do not fit together.
    pub fn with_prefix(self, keeping: Keeping) -> Result<Trainer, TrainError> {
        Ok(Trainer { prefix: Prefix::of(&self.exec, keeping)?, ..self })
    }

    /// Rows of batches that were found in memory, of all that layers which stay as they are were asked for.
    pub fn found(&self) -> Option<(u64, u64)> {
        let own = self.prefix.as_ref().map_or((0, 0), Prefix::found);
        Some((self.found.0 + own.0, self.found.1 + own.1)).filter(|found| found.1 > 0)
    }

    /// Bytes that the plan and what is kept beside it may come to use.
    pub fn bytes(&self) -> u64 {
        self.exec.bytes() + self.prefix.as_ref().map_or(0, Prefix::most)
    }

    /// The stage that this is the trainer of.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Becomes the trainer of a stage, with the weights as they are. Memory of optimizers goes on where the stage has it, and begins at
    /// zero otherwise. Returns a sentence about the stage where it is another one.
    ///
    /// # Errors
    /// When there is no plan for the stage; the trainer is then as it was.
    pub fn enter(&mut self, stage: Stage) -> Result<Option<String>, TrainError> {
        if stage == self.stage {
            return Ok(None);
        }
        let replan = self.replan.as_mut().ok_or_else(|| {
            TrainError::Plan(format!(
                "its run has stages, of which only {:?} was compiled, not {stage:?}; go on with the configuration",
                self.stage
            ))
        })?;
        let (mut next, sentence) = replan.trainer(stage)?;
        for weight in next.exec.plan().weights.clone() {
            let known = self.exec.plan().weights.iter().any(|w| w.name == weight.name && w.ty == weight.ty);
            if known {
                let (name, dims) = (&weight.name, &weight.ty.dims);
                match weight.ty.dtype {
                    DType::I8 => next.exec.set_weight(name, dims, self.exec.weight::<i8>(name)?)?,
                    DType::U8 => next.exec.set_weight(name, dims, self.exec.weight::<u8>(name)?)?,
                    _ => next.exec.set_weight(name, dims, &self.exec.weight_f32(name)?)?,
                }
            }
        }
        next.found = self.found().unwrap_or_default();
        (next.replan, next.stage, next.fresh) = (self.replan.take(), stage, true);
        *self = next;
        Ok(Some(sentence))
    }

    /// Takes weights and optimizer memory of a checkpoint of a stage. Returns the names of the tensors that nothing reads.
    ///
    /// # Errors
    /// As for [`Trainer::enter`] and [`checkpoint::restore`].
    pub fn restore(&mut self, file: &WeightFile, stage: Stage) -> Result<Vec<String>, TrainError> {
        self.enter(stage)?;
        self.fresh = false;
        if let Some(prefix) = &mut self.prefix {
            prefix.forget();
        }
        checkpoint::restore(file, &mut self.exec)
    }

    /// The executable, with the weights as the last step left them.
    pub fn exec(&self) -> &Executable {
        &self.exec
    }

    /// The executable.
    pub fn exec_mut(&mut self) -> &mut Executable {
        &mut self.exec
    }

    /// Give the executable back.
    pub fn into_exec(self) -> Executable {
        self.exec
    }

    /// Whether a step cannot be repeated from its record alone, but from its batch.
    pub fn needs_data(&self) -> bool {
        self.is_along_gradient() || self.head
    }

    /// Whether steps go along a gradient alone.
    pub fn is_along_gradient(&self) -> bool {
        self.comparison.is_none()
    }

    /// Sequences and tokens of a batch.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows * self.parts, self.tokens)
    }

    /// Tokens that go forward through the model in one step: each sign and direction is a pass, and a gradient beside them one more.
    pub fn forward_tokens(&self) -> u64 {
        let passes = match self.comparison {
            Some(how) => compare::sizes(how, self.members, self.rows).1,
            None => self.parts * self.rows,
        } + if self.head { self.rows } else { 0 };
        (passes * self.tokens) as u64
    }

    /// Probe the weights on a batch and move them. `step` counts from 0 and selects the directions.
    ///
    /// # Errors
    /// A batch of another shape, a loss that is not finite (the weights are then as they were), or a failure to execute.
    pub fn step(&mut self, batch: &Batch, step: u64, lr: f64) -> Result<Probed, TrainError> {
        let probed = self.probe(batch, step)?;
        self.apply(step, lr, &probed.c, &probed.loads)?;
        Ok(probed)
    }

    /// Probe the weights on a batch; they stay as they are.
    ///
    /// # Errors
    /// As for [`Trainer::step`].
    pub fn probe(&mut self, batch: &Batch, step: u64) -> Result<Probed, TrainError> {
        let entry = if self.comparison.is_some() { DUAL_LOSS } else { BACKWARD };
        let drawn = match (input_type(self.exec.plan(), entry, DEPTH), self.drawn(batch, step)) {
            (Err(_), _) => None,
            (Ok(_), Some(drawn)) => Some(drawn),
            (Ok(_), None) => {
                return Err(TrainError::Plan(format!(
                    "`{entry}` takes a loop depth for every sequence, but its configuration does not say how to draw it; set looping.depth_selection"
                )));
            }
        };
        let kept = match (&mut self.prefix, prefix::is_cut(self.exec.plan(), entry)) {
            (_, false) => None,
            (Some(prefix), true) => Some(prefix.rows(&mut self.exec, batch, drawn.as_deref())?),
            (None, true) => {
                return Err(TrainError::Plan(format!(
                    "`{entry}` begins behind some layers, and nothing says how to keep what they give"
                )));
            }
        };
        let Some(comparison) = self.comparison else {
            quantiser::advance(&mut self.exec, step)?;
            let given = backprop::Given { batch, depths: drawn.as_deref(), prefix: kept };
            return backprop::descent(&mut self.exec, self.dual, given, &self.loads, step);
        };
        if let Some(values) = kept {
            self.exec.set_input(self.dual, PREFIX, values)?;
        }
        self.choose(step)?;
        set_batch(&mut self.exec, self.dual, batch)?;
        if let Some(drawn) = drawn {
            self.exec.set_input(self.dual, DEPTH, &drawn)?;
        }
        let (seed, word) = self.stream(step);
        self.exec.set_input(self.dual, "seed", &seed)?;
        self.exec.set_input(self.dual, "step", &[word])?;
        self.exec.run_entry(self.dual)?;
        let mut loads = vec![];
        for name in &self.loads {
            loads.extend(total_load(&self.exec, self.dual, name)?);
        }
        let losses: Vec<f64> = self.exec.output::<f32>(self.dual, "losses")?.iter().map(|&x| f64::from(x)).collect();
        if let Some(&bad) = losses.iter().find(|x| !x.is_finite()) {
            return Err(TrainError::Diverged { step, loss: bad });
        }
        let counts = batch.weights();
        let (plus, minus) = compare::sides(comparison, self.members, &losses, &counts);
        let mut c = compare::coefficients(comparison, &plus, &minus);
        if self.head {
            c.push(self.head_gradient(batch, step)?);
        }
        let loss = weighted(&losses, &counts);
        Ok(Probed { plus, minus, c, loads, loss })
    }

    /// Move the weights by the scalars and loads of [`Probed`]. Weights, optimizer memory and these numbers decide the result; along a
    /// gradient, [`Trainer::probe`] must have left it on the same batch, see [`Trainer::needs_data`].
    ///
    /// # Errors
    /// Numbers of another plan (the weights are then as they were), or a failure to execute.
    pub fn apply(&mut self, step: u64, lr: f64, c: &[f32], loads: &[i32]) -> Result<(), TrainError> {
        let mut rest = loads;
        for name in &self.loads {
            let experts = input_type(self.exec.plan(), UPDATE, name)?.numel();
            let (load, others) = rest.split_at_checked(experts).ok_or_else(|| {
                TrainError::Plan(format!(
                    "the loads of {} routers are recorded as {} numbers",
                    self.loads.len(),
                    loads.len()
                ))
            })?;
            self.exec.set_input(self.update, name, load)?;
            rest = others;
        }
        self.choose(step)?;
        let (seed, word) = self.stream(step);
        self.exec.set_input(self.update, "c", self.of_directions(c))?;
        if self.comparison.is_some() {
            self.exec.set_input(self.update, "seed", &seed)?;
        }
        self.exec.set_input(self.update, "step", &[word])?;
        self.exec.set_input(self.update, "lr", &[lr as f32])?;
        self.exec.run_entry(self.update)?;
        self.fresh = false;
        Ok(())
    }

    /// Chooses what is probed from now on, if it is time to. The weights before the step decide, so that a step that is only applied
    /// chooses as one that was probed.
    fn choose(&mut self, step: u64) -> Result<(), TrainError> {
        let due = |steps: u64| self.fresh || step.is_multiple_of(steps);
        let Some((entry, _)) = self.mask.filter(|&(_, steps)| due(steps)) else { return Ok(()) };
        let (seed, word) = self.stream(step);
        let ports = self.exec.plan().entry(MASK).map_or(&[][..], |e| &e.inputs);
        if ports.iter().any(|p| p.0 == "seed") {
            self.exec.set_input(entry, "seed", &seed)?;
            self.exec.set_input(entry, "step", &[word])?;
        }
        Ok(self.exec.run_entry(entry)?)
    }

    /// The loop depth of every row of a batch in a step, where depths are drawn.
    pub(super) fn drawn(&self, batch: &Batch, step: u64) -> Option<Vec<i32>> {
        self.depths.map(|depths| depths.draw(batch.batch, step as u32, self.seed))
    }

    /// The words that select the directions of a step.
    pub(super) fn stream(&self, step: u64) -> ([i32; 2], i32) {
        let word = |w: u32| i32::from_ne_bytes(w.to_ne_bytes());
        ([self.seed as u32, (self.seed >> 32) as u32].map(word), word(step as u32))
    }

    /// Loss on the first rows of held-out data, at most `rows` of them. The result does not depend on the batch size of the entry point.
    ///
    /// # Errors
    /// When execution fails.
    pub fn measure(&mut self, held: &dyn HeldOut, rows: usize, vocab: &Vocab) -> Result<LossTally, TrainError> {
        let mut tally = LossTally::default();
        self.measured(held, rows, &mut |exec, loss, batch| {
            let losses: Vec<f64> = exec.output::<f32>(loss, "losses")?.iter().map(|&x| f64::from(x)).collect();
            tally.add(weighted(&losses, &batch.weights()), batch, vocab);
            Ok(())
        })?;
        Ok(tally)
    }

    /// Runs the measuring entry point on the first rows of held-out data, at most `rows` of them and at least those that are measured
    /// together, and shows every batch with its results.
    pub(super) fn measured(
        &mut self,
        held: &dyn HeldOut,
        rows: usize,
        hear: &mut dyn FnMut(&Executable, EntryId, &Batch) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let (batch_rows, tokens, unit) = (self.measured_rows, self.measured_tokens, held.unit());
        self.exec.reset_states_where(&|name| carried::belongs(name, LOSS));
        let rows = (rows / unit * unit).max(unit).min(held.measured_rows(tokens));
        for first in (0..rows).step_by(batch_rows) {
            let batch = held.measure(first..(first + batch_rows).min(rows), batch_rows, tokens);
            set_batch(&mut self.exec, self.loss, &batch)?;
            self.exec.run_entry(self.loss)?;
            hear(&self.exec, self.loss, &batch)?;
        }
        Ok(())
    }
}

/// Mean of losses weighted by counts, which repeat; 0 when nothing counts. Rows without counted labels are not looked at.
pub(super) fn weighted(losses: &[f64], counts: &[f64]) -> f64 {
    let (mut sum, mut total) = (0.0, 0.0);
    for (loss, count) in losses.iter().zip(counts.iter().cycle()).filter(|(_, count)| **count > 0.0) {
        sum += loss * count;
        total += count;
    }
    if total > 0.0 { sum / total } else { 0.0 }
}

pub(super) fn set_batch(exec: &mut Executable, entry: EntryId, batch: &Batch) -> Result<(), TrainError> {
    exec.set_input(entry, "tokens", &batch.tokens)?;
    exec.set_input(entry, "seg", &batch.seg)?;
    exec.set_input(entry, "labels", &batch.labels)?;
    if !batch.reference.is_empty() {
        exec.set_input(entry, REFERENCE, &batch.reference)?;
    }
    Ok(())
}

/// The load of one router summed over probes.
pub(super) fn total_load(exec: &Executable, dual: EntryId, name: &str) -> Result<Vec<i32>, TrainError> {
    let experts = input_type(exec.plan(), UPDATE, name)?.numel();
    let mut total = vec![0i32; experts];
    for (i, &x) in exec.output::<i32>(dual, name)?.iter().enumerate() {
        total[i % experts] = total[i % experts].saturating_add(x);
    }
    Ok(total)
}

pub(super) fn input_type<'a>(plan: &'a Plan, entry: &str, name: &str) -> Result<&'a Type, TrainError> {
    let port = plan.entry(entry).and_then(|e| e.inputs.iter().find(|p| p.0 == name));
    let port = port.ok_or_else(|| {
        TrainError::Plan(format!("its entry point `{entry}` has no input `{name}`; compile it again"))
    })?;
    Ok(&plan.buffer(port.1).ty)
}

/// Rows and tokens of a matrix input.
pub(super) fn matrix(plan: &Plan, entry: &str, name: &str) -> Result<[usize; 2], TrainError> {
    let ty = input_type(plan, entry, name)?;
    match (&ty.dims[..], ty.dtype) {
        (&[rows, tokens], DType::I32) => Ok([rows, tokens]),
        _ => Err(TrainError::Plan(format!(
            "input `{name}` of `{entry}` is {ty}, expected i32[rows, tokens]; compile it again"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_weighted_and_skip_empty_rows() {
        assert_eq!(weighted(&[1.0, 4.0, 7.0, 10.0], &[3.0, 1.0]), (3.0 + 4.0 + 21.0 + 10.0) / 8.0);
        assert_eq!(weighted(&[f64::NAN, 2.0], &[0.0, 5.0]), 2.0);
        assert_eq!(weighted(&[1.0], &[0.0]), 0.0);
    }
}
