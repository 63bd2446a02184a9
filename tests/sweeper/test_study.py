"""A study file becomes points, or one line that says what is wrong where."""

from pathlib import Path

import pytest

from moesim.errors import UserError
from moesim.sweeper import load_study

SERVED = Path(__file__).parents[2] / "scenarios/serving/qwen3-30b-one-h100.yaml"
HEAD = "name: trial\nbase: small.yaml\n"


def test_a_grid_runs_through_its_axes_the_last_fastest(study):
    text = "axes:\n- {key: workload.micro_batch, values: [1, 2]}\n- {key: seed, values: [0, 1, 2]}\n"
    made = load_study(study(HEAD + text))
    assert [point.number for point in made.points] == [1, 2, 3, 4, 5, 6]
    assert made.points[1].values == {"workload.micro_batch": 1, "seed": 1}
    assert made.points[3].scenario.workload.micro_batch == 2
    assert made.points[3].scenario.seed == 0
    assert [axis.repeat for axis in made.axes] == [False, True]


def test_zipped_keys_move_together(study):
    text = "axes:\n- {keys: [cluster.nodes, parallelism.data], values: [[1, 2], [2, 4]], labels: [one, two]}\n"
    made = load_study(study(HEAD + text))
    assert [point.scenario.cluster.num_gpus for point in made.points] == [2, 4]
    assert made.axes[0].as_json() == {
        "keys": ["cluster.nodes", "parallelism.data"],
        "values": [[1, 2], [2, 4]],
        "labels": ["one", "two"],
        "repeat": False,
    }


def test_points_may_set_different_keys_and_are_crossed_with_axes(study):
    text = "points:\n- {model.top_k: 4}\n- {workload.micro_batch: 2}\naxes:\n- {key: seed, values: [0, 1]}\n"
    made = load_study(study(HEAD + text))
    assert [point.values for point in made.points[:3]] == [
        {"model.top_k": 4, "seed": 0},
        {"model.top_k": 4, "seed": 1},
        {"workload.micro_batch": 2, "seed": 0},
    ]
    assert made.axes[0].as_json()["values"] == [[4, None], [None, 2]]


def test_variables_fill_texts_and_whole_values(study):
    text = (
        "set: {name: small-$size, seed: $run}\n"
        "axes:\n- {keys: [$size, model.hidden], values: [[tiny, 64], [wide, 128]]}\n"
        "- {key: $run, values: [3, 4], repeat: true}\n"
    )
    made = load_study(study(HEAD + text))
    assert [(point.scenario.name, point.scenario.seed) for point in made.points] == [
        ("small-tiny", 3),
        ("small-tiny", 4),
        ("small-wide", 3),
        ("small-wide", 4),
    ]
    assert made.points[0].values == {"$size": "tiny", "model.hidden": 64, "$run": 3}


def test_a_base_is_a_file_beside_the_study_or_ships(study):
    shipped = "name: trial\nbase: stress-balanced\n"
    made = load_study(study(shipped + AXIS))
    assert [point.scenario.name for point in made.points] == ["stress-balanced", "stress-balanced"]
    small = (study(HEAD + AXIS).parent / "small.yaml").read_text()
    study(small, name="stress-balanced")
    assert load_study(study(shipped + AXIS)).points[0].scenario.name != "stress-balanced"


def test_a_value_may_be_a_whole_section(study):
    text = "axes:\n- {key: capacity, values: [{kind: none}, {kind: expert, factor: 1.25}], labels: [none, 1.25]}\n"
    made = load_study(study(HEAD + text))
    assert [point.scenario.capacity.kind for point in made.points] == ["none", "expert"]


def test_the_last_word_is_the_points_own(study):
    text = "set: {workload.global_batch: 8, uncertainty.samples: 5}\naxes:\n- {key: seed, values: [1]}\n"
    made = load_study(study(HEAD + text), ["uncertainty.samples=3"])
    scenario = made.points[0].scenario
    assert (scenario.workload.global_batch, scenario.uncertainty.samples, scenario.seed) == (8, 3, 1)


