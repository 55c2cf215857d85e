"""Activations through trained SAEs to Parquet: every non-zero value, in two orders, with statistics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from saeflow.activations.forward import ForwardPass
from saeflow.activations.lengths import longest_allowed
from saeflow.activations.shards import is_kept, stored_sites
from saeflow.corpus.selection import TokenSelection
from saeflow.features import compaction, run_tables
from saeflow.features.compaction import MergeSettings
from saeflow.features.left_out import left_out_in_words
from saeflow.features.part_encoder import PartEncoder, encode_together, part_inputs
from saeflow.features.schema import covered, indices_held, stands_for
from saeflow.pipeline.collect import open_forward
from saeflow.pipeline.dask.clusters import kept_open, make_parts
from saeflow.pipeline.lineage import Ancestors, Lineage, grouped, last_log_row
from saeflow.pipeline.parts import PartMaker, PartWork, Records, Through, directly, dumped, shared
from saeflow.query.connection import require_checks
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.recipe.settings import FeaturesConfig
from saeflow.runtime.devices import choose_device, model_threads
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.sae.formats.load import load_sae
from saeflow.store.artefact import Artefact, writing_all
from saeflow.store.records import PartRecord, no_collection
from saeflow.store.store import Store

_BYTES_PER_NONZERO = 8
"""Room on disk for a value in both orders, compressed."""


@dataclass
class Encoders(PartMaker, name="features-encode", alone=False, stays=True):
    """Encodes activation parts by several SAEs. An item is a part's index and the runs that lack it."""

    of_run: dict[str, PartEncoder]
    parts: dict[int, PartRecord]
    forward: ForwardPass | None
    """Runs the model, if activations are not kept. If they are, the SAEs read one site."""

    @classmethod
    def open(cls, store: Store, settings: dict[str, Any]) -> Encoders:
        """Load the SAEs of runs that the client has begun. Raises UserError if the store has changed since."""
        config = FeaturesConfig.model_validate(settings["features"])
        runs = {name: Ancestors(store, shared(store, name)) for name in settings["runs"]}
        encoders = {name: encoder_of(run, run.selection(), config) for name, run in runs.items()}
        first = next(iter(encoders.values()))
        generation = first.stored.published()
        if [first.used.generation.number, generation.number] != settings["generations"]:
            raise UserError("The store has changed since this run began. Nothing is lost; run the same command again.")
        recipe = parse_recipe(settings["recipe"]) if settings["recipe"] else None
        forward = _forward_for(store, list(encoders.values()), recipe, settings["threads"])
        return cls(encoders, {part.index: part for part in generation.parts}, forward)

    def make(self, item: tuple[int, list[str]], progress: Progress) -> Records:
        index, runs = item
        encoders = [self.of_run[name] for name in runs]
        with progress.bar("features", None, "tokens") as bar:
            records = encode_together(encoders, self.parts[index], bar, self.forward)
        return dumped({each.target: record for each, record in zip(encoders, records, strict=True)})


def _forward_for(
    store: Store, encoders: Sequence[PartEncoder], recipe: Recipe | None, threads: int
) -> ForwardPass | None:
    """Load the model if these activations are not kept, to read only the sites that are encoded."""
    stored = encoders[0].stored
    if is_kept(stored):
        return None
    read = {encoder.site for encoder in encoders}
    return open_forward(store, stored, [site for site in stored_sites(stored) if site in read], recipe, threads)


def open_encoder(lineage: Lineage, used: TokenSelection, progress: Progress) -> PartEncoder:
    """Make the tables beside the parts, create the artefact, and load the SAE."""
    trained, target = _trained(lineage), lineage.features
    about = lineage.feature_facts | {"context_length": used.length, "architecture": lineage.sae_config.architecture}
    sae = load_sae(trained.fetched())
    made = run_tables.write_run_tables(target, lineage.tokens, lineage.recipe, sae, about["site"], progress)
    target.create(about | used.facts, [lineage.tokens.id, lineage.activations.id, trained.id], made)
    target.add_files(made)
    return encoder_of(Ancestors(lineage.store, target), used, _config_here(lineage.recipe))


def _config(recipe: Recipe | None) -> FeaturesConfig:
    """The recipe's `[features]`, or the defaults."""
    return recipe.features if recipe else FeaturesConfig()


