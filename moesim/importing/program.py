"""Runs the function that a user names, on the meta device, and records the step that it describes."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from moesim.errors import UserError, one_line
from moesim.importing.recording import record_step
from moesim.recorded.step_file import RecordedOp


def record_program(name: str) -> list[RecordedOp]:
    """The step of MODULE:FUNCTION (or FILE.py:FUNCTION), whose function returns the model and a closure of the loss.

    The function runs with the meta device as torch's default. Raises UserError where it is not found or returns
    something else, or where the step does not run on the meta device, or not as it would on a GPU.
    """
    make = _function(name)
    with torch.device("meta"), _as_it_runs(name):
        try:
            made = make()
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # whatever the user's program raises
            raise UserError(f"{name} raised {type(error).__name__}: {one_line(str(error))}") from None
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
            raise UserError(
                f"{name} must return (model, closure that gives the loss); it returned {type(made).__name__}"
            )
        model, loss_of = made
        real = [path for path, weight in model.named_parameters() if weight.device.type != "meta"]
        if real:
            raise UserError(f"{name}: {real[0]} is not on the meta device; make the model inside of the function")
        return record_step(model, loss_of)


@contextmanager
def _as_it_runs(name: str) -> Iterator[None]:
    """Refuses what torch would leave out without an error on the meta device: autocast, and compilation."""
    autocast, compile_ = torch.amp.autocast_mode.autocast.__init__, torch.compile

    def begin(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        if enabled:
            raise UserError(
                f"{name} uses torch.autocast, which casts nothing on the meta device; give the model the dtype that it "
                "computes in, e.g. model.to(torch.bfloat16)"
            )
        autocast(self, device_type, dtype, enabled, cache_enabled)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        if not torch._dynamo.config.disable:
            raise UserError(
                f"{name} calls torch.compile, whose kernels are not modelled; leave it out, or set "
                "TORCH_COMPILE_DISABLE=1, to have the step as eager mode runs it"
            )
        return compile_(*args, **kwargs)

    with (
        mock.patch.object(torch.amp.autocast_mode.autocast, "__init__", begin),
        mock.patch.object(torch, "compile", compiled),
    ):
        yield


def _function(name: str) -> Callable[[], Any]:
    place, _, function = name.rpartition(":")
    if not place:
        raise UserError(f"{name!r} names no function; write MODULE:FUNCTION or FILE.py:FUNCTION")
    module = _module(place)
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{place} has no function {function!r}")
    wanted = _needed(found)
    if wanted:
        raise UserError(
            f"{name} takes {', '.join(wanted)}, and nothing is given to it; name a function without arguments that "
            "calls it with yours"
        )
    return found  # type: ignore[no-any-return]


def _needed(function: Callable[..., Any]) -> list[str]:
    """The arguments without defaults."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of builtins
        return []
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [each.name for each in parameters if each.default is inspect.Parameter.empty and each.kind not in kinds]


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except (Exception, SystemExit) as error:  # whatever the user's program raises
            raise UserError(f"cannot import {place}: {type(error).__name__}: {one_line(str(error))}") from None
    path = Path(place)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's program raises
        raise UserError(f"{path} raised {type(error).__name__}: {one_line(str(error))}") from None
    return module
