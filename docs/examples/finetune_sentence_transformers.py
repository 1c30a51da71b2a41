"""Fine-tune a sentence-transformers model with its trainer, with the fused loss and without, and compare.

For      whoever trains embedding models with sentence-transformers and wants its ranking losses without a score matrix.
Install  pip install . 'sentence-transformers[train]>=6'       in a checkout of ccu_fast
Run      python finetune_sentence_transformers.py              (about 10 CPU seconds on two cores)
         python finetune_sentence_transformers.py --model FOLDER   (a model of your own, saved by sentence-transformers)
Prints   the losses of two equal runs, one with the patch and one without, which agree to rounding, and how often the
         model finds the documentation of a function that it has not been trained on, before and after.

Nothing is downloaded: the pairs are names of Python's functions and their docstrings, the model is made here, a vector
for each word.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import tempfile
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

import ccu_fast

MODULES = """
    argparse asyncio bisect calendar codecs collections concurrent.futures configparser contextlib csv datetime
    decimal difflib email.message enum fractions functools glob gzip hashlib heapq html http.client http.cookiejar
    imaplib inspect ipaddress itertools json linecache locale logging mailbox math mimetypes multiprocessing
    operator os os.path pathlib pdb pickle pickletools pkgutil platform pprint profile queue random re sched
    selectors shlex shutil signal smtplib socket socketserver sqlite3 ssl statistics string struct subprocess
    tarfile tempfile textwrap threading time timeit tokenize traceback types unittest unittest.mock
    urllib.parse urllib.request uuid warnings weakref xml.dom.minidom xml.etree.ElementTree zipfile zoneinfo
"""


def documented_functions() -> list[tuple[str, str]]:
    """Pairs of a name ("statistics.median low") and the first paragraph of its documentation, each only once."""
    found: dict[str, str] = {}
    for module_name in MODULES.split():
        module = importlib.import_module(module_name)
        for owner_name, owner in ((module_name, module), *inspect.getmembers(module, inspect.isclass)):
            for name, item in inspect.getmembers(owner, inspect.isroutine):
                text = (inspect.getdoc(item) or "").split("\n\n")[0]
                if not name.startswith("_") and len(text) > 30:
                    found.setdefault(text, f"{owner_name} {name.replace('_', ' ')}")
    return [(name, text) for text, name in found.items()]


def word_model(texts: list[str], width: int = 128) -> SentenceTransformer:
    """A vector for each word, and their mean: untrained."""
    normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z]+"), " ")])
    words = {word for text in texts for word in re.findall("[a-z]+", text.lower())}
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["[UNK]", *sorted(words)])}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=width)], device="cpu")


def recall(model: SentenceTransformer, pairs: list[tuple[str, str]], k: int = 10) -> float:
    """How often the text of a name is among the k nearest of all."""
    names, texts = (model.encode(side, convert_to_tensor=True) for side in zip(*pairs, strict=True))
    nearest = model.similarity(names, texts).topk(k, dim=1).indices
    return (nearest == torch.arange(len(pairs), device=nearest.device)[:, None]).any(1).float().mean().item()


def loss_both_ways(model: SentenceTransformer, pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """The loss of one batch, computed by the library and with the patch."""
    columns = [model.preprocess(list(side)) for side in zip(*pairs, strict=True)]
    loss = MultipleNegativesRankingLoss(model)
    with torch.no_grad():
        theirs = loss(columns, None).item()
        with ccu_fast.patch.applied("sentence_transformers"):
            ours = loss(columns, None).item()
    return theirs, ours


def fine_tune(model: SentenceTransformer, pairs: list[tuple[str, str]], args: argparse.Namespace) -> list[float]:
    """The library's own trainer; returns the loss of each step."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from transformers import PrinterCallback

    names, texts = (list(side) for side in zip(*pairs, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=args.batch,
                dataloader_drop_last=True,
                learning_rate=args.lr,
                seed=args.seed,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_dict({"anchor": names, "positive": texts}),
            loss=MultipleNegativesRankingLoss(model),
        )
        trainer.remove_callback(PrinterCallback)  # a line for each step
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Fine-tune with sentence-transformers, patched and not.")
    parser.add_argument("--model", help="a model's folder; by default one is made")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-2, help="of a vector for each word; 2e-5 for a transformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a run of seconds, for tests")
    args = parser.parse_args(argv)
    pairs = documented_functions()
    if args.small:
        pairs, args.epochs, args.batch = pairs[::4], 2, 64
    held_out, kept = pairs[::5], [pair for n, pair in enumerate(pairs) if n % 5]
    print(f"{len(kept)} functions to learn from, {len(held_out)} held out")

    def model() -> SentenceTransformer:
        torch.manual_seed(args.seed)
        return SentenceTransformer(args.model) if args.model else word_model([" ".join(pair) for pair in pairs])

    theirs, ours = loss_both_ways(model(), kept[: args.batch])
    print(f"loss of one batch: {theirs:.6f} by the library, {ours:.6f} with the patch")
    before = recall(model(), held_out)
    plain = fine_tune(model(), kept, args)

    ccu_fast.patch.apply("sentence_transformers")  # this line is all; patch.revert undoes it
    tuned = model()
    patched = fine_tune(tuned, kept, args)
    ccu_fast.patch.revert("sentence_transformers")

    after = recall(tuned, held_out)
    apart = max(abs(a - b) for a, b in zip(plain, patched, strict=True))
    print(f"loss {plain[0]:.4f} → {plain[-1]:.4f} without the patch, {patched[0]:.4f} → {patched[-1]:.4f} with it")
    print(f"largest difference in {len(plain)} steps: {apart:.1e}")
    print(f"documentation found among the first ten: {before:.1%} before, {after:.1%} after")
    return {"plain": plain, "patched": patched, "before": before, "after": after}


if __name__ == "__main__":
    main()
