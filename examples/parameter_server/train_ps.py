"""A parameter server on the handwritten digits, with workers that come, go and die.

    python train_ps.py server
    python train_ps.py worker        # as many as you like, at any time

Without an argument group 0 is the server and every other group a worker. README.md says what the log says.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DistributedSampler

from torchft import ProcessGroupGloo
from torchft.parameter_server import ParameterServer, ParameterServerError
from torchft.process_group import ProcessGroup

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, for the next line
from examples.digits import Metrics, Net, Settings, accuracy, batches, load_data, state_hash

logger = logging.getLogger("train_ps")
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

settings = Settings()
PORT = int(os.environ.get("PORT", "29520"))
SERVER = os.environ.get("SERVER", f"http://localhost:{PORT}/new_session")


class DigitsServer(ParameterServer):
    """Sends the weights, gets a gradient, applies it: asynchronous SGD, each worker at its own pace."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, metrics: Metrics, port: int) -> None:
        self.model = model
        self.optimizer = optimizer
        self.metrics = metrics
        self.updates = 0
        self.total = settings.total_steps()
        self.done = threading.Event()
        self.lock = threading.Lock()  # sessions are threads; the model is theirs together
        super().__init__(port)

    @classmethod
    def new_process_group(cls) -> ProcessGroup:
        return ProcessGroupGloo(timeout=timedelta(seconds=settings.timeout_sec))

    def forward(self, session_id: str, pg: ProcessGroup) -> None:
        logger.info("session %s: a worker has come, there are %d", session_id, len(self.sessions()))
        size = sum(p.numel() for p in self.model.parameters())
        message = torch.zeros(1 + size)  # is there more to do; weights
        answer = torch.zeros(1 + size)  # loss; gradient
        while True:
            with self.lock:
                message[0] = float(self.updates < self.total)
                message[1:] = nn.utils.parameters_to_vector(self.model.parameters()).detach()
                sent = self.updates
            pg.broadcast_one(message, 0).wait()
            if not message[0]:
                return
            pg.broadcast_one(answer, 1).wait()
            with self.lock:
                self._apply(answer[1:], float(answer[0]), session_id, self.updates - sent)

    def _apply(self, gradient: Tensor, loss: float, session_id: str, behind: int) -> None:
        if self.updates == self.total:
            return  # others were faster
        offset = 0
        for p in self.model.parameters():
            p.grad = gradient[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        self.optimizer.step()
        self.updates += 1
        self.metrics.write("update", update=self.updates, session=session_id)
        if self.updates % 50 == 0:
            workers = len(self.sessions())
            logger.info("update %d: loss %.4f, workers %d, %d updates behind", self.updates, loss, workers, behind)
        if self.updates == self.total:
            self.done.set()


def serve() -> None:
    metrics = Metrics(settings.metrics_file)
    train, held_out = load_data(settings.dataset)
    torch.manual_seed(0)
    net = Net(train.tensors[0][0].shape)
    server = DigitsServer(net, torch.optim.AdamW(net.parameters(), lr=2e-3), metrics, PORT)
    logger.info("workers find the server at %s", server.address())
    metrics.write("serving", address=server.address())
    while not server.done.wait(1.0):  # without a limit a lock's wait can miss a Ctrl-C
        pass
    while server.sessions():  # each worker is told that there is nothing more to do
        time.sleep(0.05)
    share = accuracy(net, held_out, torch.device("cpu"))
    metrics.write("end", updates=server.updates, accuracy=share)
    logger.info("done: %d updates, held-out accuracy %.2f %%", server.updates, 100 * share)
    logger.info("state %s", state_hash(net.state_dict()))
    server.shutdown()


def work() -> None:
    metrics = Metrics(settings.metrics_file)
    train, _ = load_data(settings.dataset)
    sampler: DistributedSampler[int] = DistributedSampler(
        train, num_replicas=settings.replica_groups, rank=settings.replica_group % settings.replica_groups
    )
    stream = batches(train, sampler, settings.batch_size)
    net = Net(train.tensors[0][0].shape)
    pg = meet_server()
    gradients = train_on(net, stream, pg, metrics)
    pg.shutdown()
    logger.info("nothing more to do after %d gradients", gradients)


def meet_server() -> ProcessGroup:
    """The server may start after its workers."""
    deadline = time.monotonic() + settings.timeout_sec
    while True:
        try:
            return DigitsServer.new_session(SERVER)
        except ParameterServerError as e:
            if time.monotonic() > deadline:
                raise
            logger.info("%s; asking again", e)
            time.sleep(0.5)


def train_on(net: Net, stream: Iterator[tuple[Tensor, Tensor]], pg: ProcessGroup, metrics: Metrics) -> int:
    size = sum(p.numel() for p in net.parameters())
    message, answer = torch.zeros(1 + size), torch.zeros(1 + size)
    for count, (images, labels) in enumerate(stream):
        began = time.monotonic()
        pg.broadcast_one(message, 0).wait()
        if not message[0]:
            return count
        nn.utils.vector_to_parameters(message[1:].clone(), net.parameters())
        net.zero_grad()
        loss = cross_entropy(net(images), labels)
        loss.backward()
        answer[0] = loss.detach()
        answer[1:] = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        pg.broadcast_one(answer, 1).wait()
        metrics.write("gradient", count=count + 1)
        time.sleep(max(0.0, settings.step_sec - (time.monotonic() - began)))
    raise RuntimeError("there are no more batches")


if __name__ == "__main__":
    role = sys.argv[1] if len(sys.argv) > 1 else "server" if settings.replica_group == 0 else "worker"
    {"server": serve, "worker": work}[role]()
