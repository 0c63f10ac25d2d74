"""The vLLM engine against the transformers engine, on the real vLLM."""

import importlib.util
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from duet_unlearn.data import demo_world
from duet_unlearn.data.models.folder import eos_token_ids
from duet_unlearn.data.prefixes import resolve_prefix
from duet_unlearn.data.prompts import PromptRenderer, load_tokenizer
from duet_unlearn.data.queries import load_queries
from duet_unlearn.errors import ConfigurationError, DuetError
from duet_unlearn.teacher_cache.engines import open_engine
from duet_unlearn.teacher_cache.engines.base import Engine, EngineConfig, Prompt
from duet_unlearn.teacher_cache.engines.transformers import TransformersEngine
from duet_unlearn.teacher_cache.engines.vllm import VllmEngine
from duet_unlearn.teacher_cache.format.signal import Signal

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

PREFIX = np.random.default_rng(1).integers(3, 384, 40).tolist()
"""Longer than a KV block, in front of most prompts."""
TEMPERATURE = 1.5


def random_prompts(count: int, *, seed: int = 0) -> list[tuple[int, list[int]]]:
    """Prompts of 1 to 70 tokens, three in four behind the shared prefix."""
    rng = np.random.default_rng(seed)
    return [
        (i, (PREFIX if i % 4 else []) + rng.integers(3, 384, length).tolist())
        for i, length in enumerate(rng.integers(1, 30, count))
    ]


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> EngineConfig:
    """Four positions, with tokens that end responses at different lengths."""
    config = EngineConfig(
        model=tiny_model,
        top_k=50,
        positions=4,
        eos_token_ids=(),
        compute_dtype="float32",
        max_prompt_tokens=70,
        max_new_tokens=12,
        temperature=TEMPERATURE,
    )
    free = TransformersEngine(config)
    decoded = [signal.response_ids for _, signal in free.signals(random_prompts(20))]
    return replace(config, eos_token_ids=(int(decoded[0][1]), int(decoded[7][2])))


@pytest.fixture(scope="module")
def engine(config: EngineConfig) -> Iterator[Engine]:
    before = dict(os.environ)
    engine = open_engine("auto", config)
    assert dict(os.environ) == before, "what vLLM needs is set for its own process only"
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def cramped(config: EngineConfig) -> Iterator[Engine]:
    """The whole vocabulary, prompts read in pieces, and memory that makes vLLM preempt."""
    block = 2 * 2 * 32 * 2 * 32 * 4  # key, value; layers; width; heads; tokens; float32
    options = {
        "max_num_batched_tokens": 48,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 6 * block,
    }
    engine = VllmEngine(replace(config, top_k=384, eos_token_ids=(), engine_args=options))
    yield engine
    engine.close()


def assert_same(signal: Signal, expected: Signal) -> None:
    assert signal.response_ids.tolist() == expected.response_ids.tolist()
    assert signal.token_ids.shape == expected.token_ids.shape
    np.testing.assert_allclose(signal.logits, expected.logits, atol=1e-3)
    np.testing.assert_allclose(signal.logsumexp, expected.logsumexp, atol=1e-4)
    for position in range(len(signal.response_ids)):
        # Only tokens within float noise of the last place may differ.
        kept = [
            dict(zip(s.token_ids[position].tolist(), s.logits[position], strict=True))
            for s in (signal, expected)
        ]
        edge = signal.logits[position, -1] + 1e-3
        for token in kept[0].keys() ^ kept[1].keys():
            assert kept[0].get(token, kept[1].get(token)) <= edge


def test_engines_decode_the_same_answers(engine: Engine, config: EngineConfig) -> None:
    prompts = random_prompts(40)
    expected = dict(TransformersEngine(config).responses(prompts, 12))

    answers = dict(engine.responses(prompts, 12))

    assert answers == expected
    assert {len(ids) for ids in answers.values()} >= {1, 12}
    assert not {token for ids in answers.values() for token in ids} & set(config.eos_token_ids)
    # Signals again from the same engine, after a stream of answers was dropped half-way.
    assert len(next(engine.responses(prompts, 12))) == 2
    assert sorted(dict(engine.signals(prompts))) == list(range(40))


def test_engines_agree(engine: Engine, config: EngineConfig) -> None:
    prompts = random_prompts(150)
    expected = dict(TransformersEngine(config).signals(prompts))

    signals = dict(engine.signals(prompts))

    assert engine.name == "vllm"
    assert sorted(signals) == list(range(150))
    assert {len(signal.response_ids) for signal in signals.values()} >= {2, 4}
    for index, _ in prompts:
        assert_same(signals[index], expected[index])


