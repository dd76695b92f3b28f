//! Weights from files into an executable.
//!
//! Invariant: after success every weight of the plan that is no optimizer memory has values of the file: finite ones where they are
//! floats, codes and scales unread where they are packed. Tensors that nothing reads are reported, never passed over in silence.

use super::TrainError;
use crate::exec::Executable;
use crate::files::b158::{B158, Encoding, Packed, ScaleEncoding, packed_len, padded};
use crate::files::safetensors::SafeTensors;
use crate::files::{DType, MappedSlice};
use chimera_ir::plan::{CODES, SCALES, WeightDecl, WeightKind};
use chimera_ir::{DType as ElementType, Type};
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

/// Names of optimizer memory begin so.
const OPTIMIZER: &str = "optim.";
/// Carried states begin so.
pub(super) const STATE: &str = "state.";

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

/// A ternary tensor of a file: codes and scales of one matrix, or of several of one shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// [rows, columns], with the number of matrices in front for several.
    pub shape: &'a [usize],
    /// Columns that share a scale.
    pub group: usize,
}

impl WeightFile {
    /// Opens a `.safetensors` file, or a `.b158` file under any other name. Reads the names, not the tensors.
    ///
    /// # Errors
    /// When the file cannot be opened or its header is damaged.
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

    /// The names of all tensors, ascending.
    pub fn names(&self) -> Vec<&str> {
        match &self.content {
            Content::B158(file) => file.iter().map(|t| t.0).collect(),
            Content::SafeTensors(file) => file.names().collect(),
        }
    }

