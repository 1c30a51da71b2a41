#!/usr/bin/env bash
# transformers 5.24.0: AutoTokenizer finds a tokenizer in a CLIP folder without one, and all captions are alike to it.
#
# model.save_pretrained writes weights and config.json alone, so folders without tokenizer files are common. One would
# expect from_pretrained of AutoTokenizer or CLIPTokenizer to fail there, for want of a vocabulary. Both return a
# CLIPTokenizer whose vocabulary is its two special tokens: the class makes it up. Each letter of a caption is then an
# unknown token, for which CLIP has <|endoftext|>, here 2, so that captions with the same number of letters have the same
# ids. The model looks for its own end token, 49407, finds none and takes the feature of the first position, where causal
# attention has seen no word: whatever its length, every caption has the same embedding, and zero-shot classification
# gives every picture the same scores. No warning says so.
#
# Seen: CLIPTokenizer of 2 tokens; "cat" and "dog" [0, 2, 2, 2, 2]; three captions at most 0.0 apart.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.24.0
cat > "$folder/captions.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
folder = sys.argv[1]
torch.manual_seed(0)
config = CLIPConfig(text_config=TOWER, vision_config=TOWER | {"image_size": 8, "patch_size": 4})
CLIPModel(config).save_pretrained(folder)

for cls in (AutoTokenizer, CLIPTokenizer):
    tokenizer = cls.from_pretrained(folder)
    assert type(tokenizer) is CLIPTokenizer and set(tokenizer.get_vocab()) == {"<|startoftext|>", "<|endoftext|>"}
    cat, dog = tokenizer(["cat", "dog"])["input_ids"]
    assert cat == dog == [0, 2, 2, 2, 2]

model = CLIPModel.from_pretrained(folder).eval()
captions = ["a photo of a cat", "a photo of a dog", "three aeroplanes in a row"]
with torch.no_grad():
    features = model.get_text_features(**tokenizer(captions, padding=True, return_tensors="pt")).pooler_output
apart = (features - features[0]).abs().max().item()
print(f"transformers {transformers.__version__}: {type(tokenizer).__name__} of {len(tokenizer)} tokens; "
      f'"cat" and "dog" {cat}; three captions at most {apart} apart')
assert features.abs().max() > 1e-3 and apart < 1e-6
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/captions.py" "$folder/clip"
