#!/usr/bin/env bash
# open_clip_torch 3.3.0: ClipLoss with its defaults, under DDP on W ranks, gives the towers 1/W of the gradient.
#
# Each rank computes the loss of the global batch, but only its own rows have a gradient; DDP then averages what ought to
# be summed. The loss is that of one process, and the gradient of the scale as well, so a comparison of these would show
# nothing; learning rate and gradient clipping of SGD mean something else for each number of GPUs.
# gather_with_grad=True gives the gradient of one process. local_loss=True alone gives another direction: a row learns as
# an anchor and never as a candidate, so that the gradient does not depend on W.
#
# Seen: loss, norm of the gradient of image tower, text tower and scale. One process: 6.7634 11.4281 7.2105 6.2059.
# Defaults: 2 ranks 6.7634 5.7141 3.6053 6.2059; 4 ranks 6.7634 2.8570 1.8026 6.2059. gather_with_grad, 2 and 4 ranks: as
# one process. local_loss, 2 and 4 ranks: 4.8842 4.0750 6.2059, cosine of the image tower to one process 0.83.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy
pip --no-deps --target "$folder/open_clip" open_clip_torch==3.3.0  # for the module of the losses: it needs torch alone
cat > "$folder/ranks.py" <<'PYTHON'
import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

FOLDER = Path(sys.argv[1])
OPTIONS = ({}, {"gather_with_grad": True}, {"local_loss": True})
spec = importlib.util.spec_from_file_location("loss", FOLDER / "open_clip" / "open_clip" / "loss.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
        self.scale = torch.nn.Parameter(torch.tensor(10.0).log())

    def forward(self, images, texts):
        return normalize(self.image(images), dim=-1), normalize(self.text(texts), dim=-1), self.scale.exp()


def seen(rank, ranks, options):
    torch.manual_seed(1)
    batch = [torch.randn(8, 8).chunk(ranks)[rank] for _ in range(2)]
    towers = Towers()
    model = DistributedDataParallel(towers) if ranks > 1 else towers
    loss = module.ClipLoss(rank=rank, world_size=ranks, **options)(*model(*batch))
    loss.backward()
    return [loss.detach(), towers.image.weight.grad, towers.text.weight.grad, towers.scale.grad]


def work(rank, ranks):
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/store{ranks}", rank=rank, world_size=ranks)
    found = [seen(rank, ranks, options) for options in OPTIONS]
    if rank == 0:
        torch.save(found, FOLDER / f"{ranks}.pt")
    dist.destroy_process_group()


def shown(name, found):
    print(f"{name}:", " ".join(f"{part.norm():.4f}" for part in found))


if __name__ == "__main__":
    one = seen(0, 1, {})
    shown("one process", one)
    for ranks in (2, 4):
        mp.spawn(work, (ranks,), ranks)
        usual, gathered, local = torch.load(FOLDER / f"{ranks}.pt")
        shown(f"{ranks} ranks, defaults", usual)
        shown(f"{ranks} ranks, gather_with_grad", gathered)
        shown(f"{ranks} ranks, local_loss", local)
        cosine = torch.nn.functional.cosine_similarity(local[1].flatten(), one[1].flatten(), dim=0)
        print(f"{ranks} ranks, local_loss: cosine {cosine:.2f} to the gradient of one process")
        torch.testing.assert_close(usual, [one[0], one[1] / ranks, one[2] / ranks, one[3]])
        torch.testing.assert_close(gathered, one)
        assert cosine < 0.95
        first = local if ranks == 2 else first
        torch.testing.assert_close(local[1:], first[1:])
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/ranks.py" "$folder"
