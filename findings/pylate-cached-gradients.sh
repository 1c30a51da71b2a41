#!/usr/bin/env bash
# pylate 1.6.0: CachedContrastive returns the loss of Contrastive, but gradients that are batch-size times larger.
#
# With size_average=True, the default of both, the loss is the mean over the queries. calculate_loss in
# losses/cached_contrastive.py calls backward on the sum over each chunk and divides by the batch size only afterwards,
# so that the division reaches the returned loss alone; in fact size_average makes no difference to the gradients. One
# would have guessed that caching saves memory and changes nothing else, as gradient caching promises, and the equal
# losses seem to confirm it. So learning rate and gradient clipping of Contrastive do not carry over to
# CachedContrastive, nor from one batch size to another: SGD steps batch-size times farther, and with Adam, which
# divides the factor out, clipping by norm still sets in that much earlier.
#
# Seen, loss and norm of the gradient: batch of 8: Contrastive 2.8771, 0.4414; CachedContrastive 2.8771, 3.5315, 8.00
# times. Batch of 16: Contrastive 2.9900, 0.3101; CachedContrastive 2.9900, 4.9624, 16.00 times.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy sentence-transformers==5.3.0 transformers==5.3.0 datasets==5.2.0
pip --no-deps pylate==1.6.0  # the losses import without its other requirements
cat > "$folder/gradients.py" <<'PYTHON'
import pylate
import torch
from pylate.losses import CachedContrastive, Contrastive


class Tokens(torch.nn.Module):  # in place of a ColBERT: the losses read these two attributes and the token vectors
    skiplist = ()
    do_query_expansion = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(50, 8)

    def forward(self, features):
        return {"token_embeddings": self.table(features["input_ids"])}


def seen(kind, texts, **options):
    model = Tokens()
    loss = kind(model, **options)(texts)
    loss.backward()
    return loss.detach(), model.table.weight.grad


print(f"pylate {pylate.__version__}")
for batch in (8, 16):
    torch.manual_seed(batch)
    mask = torch.ones(batch, 5, dtype=torch.long)
    texts = [{"input_ids": torch.randint(0, 50, (batch, 5)), "attention_mask": mask} for _ in range(2)]
    plain, plain_gradient = seen(Contrastive, texts)
    cached, cached_gradient = seen(CachedContrastive, texts, mini_batch_size=4)
    summed, summed_gradient = seen(CachedContrastive, texts, mini_batch_size=4, size_average=False)
    times = cached_gradient.norm() / plain_gradient.norm()
    print(f"batch of {batch}: Contrastive {plain:.4f}, {plain_gradient.norm():.4f}; "
          f"CachedContrastive {cached:.4f}, {cached_gradient.norm():.4f}, {times:.2f} times")
    torch.testing.assert_close(cached, plain)
    torch.testing.assert_close(cached_gradient, batch * plain_gradient)
    torch.testing.assert_close(summed, batch * plain)
    torch.testing.assert_close(summed_gradient, cached_gradient)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/gradients.py"
