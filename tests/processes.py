"""Processes that tests start: forked from one that has imported the library, which takes seconds in a new one."""

import multiprocessing
import os
import socket
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
LIBRARY = ["scoresde.cli", "tests.training.runs", "torch._dynamo", "torch.distributed.fsdp"]
NOTEBOOK_LIBRARIES = ["IPython.core.interactiveshell", "matplotlib.pyplot", "scipy.stats", "sklearn.datasets"]
CONTEXT.set_forkserver_preload(LIBRARY)


def start(function, *arguments):
    """Start a process that calls a function of a module."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def ranked(environment, directory, output, function, *arguments):
    """Call a function in this environment and directory; what it prints goes to the files `output`.out and .err."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    os.chdir(directory)
    for descriptor, end in ((1, ".out"), (2, ".err")):
        with open(f"{output}{end}", "w") as file:
            os.dup2(file.fileno(), descriptor)
    function(*arguments)


def start_two(output, function, *arguments, context=CONTEXT):
    """Start two processes in this directory, in the environment that torchrun gives them.

    What they print goes to files in the directory `output`, whose names are their ranks, with .out or .err.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    output.mkdir()
    processes = []
    for rank in ("0", "1"):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        arguments_of_rank = (environment, Path.cwd(), output / rank, function, *arguments)
        processes.append(context.Process(target=ranked, args=arguments_of_rank))
        processes[-1].start()
    return processes


def fork_two(output, function, *arguments):
    """Be the parent of two such processes until they end."""
    for process in start_two(output, function, *arguments, context=multiprocessing.get_context("fork")):
        process.join()


def launch_two(output, function, *arguments):
    """Call a function in two processes of torchrun's agent; raise what one of them raised."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    torch.set_num_threads(1)
    settings = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
    config = LaunchConfig(1, 1, 2, run_id="tests", max_restarts=0, monitor_interval=0.1, **settings)
    ranked({}, Path.cwd(), output, elastic_launch(config, function), *arguments)
