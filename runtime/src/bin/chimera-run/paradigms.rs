//! The paradigms of training P1 to P7 (semantics 14) as options: what each of them makes of a run, and what they cannot go together with.
//!
//! Invariant: a run does what its checkpoints say; an option that the rest of the run leaves without a meaning is refused.

use crate::estimators::EstimatorName;
use crate::hyper::{Hyper, HyperArgs};
use crate::model::{Model, Source};
use crate::options::Failure;
use crate::probes::{MaskName, ModeName};
use chimera_frontends::config::{ModelConfig, ParamKind, parameters};
use chimera_frontends::models::chimera;
use chimera_runtime::text::{Batches, TextError, TokenStream};
use chimera_runtime::train::paradigms::{Growth, MAX_THAWS, Stage, Stages, Thaw, reservoir, reservoir_names};
use chimera_runtime::train::prefix::{Form, Keeping};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// Stages of `--progressive-unfreeze`.
const UNFREEZE_STAGES: u16 = 4;
/// Share of `--reservoir`.
const RESERVOIR_RATIO: f64 = 0.5;
/// Share of `--sparse-mezo` with a mask of a share.
const SPARSITY: f64 = 0.01;
/// Megabytes of `--prefix-cache`.
const PREFIX_MEMORY: f64 = 256.0;
/// Choices of entries in a run of `--sparse-mezo`.
const REFRESHES: u64 = 10;

/// Options of `train` that choose paradigms. Each is off unless given, packing apart.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "Paradigms")]
pub struct ParadigmArgs {
    /// P1: begin with rows of an eighth of --seq-len and as many more of them, and let rows grow in four stages
    #[arg(long, env = "CHIMERA_GROWLENGTH", num_args = 0..=1, default_missing_value = "true")]
    pub growlength: Option<bool>,
    /// P2: draw a part of the gate matrices once and neither probe nor train them
    #[arg(long, env = "CHIMERA_RESERVOIR", num_args = 0..=1, default_missing_value = "true")]
    pub reservoir: Option<bool>,
    /// Share of these matrices (--reservoir) [default: 0.5]
    #[arg(long, env = "CHIMERA_RESERVOIR_RATIO", value_name = "R", value_parser = crate::hyper::positive_share)]
    pub reservoir_ratio: Option<f64>,
    /// P3: probe and train a part of the entries, by --mask [default: boundary, or small-mag with --mezo-sparsity]; --estimator mezo
    #[arg(long, env = "CHIMERA_SPARSE_MEZO", num_args = 0..=1, default_missing_value = "true")]
    pub sparse_mezo: Option<bool>,
    /// Share of the entries, chosen anew ten times in a run (--sparse-mezo with a --mask of a share) [default: 0.01]
    #[arg(long, env = "CHIMERA_MEZO_SPARSITY", value_name = "S", value_parser = crate::hyper::positive_share)]
    pub mezo_sparsity: Option<f64>,
    /// P4: pin each thread to a core, and each part of the rows to its thread; the bits stay the same
    #[arg(long, env = "CHIMERA_PIPELINE", num_args = 0..=1, default_missing_value = "true")]
    pub pipeline: Option<bool>,
    /// P5: require that ternary weights are packed once in a step and that all probes share the codes
    #[arg(long, env = "CHIMERA_FUSED_CACHE", num_args = 0..=1, default_missing_value = "true")]
    pub fused_cache: Option<bool>,
    /// P6: documents follow one another in a row, states reset between them; `false` gives each row one document and fills it up [default: true]
    #[arg(long, env = "CHIMERA_PACKING", num_args = 0..=1, default_missing_value = "true")]
    pub packing: Option<bool>,
    /// P7: train the last layers first, and from stage to stage those before them; what is in front of them is computed once for all probes
    #[arg(long, env = "CHIMERA_PROGRESSIVE_UNFREEZE", num_args = 0..=1, default_missing_value = "true")]
    pub progressive_unfreeze: Option<bool>,
    /// Stages, of equal shares of the run (--progressive-unfreeze) [default: 4, at most one for each layer]
    #[arg(long, env = "CHIMERA_UNFREEZE_STAGES", value_name = "S", value_parser = clap::value_parser!(u16).range(2..=i64::from(MAX_THAWS)))]
    pub unfreeze_stages: Option<u16>,
    /// Keep what layers that stay as they are give for rows of the data that come again: as it is (f32), or in a quarter of the memory and
    /// not quite the same (int8); with --progressive-unfreeze or --only
    #[arg(long, env = "CHIMERA_PREFIX_CACHE", num_args = 0..=1, default_missing_value = "f32", value_name = "f32|int8")]
    pub prefix_cache: Option<FormName>,
    /// Most megabytes of it (--prefix-cache) [default: 256]
    #[arg(long, env = "CHIMERA_PREFIX_CACHE_MEMORY", value_name = "MB", value_parser = crate::hyper::positive)]
    pub prefix_cache_memory: Option<f64>,
    /// Every one of P1 to P7 that has a meaning for the run; others are named
    #[arg(long, env = "CHIMERA_ALL")]
    pub all: bool,
}

