"""A transformers model's routing is what its routers chose: recomputed here from their weights and what they read.

Legend: L layers, T tokens, E experts, K selections, G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesim.cli import main
from moesim.errors import UserError
from moesim.routing.hf import FAMILIES, ReadingOptions, record_model
from moesim.run import simulate
from moesim.scenario import scenario_from_mapping

transformers = pytest.importorskip("transformers")

Floats = np.ndarray[Any, np.dtype[np.float64]]
Chosen = tuple[Floats, Floats]  # what ranks the experts [T, E], and the gate that each would have in its token [T, E]
TEXT = "The routers of a mixture of experts send every token to a few of many experts, and so to a few devices. " * 9
TOKENS, LENGTH = 96, 48


def _softmax(logits: Floats) -> Floats:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _sigmoid(logits: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-logits)))


def _best(rank_TE: Floats, top_k: int) -> np.ndarray[Any, Any]:
    """True for the K experts of the highest rank."""
    return rank_TE >= np.sort(rank_TE, axis=1)[:, [-top_k]]


def _normalised(scores_TE: Floats, rank_TE: Floats, top_k: int) -> Floats:
    kept = np.where(_best(rank_TE, top_k), scores_TE, 0.0)
    return np.asarray(kept / kept.sum(axis=1, keepdims=True))


def _within_groups(rank_TE: Floats, *, groups: int, limit: int, best_of: int) -> Floats:
    """Ranks, minus infinity outside of the groups with the highest sum of their best."""
    tokens, experts = rank_TE.shape
    sorted_TGE = np.sort(rank_TE.reshape(tokens, groups, -1), axis=2)
    kept_TG = _best(sorted_TGE[:, :, -best_of:].sum(axis=2), limit)
    return np.where(np.repeat(kept_TG, experts // groups, axis=1), rank_TE, -np.inf)


def softmax_of_all(logits: Floats, bias: Floats, top_k: int) -> Chosen:
    return _softmax(logits) + bias, _softmax(logits)


def softmax_normalised(logits: Floats, bias: Floats, top_k: int) -> Chosen:
    rank = _softmax(logits) + bias
    return rank, _normalised(_softmax(logits), rank, top_k)


def softmax_of_the_chosen(logits: Floats, bias: Floats, top_k: int) -> Chosen:
    """gpt-oss has its bias in the logits."""
    biased = logits + bias
    return biased, _softmax(np.where(_best(biased, top_k), biased, -np.inf))


def deepseek_v2(logits: Floats, bias: Floats, top_k: int) -> Chosen:
    rank = _within_groups(_softmax(logits), groups=4, limit=2, best_of=1)
    return rank, 16.0 * _softmax(logits)


def deepseek_v3(logits: Floats, bias: Floats, top_k: int) -> Chosen:
    rank = _within_groups(_sigmoid(logits) + bias, groups=4, limit=2, best_of=2)
    return rank, 2.5 * _normalised(_sigmoid(logits), rank, top_k)


def sigmoid_normalised(logits: Floats, bias: Floats, top_k: int) -> Chosen:
    rank = _sigmoid(logits) + bias
    return rank, _normalised(_sigmoid(logits), rank, top_k)


def sigmoid_of_all(logits: Floats, bias: Floats, top_k: int) -> Chosen:
    return logits, _sigmoid(logits)


def sparse_mixer(logits: Floats, bias: Floats, top_k: int) -> Chosen:
    """Phi: each of two experts in turn is weighed against those within 2 % of it (arXiv 2409.12136, jitter 0.01)."""
    gates = np.zeros_like(logits)
    left = logits.copy()
    for _ in range(top_k):
        best = left.argmax(axis=1)
        highest = left.max(axis=1, keepdims=True)
        near = (highest - left) / np.maximum(np.abs(logits), highest) <= 0.02
        weights = _softmax(np.where(near, left, -np.inf))
        rows = np.arange(len(logits))
        gates[rows, best] = weights[rows, best]
        left[rows, best] = -np.inf
    return logits, gates


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small model: name of its configuration, what is special in it, where its router's weight lies, and its law."""

    config: str
    law: Callable[[Floats, Floats, int], Chosen]
    router: str
    top_k: int
    more: Mapping[str, Any] = field(default_factory=dict)
    experts: int = 8
    weight: str = "weight"
    bias: str | None = None  # of the router, or of the block around it
    layers: tuple[int, ...] = (0, 1)
    head: bool = True  # whether transformers has it with a head for language
    known: bool = True  # whether its routers are in the table of families


