#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0 on a CPU: the dtype of a contrastive loss depends on the model, not on the weights.
#
# In bf16, CLIPModel(return_loss=True) returns a bf16 loss and SiglipModel an fp32 one, from bf16 logits both: SigLIP's loss
# makes its signs from a torch.eye in the default dtype. Near log(N) a bf16 loss moves in steps of 2^-7 for N = 4 and 2^-5
# for N = 64, so that what a training loop logs stands still while the model learns; the fp32 loss hides that its logits,
# too, were rounded to bf16. Under autocast, with fp32 weights, both losses are fp32: a run with bf16 weights and one under
# autocast cannot be compared by their losses.
#
# Seen: CLIPModel weights torch.bfloat16 autocast torch.float32; SiglipModel weights torch.float32 autocast torch.float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

transformers.logging.set_verbosity_error()
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = TOWER | {"vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
IMAGE = TOWER | {"image_size": 8, "patch_size": 4}


def seen(config, model, more):
    torch.manual_seed(0)
    model = model(config(text_config=TEXT | more, vision_config=IMAGE)).eval()
    batch = {"input_ids": torch.randint(3, 30, (4, 8)), "pixel_values": torch.randn(4, 3, 8, 8), "return_loss": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(**batch).loss.dtype
    out = model.bfloat16()(**batch | {"pixel_values": batch["pixel_values"].bfloat16()})
    assert out.logits_per_image.dtype == torch.bfloat16
    return out.loss.dtype, cast


clip, siglip = seen(CLIPConfig, CLIPModel, {}), seen(SiglipConfig, SiglipModel, {"projection_size": 16})
print(f"torch {torch.__version__}, transformers {transformers.__version__}: "
      f"CLIPModel weights {clip[0]} autocast {clip[1]}; SiglipModel weights {siglip[0]} autocast {siglip[1]}")
assert clip == (torch.bfloat16, torch.float32)
assert siglip == (torch.float32, torch.float32)
PYTHON