/// How `--prefix-cache` keeps values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FormName {
    /// As they are
    F32,
    /// As codes of 8 bits with a scale for each 64
    Int8,
}

/// The paradigms of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Paradigms {
    pub growlength: bool,
    /// Share of the gate matrices that stay as they were drawn.
    pub reservoir: Option<f64>,
    /// Whether the mask of the run came by `--sparse-mezo`.
    pub sparse_mezo: bool,
    pub pipeline: bool,
    pub fused_cache: bool,
    pub packing: bool,
    /// Stages in which layers are unfrozen.
    pub unfreeze: Option<u16>,
    /// How what frozen layers give is kept.
    pub prefix: Option<FormName>,
    /// Most megabytes of it.
    pub prefix_memory: f64,
}

impl Default for Paradigms {
    fn default() -> Paradigms {
        Paradigms {
            growlength: false,
            reservoir: None,
            sparse_mezo: false,
            pipeline: false,
            fused_cache: false,
            packing: true,
            unfreeze: None,
            prefix: None,
            prefix_memory: PREFIX_MEMORY,
        }
    }
}

fn refuse<T>(flag: &str, why: &str) -> Result<T, Failure> {
    Err(Failure::usage(format!("--{flag} {why}")))
}

impl ParadigmArgs {
    /// The options of a run that `--sparse-mezo` brings with it; `steps` are those of the run, where steps bound it.
    ///
    /// # Errors
    /// What gives `--sparse-mezo` no meaning.
    pub fn shape(&self, given: &HyperArgs, steps: Option<u64>) -> Result<HyperArgs, Failure> {
        let mut out = given.clone();
        if self.sparse_mezo != Some(true) {
            return match self.mezo_sparsity {
                Some(_) => refuse(
                    "mezo-sparsity",
                    "has no meaning without --sparse-mezo; give both, or --sparsity with --mask",
                ),
                None => Ok(out),
            };
        }
        match given.estimator {
            None | Some(EstimatorName::Mezo) => out.estimator = Some(EstimatorName::Mezo),
            Some(other) => {
                return refuse(
                    "sparse-mezo",
                    &format!(
                        "has no meaning for the estimator {}; leave it out, or choose --estimator mezo",
                        other.text()
                    ),
                );
            }
        }
        if given.sparsity.is_some() {
            return refuse("sparsity", "is --mezo-sparsity where --sparse-mezo is given; give that one");
        }
        let requantise = given.mode.is_none_or(|mode| mode == ModeName::Requantise);
        let by_share = self.mezo_sparsity.is_some() || !requantise;
        let mask = given.mask.unwrap_or(if by_share { MaskName::SmallMag } else { MaskName::Boundary });
        out.mask = Some(mask);
        match (mask, self.mezo_sparsity) {
            (MaskName::Dense, _) => refuse("mask", "dense leaves nothing out; choose another with --sparse-mezo"),
            (MaskName::Boundary, Some(_)) => refuse(
                "mezo-sparsity",
                "has no meaning with --mask boundary, which the size of the probe decides; choose a --mask of a share",
            ),
            (MaskName::Boundary, None) => Ok(out),
            (_, share) => {
                out.sparsity = Some(share.unwrap_or(SPARSITY));
                let steps = steps.map(|n| u32::try_from(n.div_ceil(REFRESHES)).unwrap_or(u32::MAX).clamp(1, 1 << 20));
                out.mask_refresh = given.mask_refresh.or(steps);
                Ok(out)
            }
        }
    }

