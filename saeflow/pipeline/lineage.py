"""What a recipe means in a store: its tokens, activations, SAE and features, looked up once a command."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from saeflow.activations.shards import stored_sites
from saeflow.corpus.selection import TokenSelection
from saeflow.model.sites import Site, choose_site, site_pair
from saeflow.pipeline import identity
from saeflow.recipe.fingerprint import fingerprint
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import SAEConfig
from saeflow.sae import formats
from saeflow.store.artefact import Artefact
from saeflow.store.files import read_json
from saeflow.store.records import Generation
from saeflow.store.store import Store


@dataclass(frozen=True, eq=False)
class Lineage:
    """The artefacts of a recipe in a store. Made once a command and handed down; read-only.

    `tokens` and `activations` follow from settings alone. `sae` and `features` also depend on what the store holds when
    they are first asked for, so ask after the activations are published. The answer then stays the same, whatever else
    is published; `anew` looks again.
    """

    store: Store
    recipe: Recipe
    fresh: bool = False
    """Mean an SAE trained on what the store holds now, even if an older one is there?"""
    sweep: Lineage | None = field(default=None, repr=False)
    """The lineage of the whole sweep, whose tokens and activations this member has."""
    given_facts: dict[str, Any] | None = field(default=None, repr=False)
    """Mean the SAE of these facts, whatever the store holds: on a worker, where the client has chosen."""

    def anew(self, fresh: bool = False) -> Lineage:
        """The same recipe, looked up again: for after the store has changed, or for a `fresh` training."""
        return Lineage(self.store, self.recipe, fresh)

    @cached_property
    def members(self) -> list[Lineage]:
        """One lineage for each SAE of a sweep; without a sweep, this one."""
        return [self.member(recipe) for recipe in self.recipe.members()] if self.recipe.is_sweep else [self]

    def member(self, recipe: Recipe, facts: dict[str, Any] | None = None) -> Lineage:
        """The lineage of one SAE of the sweep. `facts`: those of its SAE, if they are chosen already."""
        return Lineage(self.store, recipe, self.fresh, self, facts)

    @cached_property
    def tokens(self) -> Artefact:
        """The tokens that the activations belong to; for a table, one a row."""
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
        """The recipe's SAE: the one that was trained last, however much was appended since; else the one to train."""
        return self._sae[0]

    @cached_property
    def features(self) -> Artefact:
        return self.store.artefact("features", self.recipe.name, fingerprint(self.feature_facts))

    @cached_property
    def token_facts(self) -> dict[str, Any]:
        return identity.token_facts(self.recipe)

    @cached_property
    def activation_facts(self) -> dict[str, Any]:
        return identity.activation_facts(self.recipe, self.tokens.fp)

    @property
    def sae_facts(self) -> dict[str, Any]:
        """What makes the SAE the same: every setting of its training and the data it has seen; or what was imported."""
        return self._sae[1]

    @cached_property
    def feature_facts(self) -> dict[str, Any]:
        """What makes a run the same: the SAE, and the activations it reads."""
        return {
            "sae": self.sae.fp,
            "activations": self.activations.fp,
            "site": self.site.name,
            "n_features": self.sae_config.n_features,
        }

    @cached_property
    def sae_config(self) -> SAEConfig:
        """The settings of the SAE: the recipe's, or those of the folder in `sae.source`."""
        return formats.effective_config(self.recipe.sae)

    @property
    def stored_sites(self) -> list[Site]:
        return stored_sites(self.activations)

    @property
    def site(self) -> Site:
        """The site that the SAE reads."""
        return choose_site(self.stored_sites, self.recipe.sae.site)

    @property
    def sites(self) -> tuple[Site, Site]:
        """The site that is read and the one that is reconstructed: another one only for a transcoder."""
        return site_pair(self.stored_sites, self.recipe.sae)

    @property
    def distinct_sites(self) -> list[Site]:
        """The site that is read and, for a transcoder, the one to reconstruct."""
        return list(dict.fromkeys(self.sites))

    def selection(self) -> TokenSelection:
        """The tokens that count, as the tokens are published now."""
        return TokenSelection.of(self.tokens, self.recipe.activations)

    @cached_property
    def _sae(self) -> tuple[Artefact, dict[str, Any]]:
        """The SAE and its facts, resolved together: what it sees is chosen here, whatever is published meanwhile."""
        if self.given_facts is None and self.recipe.sae.source is None and not self.fresh and self._newest:
            return self._newest, self._newest.record.facts
        facts = self.given_facts or self._facts_now()
        return self._sae_of(facts), facts

    def _sae_of(self, facts: dict[str, Any]) -> Artefact:
        return self.store.artefact("saes", self.recipe.name, fingerprint(facts))

    @cached_property
    def _every_sae(self) -> list[Artefact]:
        """All SAEs of the store: listed once, for all members of a sweep."""
        return self.sweep._every_sae if self.sweep else self.store.artefacts("saes")

    @cached_property
    def _newest(self) -> Artefact | None:
        """Of the SAEs with the recipe's settings the one that was trained last."""
        settings = self._training_facts
        trained = [sae for sae in self._every_sae if sae.name == self.recipe.name and sae.complete()]
        mine = [sae for sae in trained if identity.without_data_seen(sae.record.facts) == settings]
        return sorted(mine, key=lambda sae: float(_provenance(sae).get("written", 0)))[-1] if mine else None

    @cached_property
    def _training_facts(self) -> dict[str, Any]:
        return identity.training_facts(self.recipe, self.activations.fp) | self.selection().facts

    def _facts_now(self) -> dict[str, Any]:
        """Facts of the SAE to train or import. A training that was killed goes on with the data it has seen."""
        if self.recipe.sae.source is not None:
            return identity.import_facts(self.recipe, self.activations.fp)
        now, hidden = self.activations.published(), identity.hidden_fact(self.tokens.published())
        if (number := self._begun(hidden, now.number)) is not None:
            return self._training_facts | {"generation": number} | hidden
        about = self._training_facts | {"generation": now.number} | hidden
        seen, held = n_tokens_seen(self._sae_of(about)), now.total("n_train_tokens")
        if seen is None or seen == held:
            return about
        return about | {"n_train_tokens": held}  # the activations were removed and made again: their generations, too

    def _begun(self, hidden: dict[str, str], now: int) -> int | None:
        """The generation that a killed training of these settings has seen; None where there is none to go on with.

        It must be newer than the newest SAE's, its list still there, and its tokens as they were.
        """
        left = _half_trained(self.store, self.recipe.name)
        if not left:
            return None
        first = int(self._newest.record.facts["generation"]) + 1 if self._newest else 1
        for number in (each for each in reversed(self.activations.numbers()) if first <= each < now):
            known = fingerprint(self._training_facts | {"generation": number} | hidden) in left
            if known and self._tokens_are_as_in(self.activations.generation(number)):
                return number
        return None

    def _tokens_are_as_in(self, generation: Generation | None) -> bool:
        """A part that was compacted or made larger since has other tokens than its activations had."""
        parts = {part.index: part for part in self.tokens.published().parts}
        return generation is not None and all(
            part.index in parts and parts[part.index].counts == part.counts for part in generation.parts
        )


@dataclass(frozen=True, eq=False)
class Ancestors:
    """What an artefact of a store was made from, by its own record: for runs and SAEs of whatever recipe."""

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
        return choose_site(stored_sites(self.activations), self.artefact.record.facts["site"])

    def selection(self) -> TokenSelection:
        """The tokens that a run encodes, as the tokens are published now."""
        return TokenSelection.from_facts(self.tokens, self.artefact.record.facts)


def n_tokens_seen(trained: Artefact) -> int | None:
    """Tokens for training that the store held when the SAE was trained; None where it is not, or does not say."""
    found = _provenance(trained).get("n_train_tokens") if trained.complete() else None
    return None if found is None else int(found)


def _half_trained(store: Store, name: str) -> set[str]:
    """Fingerprints of the SAEs of this name that have a checkpoint."""
    from saeflow.train.training import CHECKPOINT  # loads Numba: half a second and 60 MiB

    found = store.storage.work_with(CHECKPOINT)
    matches = (re.fullmatch(rf"saes-{re.escape(name)}-([0-9a-f]{{8}})\.checkpoint", each) for each in found)
    return {match[1] for match in matches if match}


def _provenance(trained: Artefact) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(read_json(trained.own_file("provenance.json")))
    return {}
