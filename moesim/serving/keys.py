"""Which keys a token sees and stores: of all tokens, of a window, of a chunk, or of a window and every n-th token.

Room is counted in layer-pages: `page` tokens of one layer (or of as many as all kinds of layers share). A prefix cache
holds keys and values of beginnings that several prompts share once.
"""

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np

from moesim.scenario import Model
from moesim.scenario.model import LocalGlobal


@dataclass(frozen=True, kw_only=True)
class LayerKeys:
    """Layers of one kind. window 0: all tokens; every > 0: one in so many beyond the window, too."""

    layers: int
    window: int = 0
    every: int = 0
    is_chunked: bool = False

    def seen(self, tokens: Any) -> Any:
        """Keys that a token sees when it is number `tokens` (an int or an array), which are those stored of it."""
        if not self.window:
            return tokens
        if self.is_chunked:
            return np.where(tokens > 0, (tokens - 1) % self.window + 1, 0)
        near = np.minimum(tokens, self.window)
        return near + np.maximum(tokens - self.window, 0) // self.every if self.every else near

    def seen_by_part(self, tokens: int, before: int) -> float:
        """(query, key) pairs of `tokens` tokens behind `before` others, each seeing what came before it and itself."""
        if not self.window:
            return tokens * before + tokens * (tokens + 1) / 2
        return float(self._pairs_of(before + tokens) - self._pairs_of(before))

    def _pairs_of(self, tokens: int) -> float:
        """Pairs of the first so many tokens."""
        window = self.window
        if self.is_chunked:
            whole, rest = divmod(tokens, window)
            return whole * window * (window + 1) / 2 + rest * (rest + 1) / 2
        near, beyond = min(tokens, window), max(tokens - window, 0)
        pairs = near * (near + 1) / 2 + float(beyond) * window
        if self.every:
            whole, rest = divmod(beyond, self.every)
            pairs += self.every * whole * (whole - 1) / 2 + whole * (rest + 1)
        return pairs


@dataclass(frozen=True, kw_only=True)
class KeyLayout:
    """What all layers of a model store; `page` tokens to a page."""

    kinds: tuple[LayerKeys, ...]
    page: int

    @cached_property
    def unit(self) -> int:
        """Layers behind one layer-page."""
        return gcd(*(kind.layers for kind in self.kinds))

    @cached_property
    def _is_plain(self) -> bool:
        return len(self.kinds) == 1 and not self.kinds[0].window

    def pages(self, tokens: Any) -> Any:
        """Layer-pages that a request of so many tokens holds (an int or an array)."""
        if self._is_plain:
            return -(-tokens // self.page)
        return sum(kind.layers // self.unit * self._pages(kind, tokens) for kind in self.kinds)

    def shared_pages(self, tokens: int) -> int:
        """Those of them that requests with the same first tokens share: of layers that see all tokens."""
        if not tokens:
            return 0
        return sum(kind.layers // self.unit * (tokens // self.page) for kind in self.kinds if not kind.window)

    def seen(self, tokens_S: Any) -> tuple[int, ...]:
        """Keys that tokens see together, by kind of layer."""
        return tuple(int(kind.seen(tokens_S).sum()) for kind in self.kinds)

    def _pages(self, kind: LayerKeys, tokens: Any) -> Any:
        if not kind.window:
            return -(-tokens // self.page)
        most = -(-kind.window // self.page) + 1  # a window that moves covers parts of two pages
        far = np.maximum(tokens - kind.window, 0) // kind.every if kind.every else 0
        return np.minimum(-(-tokens // self.page), most) + -(-far // self.page)


def key_layout(model: Model, *, page: int, extra: int = 0) -> KeyLayout:
    """That of a model's layers, with `extra` ones behind them that are like the last."""
    attention, local, layers = model.attention, model.local, model.layers + extra
    if isinstance(attention, LocalGlobal):
        kind = LayerKeys(layers=layers, window=attention.window, every=attention.global_every or 0)
        return KeyLayout(kinds=(kind,), page=page)
    number = sum(model.is_local(layer) for layer in range(layers))
    if local is None or number == 0:
        return KeyLayout(kinds=(LayerKeys(layers=layers),), page=page)
    kinds = [LayerKeys(layers=number, window=local.window, is_chunked=local.chunked)]
    if number < layers:
        kinds.append(LayerKeys(layers=layers - number))
    return KeyLayout(kinds=tuple(kinds), page=page)


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