    /// The paradigms of a new run of `config` with the options `hyper`, and sentences about those that `--all` leaves out.
    ///
    /// # Errors
    /// What has no meaning for the run.
    pub fn chosen(&self, hyper: &Hyper, config: &ModelConfig) -> Result<(Paradigms, Vec<String>), Failure> {
        let mut left = vec![];
        let mut wanted = |given: Option<bool>, flag: &str, obstacle: Option<String>| match (given, obstacle) {
            (Some(true), Some(why)) => Err(Failure::usage(format!("--{flag} {why}"))),
            (None, Some(why)) if self.all => {
                left.push(format!("--all leaves out --{flag}: it {why}"));
                Ok(false)
            }
            (given, obstacle) => Ok(given.unwrap_or(self.all && obstacle.is_none())),
        };
        if self.reservoir_ratio.is_some() && self.reservoir != Some(true) && !self.all {
            return refuse("reservoir-ratio", "has no meaning without --reservoir; give both");
        }
        if self.unfreeze_stages.is_some() && self.progressive_unfreeze != Some(true) && !self.all {
            return refuse("unfreeze-stages", "has no meaning without --progressive-unfreeze; give both");
        }
        let growlength = wanted(self.growlength, "growlength", growth_obstacle(hyper))?;
        let ratio = self.reservoir_ratio.unwrap_or(RESERVOIR_RATIO);
        let reservoir = wanted(self.reservoir, "reservoir", reservoir_obstacle(config, ratio))?.then_some(ratio);
        let masked = hyper.mask != MaskName::Dense;
        let dense =
            "has no meaning without a mask of --estimator mezo; give --sparse-mezo itself beside --all".to_owned();
        let sparse_mezo = wanted(self.sparse_mezo, "sparse-mezo", (!masked).then_some(dense))?;
        let pipeline = wanted(self.pipeline, "pipeline", None)?;
        let fused_cache = wanted(self.fused_cache, "fused-cache", fused_obstacle(hyper))?;
        let stages = self.unfreeze_stages.unwrap_or(UNFREEZE_STAGES.min(config.layers.len() as u16));
        let thaw = wanted(self.progressive_unfreeze, "progressive-unfreeze", thaw_obstacle(config, stages))?;
        let unfreeze = thaw.then_some(stages);
        let packing = self.packing.unwrap_or(true);
        let (prefix, prefix_memory) = (self.prefix_cache, self.prefix_cache_memory.unwrap_or(PREFIX_MEMORY));
        if prefix.is_none() && self.prefix_cache_memory.is_some() {
            return refuse("prefix-cache-memory", "has no meaning without --prefix-cache; give both");
        }
        let chosen = Paradigms {
            growlength,
            reservoir,
            sparse_mezo,
            pipeline,
            fused_cache,
            packing,
            unfreeze,
            prefix,
            prefix_memory,
        };
        chosen.every_stage_trains(hyper, config)?;
        let mut all = chosen.stages(hyper, config).all().into_iter();
        if prefix.is_some() && !all.any(|stage| matches!(chosen.cut(hyper, config, stage), Ok(Some(_)))) {
            return refuse(
                "prefix-cache",
                "needs layers that stay as they are; give it with --progressive-unfreeze, or with patterns of --only that leave out the embedding and the first layers",
            );
        }
        Ok((chosen, left))
    }

    /// The options of a run that is resumed with `given` (see [`ParadigmArgs::shape`]).
    ///
    /// # Errors
    /// What contradicts the options in the checkpoint.
    pub fn resumed(&self, mut given: HyperArgs, saved: &str) -> Result<Hyper, Failure> {
        if self.sparse_mezo == Some(true) {
            // Steps are no part of the contradiction: a run keeps the choices that it was started with.
            given.mask_refresh = None;
        }
        let hyper = given.resumed(saved)?;
        self.agree(&hyper.paradigms)?;
        Ok(hyper)
    }

