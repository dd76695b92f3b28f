"""Float products of PyTorch beside the ternary products of the same extents."""

import peer

ROWS = 252
WIDTHS = [256, 512, 1024, 2560, 6912]


def main():
    args = peer.options(__doc__)
    found = peer.need("torch")
    if found is None:
        return
    torch = found[0]
    torch.set_num_threads(args.threads)
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(1)
        a = torch.randn(ROWS, width, generator=generator)
        w = torch.randn(width, width, generator=generator)
        got = torch.nn.functional.linear(a[:4], w)
        assert torch.allclose(got.double(), a[:4].double() @ w.double().T, atol=1e-5 * width), "a wrong answer"
        with torch.inference_mode():
            time = peer.seconds(lambda: torch.nn.functional.linear(a, w), args.quick)
        shape = f"{ROWS}x{width}x{width}"
        peer.figure(f"torch.gemm.{shape}", ROWS * width * width / time * 1e-9, "GMAC/s", f"gemm.{shape}")


if __name__ == "__main__":
    main()
