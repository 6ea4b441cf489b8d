"""Keys of the tree whose first part is nobody's: published, found without a salt.

SGLang tells tenants apart by a key's salt, which is part of every child's key in the tree. A key
whose first units are open leaves the salt out there: requests of all salts share the nodes of a
published prefix, and part at its end. No node lies on both sides of that end, so that what a node
is found under follows from its own key, whatever is published or unpublished later.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.radix_cache import RadixKey

from stateful_sglang.attachments.check import Attachment

_KEY = "sglang.srt.mem_cache.radix_cache.RadixKey"
ATTACHMENTS = (
    Attachment(f"{_KEY}.__getitem__", "subclass", "a slice knows how much of it is open"),
    Attachment(f"{_KEY}.match_at", "subclass", "keys agree as far as both are open, or salted"),
    Attachment(f"{_KEY}._check_compatible", "subclass", "salts are compared where they count"),
    Attachment(f"{_KEY}.child_key_at", "subclass", "children are found without a salt where open"),
    Attachment(f"{_KEY}.child_key", "relies", "it is `child_key_at` the key's beginning"),
    Attachment(f"{_KEY}.match", "relies", "it is `match_at` the key's beginning"),
    Attachment(f"{_KEY}.page_aligned", "relies", "it is a slice, and keeps what is open"),
    Attachment(f"{_KEY}.maybe_to_bigram_view", "relies", "it changes the key in place"),
)


class OpenKey(RadixKey):
    """A key whose first ``open_len`` units, whole pages of them, are found without its salt.

    What is open as a whole has no salt at all, so that of two keys' forms there is one for each
    place in the tree.
    """

    __slots__ = ("open_len",)

    open_len: int
    """0 for a key of one kind throughout: salted, or without a salt."""

    @classmethod
    def of(cls, key: RadixKey, open_len: int = 0) -> OpenKey:
        """The same key with its first units open, as far as it reaches; tokens are not copied."""
        salt = key.cache_salt
        if open_len and open_len >= len(key):
            salt = None
        made = cls(key.token_ids, key.extra_key, key.is_bigram, key.limit, salt)
        made.open_len = open_len if salt is not None else 0
        return made

    def __getitem__(self, idx: int | slice) -> OpenKey:
        part = super().__getitem__(idx)
        start = idx.indices(len(self))[0] if isinstance(idx, slice) else idx % len(self)
        return OpenKey.of(part, max(0, self.open_len - start))

    def child_key_at(self, offset: int, page_size: int = 1) -> Any:
        """What a child is found under that begins at this unit."""
        found = super().child_key_at(offset, page_size)
        if offset >= self.open_len:
            return found
        plain = found[1]  # of ((extra key, salt), units), as SGLang makes it
        return plain if self.extra_key is None else (self.extra_key, plain)

    def match_at(self, other: RadixKey, offset: int, page_size: int = 1) -> int:
        """Units shared with ``other`` from ``offset`` on, whole pages of them.

        They end where one key is open and the other is not, and where the salts begin to differ.

        Raises:
            ValueError: The very first units are of different salts, which no walk of the tree
                comes to.
        """
        matched: int = super().match_at(other, offset, page_size)
        mine, theirs = _open_units(self, 0), _open_units(other, offset)
        if mine != theirs or self.cache_salt != other.cache_salt:
            shared = min(mine, theirs)
            if not shared:
                raise ValueError(
                    f"keys are compared with matching salts only, but {mine} units of the one and "
                    f"{theirs} of the other have none"
                )
            return min(matched, shared)
        return matched

    def _check_compatible(self, other: RadixKey) -> None:
        if self.extra_key != other.extra_key:
            super()._check_compatible(other)


def _open_units(key: RadixKey, offset: int) -> int:
    """Units from an offset on that are found without a salt."""
    if key.cache_salt is None:
        return len(key) - offset
    return max(0, getattr(key, "open_len", 0) - offset)
