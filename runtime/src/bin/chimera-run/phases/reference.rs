//! What the reference thinks of preferences: computed once, kept in a file, used while data and reference are the same.
//!
//! Invariant: numbers of other data or of another reference are never used. The file has the checksums of its format.

use super::{Course, Phase};
use crate::hyper::Hyper;
use crate::options::Failure;
use chimera_ir::plan::WeightKind;
use chimera_runtime::exec::{ExecError, Executable};
use chimera_runtime::files::b158::{self, Entry};
use chimera_runtime::text::Pairs;
use chimera_runtime::train::weights::WeightFile;
use chimera_runtime::train::{Trainer, checkpoint};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The name of the file in the folder of a run.
const NAME: &str = "reference.b158";
const FORMAT: &str = "chimera-reference 1";
/// The tensors, `f32 [pairs, 2]` each.
const SIDES: [&str; 2] = ["train", "held"];
const CURE: &str = "remove the file, or name another by --reference";

/// Where the reference of a run is.
#[derive(Debug)]
pub struct Place<'a> {
    /// The options of the run.
    pub hyper: &'a Hyper,
    /// Its folder.
    pub folder: &'a Path,
}

impl Place<'_> {
    fn file(&self) -> PathBuf {
        match &self.hyper.phase {
            Phase::Dpo { file: Some(path), .. } => path.clone(),
            _ => self.folder.join(NAME),
        }
    }

    /// What identifies the pairs and their order.
    fn key(&self, course: &Course) -> String {
        let (seq, fraction) = (self.hyper.seq_len, self.hyper.val_fraction);
        format!("{}, rows of {seq}, {fraction} held out", course.data())
    }

    /// Gives the pairs of a new run their reference, which are the weights of `trainer`, and returns the checksum of these weights and a
    /// sentence. Does nothing for other phases.
    ///
    /// # Errors
    /// A file of other data or weights, or one that cannot be read or written.
    pub fn begin(&self, course: &mut Course, trainer: &mut Trainer) -> Result<Option<(String, String)>, Failure> {
        let key = self.key(course);
        let Course::Pairs { train, held } = course else { return Ok(None) };
        let weights = checksum(trainer.exec())?;
        let n = train.len() + held.len();
        let path = self.file();
        let done = match self.read(&path, &key, &weights, train, held)? {
            true => "used",
            false => {
                compute(trainer, train, held)?;
                write(&path, &key, &weights, train, held)?;
                "written"
            }
        };
        Ok(Some((weights, format!("log-probabilities of the reference for {n} pairs: {} ({done})", path.display()))))
    }

    /// Gives the pairs of a run that goes on their reference. Where the file is gone, it is made again from the first checkpoint of the
    /// run. Does nothing for other phases. The weights of `trainer` are then any.
    ///
    /// # Errors
    /// A file of other data or weights, or none where no checkpoint has the weights of the reference.
    pub fn resume(&self, course: &mut Course, trainer: &mut Trainer) -> Result<(), Failure> {
        let key = self.key(course);
        let (Course::Pairs { train, held }, Phase::Dpo { weights, .. }) = (course, &self.hyper.phase) else {
            return Ok(());
        };
        let path = self.file();
        if self.read(&path, &key, weights, train, held)? {
            return Ok(());
        }
        let gone = || {
            Failure::new(format!(
                "{}: the log-probabilities of the reference are gone, and no checkpoint in {} has its weights; bring the file back",
                path.display(),
                self.folder.display()
            ))
        };
        let first = *checkpoint::steps(self.folder)?.first().ok_or_else(gone)?;
        WeightFile::open(&checkpoint::path_of(self.folder, first))?.assign(trainer.exec_mut(), false)?;
        if checksum(trainer.exec())? != *weights {
            return Err(gone());
        }
        compute(trainer, train, held)?;
        write(&path, &key, weights, train, held)
    }

    /// Reads the file; whether it is there.
    fn read(
        &self,
        path: &Path,
        key: &str,
        weights: &str,
        train: &mut Pairs,
        held: &mut Pairs,
    ) -> Result<bool, Failure> {
        if !path.exists() {
            return Ok(false);
        }
        let file = WeightFile::open(path)?;
        let of = |key: &str| file.metadata().get(key).map_or("nothing", String::as_str);
        for (what, found, wanted) in
            [("format", of("format"), FORMAT), ("data", of("data"), key), ("weights", of("weights"), weights)]
        {
            if found != wanted {
                return Err(Failure::new(format!(
                    "{}: these log-probabilities are those of another reference or other data: {what} {found}, expected {wanted}; {CURE}",
                    path.display()
                )));
            }
        }
        for (name, pairs) in SIDES.iter().zip([train, held]) {
            if pairs.is_empty() {
                continue;
            }
            let (dims, values) = file.floats(name)?;
            if dims != [pairs.len(), 2] {
                return Err(Failure::corrupted(format!(
                    "{}: tensor `{name}` has shape {dims:?}, expected [{}, 2]; {CURE}",
                    path.display(),
                    pairs.len()
                )));
            }
            pairs.set_reference(values.chunks_exact(2).map(|p| [p[0], p[1]]).collect());
        }
        Ok(true)
    }
}

fn compute(trainer: &mut Trainer, train: &mut Pairs, held: &mut Pairs) -> Result<(), Failure> {
    for pairs in [train, held] {
        let found = trainer.reference(pairs)?;
        pairs.set_reference(found);
    }
    Ok(())
}

fn write(path: &Path, key: &str, weights: &str, train: &Pairs, held: &Pairs) -> Result<(), Failure> {
    let sides: Vec<(&str, [usize; 2], Vec<f32>)> = SIDES
        .iter()
        .zip([train, held])
        .filter(|(_, pairs)| !pairs.is_empty())
        .map(|(name, pairs)| (*name, [pairs.len(), 2], pairs.reference().as_flattened().to_vec()))
        .collect();
    let tensors: Vec<Entry<'_>> = sides.iter().map(|(name, dims, values)| Entry::f32(name, dims, values)).collect();
    let metadata = [("format", FORMAT), ("data", key), ("weights", weights)];
    let metadata: BTreeMap<String, String> = metadata.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    Ok(b158::write(path, &tensors, &metadata)?)
}

/// A checksum of names and values of all weights, optimizer memory left out.
fn checksum(exec: &Executable) -> Result<String, ExecError> {
    let mut sum = 0;
    for w in exec.plan().weights.iter().filter(|w| w.kind != WeightKind::Optimizer) {
        sum = crc32c::crc32c_append(sum, w.name.as_bytes());
        for x in exec.weight_f32(&w.name)?.iter() {
            sum = crc32c::crc32c_append(sum, &x.to_le_bytes());
        }
    }
    Ok(format!("crc32c {sum:08x}"))
}
