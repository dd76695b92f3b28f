//! From clusters to a plan: kernels, buffers, steps.

use std::collections::{BTreeMap, HashMap};

use chimera_ir::{
    Graph, Tensor, Type, Value,
    graph::{Kind, Node, Repeat},
    lower::Argument,
    plan::{
        BufferDecl, BufferId, Decision, Entry, Group, KernelId, Lifetime, Place, Plan, StateDecl, Step, WeightDecl,
        WeightKind,
    },
};

use crate::{
    fuse::{Decisions, Item, Run},
    memory::{self, ALIGN, Request},
    passes::hoist::DERIVED,
    tuning::Tuning,
};

/// Below this many operations plus bytes a kernel runs on the calling thread: starting the others costs more.
const SPLIT_WORK: u64 = 20_000;

/// A plan under construction.
#[derive(Clone, Debug)]
pub(crate) struct Assembler<'a> {
    plan: Plan,
    kinds: &'a HashMap<String, WeightKind>,
    tuning: Tuning,
    /// Kernels by their clusters, and by what they are.
    clusters: HashMap<String, KernelId>,
    kernels: HashMap<String, KernelId>,
    weights: HashMap<String, BufferId>,
    states: HashMap<String, BufferId>,
    inputs: HashMap<(String, Type), BufferId>,
    decisions: BTreeMap<(String, String, String), u32>,
}

