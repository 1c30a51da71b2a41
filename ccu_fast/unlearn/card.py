"""The model card of one run: what was done to the model, for whoever gets it. It names no class, item or file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ccu_fast.unlearn.audit.text_questions import TITLES, heading

HEAD = "# A model that was made to forget"
HOW_TO_READ = (
    "Forget is what was to be forgotten, retain the rest of the training data; unseen and test are items that the "
    "model was not trained on. A membership AUC of 0.5 tells nothing of who was trained on. Not measured here: what a "
    "probe still finds below the heads, and how soon training brings it back; the comparison of methods (--compare) "
    "does that."
)
LOADING = {
    "open_clip": 'import open_clip\nmodel = open_clip.create_model("{rest}", pretrained=None)',
    "hf": 'import transformers\nmodel = transformers.CLIPModel.from_pretrained("{rest}")',
    "": "from {kind} import {rest}\nmodel = {rest}()",
}


def card(result: Mapping[str, Any]) -> str:
    """Markdown for what :func:`ccu_fast.unlearn.job.run_job` found.

    Args:
        result: with "alarm", "verdict", "cost", "rows" and "provenance".

    Returns:
        The text: counts and hashes of the sets, settings, alarm and verdict, figures before and after, versions, how to
        load the weights. Neither the names of forgotten classes nor ids or files are in it.
    """
    made, alarm = result["provenance"], result["alarm"]
    config, kind = dict(made["config"]), made["config"]["forget"]
    budget = config.pop("budget")
    kind_of_model, _, rest = made["model"].partition(":")
    if kind_of_model == "hf":
        rest = PurePath(rest).name  # where it lies says nothing to others
    classes = len(made["forgotten_classes"])
    what = f"{classes} class{'es' * (classes != 1)}" if kind == "class" else kind
    parts = [
        HEAD,
        f"**{alarm['text']}**" if alarm else "",
        f"Verdict, without a retrained model to compare with: {result['verdict']['kind']} – "
        f"{result['verdict']['text']}.",
        f"The visual knowledge of {what} was taken out of `{kind_of_model}:{rest}` by {made['method']}, in "
        f"{result['cost']['steps']} of {budget['steps']} steps.",
        "## Data",
        _table(
            ("set", "items", "sha256"),
            [
                (name, made[f"{name}_items"] or "–", made[f"{name}_sha256"] or "–")
                for name in ("forget", "retain", "unseen", "test")
            ],
        ),
        "## Figures",
        _table(("", "before", "after"), [(name, f"{old:.4g}", f"{new:.4g}") for name, old, new in result["rows"]]),
        HOW_TO_READ,
        *_by_text(result.get("text_membership")),
        "## Settings",
        _table(
            ("setting", "value"),
            [*config.items(), *budget.items(), ("dtype", made["dtype"]), ("processes", made["processes"])],
        ),
        "## Versions",
        _table(("", ""), list(made["versions"].items())),
        "## Loading",
        f"```python\n{loading(f'{kind_of_model}:{rest}')}\n```",
        f"sha256 of the weights: {made['weights_sha256']}; of the original's: {made['original_sha256']}. "
        '`ccu_fast.runs.provenance.load_model("model.safetensors")` reads the weights, compares them with theirs and '
        "returns what made them.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def loading(model: str, weights: str = "model.safetensors") -> str:
    """Python that loads the weights of a run.

    Args:
        model: as the settings name it: "open_clip:NAME", "hf:FOLDER" or "module:function".
        weights: the file.
    """
    kind, _, rest = model.partition(":")
    make = LOADING.get(kind, LOADING[""]).format(kind=kind, rest=rest)
    return f"{make}\nfrom safetensors.torch import load_file\nmodel.load_state_dict(load_file({json.dumps(weights)}))"


def _by_text(found: Mapping[str, Any] | None) -> list[str]:
    """What text alone tells of the model; nothing where it was not asked."""
    if found is None:
        return []
    rows = [
        (title, *("–" if found[when][name] is None else f"{found[when][name]:.4g}" for when in ("before", "after")))
        for name, title in TITLES.items()
    ]
    return [f"{heading(found)}. {found['text']}", _table(("", "before", "after"), rows)]


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
