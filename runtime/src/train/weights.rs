//! Weights from files into an executable.
//!
//! Invariant: after success every weight of the plan that is no optimizer memory holds finite values of the file; the file's tensors
//! and the plan's weights are the same set.

use super::TrainError;
use crate::exec::Executable;
use crate::files::b158::{B158, Encoding};
use crate::files::safetensors::SafeTensors;
use chimera_ir::plan::WeightKind;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Names of optimizer memory begin so.
const OPTIMIZER: &str = "optim.";

/// A file with weights.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    content: Content,
}

#[derive(Debug)]
enum Content {
    B158(B158),
    SafeTensors(SafeTensors),
}

impl WeightFile {
    /// Opens a `.safetensors` file, or a `.b158` file under any other name.
    ///
    /// # Errors
    /// When the file cannot be opened or is damaged.
    pub fn open(path: &Path) -> Result<WeightFile, TrainError> {
        let safetensors = path.extension().is_some_and(|e| e == "safetensors");
        let content = match safetensors {
            true => Content::SafeTensors(SafeTensors::open(path)?),
            false => Content::B158(B158::open(path)?),
        };
        Ok(WeightFile { path: path.to_path_buf(), content })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Strings beside the tensors.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        match &self.content {
            Content::B158(file) => file.metadata(),
            Content::SafeTensors(file) => file.metadata(),
        }
    }

    fn names(&self) -> Vec<&str> {
        match &self.content {
            Content::B158(file) => file.iter().map(|t| t.0).collect(),
            Content::SafeTensors(file) => file.names().collect(),
        }
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match &self.content {
            Content::B158(file) => file.iter().find(|t| t.0 == name).map(|t| t.2.to_vec()),
            Content::SafeTensors(file) => file.get(name).map(|t| t.shape().to_vec()),
        }
    }

    /// The values of a tensor; packed ternary tensors have lost the latents that training and packing start from.
    fn values(&self, name: &str) -> Result<Vec<f32>, TrainError> {
        match &self.content {
            Content::B158(file) => {
                let tensor = file.require(name)?;
                match tensor.encoding {
                    Encoding::Ternary { .. } => Err(self.wrong(format!(
                        "tensor `{name}` is packed ternary, expected its float latents; use a checkpoint of a training run"
                    ))),
                    _ => Ok(tensor.to_f32()),
                }
            }
            Content::SafeTensors(file) => Ok(file.require(name)?.to_f32()),
        }
    }

    fn wrong(&self, reason: String) -> TrainError {
        TrainError::Weights { path: self.path.clone(), reason }
    }

    /// Sets all weights of `exec` from this file; optimizer memory too when the file has it and `optimizer` asks for it.
    ///
    /// # Errors
    /// Missing, unknown or misshapen tensors, values that are not finite, or damage. The executable may then hold some of the weights.
    pub fn assign(&self, exec: &mut Executable, optimizer: bool) -> Result<(), TrainError> {
        let wanted = exec.plan().weights.clone();
        let names = self.names();
        let missing: Vec<&str> = wanted
            .iter()
            .filter(|w| w.kind != WeightKind::Optimizer || optimizer)
            .map(|w| w.name.as_str())
            .filter(|n| !names.contains(n))
            .collect();
        if !missing.is_empty() {
            return Err(self.wrong(format!(
                "{} of {} weights are missing: {}; check that the file belongs to this configuration",
                missing.len(),
                wanted.len(),
                few(&missing)
            )));
        }
        let known = |n: &&str| n.starts_with(OPTIMIZER) || wanted.iter().any(|w| w.name == **n);
        let unknown: Vec<&str> = names.iter().copied().filter(|n| !known(n)).collect();
        if !unknown.is_empty() {
            return Err(self.wrong(format!(
                "{} tensors are no weights of this configuration: {}; check that the file belongs to it",
                unknown.len(),
                few(&unknown)
            )));
        }
        for weight in wanted.iter().filter(|w| w.kind != WeightKind::Optimizer || optimizer) {
            let (name, dims) = (&weight.name, &weight.ty.dims);
            let shape = self.shape(name).unwrap_or_default();
            if shape != *dims {
                return Err(self.wrong(format!(
                    "tensor `{name}` has shape {shape:?}, expected {dims:?}; check that the file belongs to this configuration"
                )));
            }
            let values = self.values(name)?;
            if let Some(index) = values.iter().position(|x| !x.is_finite()) {
                let (path, tensor) = (self.path.clone(), name.clone());
                return Err(TrainError::NotFinite { path, tensor, index, value: values[index] });
            }
            exec.set_weight(name, dims, &values)?;
        }
        Ok(())
    }
}

/// The first names of a list.
fn few(names: &[&str]) -> String {
    const SHOWN: usize = 4;
    let mut text = names.iter().take(SHOWN).map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += " and more";
    }
    text
}
