"""Work on a store grows with its parts and no faster: calls of the system are counted, not timed."""

from __future__ import annotations

import io
import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import zarr

import saeflow.store.parts
from saeflow.activations import feed
from saeflow.activations.epoch import fit_pool
from saeflow.activations.feed import Feed
from saeflow.corpus.selection import TokenSelection
from saeflow.features import compaction
from saeflow.features.compaction import USUAL_MERGE
from saeflow.model.sites import Site
from saeflow.pipeline import collect
from saeflow.pipeline.lineage import Lineage
from saeflow.query.files.relations import relations
from saeflow.recipe.recipe import parse_recipe
from saeflow.recipe.settings import FeedConfig
from saeflow.runtime.progress import Progress
from saeflow.store import looks, verify
from saeflow.store.artefact import Artefact
from saeflow.store.links import folders_of
from saeflow.store.records import checked_text
from saeflow.store.store import Store
from tests.benchmarks import scale
from tests.support.many_parts import N_SEQUENCES, N_TRAIN, ROOT, SITE, WIDTH, Many
from tests.support.work_done import growth

N_PARTS, N_ENCODED = 2_000, 300
FEW = 60
"""Calls that have nothing to do with how many parts there are."""
COUNTED = (
    (os, "stat"),
    (os, "lstat"),
    (os, "scandir"),
    (io, "open"),
    (saeflow.store.parts, "read_generation"),
    (saeflow.store.parts, "read_part_folders"),
    (zarr, "open_array"),
)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Many:
    made = Many(Store.create(tmp_path_factory.mktemp("many")), N_PARTS, n_shards=1)
    made.make("tokens", "activations")
    replace(made, n_parts=N_ENCODED).make("features")
    return made


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """How often each of COUNTED is called from now on."""
    counts: Counter[str] = Counter()

    def counting(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **named: object) -> object:
            counts[name] += 1
            return call(*arguments, **named)

        return counted

    for module, name in COUNTED:
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    look = looks._look

    def looked(*arguments: np.ndarray) -> np.ndarray:
        rows, first = arguments[3:5]
        counts["look at one of many"] += int((first[rows + 1] - first[rows] + 2).sum())  # files, record and folder
        return look(*arguments)

    monkeypatch.setattr(looks, "_look", looked)
    return counts


def reopened(many: Many, kind: str) -> Artefact:
    """As in a process that has read no list."""
    return Store(many.store.root).by_id(getattr(many, kind).id)


def n_looks(target: Artefact) -> int:
    """One at each file of every part, and one at each folder: it must be no link."""
    names = [(*(file.name for file in part.files), "part.json") for part in target.published().parts]
    return sum(len(each) + len(folders_of(each)) + 1 for each in names)


def looked(calls: Counter[str]) -> int:
    return calls["stat"] + calls["lstat"] + calls["look at one of many"]


@pytest.mark.parametrize("kind", ["tokens", "activations"])
def test_opening_a_generation_reads_one_list_and_looks_at_no_part(many, calls, kind):
    assert len(reopened(many, kind).published().parts) == N_PARTS
    assert calls["read_generation"] == 1
    assert calls.total() < FEW


def test_a_list_is_read_once_however_often_it_is_asked_for(many, calls):
    target = reopened(many, "activations")
    assert target.published() is target.published()
    assert calls["read_generation"] == 1


def test_another_list_is_seen_at_once_by_an_artefact_that_has_read_one(many):
    reader, writer = reopened(many, "tokens"), reopened(many, "tokens")
    every = reader.published().parts
    writer.publish(every[:-1])
    assert len(reader.published().parts) == N_PARTS - 1
    writer.publish(every)
    assert reader.published().parts == every
    assert reader.published().number == writer.published().number


def test_publishing_ten_more_parts_looks_at_no_other_part_and_reads_the_records_of_one_list(many, calls):
    target = reopened(many, "tokens")
    every = target.published().parts
    fresh = list(many.token_parts(N_PARTS, N_PARTS + 10))
    calls.clear()
    target = reopened(many, "tokens")
    target.publish([*target.published().parts, *fresh])
    assert calls["read_generation"] == 1
    assert calls["read_part_folders"] == 1
    assert calls.total() < 2 * FEW
    assert len(reopened(many, "tokens").published().parts) == N_PARTS + 10
    target.publish(every)


def test_a_quick_verify_looks_at_each_file_once_and_opens_one_a_part(many, calls):
    reopened(many, "tokens").parts()  # what looks at many files is compiled
    for kind in ("tokens", "activations", "features"):
        target = reopened(many, kind)
        calls.clear()
        assert not list(verify.find_damage(target, full=False))
        assert looked(calls) <= n_looks(target) + FEW
        assert calls["open"] <= len(target.published().parts) + FEW
        assert calls["read_generation"] == 1


def test_a_part_whose_record_has_changed_is_found_among_all(many):
    target = reopened(many, "activations")
    path = target.part_path(target.published().parts[1_234]) / "part.json"
    kept = path.read_bytes()
    path.write_bytes(kept.replace(b'"index": 1234', b'"index": 1235'))
    assert [found.part.index for found in verify.find_damage(target, full=False) if found.part] == [1_234]
    path.write_bytes(kept)