    /// The tensors that are packed ternary, ascending by name.
    pub fn packed(&self) -> Vec<PackedTensor<'_>> {
        let Content::B158(file) = &self.content else { return vec![] };
        let packed = |(name, encoding, shape)| match encoding {
            Encoding::Ternary { group, .. } => Some(PackedTensor { name, shape, group }),
            _ => None,
        };
        file.iter().filter_map(packed).collect()
    }

    /// The bytes of a tensor of 32-bit words, its checksum verified; nothing where there is none.
    ///
    /// # Errors
    /// Damage, or a tensor of another type.
    pub(super) fn words(&self, name: &str) -> Result<Option<&[u8]>, TrainError> {
        match &self.content {
            Content::B158(file) if file.contains(name) => {
                match file.require(name)? {
                    Packed { encoding: Encoding::I32, bytes, .. } => Ok(Some(bytes)),
                    _ => Err(self
                        .wrong(format!("tensor `{name}` has no 32-bit words; the file is no checkpoint of this run"))),
                }
            }
            _ => Ok(None),
        }
    }

    /// Compares all tensors with their checksums, on all threads. A safetensors file has none.
    ///
    /// # Errors
    /// The first damaged tensor by name.
    pub fn verify(&self) -> Result<(), TrainError> {
        match &self.content {
            Content::B158(file) => Ok(file.verify_all()?),
            Content::SafeTensors(_) => Ok(()),
        }
    }

    /// Shape and values of a float tensor.
    ///
    /// # Errors
    /// No such tensor, one that is packed ternary, damage, or values that are not finite.
    pub fn floats(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), TrainError> {
        let float = self.float(name)?;
        self.check_finite(name, &float)?;
        Ok((float.shape.to_vec(), float.values().into_owned()))
    }

    /// A float tensor, its checksum verified.
    fn float(&self, name: &str) -> Result<Float<'_>, TrainError> {
        match &self.content {
            Content::B158(file) => {
                if let Some((Encoding::Ternary { .. }, ..)) = file.mapped(name) {
                    return Err(self.wrong(format!(
                        "tensor `{name}` is packed ternary, expected floats; use the checkpoint or file that it was packed from"
                    )));
                }
                let (view, missing) = (file.require(name)?.plain(), || self.absent(name));
                let view = view.ok_or_else(missing)?;
                let bytes = file.mapped(name).ok_or_else(missing)?.2;
                Ok(Float { dtype: view.dtype(), shape: view.shape(), bytes })
            }
            Content::SafeTensors(file) => {
                let view = file.require(name)?;
                let bytes = file.mapped(name).ok_or_else(|| self.absent(name))?;
                Ok(Float { dtype: view.dtype(), shape: view.shape(), bytes })
            }
        }
    }

    /// Begin to read a tensor that is used soon.
    fn will_need(&self, name: &str) {
        let bytes = match &self.content {
            Content::B158(file) => file.mapped(name).map(|t| t.2),
            Content::SafeTensors(file) => file.mapped(name),
        };
        bytes.iter().for_each(MappedSlice::will_need);
    }

    fn absent(&self, name: &str) -> TrainError {
        self.wrong(format!("tensor `{name}` cannot be read as floats; convert it"))
    }

    fn check_finite(&self, name: &str, float: &Float<'_>) -> Result<(), TrainError> {
        if float.is_finite() {
            return Ok(());
        }
        let values = float.values();
        let index = values.iter().position(|x| !x.is_finite()).unwrap_or(0);
        let value = values.get(index).copied().unwrap_or(f32::NAN);
        Err(TrainError::NotFinite { path: self.path.clone(), tensor: name.to_owned(), index, value })
    }

    fn wrong(&self, reason: String) -> TrainError {
        TrainError::Weights { path: self.path.clone(), reason }
    }

    /// Sets all weights of `exec` from this file; optimizer memory too when `optimizer` asks for it. Returns the names of the tensors
    /// that the plan does not read, ascending, optimizer memory left out.
    ///
    /// Weights that no entry point writes stay in the file where their form there is that of the plan. Checksums of float tensors are
    /// verified; packed tensors are not read at all, unless [`WeightFile::verify`] does it.
    ///
    /// # Errors
    /// Missing or misshapen tensors, values that are not finite, or damage. The executable may then hold some of the weights.
    pub fn assign(&self, exec: &mut Executable, optimizer: bool) -> Result<Vec<String>, TrainError> {
        let mut wanted = exec.plan().weights.clone();
        wanted.retain(|w| w.kind != WeightKind::Optimizer || optimizer);
        let names = self.names();
        let read: HashSet<&str> = wanted.iter().map(source).collect();
        let unused: Vec<&str> = names
            .iter()
            .copied()
            .filter(|n| !read.contains(n) && !n.starts_with(OPTIMIZER) && !n.starts_with(STATE))
            .collect();
        let mut seen = HashSet::new();
        let missing: Vec<&str> =
            wanted.iter().map(source).filter(|n| names.binary_search(n).is_err() && seen.insert(*n)).collect();
        if !missing.is_empty() {
            let near = match nearest(missing[0], &unused) {
                Some(near) => format!("; the file has `{near}`, which nothing reads"),
                None => String::new(),
            };
            return Err(self.wrong(format!(
                "{} of {} weights are missing: {}{near}; check that the file belongs to this configuration",
                missing.len(),
                wanted.len(),
                few(&missing)
            )));
        }
        let (packed, floats): (Vec<&WeightDecl>, Vec<&WeightDecl>) =
            wanted.iter().partition(|w| w.kind == WeightKind::Packed);
        floats.iter().for_each(|w| self.will_need(&w.name));
        // All checks in parallel; the first error by order of the plan counts.
        let checked = floats.par_iter().map(|w| {
            let float = self.float(&w.name)?;
            self.check_shape(&w.name, float.shape, &w.ty.dims)?;
            self.check_finite(&w.name, &float).map(|()| float)
        });
        let checked: Vec<Result<Float<'_>, TrainError>> = checked.collect();
        for (weight, float) in floats.into_iter().zip(checked) {
            let float = float?;
            match float.element() {
                Some(dtype) if dtype == weight.ty.dtype => {
                    exec.bind_weight(&weight.name, &weight.ty, float.bytes).map(drop)?
                }
                _ => exec.set_weight(&weight.name, &weight.ty.dims, &float.values())?,
            }
        }
        for weight in packed {
            self.assign_packed(exec, weight)?;
            if weight.name.ends_with(CODES) {
                self.will_need(source(weight));
            }
        }
        Ok(unused.into_iter().map(str::to_owned).collect())
    }

    fn check_shape(&self, name: &str, found: &[usize], expected: &[usize]) -> Result<(), TrainError> {
        if found == expected {
            return Ok(());
        }
        Err(self.wrong(format!(
            "tensor `{name}` has shape {found:?}, expected {expected:?}; check that the file belongs to this configuration"
        )))
    }

    /// Codes or scales of a packed tensor.
    fn assign_packed(&self, exec: &mut Executable, weight: &WeightDecl) -> Result<(), TrainError> {
        let name = source(weight);
        let found = match &self.content {
            Content::B158(file) => file.mapped(name),
            Content::SafeTensors(_) => None,
        };
        let Some((Encoding::Ternary { group, scales }, shape, bytes)) = found else {
            return Err(self.wrong(format!(
                "tensor `{name}` is a float latent, the plan was compiled for packed weights; pack the file by `chimera-run pack`"
            )));
        };
        let size = match *shape {
            [.., n, k] => packed_len(n, k).zip(padded(n, k)).map(|(len, padded)| (k, len, padded.0)),
            _ => None,
        };
        let Some((k, len, rows)) = size else {
            return Err(self.wrong(format!("tensor `{name}` has shape {shape:?}, expected matrices")));
        };
        let (lead, per_row) = (&shape[..shape.len() - 2], k.div_ceil(group));
        let count: usize = lead.iter().product();
        let codes = count * len;
        let part = |range| bytes.part(range).ok_or_else(|| self.wrong(format!("tensor `{name}` is too short")));
        if weight.name.ends_with(CODES) {
            let ty = Type::new(ElementType::U8, &[lead, &[rows / 32, len / rows, 32]].concat());
            self.check_shape(name, &ty.dims, &weight.ty.dims)?;
            exec.bind_weight(&weight.name, &ty, part(0..codes)?)?;
            return Ok(());
        }
        let ty = Type::f32(&[lead, &[rows / 32, per_row, 32]].concat());
        self.check_shape(name, &ty.dims, &weight.ty.dims)?;
        let stored = part(codes..bytes.len())?;
        if scales == ScaleEncoding::F32 {
            exec.bind_weight(&weight.name, &ty, stored)?;
            return Ok(());
        }
        let narrow = Float { dtype: DType::BF16, shape: &[], bytes: stored };
        Ok(exec.set_weight(&weight.name, &ty.dims, &narrow.values())?)
    }
}

