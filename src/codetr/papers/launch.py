"""Commands and jobs that train a row."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from codetr.papers.rows import Row


def command(row: Row, devices: int, extra: Sequence[str]) -> list[str]:
    """On this machine; several devices by processes that Lightning starts."""
    many = ["trainer=ddp", f"trainer.devices={devices}"] if devices > 1 else []
    return ["python", "-m", "codetr.train", *row.arguments(devices), *many, *extra]


def torchrun(row: Row, devices: int, nodes: int, extra: Sequence[str]) -> str:
    """To be run on every node. Variables of the shell stay as they are."""
    rendezvous = "--standalone"
    if nodes > 1:
        rendezvous = (
            f"--nnodes={nodes} --node-rank=$RANK --rdzv-backend=c10d --rdzv-id={row.name} "
            "--rdzv-endpoint=$FIRST_NODE:29500"
        )
    return (
        f"torchrun {rendezvous} --nproc-per-node={devices} -m codetr.train {_distributed(row, devices, nodes, extra)}"
    )


def slurm(row: Row, devices: int, nodes: int, extra: Sequence[str]) -> str:
    """A batch script; queued again it goes on where it was."""
    return (
        "#!/bin/bash\n"
        f"#SBATCH --job-name={row.name} --nodes={nodes} --ntasks-per-node={devices} --gpus-per-node={devices} "
        "--cpus-per-task=8\n"
        f"srun python -m codetr.train {_distributed(row, devices, nodes, ['resume=auto', *extra])}"
    )


def _distributed(row: Row, devices: int, nodes: int, extra: Sequence[str]) -> str:
    shape = ["trainer=ddp", f"trainer.num_nodes={nodes}", f"trainer.devices={devices}"]
    return shlex.join([*row.arguments(devices * nodes), *shape, f"run_dir=outputs/{row.name}", *extra])
