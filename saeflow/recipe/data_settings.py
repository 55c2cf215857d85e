"""The sections of a recipe from documents to activations: each setting with its kind, default and meaning."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    ByteSize,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

from saeflow.recipe.section import (
    Entries,
    Names,
    PathFromRecipe,
    PathOrHubName,
    PatternsFromRecipe,
    Positions,
    Section,
    Share,
    recipe_folder,
)
from saeflow.recipe.synthetic import SyntheticConfig


class CorpusConfig(Section):
    """Where the documents come from, and which of them are held out."""

    files: PatternsFromRecipe = Field(
        [], description="Parquet, CSV, JSON lines or text files. Globs and URLs are allowed."
    )
    sql: str | None = Field(
        None,
        examples=["select text, source from 'texts.parquet'"],
        description="A select statement instead of files. It gives `text` and any metadata columns.",
    )
    folder: PathFromRecipe | None = Field(
        None,
        examples=["texts"],
        description="Folder that relative paths in `sql` count from. Default: the recipe's folder.",
    )
    text: str = Field("text", description="Column that holds the text.")
    token_ids: str | None = Field(
        None,
        examples=["token_ids"],
        description="Column with lists of vocabulary ids, instead of `text`, if the corpus is already tokenised.",
    )
    messages: str | None = Field(
        None,
        examples=["messages"],
        description="Column with conversations, instead of `text`: lists of {role, content}, or such lists in JSON. "
        "The tokenizer's chat template writes them out. A column called `tools` is given to the template.",
    )
    requests: PathFromRecipe | None = Field(
        None,
        examples=["requests"],
        description="Folder of safetensors files that an inference engine wrote, one a request: token ids and hidden "
        "states, stored instead of running the model. `files` or `sql` may then name the documents.",
    )
    key: str | None = Field(
        None,
        examples=["id"],
        description="Column that names each document. Default: `key` if there is one, else file and content.",
    )
    dedup: bool = Field(False, description="Keep only the first of several documents with equal text.")
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the documents to read, chosen by a hash of their key. Raise it later to append more.",
    )
    held_out: Share = Field(
        0.05, description="Share of the documents kept for evaluation, chosen by a hash of their key."
    )
    seed: int = Field(0, description="Seed of the choice of held-out documents.")

    @property
    def content(self) -> str:
        """The column that holds each document."""
        return self.messages or self.token_ids or self.text

    @property
    def tokenised(self) -> bool:
        """True if the corpus gives vocabulary ids instead of texts."""
        return bool(self.token_ids or self.requests)

    @model_validator(mode="before")
    @classmethod
    def _sql_counts_from_the_recipe(cls, data: Any, info: ValidationInfo) -> Any:
        folder = recipe_folder(info)
        return {"folder": str(folder), **data} if folder and isinstance(data, dict) and "sql" in data else data


class ModelConfig(Section):
    """The language model whose activations are collected."""

    path: PathOrHubName = Field(description="Local folder, or name on the Hugging Face hub.")
    revision: str | None = Field(None, examples=["main"], description="Commit or tag on the hub.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Precision of the forward pass.")
    device: str = Field("auto", description="Device of the forward pass: `auto`, `cpu` or `cuda`.")


class TokensConfig(Section):
    """How documents become sequences of fixed length."""

    context_length: PositiveInt = Field(256, description="Tokens in one sequence.")
    packing: Literal["concatenated", "isolated"] = Field(
        "concatenated",
        description="concatenated: documents are joined end to end. isolated: a sequence holds one document, padded.",
    )
    prepend_bos: bool | None = Field(
        None,
        examples=[True],
        description="true: BOS alone before each document. false: no special tokens. Default: those that the "
        "tokenizer itself adds, such as BOS, or [CLS] and [SEP].",
    )
    chat_template: PathFromRecipe | None = Field(
        None,
        examples=["template.jinja"],
        description="File with a Jinja chat template for corpus.messages. Default: the tokenizer's own.",
    )
    parse_special: bool = Field(
        False,
        description="Read names such as <|im_start|> in texts as special tokens (for texts in a chat template).",
    )
    part_tokens: PositiveInt = Field(262_144, description="A part is closed once it holds this many tokens.")


class ActivationsConfig(Section):
    """Which activations are stored, and how."""

    sites: Names = Field([], description="Modules to read, by name or glob. Add `:input` to read a module's input.")
    source: PathFromRecipe | None = Field(
        None,
        examples=["activations.parquet"],
        description="Bring your own activations instead of a model's: CSV, Parquet, npy, npz, safetensors, Zarr or "
        "SAELens' cache.",
    )
    source_array: str | None = Field(
        None,
        examples=["activations"],
        description="Array of the source to read, or column of lists, if the source has several.",
    )
    request_layers: list[NonNegativeInt] = Field(
        [],
        examples=[[1, 2]],
        description="Layer ids of vLLM's hidden states in corpus.requests, if its engine.json does not list them: the "
        "engine's eagle_aux_hidden_state_layer_ids.",
    )
    synthetic: SyntheticConfig | None = Field(None, description="Made activations instead of a model's.")
    keep: bool = Field(
        True,
        description="false: never write activations to disk. The model runs again whenever the corpus is encoded: all "
        "SAEs and sites in one pass. Needs sae.source, or train.share to train.",
    )
    dtype: Literal["float16", "float32", "bfloat16"] = Field(
        "float16", description="Precision on disk. Encoding rounds to it even if nothing is kept."
    )
    compression: Literal["none", "zstd"] = Field(
        "none",
        description="zstd: writes more slowly and needs a fifth of the disk after a ReLU, 70 to 90% elsewhere.",
    )
    skip_positions: Positions = Field(
        [],
        description="Positions left out of training, encoding and evaluation, e.g. [0] if the model keeps a huge "
        'vector there. "4-7" is a range; -1 is the last position of a sequence.',
    )
    skip_special: Entries = Field(
        False,
        description="Leave out special tokens such as BOS in the same way: true for all of them, or a list of "
        "vocabulary entries by name or id.",
    )
    skip_norms_above: float | None = Field(
        None,
        gt=1,
        examples=[10.0],
        description="Leave out vectors longer than this many times the median length, wherever they stand: attention "
        "sinks lie at delimiters, too. The site that the SAE reads decides.",
    )
    roles: list[str] = Field(
        [],
        examples=[["assistant"]],
        description="Train on, encode and evaluate only what these roles wrote in corpus.messages. Default: all.",
    )
    forward_batch: PositiveInt = Field(16, description="Sequences in one forward pass.")
    chunk_bytes: ByteSize = Field(
        ByteSize(4 << 20), description="Size of a chunk: the smallest piece of a shard that is read."
    )
    shard_bytes: ByteSize = Field(ByteSize(32 << 20), description="Size of a shard: one file on disk.")
    part_rows: PositiveInt = Field(262_144, description="Rows in one part of your own or made activations.")
