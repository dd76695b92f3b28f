"""A step of AdamW in PyTorch, eager and compiled, whichever is faster: straight-through ternary matrices as dense floats, float activations.

One run makes the dense matrices, takes the loss and its gradient, limits the norm and updates all weights, as our row does.
"""

import sys

import peer
import torch_model as model


def step(torch, ref, cfg, rows, compiled):
    """A function that trains one step."""
    net = ref.Chimera(cfg, ref.init_params(cfg, 0))
    names, kinds = model.trained(ref, cfg, net)
    weights_of = model.weights_of(torch, ref, cfg)
    tokens, labels = model.data(torch, rows)
    for n in names:
        net.params[n].requires_grad_()
    matrices = [n for n in names if kinds[n] == "bit"]
    groups = [
        {"params": [net.params[n] for n in matrices], "weight_decay": 0.1},
        {"params": [net.params[n] for n in names if kinds[n] != "bit"], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    loss_of = torch.compile(model.loss) if compiled else model.loss

    def run():
        with torch.no_grad():
            hats = {n: model.dense(torch, ref, net.params[n]) for n in matrices}
        # Gradients pass as if the matrix were the latent.
        through = {n: net.params[n] + (hat - net.params[n]).detach() for n, hat in hats.items()}
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of(torch, net, weights_of(net.params, through), tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([net.params[n] for n in names], 1.0)
        optimiser.step()
        assert 0.0 < loss.item() < 100.0, f"a loss of {loss.item()}"

    return run


def main():
    args = peer.options(__doc__)
    found = peer.need("torch", "chimera_ref")
    if found is None:
        return
    torch, ref = found
    torch.set_num_threads(args.threads)
    for name in ("nano",) if args.quick else ("nano", "tiny"):
        sizes, rows = model.SCALES[name]
        cfg, times = model.config(ref, name, sizes), []
        for compiled in (False,) if args.quick else (False, True):
            try:
                times.append(peer.seconds(step(torch, ref, cfg, rows, compiled), args.quick))
            except Exception as error:  # What the compiler of PyTorch raises has no common type.
                if not compiled:
                    raise
                print(f"torch.compile does not serve {name}: {error}", file=sys.stderr)
        peer.figure(f"torch.train.adamw.{name}", rows * model.TOKENS / min(times), "data token/s", f"train.adamw.{name}")


if __name__ == "__main__":
    main()
