"""How much Python a program runs in its forward pass: the instructions of its own interpreter, counted.

What records the program runs Python, too (modes, hooks, kernels of the meta device); none of that is counted, nor what
it calls. A debugger or a coverage tool that traces gets its place back behind.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import moesim

_TORCH = Path(torch.__file__).parent
# Of torch, what a program on a GPU does not run: kernels written in Python, modes, what takes trees of tensors apart.
_OF_META = (
    *("_meta_registrations.py", "_refs", "_prims", "_decomp", "_ops.py", "_subclasses", "_dispatch", "_library"),
    *("_higher_order_ops", "fx", "overrides.py", "utils/_device.py", "utils/_python_dispatch.py", "utils/_pytree.py"),
)
_NOT_OF_THE_PROGRAM = (str(Path(moesim.__file__).parent), *(str(_TORCH / each) for each in _OF_META))
_FOR_HOOKS = {(str(_TORCH / "nn" / "modules" / "module.py"), "inner")}


class PythonWork:
    """Tells `count` of the instructions that the program runs while `counted`."""

    def __init__(self, count: Callable[[], None]) -> None:
        self.count, self.inside = count, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """For as long as this lasts."""
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(before)

    def _called(self, frame: FrameType, event: str, arg: Any) -> Any:
        frame.f_trace_lines = False
        code = frame.f_code
        if self.inside or code.co_filename.startswith(_NOT_OF_THE_PROGRAM):
            self.inside += 1
            return self._left_out
        if (code.co_filename, code.co_name) in _FOR_HOOKS or code.co_filename.endswith("weakref.py"):
            return None
        frame.f_trace_opcodes = True
        return self._ran

    def _left_out(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "return":
            self.inside -= 1
        return self._left_out

    def _ran(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            self.count()
        return self._ran
