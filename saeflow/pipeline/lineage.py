"""What a recipe means in a store: its tokens, activations, SAE and features, looked up once a command."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow.parquet as pq

from saeflow.activations.lengths import longest_allowed
from saeflow.activations.shards import stored_sites
from saeflow.corpus.selection import TokenSelection
from saeflow.model.sites import Site, choose_site, site_pair
from saeflow.pipeline.facts import (
    facts_of_activations,
    facts_of_import,
    facts_of_tokens,
    facts_of_training,
    hidden_fact,
    without_data,
)
from saeflow.recipe.fingerprint import fingerprint, settings_that_count
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import SAEConfig, TrainConfig
from saeflow.sae.formats.source import effective_config, hooks_of_sources, with_sites_of_source
from saeflow.store.artefact import Artefact
from saeflow.store.files import read_json
from saeflow.store.store import Store
from saeflow.train.schedules import FORMER_RATE, with_rate


@dataclass(frozen=True, eq=False)
class Lineage:
    """The artefacts of a recipe in a store. Made once a command and handed down; read-only.

    `tokens` and `activations` follow from settings alone. `sae` and `features` also depend on what the store holds when
    they are first asked for, so ask after the activations are published. From then on the answer stays the same,
    whatever is published; `anew` looks again.
    """

    store: Store
    recipe: Recipe
    fresh: bool = False
    """True to mean an SAE trained on the present activations, even if an older SAE exists."""
    sweep: Lineage | None = field(default=None, repr=False)
    """The lineage of the whole sweep that this is a member of."""
    given_facts: dict[str, Any] | None = field(default=None, repr=False)
    """Facts of the SAE, if they are chosen already: on a worker, the client has chosen them."""

    def __post_init__(self) -> None:
        recipe = self.recipe
        if recipe.model is not None and not recipe.activations.sites:  # the SAEs to import name them
            sites = hooks_of_sources(member.sae for member in recipe.members())
            filled = {"activations": recipe.activations.model_copy(update={"sites": sites})}
            object.__setattr__(self, "recipe", recipe.model_copy(update=filled))

    def anew(self, fresh: bool = False) -> Lineage:
        """Look the recipe up again, after the store has changed or for a `fresh` training."""
        return Lineage(self.store, self.recipe, fresh)

    @cached_property
    def members(self) -> list[Lineage]:
        """One lineage for each SAE of a sweep; without a sweep, this one."""
        return [self.member(recipe) for recipe in self.recipe.members()] if self.recipe.is_sweep else [self]

    def member(self, recipe: Recipe, facts: dict[str, Any] | None = None) -> Lineage:
        """Return the lineage of one SAE of the sweep. `facts`: facts of the SAE, if they are chosen already."""
        return Lineage(self.store, recipe, self.fresh, self, facts)

    @cached_property
    def training(self) -> Lineage:
        """The lineage that SAEs are trained in: of the stored sample if `train.share` names one, else this one."""
        if self.sweep:
            whole = self.sweep.training
            mine = (each for each in whole.members if each.recipe.name == self.recipe.name)
            return self if whole is self.sweep else next(mine)
        return Lineage(self.store, self.recipe.sample(), self.fresh) if self.recipe.trains_on_sample else self

    @cached_property
    def tokens(self) -> Artefact:
        """The tokens that the activations belong to. A table has one token a row."""
        if self.sweep:
            return self.sweep.tokens
        return self.store.artefact("tokens", self.recipe.data_name, fingerprint(self.token_facts))

    @cached_property
    def activations(self) -> Artefact:
        if self.sweep:
            return self.sweep.activations
        return self.store.artefact("activations", self.recipe.data_name, fingerprint(self.activation_facts))

    @property
    def sae(self) -> Artefact:
        """The SAE that was trained last with these settings, however much was appended since; else the one to train."""
        return self._sae[0]

    @cached_property
    def features(self) -> Artefact:
        """The run. Of an imported SAE, tokens that are left out make another run, as an SAE trained without them does.

        An earlier saeflow gave all of them one name: such a run stays the recipe's if it leaves out the same tokens.
        """
        plain = self.store.artefact("features", self.recipe.name, fingerprint(self.feature_facts))
        about = settings_that_count(self.recipe.activations)
        skips = {name: about[name] for name in TokenSelection.SETTINGS if name in about}
        if self.recipe.sae.source is None or not skips:
            return plain
        if plain.exists() and TokenSelection.from_facts(self.tokens, plain.record.facts) == self.selection():
            return plain
        return self.store.artefact("features", self.recipe.name, fingerprint(self.feature_facts | skips))

    @cached_property
    def token_facts(self) -> dict[str, Any]:
        """Corpus settings, tokenizer and packing. The size of the corpus does not count."""
        return facts_of_tokens(self.recipe)

    @cached_property
    def activation_facts(self) -> dict[str, Any]:
        """The tokens, the model or table, the sites, and how activations are stored."""
        return facts_of_activations(self.recipe, self.tokens.fp)

    @property
    def sae_facts(self) -> dict[str, Any]:
        """Every setting of the SAE's training and the data that it has seen; or the files that were imported."""
        return self._sae[1]

    @cached_property
    def feature_facts(self) -> dict[str, Any]:
        about: dict[str, Any] = {"sae": self.sae.fp, "activations": self.activations.fp, "site": self.site.name}
        about["n_features"] = self.sae_config.n_features
        engine = self.activations.record.facts.get("engine")
        return about | ({"engine": engine} if engine else {})

    @cached_property
    def sae_config(self) -> SAEConfig:
        """The settings of the SAE: the recipe's, or those of the folder in `sae.source`."""
        return effective_config(self.recipe.sae)

    @property
    def stored_sites(self) -> list[Site]:
        return stored_sites(self.activations)

    @property
    def site(self) -> Site:
        """The site that the SAE reads."""
        return choose_site(self.stored_sites, self._named_sites.site)

    @cached_property
    def _named_sites(self) -> SAEConfig:
        return with_sites_of_source(self.recipe.sae, [site.name for site in self.stored_sites])

    @property
    def sites(self) -> tuple[Site, Site]:
        """The site that is read, and the site to reconstruct: another one only for a transcoder."""
        return site_pair(self.stored_sites, self._named_sites)

    @property
    def distinct_sites(self) -> list[Site]:
        """`sites`, each once."""
        return list(dict.fromkeys(self.sites))

    def selection(self) -> TokenSelection:
        """The tokens that count, as they are published now."""
        return TokenSelection.of(self.tokens, self.recipe.activations)

    @property
    def longest_allowed(self) -> float | None:
        """Length above which vectors at the site do not count."""
        return longest_allowed(self.selection(), self.activations, self.site)

    @cached_property
    def _sae(self) -> tuple[Artefact, dict[str, Any]]:
        """The SAE and its facts. The data that the SAE sees is chosen here, whatever is published meanwhile."""
        if self.training is not self:
            return self.training._sae
        if self.given_facts is None and self.recipe.sae.source is None and not self.fresh and self._newest:
            return self._newest, self._newest.record.facts
        facts = self.given_facts or self._facts_now()
        return self._sae_of(facts), facts

    def _sae_of(self, facts: dict[str, Any]) -> Artefact:
        return self.store.artefact("saes", self.recipe.name, fingerprint(facts))

    @cached_property
    def _every_sae(self) -> list[Artefact]:
        """All SAEs of the store, listed once for all members of a sweep."""
        return self.sweep._every_sae if self.sweep else self.store.artefacts("saes")

    @cached_property
    def _newest(self) -> Artefact | None:
        """The SAE with the recipe's settings that was trained last, also by an earlier saeflow with its defaults."""
        trained = [sae for sae in self._every_sae if sae.name == self.recipe.name and sae.complete()]
        mine = [each for each in trained if _is_trained_as(self, without_data(each.record.facts))]
        return sorted(mine, key=lambda sae: float(_provenance(sae).get("written", 0)))[-1] if mine else None

    @property
    def has_former_defaults(self) -> bool:
        """True if an earlier saeflow trained the SAE with defaults that are others now."""
        return without_data(self.sae_facts) == self._former_facts != self._training_facts

    @cached_property
    def _training_facts(self) -> dict[str, Any]:
        """Facts of a trained SAE but for the data that it has seen. Raises UserError without activations."""
        self.activations.published()
        thresholds = {"thresholds": "follow k"} if self.recipe.sae.aims_at_k else {}
        return self._facts_with(with_rate(self.recipe, self.site.width)) | thresholds

    @cached_property
    def _former_facts(self) -> dict[str, Any]:
        """The same facts of an SAE that an earlier saeflow trained, with its default rate and fixed aims."""
        train = self.recipe.train
        return self._facts_with(train.model_copy(update={"lr": train.lr or FORMER_RATE}))

    def _facts_with(self, train: TrainConfig) -> dict[str, Any]:
        """Return the facts of a training with these settings in place of the recipe's."""
        return facts_of_training(self.recipe, train, self.activations.fp) | self.selection().facts

    def _facts_now(self) -> dict[str, Any]:
        """Facts of the SAE to train or import. A killed training goes on with the data that it has seen."""
        if self.recipe.sae.source is not None:
            return facts_of_import(self.recipe.sae, self.sae_config, self.activations.fp)
        hidden, now = hidden_fact(self.tokens.published()), self.activations.published()
        if (number := _begun(self, hidden, now.number)) is not None:
            return self._training_facts | {"generation": number} | hidden
        about = self._training_facts | {"generation": now.number} | hidden
        seen, held = n_tokens_seen(self._sae_of(about)), now.total("n_train_tokens")
        if seen is None or seen == held:
            return about
        return about | {"n_train_tokens": held}  # activations were made anew, so generation numbers restarted at 1


