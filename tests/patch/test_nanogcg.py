"""nanogcg's gradient and sampling, patched, on a small random language model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import ccu_fast
from tests.support.drop_in import counted, library, record, speed

V, T = 300, 6


def attack(dtype: torch.dtype = torch.float32, vocabulary: int = V) -> Any:
    """A GCG object in the middle of a run: prompt, suffix and target are embedded, the model is random."""
    gcg, transformers = library("nanogcg.gcg"), library("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    tokenizer = SimpleNamespace(chat_template="{{ m }}", vocab_size=vocabulary)
    run = gcg.GCG(model, tokenizer, gcg.GCGConfig(use_prefix_cache=False, allow_non_ascii=True))
    pieces = {name: torch.randint(0, vocabulary, (1, n)) for name, n in (("before", 4), ("after", 3), ("target", 5))}
    for name, ids in pieces.items():
        setattr(run, f"{name}_embeds", model.get_input_embeddings()(ids).detach())
    run.target_ids = pieces["target"]
    return run


def sample(run: Any, gradient: Any, **options: Any) -> torch.Tensor:
    gcg = library("nanogcg.gcg")
    torch.manual_seed(5)
    ids = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(1))
    result: torch.Tensor = gcg.sample_ids_from_grad(ids, gradient.squeeze(0), 64, **options)
    return result


@pytest.mark.parametrize("mellowmax", [False, True])
@pytest.mark.parametrize("banned", [None, torch.arange(0, V, 3)], ids=["all tokens", "a third banned"])
def test_the_same_candidates(mellowmax: bool, banned: torch.Tensor | None) -> None:
    run = attack()
    run.config.use_mellowmax = mellowmax
    ids = torch.randint(0, V, (1, T), generator=torch.Generator().manual_seed(2))
    options = {"topk": 32, "n_replace": 2, "not_allowed_ids": banned}
    theirs = sample(run, run.compute_token_gradient(ids), **options)
    with counted("nanogcg") as calls:
        gradient = run.compute_token_gradient(ids)
        ours = sample(run, gradient, **options)
    assert calls.kernels == 1
    torch.testing.assert_close(gradient.dense(), run.compute_token_gradient(ids))
    assert torch.equal(ours, theirs)
    record("nanogcg", check="numbers")


def halve(run: Any) -> None:
    run.model.half()
    for name in ("before", "after", "target"):
        setattr(run, f"{name}_embeds", getattr(run, f"{name}_embeds").half())


def new_parameter(run: Any) -> None:
    run.embedding_layer.weight = torch.nn.Parameter(torch.randn(V, 32))


def new_parameter_on_old_memory(run: Any) -> None:
    weight = run.embedding_layer.weight
    run.embedding_layer.weight = torch.nn.Parameter(weight.data)
    weight.data = torch.zeros_like(weight)
    with torch.no_grad():
        run.embedding_layer.weight.neg_()


def other_values(run: Any) -> None:
    with torch.no_grad():
        run.embedding_layer.weight.neg_()


def other_memory(run: Any) -> None:
    run.embedding_layer.weight.data = -run.embedding_layer.weight.data


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run.model.resize_token_embeddings(V + 20, mean_resizing=False),
        lambda run: run.model.resize_token_embeddings(V - 20, mean_resizing=False),
        new_parameter,
        new_parameter_on_old_memory,
        other_values,
        other_memory,
        halve,
    ],
    ids=["taller", "shorter", "new parameter", "new parameter, old memory", "in place", "other memory", "half"],
)
def test_a_changed_embedding_is_read_anew(change: Any) -> None:
    ids = torch.randint(0, V - 20, (1, T), generator=torch.Generator().manual_seed(2))

    def after_the_change(warm: bool) -> torch.Tensor:
        run = attack()
        run.target_ids = run.target_ids.clamp(max=V - 21)
        # One candidate each: of several half precision makes ties, which nanogcg orders by chance.
        options: dict[str, Any] = {"topk": 1, "not_allowed_ids": torch.arange(0, V - 20, 3)}
        if warm:
            sample(run, run.compute_token_gradient(ids), **options)
        torch.manual_seed(8)
        change(run)
        return sample(run, run.compute_token_gradient(ids), **options)

    theirs = after_the_change(warm=False)
    with counted("nanogcg") as calls:
        ours = after_the_change(warm=True)
    assert calls.kernels == 2
    assert torch.equal(ours, theirs)


def test_a_changed_list_of_banned_tokens_is_read_anew() -> None:
    run, banned = attack(), torch.arange(0, V, 3)
    ids = torch.zeros(1, T, dtype=torch.int64)
    with ccu_fast.patch.applied("nanogcg"):
        sample(run, run.compute_token_gradient(ids), topk=32, not_allowed_ids=banned)
        banned += 1
        ours = sample(run, run.compute_token_gradient(ids), topk=32, not_allowed_ids=banned)
    assert torch.equal(ours, sample(run, run.compute_token_gradient(ids), topk=32, not_allowed_ids=banned))


def test_rows_of_the_embedding_without_a_token() -> None:
    """A vocabulary padded to a round number: nanogcg bans none of the rows behind the tokenizer's, and all that it bans
    stay banned."""
    ids = torch.zeros(1, T, dtype=torch.int64)
    for banned in (torch.arange(250), torch.arange(250, V), None):
        run = attack()
        run.tokenizer.vocab_size = 250
        options = {"topk": 40, "not_allowed_ids": banned}
        theirs = sample(run, run.compute_token_gradient(ids), **options)
        with counted("nanogcg") as calls:
            ours = sample(run, run.compute_token_gradient(ids), **options)
        assert calls.kernels == 1
        assert torch.equal(ours, theirs)


def test_the_gradient_is_a_tensor_to_everybody_else() -> None:
    """Who takes it from a loop of their own reads and writes what nanogcg would give."""
    run = attack()
    ids = torch.randint(0, V, (1, T), generator=torch.Generator().manual_seed(2))
    theirs = run.compute_token_gradient(ids)
    with ccu_fast.patch.applied("nanogcg"):
        ours = run.compute_token_gradient(ids)
        assert isinstance(ours, torch.Tensor)
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        near = {"rtol": 1e-4, "atol": 1e-7}
        torch.testing.assert_close(ours / ours.norm(dim=-1, keepdim=True), theirs / theirs.norm(dim=-1, keepdim=True))
        torch.testing.assert_close(torch.from_numpy(run.compute_token_gradient(ids).numpy()), theirs, **near)
        torch.testing.assert_close(run.compute_token_gradient(ids)[0, 2].tolist(), theirs[0, 2].tolist(), **near)
        assert "TokenGradient" not in repr(torch.stack([ours, ours]))

        ours, view = run.compute_token_gradient(ids), theirs.squeeze(0)
        row = ours.squeeze(0)
        row[:, ::2] = torch.inf
        view[:, ::2] = torch.inf
        torch.testing.assert_close(ours + 0, theirs, **near)
        picked = sample(run, ours, topk=16, not_allowed_ids=None)
    assert torch.equal(picked, sample(run, theirs, topk=16, not_allowed_ids=None))
    assert bool((picked % 2 == 1).any())


def test_a_gradient_of_an_embedding_changed_in_place_is_refused() -> None:
    run = attack()
    with ccu_fast.patch.applied("nanogcg"):
        gradient = run.compute_token_gradient(torch.zeros(1, T, dtype=torch.int64))
        with torch.no_grad():
            run.embedding_layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="expected the embedding unchanged until its gradient is used"):
            sample(run, gradient, topk=8, not_allowed_ids=None)


class Scaled(torch.nn.Embedding):
    pass


def a_subclass(run: Any) -> None:
    run.embedding_layer.__class__ = Scaled


def infinite_row(run: Any) -> None:
    run.embedding_layer.weight.data[5] = torch.inf


def other_dtype(run: Any) -> None:
    run.embedding_layer.double()


def tokens_out_of_range(run: Any) -> None:
    run.first = -1


def a_softmax_that_overflows(run: Any) -> None:
    run.after_embeds = run.after_embeds * torch.inf


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (a_subclass, {}),
        (infinite_row, {}),
        (other_dtype, {}),
        (tokens_out_of_range, {}),
        (a_softmax_that_overflows, {}),
        (None, {"topk": 0}),
        (None, {"topk": V}),
        (None, {"topk": V + 1}),
        (None, {"not_allowed_ids": False}),
        (None, {"not_allowed_ids": torch.tensor([])}),
        (None, {"not_allowed_ids": torch.arange(V)}),
        (None, {"not_allowed_ids": torch.tensor([V])}),
    ],
)
def test_what_only_nanogcg_has_stays_with_it(change: Any, options: dict[str, Any]) -> None:
    """With the same tokens or the same error."""

    def outcome() -> Any:
        run = attack()
        if change is not None:
            change(run)
        ids = torch.full((1, T), getattr(run, "first", 3))
        try:
            gradient = run.compute_token_gradient(ids)
            return sample(run, gradient, **{"topk": 16, "not_allowed_ids": torch.arange(0, V, 2), **options}).tolist()
        except Exception:
            return "an error"

    theirs = outcome()
    with ccu_fast.patch.applied("nanogcg"):
        assert outcome() == theirs


@pytest.mark.parametrize("cache", [False, True])
def test_a_whole_run_finds_the_same_string(cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gcg = library("nanogcg.gcg")

    class Tokenizer(SimpleNamespace):
        """A character is a token."""

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return str(messages[0]["content"])

        def __call__(self, text: Any, **_: Any) -> Any:
            rows = [text] if isinstance(text, str) else text
            return {"input_ids": torch.tensor([[1 + ord(c) % (V - 1) for c in row] for row in rows])}

        def batch_decode(self, ids: torch.Tensor) -> list[str]:
            return ["".join(map(chr, row)) for row in ids.tolist()]

    def found() -> Any:
        run = attack()
        run.tokenizer = Tokenizer(bos_token=None, vocab_size=V)
        run.config = gcg.GCGConfig(
            num_steps=3,
            optim_str_init="xxxx",
            search_width=8,
            topk=8,
            use_prefix_cache=cache,
            filter_ids=False,
            allow_non_ascii=True,
            seed=4,
        )
        deterministic = torch.are_deterministic_algorithms_enabled()
        try:
            result = run.run("ask {optim_str} now", "yes")
        except Exception as error:  # of a version of transformers whose cache nanogcg does not know
            return repr(error)
        finally:
            torch.use_deterministic_algorithms(deterministic)
        return result.strings, result.losses

    theirs = found()
    with ccu_fast.patch.applied("nanogcg"):
        assert found() == theirs
    assert cache or not isinstance(theirs, str), theirs


def test_a_gradient_of_one_hots_is_sampled_by_the_library() -> None:
    run = attack()
    gradient = run.compute_token_gradient(torch.zeros(1, T, dtype=torch.int64))
    options = {"topk": 8, "not_allowed_ids": None}
    theirs = sample(run, gradient.clone(), **options)
    with ccu_fast.patch.applied("nanogcg"):
        assert torch.equal(sample(run, gradient.clone(), **options), theirs)


def test_a_hundred_steps_are_the_same() -> None:
    """The loss of the best candidate after each step: the same tokens throughout."""

    def steps() -> list[float]:
        gcg = library("nanogcg.gcg")
        run = attack()
        ids = torch.zeros(1, T, dtype=torch.int64)
        torch.manual_seed(7)
        losses = []
        for _ in range(100):
            gradient = run.compute_token_gradient(ids)
            with torch.no_grad():
                tried = gcg.sample_ids_from_grad(ids[0], gradient.squeeze(0), 16, topk=16, not_allowed_ids=None)
                inputs = [run.before_embeds, run.after_embeds, run.target_embeds]
                before, after, target = (e.expand(len(tried), -1, -1) for e in inputs)
                embeds = torch.cat([before, run.model.get_input_embeddings()(tried), after, target], 1)
                logits = run.model(inputs_embeds=embeds).logits[:, -6:-1]
                target_ids = run.target_ids.expand(len(tried), -1)
                loss = F.cross_entropy(logits.transpose(1, 2), target_ids, reduction="none").mean(1)
                ids = tried[loss.argmin()][None]
                losses.append(float(loss.min()))
        return losses

    before = steps()
    with counted("nanogcg") as calls:
        ours = steps()
    assert calls.kernels == 100
    assert ours == before == steps()
    record("nanogcg", check="training", difference=0.0)


def test_speed() -> None:
    run = attack(vocabulary=50257)
    ids = torch.zeros(1, 20, dtype=torch.int64)

    def step() -> None:
        gradient = run.compute_token_gradient(ids)
        library("nanogcg.gcg").sample_ids_from_grad(ids[0], gradient.squeeze(0), 512, not_allowed_ids=None)

    speed("nanogcg", "gradient and 512 candidates, V = 50257, D = 32, 20 tokens, topk 256", step)