    /// Whether any option was given.
    pub fn any(&self) -> bool {
        let switches =
            [self.growlength, self.reservoir, self.sparse_mezo, self.pipeline, self.fused_cache, self.packing];
        self.all
            || switches.iter().chain([&self.progressive_unfreeze]).any(Option::is_some)
            || self.reservoir_ratio.is_some()
            || self.mezo_sparsity.is_some()
            || self.unfreeze_stages.is_some()
            || self.prefix_cache.is_some()
            || self.prefix_cache_memory.is_some()
    }

    /// Refuses what contradicts the paradigms of a run.
    ///
    /// # Errors
    /// The first contradiction.
    pub fn agree(&self, saved: &Paradigms) -> Result<(), Failure> {
        let switches = [
            ("growlength", self.growlength, saved.growlength),
            ("reservoir", self.reservoir, saved.reservoir.is_some()),
            ("sparse-mezo", self.sparse_mezo, saved.sparse_mezo),
            ("pipeline", self.pipeline, saved.pipeline),
            ("fused-cache", self.fused_cache, saved.fused_cache),
            ("packing", self.packing, saved.packing),
            ("progressive-unfreeze", self.progressive_unfreeze, saved.unfreeze.is_some()),
        ];
        let differs = |flag: &str, given: String, found: String| {
            refuse(
                flag,
                &format!("is {given}, but the run was started with {found}; leave the option out or start another run"),
            )
        };
        for (flag, given, found) in switches {
            if given.is_some_and(|given| given != found) {
                return differs(flag, (!found).to_string(), found.to_string());
            }
        }
        let shown = |found: Option<String>| found.unwrap_or_else(|| "none".into());
        let name = |form: FormName| form.to_possible_value().map_or(String::new(), |v| v.get_name().to_owned());
        if let Some(given) = self.prefix_cache.filter(|g| saved.prefix != Some(*g)) {
            return differs("prefix-cache", name(given), shown(saved.prefix.map(name)));
        }
        if let Some(given) = self.prefix_cache_memory.filter(|g| saved.prefix_memory != *g) {
            return differs("prefix-cache-memory", given.to_string(), saved.prefix_memory.to_string());
        }
        if let Some(given) = self.reservoir_ratio.filter(|g| saved.reservoir != Some(*g)) {
            return differs("reservoir-ratio", given.to_string(), shown(saved.reservoir.map(|r| r.to_string())));
        }
        if let Some(given) = self.unfreeze_stages.filter(|g| saved.unfreeze != Some(*g)) {
            return differs("unfreeze-stages", given.to_string(), shown(saved.unfreeze.map(|n| n.to_string())));
        }
        match self.all {
            true => refuse("all", "is for new runs; a resumed run has the paradigms of its checkpoint"),
            false => Ok(()),
        }
    }
}

/// Chooses the paradigms of a new run. Returns sentences about those that `--all` leaves out.
///
/// # Errors
/// What has no meaning for the run or its model.
pub fn choose(args: &ParadigmArgs, hyper: &mut Hyper, model: &Model) -> Result<Vec<String>, Failure> {
    let (chosen, left) = args.chosen(hyper, &model.config)?;
    match &model.source {
        Source::Plan(_)
            if args.any() && Paradigms { packing: true, pipeline: false, ..chosen.clone() } != Paradigms::default() =>
        {
            return Err(Failure::usage(
                "paradigms need plans of their own, but the model is a compiled one; name the configuration instead",
            ));
        }
        Source::Weights(file) if chosen.reservoir.is_some() => {
            return refuse(
                "reservoir",
                &format!(
                    "draws matrices anew, which {} has; name a configuration, or leave matrices as they are by --only",
                    file.path().display()
                ),
            );
        }
        _ => {}
    }
    let all = args.all.then(|| {
        format!(
            "--all takes {}; what each of them is worth here is measured by train --benchmark",
            chosen.names().join(", ")
        )
    });
    hyper.paradigms = chosen;
    Ok(all.into_iter().chain(left).collect())
}