def _config_here(recipe: Recipe | None) -> FeaturesConfig:
    """The settings for this machine. Workers of a cluster choose their own devices."""
    place = {"device": "cpu"} if recipe and recipe.cluster else {}
    return _config(recipe).model_copy(update=place)


def encoder_of(run: Ancestors, used: TokenSelection, config: FeaturesConfig) -> PartEncoder:
    """Return the encoder of a run that exists, as the run's record says."""
    sae = load_sae(run.sae.fetched()).to(choose_device("features.device", config.device))
    sae.prepare()
    longest = longest_allowed(used, run.activations, run.site)
    return PartEncoder(used, run.activations, run.artefact, run.site, sae, config.batch_rows, longest)


def run(lineage: Lineage, progress: Progress, through: Through = directly) -> Artefact:
    """Encode every SAE of the recipe, and publish; return the first run.

    SAEs of one site share one reading. If activations are not kept, all SAEs share one pass of the model.
    """
    kept = lineage.recipe.activations.keep
    with kept_open() if lineage.recipe.cluster else nullcontext():
        for group in grouped(lineage.members, lambda member: member.feature_facts["site"] if kept else None):
            run_together(group, progress, through)
    return lineage.members[0].features


def run_together(lineages: Sequence[Lineage], progress: Progress, through: Through = directly) -> None:
    """Encode SAEs in one reading: each part for those SAEs that lack it. Then publish each run."""
    first, store = lineages[0], lineages[0].store
    targets = {lineage.features: lineage for lineage in lineages}
    with writing_all(targets):
        wanted = first.activations.published().parts
        used = first.selection()
        with no_collection():
            inputs = {part.index: part_inputs(used, part) for part in wanted}
            held = {target: compaction.part_of_each(target, inputs) for target in targets}
        lacking = {target: inputs.keys() - held[target].keys() for target in targets}
        missing = [sum(part.counts["n_tokens"] for part in wanted if part.index in left) for left in lacking.values()]
        _require_disk(store, [(_trained(lineage), n) for lineage, n in zip(lineages, missing, strict=True) if n])
        encoders = [
            open_encoder(lineage, used, progress)
            for target, lineage in targets.items()
            if lacking[target] or not target.complete()
        ]

        def publish_all() -> None:
            for target, lineage in targets.items():
                if encoders or not shows_only(target, held[target]):
                    publish(store, target, used, inputs, progress, lineage.recipe)

        if not encoders:
            n_values = sum(each.total("n_values") for target in targets if (each := target.generation()))
            progress.skip("features", f"{n_values:,} values")
            publish_all()
            return
        _encode(encoders, wanted, lacking, store, first.recipe, publish_all, progress, through)


def shows_only(target: Artefact, held: Mapping[int, PartRecord]) -> bool:
    """True if readers see just these parts, each whole: the part that holds each activation part."""
    generation = target.generation()
    parts = {part.folder: part for part in held.values()}
    shown = {part.folder for part in generation.parts} if generation else None
    return shown == parts.keys() and sum(len(indices_held(part)) for part in parts.values()) == len(held)


def _encode(
    encoders: Sequence[PartEncoder], stored: Sequence[PartRecord], lacking: Mapping[Artefact, Collection[int]],
    store: Store, recipe: Recipe | None, publish: Callable[[], None], progress: Progress, through: Through = directly,
) -> None:  # fmt: skip
    """Encode the activation parts that these runs lack, then publish."""
    first, targets = encoders[0], [each.target for each in encoders]
    sizes = [
        ((part.index, runs), part.counts["n_tokens"])
        for part in stored
        if (runs := [target.id for target in targets if part.index in lacking[target]])
    ]
    cluster, threads = (recipe.cluster, recipe.threads) if recipe else (None, 0)
    whole = recipe.model_copy(update={"cluster": None, "sweep": None}) if recipe and not is_kept(first.stored) else None
    forward = None if cluster or not sizes else _forward_for(store, encoders, recipe, threads)
    here = Encoders({each.target.id: each for each in encoders}, {part.index: part for part in stored}, forward)
    settings = {
        "features": _config(recipe).model_dump(mode="json"),
        "generations": [first.used.generation.number, first.stored.published().number],
        "runs": [target.id for target in targets],
        "recipe": whole.model_dump(mode="json") if whole else None,
        "threads": threads,
    }
    n_here = 1 + forward.workers // 2 if forward else n_at_once(_config_here(recipe), threads)
    work = PartWork(
        Encoders, settings, sizes, targets, ("features", "tokens"), None if cluster else here, n_at_once=n_here,
        publish=publish,
    )  # fmt: skip
    if cluster:
        make_parts(work, store, cluster, progress, through)
    else:
        work.run_here(progress, through)


