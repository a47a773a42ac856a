"""Processes that torchrun starts anew beside what their killed predecessors left."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from codetr.ops.distributed import cpu_group, meet_anew


def attempt(rank: int, port: int, number: int, folder: str) -> None:
    """As torchrun starts a worker. One is late: the other one finds only what the dead have left."""
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in names.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    if number and rank == number % 2:
        time.sleep(1)
    meet_anew()
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    assert cpu_group() is dist.group.WORLD
    total = torch.tensor([float(10**rank)])
    dist.all_reduce(total, group=cpu_group())
    Path(folder, f"{number}_{rank}").write_text(str(total.item()))
    while len(list(Path(folder).glob(f"{number}_*"))) < 2:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_restarted_group_does_not_call_the_dead(tmp_path: Path) -> None:
    agents = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for number in range(3):
        workers = mp.spawn(attempt, args=(agents.port, number, str(tmp_path)), nprocs=2, join=False)
        for process in workers.processes:
            process.join()
            assert process.exitcode == -signal.SIGKILL  # and not 1, an exception
    assert [path.read_text() for path in sorted(tmp_path.glob("?_?"))] == ["11.0"] * 6
