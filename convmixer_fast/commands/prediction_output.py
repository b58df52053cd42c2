"""Predictions on standard output: for people, as JSON lines, as CSV."""

import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from convmixer_fast.choices import PredictionFormat

__all__ = ["PredictionWriter", "printable"]

_COLUMNS = ("image", "rank", "class", "label", "probability")


class PredictionWriter:
    """Prints the likeliest classes of one image after the other.

    Args:
        form: how.
        names: of the classes, if they are known.
        top: how many are shown.
    """

    def __init__(self, form: PredictionFormat, names: Sequence[str] | None, top: int) -> None:
        self._form, self._names, self._top = form, names, top
        self._rows = csv.writer(sys.stdout, lineterminator="\n")
        if form == "csv":
            self._rows.writerow(_COLUMNS)

    def write(self, path: Path, probabilities: Tensor) -> None:
        """Print those of an image, (num_classes,)."""
        values, indices = probabilities.topk(min(self._top, len(probabilities)))
        classes = [
            {
                "class": index,
                **({} if self._names is None else {"label": self._names[index]}),
                "probability": round(value, 6),
            }
            for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        ]
        if self._form == "json":
            print(json.dumps({"image": str(path), "predictions": classes}))
        elif self._form == "csv":
            for rank, entry in enumerate(classes, 1):
                row = {"image": printable(path), "rank": rank, "label": "", **entry}
                self._rows.writerow([row[name] for name in _COLUMNS])
        else:
            print(printable(path))
            for entry in classes:
                print(f"  {entry['probability']:7.2%}  {entry.get('label', entry['class'])}")


def printable(text: object) -> str:
    """Return ``text`` as a terminal takes it: names of files may hold bytes that are no text."""
    return os.fsencode(str(text)).decode(errors="replace")
