//! How a kernel does its work, where there is more than one legal way: named integers.
//!
//! A variant never shows in a result. Which ones are legal is the business of the operation, which one is preferred of others.

use std::fmt;

/// Named integers in a fixed order, such as `panel=1 tile=6`; the empty one leaves the choice to the operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Variant(pub Vec<(String, i64)>);

impl Variant {
    /// A variant.
    pub fn new(params: &[(&str, usize)]) -> Variant {
        Variant(params.iter().map(|(name, x)| ((*name).to_owned(), *x as i64)).collect())
    }

    /// The value of a parameter.
    pub fn get(&self, name: &str) -> Option<i64> {
        self.0.iter().find(|p| p.0 == name).map(|p| p.1)
    }

    /// Whether the choice is left to the operation.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let params: Vec<String> = self.0.iter().map(|(name, x)| format!("{name}={x}")).collect();
        f.write_str(&params.join(" "))
    }
}
