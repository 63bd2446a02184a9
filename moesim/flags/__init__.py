"""Command lines of training software: launch scripts read into scenarios, and layouts written as flags."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from moesim.flags.commands import Command
from moesim.flags.megatron import megatron_command
from moesim.flags.to_torchtitan import torchtitan_command
from moesim.scenario import Scenario

# The software whose command lines are written, by the name that `--flags` takes.
WRITERS: Mapping[str, Callable[[Scenario], Command]] = MappingProxyType(
    {"megatron": megatron_command, "torchtitan": torchtitan_command}
)
