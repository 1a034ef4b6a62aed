"""Names of icons as concepts: what is drawn, apart from how, and the same in every set.

person-raising-hand-medium-dark-skin-tone   concept person-raising-hand   style medium-dark-skin-tone
accessibility-24-filled                     concept accessibility         style filled 24
alarmclock in one set, alarm-clock in others: one concept, as are an icon's name and what its set lists as an alias
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

_SHADES = ('medium-light', 'medium-dark', 'light', 'medium', 'dark')
_WORDS = ('bold-duotone', 'line-duotone', 'two-tone', 'duotone', 'outlined', 'outline', 'filled', 'fill', 'regular',
          'rounded', 'sharp', 'bold', 'thin', 'linear', 'broken')  # fmt: skip
_SKIN = re.compile(rf'(?<=.)-(?:(?:{"|".join(_SHADES)})-skin-tone|tone\d)')
_SWATCH = re.compile(rf'(?:{"|".join(_SHADES)})-skin-tone')  # the tone itself is drawn
_STYLE = re.compile(rf'-({"|".join((*_WORDS, *_SHADES))})$')
_SIZE = re.compile(r'-\d+$')
_COUNTED = re.compile(r'(^|-)(keycap|number|numeric|dice|channel)-\d+$')  # here the number is what is drawn


@dataclass(frozen=True)
class Name:
    """A name in two parts."""

    concept: str
    """What is drawn, words joined by hyphens."""
    style: str = ''
    """Skin tone, style words and size that were dropped; empty: the plain form."""


def normalise(names: Iterable[str]) -> dict[str, Name]:
    """Return every name of one icon set in its two parts; what a word means depends on the names beside it.

    `police-car-light` keeps its last word, for there is no `police-car-dark`; `person-light` has four others beside it.
    """
    found = {name: Name(re.sub('-+', '-', name)) for name in names}
    for cut in (_skin, _style, _size, _style, _skin):
        beside = Counter(name.concept for name in found.values())
        beside.update(f'{_SIZE.sub("", concept)}-#' for concept in list(beside) if _SIZE.search(concept))
        found = {
            key: _cut(name, lambda concept, beside=beside, cut=cut: cut(concept, beside)) for key, name in found.items()
        }
    return found


def _cut(name: Name, match: Callable[[str], re.Match | None]) -> Name:
    """Return the name with all matches moved from concept to style."""
    while found := match(name.concept):
        start, end = found.span()
        concept = name.concept[:start] + name.concept[end:]
        name = Name(concept, f'{name.style} {found[0].strip("-")}'.strip())
    return name


def _skin(concept: str, beside: Mapping[str, int]) -> re.Match | None:
    return None if _SWATCH.fullmatch(concept) else _SKIN.search(concept)


def _style(concept: str, beside: Mapping[str, int]) -> re.Match | None:
    """Return the last word if the set has the same without it, or in another style; a bare shade needs the latter."""
    found = _STYLE.search(concept)
    if not found:
        return None
    base = concept[: found.start()]
    others = any(f'{base}-{word}' in beside for word in (*_WORDS, *_SHADES) if word != found[1])
    return found if others or (found[1] in _WORDS and base in beside) else None


def _size(concept: str, beside: Mapping[str, int]) -> re.Match | None:
    """Return the last number if the set has the same without it, or with another one."""
    found = _SIZE.search(concept)
    if not found or _COUNTED.search(concept):
        return None
    base = concept[: found.start()]
    return found if base in beside or beside[f'{base}-#'] > 1 else None


def same(named: Mapping[str, Mapping[str, Name]], aliases: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return every concept's own name: the one that most sets use, of several one with hyphens, the shortest.

    Names belong together where they differ in hyphens only, or where a set (`named` and `aliases` are by set) lists
    one as an alias of the other.
    """
    used = Counter(concept for names in named.values() for concept in {name.concept for name in names.values()})
    groups = _Groups()
    for concept in sorted(used):
        groups.join(concept, concept.replace('-', ''))
    for listed in aliases.values():
        both = normalise({*listed, *listed.values()})
        for alias, name in sorted(listed.items()):
            groups.join(both[alias].concept, both[name].concept)
    members = defaultdict(list)
    for concept in used:
        members[groups.root(concept)].append(concept)
    best = {
        root: min(names, key=lambda name: (-used[name], '-' not in name, len(name), name))
        for root, names in members.items()
    }
    return {concept: best[groups.root(concept)] for concept in used}


class _Groups:
    """Names that were joined, directly or through others."""

    def __init__(self):
        self._parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        while (parent := self._parent.get(name, name)) != name:
            name = parent
        return name

    def join(self, a: str, b: str) -> None:
        self._parent[self.root(a)] = self.root(b)
