"""What the PyTorch peers of whole models share: sizes, the configuration, and ternary matrices as dense floats.

The model is that of the executable specification, `chimera_ref`, which has to be on PYTHONPATH.
"""

# Hidden size, layers, heads, head size, feed-forward width, experts, width of an expert; sequences of a batch.
SCALES = {
    "nano": ((128, 8, 4, 32, 384, 4, 128), 8),
    "tiny": ((256, 28, 4, 64, 768, 4, 256), 2),
    "small": ((512, 28, 8, 64, 1408, 8, 384), 1),
}
TOKENS, VOCAB = 128, 8192


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


def weights_of(torch, ref, cfg):
    """Weights whose ternary matrices are given as dense floats, `weights_of(..)(params, matrices)`."""
    functional = torch.nn.functional

    class Weights(ref.Weights):
        def __init__(self, params, matrices):
            super().__init__(params, cfg)
            self.dense = matrices

        def bit(self, name, x, rows=None, norm=False):
            if norm:
                x = functional.rms_norm(x, (x.shape[-1],), eps=1e-6)
            return functional.linear(x, self.dense[name + ".weight"])

    return Weights


def loss(torch, net, weights, tokens, labels):
    """The mean loss of a batch."""
    hidden, _ = net.forward(tokens, weights=weights)
    logits = torch.nn.functional.linear(hidden, weights.params["embed.weight"])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def data(torch, rows):
    """Tokens and labels of a batch."""
    ids = torch.randint(0, VOCAB, (rows, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def trained(ref, cfg, net):
    """Names of the parameters that are trained, and the kinds of all."""
    kinds = {name: kind for name, (_, kind) in ref.parameter_shapes(cfg).items()}
    return [name for name in net.params if kinds[name] != "buf"], kinds


def adamw(torch, ref, cfg, rate, loss_of=loss):
    """The model with AdamW and straight-through ternary matrices: `step(tokens, labels)` trains one step and returns the loss,
    `measure(tokens, labels)` gives the loss alone, and the optimiser has the learning rate."""
    net = ref.Chimera(cfg, ref.init_params(cfg, 0))
    names, kinds = trained(ref, cfg, net)
    weights = weights_of(torch, ref, cfg)
    matrices = [n for n in names if kinds[n] == "bit"]
    for n in names:
        net.params[n].requires_grad_()
    groups = [
        {"params": [net.params[n] for n in matrices], "weight_decay": 0.1},
        {"params": [net.params[n] for n in names if kinds[n] != "bit"], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)

    def hats():
        with torch.no_grad():
            return {n: dense(torch, ref, net.params[n]) for n in matrices}

    def step(tokens, labels):
        # Gradients pass as if the matrix were the latent.
        through = {n: net.params[n] + (hat - net.params[n]).detach() for n, hat in hats().items()}
        optimiser.zero_grad(set_to_none=True)
        found = loss_of(torch, net, weights(net.params, through), tokens, labels)
        found.backward()
        torch.nn.utils.clip_grad_norm_([net.params[n] for n in names], 1.0)
        optimiser.step()
        return found.item()

    def measure(tokens, labels):
        with torch.no_grad():
            return loss(torch, net, weights(net.params, hats()), tokens, labels).item()

    return step, measure, optimiser
