"""What each verb prints and writes."""

import gzip
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from moesim.routing.request import ProgressCallback, StepReport
from moesim.scenario import load_scenario
from moesim.trace import load_trace

TRAINED = (
    "routing={kind: train, router: {kind: deepseek_moe}, steps: 4, "
    "thin: {layers: 1, hidden: 16, heads: 2, expert_intermediate: 8, context: 64, tokens_per_step: 128}}"
)
RUN_FILES = {"scenario.yaml", "result.json", "arrays.npz", "spans.npz", "trace.npz", "report.html"}


@pytest.mark.usefixtures("whole_report")
def test_run_writes_its_folder_and_shows_the_facts(scenario: Path, moesim) -> None:
    answer = moesim("run", scenario)
    out = scenario.parent / "runs/small"
    assert answer.code == 0
    assert {path.name for path in out.iterdir()} == RUN_FILES
    result = json.loads((out / "result.json").read_text())
    assert f"{result['tokens_per_second']:,.0f}" in answer.out
    assert "runs/small/report.html" in answer.out
    assert load_scenario(out / "scenario.yaml") == load_scenario(scenario)


def test_json_is_the_result_and_nothing_else(scenario: Path, moesim) -> None:
    answer = moesim("run", scenario, "--json")
    assert json.loads(answer.out) == json.loads((scenario.parent / "runs/small/result.json").read_text())


def test_quiet_prints_nothing(scenario: Path, moesim) -> None:
    answer = moesim("run", scenario, "--quiet")
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_timeline_is_one_file_of_the_run_or_of_chosen_ranks(scenario: Path, moesim) -> None:
    answer = moesim("run", scenario, "--timeline=1")
    file = scenario.parent / "runs/small/timeline.json.gz"
    assert "timeline.json.gz" in answer.out
    kept = json.loads(gzip.decompress(file.read_bytes()))
    assert {event["pid"] for event in kept["traceEvents"]} >= {1}
    assert kept["moesim"]["ranks"] == [1]
    assert moesim("run", scenario, "--timeline", "--force").code == 0
    assert json.loads(gzip.decompress(file.read_bytes()))["moesim"]["ranks"] == [0, 1]


def test_timeline_of_a_rank_without_spans_is_refused_before_the_run(scenario: Path, moesim) -> None:
    answer = moesim("run", scenario, "--timeline=5")
    assert answer.code == 1
    assert "choose among ranks 0 to 1" in answer.complaint
    assert not Path("runs").exists()


def test_timeline_swallowing_the_scenario_says_what_to_write(scenario: Path, moesim) -> None:
    answer = moesim("run", "--timeline", scenario)
    assert answer.code == 1
    assert "--timeline behind SCENARIO" in answer.complaint


@pytest.mark.usefixtures("whole_report")
def test_what_if_is_shown_kept_and_reported(scenario: Path, moesim) -> None:
    answer = moesim("run", scenario, "--what-if")
    result = json.loads((scenario.parent / "runs/small/result.json").read_text())
    page = (scenario.parent / "runs/small/report.html").read_text()
    assert [entry["name"] for entry in result["what_if"]] == [
        "balanced_routing", "double_bandwidth", "no_overlap", "no_group_limit",
    ]  # fmt: skip
    for entry in result["what_if"]:
        assert entry["label"] in answer.out
        assert entry["label"] in page
    assert "the router has no group limit" in answer.out
    assert "write --what-if behind SCENARIO" in moesim("run", "--what-if", scenario).complaint


def test_set_overrides_and_the_same_seed_gives_the_same_result(scenario: Path, moesim) -> None:
    same = [json.loads(moesim("run", scenario, "--json", "--force").out) for _ in range(2)]
    assert same[0] == same[1]
    other = json.loads(moesim("run", scenario, "--json", "--force", "--set", "workload.global_batch=8").out)
    assert other["step_time_s"] > same[0]["step_time_s"]


def test_trace_shows_every_layer_and_its_floor(scenario: Path, moesim) -> None:
    answer = moesim("trace", scenario)
    assert answer.code == 0
    summary = json.loads(moesim("trace", scenario, "--json").out)
    for name in ("imbalance_first", "imbalance_last"):
        for value in summary["experts"][name]:
            assert f"{value:.3f}" in answer.out
    for value in (summary["ranks"]["uniform_floor"], *summary["ranks"]["imbalance"]):
        assert f"{value:.3f}" in answer.out
    assert summary["dropped_share"] == [0.0, 0.0]


