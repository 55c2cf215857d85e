"""Have parts of a run merged, here or on a cluster, so that questions open few files. `features.compaction` does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from saeflow.corpus.selection import TokenSelection
from saeflow.features import compaction
from saeflow.features.compaction import USUAL_MERGE, MergeSettings
from saeflow.features.levels import plan_levels
from saeflow.pipeline.dask.clusters import kept_open, workers_of
from saeflow.pipeline.lineage import Ancestors, Lineage
from saeflow.pipeline.parts import Here, Item, PartMaker, PartWork, Records, dumped, shared
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import n_threads, use_threads
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord
from saeflow.store.store import Store


@dataclass
class MergeParts(PartMaker, name="features-merge"):
    """Merges neighbouring parts of one run into one part. An item is the folders of the first and the last."""

    target: Artefact
    used: TokenSelection
    published: Sequence[PartRecord]
    sizes: MergeSettings

    @classmethod
    def open(cls, store: Store, settings: dict[str, Any]) -> MergeParts:
        target = shared(store, settings["run"])
        generation = target.generation(settings["generation"])
        assert generation is not None
        torch.set_num_threads(n_threads(settings["threads"]))
        sizes = MergeSettings(**settings["sizes"] | {"threads": settings["threads"]})
        return cls(target, Ancestors(store, target).selection(), generation.parts, sizes)

    def make(self, item: list[str], progress: Progress) -> Records:
        group = compaction.group_between(self.published, *item)
        with progress.bar("compact", None, "values") as bar:
            merged = compaction.merge_whole_parts(self.target, self.used, group, bar, self.sizes)
            return dumped({self.target: merged})


def run(lineage: Lineage, progress: Progress, enough: int | None = None) -> None:
    """Merge parts of the recipe's runs, as `merge_parts` does."""
    with kept_open():
        for member in lineage.members:
            if member.features.generation() is not None:
                use_threads(member.recipe.threads)
                merge_parts(member.store, member.features, member.recipe, progress, enough)


def merge_parts(
    store: Store, target: Artefact, recipe: Recipe, progress: Progress, enough: int | None = None, mend: bool = False,
    sizes: MergeSettings = USUAL_MERGE,
) -> int:  # fmt: skip
    """Merge parts of one run level by level, `features.compact_parts` of a level; return how many parts were made.

    `enough`: leave as few parts as possible instead, where at least `enough` can be one. `mend`: also merge parts that
    an earlier saeflow made, which lack some statistics. Raises UserError if the disk has no room for old and new parts
    together.
    """
    used = Ancestors(store, target).selection()
    with target.writing():
        parts = target.published().parts
        groups = (
            plan_levels(parts, used.spans, recipe.features.compact_parts, mend, sizes)
            if enough is None
            else compaction.plan_merges(parts, used.spans, enough, mend, sizes)
        )
        store.require_free(sum(part.n_bytes for group in groups for part in group), f"Merging the parts of {target.id}")
        if not groups:
            progress.skip("compact", f"{len(parts)} parts")
            return 0
        here = MergeParts(target, used, parts, replace(sizes, threads=recipe.threads))
        if recipe.cluster is None:
            _merge_work(here, groups, here).run(Here(), progress)
        else:
            with workers_of(store, recipe.cluster, progress) as workers:
                _merge_work(here, groups, None).run(workers, progress)
        return len(groups)


def _merge_work(maker: MergeParts, groups: list[list[PartRecord]], here: MergeParts | None) -> PartWork:
    """Return the work of merging these groups, each into one part.

    A merged part is shown as soon as all earlier groups are merged, so that generations always follow one another in
    the same order. Workers may have finished a later group by then, which no list names yet.
    """
    target, merged, waiting = maker.target, dict[str, PartRecord](), list(groups)

    def show(item: Item, records: Records) -> None:
        merged[item[0]] = PartRecord.model_validate(records[target.id])
        while waiting and waiting[0][0].folder in merged:
            group = waiting.pop(0)
            if here is None:
                target.look_again()
            compaction.replace_group(target, group, merged.pop(group[0].folder), clear=not waiting)

    settings = {"run": target.id, "generation": target.published().number, "sizes": asdict(maker.sizes)}
    sizes = [([group[0].folder, group[-1].folder], sum(part.counts["n_values"] for part in group)) for group in groups]
    return PartWork(
        MergeParts, settings, sizes, [target], ("compact", "values"), here, maker.sizes.threads, made=show,
    )  # fmt: skip
