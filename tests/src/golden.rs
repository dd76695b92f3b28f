//! Golden files: what the executable specification was given and what it answered.
//!
//! A file that is absent or damaged is a defect of the checkout, so everything here panics with the name of the file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use chimera_frontends::config::{self, ModelConfig, Overrides};
use chimera_ir::Tensor;
use chimera_runtime::files::{DType, safetensors::SafeTensors};

/// The path of a golden file.
pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/golden").join(format!("{name}.safetensors"))
}

/// One golden file.
#[derive(Debug)]
pub struct Golden {
    name: String,
    file: SafeTensors,
}

impl Golden {
    /// Open the file of that name.
    pub fn open(name: &str) -> Golden {
        let file = SafeTensors::open(&path(name)).unwrap_or_else(|e| panic!("golden file {name}: {e}"));
        Golden { name: name.to_owned(), file }
    }

    /// A text of the header.
    pub fn header(&self, key: &str) -> &str {
        self.file.metadata().get(key).unwrap_or_else(|| panic!("golden file {}: no {key} in the header", self.name))
    }

    /// The model of the header.
    pub fn model(&self) -> ModelConfig {
        let text = self.header("config");
        let loaded = config::from_text(&self.name, text, &Overrides::default());
        loaded.unwrap_or_else(|e| panic!("golden file {}: {e}", self.name)).model
    }

    /// A number of the tolerance table.
    pub fn tolerance(&self, key: &str) -> f32 {
        let table: serde_json::Value = serde_json::from_str(self.header("tolerance")).expect("the tolerance is JSON");
        table[key].as_f64().unwrap_or_else(|| panic!("golden file {}: no tolerance {key}", self.name)) as f32
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.file.get(name).is_some()
    }

    /// A tensor: floats as `f32`, integers as `i32`.
    pub fn tensor(&self, name: &str) -> Tensor {
        let view = self.file.get(name).unwrap_or_else(|| panic!("golden file {}: no tensor {name}", self.name));
        match view.dtype() {
            DType::F64 | DType::F32 | DType::F16 | DType::BF16 => Tensor::f32(view.shape(), view.to_f32()),
            _ => {
                let ints = view.to_i64().expect("the tensor is integral").into_iter();
                let narrow = |x: i64| i32::try_from(x).expect("the integers of golden files fit 32 bits");
                Tensor::i32(view.shape(), ints.map(narrow).collect())
            }
        }
    }

    /// The tensors whose names start with `prefix`, without it.
    pub fn with_prefix(&self, prefix: &str) -> HashMap<String, Tensor> {
        let names = self.file.names().filter_map(|n| Some((n, n.strip_prefix(prefix)?)));
        names.map(|(full, rest)| (rest.to_owned(), self.tensor(full))).collect()
    }
}

/// Compare floats: `|got - want| <= atol + rtol |want|` everywhere.
///
/// # Panics
/// When an element is out of bounds or the types differ.
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, rtol: f32, atol: f32) {
    assert_eq!(got.ty, want.ty, "{what}");
    let (got, want) = (got.as_f32(), want.as_f32());
    let over = |i: usize| (got[i] - want[i]).abs() - (atol + rtol * want[i].abs());
    // A NaN is never within bounds.
    let bad = (0..got.len()).filter(|&i| !matches!(over(i), o if o <= 0.0));
    let (count, worst) =
        bad.fold((0, None::<usize>), |(n, worst), i| (n + 1, Some(worst.filter(|&w| over(w) >= over(i)).unwrap_or(i))));
    if let Some(i) = worst {
        panic!("{what}: {count} of {} elements differ; element {i} is {}, expected {}", got.len(), got[i], want[i]);
    }
}

/// Compare floats as vectors: `|got - want| <= tolerance |want|` in the Euclidean norm.
///
/// # Panics
/// When they are further apart or the types differ.
pub fn assert_near(what: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
    assert_eq!(got.ty, want.ty, "{what}");
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    let size = norm(&mut want.as_f32().iter().copied());
    let distance = norm(&mut got.as_f32().iter().zip(want.as_f32()).map(|(a, b)| a - b));
    assert!(
        distance <= f64::from(tolerance) * size,
        "{what}: the distance is {distance}, the expected vector has length {size}"
    );
}
