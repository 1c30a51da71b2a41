#!/usr/bin/env bash
# transformers 5.24.0: a CLIP with a vocabulary of its own has one embedding for all captions and trains to log N.
#
# A caption's feature is read where its id is eos_token_id. That is 49407 by default, whatever vocab_size is, and the
# configuration accepts an end token that its vocabulary does not have. Where no id of a row matches, the model takes
# position 0, the argmax of a row of zeros. Attention is causal, so that position has seen the start token alone and is
# the same in every row. One would expect an error, or the last position; instead training goes on and stops at log N.
# Captions cut by slicing, which lose their end token, are alike for the same reason. Nor is every end token that is set
# the one that is read: with 2 the feature is read at the highest id of the row.
#
# Seen, 4 pairs, vocabulary of 40, end token 39, 200 steps: eos_token_id left at 49407: loss 1.3863, captions 0.0000
# apart; eos_token_id 39: loss 0.0001, captions 6.2167 apart, 0.0000 without their last id. End token and eos_token_id 2:
# read at positions [3, 3, 2, 1] of 7.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import math

import torch
import transformers
from transformers import CLIPConfig, CLIPModel

transformers.logging.set_verbosity_error()
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
START, END = 38, 39


def clip(**more):
    torch.manual_seed(0)
    text = TOWER | {"vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": START} | more
    return CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER | {"image_size": 8, "patch_size": 4}))


def trained(**more):
    model = clip(**more)
    words = torch.randint(0, START, (4, 6))
    ids = torch.cat([torch.full((4, 1), START), words, torch.full((4, 1), END)], dim=1)
    pixels = torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = model(input_ids=ids, pixel_values=pixels, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), apart(model, ids), apart(model, ids[:, :-1])


@torch.no_grad()
def apart(model, ids):
    features = model.get_text_features(input_ids=ids).pooler_output
    return (features - features[0]).abs().max().item()


def positions(end):
    model = clip(eos_token_id=end).eval()
    torch.manual_seed(0)
    ids = torch.cat([torch.randint(3, START, (4, 6)), torch.full((4, 1), end)], dim=1)
    out = model.text_model(input_ids=ids)
    read = (out.last_hidden_state == out.pooler_output[:, None]).all(-1).int().argmax(-1)
    return ids, read.tolist()


left, named = trained(), trained(eos_token_id=END)
for name, (loss, whole, cut) in (("left at 49407", left), (f"{END}", named)):
    print(f"transformers {transformers.__version__}, eos_token_id {name}: loss {loss:.4f}, "
          f"captions {whole:.4f} apart, {cut:.4f} without their last id")
ids, read = positions(2)
print(f"end token and eos_token_id 2: read at positions {read} of {ids.shape[1]}")
assert CLIPConfig(text_config={"vocab_size": 40}).text_config.eos_token_id == 49407
assert abs(left[0] - math.log(4)) < 1e-3 and left[1] < 1e-5 and left[2] < 1e-5
assert named[0] < 0.01 and named[1] > 0.1 and named[2] < 1e-5
assert read == ids.argmax(-1).tolist() and max(read) < 6
assert positions(END)[1] == [6, 6, 6, 6]
PYTHON
