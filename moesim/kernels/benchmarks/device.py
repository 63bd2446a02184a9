"""The machine under test: what it is, and its power and clock while a benchmark runs."""

import datetime
import importlib
import platform
import threading
import time
from types import TracebackType
from typing import Any, Self

import torch

_INTERVAL = 0.02  # seconds between samples


class Sampler:
    """A thread that samples the power draw and SM clock of one GPU; without NVML it samples nothing."""

    def __init__(self, index: int | None) -> None:
        self._samples: list[tuple[float, float, float]] = []  # (time, W, MHz)
        self._stop = threading.Event()
        self._nvml: Any = None
        if index is not None:
            try:
                self._nvml = importlib.import_module("pynvml")
                self._nvml.nvmlInit()
                self._handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            except Exception:  # no NVML on this machine: rows then carry no clock
                self._nvml = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL):
            power = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
            clock = self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
            self._samples.append((time.monotonic(), float(power), float(clock)))

    def __enter__(self) -> Self:
        if self._nvml is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        if self._nvml is not None:
            self._thread.join()

    def since(self, begin: float) -> dict[str, float]:
        """Mean power (W) and SM clock (MHz) sampled since `begin` (monotonic seconds), or the last sample."""
        chosen = [sample for sample in self._samples[-400:] if sample[0] >= begin] or self._samples[-1:]
        if not chosen:
            return {}
        _, watts, clocks = zip(*chosen, strict=True)
        return {"watts": round(sum(watts) / len(chosen)), "clock_mhz": round(sum(clocks) / len(chosen))}


def environment(device: str, ranks: int) -> dict[str, Any]:
    """What a profile says about the machine that it was measured on."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": ranks,
    }
    if device == "cpu":
        return facts | {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    facts |= {
        "device": properties.name,
        "sm_count": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", 0),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
    }
    with Sampler(0) as sampler:
        if sampler._nvml is not None:
            driver = sampler._nvml.nvmlSystemGetDriverVersion()
            facts["driver"] = driver.decode() if isinstance(driver, bytes) else driver
    return facts