# The router of moesim whose formula the gates follow; "recorded" where it has none.
KIND = {
    softmax_normalised: "topk_softmax",
    softmax_of_the_chosen: "topk_softmax",
    softmax_of_all: "deepseek_moe",
    deepseek_v2: "deepseek_v2",
    deepseek_v3: "deepseek_v3",
    sigmoid_normalised: "deepseek_v3",
    sigmoid_of_all: "recorded",
    sparse_mixer: "recorded",
}
MLA = {
    "moe_intermediate_size": 32, "n_shared_experts": 1, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 4,
    "topk_group": 2,
}  # fmt: skip
ONE_GROUP = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 32, "n_shared_experts": 1, "norm_topk_prob": True,
}  # fmt: skip
QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
CASES = [
    Case(config="Mixtral", law=softmax_normalised, router="mlp.gate", top_k=2, more=MIXTRAL),
    Case(
        config="Qwen2Moe", law=softmax_of_all, router="mlp.gate", top_k=2,
        more=QWEN | {"shared_expert_intermediate_size": 32, "norm_topk_prob": False},
    ),
    Case(
        config="Qwen3Moe", law=softmax_normalised, router="mlp.gate", top_k=2, layers=(1,),
        more=QWEN | {"norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    Case(
        config="Olmoe", law=softmax_of_all, router="mlp.gate", top_k=3,
        more={"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False, "eos_token_id": 1},
    ),
    Case(
        config="DeepseekV2", law=deepseek_v2, router="mlp.gate", top_k=3, layers=(1,),
        more=MLA | {
            "n_routed_experts": 8, "num_experts_per_tok": 3, "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0, "q_lora_rank": None, "head_dim": 8,
        },
    ),
    Case(
        config="DeepseekV3", law=deepseek_v3, router="mlp.gate", top_k=4, experts=16, layers=(1,),
        bias="e_score_correction_bias",
        more=MLA | {
            "n_routed_experts": 16, "num_experts_per_tok": 4, "routed_scaling_factor": 2.5, "q_lora_rank": 16,
            "head_dim": 8,
        },
    ),
    Case(
        config="Glm4Moe", law=sigmoid_normalised, router="mlp.gate", top_k=3, layers=(1,), more=ONE_GROUP,
        bias="e_score_correction_bias",
    ),
    Case(
        config="Dots1", law=sigmoid_normalised, router="mlp.gate", top_k=3, layers=(1,), more=ONE_GROUP,
        bias="e_score_correction_bias",
    ),
    Case(
        config="GptOss", law=softmax_of_the_chosen, router="mlp.router", top_k=2, bias="bias",
        more=MIXTRAL | {
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    Case(config="GraniteMoe", law=softmax_of_the_chosen, router="block_sparse_moe.router", top_k=2, more=MIXTRAL),
    Case(config="Phimoe", law=sparse_mixer, router="mlp.router", top_k=2, more=MIXTRAL),
    Case(
        config="Llama4Text", law=sigmoid_of_all, router="feed_forward.router", top_k=1,
        more={
            "num_local_experts": 8, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 96,
        },
    ),
    Case(
        config="Ernie4_5_Moe", law=softmax_normalised, router="mlp.gate", top_k=3, layers=(1,),
        bias="moe_statics.e_score_correction_bias",
        more={
            "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 32, "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
        },
    ),
    Case(
        config="HunYuanMoEV1", law=softmax_normalised, router="mlp.gate", top_k=2, weight="wg.weight",
        more={"num_experts": 8, "moe_topk": 2},
    ),
    Case(config="MiniMax", law=softmax_normalised, router="mlp.gate", top_k=2, more=MIXTRAL),
    Case(
        config="MiniMaxM2", law=sigmoid_normalised, router="mlp.gate", top_k=2, bias="e_score_correction_bias",
        more=MIXTRAL | {"bos_token_id": 1, "eos_token_id": 1},
    ),
    Case(
        config="Lfm2Moe", law=sigmoid_normalised, router="feed_forward.gate", top_k=2, layers=(1,), bias="expert_bias",
        more=QWEN | {
            "num_dense_layers": 1, "layer_types": ["conv", "full_attention"], "norm_topk_prob": True,
            "use_expert_bias": True, "routed_scaling_factor": 1.0,
        },
    ),
    Case(
        config="Qwen3Next", law=softmax_normalised, router="mlp.gate", top_k=2,
        more=QWEN | {
            "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16, "norm_topk_prob": True,
        },
    ),
    Case(
        config="Qwen3_5MoeText", law=softmax_normalised, router="mlp.gate", top_k=2,
        more=QWEN | {
            "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        },
    ),
    Case(config="Qwen3VLMoeText", law=softmax_normalised, router="mlp.gate", top_k=2, head=False, more=QWEN),
    Case(
        config="FlexOlmo", law=softmax_of_all, router="mlp.gate", top_k=2,
        more={
            "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False, "eos_token_id": 1, "pad_token_id": 0,
        },
    ),
    Case(
        config="DeepseekV32", law=deepseek_v3, router="mlp.gate", top_k=4, experts=16, layers=(1,),
        bias="e_score_correction_bias",
        more=MLA | {
            "n_routed_experts": 16, "num_experts_per_tok": 4, "routed_scaling_factor": 2.5, "q_lora_rank": 16,
            "head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
        },
    ),
    Case(
        config="ExaoneMoe", law=sigmoid_normalised, router="mlp.gate", top_k=3, layers=(1,),
        bias="e_score_correction_bias",
        more=ONE_GROUP | {"num_experts": 8, "num_shared_experts": 1, "layer_types": ["full_attention"] * 2,
            "routed_scaling_factor": 1.0},
    ),
    Case(
        config="SolarOpen", law=sigmoid_normalised, router="mlp.gate", top_k=3,
        bias="e_score_correction_bias", more=ONE_GROUP,
    ),
    Case(
        config="Glm4MoeLite", law=sigmoid_normalised, router="mlp.gate", top_k=3, layers=(1,),
        bias="e_score_correction_bias",
        more=MLA | ONE_GROUP | {"q_lora_rank": 16, "routed_scaling_factor": 1.0},
    ),
    Case(config="GraniteMoeShared", law=softmax_of_the_chosen, router="block_sparse_moe.router", top_k=2, more=MIXTRAL),
    Case(
        config="NemotronH", law=sigmoid_normalised, router="mixer.gate", top_k=3, layers=(1,),
        bias="e_score_correction_bias",
        more=ONE_GROUP | {"layers_block_type": ["attention", "moe"], "moe_shared_expert_intermediate_size": 32,
            "routed_scaling_factor": 1.0},
    ),
    Case(
        config="MiMoV2Flash", law=sigmoid_normalised, router="mlp.gate", top_k=3, layers=(1,),
        bias="e_score_correction_bias",
        more=ONE_GROUP | {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention"] * 2,
            "routed_scaling_factor": 1.0},
    ),
    Case(
        config="Jamba", law=softmax_of_all, router="feed_forward.router", top_k=2, layers=(1,), known=False,
        more={
            "num_experts": 8, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 2, "mamba_d_state": 4, "use_mamba_kernels": False,
        },
    ),
    Case(
        config="Afmoe", law=sigmoid_normalised, router="mlp.router", top_k=2, layers=(1,), bias="expert_bias",
        weight="gate.weight", more=QWEN | {"num_dense_layers": 1, "route_scale": 1.0},
    ),
]  # fmt: skip
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 128,
}  # fmt: skip


def _inner(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _bias_of(case: Case, model: Any, layer: int) -> torch.Tensor | None:
    """Of the router, or of the block that holds it."""
    if case.bias is None:
        return None
    router = model.get_submodule(f"layers.{layer}.{case.router}")
    block = model.get_submodule(f"layers.{layer}.{case.router.rpartition('.')[0]}")
    owner = router if hasattr(router, case.bias.split(".")[0]) else block
    return _inner(owner, case.bias)  # type: ignore[no-any-return]


def build(case: Case, folder: Path) -> None:
    """A random model whose routers choose clearly and have a bias where the family has one."""
    torch.manual_seed(5)
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    config = getattr(transformers, f"{case.config}Config")(**(SIZES | dict(case.more)))
    model = (transformers.AutoModelForCausalLM if case.head else transformers.AutoModel).from_config(config)
    body = model.model if case.head else model
    with torch.no_grad():
        for layer in case.layers:
            router = body.get_submodule(f"layers.{layer}.{case.router}")
            _inner(router, case.weight).normal_(std=0.15)
            bias = _bias_of(case, body, layer)
            if bias is not None:
                bias.normal_(std=0.1)
    model.save_pretrained(folder)
    transformers.utils.logging.set_verbosity(verbosity)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(autouse=True)
def _silent() -> Any:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def read_by_routers(case: Case, folder: Path) -> dict[int, tuple[Floats, Floats]]:
    """Logits [T, E] and bias [E] of every layer in float64, from what its router is given and its weights."""
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    seen: dict[int, Floats] = {}

    def watch(layer: int) -> Callable[[Any, Any], None]:
        def hook(module: Any, inputs: Any) -> None:
            seen[layer] = inputs[0].reshape(-1, SIZES["hidden_size"]).double().numpy()

        return hook

    for layer in case.layers:
        model.get_submodule(f"layers.{layer}.{case.router}").register_forward_pre_hook(watch(layer))
    ids = torch.tensor(list(TEXT.encode()[:TOKENS])).reshape(-1, LENGTH)
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    found = {}
    for layer in case.layers:
        weight = _inner(model.get_submodule(f"layers.{layer}.{case.router}"), case.weight).detach().double().numpy()
        bias = _bias_of(case, model, layer)
        no_bias = np.zeros(case.experts)
        found[layer] = seen[layer] @ weight.T, no_bias if bias is None else bias.detach().double().numpy().ravel()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.config)
def test_the_experts_are_those_of_the_documented_score(case: Case, tmp_path: Path, text: Path) -> None:
    build(case, tmp_path / "model")
    reading = ReadingOptions(tokens=TOKENS, sequence_length=LENGTH, batch=2, device="cpu")
    trace = record_model(tmp_path / "model", text, reading=reading)
    assert trace.provenance["layers"] == list(case.layers)
    assert (trace.router.num_experts, trace.router.top_k) == (case.experts, case.top_k)
    assert trace.router.kind == (KIND[case.law] if case.known else "recorded")
    assert any("no known family" in note for note in trace.provenance["notes"]) != case.known  # type: ignore[union-attr]
    assert (trace.num_sequences, trace.sequence_length) == (TOKENS // LENGTH, LENGTH)
    for number, (logits_TE, bias_E) in enumerate(read_by_routers(case, tmp_path / "model").values()):
        rank_TE, gates_TE = case.law(logits_TE, bias_E, case.top_k)
        ids_TK = trace.final.expert_ids_LSTK[number].reshape(-1, case.top_k)
        ordered_TE = np.sort(rank_TE, axis=1)
        clear_T = ordered_TE[:, -case.top_k] - ordered_TE[:, -case.top_k - 1] > 1e-5
        assert clear_T.mean() > 0.9
        wanted_TK = np.argsort(-rank_TE, axis=1)[:, : case.top_k]
        assert (np.sort(ids_TK, axis=1) == np.sort(wanted_TK, axis=1))[clear_T].all()
        gates_TK = trace.final.gates_LSTK[number].reshape(-1, case.top_k)
        wanted_gates_TK = np.take_along_axis(gates_TE, ids_TK.astype(int), axis=1)
        assert np.allclose(gates_TK[clear_T], wanted_gates_TK[clear_T], rtol=2e-3, atol=1e-5)


def test_every_family_states_where_its_routers_are() -> None:
    """The places of the table are those where transformers has them, for every family that is built here."""
    place = {name: family.place for family in FAMILIES for name in family.classes}
    for case in (each for each in CASES if each.known):
        built = [name for name in place if name.lower().startswith(case.config.lower().removesuffix("text"))]
        assert case.router in {place[name] for name in built}, case.config
    known = {name for family in FAMILIES for name in family.classes}
    assert len(known) == sum(len(family.classes) for family in FAMILIES)


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    build(CASES[0], tmp_path / "mixtral")
    return tmp_path / "mixtral"


def test_the_verb_writes_a_trace_that_is_simulated(
    mixtral: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.npz"
    flags = ["--tokens", "96", "--sequence-length", "48", "--device", "cpu", "--out", str(out)]
    assert main(["trace", "hf", str(mixtral), "--text", str(text), *flags]) == 0
    said = capsys.readouterr().out
    assert "bytes modulo 256" in said
    assert "MixtralTopKRouter" in said
    scenario = scenario_from_mapping(
        {
            "schema_version": 1,
            "name": "hooked",
            "model": {"hf_config": str(mixtral / "config.json")},
            "routing": {"kind": "trace", "file": str(out)},
            "cluster": {"gpu": "h100", "nodes": 1, "gpus_per_node": 2},
            "parallelism": {"data": 2, "expert": 2},
            "workload": {"kind": "training", "sequence_length": 48, "micro_batch": 1, "global_batch": 2},
            "uncertainty": {"samples": 1},
        }
    )  # fmt: skip
    result = simulate(scenario).result
    assert result["router"]["rests_on"] == "tokens of mixtral (transformers)"
    assert main(["trace", "hf", str(mixtral), "--text", str(text), *flags]) == 1
    assert "--force" in capsys.readouterr().err


def test_batches_change_nothing(mixtral: Path, text: Path) -> None:
    seen: list[tuple[int, int]] = []
    traces = [
        record_model(
            mixtral,
            text,
            reading=ReadingOptions(tokens=96, sequence_length=24, batch=batch, device="cpu"),
            progress=lambda done, total: seen.append((done, total)),
        )
        for batch in (1, 3)
    ]
    assert (traces[0].final.expert_ids_LSTK == traces[1].final.expert_ids_LSTK).all()
    assert seen == [(24, 96), (48, 96), (72, 96), (96, 96), (72, 96), (96, 96)]


def test_a_tokenizer_in_the_folder_makes_the_tokens(mixtral: Path, text: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = sorted(set(TEXT.replace(".", " .").replace(",", " ,").split()))
    table = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: n for n, w in enumerate(["?", *words])}, unk_token="?")
    )
    table.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=table, unk_token="?").save_pretrained(mixtral)
    seen: list[Any] = []
    reading = ReadingOptions(tokens=40, sequence_length=20, device="cpu")
    original = transformers.MixtralModel.forward
    try:
        transformers.MixtralModel.forward = lambda self, input_ids, **rest: (
            seen.append(input_ids),
            original(self, input_ids=input_ids, **rest),
        )[1]
        trace = record_model(mixtral, text, reading=reading)
    finally:
        transformers.MixtralModel.forward = original
    wanted = [1 + words.index(word) for word in TEXT.replace(".", " .").replace(",", " ,").split()[:40]]
    assert torch.cat(seen).ravel().tolist() == wanted
    assert trace.provenance["notes"] == []


def _refused(folder: Path, text: Path, **reading: Any) -> str:
    with pytest.raises(UserError) as caught:
        record_model(folder, text, reading=ReadingOptions(**({"device": "cpu", "tokens": 96} | reading)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_dense_model_is_refused(tmp_path: Path, text: Path) -> None:
    config = transformers.LlamaConfig(**SIZES)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    assert "the model is dense (llama: no routers)" in _refused(tmp_path / "dense", text)


def test_a_model_of_unknown_routers_names_them(tmp_path: Path, text: Path) -> None:
    config = transformers.JetMoeConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2, kv_channels=16)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "jetmoe")
    assert "no router that is known" in _refused(tmp_path / "jetmoe", text)


def test_folders_that_are_none_are_one_line(mixtral: Path, text: Path, tmp_path: Path) -> None:
    assert "no such folder" in _refused(tmp_path / "nowhere", text)
    assert "is no folder" in _refused(text, text)
    assert "has no config.json" in _refused(tmp_path, text)
    bad = tmp_path / "bad"
    bad.mkdir()
    for content, complaint in (("{", "no JSON"), ("{}", "names no model_type"), ('{"model_type": "x"}', "safetensors")):
        (bad / "config.json").write_text(content)
        assert complaint in _refused(bad, text)
    (bad / "model.safetensors").write_bytes(b"\x08")
    assert "cannot load it" in _refused(bad, text)
    (bad / "config.json").write_text((mixtral / "config.json").read_text())
    assert "cannot load it" in _refused(bad, text)


def test_weights_that_are_missing_would_be_random_and_are_refused(mixtral: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(mixtral / "model.safetensors")
    lost = next(name for name in weights if "gate" in name and "layers.1." in name)
    save_file({name: w for name, w in weights.items() if name != lost}, mixtral / "model.safetensors", {"format": "pt"})
    assert "weights are missing" in _refused(mixtral, text)


def test_what_the_text_and_the_flags_say_wrong_is_one_line(mixtral: Path, text: Path, tmp_path: Path) -> None:
    assert "less than one sequence of 100" in _refused(mixtral, text, sequence_length=100)
    assert "exceeds the 128 positions" in _refused(mixtral, text, sequence_length=200)
    assert "--device cudda" in _refused(mixtral, text, device="cudda")
    assert "cannot be read" in _refused(mixtral, tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "is empty" in _refused(mixtral, tmp_path / "empty.txt")


def test_without_transformers_one_line_says_what_to_install(
    mixtral: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "pip install 'moesim[hf]'" in _refused(mixtral, text)
