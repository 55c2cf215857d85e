"""Sequences through the model to Zarr: one array [sequence, position, width] per site and part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from saeflow.activations.collector import Collector
from saeflow.activations.engines.reader import EngineFiles, documents_of
from saeflow.activations.epoch import fit_pool
from saeflow.activations.forward import ForwardPass, device_of_source, require_embedded
from saeflow.activations.lengths import times_median
from saeflow.activations.norms import say_which_are_long, say_which_are_long_first, warn_of_massive_positions
from saeflow.activations.shards import ITEM_BYTES, is_kept, stored_sites
from saeflow.corpus.requests.documents import REQUEST
from saeflow.model.load import load_model, model_fingerprint, model_on_this_machine, site_names
from saeflow.model.sites import Site, require_length, require_running_order, resolve_sites, site_pair
from saeflow.pipeline.dask.clusters import make_parts
from saeflow.pipeline.lineage import Ancestors, Lineage
from saeflow.pipeline.parts import PartMaker, PartWork, Records, Through, directly, dumped, shared
from saeflow.recipe.data_settings import ActivationsConfig, ModelConfig
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.devices import model_threads
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import keep_freed_memory
from saeflow.sae.formats.source import with_sites_of_source
from saeflow.store.artefact import Artefact
from saeflow.store.files import read_json
from saeflow.store.records import PartRecord, damaged, no_collection
from saeflow.store.store import Store


@dataclass
class CollectParts(PartMaker, name="activations-collect", stays=True):
    """Collects the activations of token parts, which items name by their index."""

    collector: Collector
    parts: dict[int, PartRecord]

    @classmethod
    def open(cls, store: Store, settings: dict[str, Any]) -> CollectParts:
        """Load the model, and read what the client has begun. Raises UserError if the model's files differ."""
        recipe, target = parse_recipe(settings["recipe"]), shared(store, settings["target"])
        forward = open_forward(store, target, stored_sites(target), recipe, settings["threads"])
        generation = forward.source.generation(settings["generation"])
        assert generation is not None
        collector = Collector(replace(forward, config=recipe.activations), target)
        return cls(collector, {part.index: part for part in generation.parts})

    def make(self, item: int, progress: Progress) -> Records:
        with progress.bar("activations", None, "tokens") as bar:
            return dumped({self.collector.target: self.collector.collect(self.parts[item], bar)})


def engine_files(recipe: Recipe) -> EngineFiles | None:
    """Return the files of an engine that take the model's place; None if the recipe runs its model."""
    if recipe.corpus is None or recipe.corpus.requests is None:
        return None
    names = site_names(recipe.model) if recipe.model else []
    return EngineFiles.of(recipe.corpus.requests, recipe.activations.request_layers, names)


def open_forward(store: Store, target: Artefact, sites: list[Site], recipe: Recipe | None, threads: int) -> ForwardPass:
    """Load the model of activations that exist already, kept or not, to run it again; or open an engine's files.

    The recipe says where they lie. Without one, the model of the last run is taken if it still lies on this machine.
    Raises UserError if the model's files have changed.
    """
    if recipe and recipe.model:
        about, found = recipe.model, model_fingerprint(recipe.model)
    else:
        about, found = _model_of_last_run(target)
    if found != target.fact("model"):
        raise UserError(
            f"model.path is {about.path!r}, but its files are others than where {target.id} was begun.\n"
            "Bring those files back, or run the recipe under another name."
        )
    config = ActivationsConfig(**{name: target.fact(name) for name in ("sites", "dtype", "forward_batch")})
    model = (engine_files(recipe) if recipe else None) or load_model(about)
    return _forward(Ancestors(store, target).tokens, config, model, sites, threads)


