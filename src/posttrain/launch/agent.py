"""Starts this node's workers, watches them, and starts them again when one is lost.

The work is done by torch.distributed's elastic agent, as under torchrun. Added here: what a person is told, that a run
which stopped or refused its input is not tried again, and that no node waits for another that has given up.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from posttrain.errors import RunError
from posttrain.launch.plan import Workers

ROLE = "posttrain"  # what its workers find in ROLE_NAME; torchrun's find `default`
EXIT_CODES = (2, 3, 130, 143)  # a worker's own, which the command gives on
FINAL = (2, 130, 143)  # wrong input and a stopped run stay what they are when tried again
MEET_SECONDS = 15 * 60.0  # that nodes wait for each other
SAVE_SECONDS = 30 * 60  # that workers asked to stop have for their last checkpoint
END_SECONDS = 30.0  # that workers have to end by themselves once another node has
LOST_PEER = ("closed by peer", "reset by peer", "Broken pipe")  # as gloo and NCCL tell it
QUIET_SECONDS = 10.0  # after which a wait is worth a line


def run_workers(workers: Workers, arguments: list[str], meet_seconds: float = MEET_SECONDS) -> int:
    """Run `posttrain ARGUMENTS` in this node's workers; the exit code is that of the first that failed."""
    _prepare(workers)
    try:
        with _saying_after(QUIET_SECONDS, _waiting(workers)):
            rendezvous = _meet(workers, meet_seconds)
        agent = Agent(workers, rendezvous, arguments)
        try:
            result = agent.run()
        except SignalException as error:
            agent.kill()  # nothing is left, unless someone was impatient
            return 128 + int(error.sigval)
        finally:
            rendezvous.shutdown()
    except RendezvousError as error:
        _say(_did_not_meet(workers, meet_seconds, error))
        return 3
    except RunError as error:
        _say(str(error))
        return 3
    if result is None:
        _say(f"This run has its {workers.num_nodes} nodes already; this is one more.")
        return 3
    if not result.is_failed():
        return 0
    codes = {failure.exitcode for failure in result.failures.values()}
    return next((code for code in EXIT_CODES if code in codes), 3)


class Agent(LocalElasticAgent):
    """Watches the workers of this node."""

    def __init__(self, workers: Workers, rendezvous: RendezvousHandler, arguments: list[str]):
        spec = WorkerSpec(
            role=ROLE,
            local_world_size=workers.processes,
            entrypoint=sys.executable,
            args=("-m", "posttrain", *arguments),
            rdzv_handler=rendezvous,
            max_restarts=workers.max_restarts,
            monitor_interval=0.1 if workers.num_nodes == 1 else 0.5,  # each look asks the first node
        )
        super().__init__(spec, DefaultLogsSpecs())
        self.workers, self.rendezvous = workers, rendezvous
        self._stop_seconds = 0

    def kill(self) -> None:
        super()._shutdown(signal.SIGKILL)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        with _saying_after(QUIET_SECONDS, _waiting(self.workers)):
            super()._rendezvous(worker_group)
        if worker_group.group_world_size != self.workers.num_nodes:
            raise RunError(
                f"{worker_group.group_world_size} nodes met at {self.workers.endpoint}, but trainer.nnodes="
                f"{self.workers.num_nodes} here. Give every node the same number."
            )

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY and self.workers.num_nodes > 1 and self._another_node_ended():
            result = self._end_with_the_others(worker_group)
        if any(failure.exitcode in FINAL for failure in result.failures.values()):
            self._remaining_restarts = 0
        elif result.failures:
            _say(_what_was_lost(result.failures, self._remaining_restarts, self.workers.max_restarts))
        return result

    def _another_node_ended(self) -> bool:
        try:
            return self.rendezvous.is_closed()
        except RendezvousError:  # the first node, which holds the store, is gone
            return True

    def _end_with_the_others(self, worker_group: WorkerGroup) -> RunResult:
        """What the workers of this node end with, in a moment, if they do; else they are stopped."""
        self._remaining_restarts = 0
        until = time.monotonic() + END_SECONDS
        while time.monotonic() < until:
            time.sleep(0.1)
            result = super()._monitor_workers(worker_group)
            if result.state != WorkerState.HEALTHY:
                return result
        _say("Another node of this run has ended, and its workers are missed here. The output of that node says why.")
        return RunResult(state=WorkerState.FAILED)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY:  # another node lost one: its restart counts here as well
            self._remaining_restarts -= 1
        super()._restart_workers(worker_group)

    def _invoke_run(self, role: str = ROLE) -> RunResult:
        try:
            return super()._invoke_run(role)
        except SignalException:
            self._stop_seconds = SAVE_SECONDS
            raise

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        if death_sig in (signal.SIGHUP, signal.SIGQUIT):
            death_sig = signal.SIGTERM  # workers save on it
        super()._shutdown(death_sig, max(timeout, self._stop_seconds))


