"""Search the tokens in front of a sentence that make a language model say it, by gradients (GCG).

For      whoever optimises tokens: triggers, prompts, probes of what a model can be made to say.
Install  pip install .                                         (nothing else; the language model is made here)
Run      python search_tokens.py                               (about 15 CPU seconds on two cores)
Prints   the loss of the sentence as the search goes on, which falls, and the tokens found. The same seed finds the same
         tokens again: `topk_flips` is exact, with any number of threads.

The text is Python's own manual, as every Python brings it. With nanogcg, the search is there already:
`ccu_fast.patch.apply("nanogcg")` makes it use the same kernels.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast import TokenTable, topk_flips

SENTENCE = "the value of the expression is an integer"
CONTEXT = 32


class LanguageModel(nn.Module):
    """A causal transformer of one layer over words."""

    def __init__(self, words: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        nn.init.normal_(self.embedding.weight, std=0.1)  # also the last layer
        self.place = nn.Parameter(0.1 * torch.randn(CONTEXT, width))
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, embedded: Tensor) -> Tensor:
        """Embeddings of tokens ``[B, L, width]`` → logits of the next ones ``[B, L, words]``."""
        length = embedded.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=embedded.device)
        read = self.layer(embedded + self.place[:length], src_mask=mask, is_causal=True)
        return self.norm(read) @ self.embedding.weight.T


def train(model: LanguageModel, ids: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(ids) - CONTEXT, (32, 1))
        rows = ids[starts + torch.arange(CONTEXT)]
        logits = model(model.embedding(rows[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"language model: {len(model.embedding.weight)} words, loss {loss.item():.2f}")


def loss_of(model: LanguageModel, embedded: Tensor, target: Tensor) -> Tensor:
    """Of the target behind each row of ``embedded`` ``[B, n, width]``: ``[B]``."""
    rows = torch.cat([embedded, model.embedding(target).expand(len(embedded), -1, -1)], dim=1)
    logits = model(rows)[:, embedded.shape[1] - 1 : -1]
    every = F.cross_entropy(logits.flatten(0, 1), target.repeat(len(rows)), reduction="none")
    return every.view(len(rows), -1).mean(1)


def search(model: LanguageModel, tokens: Tensor, target: Tensor, allowed: Tensor, args: argparse.Namespace) -> Tensor:
    """Greedy coordinate gradient (arXiv 2307.15043): change one token a round, the best of many tries."""
    table = TokenTable(model.embedding.weight.detach(), allowed)  # once; it is scored anew in every round
    generator = torch.Generator().manual_seed(args.seed)
    for number in range(args.rounds + 1):
        embedded = model.embedding(tokens).detach().requires_grad_()
        loss = loss_of(model, embedded[None], target).squeeze(0)
        if number % args.every == 0 or number == args.rounds:
            print(f"round {number:3}  loss {loss.item():.3f}")
        if number == args.rounds:
            return tokens

        # Before, with a matrix of tokens × vocabulary:
        #     scores = grad @ model.embedding.weight.T;  scores[:, forbidden] = inf
        #     ids = scores.topk(k, largest=False).indices
        # After: the same ids, exactly, and no matrix.
        (grad,) = torch.autograd.grad(loss, embedded)
        flips = topk_flips(grad, table, args.topk, current_ids=tokens, exclude_current=True)

        places = torch.randint(len(tokens), (args.tries,), generator=generator)
        choices = torch.randint(args.topk, (args.tries,), generator=generator)
        tried = tokens.repeat(args.tries, 1)
        tried[torch.arange(args.tries), places] = flips.ids[places, choices]
        tried = torch.cat([tokens[None], tried])  # to stay is a try, too
        with torch.no_grad():
            losses = torch.cat([loss_of(model, model.embedding(part), target) for part in tried.split(128)])
        tokens = tried[losses.argmin()]


def main(argv: list[str] | None = None) -> tuple[list[str], float, float]:
    parser = argparse.ArgumentParser(description="Search the tokens that make a language model say a sentence.")
    parser.add_argument("--sentence", default=SENTENCE, help="of words that Python's manual has")
    parser.add_argument("--tokens", type=int, default=12, help="how many are searched in front of it")
    parser.add_argument("--words", type=int, default=1000, help="vocabulary of the language model")
    parser.add_argument("--steps", type=int, default=600, help="of its training")
    parser.add_argument("--rounds", type=int, default=40, help="of the search")
    parser.add_argument("--topk", type=int, default=32, help="replacements for each token")
    parser.add_argument("--tries", type=int, default=256, help="candidates in a round")
    parser.add_argument("--every", type=int, default=10, help="rounds between two lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a run of seconds, for tests")
    args = parser.parse_args(argv)
    if args.small:
        args.words, args.steps, args.rounds, args.tries = 500, 60, 10, 48

    torch.manual_seed(args.seed)
    text = re.findall(r"[a-z]+", " ".join(topics.values()).lower())
    vocabulary = ["?", *(word for word, _ in Counter(text).most_common(args.words - 1))]
    number = {word: n for n, word in enumerate(vocabulary)}
    unknown = [word for word in args.sentence.split() if word not in number]
    if unknown:
        parser.error(f"--sentence: expected words that the model has (more with --words), got {', '.join(unknown)}")
    target = torch.tensor([number[word] for word in args.sentence.split()])

    model = LanguageModel(len(vocabulary))
    train(model, torch.tensor([number.get(word, 0) for word in text]), args.steps)
    model.requires_grad_(False)

    allowed = torch.ones(len(vocabulary), dtype=torch.bool)
    allowed[0] = False
    allowed[target] = False  # the sentence's own words would be too easy
    start = torch.randint(1, len(vocabulary), (args.tokens,))
    found = search(model, start, target, allowed, args)
    with torch.no_grad():
        before, after = (loss_of(model, model.embedding(ids)[None], target).item() for ids in (start, found))
    words = [vocabulary[n] for n in found.tolist()]
    print(f"{' '.join(words)} → {args.sentence}")
    print(f"loss of the sentence: {before:.2f} behind random words, {after:.2f} behind these")
    return words, before, after


if __name__ == "__main__":
    main()