def test_what_is_missing_is_decided_by_looking_at_each_file_once(many, calls):
    reopened(many, "tokens").parts()
    calls.clear()
    collect.run(Lineage(Store(many.store.root), many.recipe), Progress(verbosity=-1), scale.nothing)
    assert looked(calls) <= n_looks(many.activations) + 6 * FEW
    assert calls["open"] < FEW
    assert calls["read_generation"] <= 4
    inputs = {part.index: part.inputs for part in many.features.published().parts}
    calls.clear()
    assert len(compaction.part_of_each(reopened(many, "features"), inputs)) == N_ENCODED
    assert looked(calls) <= n_looks(many.features) + FEW
    assert calls["open"] < FEW


def test_planning_an_epoch_opens_a_bounded_number_of_arrays_and_no_tokens(many, calls, monkeypatch):
    monkeypatch.setattr(feed, "_MOST_OPEN", 10)
    made = Feed(
        TokenSelection(reopened(many, "tokens")), reopened(many, "activations"), Site(SITE, WIDTH), FeedConfig(seed=3)
    )
    assert calls["open_array"] == 10
    assert calls["read_generation"] == 2
    assert made.n_rows == N_PARTS * N_TRAIN * 256
    assert len(made.blocks) == N_PARTS * -(-N_TRAIN // 32)
    seen = {
        (made.blocks[number].part.index, made.blocks[number].start) for number in next(made.pools(0)).blocks.tolist()
    }
    assert len(seen) == made.pool_blocks
    assert all(start < N_SEQUENCES for _, start in seen)


def test_the_record_of_a_part_is_written_as_every_other_record_is(many):
    for part in (*many.tokens.published().parts[:3], *many.features.published().parts[:3]):
        assert part.text == checked_text(part.as_json)


PAGE = (ROOT / "docs" / "scale.md").read_text("utf-8")
FRAGMENTS = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_a_recipe_of_the_page_on_scale_is_one(fragment):
    recipe = parse_recipe(tomllib.loads(fragment))
    assert recipe.tokens.part_tokens == 1 << 22
    sequence_bytes = recipe.tokens.context_length * 4096 * 2
    assert fit_pool(recipe.feed, sequence_bytes)[1] >= 100, "a pool of fewer blocks does not mix"


@dataclass(frozen=True)
class Example:
    """A model of the page: width, features, active ones a token, and parameters up to the site (None: measured)."""

    width: int
    n_features: int
    l0: int
    n_parameters: float | None

    def figures(self, n_tokens: float) -> dict[str, str]:
        """What the formulas of the page give."""
        values, product = self.l0 * n_tokens, 2 * self.width * self.n_features
        sizes = USUAL_MERGE
        files_per_value = sum(1 / n for n in sizes.file_values(sizes.most_values)) + 9 / sizes.most_values
        forward = n_tokens / 222_648 if self.n_parameters is None else 2 * self.n_parameters * n_tokens / GPU
        return {
            "activations, TB": f"{2 * self.width * n_tokens / 1e12:,.1f}",
            "token tables, TB": f"{5.56 * n_tokens / 1e12:,.3f}",
            "features, TB": f"{7.2 * values / 1e12:,.1f}",
            "shards of 32 MiB": f"{2 * self.width * n_tokens / (32 << 20):,.0f}",
            "shards of 1 GiB": f"{2 * self.width * n_tokens / (1 << 30):,.0f}",
            "files of a compacted run": f"{values * files_per_value:,.0f}",
            "collection, hours": f"{forward / 3600:,.1f}",
            "encoding, core hours": f"{n_tokens / (14_282 / 2) * product / (2 * 512 * 16_384) / 3600:,.0f}",
            "compaction, hours": f"{values / 2_843_891 / 3600:,.0f}",
            "training on 10⁹ tokens, days of two cores": f"{1e9 / 12_254 * product / (2 * 512 * 16_384) / 86_400:,.1f}",
        }


GPU = 0.3 * 989e12
EXAMPLES = [Example(512, 16_384, 32, None), Example(2304, 65_536, 64, 1.3e9), Example(4096, 131_072, 64, 4e9)]


@pytest.mark.parametrize("name", list(EXAMPLES[0].figures(1e10)))
def test_the_figures_of_the_page_on_scale_follow_from_its_formulas(name):
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {name} "))
    cells = [cell.strip() for cell in row.strip("|").split("|")][1:4]
    assert cells == [example.figures(1e10)[name] for example in EXAMPLES]


def test_the_page_on_scale_shows_what_the_benchmark_measured():
    measured = json.loads((ROOT / "docs" / "benchmarks" / "scale.json").read_text("utf-8"))
    assert scale.table(measured["figures"]) in PAGE


def test_the_sql_of_many_files_takes_time_in_proportion_to_them():
    def sql(n: int) -> None:
        files = [f"/store/part/feature_major/low={n}/high={n}/000.parquet" for n in range(n)]
        relations({"feature_major": files, "token_major": files, "tokens": files[:1], "documents": [], "vocab": []})

    assert growth(sql, 2_000, times=8) < 10
