"""The prefix cache of a data group: keys and values of beginnings that several prompts share, held once."""

from dataclasses import dataclass

from moesim.serving.keys import KeyLayout


@dataclass(slots=True)
class _Held:
    tokens: int
    pages: int
    users: int
    last_use: int


class PrefixCache:
    """Prefixes by number. Those that no request uses make room, the one used longest ago first."""

    def __init__(self, layout: KeyLayout) -> None:
        self._layout = layout
        self._held: dict[int, _Held] = {}
        self._uses = 0
        self.pages = 0  # layer-pages in use

    def __contains__(self, prefix: int) -> bool:
        return prefix in self._held

    def tokens(self, prefix: int) -> int:
        """Tokens of a prefix that is held."""
        return self._held[prefix].tokens

    def keep(self, prefix: int, tokens: int) -> None:
        """Hold the first `tokens` tokens, whole pages; the request that computed them uses them."""
        pages = int(self._layout.pages(tokens))
        self._held[prefix] = _Held(tokens, pages, 0, 0)
        self.pages += pages
        self.use(prefix)

    def use(self, prefix: int) -> None:
        """A request begins to use it."""
        self._uses += 1
        held = self._held[prefix]
        held.users += 1
        held.last_use = self._uses

    def leave(self, prefix: int) -> None:
        """A request is done with it."""
        self._held[prefix].users -= 1

    def evict(self, *, but: int = -1) -> bool:
        """Drop the unused prefix that was used longest ago, `but` one; whether there was one."""
        unused = [prefix for prefix, held in self._held.items() if held.users == 0 and prefix != but]
        if not unused:
            return False
        oldest = min(unused, key=lambda prefix: self._held[prefix].last_use)
        self.pages -= self._held.pop(oldest).pages
        return True