def n_at_once(config: FeaturesConfig, threads: int) -> int:
    """Return how many parts this process encodes at once: one a core, or enough to keep a GPU busy."""
    return model_threads(choose_device("features.device", config.device), threads)


def _trained(lineage: Lineage) -> Artefact:
    if not lineage.sae.complete():
        raise UserError(f"{lineage.sae.id} is not trained. Run `saeflow train RECIPE` first.")
    return lineage.sae


def _require_disk(store: Store, wanted: Iterable[tuple[Artefact, int]]) -> None:
    """Raise UserError if the disk cannot hold the values of each SAE at its number of tokens."""
    n_values = sum(n * last_log_row(trained).get("l0", 0) for trained, n in wanted)
    store.require_free(int(n_values * _BYTES_PER_NONZERO), "Storing every feature activation")


def add_tables(store: Store, target: Artefact, recipe: Recipe, progress: Progress) -> None:
    """Add tables that a run of an earlier saeflow lacks. The recipe names the model."""
    with target.writing():
        if run_tables.missing_tables(target):
            before, site = Ancestors(store, target), target.fact("site")
            sae = load_sae(before.sae.fetched())
            target.add_files(run_tables.write_run_tables(target, before.tokens, recipe, sae, site, progress))


def publish(
    store: Store, target: Artefact, used: TokenSelection, inputs: Mapping[int, dict[str, str]], progress: Progress,
    recipe: Recipe | None = None,
) -> None:  # fmt: skip
    """Publish the parts that follow from these inputs. A compacted part that holds more is written again without it.

    New parts are checked first, as `features.check_values` says. Raises UserError if a check fails.
    """
    sizes = MergeSettings(recipe.threads if recipe else 0)
    generation, parts = target.generation(), compaction.parts_to_show(target, used, inputs, sizes)
    if lost := inputs.keys() - {index for part in parts for index in indices_held(part)}:
        raise UserError(f"Part {min(lost)} of {target.id} is gone since it was encoded. Run the same command again.")
    known = {part.folder for part in generation.parts} if generation else set()
    fresh = [part for part in parts if part.folder not in known]
    require_checks(store, target, fresh, _config(recipe).check_values, progress)
    target.publish(parts)
    if fresh and (words := left_out_in_words(target, used.source)):
        progress.say(f"features: left out {words}")


def runs_over(store: Store, stored: Artefact) -> list[Artefact]:
    """Return the published runs over these activations, of whatever recipe."""
    runs = [each for each in store.artefacts("features") if stored.id in each.record.inputs]
    return [each for each in runs if (each.path / "manifest.json").is_file()]


def holds_all(store: Store, target: Artefact) -> bool:
    """True if a run's published parts follow from all activations as they are now. Reads only records."""
    run = Ancestors(store, target)
    used = run.selection()
    known = dict(item for part in target.published().parts for item in covered(part).items())
    return all(
        known.get(each.index) == stands_for(part_inputs(used, each)) for each in run.activations.published().parts
    )


def refresh(
    store: Store, target: Artefact, progress: Progress, grow: bool = False, recipe: Recipe | None = None
) -> list[int]:
    """Encode again the parts of a run whose activations or hidden documents have changed; return their indices.

    `grow`: also encode activations that came since, so that the run holds the whole store again. The recipe says how
    (`[features]`, `threads`, `[cluster]`), and if it is given, the disk must have room: else raises UserError.
    """
    run = Ancestors(store, target)
    with target.writing():
        used = run.selection()
        known = {index for part in target.published().parts for index in indices_held(part)}
        wanted = [part for part in run.activations.published().parts if grow or part.index in known]
        inputs = {part.index: part_inputs(used, part) for part in wanted}
        stale = inputs.keys() - compaction.part_of_each(target, inputs)

        def publish_run() -> None:
            publish(store, target, used, inputs, progress, recipe)

        if not stale:
            publish_run()
            return []
        if recipe:
            _require_disk(store, [(run.sae, sum(part.counts["n_tokens"] for part in wanted if part.index in stale))])
        encoder = encoder_of(run, used, _config_here(recipe))
        _encode([encoder], wanted, {target: stale}, store, recipe, publish_run, progress)
    return sorted(stale)