@pytest.mark.parametrize("name", ["engine", "cramped"])
def test_engines_agree_along_given_responses(
    name: str, config: EngineConfig, request: pytest.FixtureRequest
) -> None:
    # Beside prompts that are decoded; the cramped engine reads prompts in pieces, and again.
    engine: Engine = request.getfixturevalue(name)
    cramped = {"top_k": 384, "eos_token_ids": ()} if name == "cramped" else {}
    rng = np.random.default_rng(5)
    prompts = [
        (index, ids, rng.integers(3, 384, int(rng.integers(1, 50))).tolist())
        if index % 5
        else (index, ids)
        for index, ids in random_prompts(60, seed=9)
    ]
    # A response that was read before, and one that begins like it.
    prompts += [(60, *prompts[1][1:]), (61, prompts[1][1], [*prompts[1][2], 5])]
    # Tokens that are named in place of the strongest.
    top_k = engine._config.top_k
    for index in (2, 7, 11):
        named = rng.integers(0, 384, (len(prompts[index][2]), top_k)).astype(np.int32)
        prompts[index] = (*prompts[index], named)

    signals = dict(engine.signals(prompts))

    expected = dict(TransformersEngine(replace(config, **cramped)).signals(prompts))
    assert sorted(signals) == list(range(62))
    for prompt in prompts:
        if len(prompt) == 4:
            np.testing.assert_array_equal(signals[prompt[0]].token_ids, prompt[3])
            np.testing.assert_array_equal(expected[prompt[0]].token_ids, prompt[3])
            np.testing.assert_allclose(
                signals[prompt[0]].logits, expected[prompt[0]].logits, atol=1e-3
            )
        else:
            assert_same(signals[prompt[0]], expected[prompt[0]])
        if len(prompt) > 2:
            assert signals[prompt[0]].response_ids.tolist() == prompt[2]


@pytest.mark.parametrize("name", ["engine", "cramped"])
def test_engines_draw_the_same_beside_greedy_and_given_responses(
    name: str, config: EngineConfig, request: pytest.FixtureRequest
) -> None:
    engine: Engine = request.getfixturevalue(name)
    cramped = {"top_k": 384, "eos_token_ids": ()} if name == "cramped" else {}
    prompts = [
        Prompt(index, ids, seed=index) if index % 3 else Prompt(index, ids, [5, 6][: index % 2 + 1])
        for index, ids in random_prompts(60, seed=11)
    ] + [Prompt(60, PREFIX)]

    signals = dict(engine.signals(prompts))

    whole = replace(config, **cramped)
    expected = dict(TransformersEngine(whole).signals(prompts))
    for number in range(61):
        assert_same(signals[number], expected[number])
    drawn = [signals[prompt.number] for prompt in prompts if prompt.seed is not None]
    assert any((s.response_ids != s.token_ids[:, 0]).any() for s in drawn)


@pytest.mark.parametrize("name", ["engine", "cramped"])
def test_engines_draw_the_same_tokens_to_keep(
    name: str, config: EngineConfig, request: pytest.FixtureRequest
) -> None:
    engine: Engine = request.getfixturevalue(name)
    cramped = {"top_k": 384, "eos_token_ids": ()} if name == "cramped" else {}
    prompts = [
        Prompt(index, ids, [5, 6, 7][: index % 3] or None, keep=index)
        for index, ids in random_prompts(30, seed=12)
    ]

    signals = dict(engine.signals(prompts))

    expected = dict(TransformersEngine(replace(config, **cramped)).signals(prompts))
    draws = tipped = 0.0
    for number in range(30):
        ours, theirs = signals[number], expected[number]
        np.testing.assert_array_equal(ours.response_ids, theirs.response_ids)
        np.testing.assert_allclose(ours.logsumexp, np.log(ours.token_ids.shape[1]), rtol=1e-6)
        counts = [np.zeros((len(s.token_ids), 384)) for s in (ours, theirs)]
        for count, s in zip(counts, (ours, theirs), strict=True):
            np.add.at(count, (np.arange(len(count))[:, None], s.token_ids), np.exp(s.logits))
        # Rounding tips a draw only where it falls on the border of two tokens.
        assert np.abs(counts[0] - counts[1]).max() < 1.01
        draws += counts[0].sum()
        tipped += np.abs(counts[0] - counts[1]).sum() / 2
    assert tipped < draws / 4000


def test_engines_agree_on_the_demo_world() -> None:
    renderer = PromptRenderer(
        load_tokenizer(demo_world.MODEL),
        prefix=resolve_prefix(demo_world.PREFIX, demo_world.TOPIC),
    )
    queries = [
        *load_queries(str(demo_world.FORGET), split="forget")[:64],
        *load_queries(str(demo_world.RETAIN), split="retain")[:64],
    ]
    prompts = [(i, renderer.teacher_ids(query.messages)) for i, query in enumerate(queries)]
    config = EngineConfig(
        model=demo_world.MODEL,
        top_k=100,
        positions=3,
        eos_token_ids=eos_token_ids(demo_world.MODEL),
        compute_dtype="float32",
        max_prompt_tokens=max(len(ids) for _, ids in prompts),
    )
    expected = dict(TransformersEngine(config).signals(prompts))
    engine = VllmEngine(config)
    try:
        signals = dict(engine.signals(prompts))
    finally:
        engine.close()

    assert len(signals) == len(prompts) >= 100
    for index, _ in prompts:
        assert_same(signals[index], expected[index])


