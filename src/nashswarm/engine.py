"""Where tasks run: in this process, or on a Ray cluster. Either gives the same bytes.

A task is a function of this library with its arguments. What many tasks have in common (a model, say) is shared: it is
made once in each process that runs them. Results come in the order of the items, whichever worker was first, and
whoever adds them up does so in this order. Wherever it runs, a task computes with `compute.threads` threads, or, where
as many tasks as that run at once, with one. What is large and only to be added up does not come: it is added on the
workers, in the same order.

A worker that is lost takes its tasks with it: Ray runs them again elsewhere. What has a state of its own, which tasks
have not, is a `Member`: its lasting calls are kept on disk, and made again on its successor.
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nashswarm.config import Compute
from nashswarm.devices import resolve
from nashswarm.folding import Apart, Folding, Here, Total, in_order
from nashswarm.threads import set_crew, set_threads, single_threads, wait_asleep
from nashswarm.types import NashSwarmError

if TYPE_CHECKING:
    from types import ModuleType

AHEAD = 2  # tasks under way for each slot: what bounds the object store
FARTHER = 8  # the same of tasks that are given names and return a matrix' codes, or less
# Milliseconds for which a node keeps a process that has nothing to do, where it has more than cores: otherwise 1,000,
# and one that has made a GPU ready, and loaded a model, is not there for the next task.
KEPT = ("RAY_idle_worker_killing_time_threshold_ms", "600000")
MEMBER = 0.6  # of a GPU: one to each, and the rest is for a task that members wait for
RETRIES = 20  # of a task or a member whose worker is lost
EXTRA = "engine: ray needs the package; pip install -c constraints.txt -e '.[ray]'"

Place = tuple[int, str, bool]  # threads of a task, its directory, and whether all of its node's cores are for it

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Runs tasks."""

    @property
    def apart(self) -> bool:
        """Whether tasks run in other processes."""

    @property
    def device(self) -> str:
        """Where tasks run models, as params name it."""

    @property
    def slots(self) -> int:
        """How many tasks run at the same time, each with all its threads."""

    def share(self, make: Callable[[], Any], on_device: bool = False) -> Any:
        """What tasks have in common; `make` is called where it is needed, once in each process.

        Arguments: `on_device`, whether the tasks run a model there.
        """

    def map(
        self,
        function: Callable[..., Any],
        shared: Any,
        items: Iterable[tuple[Any, ...]],
        at_once: bool = False,
        ahead: int = AHEAD,
        alone: bool = False,
    ) -> Iterator[Any]:
        """function(shared, *item) for every item, in order.

        Arguments: `at_once`, for tasks which are numba for the most part, which uses one core: each computes with one
        thread, and as many of them run at the same time as there are threads. `ahead`, how many for each that runs may
        be under way: with few, a long task holds up all that come behind it; with many, more results wait. `alone`, for
        a task that everything waits for: its crew (see `threads`) may have all cores of its node.
        """

    def fold(
        self,
        function: Callable[..., Any],
        shared: Any,
        items: Iterable[tuple[Any, ...]],
        keys: Sequence[Hashable],
        total: Callable[[], Total],
    ) -> Folding:
        """As `map` of a function that returns (own, {key: part}): `own` comes to the caller, parts are added up.

        Arguments: `keys`, of the parts of every task; `total` makes what the parts of a key are added to, in the order
        of the items. On a cluster the first tasks begin at once. Raises ValueError where a task has parts of other
        keys.
        """


# --- this process --------------------------------------------------------------------------------------------------


class Local:
    """One task after the other."""

    slots, apart = 1, False

    def __init__(self, threads: int = 1, device: str = "cpu") -> None:
        self.threads, self.device = threads, device

    def share(self, make: Callable[[], Any], on_device: bool = False) -> _Lazy:
        """Made when a task first needs it."""
        return _Lazy(make)

    def map(
        self,
        function: Callable[..., Any],
        shared: _Lazy,
        items: Iterable[tuple[Any, ...]],
        at_once: bool = False,
        ahead: int = AHEAD,
        alone: bool = False,
    ) -> Iterator[Any]:
        """As `Engine.map`."""
        if not at_once:
            yield from (function(shared.made, *item) for item in items)
            return
        under_way: deque[Future[Any]] = deque()
        with single_threads(self.threads) as pool:
            for item in items:
                under_way.append(pool.submit(function, shared.made, *item))
                if len(under_way) >= ahead * self.threads:
                    yield under_way.popleft().result()
            yield from (task.result() for task in under_way)

    def fold(
        self,
        function: Callable[..., Any],
        shared: _Lazy,
        items: Iterable[tuple[Any, ...]],
        keys: Sequence[Hashable],
        total: Callable[[], Total],
    ) -> Folding:
        """As `Engine.fold`."""
        return Here(self.map(function, shared, items), keys, total)


