"""CPU seconds and memory of whole runs on large clusters, with room for a busy machine."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SIXTEEN_THOUSAND = ("cluster.nodes=2048", "parallelism.data=1024", "workload.global_batch=122880")


# Between the tests and a run, for a process begins with the peak of the one that it was forked from.
MEASURED = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "moesim", *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9)
sys.exit(done.returncode)
"""


def usage_of(*arguments: str) -> tuple[float, float]:
    """CPU seconds and peak memory in GB of a `moesim` of its own."""
    process = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds, gigabytes = map(float, process.stdout.split()[-2:])
    return seconds, gigabytes


@pytest.fixture(scope="module")
def compiled_loops(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A shorter step, so that no run pays for compiling loops, which is done once on a machine."""
    folder = tmp_path_factory.mktemp("compiled") / "run"
    usage_of("run", "deepseek-v3-2048xh800", "--set", "workload.global_batch=4096", "--quiet", "--out", str(folder))


@pytest.mark.usefixtures("compiled_loops")
@pytest.mark.parametrize(
    ("scenario", "changes", "seconds", "gigabytes"),
    [
        ("deepseek-v3-2048xh800", (), 14.0, 1.2),
        ("llama3-405b-16384xh100", (), 9.0, 0.6),
        ("deepseek-v3-2048xh800", SIXTEEN_THOUSAND, 45.0, 3.0),
    ],
)
def test_a_large_run_stays_small(
    scenario: str, changes: tuple[str, ...], seconds: float, gigabytes: float, tmp_path: Path
) -> None:
    settings = [word for change in changes for word in ("--set", change)]
    used, peak = usage_of("run", scenario, *settings, "--quiet", "--out", str(tmp_path / "run"))
    print(f"\n{scenario} {' '.join(changes)}: {used:.1f} s of CPU, {peak:.2f} GB")
    assert used < seconds
    assert peak < gigabytes
