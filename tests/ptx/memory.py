"""Memory that a kernel works on, and what may go wrong there: bounds, alignment, unset bytes, races.

Every byte knows who wrote and who read it last. Two accesses have an order if one warp makes both, or one comes before a
barrier of their block and the other after it. Two without an order are a race unless both read, or both write the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ptx.values import Lanes

NEVER = -1
STAMPS = 64  # of one moment: the warps of a block, 32 at most, and its atomic accesses
ATOMIC = STAMPS - 1


class Fault(AssertionError):
    """Something that a kernel must not do."""


class Access(NamedTuple):
    """Who accesses memory, and when.

    A moment of a block is the time between two of its barriers. Each has numbers of its own, and later ones are larger;
    blocks run one after another.

    Parameters
    ----------
    stamp : int
        The warp in this moment.
    moment : int
        The first stamp of the moment.
    block : int
        The first stamp of the block.
    """

    stamp: int
    moment: int
    block: int

    def as_atomic(self) -> Access:
        """As one of the atomic accesses of this moment, which do not race with each other."""
        return self._replace(stamp=self.moment + ATOMIC)

    def races_with(self, last: Lanes) -> Lanes:
        """Whether accesses with these stamps have no order with this one."""
        of_another_block = (last < self.block) & (last != NEVER)
        races: Lanes = of_another_block | ((last >= self.moment) & (last != self.stamp))
        return races


class Memory:
    """Bytes from address `base` on.

    Parameters
    ----------
    name : str
        What complaints call it.
    size : int
        How many bytes.
    base : int
        The address of the first.
    exclusive : bool
        Two lanes of one warp must not write different bytes to an address. In shared memory Triton has lanes do so that have
        the same number, sums that they rounded in different orders: any of them will do.
    warps : int
        How many start products that read here asynchronously.
    """

    def __init__(self, name: str, size: int, base: int = 0, exclusive: bool = False, warps: int = 0) -> None:
        self.name, self.base, self.exclusive = name, base, exclusive
        self.bytes = np.zeros(size, np.uint8)
        self.usable = np.ones(size, np.bool_)
        self.set = np.zeros(size, np.bool_)
        self.written, self.read_at = (np.full(size, NEVER, np.int64) for _ in range(2))
        self.by_several = np.zeros(size, np.bool_)  # warps, in the moment in which it was last read
        self.by_earlier = np.zeros(size, np.bool_)  # blocks than the one that read it last
        self.fenced = np.zeros((warps, size), np.bool_)  # since it was written, as each warp knows
        self.products = np.zeros(size, np.int16)  # how many are under way that read it

    def read(self, addresses: Lanes, size: int, access: Access) -> Lanes:
        """`size` bytes from each address, (lanes, size)."""
        return self._read(self._places(addresses, size), access)

    def _read(self, at: Lanes, access: Access) -> Lanes:
        if not self.set[at].all():
            raise Fault(f"reads bytes of {self.name} that were never set")
        if access.races_with(self.written[at]).any():
            raise Fault(f"race in {self.name}: reads what another warp writes")
        self._note_reading(at, access)
        return self.bytes[at]

    def _note_reading(self, at: Lanes, access: Access) -> None:
        last = self.read_at[at]
        self.by_several[at] = (last >= access.moment) & ((last != access.stamp) | self.by_several[at])
        self.by_earlier[at] |= (last < access.block) & (last != NEVER)
        self.read_at[at] = access.stamp

    def write(self, addresses: Lanes, values: Lanes, access: Access) -> None:
        """Write bytes (lanes, size) to the addresses."""
        at = self.claim(addresses, values, access)
        self.bytes[at], self.set[at] = values, True
        if self.exclusive and (self.bytes[at] != values).any():
            raise Fault(f"race in {self.name}: two lanes write different bytes to one address")

    def claim(self, addresses: Lanes, values: Lanes, access: Access) -> Lanes:
        """Where they are, after the checks of a write of these values; nobody may read there before it is made."""
        at = self._places(addresses, values.shape[1])
        if self.products[at].any():
            raise Fault(f"race in {self.name}: writes what a product under way reads")
        last = self.read_at[at]
        several = self.by_several[at] & (last >= access.moment)
        if (access.races_with(last) | several | self.by_earlier[at]).any():
            raise Fault(f"race in {self.name}: writes what another warp reads")
        if (access.races_with(self.written[at]) & ((self.bytes[at] != values) | ~self.set[at])).any():
            raise Fault(f"race in {self.name}: two warps write to one address")
        self.written[at], self.set[at], self.fenced[:, at] = access.stamp, False, False
        return at

    def fence(self, warp: int, access: Access) -> None:
        """Let products read what was written before, as far as this warp knows."""
        self.fenced[warp] |= ~access.races_with(self.written)

    def meet(self) -> None:
        """Let all warps know of each other's fences, at a barrier."""
        self.fenced[:] = self.fenced.any(0)

    def begin_to_read(self, addresses: Lanes, size: int, warp: int, access: Access) -> tuple[Lanes, Lanes]:
        """Bytes as `read` gives them, to a product that this warp starts, and their places, for `has_read`."""
        at = self._places(addresses, size)
        found = self._read(at, access)
        if not self.fenced[warp, at].all():
            raise Fault(f"a product reads bytes of {self.name} that were written, and no fence.proxy.async came since")
        at = np.unique(at)
        self.products[at] += 1
        return found, at

    def has_read(self, at: Lanes, access: Access) -> None:
        """End a product's reading, now."""
        self.products[at] -= 1
        self._note_reading(at, access)

    def _places(self, addresses: Lanes, size: int) -> Lanes:
        if (addresses % size).any():
            raise Fault(f"{size} bytes of {self.name} at an address that is no multiple of it")
        at: Lanes = (addresses - self.base)[:, None] + np.arange(size)
        if (at < 0).any() or (at >= len(self.bytes)).any() or not self.usable[at].all():
            raise Fault(f"{size} bytes at an address out of bounds of {self.name}")
        return at
