"""Parts of a run merged into few, so that questions open few files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from saeflow.corpus.selection import TokenSelection
from saeflow.features import compaction
from saeflow.features.compaction import USUAL_MERGE, MergeSettings
from saeflow.pipeline import train
from saeflow.pipeline.dask.clusters import kept_open, make_parts
from saeflow.pipeline.lineage import Ancestors, Lineage
from saeflow.pipeline.parts import Item, PartMaker, PartWork, Records, dumped, shared
from saeflow.recipe.cluster import ClusterConfig
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import n_threads
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord
from saeflow.store.store import Store


@dataclass
class Merger(PartMaker, name="features-merge"):
    """Merges neighbouring parts of one run into one part."""

    target: Artefact
    used: TokenSelection
    parts: Sequence[PartRecord]
    """The published parts."""
    sizes: MergeSettings

    @classmethod
    def open(cls, store: Store, settings: dict[str, Any]) -> Merger:
        target = shared(store, settings["run"])
        generation = target.generation(settings["generation"])
        assert generation is not None
        torch.set_num_threads(n_threads(settings["threads"]))
        sizes = MergeSettings(**settings["sizes"] | {"threads": settings["threads"]})
        return cls(target, Ancestors(store, target).selection(), generation.parts, sizes)

    def make(self, item: list[str], progress: Progress) -> Records:
        """Merge the parts from one folder to another."""
        group = compaction.group_between(self.parts, *item)
        with progress.bar("compact", None, "values") as bar:
            merged = compaction.merge_whole_parts(self.target, self.used, group, bar, self.sizes)
            return dumped({self.target: merged})


def run(lineage: Lineage, progress: Progress, enough: int | None = None) -> None:
    """Merge the parts of the recipe's runs, where at least `enough` can be (default: `features.compact_parts`)."""
    with kept_open():
        for member in lineage.members:
            recipe = member.recipe
            if member.features.generation() is not None:
                train.set_threads(recipe)
                merge_parts(member.store, member.features, recipe, progress, enough or recipe.features.compact_parts)


def merge_parts(
    store: Store, target: Artefact, recipe: Recipe, progress: Progress, enough: int, mend: bool = False,
    sizes: MergeSettings = USUAL_MERGE,
) -> None:  # fmt: skip
    """Merge the parts of one run. Raises UserError if the disk has no room for old and new parts together.

    `mend`: also merge parts that an earlier saeflow made, which lack some statistics.
    """
    used = Ancestors(store, target).selection()
    with target.writing():
        groups = compaction.plan_merges(target.published().parts, used.spans, enough, mend, sizes)
        n_bytes = sum(part.n_bytes for group in groups for part in group)
        store.require_free(n_bytes, f"Merging the parts of {target.id}")
        if not groups:
            progress.skip("compact", f"{len(target.published().parts)} parts")
            return
        sizes = replace(sizes, threads=recipe.threads)
        make_parts(_merge_work(target, used, groups, sizes, recipe.cluster), store, recipe.cluster, progress)


def _merge_work(
    target: Artefact, used: TokenSelection, groups: list[list[PartRecord]], sizes: MergeSettings,
    cluster: ClusterConfig | None,
) -> PartWork:  # fmt: skip
    """The merged parts, one for each group.

    A group is shown as soon as it and all earlier ones are merged, so that generations follow one another whoever
    merges; workers may have finished a later one by then, which no list names yet.
    """
    published, merged = target.published(), dict[str, PartRecord]()
    waiting = list(groups)

    def show(item: Item, records: Records) -> None:
        merged[item[0]] = PartRecord.model_validate(records[target.id])
        while waiting and waiting[0][0].folder in merged:
            group = waiting.pop(0)
            if cluster:
                target.look_again()
            compaction.replace_group(target, group, merged.pop(group[0].folder), clear=not waiting)

    return PartWork(
        Merger, {"run": target.id, "generation": published.number, "sizes": asdict(sizes)},
        [([group[0].folder, group[-1].folder], sum(part.counts["n_values"] for part in group)) for group in groups],
        [target], ("compact", "values"), threads=sizes.threads, made=show,
        here=None if cluster else Merger(target, used, published.parts, sizes),
    )  # fmt: skip
