"""Starts tests in two real processes, collects what they found, and stops them if they hang.

The second half is for the scripts that run in these processes.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm


HERE = Path(__file__).resolve().parent
TAKEN = ("eaddrinuse", "address already in use", "another process is utilizing it")  # by PyTorch, Linux, Accelerate
# Seconds after which a process is taken for hung. No test measures time with it: on a machine with much other work, a
# process that needs 10 seconds alone may need many minutes.
PATIENCE = 1800.0
# Each process is a fork of a server that has imported these. Otherwise, a process would spend most of its time on
# imports. Our own code is not among them: a process imports it itself, with its own environment variables.
FORKS = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
FORKS.set_forkserver_preload(
    ["hypothesis", "peft", "pytest", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
     "transformers.trainer", "transformers.models.bert.modeling_bert"]
)  # fmt: skip


def keep_tqdm_from_forks() -> None:
    """Gives tqdm a lock that only threads of this process share, and no thread that could hold it at a fork.

    Forks share the usual lock. If one is killed while it holds the lock, its parent and all other forks wait forever.
    """
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0


def environment(rank: int | None = None, port: int = 0, size: int = 2, **extra: str) -> dict[str, str]:
    """Environment variables for one of `size` processes. Without a rank: for a launcher, which adds the rest."""
    found = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "PYTEST_"))}
    found |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
    }
    found["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), found.get("PYTHONPATH", "")])
    if rank is not None:
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        found |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return found | extra


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_free_port(run: Callable[[int], None]) -> None:
    """Calls `run` with a free port. If another test takes the port before `run` uses it, tries other ports."""
    for left in (2, 1, 0):
        try:
            return run(free_port())
        except AssertionError as error:
            if not left or not any(text in str(error).lower() for text in TAKEN):
                raise


def run_two(script: str, folder: Path, *arguments: str, **extra: str) -> list[Any]:
    """Runs `tests/<script> <folder> <arguments>` in two processes. Returns what each saved as `<folder>/<rank>.pt`.

    Raises `AssertionError` with the output of both processes if one of them fails or hangs.
    """
    command = [str(HERE / script), str(folder), *arguments]
    on_free_port(lambda port: _succeed([command] * 2, [environment(rank, port, **extra) for rank in range(2)], folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def launch_two(script: str, folder: Path, *arguments: str, options: tuple[str, ...] = ()) -> list[Any]:
    """Like `run_two`, but with `accelerate launch`.

    The option is `--multi_gpu`, because with `--cpu` Accelerate 1.15 starts a single process if there is no `mpirun`.
    """
    command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    rest = [*options, str(HERE / script), str(folder), *arguments]
    on_free_port(lambda port: _succeed([[*command, "--main_process_port", str(port), *rest]], [environment()], folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def run_script(command: list[str], folder: Path, variables: dict[str, str]) -> tuple[int | None, str]:
    """The exit code and the output of a script with arguments, in one process with these environment variables."""
    (code,), (output,) = _run([command], [variables], folder)
    return code, output


def run_code(code: str, folder: Path) -> str:
    """Runs Python code in a process of its own, and returns its output. PyTorch and PEFT are imported there already.

    Raises `AssertionError` with the output if it fails.
    """
    script = folder / "code.py"
    script.write_text(code)
    status, output = run_script([str(script)], folder, environment())
    assert status == 0, output
    return output


def _succeed(commands: list[list[str]], environments: list[dict[str, str]], folder: Path) -> None:
    codes, outputs = _run(commands, environments, folder)
    said = (f"--- process {i}, exit {codes[i]}\n{output[-6000:]}" for i, output in enumerate(outputs))
    assert not any(codes) and None not in codes, "\n".join([f"Exit codes {codes} (None: it hung).", *said])


def _run(commands: list[list[str]], environments: list[dict[str, str]], folder: Path) -> tuple[list, list[str]]:
    """Exit codes (`None` if a process hung and was killed) and outputs of processes that run at the same time."""
    logs = [folder / f"log{i}.txt" for i in range(len(commands))]
    running: list[Any] = []
    try:
        for job in zip(commands, environments, logs, strict=True):
            running.append(FORKS.Process(target=_become, args=job))
            running[-1].start()
        deadline = time.monotonic() + PATIENCE
        while any(p.exitcode is None for p in running) and time.monotonic() < deadline:
            time.sleep(0.05)
            if any(p.exitcode for p in running):
                # One has failed, so the others must end soon. The first error is shown in any case.
                deadline = min(deadline, time.monotonic() + PATIENCE / 6)
        codes = [p.exitcode for p in running]
    finally:
        for process in running:
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
    return codes, [log.read_text() for log in logs]


def _become(command: list[str], variables: dict[str, str], log: Path) -> None:
    """In a new process: runs a script or a module, as `python` would. All output goes to the file."""
    os.setsid()  # so that it can be killed together with what it starts
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = command
    run = runpy.run_path if command[0].endswith(".py") else runpy.run_module
    run(command[0], run_name="__main__")


# -- inside of a process ----------------------------------------------------------------------------------------------


def log(what: str) -> None:
    """Prints what begins now. It is shown if the test fails."""
    print(f"{time.strftime('%X')} {os.environ['RANK']}: {what}", flush=True)


def message_of(action: Callable[[], object]) -> str | None:
    """The error that the action raises, as text."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def save_and_exit(folder: str | Path, found: Any) -> None:
    torch.save(found, f"{folder}/{os.environ['RANK']}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that exits in the usual way
