"""Whose tensors are these? The names of each family of ConvMixers, behind any prefix."""

import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from convmixer_fast.errors import CheckpointError

__all__ = ["Named", "renamed"]

_log = logging.getLogger(__name__)

_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_CONV = r"(weight|bias)"
_LAYER = r"(\d{1,4})"


@dataclass(frozen=True)
class _Family:
    """How a family names its tensors, and what they are called here.

    ``{i}`` is the layer; in a Sequential that holds stem and layers in one row, the row's index
    less ``offset``, the stem's length.
    """

    patterns: tuple[tuple[re.Pattern[str], str], ...]
    offset: int = 0

    def rename(self, name: str) -> str | None:
        """Return what ``name`` is called here, or None where it is none of the family's."""
        for pattern, template in self.patterns:
            match = pattern.fullmatch(name)
            if match is not None:
                layer = int(match[1]) - self.offset if "{i}" in template else 0
                return match.expand(template.replace("{i}", str(layer)))
        return None


def _family(stem: str, layers: str, head: str, parts: str, offset: int = 0) -> _Family:
    """Return a family.

    Args:
        stem: what its convolution and norm are called: ``stem.0 stem.2``.
        layers: what a layer's name begins with; ends with a dot if it is not empty.
        head: what the linear layer is called.
        parts: the names in a layer of depthwise convolution, norm, pointwise convolution, norm.
        offset: see :class:`_Family`.
    """
    conv, norm = stem.split()
    rows = [(rf"{conv}\.{_CONV}", r"stem.0.\1"), (rf"{norm}\.{_NORM}", r"stem.2.\1")]
    ours = ("0.fn.0", "0.fn.2", "1", "3")
    for theirs, mine, last in zip(parts.split(), ours, (_CONV, _NORM) * 2, strict=True):
        rows.append((rf"{layers}{_LAYER}\.{re.escape(theirs)}\.{last}", rf"blocks.{{i}}.{mine}.\2"))
    rows.append((rf"{head}\.{_CONV}", r"head.\1"))
    return _Family(tuple((re.compile(pattern), here) for pattern, here in rows), offset)


_TIMM_PARTS = "0.fn.0 0.fn.2 1 3"
_FAMILIES = {
    "timm": _family(r"stem\.0 stem\.2", r"blocks\.", "head", _TIMM_PARTS),
    "locuslab": _family("0 2", "", r"\d+", _TIMM_PARTS, offset=3),
    "the tweetable version": _family(r"0\.0 0\.2", "", r"\d+", "0.0.0 0.0.2 1.0 1.2", offset=1),
    "labml": _family(
        r"patch_emb\.conv patch_emb\.norm",
        r"conv_mixer_layers\.",
        r"classification\.linear",
        "depth_wise_conv norm1 point_wise_conv norm2",
    ),
    "mmpretrain": _family(
        r"(?:backbone\.)?stem\.0 (?:backbone\.)?stem\.2",
        r"(?:backbone\.)?stages\.",
        r"head\.fc",
        _TIMM_PARTS,
    ),
}

# What profilers, averaging and the like leave beside the weights.
_BOOKKEEPING = re.compile(r"(.*\.)?(total_ops|total_params|n_averaged|num_updates|decay|initted)")
_MOST_PREFIXES = 4


@dataclass(frozen=True)
class Named:
    """The tensors of a ConvMixer in this package's names."""

    tensors: dict[str, Tensor]
    family: str
    left_out: tuple[str, ...]
    """The names of what is none of its own."""


@dataclass(frozen=True)
class _Match:
    family: str
    prefix: str
    found: dict[str, str]
    """Their names by ours."""
    twice: tuple[str, str] | None
    """Two names that mean the same."""
    unknown: tuple[str, ...]
    """Names with the prefix that are none of the family's."""
    left_out: tuple[str, ...]


def renamed(path: Path, tensors: dict[str, Tensor]) -> Named:
    """Find the ConvMixer among ``tensors``, behind whatever prefix all of its names share.

    Raises:
        CheckpointError: there is none, or there are tensors beside it that belong to the same
            network; says which, by groups.
    """
    matches = [
        _match(family, rows, prefix, tensors)
        for family, rows in _FAMILIES.items()
        for prefix in _prefixes(rows, tensors)
    ]
    if not matches or not (best := max(matches, key=_quality)).found:
        raise CheckpointError(
            f"{path}: not a ConvMixer's tensors: expected the names of {', '.join(_FAMILIES)}, "
            f"found {_grouped(tensors)}"
        )
    if best.twice is not None:
        raise CheckpointError(
            f"{path}: several of its tensors have one meaning: {' and '.join(best.twice)}; load() "
            "takes a head of one linear layer. Build the model in PyTorch, load its state_dict and "
            "pass it to optimize()"
        )
    if best.unknown:
        behind = f" behind {best.prefix!r}" if best.prefix else ""
        raise CheckpointError(
            f"{path}: not a ConvMixer's tensors: of those{behind}, compared with {best.family}'s "
            f"names, {len(best.unknown)} of {len(best.found) + len(best.unknown)} do not belong: "
            f"{_grouped(best.unknown)}. Build the model in PyTorch, load its state_dict and pass "
            "it to optimize()"
        )
    strange = [name for name in best.left_out if not _BOOKKEEPING.fullmatch(name)]
    if strange:
        _log.warning(
            "%s: left out, as they do not belong to the ConvMixer behind %r: %s",
            *(path, best.prefix, _grouped(strange)),
        )
    found = {ours: tensors[theirs] for ours, theirs in best.found.items()}
    return Named(found, best.family, best.left_out)


def _prefixes(family: _Family, tensors: dict[str, Tensor]) -> list[str]:
    """Return what may stand before all names: before those of the stem; '' where there are none."""
    (conv, _), (norm, _), *_ = family.patterns
    ends = [re.compile(rf"(|.*?\.)(?:{pattern.pattern})") for pattern in (conv, norm)]
    found: list[set[str]] = [set(), set()]
    for name in tensors:
        for end, prefixes in zip(ends, found, strict=True):
            match = end.fullmatch(name)
            if match is not None:
                prefixes.add(match[1])
    return sorted(found[0] & found[1], key=len)[:_MOST_PREFIXES] or [""]


def _match(name: str, family: _Family, prefix: str, tensors: dict[str, Tensor]) -> _Match:
    found: dict[str, str] = {}
    twice: tuple[str, str] | None = None
    unknown: list[str] = []
    left_out: list[str] = []
    for theirs in tensors:
        ours = family.rename(theirs.removeprefix(prefix)) if theirs.startswith(prefix) else None
        if ours is not None:
            twice = twice or ((found[ours], theirs) if ours in found else None)
            found[ours] = theirs
        elif theirs.startswith(prefix) and not _BOOKKEEPING.fullmatch(theirs):
            unknown.append(theirs)
        else:
            left_out.append(theirs)
    return _Match(name, prefix, found, twice, tuple(unknown), tuple(left_out))


def _quality(match: _Match) -> tuple[int, int]:
    return len(match.found), -len(match.unknown)


def _grouped(names: Iterable[str]) -> str:
    """Return names with their numbers as stars, how many of each, the first few."""
    groups = Counter(re.sub(r"\d+", "*", name) if len(name) < 200 else "..." for name in names)
    shown = [f"{name} ({count})" if count > 1 else name for name, count in groups.items()]
    more = f" and {len(shown) - 12} other kinds" if len(shown) > 12 else ""
    return ", ".join(shown[:12]) + more
