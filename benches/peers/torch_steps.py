"""A step of AdamW in PyTorch, eager and compiled, whichever is faster: straight-through ternary matrices as dense floats, float activations.

One run makes the dense matrices, takes the loss and its gradient, limits the norm and updates all weights, as our row does.
"""

import sys

import peer
import torch_model as model


def step(torch, ref, cfg, rows, compiled):
    """A function that trains one step."""
    train, _, _ = model.adamw(torch, ref, cfg, 1e-4, torch.compile(model.loss) if compiled else model.loss)
    tokens, labels = model.data(torch, rows)

    def run():
        loss = train(tokens, labels)
        assert 0.0 < loss < 100.0, f"a loss of {loss}"

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
