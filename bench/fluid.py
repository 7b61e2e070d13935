"""Measure in simulation how near to the fluid limit many workers at home come, while they come and go.

    python -m bench.fluid [--workers 120 1000] [--seeds 1 2] [--chunks 300] [--no-churn] [--json]

The world, and what the limit is, is in `tests/sim/swarm_homes.py`; every node runs the product's own `Swarm`,
`Turns` and `Slots`.  1,000 workers take some minutes of one CPU and 2 GB, 10,000 ten times that.
The lines go to stderr, with `--json` to stdout as JSON, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import attrs

from tests.sim.swarm_homes import CHUNKS, Homes


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--workers", type=int, nargs="+", default=[120, 1000])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1])
    arguments.add_argument("--chunks", type=int, default=CHUNKS)
    arguments.add_argument("--no-churn", action="store_true")
    arguments.add_argument("--progress", action="store_true", help="a line every 5 simulated seconds")
    arguments.add_argument("--json", action="store_true")
    given = arguments.parse_args()
    for workers in given.workers:
        for seed in given.seeds:
            started = time.process_time()
            world = Homes(seed, workers, chunks=given.chunks, churn=not given.no_churn)
            times = world.play(progress=tell if given.progress else lambda line: None)
            cpu = time.process_time() - started
            print(f"seed {seed}: {times}; {cpu:.0f} CPU s", file=sys.stderr, flush=True)
            if given.json:
                row = {"bench": "fluid", "seed": seed, **attrs.asdict(times)}
                row |= {"efficiency": times.efficiency, "cpu": cpu}
                print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}))


def tell(line: str) -> None:
    print(f"  {line}; {time.process_time():.0f} CPU s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
