"""`--from-megatron`, `scenarios from-megatron` and `--flags`: what a person sees, and one line for every mistake."""

import json
import shlex
from pathlib import Path

import pytest

from moesim.flags import WRITERS
from moesim.scenario import load_scenario

LAUNCH = """
TP=${TP:-1}
ARGS=(
  --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 512 --vocab-size 256 --swiglu
  --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32 --expert-model-parallel-size 2 --bf16
  --moe-token-dispatcher-type alltoall --disable-bias-linear --untie-embeddings-and-output-weights
  --micro-batch-size 1 --global-batch-size 4 --tensor-model-parallel-size $TP --fp32-residual-connection --lr 1e-4
  --moe-router-force-load-balancing
)
torchrun --nproc_per_node 2 --nnodes 1 pretrain_gpt.py ${ARGS[@]} $MORE
"""
QUICK = ("--set", "compute.profile=roofline", "--set", "uncertainty.samples=1")


@pytest.fixture
def launch(scenario: Path) -> Path:
    path = scenario.with_name("launch.sh")
    path.write_text(LAUNCH)
    return path


def test_a_launch_is_simulated_in_place_of_a_scenario(launch: Path, moesim) -> None:
    answer = moesim("run", "--from-megatron", launch, "--gpu", "h200", *QUICK)
    assert answer.code == 0
    for words in (
        "launch.sh  18 flags read, 1 change nothing, 1 not modelled",
        "assumed: launch.sh:10: $MORE is not set in the script: taken as empty",
        "warning: launch.sh: --fp32-residual-connection: ",
        "written to runs/launch: ",
    ):
        assert words in answer.out, words
    assert load_scenario("runs/launch/scenario.yaml").cluster.pools[0].gpu == "h200"


def test_what_was_written_runs_to_the_same_result(launch: Path, moesim) -> None:
    assert moesim("scenarios", "from-megatron", launch, "--out", "my.yaml", *QUICK).code == 0
    direct = json.loads(moesim("run", "--from-megatron", launch, *QUICK, "--json").out)
    written = json.loads(moesim("run", "my.yaml", "--json", "--out", "again").out)
    for key in ("step_time_s", "warnings", "gpus", "memory"):
        assert direct[key] == written[key]


def test_from_megatron_lists_every_flag(launch: Path, moesim) -> None:
    answer = moesim("scenarios", "from-megatron", launch)
    assert answer.code == 0
    for words in (
        "--num-layers 2",
        "model.layers",
        "how the optimizer moves the weights",
        "GPUs are h100",
        "warning: not modelled: launch.sh: --fp32-residual-connection",
        "--out FILE.yaml writes the scenario",
    ):
        assert words in answer.out
    content = json.loads(moesim("scenarios", "from-megatron", launch, "--json").out)
    assert {"flag": "--num-layers 2", "becomes": "model.layers"} in content["read"]
    assert [entry["flag"].split()[0] for entry in content["harmless"]] == ["--lr"]
    assert moesim("scenarios", "from-megatron", launch, "--quiet").out == ""


def test_nothing_is_replaced_unasked(launch: Path, moesim) -> None:
    assert moesim("scenarios", "from-megatron", launch, "--out", "my.yaml", "--quiet").code == 0
    assert moesim("scenarios", "from-megatron", launch, "--out", "my.yaml", "--quiet").code == 0  # the same
    other = moesim("scenarios", "from-megatron", launch, "--gpu", "h200", "--out", "my.yaml")
    assert other.code == 1 and "my.yaml exists and differs" in other.complaint
    assert moesim("scenarios", "from-megatron", launch, "--gpu", "h200", "--out", "my.yaml", "--force").code == 0


@pytest.mark.parametrize("software", WRITERS)
def test_flags_of_a_run(scenario: Path, moesim, software: str) -> None:
    answer = moesim("run", scenario, "--flags", software)
    assert answer.code == 0
    command = WRITERS[software](load_scenario(scenario))
    assert command.text in answer.out and "what these flags cannot say" in answer.out
    assert shlex.split(command.text.replace("\\\n", " ")) == [
        *command.launcher,
        *(w for flag in command.flags for w in flag),
    ]
    result = json.loads(moesim("run", scenario, "--flags", software, "--json", "--out", "b").out)
    assert result["flags"][software] == command.as_json()
    assert "flags" not in json.loads(moesim("run", scenario, "--json", "--out", "c").out)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("run",), "name a SCENARIO, or a launch with --from-megatron"),
        (("run", "small.yaml", "--from-megatron", "launch.sh"), "leave SCENARIO out"),
        (("run", "small.yaml", "--gpu", "h200"), "--gpu goes with --from-megatron"),
        (("run", "small.yaml", "--var", "A=1"), "--var goes with --from-megatron"),
        (("run", "--from-megatron", "no.sh"), "no.sh: cannot read the launch script"),
        (("run", "--from-megatron", "launch.sh", "--gpu", "h300"), "unknown GPU"),
        (("run", "--from-megatron", "launch.sh", "--gpus", "0"), "--gpus 0 is not a number of GPUs"),
        (("run", "--from-megatron", "launch.sh", "--gpus", "3"), "3 GPUs are not whole nodes of 2"),
        (("run", "--from-megatron", "launch.sh", "--var", "TP"), "write NAME=VALUE"),
        (("run", "--from-megatron", "launch.sh", "--var", "TP=two"), "must be a whole number"),
        (("run", "--from-megatron", "launch.sh", "--set", "model.layer=1"), 'did you mean "layers"?'),
        (("run", "small.yaml", "--flags", "megaton"), "choose from 'megatron', 'torchtitan'"),
        (("scenarios", "from-megatron"), "the following arguments are required"),
        (("scenarios", "from-megatron", "launch.sh", "--out", "."), "is a folder; name a file"),
    ],
)
def test_mistakes_are_one_line(launch: Path, moesim, argv: tuple[str, ...], complaint: str) -> None:
    answer = moesim(*argv)
    assert answer.code == 1
    assert complaint in answer.complaint


def test_a_variable_of_the_script_can_be_set(launch: Path, moesim) -> None:
    content = json.loads(moesim("scenarios", "from-megatron", launch, "--var", "TP=2", "--gpus", "4", "--json").out)
    assert content["scenario"]["parallelism"]["tensor"] == 2