def test_signals_are_sorted_typed_and_end_with_the_end_token(
    engine: Engine, config: EngineConfig
) -> None:
    for _, signal in engine.signals(random_prompts(30, seed=3)):
        assert signal.response_ids.dtype == signal.token_ids.dtype == np.int32
        assert signal.logits.dtype == signal.logsumexp.dtype == np.float32
        falling = np.diff(signal.logits, axis=1) <= 0
        assert falling.all()
        length = len(signal.response_ids)
        ended = np.isin(signal.response_ids, config.eos_token_ids)
        assert not ended[:-1].any()
        assert length == config.positions or ended[-1]


def test_streams_more_prompts_than_are_under_way_at_once(engine: Engine) -> None:
    taken = 0

    def source() -> Iterator[tuple[int, list[int]]]:
        nonlocal taken
        for index, prompt in random_prompts(1500, seed=4):
            taken += 1
            yield index * 10, prompt[-5:]

    stream = engine.signals(source())
    first = next(stream)
    assert taken < 1000, "reads a bounded number of prompts ahead"
    indices = sorted([first[0], *(index for index, _ in stream)])
    assert indices == [index * 10 for index in range(1500)]


def test_an_abandoned_stream_leaves_the_engine_usable(engine: Engine, config: EngineConfig) -> None:
    stream = engine.signals(random_prompts(400, seed=5))
    list(itertools.islice(stream, 3))
    stream.close()

    prompts = random_prompts(20, seed=6)
    expected = dict(TransformersEngine(config).signals(prompts))
    signals = dict(engine.signals(prompts))

    assert sorted(signals) == sorted(expected)
    for index in expected:
        assert_same(signals[index], expected[index])


def test_whole_vocabulary_in_pieces_and_under_preemption(
    cramped: Engine, config: EngineConfig
) -> None:
    rng = np.random.default_rng(7)
    # Thirty tokens and four positions: every one of these outgrows its block while decoding.
    outgrowing = [(100 + i, rng.integers(3, 384, 30).tolist()) for i in range(30)]
    prompts = random_prompts(60, seed=7) + outgrowing
    whole = replace(config, top_k=384, eos_token_ids=())
    expected = dict(TransformersEngine(whole).signals(prompts))

    signals = dict(cramped.signals(prompts))

    for index, _ in prompts:
        signal = signals[index]
        assert_same(signal, expected[index])
        totals = np.logaddexp.reduce(signal.logits.astype(np.float64), axis=1)
        np.testing.assert_allclose(totals, signal.logsumexp, atol=1e-4)
        assert (np.abs(totals) > 0.1).all(), "normalised log-probabilities sum to one"


def test_describes_what_moves_the_last_bits(engine: Engine) -> None:
    described = engine.describe()
    assert described["engine"] == "vllm"
    assert set(described["versions"]) == {"vllm", "torch", "transformers"}
    assert described["settings"]["dtype"] == "float32"
    assert described["settings"]["prefix_caching"] is True
    assert "options" not in described


def test_describes_the_options_it_was_given(cramped: Engine) -> None:
    described = cramped.describe()
    assert described["options"]["max_num_seqs"] == described["settings"]["max_num_seqs"] == 8


def test_an_option_that_vllm_has_not_is_one_line(config: EngineConfig) -> None:
    line = "has no option max_num_seq; did you mean max_num_seqs"
    with pytest.raises(ConfigurationError, match=line) as caught:
        VllmEngine(replace(config, engine_args={"max_num_seq": 1}))
    assert "\n" not in str(caught.value)


def test_top_k_beyond_the_vocabulary_is_refused(config: EngineConfig) -> None:
    with pytest.raises(DuetError, match=r"top_k is 385, .* vocabulary of 384"):
        VllmEngine(replace(config, top_k=385))


def test_options_that_the_capture_rests_on_are_refused(config: EngineConfig) -> None:
    with pytest.raises(ConfigurationError, match="option logprobs_mode is set by the cache"):
        VllmEngine(replace(config, engine_args={"logprobs_mode": "raw_logprobs"}))


def test_a_failure_in_vllms_own_processes_is_named_from_the_log(config: EngineConfig) -> None:
    engine = VllmEngine.__new__(VllmEngine)
    engine._config = config
    with tempfile.TemporaryFile() as engine._log:
        engine._log.write(
            b"(EngineCore pid=7) ValueError: no memory for the cache blocks\n"
            b"RuntimeError: Engine core initialization failed. See root cause above.\n"
        )
        error = engine._failure("start", "Engine core initialization failed. See root cause above.")
    assert f"cannot start on {config.model}: ValueError: no memory for the" in str(error)


def test_a_killed_process_is_reported_and_nothing_is_left(cramped: VllmEngine) -> None:
    process = cramped._process
    stream = cramped.signals(random_prompts(500, seed=8))
    next(stream)
    process.kill()

    with pytest.raises(DuetError, match="its process ended \\(killed by SIGKILL\\)"):
        list(stream)

    cramped.close()
    cramped.close()
    for _ in range(50):
        if not Path(f"/proc/{process.pid}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the process is still there")
