"""Prints what each kernel of decoding rests on: its source, errors of rows kept out, floor, and shares of the peaks.

python tools/decode_kernel_table.py [h100 h200 a100 b200 gb200 ...]
"""

import sys

from moesim.scenario import gpu_spec
from moesim.serving.decode_kernels import attention_of, facts, fitted_of, small_all_reduce

KINDS = ("grouped/bf16", "grouped/fp8", "latent/bf16", "latent/fp8")
EXPERTS, BATCHED = {2: "memory", 3: "memory", 4: "peak"}, {1: "memory", 2: "peak"}


def main() -> None:
    """Print the table."""
    print(f"{'GPU':8} {'kernel':24} {'source':13} {'median':>7} {'p90':>6} {'floor':>8} {'memory':>7} {'peak':>6}")
    for name in sys.argv[1:] or ["h100", "h200", "b200", "a100", "gb200"]:
        gpu = gpu_spec(name)
        found = [("attention " + kind, attention_of(gpu, stack="engines", kind=kind), 4, 5) for kind in KINDS]
        for kind in ("bf16", "fp8", "int4"):
            found.append(("experts " + kind, fitted_of("experts", gpu, kind, "bf16", rates=EXPERTS), 3, 4))
        for kind in ("bf16", "fp8"):
            found.append(("head GEMMs " + kind, fitted_of("batched", gpu, kind, "bf16", rates=BATCHED), 1, 2))
        for kernel, fitted, memory, rate in found:
            off, parameters = fitted.entry["kept_out"], fitted.parameters
            peak = gpu.peak_flops.get("fp8" if "fp8" in kernel else "bf16", gpu.peak_flops["bf16"])
            print(
                f"{name:8} {kernel:24} {fitted.source:13} {off['median']:7.1%} {off['p90']:6.0%} "
                f"{parameters[0] * 1e6:6.1f}us {parameters[memory] / gpu.memory_bandwidth:7.0%} "
                f"{parameters[rate] / peak:6.0%}"
            )
        for ranks in sorted(int(each) for each in facts()["all_reduce"].get(name, {})):
            seconds = [small_all_reduce(gpu, ranks, size) for size in (16e3, 1e6)]
            text = ", ".join("NCCL's" if each is None else f"{each * 1e6:.1f} us" for each in seconds)
            print(f"{name:8} all-reduce of {ranks} ranks, 16 KB and 1 MB: {text} (tables)")


if __name__ == "__main__":
    main()
