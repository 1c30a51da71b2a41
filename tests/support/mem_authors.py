"""What the MEM authors' functions do, written plainly from their description, with their names and signatures.

Stands in for the authors' code if no copy of it is available: the loss over everything, scoring on the host, one
full forward for every candidate, weight gradients in the noise steps.
"""

from __future__ import annotations

import heapq
from copy import deepcopy
from operator import itemgetter

import torch


def get_loss(umodel, outputs, criterion, options, gather_backdoor_indices):  # type: ignore[no-untyped-def]
    logits = umodel.logit_scale.exp() * outputs.image_embeds @ outputs.text_embeds.t()
    target = torch.arange(len(logits))
    loss = (criterion(logits, target) + criterion(logits.t(), target)) / 2
    if options.unlearn:
        loss = loss + options.constraint_weight
    return loss, loss, torch.tensor(0)


def hotflip_attack(  # type: ignore[no-untyped-def]
    averaged_grad, embedding_matrix, increase_loss=False, num_candidates=1, num_trigger_tokens=1, no_zero_index=None
):
    scores = averaged_grad.cpu()[:, 1 : 1 + num_trigger_tokens] @ embedding_matrix.cpu().transpose(0, 1)
    if not increase_loss:
        scores = -scores
    if num_candidates > 1:
        return scores.topk(num_candidates, dim=2)[1].numpy()
    return scores.max(2)[1][0].numpy()


def get_best_candidates(  # type: ignore[no-untyped-def]
    model,
    input_ids,
    attention_mask,
    pixel_values,
    trigger_token_ids,
    cand_trigger_token_ids,
    num_trigger_tokens,
    snli=False,
    criterion=None,
    beam_size=1,
    increase_loss=False,
    options=None,
):
    best = trigger_token_ids
    for position in range(num_trigger_tokens):
        tried = get_loss_per_candidate(
            position,
            model,
            (input_ids, attention_mask, pixel_values),
            best,
            cand_trigger_token_ids,
            num_trigger_tokens,
            criterion,
            options,
        )
        choose = heapq.nlargest if increase_loss else heapq.nsmallest
        best = choose(1, tried, key=itemgetter(1))[0][0]
    return best


def get_loss_per_candidate(position, model, batch, triggers, candidates, words, criterion, options):  # type: ignore[no-untyped-def]
    input_ids, attention_mask, pixel_values = batch
    input_ids[:, 1 : 1 + words] = triggers
    tried = []
    for k in range(-1, candidates.shape[-1]):
        changed, ids = deepcopy(triggers), deepcopy(input_ids)
        if k >= 0:
            changed[:, position] = torch.LongTensor(candidates)[:, position, k]
            ids[:, 1 : 1 + words] = changed
        with torch.no_grad():
            outputs = model(input_ids=ids, attention_mask=attention_mask, pixel_values=pixel_values)
            loss = get_loss(model, outputs, criterion, options, None)[0]
        tried.append((changed, loss.cpu().numpy()))
    return tried


class PerturbationTool:
    def __init__(self, epsilon, num_steps, step_size, lower_limit, upper_limit, num_trigger_tokens):  # type: ignore[no-untyped-def]
        self.epsilon, self.num_steps, self.step_size = epsilon, num_steps, step_size
        self.lower_limit, self.upper_limit, self.num_trigger_tokens = lower_limit, upper_limit, num_trigger_tokens

    def min_min_attack(self, batch, model, criterion, batch_token, random_noise=None, options=None):  # type: ignore[no-untyped-def]
        input_ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]

        def valid(images: torch.Tensor) -> torch.Tensor:
            return torch.max(torch.min(images, self.upper_limit), self.lower_limit).detach().requires_grad_(True)

        noisy, eta = valid(pixels + random_noise), random_noise
        for _ in range(self.num_steps):
            model.zero_grad()
            ids = input_ids[torch.randperm(len(input_ids))]
            ids[:, 1 : 1 + self.num_trigger_tokens] = batch_token
            outputs = model(input_ids=ids, attention_mask=mask, pixel_values=noisy)
            get_loss(model, outputs, criterion, options, None)[0].backward()
            moved = noisy.detach() - self.step_size * noisy.grad.sign()
            eta = torch.max(torch.min(moved - pixels, self.epsilon), -self.epsilon)
            noisy = valid(pixels + eta)
        return noisy, eta
