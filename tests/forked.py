"""Commands of codetr in processes of their own that need not import PyTorch and Lightning again, which takes seconds.

A server imports them once and forks for every command: as `python -m MODULE ARGUMENTS` otherwise, with its own working
directory, environment, files, signals and exit status. From a shell: `python tests/forked.py SOCKET MODULE ARGUMENTS`,
with the path that `server()` returns.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

PRELOADED = (  # what the commands import when they run
    "codetr.trainer",
    "codetr.task",
    "codetr.data.datamodule",
    "codetr.evaluation.mean_ap",
    "codetr.inference.model",
    "codetr.visualize",
    "hydra.utils",
    "lightning.pytorch.loggers",
    "numba",
    "rich.progress",
    "torch.utils.tensorboard",
)


def run(*command: str, cwd: Path, env: Mapping[str, str], timeout: float = 300) -> CompletedProcess[str]:
    """`python -m COMMAND`. Raises subprocess.TimeoutExpired as subprocess.run does."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        status = _ask(server(), list(command), str(cwd), dict(env), [out.fileno(), err.fileno()], timeout)
        for file in (out, err):
            file.seek(0)
        return CompletedProcess(command, status, out.read(), err.read())


def run_two(*command: str, cwd: Path, env: Mapping[str, str], timeout: float = 300) -> None:
    """The command as both processes of one job, of which each must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(run, *command, cwd=cwd, env={**job, "LOCAL_RANK": r}, timeout=timeout) for r in "01"]
        done = [rank.result() for rank in ranks]
    assert [one.returncode for one in done] == [0, 0], "\n".join(one.stderr[-3000:] for one in done)


@cache
def server() -> str:
    """The path of its socket; it ends with this process. Its environment is that of a toy training."""
    from toy import environment

    path = str(Path(tempfile.mkdtemp()) / "forked")
    process = subprocess.Popen([sys.executable, __file__, path], env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    atexit.register(process.kill)
    return path


def _ask(path: str, command: list[str], cwd: str, env: dict[str, str], files: list[int], timeout: float | None) -> int:
    """The exit status; of a process that a signal ended, less 0, as subprocess has it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.settimeout(timeout)
        socket.send_fds(connection, [b"!"], files)
        connection.sendall(json.dumps([command, cwd, env]).encode() + b"\n")
        answers = connection.makefile()
        process = int(answers.readline())
        try:
            return int(answers.readline())
        except TimeoutError:
            os.kill(process, 9)
            assert timeout is not None
            raise TimeoutExpired(command, timeout) from None


def _serve(path: str) -> list[str]:
    """Returns in the processes of commands alone, with the command."""
    for module in PRELOADED:
        importlib.import_module(module)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        os.write(1, b"ready\n")
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return _waited_for(connection)
            connection.close()
            while any(os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG) or ()):
                pass


def _waited_for(connection: socket.socket) -> list[str]:
    """Forks once more, and tells how that process ended."""
    _, files, _, _ = socket.recv_fds(connection, 1, 2)
    command, cwd, env = json.loads(connection.makefile().readline())
    if (process := os.fork()) == 0:
        connection.close()
        _become(files, cwd, env)
        return command
    connection.sendall(b"%d\n" % process)
    _, status = os.waitpid(process, 0)
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(files: list[int], cwd: str, env: dict[str, str]) -> None:
    for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:1] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]


def _main(path: str, *command: str) -> Any:
    if command:
        status = _ask(path, list(command), os.getcwd(), dict(os.environ), [1, 2], None)
        sys.exit(status if status >= 0 else 128 - status)
    module, *arguments = _serve(path)
    sys.argv[1:] = arguments
    if not hasattr(sys.modules.get(module), "__path__"):
        sys.modules.pop(module, None)  # of which runpy would warn
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
