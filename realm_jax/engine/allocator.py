"""Which pages of the key/value pool are free. Host bookkeeping only; the pages themselves are in realm_jax.cache."""

from collections.abc import Iterable

from realm_jax.errors import CapacityError


class PageAllocator:
    """Hands out page numbers 0 .. total-1, counts who holds each, and takes it back when nobody does.

    They lie in regions of equal size, one after another, as the pool does on the devices of a mesh's data axis.
    """

    def __init__(self, total: int, regions: int = 1):
        if total % regions:
            raise ValueError(f"{total} pages do not divide into {regions} regions")
        self.total = total
        self.regions = regions
        size = self.region_size
        self._free = [list(range((r + 1) * size - 1, r * size - 1, -1)) for r in range(regions)]
        self._holders: dict[int, int] = {}

    @property
    def region_size(self) -> int:
        return self.total // self.regions

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return sum(map(len, self._free))

    def free_in(self, region: int) -> int:
        """Those of one region."""
        return len(self._free[region])

    def region_of(self, page: int) -> int:
        return page // self.region_size

    def holders(self, page: int) -> int:
        """How many hold a page; 0 for a free one."""
        return self._holders.get(page, 0)

    def allocate(self, count: int, region: int = 0) -> list[int]:
        """`count` distinct pages of a region, each with one holder.

        Raises:
          CapacityError: fewer are free; nothing is taken.
        """
        free = self._free[region]
        if count > len(free):
            raise CapacityError(f"{count} pages are needed; {len(free)} of {self.region_size} are free")
        pages = [free.pop() for _ in range(count)]
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more holder for each. ValueError if one of them is not handed out."""
        pages = self._held(pages)
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each. ValueError if one is not handed out: an accounting error of the caller."""
        pages = self._held(pages)
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._free[self.region_of(page)].append(page)

    def _held(self, pages: Iterable[int]) -> list[int]:
        pages = list(pages)
        if len(set(pages)) != len(pages) or not self._holders.keys() >= set(pages):
            raise ValueError(f"pages {pages} are not all handed out")
        return pages