def test_files_are_found_beside_the_study(study, tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("words " * 10)
    text = "axes:\n- {key: routing.corpus, values: [book.txt]}\n"
    kind = "set: {routing: {kind: train, router: {kind: deepseek_moe}}}\n"
    path = study(HEAD + kind + text)
    monkeypatch.chdir("/")
    made = load_study(path)
    assert made.points[0].scenario.routing.corpus == str(tmp_path / "book.txt")


def test_points_that_do_not_fit_keep_their_reason(study):
    text = "axes:\n- {key: parallelism.expert, values: [1, 2, 3]}\n- {key: cluster.nodes, values: [1, 2]}\n"
    made = load_study(study(HEAD + text))
    assert made.num_points == 6
    assert [invalid_point.number for invalid_point in made.invalid_points] == [5, 6]
    assert "study.yaml:4:44: parallelism.expert: 3 does not divide experts = 8" in made.invalid_points[0].reason


def test_the_hash_follows_the_scenarios_and_not_the_plot(study):
    text = HEAD + "axes:\n- {key: seed, values: [0, 1]}\n"
    plot = "plot: {kind: curves, x: seed, y: [step_time_s]}\n"
    plain = load_study(study(text)).content_hash()
    assert load_study(study(text + plot)).content_hash() == plain
    assert load_study(study(text), ["workload.global_batch=8"]).content_hash() != plain
    assert load_study(study(text.replace("[0, 1]", "[1, 0]"))).content_hash() != plain
    study((study(text).parent / "small.yaml").read_text().replace("layers: 2", "layers: 3"), name="small.yaml")
    assert load_study(study(text)).content_hash() != plain


AXIS = "axes:\n- {key: seed, values: [0, 1]}\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "study.yaml: a study is a mapping"),
        ("- 1\n", r"study.yaml:1:1: a study is a mapping"),
        ("name: [\n", r"study.yaml:2:1: not valid YAML"),
        ("name: x\n" + AXIS, "a study needs base"),
        ("base: small.yaml\n" + AXIS, "a study needs name"),
        ("name: a b\nbase: small.yaml\n" + AXIS, r"study.yaml:1:7: name 'a b' may hold only"),
        (
            "name: a\nbase: other.yaml\n" + AXIS,
            r"study.yaml:2:7: base: other.yaml does not exist .*; name a file, by a path",
        ),
        (
            "name: a\nbase: quickstrt\n" + AXIS,
            r"study.yaml:2:7: base: quickstrt does not exist .*did you mean 'quickstart'",
        ),
        (
            f"name: a\nbase: {SERVED}\n" + AXIS,
            r"study.yaml:2:7: base: qwen3-30b-one-h100.yaml is of serving, .*moesim serve FILE --out",
        ),
        (HEAD, "a study needs axes or points"),
        (HEAD + "axis: []\n", r"""study.yaml:3:1: a study has no key 'axis'; did you mean "axes"\?"""),
        (HEAD + "axes: []\n", r"study.yaml:3:7: axes is a list with at least one item"),
        (HEAD + "axes:\n- {key: seed}\n", r"study.yaml:4:3: an axis needs values"),
        (HEAD + "axes:\n- {values: [1]}\n", r"an axis needs key: K, or keys"),
        (HEAD + "axes:\n- {key: seed, values: []}\n", r"study.yaml:4:23: values is a list"),
        (HEAD + "axes:\n- {key: seed, value: [1]}\n", r"""an axis has no key 'value'; did you mean "values"\?"""),
        (HEAD + "axes:\n- {key: a b, values: [1]}\n", r"'a b' is no key"),
        (HEAD + "axes:\n- {key: seed, values: [1], repeat: 1}\n", r"repeat is true or false"),
        (HEAD + "axes:\n- {key: seed, values: [1, 2], labels: [a]}\n", r"1 labels for 2 values"),
        (HEAD + "axes:\n- {key: seed, values: [1, 2], labels: [a, a]}\n", r"the label 'a' comes twice"),
        (
            HEAD + "axes:\n- {keys: [seed, model.top_k], values: [[1, 2], [1]]}\n",
            r"study.yaml:4:48: 1 values for the 2 keys seed, model.top_k",
        ),
        (HEAD + "axes:\n- {keys: [seed, seed], values: [[1, 2]]}\n", r"the key 'seed' comes twice"),
        (HEAD + AXIS + "- {key: seed, values: [3]}\n", r"the key 'seed' is already on another axis"),
        (HEAD + "axes:\n- {key: sed, values: [1]}\n", r'study.yaml:4:\d+: sed: unknown key; did you mean "seed"\?'),
        (
            HEAD + "axes:\n- {key: workload.micro_bach, values: [1]}\n",
            r'study.yaml:4:\d+: workload.micro_bach: unknown key; did you mean "micro_batch"\?',
        ),
        (HEAD + "axes:\n- {key: seed, values: [0, x]}\n", r"study.yaml:4:27: seed: expected a whole number"),
        (HEAD + "axes:\n- {key: cluster.gpu, values: [h200, h20o]}\n", r"study.yaml:4:37: .*h20o"),
        (HEAD + "set: {seeed: 1}\n" + AXIS, r'study.yaml:3:14: seeed: unknown key; did you mean "seed"\?'),
        (HEAD + "set: {name: $x}\n" + AXIS, r"study.yaml:3:13: no axis sets \$x; add one"),
        (
            HEAD + "set: {name: $ruin}\naxes:\n- {key: $run, values: [1]}\n",
            r'no axis sets \$ruin; did you mean "\$run"\?',
        ),
        (
            HEAD + "set: {routing: {kind: trace, file: 'library:64x6/$m'}}\naxes:\n- {key: $m, values: [M2, M9]}\n",
            r"study.yaml: routing.file: library:64x6/M9: the library has no such entry; did you mean 64x6/M",
        ),
        (HEAD + "axes:\n- {key: seed, values: [1, 1]}\n", r"points 1 and 2 are the same scenario \(seed = 1 and"),
        (HEAD + "axes:\n- {key: $x, values: [1, 2]}\n", r"points 1 and 2 are the same scenario"),
        (HEAD + "axes:\n- {key: parallelism.expert, values: [3, 5]}\n", r"no point .* 3 does not divide"),
        (HEAD + AXIS + "plot: {x: seed, y: [step_time_s]}\n", r"study.yaml:5:7: plot needs a kind"),
        (HEAD + AXIS + "plot: {kind: curve, x: seed}\n", r'did you mean "curves"\?'),
        (HEAD + AXIS + "plot: {kind: curves, x: seed}\n", r"kind curves needs x and y"),
        (
            HEAD + AXIS + "plot: {kind: curves, x: sed, y: [step_time_s]}\n",
            r"""study.yaml:5:25: x 'sed' is unknown; did you mean "seed"\?""",
        ),
        (
            HEAD + AXIS + "plot: {kind: curves, x: seed, y: [step_time]}\n",
            r"""study.yaml:5:35: y 'step_time' is unknown; did you mean "step_time_s"\?""",
        ),
        (HEAD + AXIS + "plot: {kind: curves, x: seed, y: [step_time_s], colour: gpu}\n", r"colour 'gpu' is unknown"),
        (HEAD + AXIS + "reference: {sed: 1}\n", r"study.yaml:5:12: reference: 'sed' is on no axis"),
        (HEAD + AXIS + "reference: {seed: 0}\n", r"reference: 'seed' is on no axis"),
        (
            HEAD + "axes:\n- {key: workload.micro_batch, values: [1, 2]}\nreference: {workload.micro_batch: 4}\n",
            r"reference: workload.micro_batch = 4 is not one place on one axis",
        ),
        (
            HEAD + "axes:\n- {key: seed, values: [" + ", ".join(map(str, range(101))) + "]}\n"
            "- {key: workload.train_tokens, values: [" + ", ".join(str(n + 1) for n in range(100)) + "]}\n",
            r"span 10,100 points; at most 10,000",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_place(study, text, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        load_study(study(text))
    assert "\n" not in str(caught.value)
    assert "--set" not in str(caught.value)


def test_an_override_of_an_axis_is_refused(study):
    with pytest.raises(UserError, match="--set seed=3: seed is an axis of the study"):
        load_study(study(HEAD + AXIS), ["seed=3"])


def test_a_missing_study_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read the study: No such file"):
        load_study(tmp_path / "none.yaml")


def test_a_study_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "study.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_study(tmp_path / "study.yaml")
