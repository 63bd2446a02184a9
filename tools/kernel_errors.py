"""Compute `moesim/kernels/errors.json`: how wrong each source of a kernel's time is, from the shipped profiles.

python tools/kernel_errors.py               # compares with the shipped table; exit code 1 where a row differs
python tools/kernel_errors.py --write       # after a change of profiles or of the models of kernels; takes minutes
"""

import argparse
import sys
from collections.abc import Iterator

from moesim.files import write_atomically
from moesim.kernels.error_table import all_errors
from moesim.kernels.errors import TABLE, known_errors
from moesim.strict_json import json_text


def main() -> int:
    """Compare or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    found = []
    for row in all_errors():
        print(f"{row.basis:13s} {row.source:13s} {row.family:23s} {row.count:6d} {row.median:+.3f} "
              f"{row.p50:.3f} {row.p90:.3f} {row.apart:.3f}", file=sys.stderr, flush=True)  # fmt: skip
        found.append(row)
    if arguments.write:
        rows = ",\n".join(json_text(row.as_json()) for row in found)
        write_atomically(TABLE, f'{{"errors": [\n{rows}\n]}}\n'.encode())
        return 0
    lines = list(_differences({tuple(row.as_json().values()) for row in found}))
    print("\n".join(lines))
    return int(bool(lines))


def _differences(found: set[tuple[object, ...]]) -> Iterator[str]:
    shipped = {tuple(row.as_json().values()) for row in known_errors()}
    for sign, rows in (("-", shipped - found), ("+", found - shipped)):
        for row in sorted(rows, key=str):
            yield f"{sign} {row}"


if __name__ == "__main__":
    raise SystemExit(main())
