"""The caches: what layers need to go on with a sample or batch (`KVCache`), and recently used values (`LRUCache`).

A layer with full attention needs keys and values; a linear-attention layer needs a state, which cannot be cut, so that
snapshots of it are kept where a prompt may be cut later. `KVCache` has the form that transformers' decoder layers
expect: `update(key, value, layer_idx)`, and for states `update_conv_state` and `update_recurrent_state`. It is cheap to
fork (tensors are shared, never written in place once shared), so a session's prefix serves many questions. `reserve`
gives a decoding batch room to append keys in place instead of copying every step.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

GROWTH = 128  # positions added when a reserved cache runs out of room


@dataclass(frozen=True, slots=True)
class LinearState:
    """What a linear-attention layer needs to go on."""

    conv: Tensor  # (batch, channels, kernel), the convolution's last inputs
    recurrent: Tensor | None = None  # (batch, heads, key width, value width); None until the first pass has ended
    length: int = 0  # tokens that it has seen; only counted where snapshots are taken
    snapshots: tuple[LinearState, ...] = ()  # itself after fewer tokens, shortest first

    def mapped(self, change: Callable[[Tensor], Tensor], *, snapshots: bool = False) -> LinearState:
        """The state with its tensors changed, without its snapshots unless they are wanted."""
        recurrent = None if self.recurrent is None else change(self.recurrent)
        own = LinearState(change(self.conv), recurrent, self.length)
        if not snapshots:
            return own
        earlier = tuple(own if one.length == self.length else one.mapped(change) for one in self.snapshots)
        return dataclasses.replace(own, snapshots=earlier)

    def after(self, length: int) -> LinearState:
        """The state after the first `length` tokens (ValueError: no snapshot was taken there)."""
        if self.length <= length:
            return self
        earlier = tuple(one for one in self.snapshots if one.length <= length)
        if not earlier or earlier[-1].length != length:
            raise ValueError(f"No snapshot of the layer's state was taken after {length} tokens.")
        return dataclasses.replace(earlier[-1], snapshots=earlier)

    @property
    def nbytes(self) -> int:
        """Memory, snapshots included."""
        own = [self.conv] if self.recurrent is None else [self.conv, self.recurrent]
        earlier = sum(one.nbytes for one in self.snapshots if one.length != self.length)
        return sum(t.numel() * t.element_size() for t in own) + earlier


class KVCache:
    """Per layer, keys and values of shape (batch, kv_heads, length, head_dim), or a `LinearState`."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor, int]] = {}  # buffers and the filled length
        self._states: dict[int, LinearState] = {}
        self._owned = False

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values of one layer; returns all of that layer's."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (key, value, key.shape[2])
            return key, value
        keys, values, length = self._layers[layer_idx]
        end = length + key.shape[2]
        if self._owned:
            if end > keys.shape[2]:
                keys, values = (_with_room(t, length, end - length + GROWTH) for t in (keys, values))
            keys[:, :, length:end] = key
            values[:, :, length:end] = value
        else:
            keys = torch.cat([keys[:, :, :length], key], dim=2)
            values = torch.cat([values[:, :, :length], value], dim=2)
        self._layers[layer_idx] = (keys, values, end)
        return keys[:, :, :end], values[:, :, :end]

    def get_conv_state(self, layer_idx: int, *_: Any, **__: Any) -> Tensor | None:
        """The convolution's last inputs, as a copy that the layer may write to."""
        state = self._states.get(layer_idx)
        if state is None:
            return None
        self._states[layer_idx] = dataclasses.replace(state, conv=state.conv.clone())
        return self._states[layer_idx].conv

    def get_recurrent_state(self, layer_idx: int, *_: Any, **__: Any) -> Tensor | None:
        """The recurrent state, which is replaced and never written to."""
        state = self._states.get(layer_idx)
        return None if state is None else state.recurrent

    def is_recording_past(self, *_: Any, **__: Any) -> bool:
        """Whether the convolution's inputs are kept for longer than its kernel: never."""
        return False

    def update_conv_state(self, inputs: Tensor, layer_idx: int, *, conv_kernel_size: int, **_: Any) -> Tensor:
        """Append inputs (batch, channels, length) of the convolution; returns them after the last earlier ones."""
        state = self._states.get(layer_idx)
        seen = inputs if state is None else torch.cat([state.conv, inputs], dim=-1)
        missing = conv_kernel_size - seen.shape[-1]
        last = torch.nn.functional.pad(seen, (missing, 0)) if missing > 0 else seen[..., -conv_kernel_size:].clone()
        self._states[layer_idx] = LinearState(last) if state is None else dataclasses.replace(state, conv=last)
        return seen

    def update_recurrent_state(self, recurrent: Tensor, layer_idx: int, **_: Any) -> Tensor:
        """Replace the recurrent state."""
        self._states[layer_idx] = dataclasses.replace(self._states[layer_idx], recurrent=recurrent)
        return recurrent

    def snapshot(self, layer_idx: int, length: int, *, keep: bool) -> None:
        """Note how many tokens a layer's state has seen, and keep it where the prompt may be cut later."""
        state = dataclasses.replace(self._states[layer_idx], length=length)
        if keep:
            state = dataclasses.replace(state, snapshots=(*state.snapshots, dataclasses.replace(state, snapshots=())))
        self._states[layer_idx] = state

    def __contains__(self, layer_idx: int) -> bool:
        return layer_idx in self._layers or layer_idx in self._states

    def __len__(self) -> int:
        """Filled length of the first layer held; 0 when empty."""
        filled = [length for _, _, length in self._layers.values()]
        return next(iter([*filled, *(state.length for state in self._states.values())]), 0)

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer."""
        keys, values, length = self._layers[layer_idx]
        return keys[:, :, :length], values[:, :, :length]

    def fork(self) -> KVCache:
        """A cache that shares these tensors; appending to either leaves the other as it was."""
        out = KVCache()
        out._layers = {i: (k[:, :, :n], v[:, :, :n], n) for i, (k, v, n) in self._layers.items()}
        out._states = dict(self._states)
        return out

    def truncated(self, length: int) -> KVCache:
        """A fork that keeps only the first `length` positions (ValueError: a layer's state has no snapshot there)."""
        out = KVCache()
        out._states = {i: state.after(length) for i, state in self._states.items()} if length else {}
        for i, (keys, values, filled) in self._layers.items():
            n = min(length, filled)
            out._layers[i] = (keys[:, :, :n], values[:, :, :n], n)
        return out

    def merged(self, other: KVCache) -> KVCache:
        """A fork that also holds the layers of another cache (their layers must differ)."""
        out = self.fork()
        out._layers |= other.fork()._layers
        out._states |= other._states
        return out

    def clone(self, layers: Iterable[int] | None = None) -> KVCache:
        """An own copy, of some layers or of all, that shares no memory with this one."""
        out = KVCache()
        for i in [*self._layers, *self._states] if layers is None else layers:
            if i in self._states:
                out._states[i] = self._states[i].mapped(Tensor.clone, snapshots=True)
                continue
            keys, values = self.layer(i)
            out._layers[i] = (keys.clone(), values.clone(), keys.shape[2])
        return out

    @property
    def nbytes(self) -> int:
        """Memory of the buffers, room to grow included."""
        pairs = [tensor for keys, values, _ in self._layers.values() for tensor in (keys, values)]
        return sum(t.numel() * t.element_size() for t in pairs) + sum(s.nbytes for s in self._states.values())

    def reserve(self, extra: int) -> KVCache:
        """An own copy with room for `extra` more positions, appended in place; for decoding, so without snapshots."""
        out = KVCache()
        out._owned = True
        out._states = {i: dataclasses.replace(state, snapshots=()) for i, state in self._states.items()}
        for i, (keys, values, n) in self._layers.items():
            out._layers[i] = (_with_room(keys, n, extra), _with_room(values, n, extra), n)
        return out

    @staticmethod
    def stack(caches: Sequence[KVCache], lengths: Sequence[int], extra: int = 0) -> KVCache:
        """Join one-row caches into a batch, shorter ones padded with zeros on the left.

        Args:
            caches: each with batch 1; all with the same layers, or empty.
            lengths: filled length of each.
            extra: room to reserve for appending in place.
        """
        if len(caches) == 1:
            return caches[0].reserve(extra) if extra else caches[0].fork()
        out = KVCache()
        out._owned = extra > 0
        longest = max(lengths)
        template = next((c for c in caches if c._layers or c._states), None)
        if template is None or longest == 0:
            return out
        for i in template._states:
            states = [cache._states[i] for cache in caches]
            recurrent = torch.cat([s.recurrent for s in states if s.recurrent is not None])
            out._states[i] = LinearState(torch.cat([state.conv for state in states]), recurrent)
        for i, (keys, _, _) in template._layers.items():
            shape = (len(caches), keys.shape[1], longest + extra, keys.shape[3])
            new_keys, new_values = keys.new_zeros(shape), keys.new_zeros(shape)
            for row, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
                if length:
                    new_keys[row, :, longest - length : longest] = cache.layer(i)[0][0]
                    new_values[row, :, longest - length : longest] = cache.layer(i)[1][0]
            out._layers[i] = (new_keys, new_values, longest)
        return out

    def select(self, rows: Sequence[int], drop: int = 0) -> KVCache:
        """An own copy of some rows, without the first `drop` positions (padding of rows that left). `rows`: indices to
        keep, in order. `drop`: positions to cut on the left."""
        out = KVCache()
        out._owned = self._owned
        out._states = {i: state.mapped(lambda t: t[list(rows)]) for i, state in self._states.items()}
        for i, (keys, values, n) in self._layers.items():
            out._layers[i] = (
                keys[list(rows), :, drop:].contiguous(),
                values[list(rows), :, drop:].contiguous(),
                n - drop,
            )
        return out

    def row(self, row: int, keep: Iterable[slice]) -> KVCache:
        """One row of a batch as a cache of its own, made of the given pieces of its length. `keep`: slices along the
        length, in order."""
        pieces = list(keep)
        out = KVCache()
        out._states = {i: state.mapped(lambda t: t[row : row + 1]) for i, state in self._states.items()}
        for i in self._layers:
            keys, values = self.layer(i)
            new_keys = [keys[row : row + 1, :, piece] for piece in pieces]
            new_values = [values[row : row + 1, :, piece] for piece in pieces]
            k = new_keys[0] if len(new_keys) == 1 else torch.cat(new_keys, dim=2)
            v = new_values[0] if len(new_values) == 1 else torch.cat(new_values, dim=2)
            out._layers[i] = (k, v, k.shape[2])
        return out


def _with_room(buffer: Tensor, length: int, extra: int) -> Tensor:
    new = buffer.new_empty((*buffer.shape[:2], length + extra, buffer.shape[3]))
    new[:, :, :length] = buffer[:, :, :length]
    return new


Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """The most recently used values by key. Safe to use from several threads. `max_bytes`: memory of all values
    together; 0 keeps nothing."""

    def __init__(self, max_bytes: int, size: Callable[[Value], int]) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._size = size
        self._bytes = 0
        self._values: OrderedDict[bytes, Value] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory of all values."""
        return self._bytes

    @property
    def entries(self) -> int:
        """Number of values held."""
        return len(self._values)

    def get(self, key: bytes) -> Value | None:
        """A value, which becomes the most recently used one."""
        with self._lock:
            value = self._values.get(key)
            if value is None:
                self.misses += 1
                return None
            self.hits += 1
            self._values.move_to_end(key)
            return value

    def peek(self, key: bytes) -> Value | None:
        """A value, without counting as a use of it."""
        with self._lock:
            return self._values.get(key)

    def put(self, key: bytes, value: Value) -> None:
        """Hold a value in place of an earlier one; one that is larger than the bound is not held."""
        size = self._size(value)
        with self._lock:
            if size > self.max_bytes:
                return
            old = self._values.pop(key, None)
            self._bytes += size - (self._size(old) if old is not None else 0)
            self._values[key] = value
            while self._bytes > self.max_bytes:
                _, dropped = self._values.popitem(last=False)
                self._bytes -= self._size(dropped)
