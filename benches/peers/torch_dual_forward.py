"""The dual forward in PyTorch: the loss of a batch under both signs of one direction, ternary matrices as dense floats.

One run perturbs all weights, makes the dense matrices and takes the two losses; the update is left out, as in our row.
"""

import peer
import torch_model as model

SIZE = 0.2


def dual_forward(torch, ref, cfg, rows):
    """A function that takes both losses once."""
    net = ref.Chimera(cfg, ref.init_params(cfg, 0))
    names, kinds = model.trained(ref, cfg, net)
    weights_of = model.weights_of(torch, ref, cfg)
    generator = torch.Generator().manual_seed(1)
    tokens, labels = model.data(torch, rows)
    scale = {n: max(net.params[n].abs().mean().item(), 1e-3) for n in names}

    def run():
        losses = []
        z = {n: torch.empty_like(net.params[n]).bernoulli_(0.5, generator=generator).mul_(2).sub_(1) for n in names}
        for sign in (1, -1):
            probed = {n: torch.add(net.params[n], z[n], alpha=sign * (0.01 if kinds[n] == "vec" else SIZE * scale[n])) for n in names}
            matrices = {n: model.dense(torch, ref, probed[n]) for n in names if kinds[n] == "bit"}
            weights = weights_of({**net.params, **probed}, matrices)
            losses.append(model.loss(torch, net, weights, tokens, labels).item())
        assert all(0.0 < loss < 100.0 for loss in losses), f"losses of {losses}"

    return run


def main():
    args = peer.options(__doc__)
    found = peer.need("torch", "chimera_ref")
    if found is None:
        return
    torch, ref = found
    torch.set_num_threads(args.threads)
    for name, (sizes, rows) in model.SCALES.items():
        if args.quick and name == "small":
            continue
        with torch.no_grad():
            time = peer.seconds(dual_forward(torch, ref, model.config(ref, name, sizes), rows), args.quick)
        peer.figure(f"torch.dual_forward.{name}", rows * model.TOKENS / time, "data token/s", f"dual_forward.{name}")


if __name__ == "__main__":
    main()
