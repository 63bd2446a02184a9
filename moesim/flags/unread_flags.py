"""The flags of Megatron-LM that no field of a scenario takes: what becomes of each. Names as of megatron-core 0.19.

`HARMLESS` has those that change nothing in a simulated step, by the reason; `LEFT_OUT` those that do: the user is told,
and what would make another model, layout or memory of the step is refused. Any other flag is not known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A flag that has no field. what: what the simulated step lacks. unless: words at which it changes nothing.

    refused: whether it makes a model, a layout or a memory that no scenario expresses.
    """

    what: str
    unless: tuple[str, ...] = ()
    refused: bool = False


_HYBRID = LeftOut(what="Mamba and linear-attention layers are not modelled", refused=True)
_STACKS = LeftOut(what="encoder and decoder stacks are not modelled", refused=True)
_EACH_LAYER = LeftOut(what="layers that differ one by one are not modelled", refused=True)
_WEIGHT_SHARDS = LeftOut(what="tensor ranks that gather shards of weights are not modelled", refused=True)
_HOST_MEMORY = LeftOut(what="states and activations in the host's memory are not modelled", refused=True)
_LENGTHS = LeftOut(what="sequences of many lengths are not modelled", refused=True)
_RAMP = LeftOut(what="steps of a smaller batch at the beginning are not counted; global-batch-size is simulated")
_TENSOR = LeftOut(what="exchanges of tensor ranks are not hidden behind tiles of a GEMM")
_BF16_LAYERS = LeftOut(what="all layers compute in FP8")
_CHECKPOINT = LeftOut(what="sizes that only the checkpoint states are not read")

LEFT_OUT: Mapping[str, LeftOut] = MappingProxyType(
    {
        "--hybrid-layer-pattern": _HYBRID,
        "--hybrid-override-pattern": _HYBRID,
        "--mtp-hybrid-override-pattern": _HYBRID,
        "--is-hybrid-model": _HYBRID,
        "--linear-attention-freq": _HYBRID,
        "--experimental-attention-variant": LeftOut(
            what="linear attention is not modelled", unless=("dsa",), refused=True
        ),
        "--attention-output-gate": LeftOut(what="gates on attention's output are not modelled", refused=True),
        "--encoder-num-layers": _STACKS,
        "--decoder-num-layers": _STACKS,
        "--heterogeneous-layers-config-path": _EACH_LAYER,
        "--heterogeneous-layers-config-encoded-json": _EACH_LAYER,
        "--tensor-parallel-num-weight-shards": _WEIGHT_SHARDS,
        "--expert-tensor-parallel-num-weight-shards": _WEIGHT_SHARDS,
        "--num-distributed-optimizer-instances": LeftOut(
            what="optimizer states in shards among a part of the data-parallel ranks are not modelled",
            unless=("1",),
            refused=True,
        ),
        "--outer-dp-sharding-strategy": LeftOut(
            what="two levels of data-parallel shards are not modelled", unless=("no_shard",), refused=True
        ),
        "--use-tp-pp-dp-mapping": LeftOut(
            what="ranks are ordered tensor, context, data, pipeline; no scenario has another order", refused=True
        ),
        "--mtp-standalone": LeftOut(
            what="prediction layers on a stage of their own are not modelled; they are on the last one", refused=True
        ),
        "--optimizer-cpu-offload": _HOST_MEMORY,
        "--cpu-offloading-num-layers": LeftOut(what=_HOST_MEMORY.what, unless=("0",), refused=True),
        "--fine-grained-activation-offloading": _HOST_MEMORY,
        "--moe-paged-stash": _HOST_MEMORY,
        "--perform-rl-step": LeftOut(what="steps of reinforcement learning are not modelled", refused=True),
        "--hybrid-context-parallel": _LENGTHS,
        "--max-seqlen-per-dp-cp-rank": _LENGTHS,
        "--sft": LeftOut(what="sequences of many lengths are not modelled: all have seq-length tokens"),
        "--yaml-cfg": LeftOut(what="name the YAML file itself in place of this script", refused=True),
        "--hierarchical-context-parallel-sizes": LeftOut(what="context ranks exchange in one ring"),
        "--cp-comm-type": LeftOut(what="context ranks exchange keys and values in a ring", unless=("p2p",)),
        "--rampup-batch-size": _RAMP,
        "--step-batch-size-schedule": _RAMP,
        "--defer-embedding-wgrad-compute": LeftOut(what="the head's gradients of weights are not put off"),
        "--overlap-param-gather-with-optimizer-step": LeftOut(
            what="the first gather of updated weights is not hidden behind the optimizer"
        ),
        "--tp-comm-overlap": _TENSOR,
        "--first-last-layers-bf16": _BF16_LAYERS,
        "--te-precision-config-file": LeftOut(what="the number formats that the file states are not read"),
        "--fp8-output-proj": LeftOut(what="the head computes in bf16"),
        "--fp32-residual-connection": LeftOut(what="the residual stream is bf16"),
        "--mtp-use-repeated-layer": LeftOut(what="prediction layers have weights of their own"),
        "--moe-expert-rank-capacity-factor": LeftOut(what="rows beyond a rank's budget are not dropped"),
        "--distribute-saved-activations": LeftOut(what="kept inputs of layers are not cut among tensor ranks"),
        "--mlp-chunks-for-training": LeftOut(what="feed-forward networks run in one piece", unless=("1",)),
        "--torch-fsdp2-no-reshard-after-forward": LeftOut(what="weights are gathered again for the backward pass"),
        "--optimizer": LeftOut(what="the optimizer is priced as Adam", unless=("adam",)),
        "--spec": LeftOut(what="the layers of the specification are not read; those of a plain GPT are simulated"),
        "--use-checkpoint-args": _CHECKPOINT,
        "--use-mp-args-from-checkpoint-args": _CHECKPOINT,
        "--freeze-all-layers": LeftOut(what="all weights are trained"),
        "--use-mup": LeftOut(what="widths are those of the flags"),
        "--moe-router-force-biased": LeftOut(what="experts are not forced by a bias"),
        "--moe-apply-probs-on-input": LeftOut(what="gates weigh the experts' outputs"),
        "--dsa-indexer-topk-freq": LeftOut(what="every layer has an indexer", unless=("1",), refused=True),
    }
)

