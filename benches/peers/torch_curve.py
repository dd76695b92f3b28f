"""The loss on held-out bytes that AdamW in PyTorch reaches in some seconds, with a warm-up and half a cosine over them.

Tokens are numbers of 16 bits in two files: to train on, and to measure on. Lines are {"seconds", "bits_per_byte"}; measuring takes no time.
"""

import argparse
import json
import math
import time

import peer
import torch_model as model

BYTES, PEAK, POINTS, MEASURED = 257, 1e-3, 12, 64


def options():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--held", required=True)
    return parser.parse_args()


def main():
    args = options()
    found = peer.need("torch", "chimera_ref", "numpy")
    if found is None:
        return
    torch, ref, numpy = found
    torch.set_num_threads(args.threads)
    sizes, rows = model.SCALES["nano"]
    cfg = model.config(ref, "nano", sizes)
    cfg["vocab_size"] = BYTES
    train_step, measure, optimiser = model.adamw(torch, ref, cfg, PEAK)
    read = lambda path: torch.from_numpy(numpy.fromfile(path, dtype="<u2").astype("int64"))
    train, held = read(args.train), read(args.held)
    generator = torch.Generator().manual_seed(2)
    width = model.TOKENS + 1
    cut = lambda ids, starts: torch.stack([ids[s : s + width] for s in starts])
    apart = max(1, (len(held) - width) // MEASURED)
    measured = cut(held, range(0, len(held) - width, apart)[:MEASURED])

    def bits():
        parts = [measure(part[:, :-1], part[:, 1:]) for part in measured.split(rows)]
        return sum(parts) / len(parts) / math.log(2)

    spent, shown = 0.0, 0
    while spent < args.seconds:
        at = spent / args.seconds
        rate = PEAK * min(1.0, at / 0.02) if at < 0.02 else PEAK * (0.1 + 0.45 * (1 + math.cos(math.pi * at)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        ids = cut(train, torch.randint(0, len(train) - width, (rows,), generator=generator).tolist())
        start = time.perf_counter()
        train_step(ids[:, :-1], ids[:, 1:])
        spent += time.perf_counter() - start
        while spent >= args.seconds * (shown + 1) / POINTS:
            shown += 1
            print(json.dumps({"seconds": round(spent, 2), "bits_per_byte": bits()}), flush=True)


if __name__ == "__main__":
    main()
