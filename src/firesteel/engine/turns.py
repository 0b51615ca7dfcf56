"""Who is next: several lanes of waiting work, one piece of each in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Within a lane first come, first served; between lanes round and round. Not thread-safe.

    A lane that queues a hundred pieces makes another wait for one of them.
    """

    def __init__(self) -> None:
        self._lanes: OrderedDict[str, deque[T]] = OrderedDict()

    def put(self, lane: str, item: T) -> None:
        """At the end of its lane; a lane that was empty is the last in the round."""
        self._lanes.setdefault(lane, deque()).append(item)

    def take(self) -> T:
        """The first of the lane whose turn it is. Raises KeyError if nothing waits."""
        lane, items = self._lanes.popitem(last=False)
        item = items.popleft()
        if items:
            self._lanes[lane] = items
        return item

    def take_all(self) -> list[T]:
        """Everything, in the order of its turns."""
        taken = []
        while self:
            taken.append(self.take())
        return taken

    def lengths(self) -> dict[str, int]:
        """How much waits in each lane that is not empty."""
        return {lane: len(items) for lane, items in self._lanes.items()}

    def __bool__(self) -> bool:
        return bool(self._lanes)