fn growth_of(hyper: &Hyper) -> Growth {
    let (seq_len, rows) = (hyper.seq_len as usize, hyper.batch as usize);
    let multiple = match hyper.estimator {
        EstimatorName::PerseqLowrank => hyper.group_size,
        _ => hyper.accumulate,
    };
    Growth { seq_len, tokens: seq_len * rows, multiple: multiple.max(1) as usize }
}

fn growth_obstacle(hyper: &Hyper) -> Option<String> {
    let growth = growth_of(hyper);
    let still = (0..4).all(|stage| growth.shape(stage) == growth.shape(3));
    still.then(|| {
        format!(
            "has no meaning for rows of {} tokens, which cannot grow from 16; choose a longer --seq-len",
            hyper.seq_len
        )
    })
}

fn reservoir_obstacle(config: &ModelConfig, ratio: f64) -> Option<String> {
    let names: Vec<String> = parameters(config).into_iter().map(|p| p.name).collect();
    reservoir_names(names.iter().map(String::as_str), ratio).is_empty().then(|| {
        "has no meaning for a model without matrices a_proj, b_proj, fgate or alpha_proj; leave it out".to_owned()
    })
}

fn fused_obstacle(hyper: &Hyper) -> Option<String> {
    let changes =
        hyper.estimator == EstimatorName::Mezo && matches!(hyper.mode, ModeName::Requantise | ModeName::Integer);
    changes.then(|| {
        "needs probes that leave codes alone, but those of --mode requantise and integer change them, so that each probe packs its own; choose --mode additive or scales"
            .to_owned()
    })
}

fn thaw_obstacle(config: &ModelConfig, stages: u16) -> Option<String> {
    let layers = config.layers.len();
    match layers {
        0 | 1 => Some(format!("has no meaning for a model of {layers} layers; leave it out")),
        _ if usize::from(stages) > layers => Some(format!(
            "in {stages} stages unfreezes less than a layer at a time, the model has {layers}; choose fewer --unfreeze-stages"
        )),
        _ => None,
    }
}