/// The tensor of a file that a weight comes from.
fn source(weight: &WeightDecl) -> &str {
    let name = weight.name.as_str();
    match weight.kind {
        WeightKind::Packed => name.strip_suffix(CODES).or(name.strip_suffix(SCALES)).unwrap_or(name),
        _ => name,
    }
}

/// A float tensor of a file.
struct Float<'a> {
    dtype: DType,
    shape: &'a [usize],
    bytes: MappedSlice,
}

impl Float<'_> {
    /// The element type in memory whose bytes are the same.
    fn element(&self) -> Option<ElementType> {
        match self.dtype {
            DType::F32 => Some(ElementType::F32),
            DType::BF16 => Some(ElementType::BF16),
            DType::I8 => Some(ElementType::I8),
            DType::U8 => Some(ElementType::U8),
            _ => None,
        }
    }

    fn values(&self) -> Cow<'_, [f32]> {
        let n = [self.bytes.len() / self.dtype.size()];
        match crate::files::TensorView::new(self.dtype, &n, &self.bytes) {
            Ok(view) => Cow::Owned(view.to_f32()),
            Err(_) => Cow::Borrowed(&[]),
        }
    }

    /// Whether all values are finite numbers, of the common types without a copy.
    fn is_finite(&self) -> bool {
        // All bits of the exponent are set in infinities and NaN. Folding instead of a search, for vector registers.
        match self.dtype {
            DType::F32 => !self
                .bytes
                .as_chunks::<4>()
                .0
                .chunks(1 << 12)
                .any(|c| c.iter().fold(false, |bad, b| bad | (u32::from_le_bytes(*b) & 0x7F80_0000 == 0x7F80_0000))),
            DType::I8 | DType::U8 => true,
            DType::BF16 => !self.bytes.as_chunks::<2>().0.iter().any(|b| u16::from_le_bytes(*b) & 0x7F80 == 0x7F80),
            _ => self.values().iter().all(|x| x.is_finite()),
        }
    }
}