@dataclass
class _Lazy:
    make: Callable[[], Any]

    @cached_property
    def made(self) -> Any:
        return self.make()


LOCAL = Local()


# --- a cluster -----------------------------------------------------------------------------------------------------


class Ray:
    """Tasks over a cluster that is there already, or that is started on this machine and ends with this process."""

    apart = True

    def __init__(self, compute: Compute, device: str = "cpu") -> None:
        """Raises NashSwarmError where Ray is missing, where no cluster is found, or where no node has the cores."""
        self.threads, self.device, self.ray = compute.threads, device, _import_ray()
        self.place: Place = self.threads, os.getcwd(), False
        wait_asleep()
        os.environ.setdefault(*KEPT)  # for a cluster that is started here
        own = {"include_dashboard": False} if compute.address is None else {"address": compute.address}
        try:
            self.ray.init(
                ignore_reinit_error=True,
                logging_level=logging.WARNING,
                runtime_env={"env_vars": _environment()},
                **own,
            )
        except (ConnectionError, RuntimeError) as error:
            raise NashSwarmError(f"compute.address: no Ray cluster answers at {compute.address}: {error}") from error
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        cores, gpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU"))
        if max(cores) < self.threads:
            raise NashSwarmError(
                f"compute.threads: {self.threads} threads for each task, but the largest node has {max(cores)} cores; "
                "lower it, or add nodes"
            )
        wanted = [c // self.threads for c in cores]
        with_gpus = sum(map(min, wanted, gpus))
        if device == "auto":  # the same on all nodes: tasks ask for what they use
            self.device = "cuda" if with_gpus else "cpu"
        self.gpus = int(self.device == "cuda")  # of each task that runs a model
        self.slots = with_gpus if self.gpus else sum(wanted)
        set_crew(max(self.threads, _node_cores()))  # while this process computes, workers wait
        if not self.slots:
            raise NashSwarmError(
                f"compute.device: cuda, but no node of the cluster has a GPU and {self.threads} cores; set cpu, or add "
                "such a node"
            )

    def share(self, make: Callable[[], Any], on_device: bool = False) -> _Shared:
        """As `Engine.share`; `make` is pickled."""
        return _Shared(uuid.uuid4().hex, self.ray.put(make), self.gpus * on_device)

    def map(
        self,
        function: Callable[..., Any],
        shared: _Shared,
        items: Iterable[tuple[Any, ...]],
        at_once: bool = False,
        ahead: int = AHEAD,
        alone: bool = False,
    ) -> Iterator[Any]:
        """As `Engine.map`."""
        threads, directory, _ = self.place
        threads, slots = (1, threads * self.slots) if at_once else (threads, self.slots)
        call = self._remote(_task, function.__name__, threads, shared.gpus * (1 - MEMBER if alone else 1))
        under_way: deque[Any] = deque()
        for item in items:
            under_way.append(call((threads, directory, alone), shared, function, *item))
            if len(under_way) >= ahead * slots:
                yield self.get(under_way.popleft())
        while under_way:
            yield self.get(under_way.popleft())

    def fold(
        self,
        function: Callable[..., Any],
        shared: _Shared,
        items: Iterable[tuple[Any, ...]],
        keys: Sequence[Hashable],
        total: Callable[[], Total],
    ) -> Folding:
        """As `Engine.fold`.

        Parts are objects that the driver owns, so that Ray makes anew what is lost with a node.
        """
        run = self._remote(_parted, function.__name__, self.threads, shared.gpus, num_returns=1 + len(keys))
        add = self._remote(_added, "fold", self.threads)
        return Apart(
            items,
            keys,
            AHEAD * self.slots,
            partial(run, self.place, shared, function, keys),
            partial(add, self.place, total),
            self.get,
            lambda sums: self.ray.wait(sums, num_returns=len(sums), fetch_local=False),
        )

    def _remote(
        self, function: Callable[..., Any], name: str, cpus: int, gpus: float = 0, **options: Any
    ) -> Callable[..., Any]:
        """What begins a task, by the name that Ray shows."""
        # By default Ray ends a process behind each task with a GPU, and with it the model that tasks share.
        own = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES, "max_calls": 0}
        made = self.ray.remote(**own, **options)(function)
        return made.options(name=name).remote  # type: ignore[no-any-return, unused-ignore]

    def get(self, reference: Any) -> Any:
        """What a task returned. Raises what it raised."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None

    def member(self, make: Callable[[], Any]) -> Member:
        """An object that lives on a worker."""
        return Member(self, make)


@dataclass(frozen=True)
class _Shared:
    key: str
    make: Any  # a reference; within this it is passed as it is, and looked up only where it is needed
    gpus: int  # of each task


_made: dict[str, Any] = {}  # of this worker: what was shared last


def _task(place: Place, shared: _Shared, function: Callable[..., Any], *arguments: Any) -> Any:
    _prepare(*place)
    if shared.key not in _made:
        _made.clear()  # what earlier tasks had in common is not needed again
        _made[shared.key] = _import_ray().get(shared.make)()
    return function(_made[shared.key], *arguments)


def _parted(
    place: Place, shared: _Shared, function: Callable[..., Any], keys: Sequence[Hashable], *arguments: Any
) -> list[Any]:
    own, parts = _task(place, shared, function, *arguments)
    return [own, *in_order(parts, keys)]


def _added(place: Place, make: Callable[[], Total], last: bool, total: Total | None, *parts: Any) -> Any:
    """A total to which parts were added, or its result.

    Parts are there before the task starts: while one waited for them, Ray would give its cores to another task.
    """
    _prepare(*place)
    total = total or make()
    for part in parts:
        total.add(part)
    return total.result() if last else total


@lru_cache(maxsize=1)
def _prepare(threads: int, directory: str, alone: bool) -> None:
    """What a stage starts with, and where: paths may be relative. Done again only for what is another `Place`."""
    os.chdir(directory)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nashswarm").setLevel(logging.INFO)
    warnings.filterwarnings(
        "ignore", message="The given NumPy array is not writable"
    )  # no task writes to its arguments
    set_threads(threads)
    set_crew(max(threads, _node_cores()) if alone else threads)


def _node_cores() -> int:
    """Of the cluster's node that this process is on."""
    ray = _import_ray()
    own = ray.get_runtime_context().get_node_id()
    return next(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == own)


