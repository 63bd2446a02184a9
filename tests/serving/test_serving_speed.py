"""How long a deployment takes to simulate, in CPU time of its own process, and how much memory."""

import resource
import subprocess
import sys

import pytest

TOKENS = "workload.arrivals.{}={{kind: fixed, tokens: {}}}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sets", "seconds"),
    [
        (
            "deepseek-moe-16b-8xh100",
            ("workload.requests=10000", *map(TOKENS.format, ("input", "output"), (1000, 200))),
            30,
        ),
        ("deepseek-v3-decode-ep72-h800", ("cluster.nodes=12", "workload.requests=12000"), 60),
    ],
)
def test_a_minute_of_service_takes_less_than_a_minute(name: str, sets: tuple[str, ...], seconds: float) -> None:
    command = [sys.executable, "-m", "moesim", "serve", name, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, *(word for each in sets for word in ("--set", each))], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"\n{name}: {used:.1f} s of CPU, {after.ru_maxrss / 1e6:.2f} GB at most")
    assert used < seconds and after.ru_maxrss < 2e6
