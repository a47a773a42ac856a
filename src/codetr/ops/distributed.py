"""What processes of one training need from each other."""

from __future__ import annotations

import os
import socket
import time
from functools import cache

import torch.distributed as dist
from torch import Tensor

JOIN_SECONDS = 600.0  # in which all processes of an attempt have to appear
KNOCK_SECONDS = 5.0  # for one try to reach the first process
PORT = "codetr/port"


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes; `value` itself when there is one.

    Stays on the device: no host synchronisation. Every process must call it equally often.
    """
    if several():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def several() -> bool:
    """Whether this process is one of several that work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def cpu_group() -> dist.ProcessGroup:
    """All processes, for tensors on the CPU: the default group where it is of gloo, else one made at the first call.

    Every process must make the first call at the same point.
    """
    world = dist.group.WORLD
    assert world is not None, "call it where `several()`"
    return _gloo_beside(world)


@cache
def _gloo_beside(world: dist.ProcessGroup) -> dist.ProcessGroup:
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")  # type: ignore[return-value]


@cache  # keeps the store open
def meet_anew() -> dist.Store | None:
    """Under torchrun: a key-value store of this attempt's own, in which the processes exchange their addresses.

    torchrun keeps one store through all restarts, so that a restarted process reads where its killed peers listened
    and waits for them in vain. Here the first process opens a store and says its port in torchrun's; the others go
    where something answers, which is of this attempt, as those before are dead. Changes the environment variables
    that `init_process_group` goes by. None where processes were started otherwise. Raises TimeoutError when the first
    process does not appear.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host = os.environ["MASTER_ADDR"]
    agents = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False)
    first = os.environ["RANK"] == "0"
    port = 0 if first else _answering_port(agents, host)  # 0: any free one
    own = dist.TCPStore(host, port, is_master=first, wait_for_workers=False, multi_tenant=True)
    if first:
        agents.set(PORT, str(own.port))
    os.environ |= {"MASTER_PORT": str(own.port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return own


def _answering_port(agents: dist.Store, host: str) -> int:
    end = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < end:
        port = int(agents.get(PORT))  # of an earlier attempt, until the first process of this one says its own
        try:
            socket.create_connection((host, port), timeout=KNOCK_SECONDS).close()
        except OSError:
            time.sleep(0.1)
        else:
            return port
    raise TimeoutError(f"the first process opened no store at {host} within {JOIN_SECONDS:.0f} s")