_NUMERICS = "changes numbers, not work"
_HYPER = "how the optimizer moves the weights: no work of a step"
_START = "how weights begin, and checkpoints"
_DATA = "which text is read"
_LOGS = "logs, profiles, evaluation and their intervals"
_KERNELS = "kernels that megatron has anyway, or that no switch tells apart"
_PROCESSES = "how processes start, find each other and end"
_OTHERS = "of other programs: serving, BERT, vision, retrieval, reinforcement learning, distillation"
_POSITIONS = "how positions are told: their table is not counted"

HARMLESS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        _NUMERICS: (
            "--normalization", "--norm-epsilon", "--apply-layernorm-1p", "--qk-l2-norm",
            "--qk-clip", "--qk-clip-alpha", "--qk-clip-threshold", "--hidden-dropout",
            "--glu-linear-offset", "--activation-func-clamp-value", "--apply-residual-connection-post-layernorm",
            "--attention-softmax-in-fp32", "--apply-query-key-layer-scaling", "--no-query-key-layer-scaling",
            "--fp16-lm-cross-entropy", "--calculate-per-token-loss", "--disable-bf16-reduced-precision-matmul",
            "--squared-relu", "--openai-gelu", "--onnx-safe", "--moe-z-loss-coeff",
            "--moe-input-jitter-eps", "--mscale", "--mscale-all-dim", "--mtp-loss-scaling-factor",
            "--mtp-detach-heads", "--dsa-indexer-loss-coeff", "--dsa-indexer-use-sparse-loss",
            "--dsa-indexer-rope-interleaved", "--no-dsa-indexer-rotate-activation",
            "--disable-dsa-indexer-rotate-activation", "--no-dsa-indexer-scoring-relu",
            "--disable-dsa-indexer-scoring-relu", "--dsa-indexer-k-norm-epsilon", "--dsa-indexer-k-norm-fp32",
            "--dsa-indexer-skip-topk-offset", "--fp8-margin", "--fp8-interval", "--fp8-amax-history-len",
            "--fp8-amax-compute-algo", "--no-fp8-wgrad", "--disable-fp8-wgrad", "--fp8-quantizer-factory",
            "--num-layers-at-start-in-bf16", "--num-layers-at-end-in-bf16", "--loss-scale", "--initial-loss-scale",
            "--min-loss-scale", "--loss-scale-window", "--hysteresis", "--moe-router-quantile-balancing-ema",
            "--deterministic-mode", "--moe-enable-routing-replay", "--no-gradient-reduce-div-fusion",
            "--ddp-average-in-collective",
        ),
        _POSITIONS: (
            "--max-position-embeddings", "--position-embedding-type", "--no-position-embedding", "--no-rope-freq",
            "--use-rotary-position-embeddings", "--use-rope-scaling", "--mrope-section",
        ),
        _HYPER: (
            "--lr", "--min-lr", "--weight-decay", "--start-weight-decay", "--end-weight-decay", "--adam-beta1",
            "--weight-decay-incr-style", "--apply-wd-to-qk-layernorm", "--adam-beta2", "--adam-eps", "--sgd-momentum",
            "--no-weight-decay-cond-type", "--warmup", "--decoupled-lr", "--decoupled-min-lr",
            "--override-opt-param-scheduler", "--override-opt_param-scheduler",
            "--use-checkpoint-opt-param-scheduler", "--use-checkpoint-opt_param-scheduler",
            "--dump-param-to-param-group-map",
        ),
        _START: (
            "--init-method-std", "--embedding-init-method-std", "--init-model-with-meta-device", "--seed",
            "--init-method-xavier-uniform", "--no-initialization", "--use-cpu-initialization",
            "--data-parallel-random-init", "--save", "--load", "--finetune", "--pretrained-checkpoint",
            "--auto-detect-ckpt-format", "--async-save", "--async-strategy", "--replication",
            "--exit-on-missing-checkpoint", "--verify-integrity", "--override-ckpt-iteration", "--use-dist-ckpt",
            "--use-persistent-ckpt-worker", "--load-main-params-from-ckpt", "--moe-use-upcycling",
            "--moe-upcycling-granularity", "--no-use-tokenizer-model-from-checkpoint-args",
            "--disable-use-tokenizer-model-from-checkpoint-args", "--no-strict-fsdp-dtensor-load",
            "--disable-strict-fsdp-dtensor-load", "--no-stream-ckpt-dequant", "--disable-stream-ckpt-dequant",
            "--no-ckpt-fully-parallel-save", "--no-ckpt-load-validate-sharding-integrity",
            "--disable-ckpt-load-validate-sharding-integrity", "--distrib-optim-fully-reshardable-mem-efficient",
        ),
        _DATA: (
            "--data-path", "--split", "--train-data-path", "--valid-data-path", "--test-data-path",
            "--data-args-path", "--per-split-data-args-path", "--per-dataset-sequences-path", "--data-cache-path",
            "--mock-data", "--no-mmap-bin-files", "--num-workers", "--sample-rate", "--phase-transition-iterations",
            "--eod-mask-loss", "--reset-position-ids", "--reset-attention-mask", "--vocab-file", "--merge-file",
            "--vocab-extra-ids", "--no-create-attention-mask-in-dataloader", "--num-dataset-builder-threads",
            "--object-storage-cache-path", "--mid-level-dataset-surplus", "--allow-ambiguous-pad-tokens",
            "--trust-remote-code", "--chat-template", "--disable-pad-vocab-size", "--decoder-seq-length",
            "--null-tokenizer-eod-id", "--null-tokenizer-pad-id", "--iterations-to-skip",
            "--sft-tokenizer-prompt-format", "--enable-msc", "--disable-msc",
        ),
        _LOGS: (
            "--profile", "--use-pytorch-profiler", "--record-memory-history", "--memory-snapshot-path",
            "--record-shapes", "--nvtx-ranges", "--test-mode", "--full-validation", "--skip-train",
            "--multiple-validation-sets", "--validation-set-names", "--start-eval-at-iter", "--logging-level",
            "--no-log-loss-scale-to-tensorboard", "--disable-log-loss-scale-to-tensorboard",
            "--no-barrier-with-level-1-timing", "--moe-per-layer-logging", "--disable-straggler-on-startup",
            "--config-logger-dir", "--check-weight-hash-across-dp-replicas-interval", "--gpu-sniff-test-interval",
            "--check-for-spiky-loss", "--check-for-large-grads", "--no-check-for-nan-in-loss-and-grad",
            "--result-rejected-tracker-filename", "--run-workload-inspector-server", "--no-one-logger",
            "--rerun-mode", "--enable-one-logger", "--app-tag-run-name", "--app-tag-run-version",
        ),
        _KERNELS: (
            "--use-mcore-models",
            "--use-flash-attn", "--flash-attention-version",
            "--cross-entropy-fusion-impl", "--no-masked-softmax-fusion",
            "--no-bias-dropout-fusion", "--no-persist-layer-norm",
            "--use-fused-weighted-squared-relu",
            "--use-transformer-engine-op-fuser", "--use-te-activation-func", "--use-grouped-gemm-for-shared-expert",
            "--use-grouped-gemm-for-dense-mlp", "--moe-single-grouped-weight", "--moe-single-grouped-bias",
            "--moe-shared-expert-glu-interleave-size", "--moe-mlp-glu-interleave-size", "--mla-down-proj-fusion",
            "--cache-mla-latents", "--dsa-kernel-backend", "--batch-invariant-mode", "--disable-jit-fuser",
            "--moe-router-padding-for-quantization", "--moe-router-padding-for-fp8",
            "--moe-permute-fusion-into-hybridep",
            "--moe-hybridep-pad-uneven-dispatch-inputs", "--moe-hybridep-num-blocks-permute",
            "--moe-hybridep-num-blocks-unpermute", "--moe-hybridep-num-sms-preprocessing",
            "--moe-ncclep-static-shape", "--moe-ncclep-zero-copy", "--high-priority-a2a-comm-stream",
            "--ep-overlap-early-attn-memory-release", "--no-overlap-p2p-communication",
            "--overlap-p2p-communication-warmup-flush", "--use-ring-exchange-p2p", "--wgrad-deferral-limit",
            "--microbatch-group-size-per-virtual-pipeline-stage", "--no-clone-scatter-output-in-embedding",
            "--disable-clone-scatter-output-in-embedding", "--tp-comm-overlap-cfg", "--tp-comm-overlap-rs-dgrad",
            "--tp-comm-bootstrap-backend", "--keep-fp8-transpose-cache", "--reuse-grad-buf-for-mxfp8-param-ag",
            "--fp4-recipe", "--fp4-param-gather", "--fp4-quantizer-factory", "--optimizer-cuda-graph",
            "--no-align-grad-reduce", "--disable-align-grad-reduce", "--no-align-param-gather",
            "--no-use-layer-wise-param-layout", "--use-nccl-ub", "--disable-symmetric-registration", "--use-sharp",
            "--sharp-enabled-group", "--fsdp-manual-registration", "--create-all-gather-group",
            "--fsdp-double-buffer", "--fsdp-db-use-persist-buf-on-alloc-fail", "--suggested-communication-unit-size",
            "--enable-full-sharding-in-hsdp", "--high-priority-stream-groups", "--symmetric-ar-type", "--rope-type",
            "--empty-unused-memory-level", "--te-rng-tracker", "--inference-rng-tracker", "--enable-experimental",
            "--manual-gc", "--no-manual-gc-eval", "--disable-manual-gc-eval", "--manual-gc-interval",
            "--train-sync-interval", "--moe-use-legacy-grouped-gemm", "--use-kitchen-attention",
            "--kitchen-attention-backend", "--ddp-reduce-scatter-with-fp32-accumulation",
            "--use-torch-optimizer-for-cpu-offload", "--optimizer-offload-fraction", "--offload-modules",
            "--overlap-cpu-optimizer-d2h-h2d", "--no-pin-cpu-grads", "--no-pin-cpu-params",
            "--min-offloaded-tensor-size", "--delay-offload-until-cuda-graph",
            "--delta-offload-bytes-across-pp-ranks", "--activation-offload-fraction",
            "--cpu-offloading-retain-pinned-cpu-buffers", "--fine-grained-offloading-max-inflight-offloads",
            "--pipeline-model-parallel-comm-backend", "--no-async-tensor-model-parallel-allreduce",
        ),
        _PROCESSES: (
            "--distributed-backend", "--distributed-timeout-minutes", "--distributed-timeout-seconds-after-init",
            "--local-rank", "--lazy-mpu-init", "--nccl-communicator-config-path", "--disable-gloo-process-groups",
            "--node-rank", "--master-addr", "--master-port", "--rdzv-id", "--rdzv-backend", "--rdzv-endpoint",
            "--rdzv-conf", "--tee", "--role", "--max-restarts", "--redirects", "--log-dir", "--standalone",
            "--exit-interval", "--exit-duration-in-mins", "--exit-signal", "--exit-signal-handler",
            "--exit-signal-handler-for-dataloader", "--exit-signal-handler-for-training", "--fake-process-group",
            "--adlr-autoresume", "--adlr-autoresume-interval", "--inprocess-restart", "--calc-ft-timeouts",
            "--decrease-batch-size-if-needed", "--enable-ft-package", "--virtual-local-rank", "--local-addr",
        ),
        _OTHERS: (
            "--flash-decode", "--nccl-all-reduce-for-prefill", "--mlp-chunks-for-prefill", "--max-tokens-to-oom",
            "--output-bert-embeddings", "--bert-embedder-type", "--bert-no-binary-head", "--use-legacy-static-engine",
            "--decode-only-cuda-graphs", "--enable-chunked-prefill", "--num-speculative-tokens",
            "--use-same-sampling-seed-across-dp-ranks", "--moe-pad-experts-for-cuda-graph-inference",
            "--refit-method", "--langrl-env-config", "--mask-prob", "--short-seq-prob", "--biencoder-projection-dim",
            "--biencoder-shared-query-context-model", "--bert-load", "--titles-data-path", "--query-in-block-prob",
            "--use-one-sent-docs", "--evidence-data-path", "--block-data-path", "--embedding-path", "--num-classes",
            "--img-h", "--img-w", "--num-channels", "--patch-dim", "--classes-fraction", "--data-per-class-fraction",
            "--no-data-sharding", "--head-lr-mult", "--swin-backbone-type", "--mask-type", "--mask-factor",
            "--iter-per-epoch", "--model-parallel-size", "--batch-size", "--checkpoint-activations",
        ),
    }
)  # fmt: skip
PREFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        _NUMERICS: ("--megatron-fsdp-", "--ddp-param-name-"),
        _POSITIONS: ("--rotary-", "--rope-", "--yarn-", "--no-yarn-", "--relative-attention-"),
        _HYPER: ("--lr-", "--muon-", "--lion-", "--mup-"),
        _START: ("--ckpt-", "--async-ckpt-", "--dist-ckpt-", "--non-persistent-", "--save-",
                 "--persistent-save-", "--no-save-",
                 "--no-load-", "--replication-"),
        _DATA: ("--tokenizer-", "--no-tokenizer-", "--disable-tokenizer-", "--tiktoken-", "--fim-", "--dataloader-"),
        _LOGS: ("--log-", "--wandb-", "--tensorboard-", "--eval-", "--timing-", "--profile-", "--pytorch-profiler-",
                "--one-logger-", "--straggler-", "--moe-routing-trace-"),
        _KERNELS: ("--cuda-graph-", "--tp-comm-", "--no-tp-comm-", "--disable-tp-comm-", "--moe-paged-stash-",
                   "--ddp-"),
        _PROCESSES: ("--flight-recorder-", "--no-flight-recorder-", "--disable-flight-recorder-", "--inprocess-",
                     "--ft-", "--fault-injector-", "--error-injection-"),
        _OTHERS: ("--inference-", "--no-inference-", "--rl-", "--no-rl-", "--grpo-", "--logits-", "--dino-",
                  "--vision-",
                  "--ict-", "--retriever-", "--indexer-", "--mamba-", "--linear-", "--disable-mamba-"),
    }
)  # fmt: skip


def harmless(name: str) -> str | None:
    """Why a flag changes nothing in a simulated step; None for one that is not known to."""
    for reason, names in HARMLESS.items():
        if name in names:
            return reason
    for reason, prefixes in PREFIXES.items():
        if name.startswith(prefixes):
            return reason
    return None
