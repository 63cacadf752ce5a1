"""Several processes that share a run on this machine, forked, over the loopback."""

import contextlib
import os
import socket
import sys

import torch
from torch import nn

from ldm.training.distributed import current, processes
from ldm.training.loop import seeded
from tests.children import in_child, status_of
from tests.training.toy import Toy, train_toy


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(world, work, sharded=False, log=None):
    """Fork `world` processes that each run `work(rank)` as torchrun would start them; returns their ids.

    `log`: a folder for what each writes on stderr, as 0.txt, 1.txt, …
    """
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"ACCELERATE_USE_FSDP": "true"} if sharded else {}

    def run(rank):
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        if log is None:
            return work(rank)
        with (log / f"{rank}.txt").open("w") as sys.stderr:
            try:
                return work(rank)
            except BaseException as error:  # as the command line says it
                from ldm import console

                if console.level != console.SILENT:
                    print(f"error: {error}", file=sys.stderr)
                raise

    return [in_child(lambda rank=rank: run(rank)) for rank in range(world)]


def ends_of(children):
    """The exit statuses, in the order of the processes."""
    return [status_of(child) for child in children]


def together(world, work, sharded=False, log=None):
    """As `start`, to the end."""
    return ends_of(start(world, work, sharded, log))


class Shared(Toy):
    """The toy, in rows that may be shared and without what depends on all of them."""

    def __init__(self, settings, lora=False, inside=lambda step, micro: None):
        super().__init__(settings, lora, inside)
        self.module[2] = nn.Identity()

    def batches(self, first_step):
        for batch in super().batches(first_step):
            part = current().part(len(batch.x))
            batch.x, batch.part, batch.ids = part.of(batch.x), part, [batch.ids[row] for row in part.own]
            yield batch

    def loss(self, batch, step, micro):
        self.inside(step, micro)
        return batch.part.mean((self.module(batch.x) - batch.x @ self.map).square().mean(1))


def train_shared(out, resume=None, kind=Shared, **more):
    """A run of the toy by however many processes there are."""
    with processes():
        return train_toy(out, resume, kind=kind, **more)


@contextlib.contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(*parts):
    return seeded.normal((1,), 0, *parts)
