"""Random models under the names that sentence-transformers' tests download, in a cache as huggingface_hub keeps it."""

from __future__ import annotations

import string
from pathlib import Path

import torch

PLAIN = "distilbert/distilbert-base-uncased"
DENSE = "sentence-transformers-testing/stsb-bert-tiny-safetensors"
SPARSE = "sparse-encoder-testing/splade-bert-tiny-nq"
REVISION = "0" * 40


def make(folder: Path) -> Path:
    """A value for HF_HOME in ``folder``: under each name a BERT of two layers that reads letters."""
    import transformers
    from sentence_transformers import SentenceTransformer, SparseEncoder
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

    characters = string.ascii_letters + string.digits + string.punctuation
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    bert = _repository(folder, PLAIN)
    (bert / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(vocab=str(bert / "vocab.txt"), model_max_length=128).save_pretrained(bert)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(bert)

    dense = SentenceTransformer(modules=[Transformer(str(bert)), Pooling(config.hidden_size)])
    dense.save(str(_repository(folder, DENSE)), create_model_card=False)
    sparse = SparseEncoder(modules=[MLMTransformer(str(bert)), SpladePooling("max")])
    sparse.save(str(_repository(folder, SPARSE)), create_model_card=False)
    return folder


def _repository(home: Path, name: str) -> Path:
    """Where the files of a model go."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    files = repository / "snapshots" / REVISION
    files.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return files