/// The name that shares most with `name` at both ends, if that is most of it.
fn nearest<'a>(name: &str, names: &[&'a str]) -> Option<&'a str> {
    let shared = |other: &str| {
        let head = name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
        let tail = name.bytes().rev().zip(other.bytes().rev()).take_while(|(a, b)| a == b).count();
        (head + tail).min(name.len())
    };
    let best = names.iter().copied().max_by_key(|n| shared(n))?;
    (shared(best) * 3 >= name.len() * 2).then_some(best)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::ExecOptions;
    use crate::files::b158::{self, Entry, ScaleMode, Ternary, block_scales, pack_ternary, ternarise};
    use chimera_ir::plan::{BufferDecl, Place, Plan};

    /// A plan of packed weights alone: three matrices [5, 70] together and one apart, scales for 32 columns.
    fn executable() -> Executable {
        let types = [
            ("x.*.w.codes", Type::new(ElementType::U8, &[3, 1, 32, 32])),
            ("x.*.w.alpha", Type::f32(&[3, 1, 3, 32])),
            ("y.codes", Type::new(ElementType::U8, &[1, 32, 32])),
            ("y.alpha", Type::f32(&[1, 3, 32])),
        ];
        let weight =
            |(name, ty): &(&str, Type)| WeightDecl { name: (*name).into(), ty: ty.clone(), kind: WeightKind::Packed };
        let buffer =
            |(i, t): (u32, &(&str, Type))| BufferDecl { ty: t.1.clone(), place: Place::Weight(i), name: t.0.into() };
        let plan = Plan {
            weights: types.iter().map(weight).collect(),
            buffers: (0..).zip(&types).map(buffer).collect(),
            ..Plan::default()
        };
        Executable::new(plan, &ExecOptions { threads: 1, ..ExecOptions::default() }).expect("a plan of weights alone")
    }

    fn matrices() -> [Ternary; 3] {
        [1, 2, 3].map(|i| {
            let latents: Vec<f32> = (0..5 * 70).map(|j| ((i * 1000 + j) as f32).sin()).collect();
            ternarise(&latents, 5, 70, 32, 0.5, ScaleMode::PerGroup)
        })
    }

    #[test]
    fn codes_stay_in_the_file_and_so_do_wide_scales() {
        let folder = tempfile::tempdir().expect("folder");
        let (path, all) = (folder.path().join("w.b158"), matrices());
        for scales in [ScaleEncoding::F32, ScaleEncoding::Bf16] {
            let entries =
                [Entry::ternary_stack("x.*.w", 5, 70, &all, scales), Entry::ternary("y", 5, 70, &all[1], scales)];
            b158::write(&path, &entries, &BTreeMap::new()).expect("written");
            let mut exec = executable();
            let before = exec.bytes();
            let file = WeightFile::open(&path).expect("opened");
            assert_eq!(file.assign(&mut exec, false).expect("all is there"), Vec::<String>::new());
            let codes = |t: &Ternary| pack_ternary(&t.codes, 5, 70);
            let stored = |x: f32| if scales == ScaleEncoding::F32 { x } else { half::bf16::from_f32(x).to_f32() };
            assert_eq!(exec.weight::<u8>("x.*.w.codes").expect("set"), all.iter().flat_map(codes).collect::<Vec<_>>());
            assert_eq!(exec.weight::<u8>("y.codes").expect("set"), codes(&all[1]));
            let blocked = |t: &Ternary| block_scales(&t.scales, 3).into_iter().map(stored);
            let alphas: Vec<f32> = all.iter().flat_map(blocked).collect();
            assert_eq!(exec.weight::<f32>("x.*.w.alpha").expect("set"), alphas);
            assert_eq!(exec.weight::<f32>("y.alpha").expect("set"), &alphas[96..192]);
            // Codes, and scales that need no change, have no copy.
            let (narrow, all) = (scales == ScaleEncoding::Bf16, 4 * 96 * 4);
            assert_eq!(exec.bytes() - before, if narrow { all } else { 0 });
            assert_eq!(exec.mapped_bytes(), 4 * 1024 + if narrow { 0 } else { all });
        }
    }

    #[test]
    fn latents_do_not_serve_a_plan_for_codes_nor_codes_one_for_floats() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("w.b158");
        let (all, floats) = (matrices(), [0.5; 350]);
        let x = Entry::ternary_stack("x.*.w", 5, 70, &all, ScaleEncoding::F32);
        let says = |entries: &[Entry<'_>], part: &str| {
            b158::write(&path, entries, &BTreeMap::new()).expect("written");
            let error = WeightFile::open(&path).expect("opened").assign(&mut executable(), false).expect_err(part);
            assert!(error.to_string().contains(part), "{error}");
        };
        says(&[x.clone(), Entry::f32("y", &[5, 70], &floats)], "tensor `y` is a float latent");
        says(
            &[
                x.clone(),
                Entry::ternary(
                    "y",
                    7,
                    50,
                    &ternarise(&floats, 7, 50, 32, 0.5, ScaleMode::PerGroup),
                    ScaleEncoding::F32,
                ),
            ],
            "expected [1, 32, 32]",
        );
        says(&[x], "missing: `y`");
        let file = WeightFile::open(&path).expect("opened");
        let error = file.floats("x.*.w").expect_err("codes are no floats");
        assert!(error.to_string().contains("is packed ternary, expected floats"), "{error}");
    }
}
