"""States of the conditions of a sampling run, which ComfyUI combines differently from call to call."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sws_export.runtime.session import Session, Snapshot, Stream

Row = tuple[Any, ...]
"""Identifies one sample of one condition: (uuid, positive or negative, index of the sample)."""


class ConditionStates:
    """The state of each row, kept in the stream that ran it last.

    A call runs some rows together, in one stream. As long as the same rows are called together, as in a usual
    run, the state stays in that stream. Otherwise the states of the rows are collected from the streams of
    the calls before. A stream that holds no current state is released.
    """

    def __init__(self) -> None:
        self._streams: dict[tuple[Row, ...], Stream] = {}
        self._owners: dict[Row, tuple[tuple[Row, ...], int]] = {}

    def __len__(self) -> int:
        """Number of streams."""
        return len(self._streams)

    def clear(self) -> None:
        """Drop all states and release the streams."""
        self._streams.clear()
        self._owners.clear()

    def state(self, row: Row) -> Snapshot:
        """The state of a row, without the batch dimension; empty if it has none."""
        if row not in self._owners:
            return {}
        rows, index = self._owners[row]
        return {name: values[index] for name, values in self._streams[rows].state().items()}

    def stream(self, session: Session, rows: Sequence[Row]) -> Stream:
        """A stream with the states of `rows`, zero for new rows; further rows of its batch are padding.

        The caller steps it once, with `rows` as the first samples of the batch.
        """
        key = tuple(rows)
        stream = self._streams.get(key)
        if stream is None or any(self._owners.get(row, (None, 0))[0] != key for row in rows):
            collected = [self.state(row) for row in rows]
            stream = self._streams[key] = stream or session.stream()
            _restore(stream, collected)
        for index, row in enumerate(rows):
            self._owners[row] = (key, index)
        used = {owner for owner, _ in self._owners.values()}
        for unused in self._streams.keys() - used:
            del self._streams[unused]
        return stream


def _restore(stream: Stream, states: Sequence[Snapshot]) -> None:
    """Write the states of the rows of a batch; those of another image size are zero, as at a start."""
    known = next((state for state in states if state), None)
    if known is None:
        stream.reset()
        return
    stream.restore(
        {
            name: np.stack(
                [
                    state[name]
                    if name in state and state[name].shape == values.shape
                    else np.zeros_like(values)
                    for state in states
                ]
            )
            for name, values in known.items()
        }
    )
