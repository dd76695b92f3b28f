"""What the peer scripts share: their options, and lines of JSON for `chimera-benches`."""

import argparse
import importlib
import json
import time


def options(about):
    """--threads and --quick, as `chimera-benches` gives them."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def need(*modules):
    """The modules, or None with a line that says which one is absent."""
    found = []
    for name in modules:
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            print(json.dumps({"missing": f"{name} is not installed for this Python, no rows"}), flush=True)
            return None
    return found


def figure(name, value, unit, beside):
    """One row; `beside` is the row of ours that it is compared with."""
    print(json.dumps({"id": name, "value": value, "unit": unit, "beside": beside}), flush=True)


def seconds(run, quick, least=0.03):
    """The median time of one run over several bursts, after one run that does not count."""
    run()
    times = []
    for _ in range(3 if quick else 9):
        runs, start = 0, time.perf_counter()
        while runs == 0 or time.perf_counter() - start < least:
            run()
            runs += 1
        times.append((time.perf_counter() - start) / runs)
    return sorted(times)[len(times) // 2]
