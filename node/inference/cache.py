"""Which models may be in memory together: least recently used within a byte budget, pinned ones never out.

A pure policy: it holds numbers, never memory. Knows no engine, no torch and no clock: the order of calls is its time.
"""

from dataclasses import dataclass, replace

from contracts.errors import Busy, Conflict, NoSpace, NotFound

MODELS_MAX = 16
"""Models loaded at once, unless the settings say less."""


@dataclass(frozen=True)
class Resident:
    """A model in the cache. `users` are the requests that need it now."""

    key: str
    size_bytes: int
    pinned: bool
    users: int = 0


@dataclass(frozen=True)
class CacheStatistics:
    """What the cache holds, for metrics."""

    budget_bytes: int
    used_bytes: int
    pinned_bytes: int
    models: int
    hits: int
    misses: int
    evictions: int


class ModelCache:
    """The models that are in memory, the least recently used first."""

    def __init__(self, budget_bytes: int, models_max: int = MODELS_MAX, answers_bytes: int = 0) -> None:
        """`answers_bytes` of the budget no model may take: the least that conversations have."""
        assert 0 <= answers_bytes < budget_bytes
        assert models_max > 0
        self._budget_bytes = budget_bytes
        self._answers_bytes = answers_bytes
        self._models_bytes = budget_bytes - answers_bytes
        self._models_max = models_max
        self._residents: dict[str, Resident] = {}
        self._hits = 0
        self._misses = 0
        self._evictions = 0

    def __contains__(self, key: str) -> bool:
        return key in self._residents

    def residents(self) -> tuple[Resident, ...]:
        """Every model in the cache, the one to go first at the front."""
        return tuple(self._residents.values())

    def hit(self, key: str, pin: bool = False) -> bool:
        """Whether it is there; if so it is now the most recently used, and pinned if that is asked."""
        resident = self._residents.pop(key, None)
        if resident is None:
            self._misses += 1
            return False
        self._hits += 1
        self._residents[key] = replace(resident, pinned=resident.pinned or pin)
        return True

    def room_bytes(self) -> int:
        """What is left beside the pinned models, were all others gone."""
        return self._models_bytes - sum(resident.size_bytes for resident in self._residents.values() if resident.pinned)

    def plan(self, key: str, size_bytes: int, how: str = "") -> tuple[str, ...]:
        """The keys that have to go so that this model fits, oldest first.

        NoSpace: it can never fit beside what is pinned. Busy: it would, were it not for models in use. `how` says in
        the refusal what the size is of.
        """
        assert key not in self._residents
        pinned = [resident for resident in self._residents.values() if resident.pinned]
        pinned_bytes = sum(resident.size_bytes for resident in pinned)
        if pinned_bytes + size_bytes > self._models_bytes or len(pinned) + 1 > self._models_max:
            raise NoSpace(self._explain(key, size_bytes, how))
        used_bytes = sum(resident.size_bytes for resident in self._residents.values())
        count = len(self._residents)
        out: list[str] = []
        for resident in self._residents.values():
            if used_bytes + size_bytes <= self._models_bytes and count + 1 <= self._models_max:
                break
            if not resident.pinned and resident.users == 0:
                out.append(resident.key)
                used_bytes -= resident.size_bytes
                count -= 1
        if used_bytes + size_bytes > self._models_bytes or count + 1 > self._models_max:
            raise Busy(self._explain(key, size_bytes, how))
        return tuple(out)

    def add(self, key: str, size_bytes: int, pin: bool = False) -> None:
        """It is about to be loaded: its bytes count from now on."""
        assert key not in self._residents
        self._residents[key] = Resident(key, size_bytes, pin)
        used_bytes = sum(resident.size_bytes for resident in self._residents.values())
        assert used_bytes <= self._models_bytes, f"{used_bytes} bytes in a cache of {self._models_bytes} for models"
        assert len(self._residents) <= self._models_max

    def resize(self, key: str, size_bytes: int) -> None:
        """It turned out to take another size; NoSpace, and nothing changed, if that is too much."""
        resident = self._residents[key]
        used_bytes = sum(other.size_bytes for other in self._residents.values()) - resident.size_bytes
        if used_bytes + size_bytes > self._models_bytes:
            raise NoSpace(
                f"{key} takes {size_bytes} bytes, more than its {resident.size_bytes} because its weights cannot be "
                f"mapped as they are; the cache has {self._models_bytes - used_bytes} for it; import the model again"
            )
        self._residents[key] = replace(resident, size_bytes=size_bytes)

    def remove(self, key: str, evicted: bool = False) -> None:
        """Its memory is back. Unknown keys are fine: a crash empties the engine before its callers know."""
        if self._residents.pop(key, None) is not None and evicted:
            self._evictions += 1

    def check_removable(self, key: str, unpin: bool) -> None:
        """Refuse to unload what is not there, what is pinned (unless unpinning is meant) and what is in use."""
        resident = self._residents.get(key)
        if resident is None:
            raise NotFound(f"{key} is not loaded; loaded are: {', '.join(self._residents) or 'none'}")
        if resident.pinned and not unpin:
            raise Conflict(f"{key} is the pinned core model and stays loaded; make another model the core model first")
        if resident.users:
            raise Busy(f"{key} is answering {resident.users} requests; try again when they are done")

    def unpin(self, key: str) -> None:
        """From now on it may be evicted like any other."""
        if key in self._residents:
            self._residents[key] = replace(self._residents[key], pinned=False)

    def enter(self, key: str) -> None:
        """A request needs it: most recently used, and not to be evicted until the request leaves."""
        resident = self._residents.pop(key)
        self._residents[key] = replace(resident, users=resident.users + 1)

    def leave(self, key: str) -> None:
        """The request is done. After a crash the model may be gone already."""
        resident = self._residents.get(key)
        if resident is not None and resident.users:
            self._residents[key] = replace(resident, users=resident.users - 1)

    def clear(self) -> None:
        """The engine is gone, and every model with it."""
        self._residents.clear()

    def left_bytes(self, coming_bytes: int = 0) -> int:
        """What conversations may take while no other model is loaded but one of this size."""
        return self._budget_bytes - coming_bytes - sum(resident.size_bytes for resident in self._residents.values())

    def statistics(self) -> CacheStatistics:
        """A frozen picture."""
        return CacheStatistics(
            budget_bytes=self._budget_bytes,
            used_bytes=sum(resident.size_bytes for resident in self._residents.values()),
            pinned_bytes=sum(resident.size_bytes for resident in self._residents.values() if resident.pinned),
            models=len(self._residents),
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )

    def _explain(self, key: str, size_bytes: int, how: str) -> str:
        """What is needed, what there is, who holds it, and what would have to go."""
        pinned = [resident for resident in self._residents.values() if resident.pinned]
        in_use = [resident for resident in self._residents.values() if resident.users and not resident.pinned]
        idle = [resident for resident in self._residents.values() if not resident.users and not resident.pinned]
        parts = [
            f"{key} needs {size_bytes} bytes{how} of a cache of {self._budget_bytes}",
            f"pinned {_listed(pinned)}",
            f"in use {_listed(in_use)}",
        ]
        if self._answers_bytes:
            parts.append(f"kept for answers {self._answers_bytes}")
        if idle:
            parts.append(f"could go {_listed(idle)}")
        if len(self._residents) >= self._models_max:
            parts.append(f"{len(self._residents)} models are loaded, the limit is {self._models_max}")
        held_bytes = sum(resident.size_bytes for resident in pinned)
        short_bytes = held_bytes + size_bytes - self._models_bytes
        if size_bytes > self._models_bytes:
            parts.append(f"raise the cache by at least {size_bytes - self._models_bytes} bytes")
        elif short_bytes > 0:
            parts.append(f"raise the cache by at least {short_bytes} bytes, or {_listed(pinned)} would have to go")
        elif in_use:
            parts.append("try again when a request is done")
        return "; ".join(parts)


def _listed(residents: list[Resident]) -> str:
    return ", ".join(f"{resident.key} ({resident.size_bytes})" for resident in residents) or "nothing"
