"""Take the pictures of some people out of a trained model, audit it, and hand it on with a card.

For      whoever has trained a model on pairs of pictures and texts and must remove what it knows of some people's
         pictures, while it keeps the texts and everybody else.
Install  pip install '.[apps]' in a checkout of ccu_fast
Run      python unlearn_people.py                              (about 10 CPU seconds on two cores)
         ccu-fast unlearn settings.toml --out clean            (the same from the files that it has written)
Writes   pairs.npz, unseen.npz, test.npz, trained.pt, settings.toml, all in the form that your own would have; the
         command then writes clean/ with model.safetensors, card.md and report.html.
Prints   the accuracies before and after: the pictures of those who left are recognised no more, all else is as before.
         The verdict says so in a sentence; an alarm, where there is one, says what to try.

A person here is a name, a trade and a number of four digits on a badge. Each picture has the number in other real
handwriting (scikit-learn's digits), each text names another place. The two who leave are Dora and Hugo.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ccu_fast
from ccu_fast.models.fusion import TwoTowerClassifier, conv_tower, mlp_tower
from ccu_fast.unlearn import PairedData, UnlearnConfig, audit
from ccu_fast.unlearn.alarms import alarm_of
from ccu_fast.unlearn.audit import verdict_without_gold
from ccu_fast.unlearn.model import loss_on

NAMES = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Finn", "Gus", "Hugo", "Ida", "Jan", "Kim", "Lea")
TRADES = ("baker", "carpenter", "doctor", "farmer")
PLACES = ("bridge", "church", "garden", "harbour", "market", "school", "station", "tower")
WORDS = (*NAMES, *TRADES, *PLACES)
LEAVE = ("Dora", "Hugo")

SETTINGS = """\
[model]
make = "unlearn_people:make_model"      # a function of yours that makes the model
weights = "trained.pt"
[data]
path = "pairs.npz"                      # what the model was trained on
unseen = "unseen.npz"                   # pairs that it was not trained on
test = "test.npz"                       # others, which judge the result
[forget]
classes = ["Dora", "Hugo"]
"""


def make_model() -> nn.Module:
    """A tower for pictures, a tower for bags of words, one space, a head for each and for both."""
    return TwoTowerClassifier(conv_tower((8, 32), hidden=64), mlp_tower(len(WORDS), 64), 64, classes=len(NAMES))


def badges(rng: np.random.Generator, digits: np.ndarray, labels: np.ndarray, photos: int) -> dict[str, np.ndarray]:
    """Pairs of each person: ``visual`` [N, 1, 8, 32], ``other`` [N, words] and ``labels``, the names."""
    numbers = np.random.default_rng(0).integers(0, 10, (len(NAMES), 4))  # on the badges, always the same
    visual, other, people = [], [], []
    for person, name in enumerate(NAMES):
        for _ in range(photos):
            strip = [digits[rng.choice(np.flatnonzero(labels == digit))] for digit in numbers[person]]
            text = (name, TRADES[person % len(TRADES)], rng.choice(PLACES))
            visual.append(np.concatenate(strip, axis=1)[None])
            other.append([word in text for word in WORDS])
            people.append(name)
    return {"visual": np.float32(visual), "other": np.float32(other), "labels": np.array(people)}


def write_data(photos: int) -> None:
    """Handwriting of the test pairs is in no other set."""
    data = load_digits()
    digits, labels = data.images / 16, data.target
    for seed, (name, part) in enumerate({"pairs": 0, "unseen": 1, "test": 2}.items()):
        own = np.arange(len(labels)) % 5 // 2 == part  # 40 %, 40 % and 20 % of the handwriting
        np.savez(f"{name}.npz", **badges(np.random.default_rng(seed), digits[own], labels[own], photos))


def read(path: str) -> PairedData:
    file = np.load(path)
    labels = torch.tensor([NAMES.index(name) for name in file["labels"]])
    return PairedData(torch.from_numpy(file["visual"]), torch.from_numpy(file["other"]), labels)


def train(model: nn.Module, pairs: PairedData, epochs: int) -> nn.Module:
    """Any training would do; this one has cross-entropy at the heads and InfoNCE between the towers."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(pairs)).split(128):
            optimizer.zero_grad()
            loss_on(model, pairs[rows]).backward()
            optimizer.step()
    return model.eval()


def forget_people(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    write_data(args.photos)
    pairs, test = read("pairs.npz"), read("test.npz")
    model = train(make_model(), pairs, args.epochs)
    torch.save(model.state_dict(), "trained.pt")
    Path("settings.toml").write_text(SETTINGS)

    def leaves(data: PairedData) -> Tensor:
        return torch.isin(data.labels, torch.tensor([NAMES.index(name) for name in LEAVE]))

    forget, retain = pairs[leaves(pairs)], pairs[~leaves(pairs)]
    clean = ccu_fast.unlearn(model, forget, retain, UnlearnConfig(forget="class"))

    sets = {
        "forget": forget,
        "retain": retain,
        "forget_test": test[leaves(test)],
        "retain_test": test[~leaves(test)],
    }
    before, after = audit(model, **sets), audit(clean, **sets)
    print(
        f"{len(forget)} pairs of {', '.join(LEAVE)} forgotten, {len(retain)} of {len(NAMES) - len(LEAVE)} others kept"
    )
    print(f"{'accuracy':<40} before  after")
    for head, what in (("visual", "picture"), ("other", "text"), ("fused", "both")):
        for part, whose in (("forget_test", "who left"), ("retain_test", "who stay")):
            title = f"by {what}, new pairs of those {whose}"
            print(f"{title:<40} {before[head][part]:6.3f} {after[head][part]:6.3f}")
    print(f"{'attack: trained on? (0.5: no idea)':<40} {before['mia_auc']:6.3f} {after['mia_auc']:6.3f}")

    sizes = {name if "_" in name else f"{name}_train": len(part) for name, part in sets.items()}  # what chance may do
    verdict = verdict_without_gold(after, before, sizes=sizes)
    alarm = alarm_of(verdict)
    print(f"verdict: {verdict.kind} – {verdict.text}")
    print(alarm["text"] if alarm else "no alarm")
    print("next: ccu-fast unlearn settings.toml --out clean    writes the model, its card and a report")
    return {"model": clean, "before": before, "after": after, "verdict": verdict, "alarm": alarm}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Take the pictures of some people out of a trained model.")
    parser.add_argument("--photos", type=int, default=80, help="pairs of each person")
    parser.add_argument("--epochs", type=int, default=15, help="of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a run of seconds, for tests")
    args = parser.parse_args(argv)
    if args.small:
        args.photos, args.epochs = 40, 12
    return forget_people(args)


if __name__ == "__main__":
    main()
