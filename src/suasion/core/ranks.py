"""Several processes that do one job: who am I, how many are we, and what do we agree on.

A launcher (torchrun, accelerate) starts the same command several times and says so in the
environment. `joined` makes one `Ranks` of it, which everything else gets as an argument.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from suasion.core.errors import ConfigError, ToldElsewhere, TrainingError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

EachRow = Callable[[int, Callable[[list[int]], Sequence[Any]]], list[Any]]
"""(count, work) -> a result for each of `count` rows, where `work` turns row numbers into results,
in their order. It may be called with some of the rows, or with none at all."""

PATIENCE = timedelta(hours=24)
"""How long a process waits for the others: as long as a stage that only the first one runs. One
that died is noticed at once, by its closed connections and by the launcher."""
UNSAID = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Where launchers of MPI say how many processes they started, which torch does not read."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees it. Each must make the same calls in one order.

    Example:
        With two processes, `ranks.sum(torch.tensor(2))` is 4 in both, and
        `ranks.each_row(3, work)` calls `work([0, 2])` in the first and `work([1])` in the second.
    """

    rank: int = 0
    """Number of this process, from zero."""
    world: int = 1
    """How many there are."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, a new tensor of the same shape."""
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """Every process's value, which must be picklable and on no device, in their order."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def share(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; the others wait meanwhile."""
        if self.world == 1:
            return make()
        import torch.distributed as dist

        made = [make() if self.first else None]
        dist.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    def own(self, rows: Sequence[T]) -> list[T]:
        """Those of `rows` that are this process's to work on: every `world`-th."""
        return list(rows[self.rank :: self.world])

    def each_row(self, count: int, work: Callable[[list[int]], Sequence[Any]]) -> list[Any]:
        """Spread work over the processes; every one of them has all results. See `EachRow`."""
        rows = self.own(range(count))
        found: list[Any] = [None] * count
        for rank, part in enumerate(self.gather(list(work(rows)) if rows else [])):
            found[rank :: self.world] = part
        return found

    def concatenated(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every process's tensors of a name, one behind the other, on the processor."""
        if self.world == 1:
            return dict(tensors)
        import torch

        parts = [part for part in self.gather({k: v.cpu() for k, v in tensors.items()}) if part]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def agree(self, what: str, mine: object, fix: str = "") -> None:
        """Refuse to go on with a value that differs from one process to another.

        Raises:
            TrainingError: it does; the same message in each of them.
        """
        values = self.gather(mine)
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise TrainingError(
                f"{what} differs between processes: {values[0]} in process 0, "
                f"{values[other]} in process {other}",
                fix,
            )


ALONE = Ranks()
"""The only process."""


def checksum(tensors: Iterable[Tensor]) -> str:
    """A text that differs where weights differ: the sums of values and of squares, in float64."""
    values = squares = 0.0
    for tensor in tensors:
        wide = tensor.detach().double()
        values += float(wide.sum())
        squares += float(wide.square().sum())
    return f"{values.hex()}/{squares.hex()}"


def launched(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes the launcher says there are.

    Raises:
        ConfigError: it says something that makes no sense, or says it where torch does not look.
    """
    said = environment.get("WORLD_SIZE")
    if said is None:
        for name in UNSAID:
            if int(environment.get(name, "1")) > 1:
                raise ConfigError(
                    f"{name} is {environment[name]}, but WORLD_SIZE is not set: each process would "
                    "train by itself",
                    "start with torchrun --nproc_per_node N -m suasion.cli.main ...",
                )
        return 1
    if not said.isdigit() or not int(said):
        raise ConfigError(f"WORLD_SIZE is {said!r}, which is no number of processes")
    return int(said)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that were started together; alone if this one was started alone.

    On a machine with GPUs, each process takes the one of its LOCAL_RANK. An error in one process
    ends all of them, since the launcher stops the others or they lose their connection to it.

    Raises:
        ConfigError: the environment does not describe a group of processes, or the group has
            another size.
        ToldElsewhere: this process failed, but another one did before it.
    """
    world = launched()
    if world == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set",
            "start with torchrun --nproc_per_node N -m suasion.cli.main ..., or unset WORLD_SIZE",
        )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = next(iter(rendezvous("env://")))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        check_size(world, dist.get_world_size())
        yield Ranks(rank, world)
        dist.barrier()
    except (Exception, KeyboardInterrupt) as error:
        if _failed_before(store):
            raise ToldElsewhere from error
        raise
    # Not after an error: the others wait for us elsewhere, and should notice that we are gone.
    dist.destroy_process_group()


def check_size(said: int, found: int) -> None:
    """Refuse a group that is not all the processes that were started.

    Raises:
        ConfigError: the two numbers differ.
    """
    if found != said:
        raise ConfigError(
            f"the environment says {said} processes, the process group has {found}",
            "start with torchrun --nproc_per_node N -m suasion.cli.main ...",
        )


def _failed_before(store: Any) -> bool:
    """Whether another process was first to fail; from now on, one was."""
    import torch.distributed as dist

    try:
        return bool(store.add("suasion/failed", 1) > 1)
    except dist.DistError:
        return True  # with the process that kept the store
