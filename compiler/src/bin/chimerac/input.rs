//! What a command is given: a configuration, or a plan in one of its two forms.
//!
//! The first bytes decide, not the name; a file called `.plan` is never taken for a configuration.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use chimera_frontends::config::{self, Loaded, Scale};
use chimera_ir::plan::{self, Plan};

use crate::options::{Failure, ModelArgs};

/// Larger files are not plans.
const MAX_PLAN_BYTES: u64 = 1 << 28;

const BINARY: &[u8] = b"CHIMPLAN";
const TEXT: &[u8] = b"chimera-plan ";

/// A configuration or a plan.
pub(crate) enum Input {
    /// Name for people, and the configuration.
    Model(String, Box<Loaded>),
    /// A plan.
    Plan(Box<Plan>),
}

/// Read what the arguments name.
pub(crate) fn read(args: &ModelArgs) -> Result<Input, Failure> {
    let Some(path) = &args.model else {
        return model(args);
    };
    if !is_plan(path) {
        return model(args);
    }
    if args.overridden() {
        let why =
            "--scale, --set and --vocab change configurations, and this is a plan; compile its configuration again";
        return Err(Failure::usage(format!("{}: {why}", path.display())));
    }
    Ok(Input::Plan(Box::new(read_plan(path)?)))
}

/// Read the configuration that the arguments name.
pub(crate) fn model(args: &ModelArgs) -> Result<Input, Failure> {
    let (name, loaded) = load(args)?;
    Ok(Input::Model(name, Box::new(loaded)))
}

/// Read the configuration that the arguments name; with its name.
pub(crate) fn load(args: &ModelArgs) -> Result<(String, Loaded), Failure> {
    let overrides = args.overrides()?;
    match (&args.model, args.scale) {
        (Some(path), scale) => {
            if is_plan(path) {
                return Err(Failure::config(format!("{} is a plan, expected a configuration", path.display())));
            }
            let name = path.display().to_string();
            let name = scale.map_or(name.clone(), |s| format!("{name} at scale {s}"));
            Ok((name, config::load(path, &overrides)?))
        }
        (None, Some(scale)) => Ok((scale.to_string(), config::preset(scale, &overrides)?)),
        (None, None) => {
            let scales = Scale::ALL.map(Scale::name).join(", ");
            Err(Failure::usage(format!("no model is given, expected a file or --scale with one of {scales}")))
        }
    }
}

fn is_plan(path: &Path) -> bool {
    // Pipes and folders are left to the reader of configurations, which says what is wrong with them.
    if !fs::metadata(path).is_ok_and(|m| m.is_file()) {
        return false;
    }
    let mut first = vec![];
    let read = File::open(path).and_then(|f| f.take(TEXT.len() as u64).read_to_end(&mut first));
    read.is_ok()
        && (first.starts_with(BINARY) || first.starts_with(TEXT) || path.extension().is_some_and(|e| e == "plan"))
}

/// The text of a file of at most `most` bytes.
pub(crate) fn read_text(path: &Path, most: u64) -> Result<String, Failure> {
    let unreadable = |e: io::Error| Failure::new(format!("cannot read {}: {e}", path.display()));
    let mut bytes = vec![];
    File::open(path).map_err(unreadable)?.take(most + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > most {
        return Err(Failure::corrupted(format!("{}: the file is larger than {most} bytes", path.display())));
    }
    String::from_utf8(bytes).map_err(|e| Failure::corrupted(format!("{}: {e}", path.display())))
}

fn read_plan(path: &Path) -> Result<Plan, Failure> {
    let corrupted = |why: &dyn std::fmt::Display| Failure::corrupted(format!("{}: {why}", path.display()));
    let unreadable = |e: io::Error| Failure::new(format!("cannot read {}: {e}", path.display()));
    let file = File::open(path).map_err(unreadable)?;
    let mut bytes = vec![];
    file.take(MAX_PLAN_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_PLAN_BYTES {
        return Err(corrupted(&format!("the file is larger than {MAX_PLAN_BYTES} bytes, expected a plan")));
    }
    if !bytes.starts_with(TEXT) {
        return plan::from_bytes(&bytes).map_err(|e| corrupted(&e));
    }
    let text = String::from_utf8(bytes).map_err(|e| corrupted(&e))?;
    plan::from_text(&text).map_err(|e| corrupted(&e))
}
