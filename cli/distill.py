"""`duet-distill`: train a student from a teacher cache, and measure what it forgot."""

import os

import click

from duet_unlearn import __version__
from duet_unlearn.cli.commands.ask import ask_command
from duet_unlearn.cli.commands.demo import demo_command
from duet_unlearn.cli.commands.evaluate import eval_command
from duet_unlearn.cli.commands.plan import plan_command
from duet_unlearn.cli.commands.report import report_command
from duet_unlearn.cli.commands.run import run_command
from duet_unlearn.cli.commands.stress import (
    attack_command,
    membership_command,
    probe_command,
    relearn_command,
)
from duet_unlearn.cli.errors import DuetGroup, configure_logging

_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(cls=DuetGroup, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="duet-distill")
@click.option("--verbose", is_flag=True, help="Log what happens underneath, on standard error.")
def main(verbose: bool) -> None:
    """Fit a student to cached teacher signals, without the teacher."""
    configure_logging(verbose=verbose)
    # OpenMP's threads spin while they wait, which makes a CPU run ten times slower as soon as
    # anything else wants a core. Sleeping costs a few microseconds; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


main.add_command(plan_command)
main.add_command(run_command)
main.add_command(eval_command)
main.add_command(ask_command)
main.add_command(relearn_command)
main.add_command(attack_command)
main.add_command(membership_command)
main.add_command(probe_command)
main.add_command(report_command)
main.add_command(demo_command)

if __name__ == "__main__":  # torchrun and accelerate start a module or a script, no command
    main(prog_name="duet-distill")
