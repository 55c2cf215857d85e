"""Conversations as a corpus: written out by a chat template, each token with its role, its turn and whether the
assistant wrote it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.corpus.tokenise.chats import ChatTokeniser
from saeflow.corpus.tokenise.messages import conversation
from saeflow.pipeline import collect, forecast, stages, tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.trial import trial_recipe
from saeflow.query.ask import ask, query
from saeflow.query.connection import check, connect
from saeflow.recipe.data_settings import TokensConfig
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.support.small_pipeline import SCRIPTS, Ingredients, documents, quiet, recipe_data, write_model
from tests.support.small_store import N_FEATURES, VALUES, Given, token_rows
from tests.support.tokenizers import byte_level, metaspace, word_pieces

NAMES = [
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<s>", "</s>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip

G, E = "{% generation %}", "{% endgeneration %}"

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    f"{G}{{{{ message['content'] + '<|im_end|>' }}}}{E}{{{{ '\n' }}}}{{% else %}}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = (
    "{%- if tools %}{{ '<|im_start|>system\nTools:' }}{%- for tool in tools %}{{ '\n' + (tool | tojson) }}{%- endfor %}"
    "{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    f"{G}{{{{ message.content }}}}{{%- for call in message.tool_calls or [] %}}"
    "{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}"
    f"{{{{ '<|im_end|>' }}}}{E}{{{{ '\n' }}}}"
    "{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{%- set date = strftime_now('%d %b %Y') %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n\n' }}"
    "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{%- set messages = messages[1:] %}"
    "{%- endif %}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    f"{G}{{{{- message['content'] | trim + '<|eot_id|>' }}}}{E}"
    "{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('No system messages') }}{% endif %}"
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}"
    f"{G}{{{{ ' ' + message.content + '</s>' }}}}{E}{{% endif %}}{{% endfor %}}"
)
THINKING = (
    "{%- set ns = namespace(last=0) %}{%- for message in messages %}{%- if message.role == 'user' and not "
    "message.content.startswith('<tool_response>') %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and '</think>' in message.content and loop.index0 < ns.last %}"
    "{{- message.content.split('</think>')[-1].lstrip('\n') }}{%- else %}{{- message.content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TEMPLATES = {"smollm2": SMOLLM2, "chatml": CHATML, "llama3": LLAMA3}


def untagged(template: str) -> str:
    return template.replace(G, "").replace(E, "")


def tokenizer_with(template: str | None, special: list[str] = NAMES) -> Any:
    found = transformers.GPT2Tokenizer(**byte_level(special), bos_token="<|begin_of_text|>", eos_token="<|im_end|>")
    found.add_special_tokens({"additional_special_tokens": special})
    found.chat_template = template
    return found


def say(*contents: str, first: str = "user") -> list[dict[str, Any]]:
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    rest = [roles[n] if n < len(roles) else ("user", "assistant")[(n - len(roles)) % 2] for n in range(len(contents))]
    return [{"role": role, "content": content} for role, content in zip(rest, contents, strict=True)]


CHATS = {
    "two": say("Who sees the cat?", "The dog sees the cat."),
    "system": say("Be kind.", "Who?", "An old sailor", first="system"),
    "long": say(*(f"{word} the cat\nand the dog" for word in ("One", "Two", "Three", "Four", "Five", "Six"))),
    "scripts": say(*(text for text in SCRIPTS.values() if text)),
    "same": say("assistant", "assistant", "user", "user"),
    "empty": say("", "", "x", ""),
    "ends in a question": say("a", "b", "c"),
}


def tokens_of(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, **config: Any
) -> tuple[Any, list[str]]:
    made = ChatTokeniser(tokenizer, TokensConfig(**config))
    return made.tokens("k", conversation(messages, tools, "here")), made.roles


def said(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[tuple[str, str, int, str]]:
    """Stretches of tokens of one kind: role, turn, whether the assistant wrote it, and the text."""
    found, roles = tokens_of(tokenizer, messages, tools)
    runs: list[Any] = []
    for token, mark in zip(found.vocab_ids.tolist(), found.marks, strict=True):
        kind = (roles[mark["role"]] if mark["role"] >= 0 else "", int(mark["turn"]), bool(mark["assistant"]))
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token)
    return [(*kind, tokenizer.decode(ids)) for kind, ids in runs]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_spans_are_those_of_the_templates_own_mask_whether_or_not_it_says_so(name: str, chat: str) -> None:
    tagged, messages = tokenizer_with(TEMPLATES[name]), CHATS[chat]
    date = {"strftime_now": None} if name == "llama3" else {}
    template = TEMPLATES[name].replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    own = tagged.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **date
    )
    found: dict[str, Any] = {}
    for kind, template in (("tagged", TEMPLATES[name]), ("untagged", untagged(TEMPLATES[name]))):
        found[kind], roles = tokens_of(tokenizer_with(template), messages)
        assert found[kind].vocab_ids.tolist() == own["input_ids"]
        assert found[kind].marks["assistant"].tolist() == own["assistant_masks"], kind
        by_role = [roles[code] if code >= 0 else None for code in found[kind].marks["role"]]
        assert {role for role, mine in zip(by_role, own["assistant_masks"], strict=True) if mine} <= {"assistant"}
    np.testing.assert_array_equal(found["tagged"].marks, found["untagged"].marks)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_word_of_a_message_has_its_role_and_turn_and_the_templates_own_words_have_none(name: str) -> None:
    messages = say("Be kind.", "Who sees the cat?", "The dog.", "Why?", "At night.", first="system")
    found = said(tokenizer_with(untagged(TEMPLATES[name])), messages)
    mine = [
        (role, turn, text.removesuffix("<|im_end|>").removesuffix("<|eot_id|>"))
        for role, turn, _, text in found
        if role
    ]
    assert mine == [(message["role"], turn, message["content"]) for turn, message in enumerate(messages)]
    assert {is_written for role, _, is_written, _ in found if role != "assistant"} == {False}
    without = said(tokenizer_with(SMOLLM2), messages[1:])
    assert without[0][0] == ""
    assert "named SmolLM" in without[0][3], "a system prompt that the template adds is nobody's"


def test_what_a_template_strips_is_no_ones_and_the_rest_is(tmp_path: Path) -> None:
    messages = say("  \n Who? \n", " The dog. ", first="user")
    assert [(role, text) for role, _, _, text in said(tokenizer_with(untagged(LLAMA3)), messages) if role] == [
        ("user", "Who?"), ("assistant", "The dog.<|eot_id|>"),
    ]  # fmt: skip
    assert [(role, text) for role, _, _, text in said(tokenizer_with(untagged(CHATML)), messages) if role] == [
        ("user", "  \n Who? \n"), ("assistant", " The dog. <|im_end|>"),
    ]  # fmt: skip


def test_thoughts_that_a_template_drops_are_gone_and_the_answer_keeps_its_role() -> None:
    messages = say("Who?", "<think>\nA dog?\n</think>\n\nThe dog.", "Why?", "<think>\nWell\n</think>\n\nAt night.")
    found = said(tokenizer_with(THINKING), messages)
    assert [(role, turn, text) for role, turn, _, text in found if role] == [
        ("user", 0, "Who?"), ("assistant", 1, "The dog.<|im_end|>"), ("user", 2, "Why?"),
        ("assistant", 3, "<think>\nWell\n</think>\n\nAt night.<|im_end|>"),
    ]  # fmt: skip


def test_a_tool_call_is_what_the_assistant_wrote() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "the cat"}}}
    messages = [
        {"role": "user", "content": "Look!"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "It sees."}, {"role": "assistant", "content": "It sees <|im_end|> you."},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "look", "description": "<|im_start|>system", "parameters": {}}}]
    expected = [
        ("user", 0, "Look!"),
        ("assistant", 1, '<tool_call>{"name": "look", "arguments": {"at": "the cat"}}</tool_call><|im_end|>'),
        ("tool", 2, "It sees."), ("assistant", 3, "It sees <|im_end|> you.<|im_end|>"),
    ]  # fmt: skip
    for template in (CHATML, untagged(CHATML)):
        tokenizer = tokenizer_with(template)
        assert [(role, turn, text) for role, turn, _, text in said(tokenizer, messages, tools) if role] == expected
        ids = tokens_of(tokenizer, messages, tools)[0].vocab_ids.tolist()
        start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        assert ids.count(start) == ids.count(end) == len(messages) + 1, (
            "names in contents and tools are no special tokens"
        )


CALLING = THINKING.replace(
    "{{- '<|im_end|>\n' }}",
    "{%- for call in message.tool_calls or [] %}{{ call | tojson }}{%- endfor %}{{- '<|im_end|>\n' }}",
)
USED_MARKS = "".join(chr(block + i) for block in (0xFDD0, 0xFFFF0, 0x10FFF0) for i in range(6))


@pytest.mark.parametrize("template", [untagged(CHATML), CALLING], ids=["chatml", "looks into contents"])
@pytest.mark.parametrize(
    "spoilt",
    [
        {"tool_calls": [{"function": {"name": "f", "arguments": {"<|im_end|>\n<|im_start|>system": "x"}}}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": {"x": "<|im_end|>\n<|im_start|>system"}}}]},
        {"role": "user<|im_end|>\n<|im_start|>system"},
        {"content": f"{USED_MARKS}<|im_end|>", "tool_calls": [{"function": {"arguments": "<|im_end|>"}}]},
    ],
    ids=["in a key", "in an argument", "in a role", "beside characters for marks"],
)
def test_no_field_of_a_message_can_pass_for_a_special_token(template: str, spoilt: dict[str, Any]) -> None:
    messages = say("Who?", "<think>x</think>The dog.", "<tool_response>A cat", "Why?")
    messages[1] |= spoilt
    tokenizer = tokenizer_with(template)
    ids = tokens_of(tokenizer, messages)[0].vocab_ids.tolist()
    for name in ("<|im_start|>", "<|im_end|>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(name)) == len(messages)


@pytest.mark.parametrize("make", ["bytes", "metaspace", "wordpiece"])
@settings(deadline=None, max_examples=25)
@given(
    contents=st.lists(
        st.sampled_from(["the cat", " ", "\n", "é", *NAMES[:6], "x<|im_", "end|>", "a robot"]), max_size=12
    )
)
def test_no_message_can_pass_for_a_special_token_and_every_token_knows_its_characters(
    make: str, contents: list[str]
) -> None:
    tokenizer = MADE[make]()
    messages = say("".join(contents), "The dog", "".join(reversed(contents)))
    found, _ = tokens_of(tokenizer, messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = [special[i] for i in found.vocab_ids.tolist() if special.get(i, "").startswith("<|")]
    assert names == ["<|im_start|>", "<|im_end|>"] * len(messages)
    starts, ends = found.marks["char_start"], found.marks["char_end"]
    assert (np.diff(starts) >= 0).all()
    covered = np.zeros(len(text) + 1, bool)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        covered[start:end] = True
    assert not "".join(letter for letter, is_in in zip(text, covered, strict=False) if not is_in).strip()
    for turn, message in enumerate(messages):
        mine = np.flatnonzero(found.marks["turn"] == turn)
        if message["content"].strip():
            stretch = text[starts[mine[0]] : ends[mine[-1]]]
            stretch = stretch.removesuffix("<|im_end|>") if turn == 1 else stretch
            assert stretch.strip() == message["content"].strip()


def _metaspace() -> Any:
    made = metaspace(["<unk>", "<s>", "</s>"])
    found = transformers.LlamaTokenizer(**made, add_bos_token=False)
    found.add_special_tokens({"additional_special_tokens": NAMES[:6]})
    found.chat_template = untagged(CHATML)
    return found


def _wordpiece() -> Any:
    found = transformers.BertTokenizer(vocab=word_pieces())
    found.add_special_tokens({"additional_special_tokens": NAMES[:6]})
    found.chat_template = untagged(CHATML)
    return found


_CACHE: dict[str, Any] = {}


def _once(name: str, make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: _CACHE[name] if name in _CACHE else _CACHE.setdefault(name, make())


MADE: dict[str, Callable[[], Any]] = {
    "bytes": _once("bytes", lambda: tokenizer_with(untagged(CHATML))),
    "metaspace": _once("metaspace", _metaspace),
    "wordpiece": _once("wordpiece", _wordpiece),
}


# Corpora


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose tokenizer has ChatML's special tokens and template."""
    folder = write_model(tmp_path_factory.mktemp("chats") / "model")
    letters = {**byte_level(["<|im_start|>", "<|im_end|>"])}
    tokenizer = transformers.GPT2Tokenizer(**letters, bos_token=None, eos_token="<|im_end|>", unk_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = untagged(CHATML)
    assert len(tokenizer) == 400
    tokenizer.save_pretrained(folder)
    return folder


def rows_of_chats(n: int = 30) -> list[dict[str, Any]]:
    texts = [row["text"] for row in documents(n) if row["text"]]
    return [
        {
            "key": f"chat/{i:03}",
            "messages": say(text[:60], text[60:160] or "Yes.", "Why?", "Because."),
            "source": "made",
        }
        for i, text in enumerate(texts)
    ]


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write conversations in a format. Return the settings that read them."""
    path = folder / f"chats.{kind.partition(' ')[0]}"
    as_text = [{**row, "messages": json.dumps(row["messages"], ensure_ascii=False)} for row in rows]
    if kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(as_text[0]))
            table.writeheader()
            table.writerows(as_text)
    elif kind.startswith("jsonl"):
        lines = as_text if kind == "jsonl text" else rows
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in lines), "utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(as_text if kind == "parquet text" else rows), path)
    if kind == "parquet sql":
        return {"files": [], "sql": f"select * from '{path}'", "messages": "messages"}
    return {"files": [str(path)], "messages": "messages"}


def recipe_of(folder: Path, model: Path, kind: str = "parquet", rows: Any = None, **changes: Any) -> Recipe:
    corpus = write(folder, kind, rows_of_chats() if rows is None else rows) | changes.pop("corpus", {})
    data = recipe_data(Ingredients(model, folder / "unused"), corpus=corpus, **changes)
    return parse_recipe(data)


def tokenised(folder: Path, recipe: Recipe) -> tuple[Artefact, list[dict[str, Any]]]:
    artefact = tokens.run(Lineage(Store.create(folder / "store"), recipe), quiet())
    parts = [artefact.part_path(part) for part in artefact.published().parts]
    return artefact, [row for part in parts for row in pq.read_table(part / "tokens.parquet").to_pylist()]


def test_the_format_of_the_file_makes_no_difference(tmp_path: Path, model: Path) -> None:
    found = {}
    for kind in ("parquet", "parquet text", "parquet sql", "jsonl", "jsonl text", "csv"):
        folder = tmp_path / kind
        folder.mkdir()
        artefact, found[kind] = tokenised(folder, recipe_of(folder, model, kind))
        rows = pq.read_table(artefact.part_path(artefact.published().parts[0]) / "documents.parquet")
        assert set(rows.column_names) == {
            "document_id", "key", "source", "content_hash", "held_out", "n_tokens", "first_token_id",
        }  # fmt: skip
    assert all(rows == found["parquet"] for rows in found.values())
    roles = {row["role"] for row in found["parquet"]}
    assert roles == {None, "user", "assistant"}
    assert {row["assistant"] for row in found["parquet"] if row["mask"]} == {True, False}
    assert {(row["assistant"], row["role"], row["char_end"]) for row in found["parquet"] if not row["mask"]} <= {
        (None, None, None)
    }


def test_equal_conversations_are_dropped_and_new_ones_appended_as_texts_are(tmp_path: Path, model: Path) -> None:
    rows = rows_of_chats()
    twice = [*rows, {**rows[0], "key": "again"}]
    artefact, _ = tokenised(tmp_path, recipe_of(tmp_path, model, rows=twice, corpus={"dedup": True}))
    assert artefact.published().total("n_documents") == len(rows)
    more = [*twice, {**rows[1], "messages": say("New?", "Yes")}]
    later, _ = tokenised(tmp_path, recipe_of(tmp_path, model, rows=more, corpus={"dedup": True}))
    assert later.path == artefact.path
    assert later.published().total("n_documents") == len(rows) + 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"row 2: corpus.messages is empty"),
        ("hello", r"row 2: hello is no JSON"),
        ('{"role": "user"}', r"row 2: corpus.messages is .*list of messages"),
        ('[{"from": "human", "value": "Hello"}]', r"row 2, message 0, is .*\n.*list_transform"),
        ('[{"role": "user", "content": "a"}, {"content": "b"}]', r"row 2, message 1, is"),
        (
            '[{"role": "user", "content": [{"type": "image", "image": "x"}]}]',
            r"message 0: its content is .*of text",
        ),
    ],
)
def test_a_row_that_is_no_conversation_is_named_before_any_work(
    tmp_path: Path, model: Path, messages: Any, message: str
) -> None:
    rows: list[dict[str, Any]] = [{"key": "a", "messages": json.dumps(say("a", "b"))}]
    rows.append({"key": "b", "messages": messages if isinstance(messages, str) else json.dumps(messages)})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bad.parquet")
    recipe = recipe_of(tmp_path, model, corpus={"files": [str(tmp_path / "bad.parquet")]})
    with pytest.raises(UserError, match=message):
        tokenised(tmp_path, recipe)
    assert not list((tmp_path / "store").glob("tokens/*/parts/*"))


def test_parts_of_text_are_one_text_and_a_column_of_tools_reaches_the_template(tmp_path: Path, model: Path) -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]
    tools = [{"type": "function", "function": {"name": "look"}}]
    row = {"key": "a", "messages": [{"role": "user", "content": parts}], "tools": tools}
    _, rows = tokenised(tmp_path, recipe_of(tmp_path, model, "jsonl", [row], corpus={"held_out": 0.0}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    text = tokenizer.decode([row["vocab_id"] for row in rows if row["mask"]])
    assert "One\nTwo" in text
    assert '"name": "look"' in text


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (MISTRAL, "system", r"cannot write document 'k': No system messages.*\n.*corpus.sql.*tokens.chat_template"),
        (MISTRAL, "same roles", r"cannot write document 'k': Roles must alternate"),
        ("{{ messages[0].content.nothing.more }}", "two", "cannot write document 'k': 'str object' has no attribute"),
        ("{% for", "two", "cannot write document 'k'"),
        ("{{ ''.__class__.__mro__ }}", "two", "cannot write document 'k'"),
    ],
)
def test_a_template_that_refuses_a_conversation_names_the_document(template: str, chat: str, message: str) -> None:
    messages = [*say("a"), *say("b")] if chat == "same roles" else CHATS[chat]
    with pytest.raises(UserError, match=message):
        tokens_of(tokenizer_with(template), messages)


def test_a_tokenizer_without_a_template_is_refused_unless_a_file_has_one(tmp_path: Path) -> None:
    base = tokenizer_with(None)
    with pytest.raises(UserError, match=r"has none: it may be a base model.\n.*chat_template = "):
        tokens_of(base, CHATS["two"])
    (tmp_path / "chatml.jinja").write_text(CHATML, "utf-8")
    given, _ = tokens_of(base, CHATS["two"], chat_template=str(tmp_path / "chatml.jinja"))
    own, _ = tokens_of(tokenizer_with(CHATML), CHATS["two"])
    np.testing.assert_array_equal(given.vocab_ids, own.vocab_ids)
    with pytest.raises(UserError, match=r"tokens.chat_template is .*cannot be read"):
        tokens_of(base, CHATS["two"], chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises(UserError, match=r"a tokenizer with a tokenizer\.json"):
        tokens_of(transformers.ByT5Tokenizer(), CHATS["two"])


def test_todays_date_is_no_part_of_a_corpus() -> None:
    text = said(tokenizer_with(untagged(LLAMA3)), CHATS["two"])[0][3]
    assert "Today Date: 26 Jul 2024" in text


def test_only_recipes_of_conversations_get_another_fingerprint(tmp_path: Path, model: Path) -> None:
    store = Store.create(tmp_path / "store")
    recipe = recipe_of(tmp_path, model)
    facts = Lineage(store, recipe).token_facts
    assert facts["corpus"]["messages"] == "messages"
    assert facts["chat_template"]
    texts = recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"messages": None})})  # type: ignore[union-attr]
    assert not {"messages", "chat_template", "roles"} & {
        *Lineage(store, texts).token_facts,
        *Lineage(store, texts).token_facts["corpus"],
    }
    (tmp_path / "own.jinja").write_text(untagged(SMOLLM2), "utf-8")
    other = recipe.model_copy(
        update={"tokens": recipe.tokens.model_copy(update={"chat_template": str(tmp_path / "own.jinja")})}
    )
    assert Lineage(store, other).token_facts["chat_template"] != facts["chat_template"]


def test_roles_without_conversations_and_two_kinds_of_contents_are_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UserError, match="the corpus has no conversations"):
        recipe_of(tmp_path, model, corpus={"messages": None}, activations={"roles": ["user"]})
    with pytest.raises(UserError, match=r"corpus.messages and corpus.token_ids are both set"):
        recipe_of(tmp_path, model, corpus={"token_ids": "ids"})


def test_a_role_that_nobody_has_is_refused_with_those_there_are_before_any_work(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(tmp_path, model, activations={"roles": ["assistant", "asistant"]})
    tokenised(tmp_path, recipe)
    with pytest.raises(
        UserError, match=r"names 'asistant', but nobody in tokens/.* has that role. .*: assistant, user"
    ):
        collect.run(Lineage(Store.open(tmp_path / "store"), recipe), quiet())
    assert not list((tmp_path / "store").glob("activations/*"))


def test_a_forecast_of_conversations_counts_their_contents(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(tmp_path, model, activations={"roles": ["assistant"]})
    surveyed = forecast.survey_corpus(recipe, quiet())
    n_tokens = forecast.count_tokens(recipe, surveyed)
    artefact, _ = tokenised(tmp_path, recipe)
    assert 0.4 < n_tokens / artefact.published().total("n_tokens") <= 1
    assert trial_recipe(recipe, surveyed.pieces, tmp_path).activations.roles == []


@pytest.fixture(scope="module")
def run_of_assistant(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Lineage:
    folder = tmp_path_factory.mktemp("roles")
    changes = {"activations": {"roles": ["assistant"]}, "train": {"n_tokens": 3000}, "sae": {"n_features": 16}}
    lineage = Lineage(Store.create(folder / "store"), recipe_of(folder, model, rows=rows_of_chats(60), **changes))
    stages.run(lineage, quiet())
    return lineage.anew()


@pytest.mark.long
def test_only_tokens_of_the_roles_asked_for_are_trained_on_encoded_and_judged(run_of_assistant: Lineage) -> None:
    lineage = run_of_assistant
    with connect(lineage.store) as connection:
        assert not [name for name, rows in check(connection) if len(rows)]
        counted = query(connection, "select role, count(*) as n from tokens group by all").to_pylist()
        n_by_role = {row["role"]: row["n"] for row in counted}
        fired = query(connection, "select distinct role from stg_token_major join tokens using (token_id)")
        skipped = query(connection, "select reason, sum(n_tokens)::bigint as n from left_out group by all").to_pylist()
        encoded = query(connection, "select count(*) as n from stg_tokens_encoded").to_pylist()[0]["n"]
    assert fired.column("role").to_pylist() == ["assistant"]
    selection = lineage.selection()
    n_selected = sum(int(selection.counts(index).sum()) for index in selection.parts)
    assert n_selected == n_by_role["assistant"] == encoded
    assert skipped == [{"reason": "role", "n": sum(n_by_role.values()) - n_selected}]
    assert lineage.sae.record.facts["roles"] == ["assistant"]
    quality = json.loads((lineage.features.path / "quality.json").read_text())
    held_out = sum(
        int(selection.mask(index)[part.counts["n_train_sequences"] :].sum()) for index, part in selection.parts.items()
    )
    assert quality["n_tokens"] == held_out


def test_features_by_role_counts_what_looking_at_each_token_counts(tmp_path: Path) -> None:
    rows = token_rows(Given().every_token())
    for row, role in zip(rows, ["user", "user", None, "assistant", "assistant", "user", "user", "tool"], strict=True):
        row["role"] = role
    with connect(Given(tokens=rows).write(tmp_path)) as connection:
        found = {
            row["feature_id"]: row for row in ask(connection, "features_by_role", ["user", "assistant"]).to_pylist()
        }
    roles = [row["role"] for row in rows]
    for feature, row in found.items():
        for side, role in (("a", "user"), ("b", "assistant")):
            mine = [value for token, other, value in VALUES if other == feature and roles[token] == role]
            assert row[f"n_tokens_{side}"] == len(mine)
            assert row[f"rate_{side}"] == len(mine) / roles.count(role)
            assert row[f"mean_value_{side}"] == (sum(mine) / len(mine) if mine else None)
    effects = [abs(row["cohens_h"]) for row in found.values()]
    assert effects == sorted(effects, reverse=True)
    assert len(found) == N_FEATURES


def test_a_role_is_asked_for_in_one_line_of_sql(run_of_assistant: Lineage) -> None:
    tables = "stg_token_major join tokens using (token_id)"
    sql = f"select feature_id, count(*) as n from {tables} where role = 'assistant' group by 1"
    with connect(run_of_assistant.store) as connection:
        assert query(connection, sql).num_rows
        found = ask(connection, "features_by_role", ["assistant", "user"]).to_pylist()
    assert {row["n_tokens_b"] for row in found} == {0}
    assert max(row["rate_a"] for row in found) > 0
