"""TextAttack's gradient word swap, patched.

TextAttack imports a dozen libraries for recipes that are not used here, and a word list that is downloaded; empty
modules and an empty list stand in for those that are missing. The classes under test are TextAttack's own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ccu_fast
from tests.support import torchvision_stub
from tests.support.drop_in import counted, library, record, require, speed

UNUSED = (
    "flair",
    "flair.data",
    "flair.models",
    "pinyin",
    "jieba",
    "OpenHowNet",
    "bert_score",
    "langdetect",
    "Levenshtein",
    "language_tool_python",
    "datasets",
    "pycld2",
    "tensorflow_hub",
    "stanza",
)
TEXT = "the quick brown fox jumps over the lazy dog today"


@pytest.fixture(scope="module")
def textattack() -> Any:
    require("textattack")
    torchvision_stub.stand_in(*UNUSED)
    library("nltk.corpus").stopwords = SimpleNamespace(words=lambda *_: [])
    return library("textattack")


class Tokenizer:
    """Words are ids; every fifth id is no word, as punctuation is."""

    pad_token_id, unk_token_id = 0, 1

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [[2 + sum(word.encode()) % (self.vocabulary - 2) for word in text.split()] for text in texts]

    def convert_id_to_word(self, token: int) -> str:
        letters = "".join(chr(97 + int(digit)) for digit in str(token))
        return "..." if token % 5 == 0 else f"w{letters}"


def swap(textattack: Any, vocabulary: int = 2000, width: int = 24, top_n: int = 3) -> Any:
    helpers = textattack.models.helpers

    class Classifier(helpers.LSTMForClassification):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.embedding = nn.Embedding(vocabulary, width)
            self.lstm, self.head = nn.LSTM(width, 16, batch_first=True), nn.Linear(16, 2)

        def get_input_embeddings(self) -> nn.Embedding:
            return self.embedding

        def forward(self, ids: Tensor) -> Tensor:
            value: Tensor = self.head(self.lstm(self.embedding(ids))[0].mean(1))
            return value

    torch.manual_seed(0)
    wrapper = textattack.models.wrappers.PyTorchModelWrapper(Classifier(), Tokenizer(vocabulary))
    return textattack.transformations.WordSwapGradientBased(wrapper, top_n=top_n)


@pytest.mark.parametrize("top_n", [1, 25])
@pytest.mark.parametrize("indices", [[0, 3, 7], [4], list(range(10))])
def test_the_same_words(textattack: Any, indices: list[int], top_n: int) -> None:
    transformation = swap(textattack, top_n=top_n)
    text = textattack.shared.AttackedText(TEXT)
    theirs = transformation._get_replacement_words_by_grad(text, indices)
    assert len(theirs) == top_n
    with counted("textattack") as calls:
        ours = transformation._get_replacement_words_by_grad(text, indices)
    assert calls.kernels >= 1
    assert ours == theirs
    record("textattack", check="numbers")


def test_a_hundred_swaps_are_the_same(textattack: Any) -> None:
    """A text changed word by word, with the best swap each time: the same words throughout."""

    def words() -> list[str]:
        transformation = swap(textattack, top_n=1)
        text, seen = textattack.shared.AttackedText(TEXT), []
        for step in range(100):
            ((word, index),) = transformation._get_replacement_words_by_grad(text, [step % 10, (step + 3) % 10])
            text = text.replace_word_at_index(index, word)
            seen.append(text.text)
        return seen

    before = words()
    with ccu_fast.patch.applied("textattack"):
        ours = words()
    assert ours == before == words()
    record("textattack", check="training", difference=0.0)


def spoil_embedding(transformation: Any) -> None:
    transformation.model.embedding.weight.data[7] = torch.inf


def pad_is_nothing(transformation: Any) -> None:
    transformation.tokenizer.pad_token_id = None


def pad_is_a_word(transformation: Any) -> None:
    transformation.tokenizer.pad_token_id = 1


def ids_as_a_matrix(transformation: Any) -> None:
    """As of HuggingFaceModelWrapper."""
    get_grad = transformation.model_wrapper.get_grad
    transformation.model_wrapper.get_grad = lambda text: {**(g := get_grad(text)), "ids": torch.tensor([g["ids"]])}


def embedding_in_double(transformation: Any) -> None:
    get_grad = transformation.model_wrapper.get_grad
    transformation.model_wrapper.get_grad = lambda text: {
        **(g := get_grad(text)),
        "gradient": g["gradient"].astype("d"),
    }


def spoil_gradient(transformation: Any) -> None:
    get_grad = transformation.model_wrapper.get_grad
    transformation.model_wrapper.get_grad = lambda text: {
        **(g := get_grad(text)),
        "gradient": g["gradient"] + torch.inf,
    }


@pytest.mark.parametrize(
    "change",
    [spoil_embedding, spoil_gradient, pad_is_nothing, ids_as_a_matrix, embedding_in_double],
    ids=lambda change: str(change.__name__),
)
def test_what_only_textattack_has_stays_with_it(textattack: Any, change: Any) -> None:
    """With the same words or the same error, and from one gradient: under dropout another would be different."""

    def outcome() -> Any:
        transformation = swap(textattack)
        change(transformation)
        get_grad, asked = transformation.model_wrapper.get_grad, []
        transformation.model_wrapper.get_grad = lambda text: (asked.append(text), get_grad(text))[1]
        try:
            words = transformation._get_replacement_words_by_grad(textattack.shared.AttackedText(TEXT), [2, 5])
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
        return words, len(asked)

    theirs = outcome()
    with counted("textattack") as calls:
        ours = outcome()
    assert ours == theirs
    assert calls.kernels == 0


def test_more_words_than_there_are_ends_with_the_pad_token_as_in_textattack(textattack: Any) -> None:
    def words() -> Any:
        transformation = swap(textattack, vocabulary=12, top_n=40)
        pad_is_a_word(transformation)
        return transformation._get_replacement_words_by_grad(textattack.shared.AttackedText(TEXT), [2, 5])

    theirs = words()
    with ccu_fast.patch.applied("textattack"):
        ours = words()
    assert ours == theirs
    assert ("wb", 2) in ours[-2:], "the pad token is the last word"


def test_rows_of_the_embedding_without_a_token(textattack: Any) -> None:
    """An embedding taller than the vocabulary: the tokenizer is asked for what TextAttack asks it for."""

    def words(vocabulary: int) -> Any:
        transformation = swap(textattack)
        word_of = transformation.tokenizer.convert_id_to_word
        transformation.tokenizer.convert_id_to_word = lambda i: word_of(i) if i < vocabulary else "[unused0]"
        return transformation._get_replacement_words_by_grad(textattack.shared.AttackedText(TEXT), [2, 5])

    for vocabulary in (2000, 1000, 3):
        theirs = words(vocabulary)
        with ccu_fast.patch.applied("textattack"):
            assert words(vocabulary) == theirs


def test_a_changed_embedding_is_read_anew(textattack: Any) -> None:
    transformation = swap(textattack)
    text = textattack.shared.AttackedText(TEXT)
    for change in (
        lambda: transformation.model.embedding.weight.data.mul_(-1),
        lambda: setattr(transformation.model.embedding, "weight", nn.Parameter(torch.randn(2000, 24))),
        lambda: setattr(transformation.model, "embedding", nn.Embedding(2100, 24)),
    ):
        with ccu_fast.patch.applied("textattack"):
            transformation._get_replacement_words_by_grad(text, [1])
            change()
            ours = transformation._get_replacement_words_by_grad(text, [1])
        assert ours == transformation._get_replacement_words_by_grad(text, [1])


def test_no_words_to_replace(textattack: Any) -> None:
    with ccu_fast.patch.applied("textattack"):
        assert swap(textattack)._get_replacement_words_by_grad(textattack.shared.AttackedText(TEXT), []) == []


def test_speed(textattack: Any) -> None:
    transformation = swap(textattack, vocabulary=400_000, width=200, top_n=1)
    text = textattack.shared.AttackedText(TEXT)
    speed(
        "textattack",
        "replacement words, V = 400,000 (GloVe's), D = 200, 10 words",
        lambda: transformation._get_replacement_words_by_grad(text, list(range(10))),
        rounds=3,
    )