impl<'a> Assembler<'a> {
    pub(crate) fn new(plan: Plan, kinds: &'a HashMap<String, WeightKind>, tuning: Tuning) -> Assembler<'a> {
        Assembler {
            plan,
            kinds,
            tuning,
            clusters: HashMap::new(),
            kernels: HashMap::new(),
            weights: HashMap::new(),
            states: HashMap::new(),
            inputs: HashMap::new(),
            decisions: BTreeMap::new(),
        }
    }

    pub(crate) fn finish(mut self) -> Plan {
        let verdicts = self.decisions.into_iter();
        let decision = |((entry, edge, verdict), count)| Decision { entry, edge, verdict, count };
        self.plan.decisions = verdicts.map(decision).collect();
        self.plan
    }

    fn buffer(&mut self, ty: Type, place: Place, name: &str) -> BufferId {
        self.plan.buffers.push(BufferDecl { ty, place, name: name.to_owned() });
        BufferId(self.plan.buffers.len() as u32 - 1)
    }

    fn persistent(&mut self, ty: Type, name: &str) -> BufferId {
        let at = self.plan.persistent;
        self.plan.persistent = (at + ty.bytes() as u64).next_multiple_of(ALIGN);
        self.buffer(ty, Place::Persistent(at), name)
    }

    fn weight(&mut self, name: &str, ty: &Type) -> BufferId {
        if let Some(&id) = self.weights.get(name) {
            return id;
        }
        let id = if name.starts_with(DERIVED) {
            self.persistent(ty.clone(), name)
        } else {
            let kind = self.kinds.get(name).copied().unwrap_or(WeightKind::Optimizer);
            self.plan.weights.push(WeightDecl { name: name.to_owned(), ty: ty.clone(), kind });
            let place = Place::Weight(self.plan.weights.len() as u32 - 1);
            self.buffer(ty.clone(), place, name)
        };
        self.weights.insert(name.to_owned(), id);
        id
    }

    fn state(&mut self, name: &str, ty: &Type, copies: u32) -> BufferId {
        if let Some(&id) = self.states.get(name) {
            return id;
        }
        self.plan.states.push(StateDecl { name: name.to_owned(), ty: ty.clone(), copies });
        let place = Place::State(self.plan.states.len() as u32 - 1);
        let id = self.buffer(ty.clone(), place, name);
        self.states.insert(name.to_owned(), id);
        id
    }

    /// The state of that name, or else the weight.
    fn memory(&mut self, name: &str, ty: &Type) -> BufferId {
        let state = self.states.get(name).copied();
        state.unwrap_or_else(|| self.weight(name, ty))
    }

    fn input(&mut self, name: &str, ty: &Type) -> BufferId {
        let key = (name.to_owned(), ty.clone());
        if let Some(&id) = self.inputs.get(&key) {
            return id;
        }
        let id = self.persistent(ty.clone(), name);
        self.inputs.insert(key, id);
        id
    }

    /// The kernel of a cluster; clusters that lower to the same kernel share it.
    fn kernel(&mut self, run: &Run) -> KernelId {
        let cluster = format!("{:?}", run.cluster);
        if let Some(&id) = self.clusters.get(&cluster) {
            return id;
        }
        let anchor = &run.cluster.nodes[run.cluster.anchor].op;
        let (variant, _) = self.tuning.choose(anchor, &run.cluster.anchor_types());
        let mut kernel = run.cluster.with_variant(&variant).lower();
        let plan = &mut self.plan;
        let id = *self.kernels.entry(format!("{kernel:?}")).or_insert_with(|| {
            let id = KernelId(plan.kernels.len() as u32);
            kernel.name = format!("{}#{}", kernel.name, id.0);
            plan.kernels.push(kernel);
            id
        });
        self.clusters.insert(cluster, id);
        id
    }

    /// Add an entry point.
    pub(crate) fn entry(&mut self, name: &str, g: &Graph, items: &[Item], decisions: Decisions, shared: (u64, u64)) {
        for ((edge, verdict), n) in decisions {
            *self.decisions.entry((name.to_owned(), edge, verdict)).or_default() += n;
        }
        let mut e = EntryBuilder {
            cx: self,
            slots: vec![],
            steps: vec![],
            groups: vec![],
            times: 1,
            inputs: vec![],
            in_prepare: name == "prepare",
        };
        let mut scope = Scope { values: HashMap::new(), in_place: in_place_writes(g, items), copies: 1 };
        e.sources(g, &mut scope);
        e.items(g, items, &mut scope);
        e.writes(g, &scope);
        // Results outlive the last step.
        let end = (e.steps.len() as u32).saturating_sub(1);
        let outputs: Vec<(String, usize)> = g.outputs.iter().map(|(n, v)| (n.clone(), scope.values[v])).collect();
        outputs.iter().for_each(|&(_, s)| e.touch(s, end));
        let EntryBuilder { slots, steps, groups, inputs, .. } = e;
        self.close(name, slots, steps, groups, inputs, outputs, shared);
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one entry, taken apart only here")]
    fn close(
        &mut self,
        name: &str,
        slots: Vec<Slot>,
        steps: Vec<Step>,
        groups: Vec<Group>,
        inputs: Vec<(String, BufferId)>,
        outputs: Vec<(String, usize)>,
        shared: (u64, u64),
    ) {
        let roots: Vec<usize> = (0..slots.len()).filter(|&i| slots[i].root == i && slots[i].fixed.is_none()).collect();
        let requests: Vec<Request> = roots
            .iter()
            .map(|&i| Request { bytes: slots[i].ty.bytes() as u64, first: slots[i].first, last: slots[i].last })
            .collect();
        let (offsets, arena, arena_bound) = memory::plan(&requests);
        let mut ids: Vec<BufferId> = Vec::with_capacity(slots.len());
        let mut lifetimes = vec![];
        for (i, slot) in slots.iter().enumerate() {
            let id = match (slot.root == i, slot.fixed) {
                (true, Some(id)) => id,
                (true, None) => {
                    let at = roots.binary_search(&i).expect("an arena root");
                    let id = self.buffer(slot.ty.clone(), Place::Arena(offsets[at]), &slot.name);
                    lifetimes.push(Lifetime { buffer: id, first: slot.first, last: slot.last });
                    id
                }
                (false, _) => {
                    let root = self.plan.buffer(ids[slot.root]).clone();
                    if root.ty == slot.ty {
                        ids[slot.root]
                    } else {
                        self.buffer(slot.ty.clone(), root.place, &slot.name)
                    }
                }
            };
            ids.push(id);
        }
        let real = |b: BufferId| ids[b.0 as usize];
        let steps = steps
            .into_iter()
            .map(|s| match s {
                Step::Run { kernel, args, split, group } => {
                    Step::Run { kernel, args: args.into_iter().map(real).collect(), split, group }
                }
                Step::Copy { from, to } => Step::Copy { from: real(from), to: real(to) },
                Step::LoopBegin { max, counter } => Step::LoopBegin { max, counter: real(counter) },
                Step::LoopEnd { again } => Step::LoopEnd { again: real(again) },
            })
            .collect();
        let outputs = outputs.into_iter().map(|(n, s)| (n, ids[s])).collect();
        let name = name.to_owned();
        self.plan.entries.push(Entry { name, inputs, outputs, steps, groups, lifetimes, arena, arena_bound, shared });
    }
}

/// The weights and states that a kernel may overwrite where it computes the new value, by that value: nobody reads the old one away
/// from there or later.
fn in_place_writes(g: &Graph, items: &[Item]) -> HashMap<Value, String> {
    let mut found = HashMap::new();
    for (name, v) in &g.writes {
        let Some(old) = g.find_memory(name) else { continue };
        let writer = items.iter().position(|i| matches!(i, Item::Run(r) if r.outs.contains(v)));
        let Some(at) = writer else { continue };
        let Item::Run(run) = &items[at] else { continue };
        let there = match run.ins.iter().position(|&i| i == old) {
            Some(i) => run.is_elementwise_in(i) || run.updates().contains(&(i, Some(*v))),
            None => true,
        };
        let alias = |i: &Item| matches!(i, Item::Alias { from, .. } if *from == old);
        let kept = g.outputs.iter().chain(&g.writes).any(|(_, x)| *x == old);
        let later = items[at + 1..].iter().any(|i| i.reads(g, old)) || items.iter().any(alias) || kept;
        if g.ty(old) == g.ty(*v) && there && !later {
            found.insert(*v, name.clone());
        }
    }
    found
}

#[derive(Debug)]
struct Slot {
    ty: Type,
    name: String,
    root: usize,
    fixed: Option<BufferId>,
    first: u32,
    last: u32,
}

struct Scope {
    values: HashMap<Value, usize>,
    in_place: HashMap<Value, String>,
    copies: u32,
}

struct EntryBuilder<'a, 'b> {
    cx: &'a mut Assembler<'b>,
    slots: Vec<Slot>,
    steps: Vec<Step>,
    groups: Vec<Group>,
    times: u64,
    inputs: Vec<(String, BufferId)>,
    in_prepare: bool,
}

impl EntryBuilder<'_, '_> {
    fn slot(&mut self, ty: Type, name: String, fixed: Option<BufferId>) -> usize {
        let at = self.steps.len() as u32;
        self.slots.push(Slot { ty, name, root: self.slots.len(), fixed, first: at, last: at });
        self.slots.len() - 1
    }

    fn alias(&mut self, of: usize, ty: Type) -> usize {
        let (root, name) = (self.slots[of].root, self.slots[of].name.clone());
        self.slots.push(Slot { ty, name, root, fixed: None, first: 0, last: 0 });
        self.slots.len() - 1
    }

    fn touch(&mut self, slot: usize, step: u32) {
        let root = self.slots[slot].root;
        let s = &mut self.slots[root];
        s.first = s.first.min(step);
        s.last = s.last.max(step);
    }

    fn push(&mut self, step: Step) {
        let at = self.steps.len() as u32;
        let used: Vec<BufferId> = match &step {
            Step::Run { args, .. } => args.clone(),
            Step::Copy { from, to } => vec![*from, *to],
            Step::LoopBegin { counter, .. } => vec![*counter],
            Step::LoopEnd { again } => vec![*again],
        };
        used.iter().for_each(|b| self.touch(b.0 as usize, at));
        self.steps.push(step);
    }

    fn copy(&mut self, from: usize, to: usize) {
        self.push(Step::Copy { from: BufferId(from as u32), to: BufferId(to as u32) });
    }

    /// Slots of everything that is there before the first step.
    fn sources(&mut self, g: &Graph, scope: &mut Scope) {
        for node in g.nodes() {
            let v = node.outs[0];
            let ty = g.ty(v).clone();
            if scope.values.contains_key(&v) {
                continue;
            }
            let (fixed, name) = match &node.kind {
                Kind::Input(name) => {
                    let id = self.cx.input(name, &ty);
                    self.inputs.push((name.clone(), id));
                    (id, name.clone())
                }
                Kind::Param(name) => (self.cx.weight(name, &ty), name.clone()),
                Kind::State(name) => (self.cx.state(name, &ty, scope.copies), name.clone()),
                Kind::Const(t) => (self.constant(t), "const".to_owned()),
                _ => continue,
            };
            let slot = self.slot(ty, name, Some(fixed));
            scope.values.insert(v, slot);
        }
    }

    fn constant(&mut self, t: &Tensor) -> BufferId {
        let known = self.cx.plan.constants.iter().find(|(_, c)| c == t).map(|(id, _)| *id);
        known.unwrap_or_else(|| {
            let id = self.cx.persistent(t.ty.clone(), "const");
            self.cx.plan.constants.push((id, t.clone()));
            id
        })
    }

    fn items(&mut self, g: &Graph, items: &[Item], scope: &mut Scope) {
        let wanted: HashMap<Value, String> = match self.in_prepare {
            true => g.outputs.iter().map(|(n, v)| (*v, n.clone())).collect(),
            false => HashMap::new(),
        };
        for item in items {
            match item {
                Item::Run(run) => self.run(g, run, scope, &wanted),
                Item::Alias { to, from } => {
                    let slot = self.alias(scope.values[from], g.ty(*to).clone());
                    scope.values.insert(*to, slot);
                }
                Item::Loop { node, items } => {
                    let node = g.node(*node);
                    let Kind::Repeat(r) = &node.kind else { unreachable!("loops come from repeat nodes") };
                    self.repeat(g, node, r, items, scope);
                }
            }
        }
    }

    fn run(&mut self, g: &Graph, run: &Run, scope: &mut Scope, wanted: &HashMap<Value, String>) {
        let kernel = self.cx.kernel(run);
        let mut ins: Vec<usize> = run.ins.iter().map(|v| scope.values[v]).collect();
        let mut updated: HashMap<Value, usize> = HashMap::new();
        for (i, o) in run.updates() {
            let v = run.ins[i];
            // Anything but the memory that receives the result is not this kernel's to overwrite.
            let receives = o.and_then(|o| scope.in_place.get(&o)).and_then(|name| g.find_memory(name));
            if receives != Some(v) {
                let fresh = self.slot(g.ty(v).clone(), format!("copy of {}", self.slots[ins[i]].name), None);
                self.copy(ins[i], fresh);
                ins[i] = fresh;
            }
            updated.extend(o.map(|o| (o, ins[i])));
        }
        let mut outs = vec![];
        for &v in &run.outs {
            let ty = g.ty(v).clone();
            let slot = if let Some(&s) = updated.get(&v) {
                self.alias(s, ty)
            } else if let Some(name) = wanted.get(&v) {
                let id = self.cx.weight(name, &ty);
                self.slot(ty, name.clone(), Some(id))
            } else if let Some(name) = scope.in_place.get(&v).cloned() {
                let id = self.cx.memory(&name, &ty);
                self.slot(ty, name, Some(id))
            } else {
                self.slot(ty, run.site.clone(), None)
            };
            outs.push(slot);
            scope.values.insert(v, slot);
        }
        let args = run.cluster.arguments();
        let args: Vec<BufferId> = args
            .into_iter()
            .map(|a| match a {
                Argument::Input(i) => BufferId(ins[i] as u32),
                Argument::Output(o) => BufferId(outs[o] as u32),
            })
            .collect();
        let bytes: u64 = run.ins.iter().chain(&run.outs).map(|&v| g.ty(v).bytes() as u64).sum();
        let split =
            self.cx.plan.kernels[kernel.0 as usize].grid > 1 && run.flops.0 + run.flops.1 / 8 + bytes > SPLIT_WORK;
        let group = self.group(&run.site, run.flops, bytes);
        self.push(Step::Run { kernel, args, split, group });
    }

    fn group(&mut self, site: &str, flops: (u64, u64), bytes: u64) -> u32 {
        let parts: Vec<&str> = site.split('.').collect();
        let name = if parts[0] == "layers" && parts.len() > 1 { parts[..2].join(".") } else { parts[0].to_owned() };
        let found = self.groups.iter().position(|g| g.name == name);
        let at = found.unwrap_or_else(|| {
            self.groups.push(Group { name, ..Group::default() });
            self.groups.len() - 1
        });
        let g = &mut self.groups[at];
        g.flops += flops.0 * self.times;
        g.ternary += flops.1 * self.times;
        g.bytes += bytes * self.times;
        at as u32
    }

    fn repeat(&mut self, g: &Graph, node: &Node, r: &Repeat, items: &[Item], scope: &mut Scope) {
        let in_place = in_place_writes(&r.body, items);
        let mut inner = Scope { values: HashMap::new(), in_place, copies: r.max as u32 };
        let mut carried = vec![];
        for (i, &v) in node.ins.iter().enumerate() {
            let from = scope.values[&v];
            let slot = if i < r.n_carried {
                let slot = self.slot(g.ty(v).clone(), format!("carried {i}"), None);
                self.copy(from, slot);
                carried.push(slot);
                slot
            } else {
                from
            };
            inner.values.insert(r.args[i + 1], slot);
        }
        let counter = self.slot(Type::i32(&[1]), "iteration".to_owned(), None);
        inner.values.insert(r.args[0], counter);
        let n_before = self.slots.len();
        let begin = self.steps.len() as u32;
        self.push(Step::LoopBegin { max: r.max as u32, counter: BufferId(counter as u32) });
        self.sources(&r.body, &mut inner);
        let times = self.times;
        self.times = times * r.max as u64;
        self.items(&r.body, items, &mut inner);
        self.times = times;
        self.writes(&r.body, &inner);
        for (i, &to) in carried.iter().enumerate() {
            let from = inner.values[&r.body.outputs[i].1];
            if self.slots[from].root != self.slots[to].root {
                self.copy(from, to);
            }
        }
        let again = inner.values[&r.body.outputs[r.n_carried].1];
        self.push(Step::LoopEnd { again: BufferId(again as u32) });
        let end = self.steps.len() as u32 - 1;
        // What comes from outside must survive every iteration.
        for s in &mut self.slots[..n_before] {
            if s.last >= begin {
                s.last = s.last.max(end);
            }
        }
        for (&v, &slot) in node.outs.iter().zip(&carried) {
            scope.values.insert(v, slot);
        }
    }

    /// Bring new values to their states and weights, where kernels have not done so already.
    fn writes(&mut self, g: &Graph, scope: &Scope) {
        for (name, v) in &g.writes {
            let from = scope.values[v];
            let to = self.cx.memory(name, g.ty(*v));
            let root = self.slots[from].root;
            if self.slots[root].fixed == Some(to) {
                continue;
            }
            let slot = self.slot(g.ty(*v).clone(), name.clone(), Some(to));
            self.copy(from, slot);
        }
    }
}