class _Host:
    """On a worker: the object, and its methods by name."""

    def __init__(self, place: Place, make: Callable[[], Any]) -> None:
        _prepare(*place)
        self.lazy = _Lazy(make)  # made by the first call, which can hand on what is raised

    def open(self) -> None:
        """Make it, anew if it was made; what is raised, the first call raises again."""
        self.lazy = _Lazy(self.lazy.make)
        with suppress(Exception):
            self.lazy.made  # noqa: B018

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.lazy.made, method)(*arguments)


@dataclass
class Member:
    """An object on a worker. Where the worker is lost, the object is made anew and its lasting calls are repeated."""

    engine: Ray
    make: Callable[[], Any]
    calls: int = 0  # lasting ones so far
    _kept: Any = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="nashswarm-"))
    _host: Any = None

    def __post_init__(self) -> None:
        self._host = self._started()

    def open(self) -> None:
        """Make the object, anew if it was made: in the same process, beside other members', before further calls."""
        self.calls = 0
        self._host.open.remote()

    def submit(self, method: str, *arguments: Any) -> tuple[Any, str, tuple[Any, ...]]:
        """Begin a call; `result` waits for it."""
        return self._host.call.remote(method, *arguments), method, arguments

    def result(self, submitted: tuple[Any, str, tuple[Any, ...]], lasting: bool = False) -> Any:
        """What a call returned. Arguments: `lasting`, whether it changed the object for good."""
        reference, method, arguments = submitted
        for left in range(RETRIES, -1, -1):
            try:
                found = self.engine.get(reference)
                break
            except self.engine.ray.exceptions.RayActorError:
                if not left:
                    raise
                logger.warning("a worker was lost; its %d finished steps are repeated on another", self.calls)
                self._recover()
                reference = self._host.call.remote(method, *arguments)
        if lasting:
            (Path(self._kept.name) / str(self.calls)).write_bytes(pickle.dumps((method, arguments)))
            self.calls += 1
        return found

    def close(self) -> None:
        """End it."""
        self.engine.ray.kill(self._host)
        self._kept.cleanup()

    def _started(self) -> Any:
        """A process for it."""
        # Beside tasks, not instead of them: it works only while it is called, and then no task runs.
        own = {"num_cpus": 0, "num_gpus": self.engine.gpus * MEMBER, "scheduling_strategy": "SPREAD"}
        return self.engine.ray.remote(**own, max_restarts=0)(_Host).remote(self.engine.place, self.make)

    def _recover(self) -> None:
        """All that lasts, in another process."""
        self.engine.ray.kill(self._host)
        self._host = self._started()
        self._host.open.remote()
        for number in range(self.calls):
            method, arguments = pickle.loads((Path(self._kept.name) / str(number)).read_bytes())
            self._host.call.remote(method, *arguments)  # in this order; where this worker is lost, too, `result` sees


def _environment() -> dict[str, str]:
    """Of every worker: the same code as here, and threads that wait as they do here."""
    kept = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}


def _import_ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise NashSwarmError(EXTRA) from error
    return ray  # type: ignore[no-any-return, unused-ignore]


def make_engine(compute: Compute, stage: str) -> Engine:
    """As params say for a stage; its device is none that is still to be chosen."""
    device = compute.device_of(stage)
    if compute.engine == "ray":
        return Ray(compute, device)
    return Local(compute.threads, str(resolve(device)))
