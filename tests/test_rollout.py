"""Answers: the same as transformers' own, whatever stands beside them, and as likely as the trainer says."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GptOssConfig, Lfm2Config, MambaConfig

from posttrain.data.batches import pack
from posttrain.errors import InputError, RunError
from posttrain.records import Sample
from posttrain.rollout import cache, decoding, transformers
from posttrain.rollout.rollout import Request, Sampling
from posttrain.rollout.transformers import TransformersRollout
from tiny import CONFIGS, SHAPE, VOCABULARY, make_engine, tiny_lm

ENDS = range(5, 20)  # so many that answers end at all lengths
PROMPTS = [np.random.default_rng(n).integers(20, VOCABULARY, 3 + 2 * n).astype(np.int32) for n in range(4)]
WARM = Sampling(temperature=1.5)


class Spoken:
    """A tokenizer as far as a rollout needs one."""

    eos_token_id = None

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def rollout_of(family="qwen2", batch_size=64, end_ids=ENDS, seed=0) -> TransformersRollout:
    lm = tiny_lm(family, seed)
    lm.generation_config = GenerationConfig()
    return TransformersRollout(lm, Spoken(), batch_size, end_ids)


def asked(answers=3, limit=9, **more) -> list[Request]:
    return [Request(p, (7, row, n), limit, **more) for row, p in enumerate(PROMPTS) for n in range(answers)]


def ids_of(completions) -> list[list[int]]:
    return [completion.segments[0].ids_T.tolist() for completion in completions]


@pytest.mark.parametrize("family", CONFIGS)
def test_the_likeliest_tokens_are_those_of_transformers_generate(family):
    rollout = rollout_of(family)
    ours = rollout.generate(asked(1, 12), Sampling())
    assert not rollout.warnings
    config = GenerationConfig(max_new_tokens=12, eos_token_id=list(ENDS), pad_token_id=0, do_sample=False)
    for completion, prompt in zip(ours, PROMPTS, strict=True):
        theirs = rollout.model.generate(torch.from_numpy(prompt).long()[None], generation_config=config)[0]
        assert completion.segments[0].ids_T.tolist() == theirs[len(prompt) :].tolist()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, top_p=0.6, top_k=7)], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_log_probabilities_are_the_trainers(family, sampling):
    completions = rollout_of(family).generate(asked(limit=14), sampling)
    engine = make_engine(tiny_lm(family))
    for completion in completions:
        (segment,) = completion.segments
        ids_T = np.concatenate([completion.prompt_ids_T, segment.ids_T])
        (logprobs_T,) = engine.forward([pack([Sample(0, ids_T, np.ones(len(ids_T), dtype=np.float32))])])
        np.testing.assert_allclose(segment.logprobs_T, logprobs_T[len(completion.prompt_ids_T) - 1 : -1], atol=1e-4)
        assert segment.logprobs_T.dtype == np.float32 and segment.ids_T.dtype == np.int32 and segment.trained


def test_a_temperature_divides_the_logits_of_log_probabilities_too():
    rollout = rollout_of()
    (completion,) = rollout.generate(asked(1, 3)[:1], Sampling(0.5))
    ids = torch.from_numpy(np.concatenate([PROMPTS[0], completion.segments[0].ids_T])).long()
    logits = rollout.model(input_ids=ids[None]).logits[0, len(PROMPTS[0]) - 1 : -1]
    expected = (logits / 0.5).log_softmax(-1).gather(1, ids[len(PROMPTS[0]) :, None])[:, 0]
    np.testing.assert_allclose(completion.segments[0].logprobs_T, expected.detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_an_answer_does_not_depend_on_what_is_written_beside_it(family):
    requests = asked()
    expected = rollout_of(family).generate(requests, WARM)
    lengths = {len(ids) for ids in ids_of(expected)}
    assert 1 in lengths and 9 in lengths and len(lengths) > 3  # so that rows leave, and some stay
    for batch_size, order in [(1, 1), (5, 1), (64, -1), (4, -1)]:
        found = rollout_of(family, batch_size).generate(requests[::order], WARM)[::order]
        assert ids_of(found) == ids_of(expected)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours.segments[0].logprobs_T, theirs.segments[0].logprobs_T, atol=1e-4)
    mixed = [requests[i] for i in np.random.default_rng(0).permutation(len(requests))]
    found = {
        request.key: ids for request, ids in zip(mixed, ids_of(rollout_of(family).generate(mixed, WARM)), strict=True)
    }
    assert [found[request.key] for request in requests] == ids_of(expected)


def test_noise_is_a_function_of_key_and_position():
    rollout = rollout_of(end_ids=[0])
    (whole, again, other) = rollout.generate(
        [Request(PROMPTS[0], key, 8) for key in [(1, 2), (1, 2), (1, 3)]], Sampling(3.0)
    )
    assert ids_of([whole]) == ids_of([again]) != ids_of([other])
    first, rest = np.split(whole.segments[0].ids_T, [3])
    onward = Request(np.concatenate([PROMPTS[0], first]), (1, 2), 5, first_position=3)
    assert ids_of(rollout.generate([onward], Sampling(3.0))) == [rest.tolist()]


def test_drawn_tokens_are_as_frequent_as_they_are_likely():
    requests = [Request(PROMPTS[0], (n,), 1) for n in range(20_000)]
    rollout = rollout_of(batch_size=20_000)
    drawn = np.bincount([ids[0] for ids in ids_of(rollout.generate(requests, Sampling(4.0)))], minlength=VOCABULARY)
    logits = rollout.model(input_ids=torch.from_numpy(PROMPTS[0]).long()[None]).logits[0, -1]
    expected = (logits / 4).softmax(-1).detach().numpy() * len(requests)
    common = expected > 5
    chi_square = ((drawn - expected)[common] ** 2 / expected[common]).sum() / common.sum()
    assert common.sum() > 10 and 0.5 < chi_square < 1.7
    kept = np.argsort(-expected)[:10]
    found = set(np.ravel(ids_of(rollout.generate(requests[:4000], Sampling(4.0, top_k=10)))))
    assert found == set(kept)
    shares = np.sort(expected / expected.sum())[::-1]
    enough = int(np.searchsorted(shares.cumsum(), 0.7)) + 1
    found = set(np.ravel(ids_of(rollout.generate(requests[:4000], Sampling(4.0, top_p=0.7)))))
    assert found == set(np.argsort(-expected)[:enough])


def test_each_request_has_its_own_limit_and_says_whether_it_was_cut():
    limits = [1, 4, 9, 2, 7, 3]
    requests = [Request(PROMPTS[n % 3], (n,), limit) for n, limit in enumerate(limits)]
    for rollout in (rollout_of(end_ids=[0]), rollout_of()):
        for completion, limit in zip(rollout.generate(requests, WARM), limits, strict=True):
            (ids_T,) = (segment.ids_T for segment in completion.segments)
            ended = np.isin(ids_T, rollout.end_ids)
            assert completion.stopped == ended[-1] and not ended[:-1].any()
            assert completion.stopped or len(ids_T) == limit
            assert completion.text == " ".join(map(str, ids_T))


def test_an_end_token_at_the_limit_ends_the_answer():
    free = rollout_of(end_ids=[0]).generate([Request(PROMPTS[0], (1,), 4)], WARM)
    end = int(free[0].segments[0].ids_T[-1])
    (completion,) = rollout_of(end_ids=[end]).generate([Request(PROMPTS[0], (1,), 4)], WARM)
    assert completion.stopped and completion.segments[0].ids_T[-1] == end


def test_prompts_are_read_once_and_ended_answers_leave_the_batch():
    rollout, seen = rollout_of(), []
    rollout.generate(asked()[:1], WARM)  # after the proof
    rollout.model.get_input_embeddings().register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    done = []
    completions = rollout.generate(asked(answers=8), WARM, done.append)
    assert seen[0] == sum(map(len, PROMPTS)) and sum(done) == 32
    lengths = np.array([len(ids) for ids in ids_of(completions)])
    alive = [int((lengths > n).sum()) for n in range(1, 9)]
    for count, wanted in zip(seen[1:], alive, strict=True):
        assert wanted <= count <= max(wanted * 8 / 7 + 1, wanted + 1)


def test_waiting_answers_take_the_places_of_those_that_have_ended():
    rollout, seen = rollout_of(batch_size=8), []
    requests = asked(answers=12, limit=40)
    rollout.generate(requests[:1], WARM)
    rollout.model.get_input_embeddings().register_forward_hook(lambda module, given, out: seen.append(given[0].shape))
    found = ids_of(rollout.generate(requests, WARM))
    rows = [shape[0] for shape in seen if shape[1] == 1]
    assert max(rows) <= 8 and np.mean(rows[: len(rows) // 2]) > 4, rows  # and fewer at the end, when nobody waits
    assert found == ids_of(rollout_of(batch_size=64).generate(requests, WARM))


def test_the_cache_grows_beyond_its_first_room(monkeypatch):
    requests = asked(limit=40)
    expected = rollout_of(end_ids=[0]).generate(requests, WARM)
    monkeypatch.setattr(cache, "FIRST_ROOM", 3)
    assert ids_of(rollout_of(end_ids=[0]).generate(requests, WARM)) == ids_of(expected)


def test_answers_are_looked_at_seldom_where_looking_waits(monkeypatch):
    expected = rollout_of().generate(asked(limit=20), WARM)
    monkeypatch.setattr(decoding, "tokens_between_looks", lambda device: 8)
    assert ids_of(rollout_of().generate(asked(limit=20), WARM)) == ids_of(expected)


@pytest.mark.parametrize("slept", [False, True])
def test_answers_are_those_of_the_weights_last_taken(slept):
    rollout = rollout_of("llama")
    before = ids_of(rollout.generate(asked(), WARM))
    newer = tiny_lm("llama", seed=1)
    if slept:
        rollout.sleep()
        assert all(weight.is_meta for weight in rollout.model.parameters())
    rollout.take(newer.state_dict().items())
    after = ids_of(rollout.generate(asked(), WARM))
    assert after == ids_of(rollout_of("llama", seed=1).generate(asked(), WARM)) != before


def test_sleeping_leaves_shared_weights_as_they_are():
    trained = tiny_lm("qwen2", seed=1)
    rollout = rollout_of("qwen2")
    expected = ids_of(rollout_of("qwen2", seed=1).generate(asked(), WARM))
    for _ in range(2):
        rollout.take(trained.state_dict().items())
        assert ids_of(rollout.generate(asked(), WARM)) == expected
        rollout.sleep()
    assert not any(weight.is_meta for weight in trained.parameters())


OTHERS = {
    "sinks": lambda: GptOssConfig(**SHAPE, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4),
    "convolutions": lambda: Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
    "recurrent": lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_remember_in_other_ways_are_written_by_transformers(kind):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(OTHERS[kind](), dtype=torch.float32)
    lm.generation_config = GenerationConfig()
    rollout = TransformersRollout(lm, Spoken(), 5, ENDS)
    for completion in rollout.generate(asked(1) + asked(1), Sampling(1.0)):
        ids_T = torch.from_numpy(np.concatenate([completion.prompt_ids_T, completion.segments[0].ids_T])).long()
        logits = lm(input_ids=ids_T[None], use_cache=False).logits[0, len(completion.prompt_ids_T) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids_T[len(completion.prompt_ids_T) :, None])[:, 0]
        np.testing.assert_allclose(completion.segments[0].logprobs_T, expected.detach().numpy(), atol=1e-4)
    assert len(rollout.warnings) == 1 and "by transformers' own generate" in rollout.warnings[0]


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_transformers_generate_writes_the_same_answers_with_the_same_noise(family, monkeypatch):
    requests = [*asked(limit=9), *asked(answers=1, limit=4)]
    expected = rollout_of(family).generate(requests, WARM)
    monkeypatch.setattr(transformers, "why_not", lambda model: "so the test wants it")
    found = rollout_of(family, batch_size=5).generate(requests, WARM)
    assert ids_of(found) == ids_of(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.stopped == theirs.stopped
        np.testing.assert_allclose(ours.segments[0].logprobs_T, theirs.segments[0].logprobs_T, atol=1e-4)


def test_bfloat16_is_written_by_the_same_loop():
    for family in CONFIGS:
        lm = tiny_lm(family).to(torch.bfloat16)
        lm.generation_config = GenerationConfig()
        rollout = TransformersRollout(lm, Spoken(), 64, ENDS)
        rollout.generate(asked(), WARM)
        assert not rollout.warnings, family


def test_less_is_written_at_a_time_where_memory_runs_out(monkeypatch):
    rollout, sizes, done = rollout_of(), [], []
    expected = rollout.generate(asked(), WARM)

    def short_of_memory(model, requests, batch_size, *more):
        sizes.append((len(requests), batch_size))
        for number, some in enumerate(decoding.decode(model, requests, batch_size, *more)):
            if batch_size > limit and number == 1:
                raise torch.OutOfMemoryError("no memory")
            yield some

    monkeypatch.setattr(transformers, "decode", short_of_memory)
    limit = 5
    assert ids_of(rollout.generate(asked(), WARM, done.append)) == ids_of(expected)
    assert sizes[0] == (12, 64) and sizes[1][0] < 12 and sum(done) == 12
    assert sizes[-1][1] <= 5 and rollout.num_out_of_memory == len(sizes) - 1 == len(rollout.warnings)
    assert f"rollout.batch_size={sizes[-1][1]} " in rollout.warnings[-1]
    limit = 0
    with pytest.raises(RunError, match=r"Lower rollout\.max_new_tokens"):
        rollout.generate(asked(), WARM)


def test_a_model_without_an_end_token_is_refused():
    with pytest.raises(InputError, match="no answer would end"):
        rollout_of(end_ids=())