def test_a_saved_trace_replays(scenario: Path, moesim) -> None:
    assert moesim("trace", scenario, "--out", "saved.npz", "--quiet").out == ""
    assert load_trace(Path("saved.npz")).router.num_experts == 8
    drawn = json.loads(moesim("run", scenario, "--json").out)
    replayed = json.loads(
        moesim("run", scenario, "--json", "--force", "--set", "routing={kind: trace, file: saved.npz}").out
    )
    assert replayed["step_time_s"] == drawn["step_time_s"]
    assert moesim("trace", scenario, "--out", "saved.npz").code == 1


def test_trace_counts_what_capacity_drops(scenario: Path, moesim) -> None:
    capacity = "capacity={kind: expert, factor: 0.5}"
    summary = json.loads(moesim("trace", scenario, "--json", "--set", capacity).out)
    assert summary["dropped_share"] == pytest.approx([0.5, 0.5], abs=0.02)


def test_model_prints_the_published_size(moesim) -> None:
    """Mixtral 8x7B: 46.7 B parameters, 12.9 B activated (arXiv 2401.04088)."""
    answer = moesim("model", "mixtral-8x7b")
    assert "46.70 B" in answer.out
    assert "12.88 B activated" in answer.out
    counts = json.loads(moesim("model", "mixtral-8x7b", "--json").out)
    assert counts["parameters"]["total"] == pytest.approx(46.7e9, rel=1e-3)


def test_model_reads_a_scenario_and_a_hugging_face_config(scenario: Path, moesim) -> None:
    counts = json.loads(moesim("model", scenario, "--json").out)
    assert counts["parameters"]["routed_experts"] == 2 * 8 * 3 * 64 * 32
    config = {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000,
    }  # fmt: skip
    Path("config.json").write_text(json.dumps(config))
    read = json.loads(moesim("model", "config.json", "--json").out)
    assert read["parameters"] == json.loads(moesim("model", "llama2-7b", "--json").out)["parameters"]


MIXTRAL = {
    "model_type": "mixtral", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "vocab_size": 100,
    "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32,
    "rope_theta": 1e6, "n_shared_experts": 1,
}  # fmt: skip


def test_model_says_what_became_of_every_key_of_a_config(scenario: Path, moesim) -> None:
    Path("config.json").write_text(json.dumps(MIXTRAL))
    out = " ".join(moesim("model", "config.json").out.split())
    assert "read: model_type, num_attention_heads" in out
    assert "no effect: rope_theta warning:" in out
    assert 'not known for model_type mixtral and left out: "n_shared_experts" = 1' in out
    found = json.loads(moesim("model", "config.json", "--json").out)
    assert (found["config"]["harmless"], len(found["left_out"])) == (["rope_theta"], 1)
    assert not json.loads(moesim("model", "mixtral-8x7b", "--json").out)["left_out"]


def test_what_a_config_says_beyond_the_model_is_a_warning_of_run_and_sweep(scenario: Path, moesim) -> None:
    Path("config.json").write_text(json.dumps(MIXTRAL))
    model = "model={hf_config: config.json}"
    routing = "routing={kind: uniform}"
    assert "n_shared_experts" in " ".join(moesim("run", scenario, "--set", model, "--set", routing).out.split())
    stored = json.loads((scenario.parent / "runs/small/result.json").read_text())
    assert any("n_shared_experts" in warning for warning in stored["warnings"])
    study = f"name: study\nbase: {scenario}\nset: {{}}\naxes: [{{key: workload.micro_batch, values: [1]}}]\n"
    Path("study.yaml").write_text(study)
    answer = moesim("sweep", "study.yaml", "--workers", "1", "--set", model, "--set", routing)
    assert "n_shared_experts" in answer.out, answer


def test_model_lists_the_catalogue(moesim) -> None:
    listed = moesim("model", "--list").out
    assert moesim("model").out == listed
    sizes = json.loads(moesim("model", "--list", "--json").out)
    assert len(listed.splitlines()) == 1 + len(sizes)
    line = next(line for line in listed.splitlines() if line.startswith("deepseek-v3 "))
    assert line.split()[1:5] == ["671.03", "B", "37.55", "B"]


