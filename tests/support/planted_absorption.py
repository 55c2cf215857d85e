"""Rows of known features, and an autoencoder built by hand that absorbs one of them into others at a known rate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from saeflow.features.run_tables import similar
from saeflow.recipe.settings import SAEConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from tests.support.small_store import Document, Given

WIDTH, N_TOKENS = 24, 2500
GENERAL, DENSE = 0, 9
SPECIFIC, OTHERS = range(1, 6), range(6, 9)
"""Features of the truth: one of a whole class, five of parts of the class, three of anything, one that nearly always
fires. Each is a latent of the autoencoder, too."""


@dataclass
class Planted:
    """Rows, and what is true of them. `absorbs`: the specific features that carry the general one in their latent."""

    rows: np.ndarray
    strengths: np.ndarray
    members: np.ndarray
    directions: np.ndarray
    absorbs: list[int]

    @classmethod
    def of(cls, rate: float, n_absorbing: int, missing: float, seed: int) -> Planted:
        """`rate`: share of the class at whose tokens an absorbing specific feature fires. `missing`: share of the class
        that has no general feature at all, and so is silent for another reason."""
        dice = np.random.default_rng(seed)
        directions = np.linalg.qr(dice.normal(size=(WIDTH, WIDTH)))[0][: DENSE + 1]
        members = dice.random(N_TOKENS) < 0.4
        fires = np.zeros((N_TOKENS, DENSE + 1), bool)
        fires[:, list(OTHERS)] = dice.random((N_TOKENS, len(OTHERS))) < 0.1
        fires[:, DENSE] = dice.random(N_TOKENS) < 0.95
        fires[:, GENERAL] = members & (dice.random(N_TOKENS) >= missing)
        absorbs = list(SPECIFIC)[:n_absorbing]
        one = dice.choice(absorbs or [GENERAL], N_TOKENS)
        carried = members & fires[:, GENERAL] & (dice.random(N_TOKENS) < rate / (1 - missing)) & bool(absorbs)
        fires[np.flatnonzero(carried), one[carried]] = True
        for feature in list(SPECIFIC)[n_absorbing:]:  # these fire beside the general one, in whole and in missing
            fires[:, feature] = members & (dice.random(N_TOKENS) < 0.08)
        strengths = fires * dice.uniform(0.7, 2, fires.shape)
        rows = strengths @ directions + 0.03 * dice.normal(size=(N_TOKENS, WIDTH))
        return cls(rows.astype(np.float32), strengths, members, directions, absorbs)

    def autoencoder(self) -> SparseAutoencoder:
        """The general latent is silent where an absorbing one fires, whose decoder row writes both directions."""
        n = len(self.directions)
        sae = SparseAutoencoder(SAEConfig(architecture="relu", n_features=n), WIDTH)
        encoder, decoder = self.directions.copy(), self.directions.copy()
        for feature in self.absorbs:
            encoder[GENERAL] -= 4 * self.directions[feature]
            decoder[feature] += self.directions[GENERAL]
        decoder[DENSE] += 0.2 * self.directions[GENERAL]
        with torch.no_grad():
            sae.W_enc.copy_(torch.from_numpy(encoder))
            sae.W_dec.copy_(torch.from_numpy(decoder / np.linalg.norm(decoder, axis=1, keepdims=True)))
            sae.b_enc.fill_(-0.3)
            sae.b_dec.zero_()
        return sae.eval()

    def write(self, root: Path) -> Given:
        sae = self.autoencoder()
        sparse = sae.encode_sparse(torch.from_numpy(self.rows))
        values = list(zip(sparse.rows.tolist(), sparse.feature_ids.tolist(), sparse.values.tolist(), strict=True))
        tables = {"similar": similar(sae.W_dec.detach()).to_pylist()}
        given = Given(documents=[Document("k", "a", [b"x"] * N_TOKENS)], values=values, tables=tables)
        given.write(root)
        return given

    @property
    def absorbed(self) -> dict[int, float]:
        """The share of the class that each absorbing feature takes over."""
        n = int(self.members.sum())
        return {each: float((self.strengths[self.members][:, each] > 0).sum()) / n for each in self.absorbs}
