"""The pieces of explanations by a language model that need no endpoint: answers, scores, prompts, the kept answers."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.meaning.language_model import endpoint
from saeflow.meaning.language_model.answers import read_explanation, read_judgements, read_strengths
from saeflow.meaning.language_model.cache import AnswerCache, CachedAnswer, key_of_prompt
from saeflow.meaning.language_model.cost import Rates, forecast
from saeflow.meaning.language_model.endpoint import Completion
from saeflow.meaning.language_model.examples import Window
from saeflow.meaning.language_model.prompts import Prompt, Prompts, own_folder, strength_told, with_marks, wrong_places
from saeflow.meaning.language_model.scores import (
    JudgedExample,
    Rate,
    Simulated,
    correlation,
    judged_scores,
    simulated_scores,
)
from saeflow.meaning.language_model.settings import endpoint_url, key_from, source_of
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store


def window(pieces: list[str], strengths: list[float], stratum: str = "band_1", token_id: int = 10) -> Window:
    return Window(
        stratum, token_id, 0, max(range(len(pieces)), key=strengths.__getitem__), tuple(pieces), tuple(strengths)
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Explanation: commas before speech", "commas before speech"),
        ("I looked.\n**Explanation:** *the word* love", "the word* love"),
        ("explanation : a\nEXPLANATION: the second one", "the second one"),
        ("<think>Explanation: no\n</think>\n\nnames of rivers", "names of rivers"),
        ("<think>never ends Explanation: x y z", None),
        ("two lines\nof chat", None),
        ("", None),
        ("Explanation: " + "x" * 401, None),
        ("Explanation: …!", None),
    ],
)
def test_an_explanation_is_the_line_that_says_so(text: str, found: str | None) -> None:
    assert read_explanation(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("Example [1] is fine.\nAnswer: [0,1,0].", [False, True, False]),
        ('["1", "no", true]', [True, False, True]),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ("[1, 0, 1, 1]", None),
        ("1 0 1", None),
        ("<think>[1, 1, 1]</think> I cannot", None),
        ("[" * 100_000, None),
    ],
)
def test_judgements_are_one_list_of_as_many_answers_as_examples(text: str, found: list[bool] | None) -> None:
    assert read_judgements(text, 3) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"1": 3, "3": 10}', [3, 0, 10]),
        ("Here: {} .", [0, 0, 0]),
        ('{"2": 2.5}', [0, 2.5, 0]),
        ('{"4": 1}', None),
        ('{"1": 11}', None),
        ('{"1": NaN}', None),
        ('{"1": "a"}', None),
        pytest.param(f'{{"1": 1{"0" * 400}}}', None, id="beyond every float"),
        ("{1: 2}", None),
        ("none", None),
    ],
)
def test_strengths_are_an_object_by_token(text: str, found: list[float] | None) -> None:
    assert read_strengths(text, 3) == found


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=300), st.integers(1, 4))
def test_no_answer_makes_a_reader_fail(text: str, n: int) -> None:
    assert read_explanation(text) is None or len(read_explanation(text) or "") >= 3
    assert read_judgements(text, n) is None or len(read_judgements(text, n) or []) == n
    assert read_strengths(text, n) is None or len(read_strengths(text, n) or []) == n


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (5, 10), (10, 10), (81, 263)])
def test_wilson_s_interval_holds_the_shares_whose_score_test_does_not_refuse(right: int, n: int) -> None:
    """By definition: |p̂ − p| ≤ z √(p (1 − p) / n)."""
    grid = np.linspace(0, 1, 200_001)
    kept = grid[np.abs(right / n - grid) <= 1.959963984540054 * np.sqrt(grid * (1 - grid) / n) + 1e-12]
    assert Rate(right, n).interval == pytest.approx((kept.min(), kept.max()), abs=1e-5)


def test_balanced_accuracy_weighs_firing_and_silent_examples_alike() -> None:
    judged = [
        *(JudgedExample("band_1", i, True, True) for i in range(8)),
        *(JudgedExample("band_2", i, True, i % 2 == 0) for i in range(2)),
        *(JudgedExample("near_misses", i, False, i < 3) for i in range(4)),
        *(JudgedExample("random", i, False, False) for i in range(6)),
        JudgedExample("random", 99, False, None),
    ]
    found = {each.stratum: each for each in judged_scores(judged)}
    assert list(found) == [
        "all", "against_near_misses", "against_random", "band_1", "band_2", "near_misses", "random",
    ]  # fmt: skip
    assert {name: each.score for name, each in found.items()} == pytest.approx(
        {"all": (0.9 + 0.7) / 2, "against_near_misses": (0.9 + 0.25) / 2, "against_random": 0.95, "band_1": 1.0,
         "band_2": 0.5, "near_misses": 0.25, "random": 1.0}
    )  # fmt: skip
    assert (found["random"].n, found["random"].n_unusable, found["all"].n) == (6, 1, 20)
    assert all(each.low <= each.score <= each.high for each in found.values())  # type: ignore[operator]


def test_without_silent_examples_there_is_no_balanced_accuracy() -> None:
    found = {each.stratum: each.score for each in judged_scores([JudgedExample("band_1", 1, True, True)])}
    assert found == {"all": None, "against_near_misses": None, "against_random": None, "band_1": 1.0}
    assert [each.score for each in judged_scores([])] == [None, None, None]


def test_the_interval_of_a_balanced_accuracy_covers_the_truth_in_95_of_100_cases() -> None:
    dice = np.random.default_rng(0)
    covered = []
    for _ in range(600):
        yes, no = dice.random(30) < 0.8, dice.random(40) < 0.6
        judged = [JudgedExample("band_1", i, True, bool(each)) for i, each in enumerate(yes)]
        judged += [JudgedExample("random", i, False, not each) for i, each in enumerate(no)]
        whole = judged_scores(judged)[0]
        covered.append(whole.low <= 0.7 <= whole.high)  # type: ignore[operator]
    assert 0.93 <= np.mean(covered) <= 0.98


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=6), max_size=5))
def test_simulation_scores_the_correlation_over_all_tokens(contexts: list[list[tuple[int, int]]]) -> None:
    pairs = [([float(a) for a, _ in each], [float(b) for _, b in each]) for each in contexts]
    actual, predicted = (list(itertools.chain(*(pair[i] for pair in pairs))) for i in (0, 1))
    found = correlation(pairs)
    if len(set(actual)) < 2:
        assert found is None
    elif len(set(predicted)) < 2:
        assert found == 0
    else:
        assert found == pytest.approx(np.corrcoef(actual, predicted)[0, 1], abs=1e-9)


def test_the_intervals_of_simulation_resample_contexts() -> None:
    dice = np.random.default_rng(1)
    simulated = []
    for i in range(12):
        actual = dice.random(20)
        simulated.append(Simulated("band_1" if i < 9 else "random", i, actual, actual + dice.random(20)))
    simulated.append(Simulated("band_1", 13, [1.0, 2.0], None))
    found = {each.stratum: each for each in simulated_scores(simulated)}
    assert list(found) == ["all", "firing", "band_1"]
    assert (found["all"].n, found["all"].n_unusable, found["firing"].n) == (12, 1, 9)
    assert found["all"].low < found["all"].score < found["all"].high  # type: ignore[operator]
    assert simulated_scores(simulated) == simulated_scores(simulated)


def test_marks_stand_around_active_tokens_and_neighbours_share_them() -> None:
    shown = window(["a", " b", " c\n", "d"], [0.0, 9.0, 3.0, 1.0])
    assert shown.active == (1, 2)  # 1.0 is below 0.3 of the strongest
    assert with_marks(shown, shown.active) == "a<< b c\\n>>d"
    assert with_marks(shown, [0, 3]) == "<<a>> b c\\n<<d>>"


@settings(max_examples=100)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
def test_wrong_marks_are_as_many_as_right_ones_and_hold_the_near_miss(n: int, n_marked: int, seed: int) -> None:
    silent = Window("near_misses", 7, 0, n // 2, tuple(f" {i}" for i in range(n)), (0.0,) * n)
    places = wrong_places(silent, n_marked, seed)
    assert silent.place in places
    assert len(places) == len(set(places)) == min(n, n_marked)


@pytest.mark.parametrize(("value", "told"), [(0.0, 0), (1e-9, 1), (5.0, 5), (5.1, 6), (10.0, 10), (11.0, 10)])
def test_strengths_are_told_from_1_to_10(value: float, told: int) -> None:
    assert strength_told(value, 10.0) == told


def test_text_that_looks_like_a_placeholder_stays_text() -> None:
    shown = window(["{{explanation}}", " {{examples}}"], [1.0, 0.0])
    prompt = Prompts.read().judgement("detection", "of {{n}}", [shown.text])
    assert "Explanation: of {{n}}" in prompt.messages[1][1]
    assert "Example 1: {{explanation}} {{examples}}" in prompt.messages[1][1]


def test_edited_prompts_take_the_place_of_ours_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "detection.txt").write_text("{{explanation}}? {{examples}}")
    edited = Prompts.read(tmp_path)
    assert edited.judgement("detection", "love", ["a"]).messages == (("user", "love? Example 1: a"),)
    assert edited.judgement("fuzzing", "love", ["a"]) == Prompts.read().judgement("fuzzing", "love", ["a"])
    assert edited.texts != Prompts.read().texts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{explanation}} {{example}}", "only these are filled in"),
        ("{{examples}} only", "lacks {{explanation}}"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_prompt_that_cannot_work_is_refused(text: str | bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "fuzzing.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=said):
        Prompts.read(tmp_path)


def test_a_folder_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds none of"):
        Prompts.read(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        Prompts.read(tmp_path / "none")


def test_our_prompts_are_files_beside_the_code() -> None:
    assert {path.name for path in own_folder().iterdir()} == {
        "explanation.txt", "detection.txt", "fuzzing.txt", "simulation.txt",
    }  # fmt: skip


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000", "ftp://a/v1", "http://", "http://user:word@a/v1", "http://a/v1?key=x", "http://a/#b",
        "http://[::1", "http://a:99999/v1", "http://a:b/v1", "http://a b/v1", "http://a\nb/v1",
    ],
)  # fmt: skip
def test_an_endpoint_is_a_plain_address(url: str) -> None:
    with pytest.raises(UserError, match="--endpoint"):
        endpoint_url(url)


def test_a_source_is_named_after_the_model() -> None:
    assert source_of("gpt-5") == "llm-gpt-5"
    assert source_of("Qwen/Qwen3:8b ") == "llm-Qwen-Qwen3-8b"
    assert len(source_of("x" * 300)) <= 64


def test_a_key_comes_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one")
    monkeypatch.setenv("MINE", "sk-two\n")
    assert (key_from(None), key_from("MINE")) == ("sk-one", "sk-two")
    monkeypatch.delenv("OPENAI_API_KEY")
    assert key_from(None) is None
    with pytest.raises(UserError, match="no such environment variable"):
        key_from("YOURS")


def an_answer(key: str, feature: int = 1, documents: tuple[int, ...] = (3,), **changes: object) -> CachedAnswer:
    values = {
        "key": key, "feature_id": feature, "method": "detection", "model": "m", "text": "[1]\n", "n": 1,
        "n_prompt_chars": 40, "n_prompt_tokens": 9, "n_answer_tokens": None, "tokens": "tokens/t-1",
        "document_ids": documents,
    }  # fmt: skip
    return CachedAnswer(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("torn", [b"", b'{"key": "half', b"\xff\n", b"[]\nnull\n{}\n"])
def test_an_answer_survives_a_kill_and_a_torn_line(torn: bytes, tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    cache = AnswerCache(store, "demo-f0000001", "llm-m")
    cache.keep(an_answer("a"))
    with cache.journal.open("ab") as file:
        file.write(torn)
    again = AnswerCache(store, "demo-f0000001", "llm-m")
    again.load([1])
    again.keep(an_answer("b", feature=2))
    third = AnswerCache(store, "demo-f0000001", "llm-m")
    third.load([2])
    assert third.known == {"a": an_answer("a"), "b": an_answer("b", feature=2)}
    third.fold()
    assert not third.journal.exists()
    third.load([2])
    assert third.known == {"b": an_answer("b", feature=2)}
    assert sorted(answer.key for answer in third.every()) == ["a", "b"]


def test_the_name_of_a_new_journal_is_flushed_with_its_first_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = AnswerCache(Store.create(tmp_path), "demo-f0000001", "llm-m")
    flushed: list[str] = []
    monkeypatch.setattr("os.fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    for key in "ab":
        cache.keep(an_answer(key))
    assert [path for path in flushed if path == str(cache.journal.parent)] == [str(cache.journal.parent)]
    assert flushed.count(str(cache.journal)) == 2


def test_an_answer_is_found_by_model_question_and_sampling_alone() -> None:
    prompt = Prompt("detection", (("user", "a"),), 1, 100)
    keys = {
        key_of_prompt("m", 0.0, prompt), key_of_prompt("n", 0.0, prompt), key_of_prompt("m", 0.5, prompt),
        key_of_prompt("m", 0.0, Prompt("detection", (("user", "b"),), 1, 100)),
        key_of_prompt("m", 0.0, Prompt("detection", (("user", "a"),), 1, 200)),
    }  # fmt: skip
    assert len(keys) == 5
    assert key_of_prompt("m", 0.0, Prompt("fuzzing", (("user", "a"),), 2, 100)) in keys


def test_a_forecast_scales_the_questions_of_some_features() -> None:
    rates = Rates.counted([an_answer("a", n_answer_tokens=3, n=3), an_answer("b", n_prompt_chars=0)])
    left = [Prompt("detection", (("user", "x" * 40),), 5, 100)] * 3
    found = forecast([left, left[:2]], 10, rates, ["detection"])
    assert dict(found.questions) == {"detection": 25}
    assert found.tokens == 25 * (9 + 5)
    assert found.is_counted
    assert not forecast([left], 1, rates, ["detection", "fuzzing"]).is_counted


def test_tokens_that_nobody_counted_are_a_quarter_of_the_characters() -> None:
    prompt = Prompt("detection", (("user", "x" * 40),), 1, 100)
    assert endpoint._spent(Completion("[1]\n.", None, None), prompt) == 10 + 2
    assert endpoint._spent(Completion("[1]\n.", 7, 3), prompt) == 7 + 3


def test_neighbours_overlap_if_their_windows_reach_one_another() -> None:
    one, two = window(["a"], [1.0]), window(["b"], [1.0], token_id=11)
    assert one.overlaps(two, 2)
    assert not one.overlaps(two, 1)
