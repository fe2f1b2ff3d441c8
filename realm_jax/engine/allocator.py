"""Which pages of the key/value pool are free. Host bookkeeping only; the pages themselves are in realm_jax.cache."""

from collections.abc import Iterable

from realm_jax.errors import CapacityError


class PageAllocator:
    """Hands out page numbers 0 .. total-1 and takes them back; every page is free or handed out, never both."""

    def __init__(self, total: int):
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def free(self) -> int:
        """Pages that are free now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` distinct pages.

        Raises:
          CapacityError: fewer are free; nothing is taken.
        """
        if count > len(self._free):
            raise CapacityError(f"{count} pages are needed; {len(self._free)} of {self.total} are free")
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Takes pages back. ValueError if one of them is not handed out: an accounting error of the caller."""
        pages = list(pages)
        if len(set(pages)) != len(pages) or not self._used.issuperset(pages):
            raise ValueError(f"pages {pages} are not all handed out")
        self._used.difference_update(pages)
        self._free.extend(pages)
