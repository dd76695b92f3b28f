//! The ways of tiling a ternary product: which there are, and what each has to do.
//!
//! Tile shapes never show in the result: every output is the chain that the operation states.

use super::{Shape, TernaryProduct};
use crate::{
    loops::Variant,
    ops::{Pass, Work, pack_ternary::BLOCK_ROWS},
};

/// Most rows of a register tile on a panel: with two vectors of weight rows they keep all sums in 16 registers.
const PANEL_TILE: usize = 6;
/// Most rows of a register tile that unpacks its own codes: each has sums in four registers.
const UNPACK_TILE: usize = 3;
/// Rows of an instance on a panel.
const PANEL_ROWS: [usize; 2] = [126, 252];
/// Rows of an instance that unpacks in registers.
const UNPACK_ROWS: usize = 12;
/// From this many rows for each group of weights on, a panel pays where nobody knows better.
const PANEL_FROM: usize = 12;
/// Rows for each group of weights beyond which unpacking in registers is never worth a thought.
const UNPACK_TO: usize = 24;
/// Columns of a panel, where it does not hold all of them.
const COLUMNS: [usize; 2] = [512, 1024];
/// Instances that keep the threads of a machine busy; the first is enough for a small one.
const INSTANCES: [usize; 3] = [4, 2, 16];
/// Weight blocks of an instance share the sums of its rows.
const BLOCKS: usize = 16;
/// How far ahead packed codes are asked for, in bytes.
const AHEAD: [usize; 4] = [8192, 0, 2048, 4096];

/// How the rows and columns of one instance are worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Whether weight codes are unpacked to memory first.
    pub(super) panel: bool,
    /// Rows of a register tile.
    pub(super) tile: usize,
    /// Rows of an instance.
    pub(super) rows: usize,
    /// Weight blocks of an instance.
    pub(super) blocks: usize,
    /// Columns of a panel; 0 for all. A multiple of [`Shape::unit`].
    pub(super) columns: usize,
    /// Bytes between a packed code that is used and one that is asked for; 0 for no hint.
    pub(super) ahead: usize,
}

/// What the tiles are cut from.
#[derive(Clone, Copy, Debug)]
struct Extents {
    /// Rows that a group of weights has, on average where they are counted at run time.
    usual: usize,
    /// Rows that instances divide.
    rows: usize,
    /// How many such ranges of rows there are.
    leads: usize,
    /// Blocks of weight rows.
    blocks: usize,
}

impl Extents {
    fn of(op: &TernaryProduct, s: &Shape) -> Extents {
        let usual = s.rows / s.groups;
        let (rows, leads) = if op.grouped_rows { (s.rows, 1) } else { (usual, s.groups) };
        Extents { usual, rows, leads, blocks: op.m.div_ceil(BLOCK_ROWS) }
    }

    /// Equal ranges of at most `most` rows, in whole tiles.
    fn even(&self, most: usize, tile: usize) -> usize {
        self.rows.div_ceil(self.rows.div_ceil(most)).next_multiple_of(tile)
    }

    /// Blocks of an instance: equal shares, so that there are `instances` of them or a multiple.
    fn blocks(&self, rows: usize, instances: usize) -> usize {
        let wanted = instances.div_ceil(self.leads * self.rows.div_ceil(rows)).max(1);
        let shares = self.blocks.div_ceil(BLOCKS).next_multiple_of(wanted);
        self.blocks.div_ceil(shares)
    }
}

impl Shape {
    /// Columns after which a panel may end: whole groups of weights, or whole blocks of activations where a row has one group.
    /// `None` when one integer sum spans the row.
    pub(super) fn unit(&self) -> Option<usize> {
        match (self.nb, self.span) {
            (1, 1) => None,
            (1, _) => Some(self.piece),
            _ => Some(self.piece * self.span),
        }
    }
}

