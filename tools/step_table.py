"""Step times and attribution of every shipped scenario, in full precision: what a change of form must not move.

python tools/step_table.py                  # compares with tests/data/steps.json; exit code 1 where a value differs
python tools/step_table.py --write          # after a change that means to move numbers; the commit says why
"""

import argparse
import sys
from pathlib import Path

from moesim import load_scenario, simulate
from moesim.strict_json import json_text, parse_json

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "data" / "steps.json"
KEPT = (
    "step_time_s",
    "balanced_step_time_s",
    "step_time_routing_range_s",
    "attribution_s",
    "attribution_balanced_s",
    "mfu",
)


def measured(name: str) -> dict[str, object]:
    record = simulate(load_scenario(ROOT / "scenarios" / f"{name}.yaml"))
    return {key: record.result[key] for key in KEPT} | {
        "communication": record.result["communication"],
        "peak_bytes": record.result["memory"]["peak_bytes"],
    }


def flat(value: object, path: str = "") -> dict[str, object]:
    """Paths to leaves."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}.{key}").items()}
    if isinstance(value, list):
        return {k: v for key, inner in enumerate(value) for k, v in flat(inner, f"{path}.{key}").items()}
    return {path: value}


def main() -> int:
    """Compare or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("names", nargs="*", help="scenarios; all of them by default")
    arguments = parser.parse_args()
    names = arguments.names or sorted(path.stem for path in (ROOT / "scenarios").glob("*.yaml"))
    before = parse_json(TABLE.read_bytes()) if TABLE.exists() else {}
    now, differing = {}, 0
    for name in names:
        now[name] = measured(name)
        old, new = flat(before.get(name, {})), flat(now[name])
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                differing += 1
                print(f"{name}{key}: {old.get(key)} -> {new.get(key)}")
        print(f"{name}: {now[name]['step_time_s']} s", file=sys.stderr, flush=True)
    if arguments.write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json_text({**before, **now}, indent=1) + "\n")
        return 0
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
