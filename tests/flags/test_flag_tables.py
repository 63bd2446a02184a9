"""Every flag of Megatron-LM has one place: read, harmless with a reason, or left out with what that costs."""

from pathlib import Path

import pytest

from moesim.flags.arguments import Arguments, Given, known_names
from moesim.flags.flag_table import LAUNCHER, READ, Flag
from moesim.flags.unread_flags import HARMLESS, LEFT_OUT, PREFIXES, LeftOut, harmless
from moesim.scenario import Scenario

# All names that the parser of megatron-core 0.19.2 (PyPI) takes, a line each.
NAMES = Path(__file__).with_name("megatron_0_19_2_flags.txt").read_text(encoding="utf-8").split()
LISTED = [name for names in HARMLESS.values() for name in names]
# Names that Megatron-LM had before, or that its forks have.
OF_OTHER_VERSIONS = {
    "--use-custom-fsdp",
    "--no-query-key-layer-scaling",
    "--enable-one-logger",
    "--moe-use-legacy-grouped-gemm",
    "--no-async-tensor-model-parallel-allreduce",
}


def test_every_flag_of_megatron_is_known() -> None:
    assert len(NAMES) > 800
    assert [name for name in NAMES if not (name in READ or name in LEFT_OUT or harmless(name))] == []


def test_no_flag_has_two_fates() -> None:
    assert len(set(LISTED)) == len(LISTED)
    assert not set(READ) & set(LEFT_OUT)
    assert not set(LISTED) & {*READ, *LEFT_OUT}


def test_no_name_is_invented() -> None:
    launchers = {name for name in LISTED if name not in NAMES} - OF_OTHER_VERSIONS
    of_torchrun = {"--node-rank", "--master-addr", "--master-port", "--rdzv-id", "--rdzv-backend", "--rdzv-endpoint",
                   "--rdzv-conf", "--tee", "--role", "--max-restarts", "--redirects", "--log-dir", "--standalone",
                   "--virtual-local-rank", "--local-addr"}  # fmt: skip
    assert launchers == of_torchrun
    assert {name for name in (*READ, *LEFT_OUT) if name not in NAMES} - OF_OTHER_VERSIONS == set(LAUNCHER)


def test_every_prefix_is_that_of_a_flag() -> None:
    prefixes = [prefix for prefixes in PREFIXES.values() for prefix in prefixes]
    assert [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in NAMES)] == []


@pytest.mark.parametrize("flag", READ.values(), ids=lambda flag: flag.name)
def test_what_a_flag_becomes_is_a_key_of_a_scenario(flag: Flag) -> None:
    assert all(key.partition(".")[0] in Scenario.model_fields for key in flag.key.split(", "))


@pytest.mark.parametrize(("name", "left"), LEFT_OUT.items())
def test_what_is_refused_is_refused_and_the_rest_is_told(name: str, left: LeftOut) -> None:
    given = Given(name, ("7",), "run.sh:3")
    if left.refused:
        with pytest.raises(Exception, match=f"run.sh:3: {name} 7: "):
            Arguments([given], source="run.sh")
    else:
        assert name in Arguments([given], source="run.sh").left_out[0]
    for harmless_word in left.unless:
        assert not Arguments([Given(name, (harmless_word,), "run.sh:3")], source="run.sh").left_out


def test_suggestions_name_flags_that_matter() -> None:
    assert "--num-layers" in known_names() and "--wandb-project" not in known_names()
