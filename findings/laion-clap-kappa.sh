#!/usr/bin/env bash
# laion-clap's weighted contrastive loss cannot be computed in one process without its MLP heads.
#
# laion-clap's training takes --kappa, "the kappa in the weighted contrastive loss", which becomes weight_loss_kappa of its
# ClipLoss. The weights are made from the features gathered over all processes, and with world_size=1 nothing is gathered:
# the names all_audio_features and all_text_features are never bound. With mlp_loss=True the weights come from the features
# at hand, and the same option works; so nothing in the constructor or its defaults tells the two apart.
#
# Seen with 1.1.4 and 1.1.7, 8 pairs of 16 features. kappa 0: a loss. kappa 1: UnboundLocalError. kappa 1, mlp_loss: a loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy scikit-learn
cat > "$folder/weighted.py" <<'PYTHON'
# The module of the loss alone: the package imports what reads audio.
import importlib.util
import sys

import torch

version, path = sys.argv[1:]
spec = importlib.util.spec_from_file_location("loss", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
torch.manual_seed(0)
audio, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=-1) for _ in range(2))
for kappa, heads in ((0, False), (1, False), (1, True)):
    loss = module.ClipLoss(weight_loss_kappa=kappa, mlp_loss=heads)
    more = {"logit_scale_t": 10.0, "audio_features_mlp": audio, "text_features_mlp": text} if heads else {}
    try:
        loss(audio, text, 10.0, **more)
        outcome = "a loss"
    except Exception as error:
        outcome = type(error).__name__
    print(version, f"kappa {kappa}{', mlp_loss' * heads}: {outcome}")
PYTHON
for version in 1.1.4 1.1.7; do
  pip --no-deps --target "$folder/$version" "laion-clap==$version"
  "$folder/venv/bin/python" "$folder/weighted.py" "$version" "$folder/$version/laion_clap/clap_module/loss.py"
done | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
1.1.4 kappa 0: a loss
1.1.4 kappa 1: UnboundLocalError
1.1.4 kappa 1, mlp_loss: a loss
1.1.7 kappa 0: a loss
1.1.7 kappa 1: UnboundLocalError
1.1.7 kappa 1, mlp_loss: a loss
EXPECTED