impl Tiling {
    /// Every way, the one for those who do not know better first.
    pub(super) fn all(op: &TernaryProduct, s: &Shape) -> Vec<Tiling> {
        let x = Extents::of(op, s);
        let mut found: Vec<Tiling> = vec![];
        let mut add = |t: Tiling| {
            if !found.contains(&t) {
                found.push(t);
            }
        };
        let columns: Vec<usize> = match s.unit() {
            Some(unit) => COLUMNS.iter().map(|c| c.next_multiple_of(unit)).filter(|&c| c < s.np).chain([0]).collect(),
            None => vec![0],
        };
        let panels = |add: &mut dyn FnMut(Tiling)| {
            if x.usual < 2 {
                return;
            }
            for tile in (2..=PANEL_TILE.min(x.usual)).rev() {
                // Small tiles are for few rows; with many they are there to be compared.
                let thorough = tile == PANEL_TILE.min(x.usual) || x.usual < UNPACK_TO;
                for most in PANEL_ROWS {
                    for &columns in &columns {
                        for instances in INSTANCES {
                            let rows = x.even(most, tile);
                            let blocks = x.blocks(rows, instances);
                            let first = most == PANEL_ROWS[0] && instances == INSTANCES[0];
                            if thorough || first {
                                add(Tiling { panel: true, tile, rows, blocks, columns, ahead: 0 });
                            }
                        }
                    }
                }
            }
        };
        let registers = |add: &mut dyn FnMut(Tiling)| {
            if x.usual > UNPACK_TO {
                return;
            }
            for tile in (1..=UNPACK_TILE.min(x.usual.max(1))).rev() {
                let rows = x.even(UNPACK_ROWS, tile);
                for ahead in AHEAD.into_iter().filter(|&a| a == 0 || rows == tile) {
                    for instances in INSTANCES {
                        let blocks = x.blocks(rows, instances);
                        add(Tiling { panel: false, tile, rows, blocks, columns: 0, ahead });
                    }
                }
            }
        };
        if x.usual < PANEL_FROM {
            registers(&mut add);
            panels(&mut add);
        } else {
            panels(&mut add);
            registers(&mut add);
        }
        found
    }

    pub(super) fn variant(&self) -> Variant {
        Variant::new(&[
            ("panel", usize::from(self.panel)),
            ("tile", self.tile),
            ("rows", self.rows),
            ("blocks", self.blocks),
            ("columns", self.columns),
            ("ahead", self.ahead),
        ])
    }

    /// The tiling of one of the variants that [`Tiling::all`] gives.
    pub(super) fn of(variant: &Variant) -> Tiling {
        let get = |name: &str| {
            let x = variant.get(name).and_then(|x| usize::try_from(x).ok());
            x.unwrap_or_else(|| panic!("variant `{variant}` of a ternary product has no {name}"))
        };
        Tiling {
            panel: get("panel") > 0,
            tile: get("tile"),
            rows: get("rows"),
            blocks: get("blocks"),
            columns: get("columns"),
            ahead: get("ahead"),
        }
    }

    /// Columns of one panel.
    pub(super) fn width(&self, s: &Shape) -> usize {
        if self.columns == 0 { s.np } else { self.columns }
    }

    /// What it has to do.
    pub(super) fn work(&self, op: &TernaryProduct, s: &Shape) -> Work {
        let x = Extents::of(op, s);
        let n = op.n_weights;
        let parts = x.leads * x.rows.div_ceil(self.rows);
        let instances = parts * x.blocks.div_ceil(self.blocks);
        // Rows of the last tile that are not there are not worked on.
        let tiles = if op.grouped_rows {
            s.groups.max(1) * x.usual.div_ceil(self.tile)
        } else {
            x.leads * x.rows.div_ceil(self.tile)
        };
        let weights = x.blocks * BLOCK_ROWS * n;
        let words = s.np / 4 * x.blocks * n;
        // Groups of rows within an instance each unpack for themselves.
        let unpacks = if self.panel { parts.max(s.groups) } else { tiles };
        // Panels are gone through in two halves, each by vectors of activations and two of codes.
        let loads = if self.panel { (2 * s.rows + 4 * tiles) * words } else { (s.rows + tiles) * words };
        let stretches = s.np.div_ceil(self.width(s));
        let pass = match self.panel {
            true => Pass {
                bytes: (self.width(s) * (BLOCK_ROWS / 2 + self.tile)) as u64,
                times: (2 * n * x.blocks * stretches * tiles) as u64,
            },
            false => Pass { bytes: (s.np / 4 * BLOCK_ROWS) as u64, times: (n * x.blocks * tiles) as u64 },
        };
        Work {
            macs: (s.rows * s.np * weights) as u64,
            flops: 0,
            unpacked: (unpacks * weights * s.np) as u64,
            loads: loads as u64,
            combined: (s.rows * s.pieces() * weights) as u64,
            summed: (instances * self.rows * s.np / 32) as u64,
            passes: vec![pass],
            outside: (weights / 4 * s.np * s.leads) as u64,
            ahead: self.ahead > 0,
            instances: instances as u64,
        }
    }
}
