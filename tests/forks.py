"""Processes that are forked from one that has imported the project: none imports PyTorch anew,
which takes three seconds of a core. What a test says of a program's start, or of what it prints,
needs a process of its own instead."""
import functools
import importlib
import multiprocessing
import os
import resource
import signal
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import endings  # isort: skip  # before PyTorch, as scripts do
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import fit  # noqa: F401
import rodinhd as rh
import running
import train  # noqa: F401

ROOT = Path(__file__).parent.parent


@functools.cache
def server():
    """The context of a server that imports this file, and then forks; one a session."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['forks'])
    places = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
    with mock.patch.dict(os.environ, PYTHONPATH=places, OMP_NUM_THREADS='1'):
        forkserver.ensure_running()
    return context


def start(function, *args, daemon=False):
    """Starts a function of an importable file in a process of its own, which is returned; a daemon
    has no children, and ends with the tests."""
    process = server().Process(target=function, args=args, daemon=daemon)
    process.start()
    return process


def keep_claim(path, sender):
    """Claims a path, says whether nobody else held it, and waits to be killed."""
    with running.claim(path) as mine:
        sender.send(mine)
        time.sleep(300)


def hold(path):
    """Starts a process that holds the claim of a path until it is killed."""
    receiver, sender = server().Pipe(duplex=False)
    process = start(keep_claim, path, sender, daemon=True)
    assert receiver.recv()
    return process


def send_refusal(sender, function, *args):
    """Runs a function, and sends the line in which it refuses."""
    try:
        function(*args)
    except rh.Stop as error:
        sender.send(str(error))


def refusal(function, *args):
    """The line in which a function refuses, in a process of its own."""
    receiver, sender = server().Pipe(duplex=False)
    process = start(send_refusal, sender, function, *args)
    sender.close()  # so that a process that ends without a word is noticed
    line = receiver.recv()
    process.join()
    return line


# What tests have forks do -------------------------------------------------------------------------
def fill_the_disk(path, kind):
    """Writes a megabyte where files may have 100 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    if kind == 'checkpoint':
        running.write_checkpoint(path, 'x', {'n': torch.zeros(10 ** 6)})
    with running.atomic(path) as temporary:
        temporary.write_bytes(bytes(10 ** 6))


def run(script, options):
    """Runs a script's main."""
    module = importlib.import_module(script)
    module.main(module.parse(options))


def run_as_rank(script, options):
    """Runs a script's main as one of several ranks: signals are those of a script that starts."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    endings.install()
    run(script, options)


def torchrun(ranks, script, options, restarts=0, machines=1, endpoint='localhost:0'):
    """Runs a script's main in several ranks: torchrun's launcher, whose ranks are forked, again
    where one dies and there are restarts; of one of several machines, which meet at an endpoint."""
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=ranks,
        rdzv_backend='c10d',
        rdzv_endpoint=endpoint,
        run_id='forks',
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method='fork',
    )
    elastic_launch(config, run_as_rank)(script, options)