def _model_of_last_run(target: Artefact) -> tuple[ModelConfig, str]:
    """Return the model that the store names, and its fingerprint. The store may be a stranger's: nothing is fetched."""
    try:
        if "engine" in target.record.facts:
            raise ValueError("an engine's files lie where the recipe says")
        known = read_json(target.own_file("provenance.json"))
        about = ModelConfig(path=known["model"], revision=known["revision"], dtype=known["model_dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"Nothing but its recipe says what made {target.id}. Run that again.") from error
    found = model_on_this_machine(about)
    if found is None:
        raise UserError(
            f"{target.id} was made by the model {about.path!r}, which is not on this machine, and only a recipe's word "
            "fetches a model. Run the recipe."
        )
    return found


def _forward(
    source: Artefact, config: ActivationsConfig, model: nn.Module | EngineFiles, sites: list[Site], threads: int
) -> ForwardPass:
    keep_freed_memory()
    return ForwardPass(source, config, model, sites, model_threads(device_of_source(model), threads))


def forward_of(lineage: Lineage, sites: list[Site]) -> ForwardPass | None:
    """Return what runs the model for a recipe's activations again; None if they are kept."""
    if is_kept(lineage.activations):
        return None
    recipe = lineage.recipe
    return open_forward(lineage.store, lineage.activations, sites, recipe, recipe.threads)


def run(lineage: Lineage, progress: Progress, through: Through = directly, beside: Artefact | None = None) -> Artefact:
    """Collect every missing part and publish. If activations are not kept: only those of the sample to train on.

    `beside`: activations that share the median length with these, once either exists: of the sample, and of the whole.
    """
    if lineage.training is not lineage:
        beside = run(lineage.training, progress, through, lineage.activations)
    recipe, target = lineage.recipe, lineage.activations
    lineage.tokens.published()
    lineage.selection()  # before anybody is waited for: refuses positions and entries that there are not
    with target.writing():
        wanted = lineage.tokens.published().parts
        with no_collection():
            inputs = {part.index: {"tokens": part.folder} for part in wanted}
            done = target.parts_from(inputs)
        missing = [part for part in wanted if part.index not in done]

        def show(made: dict[int, PartRecord]) -> None:
            about = recipe.model
            model = {"model": about.path, "revision": about.revision, "model_dtype": about.dtype} if about else {}
            target.publish([made[part.index] for part in wanted], model)

        def publish() -> None:
            made = target.parts_from(inputs)
            if any(part.index not in made for part in wanted):  # a list names a part by a record that is not its own
                raise damaged(target.path)
            show(made)

        if not missing and target.complete():
            skipped(target, done.values(), progress)
            show(done)
            return target
        if not recipe.activations.keep:
            _list_parts(lineage, missing, progress, beside)
            publish()
            return target
        work = _collect_work(lineage, missing, publish, progress, beside)
        if recipe.cluster:
            make_parts(work, lineage.store, recipe.cluster, progress, through)
        else:
            work.run_here(progress, through)
        if missing:
            warn_of_massive_positions(target, recipe.activations, progress)
            say_which_are_long(lineage.selection(), target, progress)
    return target


def _list_parts(lineage: Lineage, missing: list[PartRecord], progress: Progress, beside: Artefact | None) -> None:
    """Make parts that hold no activations: only records of what the model will be run on while encoding."""
    if not lineage.activations.complete():
        collector = open_collector(lineage, missing, beside)
        if missing and beside is None:  # else those of the sample are said
            lengths, _ = collector.forward.first_lengths(missing[0])
            say_which_are_long_first(lineage.selection(), missing[0].index, lengths, progress)
    for part in missing:
        with lineage.activations.new_part(part.index, dict(part.counts), {"tokens": part.folder}):
            pass
    progress.say("activations: none is kept (activations.keep); the model runs while the corpus is encoded")


def _collect_work(
    lineage: Lineage, missing: list[PartRecord], publish: Callable[[], None], progress: Progress,
    beside: Artefact | None,
) -> PartWork:  # fmt: skip
    """Check that the missing parts fit, and return how they are made."""
    recipe, target = lineage.recipe, lineage.activations
    collector = open_collector(lineage, missing, beside)
    if len(collector.sites) > 1 and not all(member.sae.site or member.sae.source for member in recipe.members()):
        progress.say(f"activations: {len(collector.sites)} sites; training needs sae.site, one of them")
    return PartWork(
        CollectParts,
        {
            "recipe": recipe.model_copy(update={"cluster": None, "sweep": None}).model_dump(mode="json"),
            "target": target.id,
            "generation": lineage.tokens.published().number,
        },
        [(part.index, part.counts["n_tokens"]) for part in missing],
        [target],
        ("activations", "tokens"),
        # on a cluster the memory of this process's model is freed
        here=None if recipe.cluster else CollectParts(collector, {part.index: part for part in missing}),
        threads=recipe.threads,
        publish=publish,
    )


def skipped(target: Artefact, parts: Collection[PartRecord], progress: Progress) -> None:
    """Report that all activations are stored, in these parts."""
    n_tokens, n_bytes = sum(p.count("n_tokens") for p in parts), sum(p.n_bytes for p in parts)
    how = f"{n_bytes / 1e9:.2f} GB" if is_kept(target) else "not kept"
    progress.skip("activations", f"{n_tokens:,} tokens, {how}")


def open_collector(lineage: Lineage, missing: Sequence[PartRecord], beside: Artefact | None = None) -> Collector:
    """Load the model, name the sites, check the disk and what training will ask for, and create the artefact."""
    recipe = lineage.recipe
    model, sites, engine = _engine_of(lineage, missing) or (*_model_of(lineage, missing), {})
    length = recipe.tokens.context_length

    def row_bytes(kept: Iterable[Site]) -> int:
        return length * sum(site.width for site in kept) * ITEM_BYTES[recipe.activations.dtype]

    keep, read_sites = recipe.activations.keep, set(sites[:1] if len(sites) == 1 else ())
    for site in sites if keep else ():
        fit_pool(recipe.feed, row_bytes([site]))
    for member in recipe.members():
        named = with_sites_of_source(member.sae, [site.name for site in sites])
        if named.site or named.target_site:
            read, target_site = site_pair(sites, named)
            read_sites.add(read)
            if read != target_site and isinstance(model, nn.Module):
                require_running_order(model, read.name, target_site.name)
            if keep:
                fit_pool(recipe.feed, row_bytes({read, target_site}))
    if keep:
        n_bytes = row_bytes(sites) * sum(part.counts["n_sequences"] for part in missing)
        lineage.store.require_free(int(n_bytes * 1.05), f"Storing the activations of {len(sites)} site(s)")
    about = lineage.activation_facts | {"stored": [[site.name, site.width] for site in sites]} | engine
    forward = _forward(lineage.tokens, recipe.activations, model, sites, recipe.threads)
    # an engine's files of parts that are stored already may be gone
    first = lineage.tokens.published().parts if isinstance(model, nn.Module) else missing
    if first and not lineage.activations.exists():
        known = beside.record.facts.get("median_lengths") if beside and beside.exists() else None
        about["median_lengths"] = known or forward.median_lengths(first[0])
        if above := recipe.activations.skip_norms_above:
            for site in read_sites:  # refused before anything is collected
                times_median(above, about["median_lengths"].get(site.name, 1.0), site)
    lineage.activations.create(about, [lineage.tokens.id])
    return Collector(forward, lineage.activations)


def _model_of(lineage: Lineage, missing: Sequence[PartRecord]) -> tuple[nn.Module, list[Site]]:
    """Load the model and name its sites. Raises UserError if it cannot read the tokens."""
    recipe = lineage.recipe
    assert recipe.model is not None
    place = {"device": "cpu"} if recipe.cluster else {}  # workers choose their own devices
    model = load_model(recipe.model.model_copy(update=place))
    require_embedded(lineage.tokens, model, missing)
    sites = resolve_sites(model, recipe.activations.sites)
    require_length(model, recipe.tokens.context_length, sites)
    return model, sites


def _engine_of(
    lineage: Lineage, missing: Sequence[PartRecord]
) -> tuple[EngineFiles, list[Site], dict[str, Any]] | None:
    """Open the files of an engine, check those of the missing parts, and return the sites and the engine's name."""
    files = engine_files(lineage.recipe)
    if files is None:
        return None
    sites, (name, version) = files.sites(lineage.recipe.activations.sites), files.first[1]
    for part in missing:
        files.require_like((each[REQUEST] for each in documents_of(lineage.tokens, part)), sites)
    return files, sites, {"engine": f"{name} {version or ''}".strip()}