def test_model_counts_flops_and_states_by_part(moesim) -> None:
    """The parts add up; mixed precision takes 18 bytes a parameter, 16 with gradients of two bytes."""
    counts = json.loads(moesim("model", "deepseek-moe-16b", "--json", "--sequence-length", "2048").out)
    for name, parts in counts["training_flops_per_sequence"].items():
        assert sum(parts.values()) == pytest.approx(2048 * counts["training_flops_per_token"][name], rel=1e-12)
    causal, whole = (counts["training_flops_per_sequence"][name] for name in ("causal", "non_causal"))
    assert whole["attention_scores"] / causal["attention_scores"] == pytest.approx(2 * 2048 / 2049)
    assert whole["routed_experts"] == causal["routed_experts"]
    mixed = counts["state_bytes"]["bf16, all else fp32"]
    assert sum(mixed.values()) == 18 * counts["parameters"]["total"]
    text = moesim("model", "deepseek-moe-16b").out
    assert "…" not in text, "nothing is cut off"
    for word in ("non-causal", "attention scores", "all bf16", "optimizer", "master"):
        assert word in text


def test_model_takes_overrides_and_checks_them(scenario: Path, moesim) -> None:
    def routed(*words: object) -> int:
        return json.loads(moesim("model", *words, "--json").out)["parameters"]["routed_experts"]

    assert routed("mixtral-8x7b", "--set", "model.experts=16") == 2 * routed("mixtral-8x7b")
    assert routed(scenario, "--set", "model.experts=16") == 2 * routed(scenario)
    assert "model.top_k" in moesim("model", "mixtral-8x7b", "--set", "model.top_k=9").complaint
    assert "only the keys of model" in moesim("model", "mixtral-8x7b", "--set", "layers=9").complaint


def test_schema_is_json_and_knows_every_section(scenario: Path, moesim) -> None:
    schema = json.loads(moesim("schema").out)
    assert {"model", "routing", "cluster", "workload"} <= set(schema["properties"])
    assert moesim("schema", "--out", "schema.json").out == ""
    assert json.loads(Path("schema.json").read_text()) == schema


def test_topology_prints_and_draws_the_fabric(scenario: Path, moesim) -> None:
    answer = moesim("topology", scenario, "--set", "cluster.nodes=2", "--out", "fabric.html")
    facts = json.loads(moesim("topology", scenario, "--set", "cluster.nodes=2", "--json").out)
    assert facts["gpus"] == 4
    for link in facts["links"]:
        assert link["tier"] in answer.out
    page = Path("fabric.html").read_text()
    assert "fabric-plot" in page
    assert 'src="' not in page.split("</script>")[-1]
    assert moesim("topology", scenario, "--out", "fabric.html").code == 1


def interrupting_bar(at_step: int, seen: list[int]) -> Callable[..., AbstractContextManager[ProgressCallback]]:
    """A stand-in for the progress bar: presses Ctrl-C when training step `at_step` is done."""

    @contextmanager
    def bar(*, quiet: bool) -> Iterator[ProgressCallback]:
        def show(report: StepReport) -> None:
            seen.append(report.step)
            if report.step == at_step:
                signal.raise_signal(signal.SIGINT)

        yield show

    return bar


def test_ctrl_c_keeps_training_steps_and_then_the_trained_router(scenario: Path, moesim, monkeypatch) -> None:
    first: list[int] = []
    monkeypatch.setattr("moesim.cli.one_scenario.watched_training", interrupting_bar(2, first))
    answer = moesim("run", scenario, "--set", TRAINED)
    assert answer.code == 130
    assert "interrupted" in answer.complaint
    kept = next(Path(word.rstrip(";")) for word in answer.complaint.split() if word.startswith("/"))
    assert kept.is_file()
    assert "run the same command again to resume" in answer.complaint
    assert not Path("runs").exists()
    second: list[int] = []
    monkeypatch.setattr("moesim.cli.one_scenario.watched_training", interrupting_bar(-1, second))
    monkeypatch.setattr("moesim.engine.samples.build_program", press_ctrl_c)
    answer = moesim("run", scenario, "--set", TRAINED)
    assert (first, second) == ([1, 2], [3, 4])
    assert answer.code == 130
    assert "the trained router is kept in" in answer.complaint
    assert not Path("runs").exists()


def press_ctrl_c(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_without_training_says_that_nothing_was_written(scenario: Path, moesim, monkeypatch) -> None:
    monkeypatch.setattr("moesim.run.simulate", press_ctrl_c)
    answer = moesim("run", scenario)
    assert answer.code == 130
    assert "nothing was written" in answer.complaint


@pytest.mark.benchmark
def test_help_is_instant() -> None:
    """Prints the best of five wall times; the promise is half a second."""

    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "moesim", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    best = min(once() for _ in range(5))
    print(f"\nmoesim --help: {1e3 * best:.0f} ms")
    assert best < 0.5
