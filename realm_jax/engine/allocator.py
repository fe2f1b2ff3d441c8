"""Which pages of the key/value pool are free. Host bookkeeping only; the pages themselves are in realm_jax.cache."""

from collections.abc import Iterable

from realm_jax.errors import CapacityError


class PageAllocator:
    """Hands out page numbers 0 .. total-1, counts who holds each, and takes it back when nobody does."""

    def __init__(self, total: int):
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._holders: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many hold a page; 0 for a free one."""
        return self._holders.get(page, 0)

    def allocate(self, count: int) -> list[int]:
        """`count` distinct pages, each with one holder.

        Raises:
          CapacityError: fewer are free; nothing is taken.
        """
        if count > len(self._free):
            raise CapacityError(f"{count} pages are needed; {len(self._free)} of {self.total} are free")
        pages = [self._free.pop() for _ in range(count)]
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
                self._free.append(page)

    def _held(self, pages: Iterable[int]) -> list[int]:
        pages = list(pages)
        if len(set(pages)) != len(pages) or not self._holders.keys() >= set(pages):
            raise ValueError(f"pages {pages} are not all handed out")
        return pages
