"""Words and flags that ask what there is: help, version, completion, shipped files, GPUs; and CSV beside JSON."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesim import __version__
from moesim.cli import build
from moesim.scenario import gpu_names, load_scenario
from moesim.shipped import folder, shipped

LONGEST_PURPOSE = 120  # characters: about a line of a terminal


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("word", ["version", "-v", "-V", "--version"])
def test_every_way_of_asking_for_the_version(moesim, word: str) -> None:
    answer = moesim(word)
    assert (answer.code, answer.out) == (0, f"moesim {__version__}\n")


def test_help_is_a_word_too(moesim) -> None:
    assert moesim("help").out == moesim("--help").out == moesim().out == moesim("help", "help").out
    assert moesim("help", "run").out == moesim("run", "--help").out
    assert "did you mean 'run'?" in moesim("help", "rnu").complaint
    assert "did you mean 'help'?" in moesim("hepl").complaint


def test_a_value_that_begins_with_a_dash_is_told_how_to_write(moesim) -> None:
    answer = moesim("run", "--from-megatron", "launch.sh", "--args", "--overlap-grad-reduce")
    assert answer.code == 1
    assert "--args: expected one argument, which is written FLAG=VALUE where it begins with a dash" in answer.complaint


def test_the_package_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moesim", "-v"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"moesim {__version__}\n"


def completions(line: str, place: Path) -> set[str]:
    """What the shell is offered after `line`, by the protocol that argcomplete and its shell code speak."""
    answer = place / "answer"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_IFS": "\n",
    }
    subprocess.run([sys.executable, "-m", "moesim"], check=True, cwd=place, env=environment)
    return {word.strip() for word in answer.read_text().split("\n")}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("moesim sw", {"sweep"}),
        ("moesim run --js", {"--json"}),
        ("moesim run quick", {"quickstart"}),
        ("moesim sweep cap", {"capacity"}),
        ("moesim topology own", {"own.yaml"}),
        ("moesim gpus gb", {"gb200", "gb300"}),
    ],
)
def test_the_shell_completes_verbs_flags_names_and_files(tmp_path: Path, line: str, offered: set[str]) -> None:
    (tmp_path / "own.yaml").touch()
    assert completions(line, tmp_path) == offered


@pytest.mark.parametrize(
    ("verb", "word"),
    [
        ("run", "quickstart"),
        ("sweep", "capacity"),
        ("plan", "mixtral-8x22b"),
        ("serve", "deepseek-moe-16b-8xh100"),
        ("model", "deepseek-v3"),
        ("gpus", "gb200"),
    ],
)
def test_the_first_word_of_a_verb_is_one_of_its_names(verb: str, word: str) -> None:
    """What the shell is told, without a process of its own for each."""
    first = next(action for action in build()[1][verb]._actions if not action.option_strings)
    assert word in first.completer(prefix="")  # type: ignore[attr-defined]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_shell_code_is_printed_for_each_shell(moesim, shell: str) -> None:
    answer = moesim("completion", shell)
    assert answer.code == 0
    assert "moesim" in answer.out


def test_completion_without_its_library_says_what_to_install(moesim, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete.shell_integration", None)
    assert "moesim[completion]" in moesim("completion", "bash").complaint


def test_shipped_files_are_listed_with_a_purpose_of_one_line(moesim) -> None:
    listed = json.loads(moesim("scenarios", "--json").out)
    assert {folder() / entry["file"] for entry in listed} == set(folder().rglob("*.yaml"))
    assert all(0 < len(entry["purpose"]) <= LONGEST_PURPOSE for entry in listed)
    screen = " ".join(moesim("scenarios").out.split())
    assert all(entry["name"] in screen and entry["purpose"] in screen for entry in listed)


@pytest.mark.parametrize("file", shipped(), ids=lambda file: file.place.as_posix())
def test_a_copied_file_finds_what_it_refers_to(tmp_path: Path, moesim, file) -> None:
    assert moesim("scenarios", "copy", file.name, tmp_path / "own").code == 0
    copied = tmp_path / "own" / file.place
    assert copied.read_bytes() == (folder() / file.place).read_bytes()
    assert (tmp_path / "own/schema.json").is_file()
    if file.kind == "study":
        assert moesim("sweep", copied, "--dry-run", "--json", "--out", tmp_path / "out").code == 0
    elif file.kind == "scenario":
        assert load_scenario(copied) == load_scenario(folder() / file.place)


def test_a_copy_replaces_nothing_of_the_users(tmp_path: Path, moesim) -> None:
    assert moesim("scenarios", "copy", "quickstart", tmp_path).code == 0
    assert moesim("scenarios", "copy", "all", tmp_path).code == 0  # what is the same already may stay
    own = tmp_path / "quickstart.yaml"
    own.write_text("name: mine\n")
    assert f"{own} exists and differs" in moesim("scenarios", "copy", "all", tmp_path).complaint
    assert own.read_text() == "name: mine\n"
    assert moesim("scenarios", "copy", "all", tmp_path, "--force").code == 0
    assert own.read_bytes() == (folder() / "quickstart.yaml").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["copy", "quickstrat", "own"], "did you mean 'quickstart'?"),
        (["copy", "quickstart", "small.yaml"], "small.yaml is a file"),
        (["copy", "quickstart"], "scenarios copy NAME DIR"),
        (["cop", "quickstart", "own"], "scenarios copy NAME DIR"),
    ],
)
def test_a_mistake_in_copying_is_one_line(scenario: Path, moesim, words: list[str], said: str) -> None:
    answer = moesim("scenarios", *words)
    assert answer.code == 1
    assert said in answer.complaint
    assert not Path("own").exists()


def test_a_bare_name_is_a_shipped_file_unless_there_is_a_file_of_that_name(scenario: Path, moesim) -> None:
    moesim("topology", "uniform-dropless")
    assert Path("runs/uniform-dropless/topology.html").exists()
    Path("uniform-dropless").write_text(scenario.read_text())
    moesim("topology", "uniform-dropless")
    assert Path("runs/small/topology.html").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["run", "quickstrat"], "did you mean 'quickstart'?"),
        (["run", "scenarios/quickstart.yaml"], "moesim run quickstart"),
        (["sweep", "capacitiy"], "did you mean 'capacity'?"),
        (["plan", "plans/mixtral-8x22b.yaml"], "moesim plan mixtral-8x22b"),
        (["plan", "quickstart"], "the scenario of this name is for `moesim run`"),
        (["plan", "quickstrt"], "no plan of this name ships"),
        (["serve", "quickstart"], "serving scenarios that ship: deepseek-moe-16b-8xh100, "),
    ],
)
def test_a_file_that_is_missing_names_what_ships(scenario: Path, moesim, argv: list[str], said: str) -> None:
    answer = moesim(*argv)
    assert answer.code == 1
    assert said in answer.complaint


def test_gpus_are_listed_with_sources(moesim) -> None:
    listed = json.loads(moesim("gpus", "--json").out)
    assert [gpu["name"] for gpu in listed] == list(gpu_names())
    assert all(gpu["source"] and gpu["price_source"] for gpu in listed)
    screen = " ".join(moesim("gpus").out.split())
    assert all(gpu[key] in screen for gpu in listed for key in ("name", "source", "price_source"))
    h100 = json.loads(moesim("gpus", "h100", "--json").out)[0]
    assert h100["peak_flop_per_s"]["bf16"] == 989.4e12  # NVIDIA's data sheet, without sparsity
    assert 'did you mean "h100"?' in moesim("gpus", "H-100").complaint
    assert "did you mean" not in moesim("gpus", "h1000").complaint  # one digit more is another product


def at(content: object, path: str) -> object:
    for key in path.split("."):
        content = content[key]
    return content


def test_csv_has_the_numbers_of_json_under_their_paths(scenario: Path, moesim) -> None:
    result = json.loads(moesim("run", scenario, "--json").out)
    (row,) = table(moesim("run", scenario, "--csv", "--force").out)
    numbers = {"step_time_s", "mfu.causal", "cost.usd_per_step", "memory.peak_bytes", "attribution_s.experts"}
    assert numbers <= set(row)
    assert all(float(row[path]) == at(result, path) for path in numbers)
    assert [float(row[f"step_time_range_s.{end}"]) for end in ("low", "high")] == result["step_time_range_s"]


def test_csv_of_lists_has_a_row_for_each(moesim) -> None:
    gpus = table(moesim("gpus", "--csv").out)
    assert [row["name"] for row in gpus] == list(gpu_names())
    assert {"memory_bytes", "usd_per_gpu_hour", "peak_flop_per_s.fp8"} <= set(gpus[0])
    assert next(row for row in gpus if row["name"] == "a100")["peak_flop_per_s.fp8"] == ""
    models = json.loads(moesim("model", "--list", "--json").out)
    rows = table(moesim("model", "--csv").out)
    assert {row["name"]: float(row["total_parameters"]) for row in rows} == {
        name: size["total"] for name, size in models.items()
    }
    (one,) = table(moesim("model", "mixtral-8x7b", "--csv").out)
    assert float(one["parameters.total"]) == models["mixtral-8x7b"]["total"]


def test_csv_of_a_sweep_has_a_row_for_each_point(scenario: Path, moesim) -> None:
    axes = (
        "axes:\n- {key: capacity, values: [{kind: none}, {kind: expert, factor: 1.0}]}\n- {key: seed, values: [0, 1]}\n"
    )
    Path("study.yaml").write_text(f"name: study\nbase: small.yaml\n{axes}")
    listed = table(moesim("sweep", "study.yaml", "--dry-run", "--csv").out)
    rows = table(moesim("sweep", "study.yaml", "--workers", "1", "--csv", "--quiet").out)
    points = json.loads(moesim("sweep", "study.yaml", "--json").out)["points"]
    assert [row["values.seed"] for row in rows] == [row["values.seed"] for row in listed] == ["0", "1", "0", "1"]
    assert [json.loads(row["values.capacity"]) for row in rows] == [point["values"]["capacity"] for point in points]
    assert [float(row["step_time_s"]) for row in rows] == [point["result"]["step_time_s"] for point in points]


def test_json_and_csv_exclude_each_other(moesim) -> None:
    assert "not allowed with argument" in moesim("gpus", "--json", "--csv").complaint