impl Paradigms {
    /// The names of those that a run has.
    fn names(&self) -> Vec<&'static str> {
        let all = [
            ("growlength", self.growlength),
            ("reservoir", self.reservoir.is_some()),
            ("sparse-mezo", self.sparse_mezo),
            ("pipeline", self.pipeline),
            ("fused-cache", self.fused_cache),
            ("packing", self.packing),
            ("progressive-unfreeze", self.unfreeze.is_some()),
        ];
        all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
    }

    /// The schedules of a run.
    pub fn stages(&self, hyper: &Hyper, config: &ModelConfig) -> Stages {
        let looped = config.looping.as_ref().map(|l| l.body[0]);
        Stages {
            growth: self.growlength.then(|| growth_of(hyper)),
            thaw: self.unfreeze.map(|stages| Thaw { stages, layers: config.layers.len(), looped }),
        }
    }

    /// The order of the data of a run.
    ///
    /// # Errors
    /// Data without a row.
    pub fn batches(&self, streams: Vec<(f64, TokenStream)>, hyper: &Hyper) -> Result<Batches, TextError> {
        let make = if self.packing { Batches::mixed } else { Batches::apart };
        make(streams, hyper.seq_len as usize, hyper.seed)
    }

    /// The options of a stage: its batch.
    pub fn at(&self, hyper: &Hyper, config: &ModelConfig, stage: Stage) -> Hyper {
        let mut out = hyper.clone();
        if let Some(growth) = self.stages(hyper, config).growth {
            let (rows, tokens) = growth.shape(stage.length);
            (out.batch, out.seq_len) = (rows as u32, tokens as u32);
        }
        out
    }

    /// The weights that a stage trains; nothing for all.
    ///
    /// # Errors
    /// A pattern of `--only` that matches nothing.
    pub fn trained(
        &self,
        hyper: &Hyper,
        config: &ModelConfig,
        stage: Stage,
    ) -> Result<Option<HashSet<String>>, Failure> {
        let parameters = parameters(config);
        let names = || parameters.iter().map(|p| p.name.as_str());
        let only = hyper.trainable(names())?;
        let thaw = self.stages(hyper, config).thaw;
        if thaw.is_none() && self.reservoir.is_none() {
            return Ok(only);
        }
        let still: HashSet<&str> =
            self.reservoir.map_or(vec![], |ratio| reservoir_names(names(), ratio)).into_iter().collect();
        let trains = |name: &&str| {
            !still.contains(name)
                && only.as_ref().is_none_or(|only| only.contains(*name))
                && thaw.is_none_or(|thaw| thaw.trains(stage.thaw, name))
        };
        Ok(Some(names().filter(trains).map(str::to_owned).collect()))
    }

    /// The layer in front of which nothing is trained in a stage, where what goes into it is kept.
    ///
    /// # Errors
    /// A pattern of `--only` that matches nothing.
    pub fn cut(&self, hyper: &Hyper, config: &ModelConfig, stage: Stage) -> Result<Option<usize>, Failure> {
        let Some(trained) = self.trained(hyper, config, stage)?.filter(|_| self.prefix.is_some()) else {
            return Ok(None);
        };
        let layer = |name: &String| match name.strip_prefix("layers.").and_then(|rest| rest.split('.').next()) {
            Some(layer) => layer.parse().unwrap_or(0),
            None if name.starts_with("loop.") => config.looping.as_ref().map_or(0, |l| l.body[0]),
            None if name == "norm.weight" => config.layers.len(),
            None => 0,
        };
        let first = trained.iter().map(layer).min().unwrap_or(0);
        Ok(Some(chimera::cut(config, first)).filter(|&cut| cut > 0))
    }

    /// How much of what frozen layers give is kept.
    pub fn keeping(&self) -> Keeping {
        let form = match self.prefix {
            Some(FormName::Int8) => Form::Int8,
            Some(FormName::F32) | None => Form::Exact,
        };
        Keeping { form, bytes: self.prefix.map_or(0, |_| (self.prefix_memory * f64::from(1 << 20)) as u64) }
    }

    fn every_stage_trains(&self, hyper: &Hyper, config: &ModelConfig) -> Result<(), Failure> {
        let buffers: HashSet<String> =
            parameters(config).into_iter().filter(|p| p.kind == ParamKind::Buffer).map(|p| p.name).collect();
        for stage in self.stages(hyper, config).all() {
            if self.trained(hyper, config, stage)?.is_some_and(|set| set.iter().all(|name| buffers.contains(name))) {
                return refuse(
                    "only",
                    &format!(
                        "leaves nothing to train in stage {} of --progressive-unfreeze and --reservoir; widen it",
                        stage.thaw + 1
                    ),
                );
            }
        }
        Ok(())
    }

    /// The reservoir of a new run: every matrix with its values.
    pub fn reservoir(&self, config: &ModelConfig, seed: u64) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let Some(ratio) = self.reservoir else { return vec![] };
        let all = parameters(config);
        let names: HashSet<&str> = reservoir_names(all.iter().map(|p| p.name.as_str()), ratio).into_iter().collect();
        let chosen = all.iter().filter(|p| names.contains(p.name.as_str()));
        chosen.map(|p| (p.name.clone(), p.dims.clone(), reservoir(&p.name, p.dims[0], p.dims[1], seed))).collect()
    }

    /// What a stage is, in words.
    pub fn sentence(&self, hyper: &Hyper, config: &ModelConfig, stage: Stage) -> String {
        let mut parts = vec![];
        if self.growlength {
            let at = self.at(hyper, config, stage);
            parts.push(format!("batches of {} x {}", at.batch, at.seq_len));
        }
        if let Some(thaw) = self.stages(hyper, config).thaw {
            let (first, last) = (thaw.first(stage.thaw), thaw.layers - 1);
            let embedding = if stage.thaw + 1 == thaw.stages { " and the embedding" } else { "" };
            parts.push(format!(
                "stage {} of {} trains layers {first} to {last}, the final norm{embedding}",
                stage.thaw + 1,
                thaw.stages
            ));
        }
        parts.join("; ")
    }
}