@dataclass(frozen=True, eq=False)
class Ancestors:
    """The artefacts that a run or SAE was made from, by its own record, whatever its recipe."""

    store: Store
    artefact: Artefact

    @cached_property
    def tokens(self) -> Artefact:
        return self.store.input_of(self.artefact, "tokens")

    @cached_property
    def activations(self) -> Artefact:
        return self.store.input_of(self.artefact, "activations")

    @cached_property
    def sae(self) -> Artefact:
        return self.store.input_of(self.artefact, "saes")

    @property
    def site(self) -> Site:
        """The site whose activations a run encodes."""
        return choose_site(stored_sites(self.activations), self.artefact.fact("site"))

    def selection(self) -> TokenSelection:
        """The tokens that a run encodes, as they are published now."""
        return TokenSelection.from_facts(self.tokens, self.artefact.record.facts)


def _begun(lineage: Lineage, hidden: dict[str, str], now: int) -> int | None:
    """Return the generation that a killed training of these settings has seen; None if none can go on.

    It must be newer than the newest SAE's generation, its list still there, and its tokens unchanged.
    """
    left = _half_trained(lineage.store, lineage.recipe.name)
    if not left:
        return None
    first = int(lineage._newest.fact("generation")) + 1 if lineage._newest else 1
    counts_now = {part.index: part.counts for part in lineage.tokens.published().parts}
    for number in (each for each in reversed(lineage.activations.numbers()) if first <= each < now):
        known = fingerprint(lineage._training_facts | {"generation": number} | hidden) in left
        generation = lineage.activations.generation(number) if known else None
        if generation and all(counts_now.get(part.index) == part.counts for part in generation.parts):
            return number
    return None


