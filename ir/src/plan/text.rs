//! The written forms of a plan.
//!
//! Both forms carry the same tree behind a checksum: text is for people, binary for machines. Writing is a function of the plan alone,
//! reading gives back an equal and verified plan or says what is wrong, and never panics.
//!
//! ```text
//! text   := "chimera-plan " version " crc32c " 8 hex digits "\n" tree       the checksum is over the tree
//! binary := "CHIMPLAN" u32 version  u64 length  u32 crc32c  length bytes    little-endian; the checksum is over the bytes
//! ```

use super::crc32c::crc32c;
use super::{Plan, VERSION, tree, verify};
use crate::sexpr::Sexpr;
use std::fmt;

const NAME: &str = "chimera-plan";
const MAGIC: &[u8; 8] = b"CHIMPLAN";

/// What is wrong with a written plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanError {
    /// A sentence without a full stop, place first.
    pub why: String,
}

impl PlanError {
    pub(super) fn new(why: impl Into<String>) -> PlanError {
        PlanError { why: why.into() }
    }

    /// The same complaint inside a larger place.
    pub(super) fn within(self, place: impl fmt::Display) -> PlanError {
        PlanError { why: format!("{place}: {}", self.why) }
    }
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for PlanError {}

/// Text form.
pub fn to_text(plan: &Plan) -> String {
    let body = tree::write(plan).to_text();
    format!("{NAME} {VERSION} crc32c {:08x}\n{body}", crc32c(body.as_bytes()))
}

/// Parse text.
///
/// # Errors
/// The first thing that is wrong: header, version, checksum, form, or a rule of [`verify()`].
pub fn from_text(text: &str) -> Result<Plan, PlanError> {
    let (header, body) =
        text.split_once('\n').ok_or_else(|| PlanError::new("found no line, expected the header of a plan"))?;
    let words: Vec<&str> = header.split(' ').take(5).collect();
    let [NAME, version, "crc32c", sum] = words[..] else {
        return Err(PlanError::new(format!(
            "line 1 is not the header of a plan, expected `{NAME} {VERSION} crc32c` and 8 digits"
        )));
    };
    version_is_known(version.parse().ok(), version)?;
    let found = format!("{:08x}", crc32c(body.as_bytes()));
    if sum != found {
        return Err(damaged(sum, &found));
    }
    finish(Sexpr::parse(body).map_err(|e| PlanError::new(e.to_string()).within("after the header"))?)
}

/// Binary form.
pub fn to_bytes(plan: &Plan) -> Vec<u8> {
    let body = tree::write(plan).to_bytes();
    let mut out = Vec::with_capacity(24 + body.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(body.len() as u64).to_le_bytes());
    out.extend_from_slice(&crc32c(&body).to_le_bytes());
    out.extend_from_slice(&body);
    out
}

/// Parse bytes.
///
/// # Errors
/// As [`from_text`]; also bytes that are missing or follow the plan.
pub fn from_bytes(bytes: &[u8]) -> Result<Plan, PlanError> {
    let mut rest = bytes;
    if take(&mut rest)? != *MAGIC {
        return Err(PlanError::new("the first 8 bytes are not CHIMPLAN, expected a plan"));
    }
    let version = u32::from_le_bytes(take(&mut rest)?);
    version_is_known(Some(version), &version.to_string())?;
    let length = u64::from_le_bytes(take(&mut rest)?);
    let sum = u32::from_le_bytes(take(&mut rest)?);
    if rest.len() as u64 != length {
        return Err(PlanError::new(format!("found {} bytes after the header, expected {length}", rest.len())));
    }
    let found = crc32c(rest);
    if sum != found {
        return Err(damaged(&format!("{sum:08x}"), &format!("{found:08x}")));
    }
    finish(Sexpr::from_bytes(rest).map_err(|e| PlanError::new(e.to_string()).within("after the header"))?)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], PlanError> {
    let (head, tail) = rest.split_first_chunk().ok_or_else(|| PlanError::new("the header of the plan is cut off"))?;
    *rest = tail;
    Ok(*head)
}

fn version_is_known(version: Option<u32>, found: &str) -> Result<(), PlanError> {
    if version == Some(VERSION) {
        return Ok(());
    }
    let found: String = found.chars().take(20).collect();
    Err(PlanError::new(format!(
        "the plan has format version {found}, this program reads version {VERSION}; compile the plan again"
    )))
}

fn damaged(stated: &str, found: &str) -> PlanError {
    let stated: String = stated.chars().take(20).collect();
    PlanError::new(format!(
        "the checksum in the header is {stated}, that of the content {found}; the plan was changed or damaged"
    ))
}

fn finish(tree: Sexpr) -> Result<Plan, PlanError> {
    let plan = tree::read(&tree)?;
    verify(&plan)?;
    Ok(plan)
}
