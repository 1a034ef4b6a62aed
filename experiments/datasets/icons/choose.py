"""Which icons of which sets are in which split: a vendor, and concepts, that training never sees."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.datasets.icons import archives, names
from experiments.datasets.icons.archives import COLOUR, IconSet
from qformer_jax.errors import UserError, nearest


@dataclass(frozen=True)
class Choice:
    """Options that every data set of icons has; the same ones give the same splits."""

    archives: Path = Path('runs/icons/archives')
    """Folder of the sets' archives; npm fetches those that it lacks, and without npm they can be copied there."""
    sets: tuple[str, ...] = tuple(COLOUR)
    """Icon sets."""
    least: int = 4
    """Sets that draw a concept, at least: others are left out."""
    only: tuple[str, ...] = ()
    """Concepts to take of those that are left; empty: all."""
    vendor: str = 'twemoji'
    """Set that is held out whole."""
    concepts: int = 160
    """Concepts that are held out of every set."""
    validation: int = 400
    """Concepts of which one picture is held out."""
    seed: int = 0
    """Seed of what is held out."""


@dataclass(frozen=True)
class Icon:
    """One picture to draw."""

    vendor: str
    """Icon set."""
    name: str
    """Its name there."""
    concept: str
    """What it shows, in words."""
    svg: str
    """The drawing."""


def icons(choice: Choice) -> dict[str, list[Icon]]:
    """Return the icons of the four splits, fetched if need be, and print each set's licence.

    `train`; `validation`: other vendors' pictures of its concepts, one for each; `vendor`: all that the held-out set
    draws of them; `concepts`: the other vendors' of held-out concepts. Raises UserError when there are too few.
    """
    if choice.vendor not in choice.sets:
        raise UserError(f"--vendor '{choice.vendor}' is none of the sets{nearest(choice.vendor, choice.sets)}")
    archives.fetch(choice.sets, choice.archives)
    sets = [archives.read(name, choice.archives) for name in choice.sets]
    for each in sets:
        print(f'{each.name} {archives.VERSIONS[each.name]}: {len(each.icons)} icons, {each.licence}')
    found = drawn(sets, choice.least)
    return split([icon for icon in found if not choice.only or icon.concept in choice.only], choice)


def drawn(sets: Sequence[IconSet], least: int) -> list[Icon]:
    """Return one icon a set and concept, the plainest, of the concepts that at least so many sets draw."""
    named = {each.name: names.normalise(each.icons) for each in sets}
    own = names.same(named, {each.name: each.aliases for each in sets})
    found = []
    for each in sets:
        plainest = {}
        for name, parts in sorted(named[each.name].items(), key=lambda pair: (len(pair[1].style), pair[0])):
            best = plainest.setdefault(own[parts.concept], name)
            if parts.concept == own[parts.concept] != named[each.name][best].concept:
                plainest[parts.concept] = name  # of `flag-bouvet-island` and `flag-norway`, which look the same
        found += [
            Icon(each.name, name, concept.replace('-', ' '), each.icons[name])
            for concept, name in sorted(plainest.items())
        ]
    count = Counter(icon.concept for icon in found)
    return [icon for icon in found if count[icon.concept] >= least]


def split(found: Iterable[Icon], choice: Choice) -> dict[str, list[Icon]]:
    """Return the splits, as `icons` says."""
    by_concept, unseen = defaultdict(list), []
    for icon in found:
        (unseen if icon.vendor == choice.vendor else by_concept[icon.concept]).append(icon)
    rng = np.random.default_rng(choice.seed)
    order = rng.permutation(sorted(by_concept)).tolist()
    held_out, rest = sorted(order[: choice.concepts]), sorted(order[choice.concepts :])
    several = [concept for concept in order[choice.concepts :] if len(by_concept[concept]) > 1]
    if len(several) < max(choice.validation, 1):
        raise UserError(f'{len(order)} concepts are drawn often enough: too few for --concepts {choice.concepts} and '
                        f'--validation {choice.validation}; lower them, or --least')  # fmt: skip
    chosen = sorted(several[: choice.validation])
    validation = [by_concept[concept].pop(rng.integers(len(by_concept[concept]))) for concept in chosen]
    return {
        'train': [icon for concept in rest for icon in by_concept[concept]],
        'validation': validation,
        'vendor': [icon for icon in unseen if icon.concept in set(rest)],
        'concepts': [icon for concept in held_out for icon in by_concept[concept]],
    }
