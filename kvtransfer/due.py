"""What of a pull may leave next, while the prompt is computed chunk by chunk and group of layers by group. Pure."""

from dataclasses import replace

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kvtransfer.exports import Readable

LEAST_AHEAD_BYTES = 128 * 1024
"""A group of layers leaves ahead of its chunk's others when it has that much: a frame has its price."""


class Due:
    """One pull's way through its box: ``box``, layers of which the first of this rank is ``first_layer``.

    Everything below ``_token`` has left; of the tokens up to ``_ahead`` the layers below ``_layer`` have too.
    """

    def __init__(self, box: KvBox, first_layer: int, layout: KvLayout) -> None:
        self._box = box
        self._first_layer = first_layer
        self._layout = layout
        self._token = self._ahead = box.token_start
        self._layer = box.layer_start

    @property
    def done(self) -> bool:
        return self._token >= self._box.token_end

    def take(self, readable: Readable) -> KvBox | None:
        """The next box that may leave, taken as sent; None where nothing may."""
        box = self._box
        if self._ahead > self._token:  # a chunk of which some layers have left: first the rest of it
            if readable.tokens >= self._ahead:
                rest = self._part(self._ahead, self._layer, box.layer_end)
                self._token, self._layer = self._ahead, box.layer_start
                return rest if rest.num_layers else self.take(readable)
            return self._take_ahead(readable, self._ahead)
        tokens = min(readable.tokens, box.token_end)
        if tokens > self._token:
            part = self._part(tokens, box.layer_start, box.layer_end)
            self._token = self._ahead = tokens
            return part
        return self._take_ahead(readable, min(readable.ahead_tokens, box.token_end))

    def _take_ahead(self, readable: Readable, tokens: int) -> KvBox | None:
        layers = min(self._first_layer + readable.ahead_layers, self._box.layer_end)
        if readable.ahead_tokens < tokens or layers <= self._layer or tokens <= self._token or self.done:
            return None
        part = self._part(tokens, self._layer, layers)
        if part.num_bytes(self._layout) < LEAST_AHEAD_BYTES:
            return None
        self._ahead, self._layer = tokens, layers
        return part

    def _part(self, token_end: int, layer_start: int, layer_end: int) -> KvBox:
        return replace(
            self._box, token_start=self._token, token_end=token_end, layer_start=layer_start, layer_end=layer_end
        )