def _is_trained_as(lineage: Lineage, settings: dict[str, Any]) -> bool:
    return settings == lineage._former_facts or settings == lineage._training_facts


def n_tokens_seen(trained: Artefact) -> int | None:
    """Return the training tokens that the store held when the SAE was trained; None if unknown or not trained."""
    found = _provenance(trained).get("n_train_tokens") if trained.complete() else None
    return None if found is None else int(found)


def _half_trained(store: Store, name: str) -> set[str]:
    """Return fingerprints of the SAEs of this name that have a checkpoint."""
    from saeflow.train.checkpoint import CHECKPOINT  # loads Numba: half a second and 60 MiB

    found = store.storage.work.names_with(CHECKPOINT)
    matches = (re.fullmatch(rf"saes-{re.escape(name)}-([0-9a-f]{{8}})\.checkpoint", each) for each in found)
    return {match[1] for match in matches if match}


def _provenance(trained: Artefact) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(read_json(trained.own_file("provenance.json")))
    return {}


def grouped(lineages: Iterable[Lineage], key: Callable[[Lineage], Hashable]) -> list[list[Lineage]]:
    """Group lineages by a key, in the order in which keys first occur."""
    groups: dict[Hashable, list[Lineage]] = {}
    for each in lineages:
        groups.setdefault(key(each), []).append(each)
    return list(groups.values())


def last_log_row(trained: Artefact) -> dict[str, float]:
    """Return the last row of a training's log."""
    log = pq.read_table(trained.own_file("log.parquet"))
    return dict(log.slice(log.num_rows - 1).to_pylist()[0])
