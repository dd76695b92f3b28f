//! Going on with a run: where it is, its model, its trainer in a state of it.
//!
//! Invariant: nothing is written before a run was found to fit its plan and its data.

use crate::hyper::{Hyper, HyperArgs};
use crate::model::Model;
use crate::options::{Failure, ModelOptions, RunOptions as ExecArgs};
use crate::phases::Course;
use crate::session::Planner;
use crate::train::{Args, DEFAULT_OUT, plan_with};
use chimera_ir::plan::Plan;
use chimera_runtime::train::checkpoint;
use chimera_runtime::train::standing::Standing;
use chimera_runtime::train::{TrainError, Trainer};
use std::fs;
use std::path::{Path, PathBuf};

/// The state to go on with, if any, and the folder of the run.
pub fn resumed(args: &Args) -> Result<(Option<Standing>, PathBuf), Failure> {
    let out = args.out.clone().unwrap_or_else(|| DEFAULT_OUT.into());
    let is_auto = |path: &PathBuf| path.as_os_str() == "auto";
    let Some(path) = &args.resume else {
        refuse_run(&out, "go on with it by --resume, or choose another folder by --out")?;
        return Ok((None, out));
    };
    if is_auto(path) {
        return Ok((Standing::newest(&out)?, out));
    }
    let beside = match path.is_dir() {
        true => path.clone(),
        false => path
            .parent()
            .map_or_else(|| PathBuf::from("."), |p| if p.as_os_str().is_empty() { ".".into() } else { p.into() }),
    };
    let folder = args.out.clone().unwrap_or_else(|| beside.clone());
    let same = matches!((fs::canonicalize(&folder), fs::canonicalize(&beside)), (Ok(a), Ok(b)) if a == b);
    if !same {
        refuse_run(&folder, "choose another folder by --out")?;
    }
    let standing = match path.is_dir() {
        true => Standing::newest(path)?
            .ok_or_else(|| Failure::new(format!("{}: the folder has no checkpoint", path.display())))?,
        false => {
            let file = Standing::alone(path).map_err(|e| match e {
                TrainError::Weights { .. } => Failure::usage(e.to_string()),
                e => e.into(),
            })?;
            match checkpoint::latest(&beside)? {
                _ if !same => file,
                Some(newest) if newest.file_name() == path.file_name() => Standing::newest(&beside)?.unwrap_or(file),
                _ => {
                    return Err(Failure::usage(format!(
                        "{}: the run in its folder is elsewhere; go on with the run by --resume {}, or branch off from this checkpoint by --out",
                        path.display(),
                        beside.display()
                    )));
                }
            }
        }
    };
    Ok((Some(standing), folder))
}

/// A folder with a run is not begun again.
///
/// # Errors
/// A run in the folder, or a folder that cannot be listed.
pub fn refuse_run(folder: &Path, cure: &str) -> Result<(), Failure> {
    match checkpoint::latest(folder)? {
        Some(newest) => Err(Failure::usage(format!("{}: there is a run already; {cure}", newest.display()))),
        None => Ok(()),
    }
}

/// The model of a run that is resumed without naming one.
pub fn model_of(standing: &Standing, hyper: &Hyper, options: &ModelOptions) -> ModelOptions {
    let model = hyper.plan.clone().unwrap_or_else(|| standing.file.path().to_path_buf());
    ModelOptions { model: Some(model), ..options.clone() }
}

/// A trainer in a state of a run, for commands that look at it.
///
/// # Errors
/// A plan that is gone, damage, or a failure to execute.
pub fn trainer_at(standing: &Standing, args: &ExecArgs) -> Result<Trainer, Failure> {
    let mut hyper = HyperArgs::default().resumed(&standing.meta.options)?;
    let options = ModelOptions { model: None, model_option: None, scale: None, sets: vec![], vocab: None };
    let model = Model::open(&model_of(standing, &hyper, &options), None)?;
    let stage = standing.meta.progress.stage;
    let plan = plan_with(&model, &mut hyper, &HyperArgs::default(), stage, vec![], args)?;
    same_run(standing, &plan, &standing.meta.data)?;
    let planner = Planner { config: model.config.clone(), hyper: hyper.clone(), further: vec![], run: args.clone() };
    let mut trainer = planner.trainer_of(plan)?.in_stages(Box::new(planner), stage);
    let data = trainer.needs_data() && !standing.trail.steps.is_empty() && !hyper.data.is_empty();
    let course = if data { Some(Course::again(standing, &hyper, &mut trainer)?) } else { None };
    standing.restore(&mut trainer, course.as_ref().map(Course::feed))?;
    Ok(trainer)
}

/// Damage that was found on the way to a state.
pub fn found(standing: &Standing) -> Option<(&'static str, String)> {
    let gap = standing.trail.gap?;
    Some((
        "damage",
        format!(
            "warning: the journal is damaged at byte {}; {} steps behind it are computed again, a copy of the damaged file is kept",
            gap.offset, gap.behind
        ),
    ))
}

pub fn resuming(standing: &Standing) -> String {
    format!(
        "resuming behind step {}: the checkpoint of step {} and {} steps of the journal{}",
        standing.progress().step,
        standing.meta.progress.step,
        standing.trail.steps.len(),
        if standing.trail.torn > 0 { "; a record that was not finished is dropped" } else { "" }
    )
}

/// A run goes on only with the configuration and the data that it was started with.
pub fn same_run(standing: &Standing, plan: &Plan, data: &str) -> Result<(), Failure> {
    let (path, meta) = (standing.file.path().display(), &standing.meta);
    if meta.config != plan.config {
        return Err(Failure::usage(format!(
            "{path}: the run has another configuration; leave the model out, or start another run with --out"
        )));
    }
    if meta.data != data {
        return Err(Failure::usage(format!(
            "{path}: the run was started with other data ({}, found {data}); give the same files, or start another run from its weights: train {path} --data ... --out DIR",
            meta.data
        )));
    }
    Ok(())
}