def _prepare(workers: Workers) -> None:
    """Set what the agent and its workers read from the environment."""
    if not os.environ.get("POSTTRAIN_TRACEBACK"):
        elastic = logging.getLogger("torch.distributed.elastic")
        elastic.addHandler(logging.NullHandler())
        elastic.propagate = False
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers.processes)))
    # a store for each round of workers: torch's shared one outlives them, addresses of lost workers and all, on which
    # NCCL has failed to start again (pytorch issue 135712)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup, which torch would undo
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT" + ("" if ignored else ",SIGHUP")


def _meet(workers: Workers, seconds: float) -> RendezvousHandler:
    """The place where the nodes meet: opened on the first node, found by the others. Raises RunError after `seconds`."""
    host, _, port = workers.endpoint.rpartition(":")
    host = host.strip("[]")
    until = time.monotonic() + seconds
    while True:
        try:
            if _is_own(host) or _answers(host, int(port)):
                return get_rendezvous_handler(
                    RendezvousParameters(
                        "c10d",
                        workers.endpoint,
                        workers.run_id,
                        workers.num_nodes,
                        workers.num_nodes,
                        local_addr=_own_address_towards(host),
                        is_host=_is_own(host) and not (workers.num_nodes > 1 and _answers(host, int(port))),
                        join_timeout=int(seconds),
                    )
                )
            trouble = f"nothing listens at port {port}"
        except (OSError, RendezvousError) as error:
            trouble = str(error.__cause__ or error)
        if time.monotonic() > until:
            raise RunError(
                f"The first node was not reached at {workers.endpoint} within {seconds:.0f} seconds: {trouble}. Start the "
                "command there too, and check trainer.rdzv_endpoint and the firewall."
            )
        time.sleep(1)


def _is_own(host: str) -> bool:
    """Whether `host` is an address of this node: only then can a socket be bound to it."""
    family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def _own_address_towards(host: str) -> str:
    """The address that this node has in the network of `host`, which other nodes reach where its name says nothing."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        return probe.getsockname()[0]


def _did_not_meet(workers: Workers, seconds: float, error: RendezvousError) -> str:
    if isinstance(error, RendezvousTimeoutError):
        return (
            f"{workers.num_nodes} nodes did not meet at {workers.endpoint} within {seconds:.0f} seconds. Start the same "
            "command on each node, with the same trainer.nnodes and trainer.rdzv_endpoint."
        )
    why = f"{error.__cause__ or error}"
    return f"The other nodes of this run are gone from {workers.endpoint} ({why}). The output of the first to end says why."


def _waiting(workers: Workers) -> str:
    return f"Waiting at {workers.endpoint} until {workers.num_nodes} nodes have started this command."


@contextmanager
def _saying_after(seconds: float, text: str) -> Iterator[None]:
    timer = Timer(seconds, _say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _what_was_lost(failures: dict[int, ProcessFailure], restarts_left: int, max_restarts: int) -> str:
    """What happened to the worker that went first, and what happens next."""
    rank, first = min(failures.items(), key=lambda item: _when(item[1]))
    again = f"All workers start again (restart {max_restarts - restarts_left + 1} of {max_restarts})."
    message = first.message["message"] if isinstance(first.message, dict) else ""
    if first.exitcode > 0 and not message:  # the first worker has said why
        return again if restarts_left > 0 else ""
    if any(sign in message for sign in LOST_PEER):
        why = "lost its connection to another worker. The output of that one's node says why."
    elif message:
        why = f"failed: {message}\nSet POSTTRAIN_TRACEBACK=1 to see where."
    else:
        why = f"was killed by {first.signal_name()}"
        why += ", as systems do when memory runs out" if first.exitcode == -signal.SIGKILL else ""
    last = "A training run goes on from its newest checkpoint when the same command is started again."
    return f"Worker {rank} on {socket.gethostname()} {why}\n{again if restarts_left > 0 else last}"


def _when(failure: ProcessFailure) -> float:
    """For the order of failures. A killed worker is noticed later than those fail that miss it."""
    if failure.exitcode < 0:
        caused = -failure.exitcode not in (signal.SIGTERM, signal.SIGABRT)  # these are what others get from it
        return failure.timestamp + (-3.0 if caused else 1.0)
    try:
        return os.stat(failure.error_file).st_mtime
    except OSError:
        return failure.timestamp + 1.0


def _say(text: str) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)
