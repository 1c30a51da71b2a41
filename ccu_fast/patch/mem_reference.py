"""The MEM authors' code (Liu et al. 2024): its loss, its token scoring, its candidate search and its noise steps.

That code is not a package and copies its functions from file to file, so they are found by name and signature in every
module that has been imported. The same decisions come out; what goes is the work: the vocabulary's scores on the host,
the image tower and a host synchronisation for every candidate, and weight gradients in the noise steps.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ccu_fast.losses.functional import info_nce
from ccu_fast.ops.topk_flips.api import TokenTable, topk_flips
from ccu_fast.patch.site import (
    Site,
    are_pairs,
    are_plain,
    below_patches,
    cross_entropy_dtype,
    is_one_number,
    is_stock,
    torch_is_stock,
)

# The names that the code of the authors' functions must use, and those that it may use. A copy that uses others, or a
# wrapper, is somebody else's: it is left alone.
NAMES = {
    "get_loss": (
        "arange exp image_embeds logit_scale t text_embeds",
        "all_gather cat clip_weight constraint_weight device diagonal dist distributed inmodal inmodal_weight len long "
        "mean nonzero num_devices range rank shape square squeeze tensor to torch unlearn unlearn_target zeros_like",
    ),
    "hotflip_attack": ("cpu max numpy topk transpose", "detach matmul torch"),
    "get_best_candidates": ("get_loss_per_candidate heapq itemgetter nlargest nsmallest range", "max"),
    "get_loss_per_candidate": (
        "LongTensor append cpu deepcopy get_loss no_grad range shape",
        "detach device numpy to torch",
    ),
}


def sites() -> list[Site]:
    """What is replaced: whatever has been imported.

    Raises:
        ModuleNotFoundError: none of the functions is in any imported module.
    """
    found = []
    for module in _modules():
        for replacement in (get_loss, hotflip_attack, get_best_candidates):
            if _serves(replacement, vars(module).get(replacement.__name__)):
                found.append(_site(module, replacement))
        tool = vars(module).get("PerturbationTool")
        attack = getattr(tool, "min_min_attack", None)
        if inspect.isclass(tool) and tool.__module__ == module.__name__ and _is_published(attack):
            found.append(_site(tool, min_min_attack))
    if not found:
        raise ModuleNotFoundError(
            "mem_reference: expected the authors' modules (src.utils, src.attacks, src.poison_train) to be imported "
            "before they are patched, found none of their functions",
            name="mem_reference",
        )
    return found


def get_loss(
    original: Any, umodel: Any, outputs: Any, criterion: Any, options: Any, gather_backdoor_indices: Any
) -> Any:
    """``(loss, loss, 0)`` with the loss ``info_nce(image, text, scale=exp(logit_scale))``."""
    image, text = outputs.image_embeds, outputs.text_embeds
    if not _plain(criterion, options) or not are_pairs(image, text) or not is_one_number(umodel.logit_scale, image):
        return NotImplemented
    loss = info_nce(image, text, scale=umodel.logit_scale.exp()).to(cross_entropy_dtype(image))
    return loss, loss, torch.zeros((), dtype=torch.int64, device=loss.device)


def hotflip_attack(
    original: Any,
    averaged_grad: Tensor,
    embedding_matrix: Tensor,
    increase_loss: bool = False,
    num_candidates: int = 1,
    num_trigger_tokens: int = 1,
    no_zero_index: Any = None,
) -> Any:
    """The ``num_candidates`` best tokens at positions 1..n, scored where the embedding matrix is: a numpy array.

    ``[B, n, k]``; for k = 1 ``[n]``, those of the first row, as the authors' function has it.
    """
    usual = are_plain(averaged_grad, embedding_matrix) and isinstance(num_candidates, int)
    if not usual or not 1 <= num_candidates <= len(embedding_matrix):
        return NotImplemented
    grad = averaged_grad.detach()[:, 1 : 1 + num_trigger_tokens].to(embedding_matrix.device)
    # Not kept between calls: changes through .data, which that code makes, are not counted by torch.
    table = TokenTable(embedding_matrix.detach())
    ids = topk_flips(grad, table, num_candidates, maximize=increase_loss).ids
    return (ids if num_candidates > 1 else ids[0, :, 0]).cpu().numpy()


@torch.no_grad()
def get_best_candidates(
    original: Any,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    pixel_values: Tensor,
    trigger_token_ids: Tensor,
    cand_trigger_token_ids: Any,
    num_trigger_tokens: int,
    snli: bool = False,
    criterion: Any = None,
    beam_size: int = 1,
    increase_loss: bool = False,
    options: Any = None,
) -> Any:
    """The triggers after one left-to-right pass, each candidate judged by the batch's mean loss.

    The image tower runs once, the text tower once for each candidate and once for each position; a position's losses
    are one batched :func:`ccu_fast.info_nce`. ``input_ids`` is written as the authors' function writes it.
    """
    usual = _plain(criterion, options) and _calls(original, "get_loss_per_candidate", "get_loss")
    if snli or beam_size != 1 or not usual or not hasattr(model, "get_text_features"):
        return NotImplemented
    candidates = torch.as_tensor(cand_trigger_token_ids).to(input_ids.device)
    triggers = trigger_token_ids.clone()
    scale = model.logit_scale.exp()
    image: Tensor | None = None
    for position in range(num_trigger_tokens):
        input_ids[:, 1 : 1 + num_trigger_tokens] = triggers.to(input_ids.device)
        if image is None:
            first = model(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
            image, banks = first.image_embeds, [first.text_embeds]
        else:
            banks = [_text(model, input_ids, attention_mask)]
        variant = input_ids.clone()
        for words in candidates[:, position].unbind(1):
            variant[:, position + 1] = words
            banks.append(_text(model, variant, attention_mask))
        losses = info_nce(image, torch.stack(banks), scale=scale)
        best = int(losses.argmax() if increase_loss else losses.argmin())
        if best > 0:
            triggers[:, position] = candidates[:, position, best - 1].to(triggers)
    return triggers


def min_min_attack(
    original: Any,
    self: Any,
    batch: Any,
    model: Any,
    criterion: Any,
    batch_token: Tensor,
    random_noise: Any = None,
    options: Any = None,
) -> Any:
    """The noisy images and the noise before it is cut to valid pixels, after ``num_steps`` descending PGD steps.

    Each step puts another permutation of the captions behind the triggers, drawn as the authors' function draws it.
    Weights get no gradient; the authors' leave the last step's behind.
    """
    usual = _plain(criterion, options) and _calls(original, "get_loss")
    if not usual or not hasattr(model, "get_text_features"):
        return NotImplemented
    device = options.device
    ids, mask, pixels = (batch[key].to(device) for key in ("input_ids", "attention_mask", "pixel_values"))
    scale = model.logit_scale.exp().detach()
    noise = random_noise
    noisy = torch.clamp(pixels + noise, self.lower_limit, self.upper_limit)
    weights = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in weights:
            p.requires_grad_(False)
        for _ in range(self.num_steps):
            order = torch.randperm(len(ids))
            captions = ids[order]
            captions[:, 1 : 1 + self.num_trigger_tokens] = batch_token.to(captions)
            text = _text(model, captions, mask)
            leaf = noisy.detach().requires_grad_(True)
            image = model.get_image_features(pixel_values=leaf)
            loss = info_nce(image / image.norm(dim=-1, keepdim=True), text, scale=scale)
            (grad,) = torch.autograd.grad(loss, leaf)
            # The radius is a tensor of the image's shape there, so this is not pgd_step_.
            noise = torch.clamp(noisy.detach() - self.step_size * grad.sign() - pixels, -self.epsilon, self.epsilon)
            noisy = torch.clamp(pixels + noise, self.lower_limit, self.upper_limit)
    finally:
        for p in weights:
            p.requires_grad_(True)
    return noisy.requires_grad_(True), noise


def _text(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        text = model.get_text_features(input_ids=ids, attention_mask=mask)
        return text / text.norm(dim=-1, keepdim=True)


def _plain(criterion: Any, options: Any) -> bool:
    """The loss is CLIP's: no second views, no gathering, no constraint, torch's cross-entropy as it comes."""
    return (
        isinstance(criterion, nn.CrossEntropyLoss)
        and is_stock(criterion.forward, "torch.nn.modules.loss.CrossEntropyLoss.forward")
        and torch_is_stock()
        and criterion.weight is None
        and (criterion.reduction, criterion.label_smoothing) == ("mean", 0.0)
        and criterion.ignore_index < 0  # no label of this batch
        and not any(getattr(options, name, False) for name in ("inmodal", "distributed", "unlearn"))
    )


def _calls(original: Any, *names: str) -> bool:
    """Whether the functions that an authors' function calls by these names are the authors' too, where it has them."""
    found = {name: inspect.unwrap(original).__globals__.get(name) for name in names}
    return all(function is None or _is_authors(function, name) for name, function in found.items())


def _is_authors(function: Any, name: str) -> bool:
    function = below_patches(function)
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__") or function.__closure__:
        return False
    (must, may), names = map(str.split, NAMES[name]), set(function.__code__.co_names)
    return set(must) <= names <= {*must, *may}


def _modules() -> list[ModuleType]:
    own = __name__.split(".")[0]
    others = (m for name, m in list(sys.modules.items()) if isinstance(m, ModuleType) and name.split(".")[0] != own)
    return list(dict.fromkeys(others))  # one may be there under two names


def _site(owner: Any, replacement: Callable[..., Any]) -> Site:
    """A replacement here is called like the authors' function, after ``original``."""
    return Site(owner, replacement.__name__, tuple(inspect.signature(replacement).parameters)[1:], replacement)


def _serves(replacement: Callable[..., Any], function: Any) -> bool:
    name = replacement.__name__
    if not inspect.isfunction(function) or (name in NAMES and not _is_authors(function, name)):
        return False
    return tuple(inspect.signature(function).parameters) == _site(None, replacement).parameters


def _is_published(attack: Any) -> bool:
    """Whether this is the variant that the authors' command runs: captions shuffled in every step, get_loss alone.

    Other files have variants with other losses under the same name.
    """
    if not _serves(min_min_attack, attack):
        return False
    attack = below_patches(attack)
    names = set(attack.__code__.co_names) if not hasattr(attack, "__wrapped__") else set()
    return {"randperm", "get_loss", "step_size", "epsilon"} <= names and not names & {"image_loss", "KMeans"}
