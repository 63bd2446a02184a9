"""The command line of a scenario for Megatron-LM (`pretrain_gpt.py`), and what its flags cannot say.

Law: what is not listed as unsaid is the same in the scenario that `from_megatron` reads from the command.
"""

from moesim.flags.commands import Command, Draft
from moesim.flags.write_layout import write_layout, write_training
from moesim.flags.write_model import write_model
from moesim.scenario import Scenario

PROGRAM = "pretrain_gpt.py"


def megatron_command(scenario: Scenario) -> Command:
    """The flags of the scenario's model and layout; data, learning rate and checkpoints are the user's own."""
    draft = Draft()
    write_model(draft, scenario)
    write_layout(draft, scenario)
    write_training(draft, scenario)
    launcher = ("torchrun", *launch_words(scenario), PROGRAM)
    return Command(software="Megatron-LM", launcher=launcher, flags=tuple(draft.flags), unsaid=tuple(draft.unsaid))


def launch_words(scenario: Scenario) -> tuple[str, ...]:
    """torchrun's flags for the ranks of a scenario: whole nodes of its first pool, or one smaller node."""
    ranks, per_node = scenario.parallelism.world_size, scenario.cluster.main_pool.gpus_per_node
    nodes, rest = divmod(ranks, per_node)
    if rest:
        nodes, per_node = (1, ranks) if ranks < per_node else (ranks, 1)
    return "--nproc_per_node", str(per_node), "--nnodes", str(nodes)
