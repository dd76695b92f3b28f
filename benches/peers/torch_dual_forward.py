"""The dual forward in PyTorch: the loss of a batch under both signs of one direction, ternary matrices as dense floats.

The model is that of the executable specification, `chimera_ref`, which has to be on PYTHONPATH. One run perturbs all weights, makes the
dense matrices and takes the two losses; the update is left out, as in our row.
"""

import peer

# Hidden size, layers, heads, head size, feed-forward width, experts, width of an expert; sequences of a batch.
SCALES = {
    "nano": ((128, 8, 4, 32, 384, 4, 128), 8),
    "tiny": ((256, 28, 4, 64, 768, 4, 256), 2),
    "small": ((512, 28, 8, 64, 1408, 8, 384), 1),
}
TOKENS, VOCAB, SIZE = 128, 8192, 0.2


def config(ref, name, sizes):
    d, layers, heads, head, width, experts, expert = sizes
    cfg = ref.scaled_config(
        name, vocab_size=VOCAB, hidden_size=d, num_hidden_layers=layers, num_heads=heads, head_dim=head, intermediate_size=width
    )
    cfg["backbone"]["moe"].update(n_routed_experts=experts, moe_intermediate_size=expert)
    cfg["quantization"]["activation_method"] = "none"
    cfg["tsp_knot"]["enabled"] = False
    for kind in ("gated_deltanet", "xlstm"):
        cfg[kind]["chunk_size"] = min(64, TOKENS)
    return cfg


def dense(torch, ref, w):
    """The values of a ternary matrix in floats."""
    m, n = w.shape
    if n % 128:
        alpha = ref.weight_scales(w)
        return ref.ternarise(w, alpha) * ref.expand_groups(alpha, n)
    groups = w.view(m, n // 128, 128)
    alpha = groups.abs().mean(-1, keepdim=True).clamp_min(1e-5)
    return (torch.sign(groups) * (groups.abs() > 0.5 * alpha) * alpha).view(m, n)


def dual_forward(torch, ref, cfg, rows):
    """A function that takes both losses once."""
    functional = torch.nn.functional
    net = ref.Chimera(cfg, ref.init_params(cfg, 0))
    kinds = {name: kind for name, (_, kind) in ref.parameter_shapes(cfg).items()}
    trained = [name for name in net.params if kinds[name] != "buf"]

    class Weights(ref.Weights):
        def __init__(self, params):
            super().__init__(params, cfg)
            self.dense = {n: dense(torch, ref, params[n]) for n in trained if kinds[n] == "bit"}

        def bit(self, name, x, rows=None, norm=False):
            if norm:
                x = functional.rms_norm(x, (x.shape[-1],), eps=1e-6)
            return functional.linear(x, self.dense[name + ".weight"])

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (rows, TOKENS + 1), generator=generator)
    tokens, labels = ids[:, :-1], ids[:, 1:]
    scale = {n: max(net.params[n].abs().mean().item(), 1e-3) for n in trained}

    def run():
        losses = []
        z = {n: torch.empty_like(net.params[n]).bernoulli_(0.5, generator=generator).mul_(2).sub_(1) for n in trained}
        for sign in (1, -1):
            probed = {n: torch.add(net.params[n], z[n], alpha=sign * (0.01 if kinds[n] == "vec" else SIZE * scale[n])) for n in trained}
            weights = Weights({**net.params, **probed})
            hidden, _ = net.forward(tokens, weights=weights)
            logits = functional.linear(hidden, weights.params["embed.weight"])
            losses.append(functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item())
        assert all(0.0 < loss < 100.0 for loss in losses), f"losses of {losses}"

    return run


def main():
    args = peer.options(__doc__)
    found = peer.need("torch", "chimera_ref")
    if found is None:
        return
    torch, ref = found
    torch.set_num_threads(args.threads)
    for name, (sizes, rows) in SCALES.items():
        if args.quick and name == "small":
            continue
        with torch.no_grad():
            time = peer.seconds(dual_forward(torch, ref, config(ref, name, sizes), rows), args.quick)
        peer.figure(f"torch.dual_forward.{name}", rows * TOKENS / time, "data token/s", f"dual_forward.{name}")


if __name__ == "__main__":
    main()
