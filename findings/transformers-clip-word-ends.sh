#!/usr/bin/env bash
# transformers 5.24.0: a CLIPTokenizer trained on other captions ends a caption at the first word with a new last letter.
#
# train_new_from_iterator puts all 256 bytes into the new vocabulary, and a byte-level tokenizer, one would think, then
# has no unknown tokens. But CLIP's marks the last letter of a word with </w>, and with that mark the vocabulary has only
# letters that ended a word in the captions it was trained on. Any other is an unknown token, for which CLIP has
# <|endoftext|>. CLIPModel reads the feature at the first <|endoftext|>, so the rest of the caption does not count: after
# training on captions without digits, all captions that begin with a digit have one embedding. Training on each letter,
# digit and sign as a word of its own as well puts them in.
#
# Seen: "!" True, "!</w>" False; a dog ! on a hat: a</w> dog</w> <|endoftext|> on</w> a</w> hat</w>; "4 dogs" and "7 cats"
# 0.0000 apart; trained on every sign as well: "!</w>" True, more than 0.1 apart.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import string

import torch
import transformers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

transformers.logging.set_verbosity_error()
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CAPTIONS = ["a photo of a cat", "a photo of a dog", "two birds on a tree", "a man with a hat"] * 10

SIGNS = " ".join(string.ascii_letters + string.digits + string.punctuation)


def seen(captions):
    tokenizer = CLIPTokenizer().train_new_from_iterator(captions, 600, show_progress=False)
    torch.manual_seed(0)
    text = TOWER | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER | {"image_size": 8, "patch_size": 4})).eval()
    ids = tokenizer(["4 dogs", "7 cats"], padding=True, return_tensors="pt")
    with torch.no_grad():
        first, second = model.get_text_features(**ids).pooler_output
    vocabulary = tokenizer.get_vocab()
    there = ["!" in vocabulary, "!</w>" in vocabulary, "4" in vocabulary, "4</w>" in vocabulary]
    return there, tokenizer.tokenize("a dog ! on a hat"), (first - second).abs().max().item()


print("transformers", transformers.__version__)
for name, captions in (("captions", CAPTIONS), ("captions and signs", [*CAPTIONS, SIGNS])):
    there, tokens, apart = seen(captions)
    print(f'{name}: "!" {there[0]}, "!</w>" {there[1]}; a dog ! on a hat: {" ".join(tokens)}; '
          f'"4 dogs" and "7 cats" {apart:.4f} apart')
    if captions is CAPTIONS:
        assert there == [True, False, True, False] and apart < 1e-6
        assert tokens == ["a</w>", "dog</w>", "<|endoftext|>", "on</w>", "a</w>", "hat</w>"]
    else:
        assert all(there) and apart > 0.1
        assert tokens == ["a</w>", "dog</w>", "!</w>", "on</w>", "a</w>", "hat</w>"]
PYTHON
